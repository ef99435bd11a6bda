"""Masked language modelling, as BERT (arXiv 1810.04805) and RoBERTa (arXiv 1907.11692) do it: from
a text in which tokens are hidden, predict these tokens (baselines spec 1).

    masking     15 % of the tokens are chosen; of these 80 % show `<mask>`, 10 % a random token and
                10 % themselves: `mask`, and `model.keep_prob`, `model.replace_prob`
    logits      z = LN(gelu(W h + c)) E^T + b; E is the table of token embeddings
    objective   logsumexp(z) - z_y, summed over all chosen tokens, whatever they show
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from data2vec_jax.models import pretext
from data2vec_jax.models.layers import wide
from data2vec_jax.objectives import reconstruction
from data2vec_jax.objectives.contract import Objective, ObjectiveConfig

Array = jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(ObjectiveConfig):
    """Config section `objective` with the name 'mlm'. It has no options."""

    predicts: ClassVar[str] = "ids"

    def pretext(self, model: Any) -> pretext.TokenLogits:
        """The head; its output layer is the model's table."""
        return pretext.TokenLogits(model.embeddings.vocab_size)


def losses(logits: Array, ids: Array) -> Array:
    """-log p of each token: logits [B, N, V], ids int [B, N] -> [B, N]."""
    logits = wide(logits)
    chosen = jnp.take_along_axis(logits, ids[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, -1) - chosen


def scalars(logits: Array, ids: Array, weights: Array) -> dict[str, Array]:
    """`accuracy`: how many chosen tokens (weights 0/1 [B, N]) have the highest logit."""
    right = jnp.argmax(logits, -1) == ids
    return {"accuracy": jnp.sum(right * weights)}


def make_loss(config: Config, model: Any, sampler: Any, corrupt: Any) -> Objective:
    """See `reconstruction.objective`."""
    del config
    return reconstruction.objective(model, sampler, corrupt, losses, scalars)
