"""SimMIM (arXiv 2111.09886): the encoder sees a learned vector at masked patches, and a linear
layer predicts their pixels (baselines spec 3).

    masking     60 % of the patches, in squares of 32 x 32 pixels: `masking.cells`
    prediction  W h + b, of the P numbers of a patch
    objective   mean of |prediction - x| over P, summed over masked patches; x are the normalised
                pixels as the encoder sees them
"""

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from data2vec_jax.core.errors import UserError
from data2vec_jax.models import pretext
from data2vec_jax.models.layers import wide
from data2vec_jax.objectives import reconstruction
from data2vec_jax.objectives.contract import Objective, ObjectiveConfig

Array = jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(ObjectiveConfig):
    """Config section `objective` with the name 'simmim'. It has no options."""

    predicts: ClassVar[str] = "numbers"

    def check(self, model: Any) -> None:
        """Raises UserError: the model has no vector for masked patches."""
        if not model.mask_embedding_used:
            raise UserError("config.model.mask_embedding: masked patches show it; use True")

    def pretext(self, model: Any) -> pretext.Linear:
        """The linear layer."""
        return pretext.Linear(math.prod(model.patches.patch) * model.channels, model.dtype)


def losses(prediction: Array, patches: Array) -> Array:
    """Mean absolute error of each patch: [B, N, P] and [B, N, P] -> [B, N]."""
    return jnp.mean(jnp.abs(wide(prediction) - wide(patches)), -1)


def make_loss(config: Config, model: Any, sampler: Any, corrupt: Any) -> Objective:
    """See `reconstruction.objective`."""
    del config
    return reconstruction.objective(model, sampler, corrupt, losses)
