"""Where arrays live: one mesh, one rule for parameters, one rule for batches.

The mesh is `(data, fsdp)`. A batch is split over both axes; parameters, teacher and optimiser
moments are split over `fsdp` by one path-and-shape rule, and gathered layer by layer where they
are used (`gather`).
"""

import os
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from data2vec_jax.errors import UserError
from data2vec_jax.state import path_name

BATCH = P(("data", "fsdp"))  # axis 0 of every batch array is split over the whole mesh
MIN_SIZE = 2**16  # smaller arrays are cheaper to copy than to gather


def make_mesh(data: int = -1, fsdp: int = 1, *, devices: Sequence[Any] | None = None) -> Mesh:
    """`data` copies of the model, each split over `fsdp` devices; -1 means "the rest"."""
    devices = jax.devices() if devices is None else list(devices)
    if fsdp < 1 or (data < 1 and data != -1):
        raise UserError(f"config.mesh: data={data}, fsdp={fsdp}; use data=-1 (the rest) or >= 1")
    rows = len(devices) // fsdp if data == -1 else data
    if rows * fsdp != len(devices):
        raise UserError(
            f"config.mesh: data={data} x fsdp={fsdp} does not use the {len(devices)} devices"
        )
    return jax.make_mesh(
        (rows, fsdp), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2, devices=devices
    )


def spec_of(name: str, shape: Sequence[int], fsdp: int, rules: Sequence = ()) -> P:
    """The first matching (pattern, spec) of `rules`; otherwise the largest divisible axis is split.

    The leading axis of a stacked layer ('/blocks/') is never split: the scan runs over it.
    """
    for pattern, spec in rules:
        if re.search(pattern, name):
            return P(*spec)
    first = 1 if "/blocks/" in f"/{name}" else 0
    axes = [a for a in range(first, len(shape)) if shape[a] % fsdp == 0]
    if fsdp == 1 or int(np.prod(shape)) < MIN_SIZE or not axes:
        return P()
    axis = max(axes, key=lambda a: shape[a])
    return P(*(None,) * axis, "fsdp")


def shardings(tree: Any, mesh: Mesh, rules: Sequence = ()) -> Any:
    """A NamedSharding for each leaf. Moments and teacher end with the same paths as parameters."""

    def place(key_path, x):
        return NamedSharding(mesh, spec_of(path_name(key_path), x.shape, mesh.shape["fsdp"], rules))

    return jax.tree_util.tree_map_with_path(place, tree)


def to_global(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This process's rows of a global batch -> global arrays split over the mesh."""
    sharding = NamedSharding(mesh, BATCH)
    return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()}


def gather(params: Any) -> Any:
    """Un-shards one layer's weights just before use: the all-gather of FSDP, in plain sight."""
    if jax.sharding.get_abstract_mesh().empty:  # models stay usable without a mesh
        return params
    return jax.tree.map(lambda w: jax.lax.with_sharding_constraint(w, P()), params)


def split_rows(x: jax.Array) -> jax.Array:
    """Keeps axis 0 (rows of the batch) split over the mesh."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, BATCH)


def per_device(function: Callable, rows: int) -> Callable:
    """`function(replicated, *arrays)` run by each device on its own rows of the arrays.

    Without a mesh, or when `rows` does not divide over it, the function itself.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or rows % mesh.size:
        return function

    def mapped(replicated, *arrays):
        specs = (P(), *(BATCH for _ in arrays))
        return jax.shard_map(function, in_specs=specs, out_specs=BATCH, check_vma=False)(
            replicated, *arrays
        )

    return mapped


def device_count() -> int:
    """Devices of the ambient mesh, 1 without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else mesh.size


def axis_size(name: str) -> int:
    """Size of an axis of the ambient mesh, 1 without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else mesh.shape[name]


def start_processes() -> None:
    """Joins a multi-process run if the environment names one.

    COORDINATOR_ADDRESS (host:port), NUM_PROCESSES and PROCESS_ID are set by the launchers; on TPU
    pods and under Slurm `jax.distributed` finds them itself.
    """
    if "COORDINATOR_ADDRESS" in os.environ:
        jax.distributed.initialize(
            os.environ["COORDINATOR_ADDRESS"],
            int(os.environ["NUM_PROCESSES"]),
            int(os.environ["PROCESS_ID"]),
        )
