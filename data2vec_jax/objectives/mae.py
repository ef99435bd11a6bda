"""Masked autoencoders (MAE, arXiv 2111.06377): an encoder that sees a quarter of the patches, and a
small decoder that predicts the pixels of the others (baselines spec 2).

    masking     75 % of the patches, at random; the encoder does not see them
    decoder     `models.pretext.PatchDecoder`
    targets     t = (x - mean) / sqrt(var + 1e-6), over the P numbers of a patch; var is unbiased,
                so that the loss of a prediction of 0 is (P - 1) / P
    objective   mean of (prediction - t)^2 over P, summed over masked patches
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from data2vec_jax.core.config import check_section
from data2vec_jax.models import pretext
from data2vec_jax.models.layers import wide
from data2vec_jax.objectives import reconstruction
from data2vec_jax.objectives.contract import FewPatchesConfig, Objective

Array = jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(FewPatchesConfig):
    """Config section `objective` with the name 'mae'."""

    decoder: Mapping = dataclasses.field(default_factory=dict)  # of `pretext.PatchDecoder`
    normalise: bool = True  # pixels within each patch

    def pretext(self, model: Any) -> pretext.PatchDecoder:
        """The decoder of a model of patches."""
        given = dict(
            out=math.prod(model.patches.patch) * model.channels, grid=model.grid, dtype=model.dtype
        )
        check_section("objective.decoder", self.decoder, pretext.PatchDecoder, given)
        return pretext.PatchDecoder(**self.decoder, **given)


def normalised(patches: Array) -> Array:
    """[..., P] with mean 0 and unbiased variance 1 in each patch, eps 1e-6."""
    mean = jnp.mean(patches, -1, keepdims=True)
    variance = jnp.var(patches, -1, keepdims=True, ddof=1)
    return (patches - mean) * jax.lax.rsqrt(variance + 1e-6)


def make_loss(config: Config, model: Any, sampler: Any, corrupt: Any) -> Objective:
    """See `reconstruction.objective`."""

    def losses(prediction, patches):
        target = wide(patches)
        target = normalised(target) if config.normalise else target
        return jnp.mean(jnp.square(wide(prediction) - target), -1)

    return reconstruction.objective(model, sampler, corrupt, losses)
