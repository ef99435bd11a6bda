"""Every number of a config, and of the same step in PyTorch beside it."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax

from data2vec_jax.bench.measure import alternate, matmul_flops, peak_bytes
from data2vec_jax.bench.parts import parts_of
from data2vec_jax.bench.subject import Subject, sized
from data2vec_jax.core import bad_examples
from data2vec_jax.core.errors import UserError
from data2vec_jax.core.train_step import step_keys
from data2vec_jax.metrics.hardware import peak_flops
from data2vec_jax.objectives.targets import owns_features
from data2vec_jax.tasks import pretrain

DATA_STEPS = 8
SECONDS = 360.0  # of a benchmark


def bench(
    config: Mapping[str, Any],
    *,
    rows: int | None = None,
    peer: bool = False,
    seconds: float = SECONDS,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Every number of a config: see `report` for what each means. Seconds, bytes, FLOPs.

    rows: of the batch; None for the default. peer: measure the PyTorch step, too. seconds: that all
    of this may take; compilation and one block are done in any case, and what is left out is
    'left_out'. say: told what is being done.
    """
    deadline = time.monotonic() + seconds
    devices = jax.devices()
    cpu = devices[0].platform == "cpu"
    if cpu or peer:
        devices = devices[:1]
    if peer:
        import_torch_baseline().check(config)
    config = sized(config, rows, devices)
    say("compiling")
    subject = Subject(config, devices)
    cold, cached = subject.compile(2)
    calls = [subject.steps]
    if peer:
        say("making the PyTorch step")
        other = make_torch_baseline(subject)

        def their_steps(count):
            for _ in range(count):
                other()

        calls.append(their_steps)
    ceiling = matmul_flops(config["dtype"], cpu)
    say("measuring steps")
    took = alternate(calls, cpu, deadline=deadline, say=say)
    ceiling = len(devices) * max(ceiling, matmul_flops(config["dtype"], cpu))
    step = statistics.median(took[0])
    say("measuring parts")
    parts = parts_of(subject, step, cold, deadline)
    in_time = time.monotonic() + (DATA_STEPS + 2) * step < deadline
    views = subject.rows * subject.clones
    result = {
        "examples_per_second": subject.rows / step,
        "step_seconds": step,
        "step_seconds_of_blocks": took[0],
        "mfu": subject.flops / step / peak_flops(devices),
        "mfu_of_measured_matmul": subject.flops / step / ceiling,
        "matmul_flops_per_second": ceiling,
        "flops_per_step": subject.flops,
        "flops_formula": formula(subject),
        "flops_per_masked_view": subject.flops / views,
        "seconds_per_masked_view": step / views,
        "seconds_of_parts": parts,
        "peak_bytes": peak_bytes(subject.program),
        "compile_seconds": cold,
        "compile_seconds_from_cache": cached,
        "data_wait": data_wait(subject) if in_time else None,
        "left_out": ["shares"] * (parts is None) + ["waiting for data"] * (not in_time),
        "peer": None,
        "device": devices[0].device_kind,
        "devices": len(devices),
        "dtype": config["dtype"],
        "batch_size": subject.rows,
        "shapes": {k: list(s.shape) for k, s in subject.shapes.items()},
        "versions": {"jax": jax.__version__},
    }
    if peer:
        theirs = statistics.median(took[1])
        result["peer"] = {
            "step_seconds": theirs,
            "ratio": theirs / step,
            "step_seconds_of_blocks": took[1],
            "ratio_of_best": min(took[1]) / min(took[0]),
            **other.about(),
        }
    return result


def data_wait(subject: Subject) -> float | None:
    """Share of the time that steps wait for their batch; None if the source cannot be read."""
    config = subject.config | {"total_steps": DATA_STEPS + 1}
    with jax.set_mesh(subject.mesh):
        try:
            batches = (
                {name: array for name, array in batch.items() if name != bad_examples.KEY}
                for batch in pretrain.make(config).data(0)
            )
            batch = next(batches)  # the first fills the pipeline
        except UserError:
            return None
        if {k: v.shape for k, v in batch.items()} != {
            k: s.shape for k, s in subject.shapes.items()
        }:
            return None  # the corpus has no example of this length
        waited, start = 0.0, time.perf_counter()
        for _ in range(DATA_STEPS):
            subject.state, _ = subject.program(subject.state, batch)
            before = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - before
        jax.block_until_ready(subject.state)
        return waited / (time.perf_counter() - start)


def formula(subject: Subject) -> str:
    """How `flops_per_step` comes about, with its numbers (see `pretrain.step_flops`)."""
    own = owns_features(subject.model, subject.state.teacher)
    settings = pretrain.objective_of(subject.config)[1]
    parts = pretrain.flops_by_part(
        subject.modality, subject.model, subject.sampler, subject.shapes, own, settings
    )
    f, s, t = (f"{parts[k] / 1e9:.4g}" for k in ("frontend", "student", "teacher"))
    return (
        f"B (3 (F + M S) + T) = {subject.rows} (3 ({f} + {subject.clones} x {s}) + {t}) GFLOPs; "
        "B examples, F front end, M masks of an example, S student on one of them, T teacher"
    )


def import_torch_baseline() -> Any:
    """The module of the baseline, which needs PyTorch."""
    try:
        from data2vec_jax.bench import torch_baseline
    except ImportError as error:
        raise UserError(
            f"--peer needs {error.name}; install it: pip install torch transformers"
        ) from None
    return torch_baseline


def make_torch_baseline(subject: Subject, **options: Any) -> Any:
    """The PyTorch step with this step's batch and masks. options: of `TorchBaseline`."""
    batch = subject.host_batch

    @jax.jit
    def draws(state, batch):
        stages = subject.objective.forward(state.params, state.teacher, batch, step_keys(state))
        return stages.mask, stages.visible

    with jax.set_mesh(subject.mesh):
        mask, visible = jax.device_get(draws(subject.state, batch))
    return import_torch_baseline().TorchBaseline(subject.config, batch, visible, mask, **options)
