"""Speed of the train step, and of the same step in PyTorch beside it.

    python -m data2vec_jax.bench --config=configs/speech_v1.py:base [--peer] [--sweep] \
        [--batch=N] [--json=FILE]

The program is the one that `train` runs, on random input of the config's longest examples. --batch:
examples of all devices; by default a sixteenth of the config's batch per accelerator (the papers'
batches are of 16), on a CPU 2 examples (4 of text) and no more than 10 seconds of speech. --peer:
the step of `peer.py` in the same run, block by block in turn. --sweep: what time and memory do as
batch, length, depth, width and clones grow.
"""

import contextlib
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.compilation_cache import compilation_cache

from data2vec_jax.cli.arguments import config_words, parse, run_main, say, write_json
from data2vec_jax.core import sharding
from data2vec_jax.core.errors import UserError
from data2vec_jax.core.run import Run
from data2vec_jax.core.train_step import step_keys
from data2vec_jax.metrics.hardware import measured_flops, peak_flops
from data2vec_jax.objectives.targets import owns_features
from data2vec_jax.tasks import pretrain
from data2vec_jax.tasks.registry import check_config

OPTIONS = {"peer": "", "sweep": "", "batch": "N", "json": "FILE"}
PAPER_DEVICES = 16  # that the configs' global batches are meant for
CPU_ROWS = {"text": 4}  # 2 otherwise
CPU_SECONDS = 10.0  # of speech
BLOCKS = 7  # at most
LEAST_BLOCKS, BUDGET = 3, 90.0  # fewer, if the steps counted would take more seconds than this
BLOCK_SECONDS = 1.0  # at least, on accelerators; a CPU's steps are long
DATA_STEPS = 8
CACHE_OPTIONS = {
    "jax_enable_compilation_cache": True,
    "jax_persistent_cache_min_compile_time_secs": 0.0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
}


# What is measured ---------------------------------------------------------------------------------


