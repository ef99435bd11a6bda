"""Compiles the train step for a TPU slice that you do not have, on a machine with nothing but CPUs.

    python -m data2vec_jax.plan --config=configs/vision_v2.py:huge --topology=v5e:16x16 \
        [--slices=2] [--json=FILE]

Says whether the step fits, what fills the memory, what is sent between chips, and how long a step
should take. The program is the one that `train` runs; no data is read. libtpu, which compiles it,
is a package (`pip install libtpu`); without it only what arithmetic can tell is said.
"""

import copy
import importlib.metadata
import importlib.util
import os
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np

from data2vec_jax.cli.arguments import config_words, one_line, parse, run_main, write_json
from data2vec_jax.core import sharding
from data2vec_jax.core.errors import UserError
from data2vec_jax.core.run import Run
from data2vec_jax.metrics.hardware import PEAK_FLOPS
from data2vec_jax.plan import hlo
from data2vec_jax.tasks.registry import check_config, task_module

GIB = 2.0**30


class Chip(NamedTuple):
    """A kind of TPU. Numbers are of a chip, except `hbm`: bytes that a program may use on a device.

    device_kind: JAX's name of its devices, of which a chip is `devices`. axes: of its network.
    hbm_bandwidth, ring, dcn: bytes a second from main memory, to the next chips of a ring (both
    ways), and to the data centre's network.
    """

    device_kind: str
    devices: int
    axes: int
    hbm: float
    hbm_bandwidth: float
    ring: float
    dcn: float


# hbm: where libtpu 0.0.42 refuses a program ("exceeds available HBM"); it keeps the rest. The peaks
# are in `metrics.PEAK_FLOPS`. Bandwidths: cloud.google.com/tpu/docs/{v5e,v5p,v6e,tpu7x}, where a
# chip's interconnect (both ways) divided by its links (2 an axis) is what two links send: a ring
# goes along one axis, to both neighbours. v4: docs/v4, and 50 GB/s a link in "TPU v4" (Jouppi et
# al., arXiv 2304.01433); its data centre network as v5p's, the same card for as many chips.
CHIPS = {
    "v4": Chip("TPU v4", 2, 3, 15.25 * GIB, 1200e9, 600e9 / 6, 50e9 / 8),
    "v5e": Chip("TPU v5 lite", 1, 2, 15.75 * GIB, 819e9, 400e9 / 4, 6.4e12 / 256 / 8),
    "v5p": Chip("TPU v5", 1, 3, 95.74 * GIB, 2765e9, 1200e9 / 6, 50e9 / 8),
    "v6e": Chip("TPU v6 lite", 1, 2, 31.25 * GIB, 1600e9, 800e9 / 4, 25.6e12 / 256 / 8),
    "tpu7x": Chip("TPU7x", 2, 3, 94.75 * GIB, 7380e9, 1200e9 / 6, 100e9 / 8),
}
SHAPES = {
    2: ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
    3: ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16"),
}
OPTIONS = {"topology": "v5e:16x16", "slices": "2", "json": "FILE"}
TRIES = 3  # programs compiled in search of one that fits


class Topology(NamedTuple):
    """`slices` slices of `shape` chips of the kind `kind`, such as v5e:16x16."""

    kind: str
    shape: tuple[int, ...]
    slices: int

    @property
    def name(self) -> str:
        return f"{self.kind}:{'x'.join(map(str, self.shape))}"

    @property
    def chip(self) -> Chip:
        return CHIPS[self.kind]

    @property
    def chips(self) -> int:
        return self.slices * int(np.prod(self.shape))


@dataclass(frozen=True)
class StandIn:
    """As much of a device as a mesh asks for."""

    id: int
    slice_index: int
    process_index: int = 0
    platform: str = "none"
    device_kind: str = "none"


def parse_topology(name: str, slices: str | None = None) -> Topology:
    """'v5e:16x16' and '2' -> Topology.

    Raises:
      UserError: no such chip or shape; the known ones are listed.
    """
    kind, _, shape = name.partition(":")
    if kind not in CHIPS:
        known = ", ".join(f"{k}:{SHAPES[c.axes][-1]}" for k, c in CHIPS.items())
        raise UserError(f"--topology: no chip '{kind}'; known are {known} and smaller")
    known = ", ".join(f"{kind}:{s}" for s in SHAPES[CHIPS[kind].axes])
    sizes = tuple(int(n) for n in shape.split("x")) if re.fullmatch(r"\d+(x\d+)+", shape) else ()
    if len(sizes) != CHIPS[kind].axes or 0 in sizes:
        raise UserError(f"--topology: no '{name}'; known are {known}")
    if not re.fullmatch(r"[1-9]\d*", slices or "1"):
        raise UserError(f"--slices: '{slices}' is not a number of 1 or more")
    return Topology(kind, sizes, int(slices or 1))


