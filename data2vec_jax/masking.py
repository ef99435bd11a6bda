"""Masks for pretraining, drawn on the device from (seed, step, example id, clone).

Legend: B examples, M masks (clones) of one example, T positions: frames, tokens, or the patches of
a grid row by row. A mask is bool [T], True = masked; `valid` of the T positions are not padding.

A sampler is made of two things: the authors' proposal, whose number of masked positions varies,
and a count that depends on nothing but `valid`. `sample` proposes and then masks or unmasks random
single positions until the count is met. The authors do the same, except that speech 1.0 cuts every
row to the smallest count of its batch; here the count is an option (`masked`), so that a mask does
not depend on which rows share a batch. Sources: spec/pretraining.md section 4.

Choosing n positions at random is one sort of T random numbers; nothing takes memory O(T^2).
"""

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from data2vec_jax import parallel
from data2vec_jax.errors import UserError, check_section, nearest


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


# Choosing positions -------------------------------------------------------------------------------


def _ranks(key: jax.Array, group: jax.Array) -> jax.Array:
    """uint32 [T], no two the same, that sort by `group` [T] (0 to 3), at random within a group.

    Two of 2^32 random numbers are equal about once in 1e7 rows of 512, and a tie at the threshold
    would break an exact count; so the lowest bits are the position itself.
    """
    size = group.shape[0]
    low = (size - 1).bit_length()
    noise = jax.random.bits(key, (size,), jnp.uint32) >> (2 + low) << low
    return group.astype(jnp.uint32) << 30 | noise | jnp.arange(size, dtype=jnp.uint32)


def _first(ranks: jax.Array, count: Any) -> jax.Array:
    """bool [T]: the `count` smallest of `ranks` [T]."""
    limit = jnp.sort(ranks)[jnp.clip(count - 1, 0, ranks.shape[0] - 1)]
    return (ranks <= limit) & (count > 0)


def _choose(key: jax.Array, count: Any, among: jax.Array) -> jax.Array:
    """bool [T]: `count` random positions of those in `among` [T], or all if they are fewer."""
    return _first(_ranks(key, ~among), count) & among


@jax.jit
def equalise(key: jax.Array, mask: jax.Array, count: Any, valid: Any = None) -> jax.Array:
    """`mask` [T] with exactly `count` (may be traced) positions masked, as far as `valid` allows.

    A surplus is unmasked at random; what is missing is filled at random among the first `valid`
    positions (all T if None), wherever the spans are. bool [T].
    """
    inside = jnp.arange(mask.shape[0]) < (mask.shape[0] if valid is None else valid)
    # The smallest ranks are masked positions, then unmasked ones, then padding.
    group = jnp.where(inside, jnp.where(mask, 0, 1), 2)
    return _first(_ranks(key, group), count) & inside


@functools.partial(jax.jit, static_argnames="share")
def drop(key: jax.Array, mask: jax.Array, share: float) -> jax.Array:
    """Mask dropout: unmasks a random `share` of the masked positions, rounded. bool [T] -> [T].

    The number is rounded half to even in double precision, as numpy's `rint` does.
    """
    holes = _table(mask.shape[0], lambda n: round(n * share))
    masked = mask.sum()
    return equalise(key, mask, masked - jnp.asarray(holes, jnp.int32)[masked])


MASK, RANDOM, LEAVE = 1, 2, 3


