"""What all masks share: a proposal, an exact count, and the draw of a batch's masks.

Legend: B examples, M masks (clones) of one example, T positions: frames, tokens, or the patches of
a grid row by row. A mask is bool [T], True = masked; `valid` of the T positions are not padding.

A sampler is made of two things: the authors' proposal, whose number of masked positions varies,
and a count that depends on nothing but `valid`. `sample` proposes and then masks or unmasks random
single positions until the count is met. The authors do the same, except that speech 1.0 cuts every
row to the smallest count of its batch; here the count is an option (`masked`), so that a mask does
not depend on which rows share a batch. Sources: docs/spec/pretraining.md section 4.

Choosing n positions at random is one sort of T random numbers; nothing takes memory O(T^2).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from data2vec_jax.core import sharding
from data2vec_jax.core.errors import UserError


# By identity: a sampler is built once per program, and is a static argument of `sample`.
@dataclasses.dataclass(frozen=True, eq=False)
class Sampler:
    """How the positions of one row are masked.

    length: T.
    propose: (key, valid) -> mask [T], the authors' distribution. `valid` may be traced; a mask
      never reaches beyond it.
    counts: [T + 1] ints; counts[valid] positions are masked in training.
    exact: the proposal already has that count.
    grid: (rows, columns) with rows * columns = T, or None. A grid has no padding.
    """

    length: int
    propose: Callable[[jax.Array, Any], jax.Array]
    counts: tuple[int, ...]
    exact: bool = False
    grid: tuple[int, int] | None = None

    def count(self, valid: Any) -> Any:
        """Positions masked in training: an int for an int, an int32 array for an array."""
        if isinstance(valid, int | np.integer):
            return self.counts[int(valid)]
        return jnp.asarray(self.counts, jnp.int32)[valid]


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class BlockSampler(Sampler):
    """A sampler of masks in which there are K = `targets` blocks, which are predicted one by one.

    largest: the most positions of a block. parts: proposes [1 + K, T]: the same mask, and its
    blocks, whose positions are all masked.
    """

    targets: int
    largest: int
    parts: Sampler


def ranks(key: jax.Array, group: jax.Array) -> jax.Array:
    """uint32 [T], no two the same, that sort by `group` [T] (0 to 3), at random within a group.

    Two of 2^32 random numbers are equal about once in 1e7 rows of 512, and a tie at the threshold
    would break an exact count; so the lowest bits are the position itself.
    """
    size = group.shape[0]
    low = (size - 1).bit_length()
    noise = jax.random.bits(key, (size,), jnp.uint32) >> (2 + low) << low
    return group.astype(jnp.uint32) << 30 | noise | jnp.arange(size, dtype=jnp.uint32)


def smallest(ranks: jax.Array, count: Any) -> jax.Array:
    """bool [T]: the `count` smallest of `ranks` [T]."""
    limit = jnp.sort(ranks)[jnp.clip(count - 1, 0, ranks.shape[0] - 1)]
    return (ranks <= limit) & (count > 0)


def choose(key: jax.Array, count: Any, among: jax.Array) -> jax.Array:
    """bool [T]: `count` random positions of those in `among` [T], or all if they are fewer."""
    return smallest(ranks(key, ~among), count) & among


@jax.jit
def equalise(key: jax.Array, mask: jax.Array, count: Any, valid: Any = None) -> jax.Array:
    """`mask` [T] with exactly `count` (may be traced) positions masked, as far as `valid` allows.

    A surplus is unmasked at random; what is missing is filled at random among the first `valid`
    positions (all T if None), wherever the spans are. bool [T].
    """
    inside = jnp.arange(mask.shape[0]) < (mask.shape[0] if valid is None else valid)
    # The smallest ranks are masked positions, then unmasked ones, then padding.
    group = jnp.where(inside, jnp.where(mask, 0, 1), 2)
    return smallest(ranks(key, group), count) & inside


@functools.partial(jax.jit, static_argnames="share")
def drop(key: jax.Array, mask: jax.Array, share: float) -> jax.Array:
    """Mask dropout: unmasks a random `share` of the masked positions, rounded. bool [T] -> [T].

    The number is rounded half to even in double precision, as numpy's `rint` does.
    """
    holes = table(mask.shape[0], lambda n: round(n * share))
    masked = mask.sum()
    return equalise(key, mask, masked - jnp.asarray(holes, jnp.int32)[masked])


@functools.partial(jax.jit, static_argnames="n")
def positions(mask: jax.Array, n: int) -> jax.Array:
    """Indices of the first `n` masked positions, ascending: bool [..., T] -> int32 [..., n].

    Where fewer are masked the rest is 0, an index that is valid but means nothing.
    """
    size = mask.shape[-1]
    if n > size:
        raise ValueError(f"{n} positions of a row of {size}")
    # A sort, not a cumulative sum and a scatter: TPUs scatter slowly.
    found = jnp.sort(jnp.where(mask, jnp.arange(size, dtype=jnp.int32), size))[..., :n]
    return jnp.where(found < size, found, 0)


def weights(mask: jax.Array, n: int) -> jax.Array:
    """1 where `positions` has a masked one, 0 where a row has fewer: bool [..., T] -> [..., n]."""
    return (jnp.arange(n) < jnp.sum(mask, -1, keepdims=True)).astype(jnp.float32)


def kept(mask: jax.Array, n: int) -> jax.Array:
    """Indices of the first `n` positions not masked: bool [..., T] -> int32 [..., n]."""
    return positions(~mask, n)


@functools.partial(jax.jit, static_argnames=("sampler", "clones"))
def sample(
    sampler: Sampler,
    key: jax.Array,
    step: Any,
    example_ids: jax.Array,
    clones: int,
    valid: jax.Array | None = None,
) -> jax.Array:
    """Training masks: bool [B, M, T] for `example_ids` [B] and `clones` = M.

    Row b has sampler.count(valid[b]) masked positions, all among its first `valid[b]` (int32 [B];
    None: no padding). A mask is a function of (key, step, example id, clone) and `valid[b]`: it is
    the same in any row of any batch on any number of devices.
    """
    if valid is None:
        valid = jnp.full(example_ids.shape, sampler.length, jnp.int32)
    elif sampler.grid is not None:
        raise ValueError(f"the grid {sampler.grid} has no padding: leave `valid` out")

    def draw(key, example, clone, valid):
        own = jax.random.fold_in(jax.random.fold_in(key, example), clone)
        key_propose, key_equalise = jax.random.split(own)
        mask = sampler.propose(key_propose, valid)
        if sampler.exact:
            return mask
        return equalise(key_equalise, mask, sampler.count(valid), valid)

    def rows(key, example_ids, valid):
        each_clone = jax.vmap(draw, (None, None, 0, None))
        each_row = jax.vmap(each_clone, (None, 0, None, 0))
        return each_row(key, example_ids, jnp.arange(clones), valid)

    # Each device draws its own rows: a loop that ends when all rows are done would otherwise ask
    # all devices at every turn.
    rows = sharding.per_device(rows, example_ids.shape[0])
    return rows(jax.random.fold_in(key, step), example_ids, valid)


def table(length: int, function: Callable[[int], Any]) -> tuple:
    """function(0), ..., function(length), computed by Python in double precision.

    In float32 some products fall on the other side of an integer than in the authors' code, for
    instance int(196 * (1 - 0.8)) = 39; and a static count must be the traced one.
    """
    return tuple(function(valid) for valid in range(length + 1))


def at_least_one(length: int, masked: float) -> tuple[int, ...]:
    """[T + 1]: floor(masked * valid), but one position of any row that has one."""
    return table(length, lambda valid: min(max(int(masked * valid), 1), valid))


def require(good: bool, option: str, value: Any, meaning: str):
    if not good:
        raise UserError(f"config.mask.{option}: {value} is not {meaning}")
