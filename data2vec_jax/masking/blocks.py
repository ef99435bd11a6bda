"""Proposals for grids: BEiT's rectangles (vision 1.0), kept squares (vision 2.0), SimMIM's squares,
I-JEPA's blocks.

T positions of a row; a mask is bool [T], True = masked. See `sampler`.
"""

import math
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
import numpy as np

from data2vec_jax.core.config import Inside, PositiveInt, Range, Share, Size, Span
from data2vec_jax.core.errors import UserError
from data2vec_jax.masking.sampler import (
    BlockSampler,
    Sampler,
    choose,
    ranks,
    require,
    smallest,
    table,
)
from data2vec_jax.masking.spans import _windows

AreaShare = Annotated[float, Range(above=0, most=1)]
Aspect = Annotated[float, Range(0.01, 100)]


def inverse_blocks(
    grid: tuple[int, int],
    *,
    ratio: Inside,
    adjust: Annotated[float, Range(-1, 1)],
    width: Span,
    inverse: bool = True,
    dropout: Share = 0.0,
) -> Sampler:
    """Vision 2.0: squares around random centres are kept, exactly int(T * (1 - ratio)). spec 4.5.

    Options as in `block_spans`. Without `inverse` the squares are masked. Raises UserError: the
    grid is too small for a single square of this width.
    """
    share = (1 - ratio if inverse else ratio) + adjust
    if int(grid[0] * grid[1] * (share / width**2)) < 1:
        rows, columns = grid
        raise UserError(
            f"config.mask.width: of {rows} x {columns} patches with ratio={ratio} and "
            f"adjust={adjust}, not one square of {width} x {width} is drawn; use a smaller width"
        )
    return _windows(tuple(grid), ratio, adjust, width, inverse, dropout)


def cells(grid: tuple[int, int], *, ratio: Inside, side: Span = 2) -> Sampler:
    """SimMIM: of the grid's squares of `side` x `side` patches the share `ratio` is masked, rounded
    up (baselines spec 3). Raises UserError: the squares do not fill the grid."""
    rows, columns = (n // side for n in grid)
    require(grid == (rows * side, columns * side), "side", side, f"a divisor of {grid}")
    number = math.ceil(ratio * rows * columns)

    def propose(key, valid):
        del valid  # A grid has no padding.
        chosen = choose(key, number, jnp.ones(rows * columns, bool)).reshape(rows, columns)
        return jnp.repeat(jnp.repeat(chosen, side, 0), side, 1).reshape(-1)

    counts = (number * side**2,) * (math.prod(grid) + 1)
    return Sampler(math.prod(grid), propose, counts, exact=True, grid=grid)


def blocks(
    grid: tuple[int, int],
    *,
    count: PositiveInt,
    min_patches: Size = 16,
    max_patches: Size | None = None,
    min_aspect: Annotated[float, Range(above=0, most=1)] = 0.3,
    max_attempts: Annotated[int, Range(1, 10_000)] = 10,
) -> Sampler:
    """Vision 1.0: random rectangles until `count` patches are masked. spec 4.2.

    A rectangle has between `min_patches` and the missing number of patches (at most `max_patches`)
    and an aspect between `min_aspect` and its inverse, log-uniform. It is drawn again if it is as
    high or as wide as the grid, adds nothing, or adds too much; after `max_attempts` in a row the
    proposal stops short of `count`.
    """
    rows, columns = grid
    require(0 < count < rows * columns, "count", count, f"between 0 and {rows * columns}")
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

    counts = table(rows * columns, lambda valid: min(count, valid))
    return Sampler(rows * columns, propose, counts, grid=(rows, columns))


def _shapes(
    grid: tuple[int, int], scale: tuple[float, float], aspect: tuple[float, float], most: int
) -> np.ndarray:
    """Heights and widths of blocks, int [4096, 2], in steps of the one random number that sets both
    area and aspect, as in the authors' code; `most`: rows less than the grid's that a block has."""
    u = np.linspace(0, 1, 4096)
    area = np.floor(math.prod(grid) * (scale[0] + u * (scale[1] - scale[0])))
    ratio = aspect[0] + u * (aspect[1] - aspect[0])
    sides = np.round(np.stack([np.sqrt(area * ratio), np.sqrt(area / ratio)], 1)).astype(np.int32)
    return np.clip(sides, 1, np.asarray(grid) - most)


def multiblock(
    grid: tuple[int, int],
    *,
    kept: Inside = 0.4,
    targets: Annotated[int, Range(1, 64)] = 4,
    scale: tuple[Inside, Inside] = (0.15, 0.2),
    aspect: tuple[Aspect, Aspect] = (0.75, 1.5),
    context: tuple[AreaShare, AreaShare] = (0.85, 1.0),
    corners: Literal["all", "authors"] = "all",
) -> BlockSampler:
    """I-JEPA: K = `targets` rectangles are predicted from a large square without them (baselines
    spec 7), of which the student sees exactly int(kept * T) patches.

    scale, aspect: range of the share of the grid that a target covers, and of its height / width;
    all targets of a mask have one shape. context: range of the square's share. If it leaves more
    patches than are kept, some are dropped at random. If it leaves less, others are kept: random
    ones outside of targets, and if even these are too few, random ones of targets, which are then
    no part of their targets any more. corners: 'authors' leaves out the last place of a block, so
    that no target has a patch of the grid's last row or column.
    """
    (rows, columns), T, short = grid, math.prod(grid), int(corners == "authors")
    for name, (low, high) in (("scale", scale), ("aspect", aspect), ("context", context)):
        require(low <= high, name, (low, high), "a range")
    number = int(kept * T)
    require(number > 0, "kept", kept, f"a patch or more of {T}")
    require(min(grid) > 1, "kind", "'multiblock'", f"for a grid of {grid}: it needs two rows")
    target_shapes = _shapes(grid, scale, aspect, short)
    context_shapes = _shapes(grid, context, (1.0, 1.0), short)
    row, column = np.indices(grid)  # each [rows, columns]

    def draw(key, valid):
        del valid  # A grid has no padding.
        key_blocks, key_kept = jax.random.split(key)
        # Shapes of targets and context, then a corner for each of these K + 1 blocks.
        u = jax.random.uniform(key_blocks, (targets + 2, 2))
        target, whole = (
            jnp.asarray(shapes)[(share * len(shapes)).astype(jnp.int32)]
            for share, shapes in zip(u[0], (target_shapes, context_shapes), strict=True)
        )
        sides = jnp.concatenate([jnp.tile(target, (targets, 1)), whole[None]])  # [K + 1, 2]
        first = (u[1:] * (np.asarray(grid) - sides + 1 - short)).astype(jnp.int32)
        (top, left), (below, right) = (x.T[..., None, None] for x in (first, first + sides))
        inside = (row >= top) & (row < below) & (column >= left) & (column < right)
        *blocks, square = inside.reshape(targets + 1, T)
        blocks = jnp.stack(blocks)  # [K, T]
        group = jnp.where(blocks.any(0), 2, jnp.where(square, 0, 1))
        hidden = ~smallest(ranks(key_kept, group), number)
        return jnp.concatenate([hidden[None], blocks & hidden])

    largest = int(target_shapes.prod(1).max())
    every = dict(length=T, exact=True, grid=(rows, columns))
    return BlockSampler(
        **every,
        propose=lambda key, valid: draw(key, valid)[0],
        counts=(T - number,) * (T + 1),
        targets=targets,
        largest=largest,
        parts=Sampler(**every, propose=draw, counts=(largest,) * (T + 1)),
    )