@functools.partial(jax.jit, static_argnames=("leave", "random", "exact"))
def bert_roles(
    key: jax.Array, mask: jax.Array, leave: float, random: float, exact: bool = True
) -> jax.Array:
    """What a chosen token turns into: 0 not chosen, 1 `<mask>`, 2 a random token, 3 itself.

    `leave` and `random` are shares of the chosen positions `mask` [T]. With `exact` their numbers
    depend only on the number chosen, so that a loss over `<mask>` alone (spec 4.6) has a static
    count: roles 2 are round(n * random), roles 2 and 3 round(n * (random + leave)). Without it
    every position draws for itself, as the authors do. int8 [T].
    """
    size = mask.shape[0]
    if exact:
        chosen = mask.sum()
        ends = [
            jnp.asarray(_table(size, lambda n, s=share: round(n * s)), jnp.int32)[chosen]
            for share in (random, random + leave)
        ]
        ranks = _ranks(key, ~mask)
        is_random, is_other = (_first(ranks, end) for end in ends)
    else:
        draw = jax.random.uniform(key, (size,))
        is_random, is_other = draw < random, draw < random + leave
    role = jnp.where(is_random, RANDOM, jnp.where(is_other, LEAVE, MASK))
    return jnp.where(mask, role, 0).astype(jnp.int8)


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


def kept(mask: jax.Array, n: int) -> jax.Array:
    """Indices of the first `n` positions not masked: bool [..., T] -> int32 [..., n]."""
    return positions(~mask, n)


@functools.partial(jax.jit, static_argnames=("sampler", "clones"))
def sample(
    sampler: Sampler, key: jax.Array, step: Any, example_ids: jax.Array, clones: int,
    valid: jax.Array | None = None,
) -> jax.Array:  # fmt: skip
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
    rows = parallel.per_device(rows, example_ids.shape[0])
    return rows(jax.random.fold_in(key, step), example_ids, valid)


# Numbers that depend on `valid` -------------------------------------------------------------------


def _table(length: int, function: Callable[[int], Any]) -> tuple:
    """function(0), ..., function(length), computed by Python in double precision.

    In float32 some products fall on the other side of an integer than in the authors' code, for
    instance int(196 * (1 - 0.8)) = 39; and a static count must be the traced one.
    """
    return tuple(function(valid) for valid in range(length + 1))


def _at_least_one(length: int, masked: float) -> tuple[int, ...]:
    """[T + 1]: floor(masked * valid), but one position of any row that has one."""
    return _table(length, lambda valid: min(max(int(masked * valid), 1), valid))


def _require(good: bool, option: str, value: Any, meaning: str):
    if not good:
        raise UserError(f"config.mask.{option}: {value} is not {meaning}")


def _require_share(option: str, value: float):
    _require(0 < value < 1, option, value, "a share between 0 and 1")


# Kinds: rows --------------------------------------------------------------------------------------


def _spans(
    length: int, prob: float, width: int, masked: float, min_masks: int, to_the_end: bool
) -> Sampler:
    _require(prob > 0, "prob", prob, "above 0")
    _require(width >= 1, "width", width, "a width of 1 or more")
    _require_share("masked", masked)
    spans = _table(length, lambda valid: prob * valid / width)
    whole = np.array([int(x) for x in spans], np.int32)
    fraction = np.array([x - int(x) for x in spans], np.float32)

    def propose(key, valid):
        key_number, key_starts = jax.random.split(key)
        # floor(x + u) with u uniform in [0, 1) is floor(x), or one more as often as x's fraction.
        more = jax.random.uniform(key_number) < jnp.asarray(fraction)[valid]
        number = jnp.maximum(jnp.asarray(whole)[valid] + more, min_masks)
        room = valid - width
        # Too short for that many whole spans: the starts have just one place to spare.
        room = valid if to_the_end else jnp.where(room <= number, number + 1, room)
        starts = _choose(key_starts, number, jnp.arange(length) < room)
        # Covered: a start at this position or at one of the width - 1 before it.
        so_far = jnp.cumsum(starts)
        covered = so_far > jnp.pad(so_far, (width, 0))[:length]
        return covered & (jnp.arange(length) < valid)

    return Sampler(length, propose, _at_least_one(length, masked))


