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

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from data2vec_jax import masking
from data2vec_jax.core.train_step import StepKeys
from data2vec_jax.models.layers import gather_tokens, repeat, split
from data2vec_jax.objectives.targets import (
    Intermediates,
    Norm,
    Objective,
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
    step = jax.random.fold_in(draw.masks, draw.step)

    def one(example):
        # The clones' masks fold in 0 ... M - 1 here.
        key = jax.random.fold_in(jax.random.fold_in(step, example), 1 << 16)
        return jax.random.normal(key, shape)

    return jax.vmap(one)(example_ids).reshape(-1, *shape[1:])


def make_loss(
    model: Any,
    sampler: Callable[[Mapping[str, Any]], masking.Sampler],
    corrupt: Callable[..., Any] | None = None,
    *,
    clones: int,
    top_k: int | Sequence[int],
    target: str = "ffn",
    layer_norms: Sequence[Norm] = (),
    final_norms: Sequence[Norm] = (),
    beta: float = 0.0,
    scale: str | float = "rsqrt_width",
    class_weight: float = 0.0,
    noise_std: float = 0.01,
) -> Objective:
    """The objective of a batch. Config section `objective`.

    model, sampler, top_k, target, layer_norms, final_norms, beta, scale: as in
    `data2vec1.make_loss`; the model has a `decoder`. corrupt: not used, masked tokens are left out
    of the input rather than replaced. clones: M. class_weight: of the class token's loss, a mean
    over rows, beside the regression, a mean over masked positions. noise_std: of what the decoder
    gets at masked positions.
    """
    del corrupt
    apply = model.apply
    factor = scale_of(scale, model.width)
    teach = make_teacher(model, top_k, target, layer_norms, final_norms)

    def forward_with_masks(
        params: Any, teacher: Any, batch: Mapping[str, Array], mask: Array, most: int, noise: Array,
        key: Array | None, collect: bool = False,
    ) -> Intermediates:  # fmt: skip
        """Everything after the draws. mask bool [B, M, T], at most `most` = N True in a row.

        noise: [B * M, T, D], used at masked positions. collect: keep the outputs of every layer.
        """
        mask = mask.reshape(-1, mask.shape[-1])  # [B * M, T], the students of an example adjacent
        rows, length = mask.shape
        keep = masking.kept(mask, length - most)  # [B * M, V]
        positions = masking.positions(mask, most)  # [B * M, N]
        # 1 at these positions, 0 where a row has fewer.
        weights = (jnp.arange(most) < jnp.sum(mask, -1, keepdims=True)).astype(jnp.float32)
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
        teaching, targets = teach(params, teacher, batch, tokens, collect)  # [B, T, D]
        masked_targets = gather_tokens(targets, positions)  # [B * M, N, D]

        # Objective: summed over the masked positions of all students; see 1.0.
        parts = {
            "regression": factor * jnp.sum(regression(prediction, masked_targets, beta) * weights)
        }
        if class_weight:
            # The class token regresses the mean target. Weighted by the row's masked positions,
            # because the sum of all terms will be divided by their number in the whole batch.
            middle = repeat(jnp.mean(targets, 1), rows)  # [B * M, D]
            each = factor * regression(encoded.class_tokens[:, -1], middle, beta)  # [B * M]
            parts["class"] = class_weight * jnp.sum(each * jnp.sum(weights, -1))
        total = sum(parts.values())
        return Intermediates(
            total, jnp.sum(weights), tokens, prediction, targets, masked_targets, weights, encoded,
            teaching, parts, mask, batch,
        )  # fmt: skip

    def forward(params, teacher, batch, draw: StepKeys):
        masks = sampler(batch)  # an exact count per row: every shape is static
        valid = model.valid_lengths(batch)
        mask = masking.sample(masks, draw.masks, draw.step, batch["example_id"], clones, valid)
        shape = clones, masks.length, model.width
        noise = noise_std * draw_noise(draw, batch["example_id"], shape)
        most = masks.count(masks.length)
        return forward_with_masks(params, teacher, batch, mask, most, noise, draw.noise)

    def loss(params, teacher, batch, draw: StepKeys):
        found = forward(params, teacher, batch, draw)
        scalars = monitor(found)
        if class_weight:
            scalars |= {f"loss_{k}": part / found.count for k, part in found.parts.items()}
        return found.total, found.count, scalars

    return Objective(loss, forward_with_masks, forward)
