"""SpecAugment on the front end's output: masked spans of frames and of channels (spec 1.3)."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from data2vec_jax import masking
from data2vec_jax.core.config import Share, Span
from data2vec_jax.core.train_step import StepKeys
from data2vec_jax.modalities.contract import Tokens

Array = jax.Array
NOISE = 0.01  # standard deviation of what stands for masked frames in 2.0 encoders


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpecAugmentConfig:
    """Masks of frames, and of channels; a probability of 0 masks nothing."""

    time_prob: Share = 0.65  # share of the frames, overlaps counted twice
    time_width: Span = 10  # frames of a span
    channel_prob: Share = 0.25  # share of the channels, overlaps counted twice
    channel_width: Span = 64  # channels of a span
    zero_mask: bool = False  # without a mask embedding (2.0): masked frames are 0, not noise


@functools.cache
def spans(length: int, prob: float, width: int, min_masks: int) -> masking.Sampler:
    """Spans as they are drawn, without an exact count: no shape depends on it here.

    The authors cut all rows to the smallest count of their batch; ours do not depend on it.
    """
    sampler = masking.spans(length, prob=prob, width=width, min_masks=min_masks, masked=0.5)
    return dataclasses.replace(sampler, exact=True)


def augment(
    tokens: Tokens,
    embedding: Array | None,
    key: Array,
    draw: StepKeys,
    example_id: Array,
    config: SpecAugmentConfig,
) -> Tokens:
    """Spans of frames become `embedding` [D], spans of channels 0 (conversion spec 1.3).

    Without an embedding (2.0) masked frames are noise from `key`, or 0 with `zero_mask`. A
    probability of 0 masks nothing. Masks are functions of (draw.mask_key, draw.step, example
    id); a row has at least one span of frames.
    """
    x, valid = tokens
    _, frames, width = x.shape
    time_key, channel_key = jax.random.split(draw.mask_key)
    if config.time_prob:
        lengths = None if valid is None else jnp.sum(valid, -1, dtype=jnp.int32)
        sampler = spans(frames, config.time_prob, config.time_width, 1)
        mask = masking.sample(sampler, time_key, draw.step, example_id, 1, lengths)[:, 0]
        if embedding is not None:
            fill = embedding.astype(x.dtype)
        elif config.zero_mask:
            fill = jnp.zeros((), x.dtype)
        else:
            fill = (NOISE * jax.random.normal(key, x.shape)).astype(x.dtype)
        x = jnp.where(mask[..., None], fill, x)
    if config.channel_prob:
        sampler = spans(width, config.channel_prob, config.channel_width, 0)
        mask = masking.sample(sampler, channel_key, draw.step, example_id, 1)[:, 0]
        x = jnp.where(mask[:, None], 0, x)
    return Tokens(x, valid)