def spans(length: int, *, prob: float, width: int, masked: float, min_masks: int = 1) -> Sampler:
    """Speech 1.0: the union of `width`-long spans. spec 4.1.

    floor(prob * valid / width + u) spans, u uniform in [0, 1), but at least `min_masks`; distinct
    starts among {0, ..., valid - width - 1}, so the last position is masked only in rows too short
    for their spans. `masked`: share of the positions masked in training (rounded down, at least 1).
    """
    return _spans(length, prob, width, masked, min_masks, to_the_end=False)


def token_spans(length: int, *, prob: float, width: int, masked: float) -> Sampler:
    """Text 1.0: as `spans`, but starts anywhere and spans are cut at the row's end. spec 4.6.

    Width 1 is BERT's mask. `masked`: share of the positions masked in training.
    """
    return _spans(length, prob, width, masked, min_masks=0, to_the_end=True)


def independent(length: int, *, ratio: float) -> Sampler:
    """Text 2.0: exactly int(valid * (1 - ratio)) positions are kept, at random. spec 4.7."""
    _require_share("ratio", ratio)
    counts = _table(length, lambda valid: valid - int(valid * (1 - ratio)))

    def propose(key, valid):
        number = jnp.asarray(counts, jnp.int32)[valid]
        return _choose(key, number, jnp.arange(length) < valid)

    return Sampler(length, propose, counts, exact=True)


# Kinds: 2.0 blocks on rows and grids --------------------------------------------------------------


def _windows(
    shape: tuple[int, ...], ratio: float, adjust: float, width: int, inverse: bool, dropout: float
) -> Sampler:
    """Windows of `width` per axis around centres drawn with replacement. `shape`: (T,) or a grid.

    "Chosen" positions are masked, or with `inverse` kept. The order of the float operations is
    the authors', because the numbers are rounded down.
    """
    _require_share("ratio", ratio)
    _require(width >= 1, "width", width, "a width of 1 or more")
    length = math.prod(shape)
    share = 1 - ratio if inverse else ratio
    chosen = _table(length, lambda valid: int(valid * share))
    per_centre = (share + adjust) / width ** len(shape)
    numbers = _table(length, lambda valid: int(valid * per_centre * (1 + dropout)))
    where = np.indices(shape).reshape(len(shape), 1, length)  # [axes, 1, T]

    def propose(key, valid):
        centres = jax.random.randint(key, (numbers[-1],), 0, jnp.maximum(valid, 1))  # [S]
        drawn = jnp.arange(numbers[-1]) < jnp.asarray(numbers, jnp.int32)[valid]
        corners = jnp.stack(jnp.unravel_index(centres, shape)) - width // 2  # [axes, S]
        # The authors move what falls outside to the border, which the window covers anyway.
        offset = where - corners[:, :, None]  # [axes, S, T]; fused into the reduction
        inside = jnp.all((offset >= 0) & (offset < width), axis=0) & drawn[:, None]
        mask = jnp.any(inside, axis=0) ^ inverse
        return mask & (jnp.arange(length) < valid)

    counts = tuple(v - n for v, n in enumerate(chosen)) if inverse else chosen
    return Sampler(length, propose, counts, grid=shape if len(shape) == 2 else None)


def block_spans(
    length: int, *, ratio: float, adjust: float, width: int, inverse: bool = False,
    dropout: float = 0.0,
) -> Sampler:  # fmt: skip
    """Speech 2.0: spans around random centres, then exactly int(valid * ratio) masked. spec 4.4.

    `adjust` is added to the ratio when centres are counted, as they overlap; `dropout` draws that
    much more of them. `inverse`: the spans are kept, and int(valid * (1 - ratio)) positions are.
    """
    return _windows((length,), ratio, adjust, width, inverse, dropout)


def inverse_blocks(
    grid: tuple[int, int], *, ratio: float, adjust: float, width: int, inverse: bool = True,
    dropout: float = 0.0,
) -> Sampler:  # fmt: skip
    """Vision 2.0: squares around random centres are kept, exactly int(T * (1 - ratio)). spec 4.5.

    Options as in `block_spans`. Without `inverse` the squares are masked.
    """
    return _windows(tuple(grid), ratio, adjust, width, inverse, dropout)


