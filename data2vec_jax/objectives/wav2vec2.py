"""wav2vec 2.0 (arXiv 2006.11477): tell what was said in a masked frame from what was said in other
masked frames of the same row (baselines spec 4).

    masking     spans of frames; the encoder sees a learned vector there
    targets     q: what the front end makes of masked frames, quantised: `models.pretext.Quantiser`
    logits      z_0 = cos(c, q) / kappa, and z_k = cos(c, q_k) / kappa of K negatives: other masked
                frames of the row, at random; one with the same codes is left out
    objective   logsumexp(z) - z_0, summed over masked frames, and for each of them
                diversity_weight (G V - sum_g exp H_g) / (G V) + penalty_weight mean(f^2);
                H_g is the entropy of the mean softmax of the logits of group g, and f the front
                end's output before its norm

The last two are of the whole batch, over all devices; in fairseq of the rows of one device.
B batch, N masked frames of a row, K negatives, G groups of V code words.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Annotated, Any

import jax
import jax.numpy as jnp

from data2vec_jax.core.config import NonNegativeFloat, PositiveFloat, Range, check_section
from data2vec_jax.core.errors import UserError
from data2vec_jax.core.train_step import StepKeys
from data2vec_jax.models import pretext
from data2vec_jax.models.layers import split, unit_length
from data2vec_jax.objectives import reconstruction
from data2vec_jax.objectives.contract import Intermediates, Objective, ObjectiveConfig, monitor

Array = jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(ObjectiveConfig):
    """Config section `objective` with the name 'wav2vec2'."""

    quantiser: Mapping = dataclasses.field(default_factory=dict)  # of `pretext.Quantiser`
    negatives: Annotated[int, Range(1, 10_000)] = 100  # K of each masked frame
    kappa: PositiveFloat = 0.1  # temperature of the cosines
    # Of the quantiser's softmax: max(start * factor^n, end) after n updates.
    temperature_start: PositiveFloat = 2.0
    temperature_end: PositiveFloat = 0.5
    temperature_factor: Annotated[float, Range(above=0, most=1)] = 0.999995
    diversity_weight: NonNegativeFloat = 0.1
    penalty_weight: NonNegativeFloat = 10.0

    def check(self, model: Any) -> None:
        """Raises UserError: the model has no front end whose features could be quantised."""
        if not hasattr(model, "frontend"):
            raise UserError("config.objective.name: wav2vec2 quantises frames of a waveform")

    def batch_statistics(self) -> str:
        """How often code words are used."""
        return "shares of code words (diversity_weight)" if self.diversity_weight else ""

    def pretext(self, model: Any) -> pretext.Quantiser:
        """The quantiser of the front end's features."""
        given = dict(channels=model.frontend.channels, dtype=model.dtype)
        check_section("objective.quantiser", self.quantiser, pretext.Quantiser, given)
        return pretext.Quantiser(**self.quantiser, **given)

    def temperature(self, step: Array | int) -> Array:
        """Of the quantiser's softmax, after `step` updates."""
        factor = jnp.exp(math.log(self.temperature_factor) * jnp.asarray(step, jnp.float32))
        return jnp.maximum(self.temperature_start * factor, self.temperature_end)


def draw_negatives(key: Array, weights: Array, number: int) -> Array:
    """Which masked frames are negatives of each: weights 0/1 [B, N] -> int [B, N, K].

    Uniform, with replacement, over the others of the row.
    """
    rows, size = weights.shape
    others = jnp.sum(weights, -1).astype(jnp.int32) - 1
    drawn = jax.random.randint(key, (rows, size, number), 0, jnp.maximum(others, 1)[:, None, None])
    own = jnp.arange(size)[None, :, None]
    return jnp.minimum(drawn + (drawn >= own), size - 1)


def contrastive_logits(
    context: Array, target: Array, codes: Array, negatives: Array, kappa: float
) -> Array:
    """context, target [B, N, F], codes int [B, N, G], negatives int [B, N, K] -> [B, N, 1 + K].

    The first is of the frame itself. All pairs of a row are compared, and negatives picked from
    them: N is a few hundred, and K vectors for each frame would be far more than N numbers.
    """
    pairs = jnp.einsum(
        "bnf,bmf->bnm", unit_length(context), unit_length(target), precision="highest"
    )
    same = (codes[:, :, None] == codes[:, None]).all(-1)  # [B, N, N]
    others = jnp.take_along_axis(jnp.where(same, -jnp.inf, pairs), negatives, -1)
    own = jnp.diagonal(pairs, axis1=1, axis2=2)[..., None]
    return jnp.concatenate([own, others], -1) / kappa


def perplexity(probabilities: Array, weights: Array) -> Array:
    """sum_g exp(-sum_v p ln(p + 1e-7)), p the mean over frames: [B, N, G, V], [B, N] -> []."""
    p = jnp.einsum("bngv,bn->gv", probabilities, weights, precision="highest")
    p = p / jnp.sum(weights)
    return jnp.sum(jnp.exp(-jnp.sum(p * jnp.log(p + 1e-7), -1)))


def make_loss(config: Config, model: Any, sampler: Any, corrupt: Any) -> Objective:
    """The objective of a batch; arguments as of `contract`."""

    def forward_with_masks(
        params, teacher, batch, visible, mask, max_masked, key, step=0, negatives=None
    ) -> Intermediates:
        """Everything after the masks: arguments as of data2vec 1.0's. teacher, batch: not used;
        step: completed updates; negatives: int [B, N, K], drawn if None."""
        del teacher, batch
        student_key, noise_key, negatives_key = split(key, 3)
        places, weights, local, encoded = reconstruction.see(
            model, params, visible, mask, max_masked, student_key
        )
        inputs = dict(normed=local.normed, temperature=config.temperature(step), key=noise_key)
        found = model.apply({"params": params}, encoded, mask, places, **inputs, method="solve")
        if negatives is None:
            negatives_key = jax.random.key(0) if key is None else negatives_key
            negatives = draw_negatives(negatives_key, weights, config.negatives)

        logits = contrastive_logits(
            found.context, found.target, found.codes, negatives, config.kappa
        )
        count = jnp.sum(weights)
        in_use = perplexity(jax.nn.softmax(found.logits), weights)
        size = found.logits.shape[-2] * found.logits.shape[-1]
        parts = {
            "contrastive": jnp.sum((jax.nn.logsumexp(logits, -1) - logits[..., 0]) * weights),
            "diversity": count * config.diversity_weight * (size - in_use) / size,
            "penalty": count * config.penalty_weight * reconstruction.penalty(local),
        }
        right = logits[..., 0] > jnp.max(logits[..., 1:], -1)
        best = jax.nn.one_hot(jnp.argmax(found.logits, -1), found.logits.shape[-1])
        scalars = {
            "accuracy": jnp.sum(right * weights) / count,
            "contrastive": parts["contrastive"] / count,
            "code_perplexity": perplexity(best, weights),
            "prob_perplexity": in_use,
            "temperature": inputs["temperature"],
        }
        return Intermediates(
            total=sum(parts.values()),
            count=count,
            tokens=local.tokens,
            prediction=found.context,
            masked_targets=found.target,
            weights=weights,
            student=encoded,
            parts=parts,
            mask=mask,
            visible=visible,
            metrics=jax.lax.stop_gradient(scalars),
        )

    def forward(params, teacher, batch, draw: StepKeys):
        masked = reconstruction.draw_masks(model, sampler, corrupt, batch, draw)
        return forward_with_masks(params, teacher, batch, *masked, draw.noise_key, draw.step)

    return Objective(forward_with_masks, forward, monitor)
