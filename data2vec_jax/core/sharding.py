"""Where arrays live: one mesh, one rule for parameters, one rule for batches.

The mesh is `(slice, data, fsdp)`. A batch is split over all three axes; parameters, teacher and
optimiser moments are split over `fsdp` by one path-and-shape rule, and gathered layer by layer
where they are used (`gather`). A slice is what one fast network connects (a TPU slice, a GPU node):
weights are gathered inside a slice, and only the sums of gradients cross from one to another.
"""

import functools
import math
import re
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from data2vec_jax.core.config import NonNegativeInt, Pattern, PositiveInt, Range
from data2vec_jax.core.errors import UserError
from data2vec_jax.core.state import path_name

AXES = ("slice", "data", "fsdp")
BATCH = P(AXES)  # axis 0 of every batch array is split over the whole mesh
MIN_SIZE = 2**16  # smaller arrays are cheaper to copy than to gather


def make_mesh(
    data: Annotated[int, Range(-1)] = -1,
    fsdp: PositiveInt | None = None,
    slices: PositiveInt | None = None,
    *,
    devices: Sequence[Any] | None = None,
) -> Mesh:
    """The mesh `(slice, data, fsdp)` over all devices. Config section `mesh`.

    data: copies of the model in a slice, each split over `fsdp` devices; -1 means "the rest".
    fsdp: None for what pays, see `fsdp_of`, or for 1 where data is given. slices: read off the
    devices; a number splits their list into so many equal parts (1: fsdp may cross the slow
    network). devices: those of this run, or of a topology described by its name.

    Raises:
      UserError: a product that is not the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    if (data < 1 and data != -1) or any(n is not None and n < 1 for n in (fsdp, slices)):
        raise UserError(
            f"config.mesh: data={data}, fsdp={fsdp}, slices={slices}; use numbers >= 1, or data=-1"
        )
    groups = _slices(devices, slices)
    size = len(groups[0])
    if any(len(group) != size for group in groups):
        sizes = ", ".join(str(len(group)) for group in groups)
        raise UserError(f"config.mesh: slices of {sizes} devices; they must be of one size")
    if fsdp is None:
        fsdp = fsdp_of(devices[0].platform, size) if data == -1 else 1
    rows = size // fsdp if data == -1 else data
    if rows * fsdp != size:
        of_slice = f" of each of the {len(groups)} slices" if len(groups) > 1 else ""
        raise UserError(
            f"config.mesh: data={data} x fsdp={fsdp} does not use the {size} devices{of_slice}; "
            f"use data=-1 and fsdp={_nearest_divisor(size, fsdp)}"
            + (", or slices=1 to let fsdp cross slices" if len(groups) > 1 else "")
        )
    placed = np.stack([_arrange(group, (rows, fsdp)) for group in groups])
    return Mesh(placed, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def fsdp_of(platform: str, size: int) -> int:
    """Over how many of a slice's `size` devices parameters are split where no config says it.

    To update all of Adam's moments and the teacher on every TPU takes a third of the step of a base
    model. Split over 16 it takes next to nothing, and weights arrive while the layer before is
    computed. Plans for GPUs gain too little to tell; a CPU's network is its memory
    (docs/performance.md).
    """
    return math.gcd(size, 16) if platform == "tpu" else 1


def _slices(devices: Sequence[Any], count: int | None) -> list[list[Any]]:
    """The devices of each slice; of `count` equal slices, where it is given."""
    if count is None:
        groups: dict[int, list[Any]] = {}
        for device in devices:
            groups.setdefault(getattr(device, "slice_index", None) or 0, []).append(device)
        return [groups[index] for index in sorted(groups)]
    if len(devices) % count:
        raise UserError(
            f"config.mesh.slices: {len(devices)} devices are not {count} equal slices; "
            f"use {_nearest_divisor(len(devices), count)}"
        )
    return np.split(np.array(devices, object), count)


def _arrange(devices: Sequence[Any], shape: tuple[int, int]) -> np.ndarray:
    """The devices of one slice as [data, fsdp], neighbours in its network along fsdp."""
    try:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    except (AssertionError, NotImplementedError):  # a shape of slice that jax knows no order for
        return np.array(devices, object).reshape(shape)


def _nearest_divisor(total: int, wanted: int) -> int:
    return min((n for n in range(1, total + 1) if total % n == 0), key=lambda n: abs(n - wanted))


def spec_of(
    name: str, shape: Sequence[int], fsdp: int, rules: Sequence = (), min_size: int = MIN_SIZE
) -> P:
    """The first matching (pattern, spec) of `rules`; otherwise the largest divisible axis is split.

    The leading axis of a stacked layer ('/blocks/') is never split: the scan runs over it.
    """
    for pattern, spec in rules:
        if re.search(pattern, name):
            return _checked(pattern, spec, name, shape, fsdp)
    first = 1 if "/blocks/" in f"/{name}" else 0
    axes = [a for a in range(first, len(shape)) if shape[a] % fsdp == 0]
    if fsdp == 1 or int(np.prod(shape)) < min_size or not axes:
        return P()
    axis = max(axes, key=lambda a: shape[a])
    return P(*(None,) * axis, "fsdp")


def _checked(pattern: str, spec: Sequence, name: str, shape: Sequence[int], fsdp: int) -> P:
    """The spec of a rule, if the array at `name` can be split so."""
    fits = len(spec) <= len(shape) and set(spec) <= {None, "fsdp"} and spec.count("fsdp") <= 1
    if not fits or any(axis and n % fsdp for axis, n in zip(spec, shape, strict=False)):
        raise UserError(
            f"config.sharding.rules: '{pattern}' asks for {tuple(spec)} of {name} {list(shape)}; "
            f"use None for each axis, or 'fsdp' for one that {fsdp} divides"
        )
    return P(*spec)


def shardings(
    tree: Any,
    mesh: Mesh,
    *,
    rules: Sequence[tuple[Pattern, Sequence[Literal["fsdp"] | None]]] = (),
    min_size: NonNegativeInt = MIN_SIZE,
) -> Any:
    """A NamedSharding for each leaf of a state. Config section `sharding`.

    Moments and teacher end with the same paths as parameters, so one rule serves all.

    rules: (path pattern, one of None or 'fsdp' for each axis), the first match decides; () splits
    nothing. min_size: arrays of fewer elements are not split by any other than these rules.
    """

    def place(key_path, x):
        name = path_name(key_path)
        return NamedSharding(mesh, spec_of(name, x.shape, mesh.shape["fsdp"], rules, min_size))

    return jax.tree_util.tree_map_with_path(place, tree)


def own_blocks(mesh: Mesh) -> list[int]:
    """Which of the `mesh.size` equal blocks of a batch's rows this process's devices hold.

    Not always adjacent ones: on TPU the order of devices follows the network, not the hosts.
    """
    own = jax.process_index()
    return [i for i, device in enumerate(mesh.devices.flat) if device.process_index == own]


def to_global(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This process's rows (those of `own_blocks`) -> global arrays split over the mesh."""
    sharding, share = NamedSharding(mesh, BATCH), len(own_blocks(mesh))

    def place(x):
        shape = (x.shape[0] // share * mesh.size, *x.shape[1:])
        return jax.make_array_from_process_local_data(sharding, x, shape)

    return {name: place(x) for name, x in batch.items()}


def gather(params: Any) -> Any:
    """Un-shards one layer's weights just before use: the all-gather of FSDP, in plain sight."""
    if jax.sharding.get_abstract_mesh().empty:  # models stay usable without a mesh
        return params
    return jax.tree.map(_gather, params)


@jax.custom_vjp
def _gather(weight: jax.Array) -> jax.Array:
    return jax.lax.with_sharding_constraint(weight, P())


# The transpose of a constraint is the same constraint, which would sum whole gradients everywhere;
# without it each device gets the sum of its own shard only (reduce-scatter).
_gather.defvjp(lambda weight: (_gather(weight), None), lambda _, gradient: (gradient,))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def lookup(table: jax.Array, indices: jax.Array, dtype: Any) -> jax.Array:
    """table[indices]: [V, D], int [B, ...] -> [B, ..., D].

    For the gradient each device adds up its own rows of the batch in float32; the sums of all
    devices are added in `dtype`, as those of other weights are, and each keeps its own part. The
    compiler would send whole tables in float32.
    """
    del dtype
    return table[indices]


def _lookup_gradient(dtype, residuals, gradient):
    table, indices = residuals
    mesh = jax.sharding.get_abstract_mesh()

    def own(indices, gradient):
        precise = jnp.promote_types(table.dtype, jnp.float32)
        return jnp.zeros(table.shape, precise).at[indices].add(gradient.astype(precise))

    if mesh.empty or mesh.size == 1 or len(indices) % mesh.size:
        return own(indices, gradient).astype(table.dtype), None
    spec = spec_of("", table.shape, mesh.shape["fsdp"])

    def of_all(indices, gradient):
        sums = own(indices, gradient).astype(dtype)
        if not spec:
            return jax.lax.psum(sums, AXES)
        axis = len(spec) - 1
        sums = jax.lax.psum_scatter(sums, "fsdp", scatter_dimension=axis, tiled=True)
        return jax.lax.psum(sums, ("slice", "data"))

    of_all = jax.shard_map(of_all, in_specs=(BATCH, BATCH), out_specs=spec, check_vma=False)
    return of_all(indices, gradient).astype(table.dtype), None


lookup.defvjp(lambda table, indices, dtype: (table[indices], (table, indices)), _lookup_gradient)


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


def platform() -> str:
    """'cpu', 'tpu' or 'gpu': of the ambient mesh, whose devices may be known to a compiler only;
    without one, of JAX's default device."""
    device = jax.sharding.get_abstract_mesh().abstract_device or jax.config.jax_default_device
    if device is None:
        return jax.default_backend()
    return device if isinstance(device, str) else device.platform


def device_count() -> int:
    """Devices of the ambient mesh, 1 without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else mesh.size


def axis_size(name: str) -> int:
    """Size of an axis of the ambient mesh, 1 without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else mesh.shape[name]