# Kinds: BEiT rectangles ---------------------------------------------------------------------------


def blocks(
    grid: tuple[int, int], *, count: int, min_patches: int = 16, max_patches: int | None = None,
    min_aspect: float = 0.3, max_attempts: int = 10,
) -> Sampler:  # fmt: skip
    """Vision 1.0: random rectangles until `count` patches are masked. spec 4.2.

    A rectangle has between `min_patches` and the missing number of patches (at most `max_patches`)
    and an aspect between `min_aspect` and its inverse, log-uniform. It is drawn again if it is as
    high or as wide as the grid, adds nothing, or adds too much; after `max_attempts` in a row the
    proposal stops short of `count`.
    """
    rows, columns = grid
    _require(0 < count < rows * columns, "count", count, f"between 0 and {rows * columns}")
    _require(0 < min_aspect <= 1, "min_aspect", min_aspect, "above 0 and at most 1")
    most = count if max_patches is None else max_patches
    row, column = np.indices((rows, columns))  # each [rows, columns]

    def propose(key, valid):
        del valid  # A grid has no padding.

        def unfinished(state):
            _, _, taken, failures = state
            return (taken < count) & (failures < max_attempts)

        def attempt(state):
            key, mask, taken, failures = state
            key, now = jax.random.split(key)
            draw = jax.random.uniform(now, (4,))
            room = jnp.minimum(count - taken, most)
            # The bounds may be in either order: the last gaps are smaller than min_patches.
            area = min_patches + draw[0] * (room - min_patches)
            aspect = jnp.exp((2 * draw[1] - 1) * -math.log(min_aspect))
            height = jnp.round(jnp.sqrt(area * aspect)).astype(jnp.int32)
            width = jnp.round(jnp.sqrt(area / aspect)).astype(jnp.int32)
            top = (draw[2] * (rows - height + 1)).astype(jnp.int32)
            left = (draw[3] * (columns - width + 1)).astype(jnp.int32)
            block = (row >= top) & (row < top + height) & (column >= left) & (column < left + width)
            new = jnp.sum(block & ~mask, dtype=jnp.int32)
            fits = (height < rows) & (width < columns) & (new > 0) & (new <= room)
            return (
                key,
                mask | (block & fits),
                taken + jnp.where(fits, new, 0),
                jnp.where(fits, 0, failures + 1),
            )

        start = (key, jnp.zeros((rows, columns), bool), jnp.int32(0), jnp.int32(0))
        return jax.lax.while_loop(unfinished, attempt, start)[1].reshape(-1)

    counts = _table(rows * columns, lambda valid: min(count, valid))
    return Sampler(rows * columns, propose, counts, grid=(rows, columns))


KINDS: dict[str, Callable[..., Sampler]] = {
    "spans": spans,
    "token_spans": token_spans,
    "independent": independent,
    "block_spans": block_spans,
    "inverse_blocks": inverse_blocks,
    "blocks": blocks,
}


def make(kind: str, size: int | tuple[int, int], **options: Any) -> Sampler:
    """The sampler of a config section mask = dict(kind=..., ...) for T positions or a grid.

    A kind for rows takes a grid as one row of T = rows * columns. Raises `UserError` for an
    unknown kind or option, a missing or impossible value, or a kind that needs a grid.
    """
    if kind not in KINDS:
        raise UserError(f"config.mask.kind: no such kind '{kind}'{nearest(kind, KINDS)}")
    factory = KINDS[kind]
    given = next(iter(inspect.signature(factory).parameters))
    check_section("mask", options, factory, given=(given,))
    is_grid = not isinstance(size, int | np.integer)
    if given == "grid":
        _require(is_grid, "kind", f"'{kind}'", "for rows: it needs a grid of patches")
        return factory(tuple(int(n) for n in size), **options)
    return factory(math.prod(size) if is_grid else int(size), **options)