def prepare_environment() -> None:
    """JAX on the CPU, and libtpu as a compiler only: no chip is looked for, or kept from others."""
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"  # ask no metadata server what this machine is
    os.environ["TPU_ACCELERATOR_TYPE"] = "v5e-1"  # anything: the topology has its own name
    os.environ["TPU_WORKER_HOSTNAMES"] = "localhost"
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # its lock file is for processes with chips
    os.environ["TPU_STDERR_LOG_LEVEL"] = os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)  # the time to compile is a result


def has_compiler() -> bool:
    """Whether libtpu is installed."""
    return importlib.util.find_spec("libtpu") is not None


def devices_of(topology: Topology) -> Sequence[Any]:
    """libtpu's description of the devices of `topology`; without libtpu, stand-ins."""
    if not has_compiler():
        each = topology.chip.devices * topology.chips // topology.slices
        return [StandIn(i, i // each) for i in range(each * topology.slices)]
    from jax.experimental import topologies

    several = {"num_slices": topology.slices} if topology.slices > 1 else {}
    try:
        described = topologies.get_topology_desc(
            platform="tpu", topology_name=topology.name, **several
        )
    except jax.errors.JaxRuntimeError as error:
        known = ", ".join(SHAPES[topology.chip.axes])
        reason = one_line(error)
        raise UserError(f"--topology={topology.name}: {reason}; known are {known}") from None
    return described.devices


def plan(config: Mapping[str, Any], topology: Topology) -> dict[str, Any]:
    """What a train step of `config` on `topology` needs: see the README of `launch` for each key.

    The batch is the one of the longest examples. Numbers are of one device, but `flops_per_step` is
    of the global step on all chips.
    """
    check_config(config)
    mesh = sharding.make_mesh(**config["mesh"], devices=devices_of(topology))
    step = Step(config, mesh)
    chip, chips = topology.chip, topology.chips
    peak = PEAK_FLOPS[chip.device_kind] * chips
    result = {
        "topology": topology.name, "slices": topology.slices, "chips": chips,
        "devices": mesh.size, "mesh": dict(mesh.shape),
        "batch_size": step.rows, "shapes": {k: list(v.shape) for k, v in step.batch.items()},
        "parameters": step.parameters, "flops_per_step": step.flops,
        "hbm_bytes": int(chip.hbm),
        "fits": None if step.state_bytes < chip.hbm else False,
        "bytes_per_device": {"arguments": step.state_bytes, "temporaries": None, "output": None},
        "collectives": None, "compile_seconds": None, "compile_cpu_seconds": None,
        "step_seconds_estimate": step.flops / peak, "mfu_estimate": None,
        "roofline_seconds": {"compute": step.flops / peak},
        "versions": {"jax": jax.__version__},
    }  # fmt: skip
    if not has_compiler():
        result["advice"] = [
            "libtpu is not installed, so nothing was compiled: "
            f"pip install 'jax[tpu]=={jax.__version__}'"
        ]
        return result
    result["versions"]["libtpu"] = importlib.metadata.version("libtpu")
    compiled = step.compile()
    result["compile_seconds"], result["compile_cpu_seconds"] = compiled.seconds
    result["fits"] = compiled.program is not None
    result["bytes_per_device"] = compiled.memory
    if compiled.program is None:
        result["step_seconds_estimate"] = None
        result["advice"] = advice(config, topology, step)
        return result
    program = hlo.read(compiled.program.as_text())
    parts = roofline(program, chip)
    slowest = max(parts.values())
    result |= {
        "collectives": program.summary(),
        "messages": [c._asdict() for c in program.collectives],
        "instructions": program.instructions,
        "loops_of_unknown_length": program.unknown_loops,
        "compiled_flops": program.flops * mesh.size,
        "roofline_seconds": parts, "step_seconds_estimate": slowest,
        "mfu_estimate": step.flops / peak / slowest, "advice": [],
    }  # fmt: skip
    return result


class Compiled(NamedTuple):
    """program: None if it does not fit. memory: bytes of one device. seconds: to compile, on the
    clock and of all cores together."""

    program: Any
    memory: dict[str, float]
    seconds: tuple[float, float]

    @property
    def total(self) -> float:
        return self.memory["total"]


class Step:
    """The train step of a config on a mesh, with its largest batch, before it is compiled.

    state_bytes: of the state and the batch on one device.
    """

    def __init__(self, config: Mapping[str, Any], mesh: jax.sharding.Mesh):
        with jax.set_mesh(mesh):
            config = task_module(config).resolve_config(config)
            task = task_module(config).abstract_task(config)
            self.run = Run(config, task, mesh)
        self.batch = task.shapes[-1]
        self.rows = self.batch["example_id"].shape[0]
        self.flops = task.flops(self.batch)
        leaves = jax.tree.leaves(self.run.abstract)
        self.parameters = sum(x.size for x in jax.tree.leaves(self.run.abstract.params))
        state = sum(x.dtype.itemsize * np.prod(x.sharding.shard_shape(x.shape)) for x in leaves)
        rows = sum(v.dtype.itemsize * v.size for v in self.batch.values()) / mesh.size
        self.state_bytes = int(state + rows)

    def compile(self) -> Compiled:
        """The program, or what libtpu says of its size."""
        start = time.perf_counter(), time.process_time()

        def seconds():
            return time.perf_counter() - start[0], time.process_time() - start[1]

        try:
            program = self.run.program(self.batch)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            used = exhausted(str(error))
            memory = {
                "arguments": self.state_bytes, "temporaries": max(used - self.state_bytes, 0),
                "output": self.state_bytes, "total": used,
            }  # fmt: skip
            return Compiled(None, memory, seconds())
        took = seconds()
        m = program.memory_analysis()
        memory = {
            "arguments": m.argument_size_in_bytes, "temporaries": m.temp_size_in_bytes,
            "output": m.output_size_in_bytes,
            # The state is donated: its next value lies where it did.
            "total": m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes
            + m.temp_size_in_bytes + m.generated_code_size_in_bytes,
        }  # fmt: skip
        return Compiled(program, memory, took)


def exhausted(message: str) -> float:
    """Bytes that a refused program would use, from libtpu's message; nan if it does not say."""
    found = re.search(r"Used ([\d.]+)([KMGT]?) of", message)
    found = found or re.search(r"\(([\d.]+)([KMGT]?)\) exceeds", message)
    if not found:
        return float("nan")
    return float(found[1]) * 1024.0 ** " KMGT".index(found[2] or " ")


def roofline(program: hlo.Program, chip: Chip) -> dict[str, float]:
    """Seconds a step of the busiest device, by what would be busy; the longest is the estimate.

    core: instructions one after the other, each as long as its products at peak or its bytes at
    full bandwidth take, whichever is longer, and the messages that it waits for. hbm: all bytes.
    ici, dcn: all messages inside a slice, and between slices. A bound: nothing starts late, no
    product is padded.
    """
    flops = PEAK_FLOPS[chip.device_kind] / chip.devices
    hbm, ring, dcn = (
        b / chip.devices for b in (chip.hbm_bandwidth, chip.ring, chip.dcn)
    )  # of one device
    core = memory = ici = between = 0.0
    for w in program.work:
        read = w.bytes / hbm
        memory += w.times * read
        core += 0.0 if w.overlaps else w.times * max(w.flops / flops, read)
    for c in program.collectives:
        if c.kind == hlo.BETWEEN_SLICES:
            between += c.times * c.bytes / dcn
        else:
            # Around a ring every part of the array but one's own; a sum goes around twice.
            rounds = 2 if c.kind == "all-reduce" else 1
            seconds = c.times * rounds * c.bytes * (1 - 1 / c.group) / ring
            ici += seconds
            core += 0.0 if c.overlaps else seconds
    return {"core": core, "hbm": memory, "ici": ici, "dcn": between}


# What would make it fit ---------------------------------------------------------------------------


def advice(config: Mapping[str, Any], topology: Topology, step: Step) -> list[str]:
    """Lines for the user: the first of a few changes that fits, each compiled."""
    lines = []
    for options in remedies(config, topology, step):
        changed = with_options(config, options)
        flags = " ".join(f"--config.{k}={v}" for k, v in options.items())
        mesh = sharding.make_mesh(**changed["mesh"], devices=devices_of(topology))
        try:
            compiled = Step(changed, mesh).compile()
        except UserError:  # a batch, perhaps of shorter examples, that does not divide so
            continue
        size = f"{compiled.total / GIB:.2f} of {topology.chip.hbm / GIB:.2f} GiB"
        if compiled.program is not None:
            return [*lines, f"it fits with {flags} ({size}, compiled)"]
        lines = [f"it does not fit even with {flags} ({size}, compiled)"]
    smaller = "a smaller config.data.batch_size, or more chips"
    return [*lines, f"try {smaller}"]


def remedies(config: Mapping[str, Any], topology: Topology, step: Step) -> Iterator[dict[str, Any]]:
    """Changes to a config that make its step smaller, each on top of the one before."""
    options: dict[str, Any] = {}
    per_slice = topology.chip.devices * topology.chips // topology.slices
    fsdp, room = config["mesh"]["fsdp"], topology.chip.hbm
    found = 0
    if step.state_bytes > room / 3:  # parameters, teacher and moments: the copies are the problem
        while step.state_bytes * config["mesh"]["fsdp"] / fsdp > room / 4 and 2 * fsdp <= per_slice:
            fsdp *= 2
        options["mesh.fsdp"] = fsdp
        found += 1
        yield dict(options)
    if config["model"]["encoder"].get("remat", "none") != "full":
        options["model.encoder.remat"] = "full"
        found += 1
        yield dict(options)
    parts = config["accumulate"]
    rows = step.rows // (per_slice * topology.slices)
    while found < TRIES and 2 * parts <= rows and rows % (2 * parts) == 0:
        parts *= 2
        options["accumulate"] = parts
        found += 1
        yield dict(options)


def with_options(config: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of `config` with other values at dotted paths."""
    changed = copy.deepcopy(dict(config))
    for path, value in options.items():
        section = changed
        *sections, last = path.split(".")
        for name in sections:
            section = section[name]
        section[last] = value
    return changed


# The command --------------------------------------------------------------------------------------


def report(result: Mapping[str, Any]) -> str:
    """The plan in words, a few lines."""
    gib = lambda n: "?" if n is None else f"{n / GIB:.2f}"  # noqa: E731
    memory, mesh = result["bytes_per_device"], result["mesh"]
    where = f"{result['slices']} x " if result["slices"] > 1 else ""
    lines = [
        f"{result['config']} on {where}{result['topology']}: {result['chips']} chips, "
        f"mesh {' x '.join(f'{k} {v}' for k, v in mesh.items())}",
        f"batch      {result['batch_size']} rows, "
        f"{result['batch_size'] / result['devices']:g} a device; "
        f"{result['parameters'] / 1e6:.1f} M parameters, {result['flops_per_step']:.3g} FLOPs",
    ]
    verdict = {True: "fits", False: "does NOT fit", None: "not compiled"}[result["fits"]]
    parts = ", ".join(f"{k} {gib(memory[k])}" for k in ("arguments", "temporaries", "output"))
    lines.append(
        f"memory     {verdict}: {gib(memory.get('total'))} of {gib(result['hbm_bytes'])} GiB "
        f"a device ({parts})"
    )
    for kind, found in (result["collectives"] or {}).items():
        lines.append(f"{kind:18} {found['count']:5} a step, {found['bytes'] / 2**20:10.1f} MiB")
    if result["mfu_estimate"] is not None:
        parts = ", ".join(f"{k} {1e3 * v:.1f}" for k, v in result["roofline_seconds"].items())
        lines.append(
            f"step       {1e3 * result['step_seconds_estimate']:.1f} ms at best (ms: {parts}), "
            f"MFU {result['mfu_estimate']:.0%}; compiled in {result['compile_seconds']:.0f} s "
            f"({result['compile_cpu_seconds']:.0f} s of CPU)"
        )
    return "\n".join([*lines, *result["advice"]])


def main(argv: Sequence[str] = sys.argv) -> None:
    """The command: see the module's docstring."""

    def command():
        prepare_environment()
        config, values = parse(argv, OPTIONS, required=("topology",))
        topology = parse_topology(values["topology"], values["slices"])
        result = {"config": config_words(argv)} | plan(config, topology)
        print(report(result))
        if values["json"]:
            write_json(values["json"], result)

    run_main(command)
