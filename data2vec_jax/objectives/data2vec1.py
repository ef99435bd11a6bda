"""data2vec 1.0 (arXiv 2202.03555): a student that sees a masked input regresses what the teacher,
its own moving average, makes of the whole input.

    masking     m ~ `masking`; the modality says what a masked position shows
    teacher     after each update, teacher <- tau teacher + (1 - tau) student: `state.ema_update`,
                tau by `state.ema_decay`
    targets     y = 1/K sum_l norm(a_l), over the teacher's top K layers: `targets.make_teacher`
    objective   smooth L1 or L2 of prediction - y, where masked: `targets.regression`

B batch, T tokens, N masked positions of a row, D width.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from data2vec_jax import masking
from data2vec_jax.core.config import NonNegativeFloat
from data2vec_jax.core.train_step import StepKeys
from data2vec_jax.models.encoder import Source
from data2vec_jax.models.layers import gather_tokens, split
from data2vec_jax.objectives.contract import Intermediates, Objective, ObjectiveConfig
from data2vec_jax.objectives.targets import (
    Norm,
    Scale,
    TopK,
    batch_statistics,
    check_top_k,
    make_teacher,
    monitor,
    regression,
    scale_of,
    variance_penalty,
)

Array = jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(ObjectiveConfig):
    """Config section `objective` with the name 'data2vec1'."""

    needs_teacher: ClassVar[bool] = True

    top_k: TopK  # K uppermost blocks averaged, or the numbers of the blocks
    # What is averaged: a block's output, or a part of it, see `models.encoder.Block`.
    target: Source = "ffn"
    layer_norms: Sequence[Norm] = ()  # of each block's output
    final_norms: Sequence[Norm] = ()  # of the average
    beta: NonNegativeFloat = 0.0  # of smooth L1; 0 for squared error
    scale: Scale = "rsqrt_width"  # factor on the sum over channels, see `targets.scale_of`
    variance_weight: NonNegativeFloat = 0.0  # of `targets.variance_penalty`
    variance_margin: NonNegativeFloat = 0.5  # of `targets.variance_penalty`

    def check(self, model: Any) -> None:
        """Raises UserError: the model has no such blocks."""
        check_top_k(self.top_k, model.encoder.depth)

    def batch_statistics(self) -> str:
        """Target norms over the batch, and the penalty of the variance."""
        return batch_statistics((*self.layer_norms, *self.final_norms), self.variance_weight)


def make_loss(config: Config, model: Any, sampler: Any, corrupt: Any) -> Objective:
    """The objective of a batch; arguments as of `contract`."""
    apply = model.apply
    factor = scale_of(config.scale, model.width)
    teach = make_teacher(model, config.top_k, config.target, config.layer_norms, config.final_norms)

    def forward_with_masks(
        params: Any,
        teacher: Any,
        batch: Mapping[str, Array],
        visible: Mapping[str, Array],
        mask: Array,
        max_masked: int,
        key: Array | None,
        collect: bool = False,
    ) -> Intermediates:
        """Everything after the masks. mask bool [B, T], at most N = `max_masked` True in a row.

        batch, visible: what the teacher and the student see. collect: keep every layer's output.
        """
        positions = masking.positions(mask, max_masked)  # [B, N]
        weights = masking.weights(mask, max_masked)  # [B, N]

        # Student: the masked input at full length, then a prediction at each masked position.
        front_key, encoder_key = split(key, 2)
        student = {"params": params}
        tokens = apply(student, visible, front_key, method="features")
        encoded = apply(student, tokens, mask, encoder_key, collect=collect, method="encode")
        prediction = apply(
            student, gather_tokens(encoded.x, positions), method="predict"
        )  # [B, N, D]

        # Teacher: the targets y, from the whole input, at each masked position.
        unmasked = tokens if corrupt is None else None
        teacher_encoded, targets = teach(params, teacher, batch, unmasked, collect)
        masked_targets = gather_tokens(targets, positions)  # [B, N, D]

        # Objective: summed over the masked positions; their number divides it in the train step.
        count = jnp.sum(weights)
        parts = {
            "regression": factor
            * jnp.sum(regression(prediction, masked_targets, config.beta) * weights)
        }
        total = parts["regression"]
        if config.variance_weight:
            parts["variance"] = variance_penalty(prediction, weights, config.variance_margin)
            total = total + count * config.variance_weight * parts["variance"]
        return Intermediates(
            total,
            count,
            tokens,
            prediction,
            masked_targets,
            weights,
            targets,
            encoded,
            teacher_encoded,
            parts,
            mask,
            visible,
        )

    def forward(params, teacher, batch, draw: StepKeys):
        masks = sampler(batch)  # an exact count per row: every shape is static
        valid = model.valid_lengths(batch)
        mask = masking.sample(masks, draw.mask_key, draw.step, batch["example_id"], 1, valid)[:, 0]
        visible = whole = batch
        if corrupt is not None:
            visible, whole, mask = corrupt(model, batch, mask, draw)
        max_masked = masks.count(masks.length)
        return forward_with_masks(params, teacher, whole, visible, mask, max_masked, draw.noise_key)

    return Objective(forward_with_masks, forward, monitor)
