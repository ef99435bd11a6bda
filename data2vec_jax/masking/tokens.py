"""Proposals for text, and what becomes of the chosen tokens (BERT's 80/10/10).

T positions of a row; a mask is bool [T], True = masked. See `sampler`.
"""

import functools
from typing import Annotated

import jax
import jax.numpy as jnp

from data2vec_jax.core.config import Inside, Range, Span
from data2vec_jax.masking.sampler import Sampler, choose, ranks, smallest, table
from data2vec_jax.masking.spans import _spans

MASK, REPLACE, KEEP = 1, 2, 3


@functools.partial(jax.jit, static_argnames=("keep_prob", "replace_prob", "exact"))
def bert_roles(
    key: jax.Array, mask: jax.Array, keep_prob: float, replace_prob: float, exact: bool = True
) -> jax.Array:
    """What a chosen token turns into: 0 not chosen, 1 `<mask>`, 2 a random token, 3 itself.

    `keep_prob` and `replace_prob` are shares of the chosen positions `mask` [T]. With `exact` their
    numbers depend only on the number chosen, so that a loss over `<mask>` alone (spec 4.6) has a
    static count: of n positions round(n * replace_prob) have role 2, and
    round(n * (replace_prob + keep_prob)) role 2 or 3. Without it every position draws for itself,
    as the authors do. int8 [T].
    """
    size = mask.shape[0]
    if exact:
        chosen = mask.sum()
        ends = [
            jnp.asarray(table(size, lambda n, s=share: round(n * s)), jnp.int32)[chosen]
            for share in (replace_prob, replace_prob + keep_prob)
        ]
        order = ranks(key, ~mask)
        is_random, is_other = (smallest(order, end) for end in ends)
    else:
        draw = jax.random.uniform(key, (size,))
        is_random, is_other = draw < replace_prob, draw < replace_prob + keep_prob
    role = jnp.where(is_random, REPLACE, jnp.where(is_other, KEEP, MASK))
    return jnp.where(mask, role, 0).astype(jnp.int8)


def token_spans(
    length: int,
    *,
    prob: Annotated[float, Range(above=0, most=10)],
    width: Span,
    masked: Inside,
) -> Sampler:
    """Text 1.0: as `spans`, but starts anywhere and spans are cut at the row's end. spec 4.6.

    Width 1 is BERT's mask. `masked`: share of the positions masked in training.
    """
    return _spans(length, prob, width, masked, min_masks=0, to_the_end=True)


def independent(length: int, *, ratio: Inside) -> Sampler:
    """Text 2.0: exactly int(valid * (1 - ratio)) positions are kept, at random. spec 4.7."""
    counts = table(length, lambda valid: valid - int(valid * (1 - ratio)))

    def propose(key, valid):
        number = jnp.asarray(counts, jnp.int32)[valid]
        return choose(key, number, jnp.arange(length) < valid)

    return Sampler(length, propose, counts, exact=True)
