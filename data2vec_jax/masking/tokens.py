"""Proposals for text, and what becomes of the chosen tokens (BERT's 80/10/10).

Legend: B examples, M masks (clones) of one example, T positions: frames, tokens, or the patches of
a grid row by row. A mask is bool [T], True = masked; `valid` of the T positions are not padding.
"""

import functools

import jax
import jax.numpy as jnp

from data2vec_jax.masking.sampler import Sampler, choose, ranks, require_share, smallest, table
from data2vec_jax.masking.spans import _spans

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
            jnp.asarray(table(size, lambda n, s=share: round(n * s)), jnp.int32)[chosen]
            for share in (random, random + leave)
        ]
        order = ranks(key, ~mask)
        is_random, is_other = (smallest(order, end) for end in ends)
    else:
        draw = jax.random.uniform(key, (size,))
        is_random, is_other = draw < random, draw < random + leave
    role = jnp.where(is_random, RANDOM, jnp.where(is_other, LEAVE, MASK))
    return jnp.where(mask, role, 0).astype(jnp.int8)


def token_spans(length: int, *, prob: float, width: int, masked: float) -> Sampler:
    """Text 1.0: as `spans`, but starts anywhere and spans are cut at the row's end. spec 4.6.

    Width 1 is BERT's mask. `masked`: share of the positions masked in training.
    """
    return _spans(length, prob, width, masked, min_masks=0, to_the_end=True)


def independent(length: int, *, ratio: float) -> Sampler:
    """Text 2.0: exactly int(valid * (1 - ratio)) positions are kept, at random. spec 4.7."""
    require_share("ratio", ratio)
    counts = table(length, lambda valid: valid - int(valid * (1 - ratio)))

    def propose(key, valid):
        number = jnp.asarray(counts, jnp.int32)[valid]
        return choose(key, number, jnp.arange(length) < valid)

    return Sampler(length, propose, counts, exact=True)
