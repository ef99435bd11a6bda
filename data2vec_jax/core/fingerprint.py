"""Fingerprints of arrays: the same on any mesh and in numpy, and others if a single bit differs.

Each element's bits, a word, are mixed with its row-major place in the whole array. For a given
place the mixing is one to one, so a word that changed always changes the sum of the mixed words.
Two such sums modulo 2^32 let other damage pass with a chance of 2^-64. This is a guard against
accidents: whoever can write the file can write the sums as well.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

CHUNK = 1 << 16  # words at a time in numpy: temporaries stay in the cache


def of_arrays(leaves: Sequence[jax.Array]) -> jax.Array:
    """[L, 3] uint32, replicated: two sums and the number of non-finite elements of each array.

    Dispatched and not awaited, so the arrays may be donated to a program that is called next. Every
    process of the run calls it. One collective, however many arrays there are; copies of an array
    on several devices count once.
    """
    leaves = [_plain(leaf) for leaf in leaves]
    meshes = {x.sharding.mesh if isinstance(x.sharding, NamedSharding) else None for x in leaves}
    mesh = meshes.pop() if len(meshes) == 1 else None
    return _sums(leaves, mesh, tuple(x.sharding.spec for x in leaves) if mesh else ())


def of_array(array: np.ndarray) -> tuple[int, int]:
    """The two sums of an array in numpy."""
    words = np.ascontiguousarray(array).reshape(-1)
    words = words.view(_unsigned(words.dtype))
    total = np.zeros(2, np.uint32)
    for start in range(0, words.size, CHUNK):
        part = words[start : start + CHUNK].astype(np.uint32)
        place = np.arange(start, start + part.size, dtype=np.uint64).astype(np.uint32)
        total += np.array([x.sum(dtype=np.uint32) for x in _mix(part, place)])
    return int(total[0]), int(total[1])


def text(sums: Sequence[int]) -> str:
    """16 hexadecimal digits."""
    return "".join(f"{int(x):08x}" for x in sums[:2])


@functools.partial(jax.jit, static_argnames=("mesh", "specs"))
def _sums(leaves: list[jax.Array], mesh: Mesh | None, specs: tuple[P, ...]) -> jax.Array:
    if mesh is None:
        return jnp.stack([_of_part(leaf, leaf.shape, P()) for leaf in leaves])
    shapes = [leaf.shape for leaf in leaves]
    axes = [{name for axis in spec for name in _names(axis)} for spec in specs]
    split = tuple(name for name in mesh.axis_names if any(name in used for used in axes))

    def local(parts):
        rows = []
        for part, shape, spec, used in zip(parts, shapes, specs, axes, strict=True):
            copies = [jax.lax.axis_index(name) == 0 for name in split if name not in used]
            first = functools.reduce(jnp.logical_and, copies, jnp.bool_(True))
            rows.append(jnp.where(first, _of_part(part, shape, spec), 0))
        return jax.lax.psum(jnp.stack(rows), split) if split else jnp.stack(rows)

    return jax.shard_map(local, mesh=mesh, in_specs=(list(specs),), out_specs=P(), check_vma=False)(
        leaves
    )


def _of_part(part: jax.Array, shape: Sequence[int], spec: P) -> jax.Array:
    """[3] uint32 of a device's part of an array of `shape`."""
    words = part.astype(jnp.uint8) if part.dtype == bool else part
    words = jax.lax.bitcast_convert_type(words, _unsigned(words.dtype)).astype(jnp.uint32)
    shape = (*shape, *words.shape[part.ndim :])  # 64 bits are two words
    place, stride = jnp.uint32(0), 1
    for axis in reversed(range(len(shape))):
        index = jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
        if axis < len(spec) and (over := _names(spec[axis])):
            index += jnp.uint32(jax.lax.axis_index(over)) * jnp.uint32(words.shape[axis])
        place += index * jnp.uint32(stride % 2**32)
        stride *= shape[axis]
    bad = jnp.zeros(words.shape, bool)
    if jnp.issubdtype(part.dtype, jnp.inexact):
        bad = ~jnp.isfinite(part).reshape(*part.shape, *(1,) * (words.ndim - part.ndim)) | bad
    add = lambda a, b: tuple(x + y for x, y in zip(a, b, strict=True))  # noqa: E731
    # One reduction of three operands: XLA's CPU makes three loops, slow ones, of three reductions.
    zeros = (jnp.uint32(0),) * 3
    return jnp.stack(
        jax.lax.reduce((*_mix(words, place), bad.astype(jnp.uint32)), zeros, add, range(words.ndim))
    )


def _mix(word: Any, place: Any) -> tuple[Any, Any]:
    """Two mixtures of uint32 arrays; each is one to one in `word` (murmur's finaliser)."""
    word = word ^ (place * np.uint32(0x9E3779B1))
    word = (word ^ (word >> 16)) * np.uint32(0x85EBCA6B)
    word = (word ^ (word >> 13)) * np.uint32(0xC2B2AE35)
    return word ^ (word >> 16), (word ^ (word >> 15)) * np.uint32(0x2C1B3C6D)


def _plain(leaf: jax.Array) -> jax.Array:
    """A typed PRNG key as its integers."""
    is_key = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return jax.random.key_data(leaf) if is_key else leaf


def _unsigned(dtype: Any) -> np.dtype:
    """The unsigned integer of an element's size; 32 bits, of which there are two, for 64."""
    return np.dtype(f"uint{8 * min(np.dtype(dtype).itemsize, 4)}")


def _names(axes: str | Sequence[str] | None) -> tuple[str, ...]:
    """The mesh axes that an axis of an array is split over."""
    return () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)
