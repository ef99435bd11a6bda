"""Clocks: steps of several programs in turn, time to compile, memory, and the data pipeline."""

import contextlib
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

from data2vec_jax.metrics.hardware import measured_flops
from data2vec_jax.tasks import pretrain

BLOCKS = 7  # at most
LEAST_BLOCKS, BUDGET = 3, 90.0  # no more than these, once blocks have taken so many seconds
BLOCK_SECONDS = 1.0  # at least, on accelerators; a CPU's steps are long
CACHE_OPTIONS = {
    "jax_enable_compilation_cache": True,
    "jax_persistent_cache_min_compile_time_secs": 0.0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
}


def seconds_of(call: Callable[[], Any]) -> float:
    """Wall-clock seconds of a call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def alternate(
    calls: Sequence[Callable[[int], None]],
    cpu: bool,
    *,
    deadline: float = math.inf,
    say: Callable[[str], None] = lambda line: None,
) -> list[list[float]]:
    """Seconds a step of each of `calls` (number of steps -> None), block by block in turn.

    In turn, each block begins with a step that is not counted: the other side has had the memory,
    and new pages can take as long as a third of a step.

    deadline: `time.monotonic()` at which the last block should be over; there is at least one. say:
    told what each block took.
    """
    for call in calls:
        call(1)  # warm-up
    counts = [1] * len(calls)
    if not cpu:
        once = [seconds_of(lambda c=call: c(1)) for call in calls]
        counts = [max(1, math.ceil(BLOCK_SECONDS / seconds)) for seconds in once]
    found: list[list[float]] = [[] for _ in calls]
    start = end = time.monotonic()
    for n in range(1, BLOCKS + 1):
        for seconds, call, count in zip(found, calls, counts, strict=True):
            if len(calls) > 1:
                call(1)
            seconds.append(seconds_of(lambda c=call, n=count: c(n)) / count)
        say(f"block {n}: " + ", ".join(f"{1e3 * seconds[-1]:,.1f} ms" for seconds in found))
        began, end = end, time.monotonic()
        next_end = end + (end - began)
        if next_end > deadline or (n >= LEAST_BLOCKS and next_end - start > BUDGET):
            break
    return found


@contextlib.contextmanager
def own_cache() -> Iterator[None]:
    """An empty compilation cache, removed afterwards."""
    options = {name: getattr(jax.config, name) for name in CACHE_OPTIONS}
    options["jax_compilation_cache_dir"] = jax.config.jax_compilation_cache_dir
    with tempfile.TemporaryDirectory() as folder:
        try:
            for name, value in CACHE_OPTIONS.items():
                jax.config.update(name, value)
            jax.config.update("jax_compilation_cache_dir", folder)
            compilation_cache.reset_cache()
            yield
        finally:
            for name, value in options.items():
                jax.config.update(name, value)
            compilation_cache.reset_cache()


def peak_bytes(program: Any) -> int:
    """Bytes on one device at the fullest moment: arguments, results that take no argument's place,
    and temporaries."""
    m = program.memory_analysis()
    kept = m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes
    return int(kept + m.temp_size_in_bytes)


def matmul_flops(dtype: str, cpu: bool) -> float:
    """FLOP/s of a large matrix product on one device: the ceiling of this very machine."""
    return measured_flops(2048 if cpu else 8192, pretrain.DTYPES[dtype])
