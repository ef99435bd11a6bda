"""data2vec 2.0 (arXiv 2212.07525): students that see little of an input regress what the teacher,
their moving average, makes of all of it. One teacher's pass serves the M students of an example.

    multi-mask training     M masks an example, the encoder sees visible tokens only
    inverse block masking   `masking.inverse_blocks`
    teacher, targets        as in 1.0: `state.ema_update`, `targets.make_teacher`
    decoder                 noise where nothing was seen, then convolutions: `models.decoder`
    objective               L2 of prediction - y where masked (`targets.regression`), and for images
                            L2 of the class token - mean y: the end of `forward_with_masks`

B batch, M masks of an example, T tokens, V of them visible and N masked, D width.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar

import jax
import jax.numpy as jnp

from data2vec_jax import masking
from data2vec_jax.core.config import NonNegativeFloat, Range
from data2vec_jax.core.errors import UserError
from data2vec_jax.core.train_step import StepKeys
from data2vec_jax.models.encoder import Source
from data2vec_jax.models.layers import gather_tokens, repeat, split
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
)

Array = jax.Array


def draw_noise(draw: StepKeys, example_ids: Array, shape: tuple[int, ...]) -> Array:
    """N(0, 1) of `shape` = [M, T, D] for each of `example_ids` [B] -> [B * M, T, D].

    Like its masks, a function of the step and the example alone: the same on any number of devices
    and in any micro-batch.
    """
    step = jax.random.fold_in(draw.mask_key, draw.step)

    def one(example):
        # The clones' masks fold in 0 ... M - 1 here.
        key = jax.random.fold_in(jax.random.fold_in(step, example), 1 << 16)
        return jax.random.normal(key, shape)

    return jax.vmap(one)(example_ids).reshape(-1, *shape[1:])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(ObjectiveConfig):
    """Config section `objective` with the name 'data2vec2'."""

    needs_teacher: ClassVar[bool] = True
    needs_decoder: ClassVar[bool] = True

    clones: Annotated[int, Range(1, 1024)]  # M, masks of an example
    top_k: TopK  # K uppermost blocks averaged, or the blocks' numbers, from 0
    # What is averaged: a block's output, or a part of it, see `models.encoder.Block`.
    target: Source = "ffn"
    layer_norms: Sequence[Norm] = ()  # of each block's output
    final_norms: Sequence[Norm] = ()  # of the average
    beta: NonNegativeFloat = 0.0  # of smooth L1; 0 for squared error
    scale: Scale = "rsqrt_width"  # factor on the sum over channels, see `targets.scale_of`
    # Weight of the class token's loss (a mean over rows; the regression is a mean over masked
    # positions).
    class_weight: NonNegativeFloat = 0.0
    noise_std: NonNegativeFloat = 0.01  # of what the decoder gets at masked positions

    def check(self, model: Any) -> None:
        """Raises UserError: the model has no such blocks, or no class token."""
        if self.class_weight and not getattr(model, "class_tokens", 0):
            raise UserError("config.objective.class_weight: this model has no class token")
        check_top_k(self.top_k, model.encoder.depth)

    def batch_statistics(self) -> str:
        """Target norms over the batch."""
        return batch_statistics((*self.layer_norms, *self.final_norms))


def make_loss(config: Config, model: Any, sampler: Any, corrupt: Any) -> Objective:
    """The objective of a batch; arguments as of `contract`. The model has a `decoder`. corrupt: not
    used, masked tokens are left out of the input rather than replaced."""
    del corrupt
    apply = model.apply
    factor = scale_of(config.scale, model.width)
    teach = make_teacher(model, config.top_k, config.target, config.layer_norms, config.final_norms)

    def forward_with_masks(
        params: Any,
        teacher: Any,
        batch: Mapping[str, Array],
        mask: Array,
        max_masked: int,
        noise: Array,
        key: Array | None,
        collect: bool = False,
    ) -> Intermediates:
        """Everything after the draws. mask bool [B, M, T], at most N = `max_masked` True in a row.

        noise: [B * M, T, D], used at masked positions. collect: keep the outputs of every layer.
        """
        mask = mask.reshape(-1, mask.shape[-1])  # [B * M, T], the students of an example adjacent
        rows, length = mask.shape
        keep = masking.kept(mask, length - max_masked)  # [B * M, V]
        positions = masking.positions(mask, max_masked)  # [B * M, N]
        weights = masking.weights(mask, max_masked)  # [B * M, N]
        front_key, encoder_key, decoder_key = split(key, 3)

        # Students: the front end once per example, the blocks on visible tokens only.
        student = {"params": params}
        tokens = apply(student, batch, front_key, method="features")
        encoded = apply(
            student, tokens, mask, encoder_key, collect=collect, keep=keep, method="encode"
        )

        # Decoder: noise where nothing was seen, convolutions over everything, a prediction there.
        valid = repeat(tokens.valid, rows)
        decoded = apply(student, encoded.x, mask, noise, valid, decoder_key, method="decode")
        prediction = apply(
            student, gather_tokens(decoded, positions), method="predict"
        )  # [B * M, N, D]

        # Teacher: the targets y, from the whole input, once per example.
        teacher_encoded, targets = teach(params, teacher, batch, tokens, collect)  # [B, T, D]
        masked_targets = gather_tokens(targets, positions)  # [B * M, N, D]

        # Objective: summed over the masked positions of all students; see 1.0.
        parts = {
            "regression": factor
            * jnp.sum(regression(prediction, masked_targets, config.beta) * weights)
        }
        if config.class_weight:
            # The class token regresses the mean target. Weighted by the row's masked positions,
            # because the sum of all terms will be divided by their number in the whole batch.
            mean_target = repeat(jnp.mean(targets, 1), rows)  # [B * M, D]
            class_token = encoded.class_tokens[:, -1]
            row_loss = factor * regression(class_token, mean_target, config.beta)  # [B * M]
            parts["class"] = config.class_weight * jnp.sum(row_loss * jnp.sum(weights, -1))
        count = jnp.sum(weights)
        terms = {f"loss_{k}": part / count for k, part in parts.items()}
        return Intermediates(
            total=sum(parts.values()),
            count=count,
            tokens=tokens,
            prediction=prediction,
            targets=targets,
            masked_targets=masked_targets,
            weights=weights,
            student=encoded,
            teacher=teacher_encoded,
            parts=parts,
            mask=mask,
            visible=batch,
            metrics=terms if config.class_weight else {},
        )

    def forward(params, teacher, batch, draw: StepKeys):
        masks = sampler(batch)  # an exact count per row: every shape is static
        valid = model.valid_lengths(batch)
        mask = masking.sample(
            masks, draw.mask_key, draw.step, batch["example_id"], config.clones, valid
        )
        shape = config.clones, masks.length, model.width
        noise = config.noise_std * draw_noise(draw, batch["example_id"], shape)
        max_masked = masks.count(masks.length)
        return forward_with_masks(params, teacher, batch, mask, max_masked, noise, draw.noise_key)

    return Objective(forward_with_masks, forward, monitor)
