"""TPU slices and machines with GPUs, and compilers for those that are not there."""

import importlib.util
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np

from data2vec_jax.cli.output import one_line
from data2vec_jax.core.errors import UserError
from data2vec_jax.plan import gpus
from data2vec_jax.plan.chips import Chip

GIB = 2.0**30


# hbm: where libtpu 0.0.42 refuses a program ("exceeds available HBM"); it keeps the rest. The peaks
# are `metrics.hardware.PEAK_FLOPS`. Bandwidths: cloud.google.com/tpu/docs/{v5e,v5p,v6e,tpu7x},
# where a
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
MOST_CHIPS = 65_536  # several times the largest pod
SHAPES = {
    2: ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
    3: ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16"),
}


class Topology(NamedTuple):
    """`slices` slices of `shape` chips of the kind `kind`, such as v5e:16x16. Of GPUs one slice of
    (cards of a machine, machines), such as h100:8x4."""

    kind: str
    shape: tuple[int, ...]
    slices: int

    @property
    def name(self) -> str:
        return f"{self.kind}:{'x'.join(map(str, self.shape))}"

    @property
    def chip(self) -> Chip:
        return (CHIPS | gpus.CARDS)[self.kind]

    @property
    def machine(self) -> int | None:
        """Cards of a machine, which NVLink connects; None for TPUs."""
        return self.shape[0] if self.kind in gpus.CARDS else None

    @property
    def room(self) -> float | None:
        """Bytes of a device that a program must fit into; None where the compiler refuses it."""
        return self.chip.hbm if self.machine else None

    @property
    def chips(self) -> int:
        return self.slices * int(np.prod(self.shape))


@dataclass(frozen=True)
class StandIn:
    """As much of a device as a mesh asks for."""

    id: int
    slice_index: int
    platform: str
    process_index: int = 0
    device_kind: str = "none"
    core_on_chip: int = 0

    @property
    def coords(self) -> tuple[int, int, int]:
        """Its place: all in a row."""
        return self.id, 0, 0


def parse_topology(name: str, slices: str | None = None) -> Topology:
    """'v5e:16x16' and '2', or 'h100:8x4' -> Topology.

    Raises:
      UserError: no such chip or shape; the known ones are listed.
    """
    kind, _, shape = name.partition(":")
    if kind in gpus.CARDS:
        return _machines(name, kind, shape, slices)
    if kind not in CHIPS:
        known = ", ".join(f"{k}:{SHAPES[c.axes][-1]}" for k, c in CHIPS.items())
        cards = ", ".join(f"{k}:8" for k in gpus.CARDS)
        raise UserError(f"--topology: no chip '{kind}'; known are {known} and smaller, {cards}")
    known = ", ".join(f"{kind}:{s}" for s in SHAPES[CHIPS[kind].axes])
    named = re.fullmatch(r"\d{1,4}(x\d{1,4})+", shape)
    sizes = tuple(int(n) for n in shape.split("x")) if named else ()
    if len(sizes) != CHIPS[kind].axes or 0 in sizes:
        raise UserError(f"--topology: no '{name}'; known are {known}")
    if not re.fullmatch(r"[1-9]\d{0,3}", slices or "1"):
        raise UserError(f"--slices: '{slices:.40}' is not a number from 1 to 9,999")
    found = Topology(kind, sizes, int(slices or 1))
    if found.chips > MOST_CHIPS:
        raise UserError(
            f"--topology={name}: {found.chips:,} chips are more than {MOST_CHIPS:,}; "
            f"known are {known}"
        )
    return found


def _machines(name: str, kind: str, shape: str, slices: str | None) -> Topology:
    """Cards of a machine, and machines."""
    sizes = re.fullmatch(r"([1-8])(?:x([1-9]\d{0,3}))?", shape)
    if not sizes:
        raise UserError(
            f"--topology: no '{name}'; known are {kind}:1 to {kind}:8 in a machine, and as many "
            f"machines as you like: {kind}:8x4"
        )
    if slices:
        raise UserError(f"--slices: of TPUs alone; two machines with eight cards are {kind}:8x2")
    return Topology(kind, (int(sizes[1]), *([int(sizes[2])] if sizes[2] else [])), 1)


def prepare_environment() -> None:
    """JAX on the CPU, and libtpu as a compiler only: no chip is looked for, or kept from others."""
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"  # ask no metadata server what this machine is
    os.environ["TPU_ACCELERATOR_TYPE"] = "v5e-1"  # anything: the topology has its own name
    os.environ["TPU_WORKER_HOSTNAMES"] = "localhost"
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # its lock file is for processes with chips
    os.environ["TPU_STDERR_LOG_LEVEL"] = os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)  # the time to compile is a result


def compiler_of(topology: Topology) -> str | None:
    """The package that compiles for it, if it is installed."""
    if topology.machine:
        found = gpus.plugin()
        return found and f"jax-{found.partition('xla_')[2]}-plugin"
    return "libtpu" if importlib.util.find_spec("libtpu") else None


def devices_of(topology: Topology) -> Sequence[Any]:
    """The compiler's description of the devices of `topology`; without it, stand-ins."""
    if not compiler_of(topology):
        each = topology.chip.devices * topology.chips // topology.slices
        named = "gpu" if topology.machine else "tpu"
        return [StandIn(i, i // each, named) for i in range(each * topology.slices)]
    if topology.machine:
        return gpus.described(topology.kind, topology.machine, topology.chips // topology.machine)
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
