"""Proposals for grids: BEiT's rectangles (vision 1.0), kept squares (vision 2.0).

T positions of a row; a mask is bool [T], True = masked. See `sampler`.
"""

import math
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np

from data2vec_jax.core.config import Inside, PositiveInt, Range, Share, Size, Span
from data2vec_jax.core.errors import UserError
from data2vec_jax.masking.sampler import Sampler, choose, require, table
from data2vec_jax.masking.spans import _windows


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
