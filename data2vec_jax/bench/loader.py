"""How fast a user's files become batches, and how fast PyTorch's DataLoader makes them.

A core is a process that may use one core alone. Both sides read the same batches, round and round,
in turn.
"""

import contextlib
import copy
import dataclasses
import functools
import itertools
import math
import multiprocessing
import os
import pickle
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import jax

from data2vec_jax.bench.measure import alternate, seconds_of
from data2vec_jax.core import sharding
from data2vec_jax.core.bad_examples import KEY
from data2vec_jax.core.errors import UserError
from data2vec_jax.data import batches, readers
from data2vec_jax.metrics.hardware import peak_host_bytes
from data2vec_jax.modalities import contract
from data2vec_jax.tasks import pretrain

PASS_SECONDS = 1.0  # about, of the batches that are read round and round
PART_SECONDS = 3.0  # of a measurement of the parts, and of a number of processes
ROUNDS = 3  # of each number of processes, in turn


def cycled(reader: batches.HostBatchReader, count: int, n: int) -> dict[str, Any]:
    """Batch n of the first `count`, round and round."""
    return {name: x for name, x in reader(n % count).items() if name != KEY}


@dataclasses.dataclass
class Peer:
    """PyTorch's DataLoader of the same batches. load: a modality's `Bench.peer`."""

    load: Callable[[int, int], Any]
    plan: batches.TrainSampler
    count: int

    def __getitem__(self, key: tuple[int, int]) -> Any:
        return self.load(*key)

    def keys(self) -> Iterator[list[tuple[int, int]]]:
        """(example, bucket) of each row of the next batch."""
        for bucket, ids in map(self.plan, itertools.cycle(range(self.count))):
            yield [(int(i), bucket) for i in ids]

    def stream(self, workers: int) -> Iterator[Any]:
        """Batches without end."""
        from torch.utils.data import DataLoader

        start = "spawn" if workers else None  # a fork would copy locks that threads of JAX hold
        options = {"num_workers": workers, "multiprocessing_context": start}
        yield from DataLoader(self, batch_sampler=self.keys(), **options)


