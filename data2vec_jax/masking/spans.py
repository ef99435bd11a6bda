"""Proposals for rows: spans of frames (speech 1.0 and 2.0).

T positions of a row; a mask is bool [T], True = masked. See `sampler`.
"""

import math
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np

from data2vec_jax.core.config import Inside, Range, Share, Span
from data2vec_jax.masking.sampler import (
    Sampler,
    at_least_one,
    choose,
    table,
)


def _spans(
    length: int, prob: float, width: int, masked: float, min_masks: int, to_the_end: bool
) -> Sampler:
    spans = table(length, lambda valid: prob * valid / width)
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
        starts = choose(key_starts, number, jnp.arange(length) < room)
        # Covered: a start at this position or at one of the width - 1 before it.
        so_far = jnp.cumsum(starts)
        covered = so_far > jnp.pad(so_far, (width, 0))[:length]
        return covered & (jnp.arange(length) < valid)

    return Sampler(length, propose, at_least_one(length, masked))


def spans(
    length: int,
    *,
    prob: Annotated[float, Range(above=0, most=10)],
    width: Span,
    masked: Inside,
    min_masks: Annotated[int, Range(0, 10_000)] = 1,
) -> Sampler:
    """Speech 1.0: the union of `width`-long spans. spec 4.1.

    floor(prob * valid / width + u) spans, u uniform in [0, 1), but at least `min_masks`; distinct
    starts among {0, ..., valid - width - 1}, so the last position is masked only in rows too short
    for their spans. `masked`: share of the positions masked in training (rounded down, at least 1).
    """
    return _spans(length, prob, width, masked, min_masks, to_the_end=False)


def _windows(
    shape: tuple[int, ...], ratio: float, adjust: float, width: int, inverse: bool, dropout: float
) -> Sampler:
    """Windows of `width` per axis around centres drawn with replacement. `shape`: (T,) or a grid.

    "Chosen" positions are masked, or with `inverse` kept. The order of the float operations is
    the authors', because the numbers are rounded down.
    """
    length = math.prod(shape)
    share = 1 - ratio if inverse else ratio
    chosen = table(length, lambda valid: int(valid * share))
    per_centre = (share + adjust) / width ** len(shape)
    numbers = table(length, lambda valid: int(valid * per_centre * (1 + dropout)))
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
    length: int,
    *,
    ratio: Inside,
    adjust: Annotated[float, Range(-1, 1)],
    width: Span,
    inverse: bool = False,
    dropout: Share = 0.0,
) -> Sampler:
    """Speech 2.0: spans around random centres, then exactly int(valid * ratio) masked. spec 4.4.

    `adjust` is added to the ratio when centres are counted, as they overlap; `dropout` draws that
    much more of them. `inverse`: the spans are kept, and int(valid * (1 - ratio)) positions are.
    """
    return _windows((length,), ratio, adjust, width, inverse, dropout)
