"""What objectives share that predict the input itself, at masked positions, without a teacher.

B batch, T tokens, N masked positions of a row.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from data2vec_jax import masking
from data2vec_jax.core.train_step import StepKeys
from data2vec_jax.models.layers import gather_tokens, split
from data2vec_jax.objectives.contract import Intermediates, Objective, monitor

Array = jax.Array


def objective(
    model: Any,
    sampler: Callable[[Mapping[str, Any]], masking.Sampler],
    corrupt: Callable[..., Any] | None,
    losses: Callable[[Array, Array], Array],
    scalars: Callable[[Intermediates], Mapping[str, Array]] = lambda found: {},
) -> Objective:
    """The objective that sums `losses` over masked positions; their number is the count.

    model: with a `pretext`, which says whether the student sees masked positions. sampler, corrupt:
    as of `data2vec1.make_loss`; the loss is at all chosen positions, whatever they show. losses:
    (prediction [B, N, ...], contents [B, N, ...]) -> [B, N]. scalars: more of them, to be logged.
    """
    apply = model.apply

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
        """Everything after the masks: arguments as of data2vec 1.0's. teacher: not used."""
        del teacher
        places = masking.positions(mask, max_masked)  # [B, N]
        # 1 at these positions, 0 where a row has fewer.
        weights = (jnp.arange(max_masked) < jnp.sum(mask, -1, keepdims=True)).astype(jnp.float32)
        keep = None if model.sees_masked else masking.kept(mask, mask.shape[-1] - max_masked)
        shown = mask if model.sees_masked else None

        front_key, encoder_key = split(key, 2)
        student = {"params": params}
        tokens = apply(student, visible, front_key, method="features")
        encoded = apply(
            student, tokens, shown, encoder_key, collect=collect, keep=keep, method="encode"
        )
        prediction = apply(student, encoded, mask, places, method="solve")  # [B, N, ...]
        wanted = gather_tokens(model.contents(batch), places)
        total = jnp.sum(losses(prediction, wanted) * weights)
        return Intermediates(
            total=total,
            count=jnp.sum(weights),
            tokens=tokens,
            prediction=prediction,
            targets=None,
            masked_targets=wanted,
            weights=weights,
            student=encoded,
            parts={"reconstruction": total},
            mask=mask,
            visible=visible,
        )

    def forward(params, teacher, batch, draw: StepKeys):
        masks = sampler(batch)  # an exact count per row: every shape is static
        valid = model.valid_lengths(batch)
        mask = masking.sample(masks, draw.mask_key, draw.step, batch["example_id"], 1, valid)[:, 0]
        visible = batch if corrupt is None else corrupt(model, batch, mask, draw)[0]
        max_masked = masks.count(masks.length)
        return forward_with_masks(params, teacher, batch, visible, mask, max_masked, draw.noise_key)

    def loss(params, teacher, batch, draw: StepKeys):
        found = forward(params, teacher, batch, draw)
        return found.total, found.count, monitor(found) | dict(scalars(found))

    return Objective(loss, forward_with_masks, forward)