def sized(config: Mapping[str, Any], rows: int | None, devices: Sequence[Any]) -> dict[str, Any]:
    """A copy of `config` with a batch of `rows` (None: the default), one length of examples."""
    config = json.loads(json.dumps(config))
    cpu, examples = devices[0].platform == "cpu", config["examples"]
    if "crops" in examples:
        longest = examples["crops"][-1]
        examples["crops"] = [min(longest, CPU_SECONDS) if cpu else longest]
    if "lengths" in examples:
        examples["lengths"] = [examples["lengths"][-1]]
    if rows is None and cpu:
        rows = CPU_ROWS.get(config["modality"], 2)
    elif rows is None:
        rows = max(config["data"]["batch_size"] // PAPER_DEVICES, 1) * len(devices)
    config["data"] = config["data"] | {"batch_size": rows, "multiple": None, "eval_split": None}
    return config


def fake_batch(
    shapes: Mapping[str, jax.ShapeDtypeStruct], config: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    """Random arrays of these shapes, without padding."""
    rng = np.random.default_rng(config["seed"])
    most = config["model"].get("vocab_size", 256) - 1  # exclusive: the last token is `<mask>`

    def array(name, s):
        if name == "example_id":
            return np.arange(s.shape[0], dtype=s.dtype)
        if np.issubdtype(s.dtype, np.integer):
            return rng.integers(4, most, s.shape).astype(s.dtype)  # text: 0 to 3 are special
        return rng.standard_normal(s.shape).astype(s.dtype)

    return {name: array(name, s) for name, s in shapes.items()}


class Subject:
    """The train step of a config, and a state and a batch to run it on.

    `compile` comes before `steps`.
    """

    def __init__(self, config: Mapping[str, Any], devices: Sequence[Any]):
        check_config(config)
        if config.get("task", "pretrain") != "pretrain":
            raise UserError(f"config.task: bench runs pretraining, not '{config['task']}'")
        section = config["mesh"] if len(devices) > 1 else {}
        self.config, self.mesh = config, sharding.make_mesh(**section, devices=devices)
        self.modality, self.model = pretrain.make_model(config)
        self.objective, self.sampler = pretrain.make_objective(config, self.modality, self.model)
        self.clones = config["objective"].get("clones", 1)
        run = self._run()
        self.shapes = run.task.shapes[-1]
        self.rows = self.shapes["example_id"].shape[0]
        self.flops = run.task.flops(self.shapes)
        self.state = run.init(config["seed"])
        self.host_batch = fake_batch(self.shapes, config)
        self.batch = sharding.to_global(self.host_batch, self.mesh)

    def _run(self):
        with jax.set_mesh(self.mesh):
            return Run(self.config, pretrain.abstract_task(self.config), self.mesh)

    def compile(self, times: int) -> list[float]:
        """Makes the program `times` times; seconds of each, the first with an empty cache, the
        others with the one that it left."""
        seconds = []
        with own_cache():
            for _ in range(times):
                run = self._run()  # nothing traced yet
                start = time.perf_counter()
                self.program = run.program(self.shapes)
                seconds.append(time.perf_counter() - start)
        return seconds

    def steps(self, count: int) -> None:
        """Train steps as the loop runs them: the device is waited for at the end only."""
        for _ in range(count):
            self.state, scalars = self.program(self.state, self.batch)
        jax.block_until_ready((self.state, scalars))


def peak_bytes(program: Any) -> int:
    """Bytes on one device at the fullest moment: arguments, results that take no argument's place,
    and temporaries."""
    m = program.memory_analysis()
    kept = m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes
    return int(kept + m.temp_size_in_bytes)


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


def seconds_of(call: Callable[[], Any]) -> float:
    """Wall-clock seconds of a call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def alternate(calls: Sequence[Callable[[int], None]], cpu: bool) -> list[list[float]]:
    """Seconds a step of each of `calls` (number of steps -> None), block by block in turn.

    In turn, each block begins with a step that is not counted: the other side has had the memory,
    and new pages can take as long as a third of a step.
    """
    for call in calls:
        call(1)  # warm-up
    once = [seconds_of(lambda c=call: c(1)) for call in calls]
    least = 0.0 if cpu else BLOCK_SECONDS
    counts = [max(1, math.ceil(least / seconds)) for seconds in once]
    whole = sum(count * seconds for count, seconds in zip(counts, once, strict=True))
    blocks = max(LEAST_BLOCKS, min(BLOCKS, int(BUDGET / whole)))
    found: list[list[float]] = [[] for _ in calls]
    for _ in range(blocks):
        for seconds, call, count in zip(found, calls, counts, strict=True):
            if len(calls) > 1:
                call(1)
            seconds.append(seconds_of(lambda c=call, n=count: c(n)) / count)
    return found


def matmul_flops(dtype: str, cpu: bool) -> float:
    """FLOP/s of a large matrix product on one device: the ceiling of this very machine."""
    return measured_flops(2048 if cpu else 8192, pretrain.DTYPES[dtype])


def parts_of(subject: Subject, step_seconds: float) -> dict[str, float]:
    """Seconds of each part of a step, by ablation: of programs that stop early.

    What a program does not return is not computed, so 'teacher' is a program that returns nothing
    but targets, less the front end where it is the student's. 'loss' is what gradients take beyond
    student and teacher, with the statistics for the metrics; 'update' what a step takes beyond
    gradients. Differences of measurements: at least 0.
    """
    objective = subject.objective

    def forward(params, state, batch):
        return objective.forward(params, state.teacher, batch, step_keys(state))

    def gradient_of(choose):
        def run(state, batch):
            def number(params):
                return jnp.sum(
                    jnp.square(choose(forward(params, state, batch)).astype(jnp.float32))
                )

            return jax.grad(number)(state.params)

        return run

    def gradients(state, batch):
        def total(params):
            loss, *rest = objective.loss(params, state.teacher, batch, step_keys(state))
            return loss, rest

        return jax.value_and_grad(total, has_aux=True)(state.params)

    programs = {
        "masks": lambda state, batch: forward(state.params, state, batch).weights,
        "features": lambda state, batch: forward(state.params, state, batch).tokens.x,
        "frontend": gradient_of(lambda s: s.tokens.x),
        "targets": lambda state, batch: forward(state.params, state, batch).targets,
        "prediction": gradient_of(lambda s: s.prediction),
        "gradients": gradients,
    }
    took = {name: _seconds(jax.jit(p), subject) for name, p in programs.items()}
    own = owns_features(subject.model, subject.state.teacher)
    shared = 0.0 if own else took["features"]
    parts = {
        "frontend": took["frontend"],
        "masks": took["masks"],
        "student": took["prediction"] - took["frontend"] - took["masks"],
        "teacher": took["targets"] - shared,
    }
    parts["loss"] = took["gradients"] - took["prediction"] - parts["teacher"]
    parts["update"] = step_seconds - took["gradients"]
    return {name: max(seconds, 0.0) for name, seconds in parts.items()}


def _seconds(program: Callable, subject: Subject) -> float:
    """The median of three runs after a first; of long ones, a single run."""
    with jax.set_mesh(subject.mesh):
        call = lambda: jax.block_until_ready(program(subject.state, subject.batch))  # noqa: E731
        call()
        took = [seconds_of(call)]
        while len(took) < 3 and took[0] < BUDGET / 30:
            took.append(seconds_of(call))
        return statistics.median(took)


def data_wait(subject: Subject) -> float | None:
    """Share of the time that steps wait for their batch; None if the source cannot be read."""
    config = subject.config | {"total_steps": DATA_STEPS + 1}
    with jax.set_mesh(subject.mesh):
        try:
            batches = pretrain.make(config).data(0)
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


def bench(
    config: Mapping[str, Any], *, rows: int | None = None, peer: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:  # fmt: skip
    """Every number of a config: see `report` for what each means. Seconds, bytes, FLOPs.

    rows: of the batch; None for the default. peer: measure the PyTorch step, too. say: told what is
    being done.
    """
    devices = jax.devices()
    cpu = devices[0].platform == "cpu"
    if cpu or peer:
        devices = devices[:1]
    if peer:
        import_peer().check(config)
    config = sized(config, rows, devices)
    say("compiling")
    subject = Subject(config, devices)
    cold, cached = subject.compile(2)
    calls = [subject.steps]
    if peer:
        say("making the PyTorch step")
        other = make_peer(subject)

        def their_steps(count):
            for _ in range(count):
                other()

        calls.append(their_steps)
    ceiling = matmul_flops(config["dtype"], cpu)
    say("measuring steps")
    took = alternate(calls, cpu)
    ceiling = len(devices) * max(ceiling, matmul_flops(config["dtype"], cpu))
    seconds = statistics.median(took[0])
    say("measuring parts")
    parts = parts_of(subject, seconds)
    views = subject.rows * subject.clones
    result = {
        "examples_per_second": subject.rows / seconds,
        "step_seconds": seconds,
        "step_seconds_of_blocks": took[0],
        "mfu": subject.flops / seconds / peak_flops(devices),
        "mfu_of_measured_matmul": subject.flops / seconds / ceiling,
        "matmul_flops_per_second": ceiling,
        "flops_per_step": subject.flops,
        "flops_formula": formula(subject),
        "flops_per_masked_view": subject.flops / views,
        "seconds_per_masked_view": seconds / views,
        "seconds_of_parts": parts,
        "peak_bytes": peak_bytes(subject.program),
        "compile_seconds": cold,
        "compile_seconds_from_cache": cached,
        "data_wait": data_wait(subject),
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
            "step_seconds": theirs, "ratio": theirs / seconds, "step_seconds_of_blocks": took[1],
            "ratio_of_best": min(took[1]) / min(took[0]), **other.about(),
        }  # fmt: skip
    return result


def import_peer() -> Any:
    """The module `peer`, which needs PyTorch."""
    try:
        from data2vec_jax.bench import torch_baseline
    except ImportError as error:
        raise UserError(
            f"--peer needs {error.name}; install it: pip install torch transformers"
        ) from None
    return torch_baseline


def make_peer(subject: Subject, **options: Any) -> Any:
    """The PyTorch step with this step's batch and masks. options: of `peer.Peer`."""
    batch = subject.host_batch

    @jax.jit
    def draws(state, batch):
        stages = subject.objective.forward(state.params, state.teacher, batch, step_keys(state))
        return stages.mask, stages.visible

    with jax.set_mesh(subject.mesh):
        mask, visible = jax.device_get(draws(subject.state, batch))
    return import_peer().Peer(subject.config, batch, visible, mask, **options)


def formula(subject: Subject) -> str:
    """How `flops_per_step` comes about, with its numbers (see `pretrain.step_flops`)."""
    own = owns_features(subject.model, subject.state.teacher)
    parts = pretrain.flops_by_part(
        subject.modality, subject.model, subject.sampler, subject.shapes, own
    )
    f, s, t = (f"{parts[k] / 1e9:.4g}" for k in ("frontend", "student", "teacher"))
    return (
        f"B (3 (F + M S) + T) = {subject.rows} (3 ({f} + {subject.clones} x {s}) + {t}) GFLOPs; "
        "B examples, F front end, M masks of an example, S student on one of them, T teacher"
    )


# How cost grows -----------------------------------------------------------------------------------

SHARES = (0.25, 0.5, 1.0)


def scaled(config: Mapping[str, Any], axis: str, share: float) -> dict[str, Any] | None:
    """`config` with `share` of its batch, length, depth, width or clones; None where it has no such
    thing."""
    config = json.loads(json.dumps(config))
    model, encoder, objective = config["model"], config["model"]["encoder"], config["objective"]
    part = lambda n, multiple=1: max(round(n * share / multiple), 1) * multiple  # noqa: E731
    if axis == "batch":
        config["data"]["batch_size"] = round(config["data"]["batch_size"] / SHARES[0] * share)
    elif axis == "clones":
        if "clones" not in objective:
            return None
        objective["clones"] = part(objective["clones"])
    elif axis == "depth":
        encoder["depth"] = part(encoder["depth"])
        objective["top_k"] = min(objective["top_k"], encoder["depth"])
    elif axis == "width":
        heads = encoder["heads"] = part(encoder["heads"])
        old, multiple = model["width"], math.lcm(16, heads)
        model["width"] = part(old, multiple)
        encoder["mlp"] = round(encoder["mlp"] * model["width"] / old)
    elif axis == "length":
        examples = config["examples"]
        if "crops" in examples:
            examples["crops"] = [examples["crops"][-1] * share]
        elif "lengths" in examples:
            examples["lengths"] = [max(part(examples["lengths"][-1]), 8)]
        else:  # images: `share` of the patches
            side = max(round(model["image"] * math.sqrt(share) / model["patch"]), 2)
            area = (side * model["patch"] / model["image"]) ** 2
            model["image"] = examples["image"] = side * model["patch"]
            if "count" in config["mask"]:
                config["mask"]["count"] = round(config["mask"]["count"] * area)
                least = config["mask"].get("min_patches", 16)
                config["mask"]["min_patches"] = max(round(least * area), 1)
    return config


def sizes_of(config: Mapping[str, Any]) -> dict[str, float]:
    """What the axes of a sweep are for a config; length in tokens or samples or patches."""
    examples, model = config["examples"], config["model"]
    if "crops" in examples:
        length = examples["crops"][-1]
    elif "lengths" in examples:
        length = examples["lengths"][-1]
    else:
        length = (model["image"] // model["patch"]) ** 2
    return {
        "batch": config["data"]["batch_size"], "length": length,
        "depth": model["encoder"]["depth"], "width": model["width"],
        "clones": config["objective"].get("clones", 1),
    }  # fmt: skip


def sweep(
    config: Mapping[str, Any], *, rows: int | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:  # fmt: skip
    """Step time, memory, FLOPs and compile time along each axis, and exponents fitted to them.

    A quarter, half and all of the config's length, depth, width and clones; once, twice and four
    times its batch. {axis: {'sizes': [...], name: [...], 'exponents': {name: ...}}}.
    """
    devices = jax.devices()
    if devices[0].platform == "cpu":
        devices = devices[:1]
    base, found = sized(config, rows, devices), {}
    for axis in ("batch", "length", "depth", "width", "clones"):
        points = []
        for share in SHARES:
            changed = scaled(base, axis, share)
            if changed is None:
                break
            size = sizes_of(changed)[axis]
            say(f"{axis} {size:g}")
            subject = Subject(changed, devices)
            (seconds,) = subject.compile(1)
            subject.steps(1)
            points.append(
                {
                    "sizes": size,
                    "step_seconds": min(seconds_of(lambda s=subject: s.steps(1)) for _ in range(3)),
                    "peak_bytes": peak_bytes(subject.program),
                    "flops_per_step": subject.flops,
                    "compile_seconds": seconds,
                }
            )
        if points:
            columns = {name: [p[name] for p in points] for name in points[0]}
            fits = {k: exponent(columns["sizes"], v) for k, v in columns.items() if k != "sizes"}
            found[axis] = columns | {"exponents": fits}
    return found


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """The b of values = a sizes^b, by least squares of logarithms."""
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


# The command --------------------------------------------------------------------------------------


def report(result: Mapping[str, Any]) -> str:
    """The numbers in words, a few lines."""
    shapes = ", ".join(f"{k} {v}" for k, v in result["shapes"].items() if k != "example_id")
    step = result["step_seconds"]
    parts = ", ".join(f"{k} {v / step:.0%}" for k, v in result["seconds_of_parts"].items())
    wait = result["data_wait"]
    lines = [
        f"{result['config']}: {result['devices']} x {result['device']}, {result['dtype']}, "
        f"{shapes}",
        f"step     {1e3 * step:.1f} ms (median of {len(result['step_seconds_of_blocks'])} blocks, "
        f"best {1e3 * min(result['step_seconds_of_blocks']):.1f}), "
        f"{result['examples_per_second']:.3g} examples/s, "
        f"{1e3 * result['seconds_per_masked_view']:.1f} ms a masked view",
        f"FLOPs    {result['flops_per_step']:.4g} = {result['flops_formula']}",
        f"MFU      {result['mfu']:.1%} of the device's peak, "
        f"{result['mfu_of_measured_matmul']:.1%} of a large matrix product "
        f"({result['matmul_flops_per_second'] / 1e9:.0f} GFLOP/s)",
        f"shares   {parts}; waiting for data "
        + ("not measured (no data at config.data.source)" if wait is None else f"{wait:.1%}"),
        f"memory   {result['peak_bytes'] / 2**20:.0f} MiB a device at most",
        f"compile  {result['compile_seconds']:.1f} s, {result['compile_seconds_from_cache']:.1f} s "
        "from the cache",
    ]
    if peer := result["peer"]:
        lines.append(
            f"peer     {1e3 * peer['step_seconds']:.1f} ms (best "
            f"{1e3 * min(peer['step_seconds_of_blocks']):.1f}): PyTorch {peer['torch']}, Hugging "
            f"Face {peer['transformers']}, {peer['mode']}; ratio {peer['ratio']:.2f} "
            f"(above 1: ours is faster; of the best blocks {peer['ratio_of_best']:.2f})"
        )
    for axis, rows in result.get("sweep", {}).items():
        lines.append(
            f"{axis:8} {'size':>10} {'ms':>10} {'MiB':>10} {'GFLOPs':>10} {'compile s':>10}"
        )
        for i, size in enumerate(rows["sizes"]):
            lines.append(
                f"{'':8} {size:10g} {1e3 * rows['step_seconds'][i]:10.1f} "
                f"{rows['peak_bytes'][i] / 2**20:10.0f} {rows['flops_per_step'][i] / 1e9:10.4g} "
                f"{rows['compile_seconds'][i]:10.1f}"
            )
        names = "step_seconds", "peak_bytes", "flops_per_step", "compile_seconds"
        fits = " ".join(f"{rows['exponents'][name]:10.2f}" for name in names)
        lines.append(f"{'':8} {'exponent':>10} {fits}")
    return "\n".join(lines)


def main(argv: Sequence[str] = sys.argv) -> None:
    """The command: see the module's docstring."""

    def command():
        config, values = parse(argv, OPTIONS, required=())
        rows = values["batch"]
        if rows is not None and not (rows.isdigit() and int(rows)):
            raise UserError(f"--batch={rows} is not a number of examples")
        if values["peer"]:  # both share a GPU's memory
            os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        options = {"rows": rows and int(rows), "say": say}
        result = {"config": config_words(argv)}
        result |= bench(config, peer=bool(values["peer"]), **options)
        if values["sweep"]:
            result["sweep"] = sweep(config, **options)
        print(report(result))
        if values["json"]:
            write_json(values["json"], result)

    run_main(command)