def bench_loader(
    config: Mapping[str, Any],
    *,
    peer: bool = False,
    seconds: float = 360.0,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Every number of a config's data, in seconds and bytes: see `report_loader` for each.

    peer: measure PyTorch's loader, too. seconds: that all of this may take; each loader is measured
    once in any case. say: told what is being done. Raises UserError: the data cannot be read, or
    there is no such loader.
    """
    deadline = time.monotonic() + seconds
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    say("opening the data")
    with jax.set_mesh(mesh):
        pretrain.abstract_task(config)  # refuses what `train` refuses
        source, examples, plan = pretrain.open_examples(config)
    modality, options = contract.get(config["modality"]), pretrain.DataConfig(**config["data"])
    reader = batches.HostBatchReader(plan, examples)
    reader(0)  # warm-up
    count = math.ceil(min(PASS_SECONDS / seconds_of(lambda: reader(0)), plan.per_epoch))
    ours = functools.partial(cycled, reader, count)
    theirs = Peer(peer_of(modality, source, examples), plan, count) if peer else None
    say("measuring one core")
    one = on_one_core(measure_core, reader, count, pickle.dumps(theirs), deadline)
    start = time.process_time()
    modality.examples(source, like=examples, **config["examples"])
    start = time.process_time() - start

    def place(batch):
        return jax.block_until_ready(sharding.to_global(batch, mesh))

    host = ours(0)
    transfer = statistics.median(seconds_of(lambda: place(host)) for _ in range(10))
    ahead = options.prefetch
    streams = [
        lambda n: readers.stream(ours, 0, sys.maxsize, workers=n, prefetch=ahead, place=place),
        *([theirs.stream] if theirs else []),
    ]
    rates = measure_processes(streams, ahead, deadline, say)
    rows = sum(len(plan(n)[1]) for n in range(count)) / count
    sides = [
        {
            "core_seconds_per_batch": statistics.median(blocks),
            "examples_per_second_of_a_core": rows / statistics.median(blocks),
            "examples_per_second": found,
        }
        for blocks, found in zip(one["blocks"], rates, strict=True)
    ]
    result = {
        "examples": len(source),
        "batch_size": options.batch_size,
        "rows_of_batches": rows,
        "seconds_of_parts": {**one["parts"], "transfer": transfer / len(host["example_id"])},
        "start_seconds_per_example": start / len(examples.bucket_of),
        "peak_bytes": {"main": peak_host_bytes(), "reader": one["peak_bytes"]},
        "device": mesh.devices.flat[0].device_kind,
        **sides[0],
        "peer": None,
    }
    if theirs:
        ratios = sorted(b / a for a, b in zip(*one["blocks"], strict=True))
        first = result["core_seconds_per_batch"] + rows * result["start_seconds_per_example"]
        result["peer"] = sides[1] | {
            "ratio": statistics.median(ratios),
            "ratio_of_blocks": ratios,
            "ratio_of_first_epoch": sides[1]["core_seconds_per_batch"] / first,
        }
    return result


def peer_of(modality: contract.Modality, source: Any, examples: Any) -> Callable[[int, int], Any]:
    """A modality's `Bench.peer` of these examples. Raises UserError: there is none, a package is
    missing, or the source holds neither files nor texts."""
    if modality.bench.peer is None:
        raise UserError(f"--peer: modality '{modality.name}' has no loader of PyTorch beside it")
    try:
        import torch  # noqa: F401

        return modality.bench.peer(examples, [one.signal for one in source.stored()])
    except ImportError as error:
        name = (error.name or "torch").partition(".")[0]
        raise UserError(f"--peer needs {name}; install it: pip install {name}") from None


def on_one_core(call: Callable[..., Any], *arguments: Any) -> Any:
    """What `call` returns, from a new process that may use the first of our cores alone, from its
    start on, so that libraries begin with one thread."""
    ours = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(ours)})
    try:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            return pool.submit(call, *arguments).result()
    finally:
        os.sched_setaffinity(0, ours)


def measure_core(reader: Any, count: int, peer: bytes, deadline: float) -> dict[str, Any]:
    """Seconds a batch in blocks of both sides, in turn; and of ours the parts and the memory.

    peer: a pickle, so that PyTorch is not in the memory of ours.
    """
    found = {"parts": parts_of(reader, count), "peak_bytes": peak_host_bytes()}
    theirs = pickle.loads(peer)
    streams = [map(functools.partial(cycled, reader, count), itertools.count())]
    streams += [theirs.stream(0)] if theirs else []
    calls = [
        lambda passes, stream=stream: [next(stream) for _ in range(passes * count)]
        for stream in streams
    ]
    took = alternate(calls, True, deadline=deadline)
    return found | {"blocks": [[seconds / count for seconds in side] for side in took]}


def parts_of(reader: batches.HostBatchReader, count: int) -> dict[str, float]:
    """Seconds an example of read, decode, augment and collate, by clocks around our functions.

    'read' is all that a source does but decode: decoders open files by themselves, so each file is
    read beforehand, and the decoder finds it in memory.
    """
    spent: Counter[str] = Counter()

    def clock(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **options: Any) -> Any:
            before, start = spent[name], time.perf_counter()
            try:
                return call(*args, **options)
            finally:  # also of what is called within itself
                spent[name] = before + time.perf_counter() - start

        return timed

    def read(file: Any, name: str) -> Any:
        with contextlib.suppress(OSError, TypeError):
            Path(file).read_bytes()
        return decoders["read"](file, name)

    examples = copy.copy(reader.examples)
    if (source := getattr(examples, "source", None)) is not None:
        names = "read", "read_record", "read_part"
        decoders = {name: getattr(source.codec, name) for name in names}
        decoders = {name: call and clock("decode", call) for name, call in decoders.items()}
        codec = dataclasses.replace(source.codec, **decoders | {"read": read})
        source = source.with_codec(codec)
        source._load, source.part = (clock("source", f) for f in (source._load, source.part))
        examples.source = source
    examples.load = clock("load", examples.load)
    timed = batches.HostBatchReader(reader.sampler, examples)
    timed(0)  # warm-up
    spent.clear()
    rows, numbers, start = 0, itertools.count(), time.perf_counter()
    while not rows or time.perf_counter() - start < PART_SECONDS:
        rows += len(timed(next(numbers) % count)["example_id"])
    load, source, decode = spent["load"], spent["source"], spent["decode"]
    collate = time.perf_counter() - start - load
    found = {"read": source - decode, "decode": decode, "augment": load - source}
    return {name: seconds / rows for name, seconds in (found | {"collate": collate}).items()}


def measure_processes(
    streams: list[Callable[[int], Iterator[Any]]],
    prefetch: int,
    deadline: float,
    say: Callable[[str], None],
) -> list[dict[str, float]]:
    """Examples a second of each of `streams` (number of processes -> batches), in turn, with none
    and with one for each core."""
    found: list[dict[str, float]] = [{} for _ in streams]
    for n in (0, len(os.sched_getaffinity(0))):
        rates, least = [[] for _ in streams], max(n, 1)
        while len(rates[0]) < ROUNDS and (not rates[0] or time.monotonic() < deadline):
            for side, stream in zip(rates, streams, strict=True):
                side.append(rate(stream(n), least * (prefetch + 1) + readers.PLACED, least))
            say(f"{n} processes: " + ", ".join(f"{side[-1]:,.0f} examples/s" for side in rates))
        for side, each in zip(found, rates, strict=True):
            side[str(n)] = statistics.median(each)
    return found


def rate(stream: Iterator[Any], ahead: int, least: int) -> float:
    """Examples a second of a stream, without the first `ahead` batches, which were read before they
    were asked for; of at least so many batches."""
    with contextlib.closing(stream):
        for _ in range(ahead):
            next(stream)
        rows, start = 0, time.perf_counter()
        for n in itertools.count():
            if n >= least and time.perf_counter() - start >= PART_SECONDS:
                return rows / (time.perf_counter() - start)
            rows += len(next(iter(next(stream).values())))


def feeding(result: Mapping[str, Any], step_seconds: float, rows: float) -> dict[str, float]:
    """Cores that make batches as fast as a device trains on `rows` of the longest examples; of
    shorter ones a batch has as many more."""
    seconds = result["core_seconds_per_batch"] * rows / result["batch_size"]
    return {"step_seconds": step_seconds, "rows": rows, "cores": seconds / step_seconds}


def report_loader(result: Mapping[str, Any]) -> str:
    """The numbers in words, a few lines."""

    def speed(side: Mapping[str, Any]) -> str:
        many = (f"{n} processes {each:,.0f}" for n, each in side["examples_per_second"].items())
        return f"{side['examples_per_second_of_a_core']:,.0f} examples/s; {', '.join(many)}"

    parts = ", ".join(f"{k} {1e3 * v:.3f}" for k, v in result["seconds_of_parts"].items())
    memory = ", ".join(f"{name} {size / 2**20:.0f}" for name, size in result["peak_bytes"].items())
    lines = [
        f"{result['config']}: {result['examples']:,} examples, {result['rows_of_batches']:.3g} a "
        f"batch, to {result['device']}",
        f"ms each  {parts}; at the start {1e3 * result['start_seconds_per_example']:.4f}",
        f"one core {speed(result)}",
        f"memory   {memory} MiB",
    ]
    if peer := result["peer"]:
        least, most = (pick(peer["ratio_of_blocks"]) for pick in (min, max))
        lines.append(
            f"peer     {speed(peer)}; ratio of a core {peer['ratio']:.2f} ({least:.2f} to "
            f"{most:.2f}; above 1: ours is faster), of a first epoch with our start "
            f"{peer['ratio_of_first_epoch']:.2f}"
        )
    if feeds := result.get("feeds"):
        lines.append(
            f"feeds    {feeds['cores']:.2f} such cores for a device that takes "
            f"{1e3 * feeds['step_seconds']:.4g} ms for {feeds['rows']:g} of the longest examples"
        )
    return "\n".join(lines)
