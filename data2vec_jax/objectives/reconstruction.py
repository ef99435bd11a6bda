"""What objectives share that predict the input itself, or labels, at masked positions, without a
teacher.

B batch, T tokens, N masked positions of a row, D width.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from data2vec_jax import masking
from data2vec_jax.core.train_step import StepKeys
from data2vec_jax.models.base import Local
from data2vec_jax.models.encoder import Encoded
from data2vec_jax.models.layers import gather_tokens, split, wide
from data2vec_jax.objectives.contract import Intermediates, Objective, monitor

Array = jax.Array


class Seen(NamedTuple):
    """A masked batch, and what the student makes of it: masked positions int [B, N] and 0/1 weights
    [B, N] of them, 0 where a row has fewer; the front end's output; the encoder's."""

    places: Array
    weights: Array
    local: Local
    encoded: Encoded


def see(
    model: Any,
    params: Any,
    visible: Mapping[str, Array],
    mask: Array,
    max_masked: int,
    key: Array | None,
) -> Seen:
    """The student's pass; arguments as of data2vec 1.0's `forward_with_masks`."""
    places = masking.positions(mask, max_masked)  # [B, N]
    weights = masking.weights(mask, max_masked)
    keep = None if model.sees_masked else masking.kept(mask, mask.shape[-1] - max_masked)
    shown = mask if model.sees_masked else None
    front_key, encoder_key = split(key, 2)
    student = {"params": params}
    local = model.apply(student, visible, front_key, method="local")
    encoded = model.apply(student, local.tokens, shown, encoder_key, keep=keep, method="encode")
    return Seen(places, weights, local, encoded)


def draw_masks(model: Any, sampler: Any, corrupt: Any, batch: Any, draw: StepKeys) -> Any:
    """(what the student sees, masks bool [B, T], their largest number of positions N)."""
    masks = sampler(batch)  # an exact count per row: every shape is static
    valid = model.valid_lengths(batch)
    mask = masking.sample(masks, draw.mask_key, draw.step, batch["example_id"], 1, valid)[:, 0]
    visible = batch if corrupt is None else corrupt(model, batch, mask, draw)[0]
    return visible, mask, masks.count(masks.length)


def penalty(local: Local) -> Array | float:
    """Mean square of what the front end learned, before its norm; 0 if it learns nothing."""
    return 0.0 if local.raw is None else jnp.mean(jnp.square(wide(local.raw)))


def objective(
    model: Any,
    sampler: Any,
    corrupt: Any,
    losses: Callable[[Array, Array], Array],
    scalars: Callable[[Array, Array, Array], Mapping[str, Array]] = lambda *_: {},
    contents: Callable[[Mapping[str, Array]], Array] | None = None,
    penalty_weight: float = 0.0,
) -> Objective:
    """The objective that sums `losses` over masked positions; their number is the count.

    model: with a `pretext`, which says whether the student sees masked positions. sampler, corrupt:
    as of `contract`; the loss is at all chosen positions, whatever they show. losses: (prediction
    [B, N, ...], contents [B, N, ...]) -> [B, N]. scalars: (the same, weights [B, N]) -> sums over
    masked positions, whose means are logged. contents: of a batch, [B, T, ...]; the model's by
    default. penalty_weight: of `penalty`.
    """
    contents = contents or model.contents

    def forward_with_masks(
        params: Any,
        teacher: Any,
        batch: Mapping[str, Array],
        visible: Mapping[str, Array],
        mask: Array,
        max_masked: int,
        key: Array | None,
    ) -> Intermediates:
        """Everything after the masks: arguments as of data2vec 1.0's. teacher: not used."""
        del teacher
        places, weights, local, encoded = see(model, params, visible, mask, max_masked, key)
        prediction = model.apply(
            {"params": params}, encoded, mask, places, method="solve"
        )  # [B, N, ...]
        wanted = gather_tokens(contents(batch), places)
        count = jnp.sum(weights)
        parts = {"reconstruction": jnp.sum(losses(prediction, wanted) * weights)}
        if penalty_weight:
            parts["penalty"] = count * penalty_weight * penalty(local)
        return Intermediates(
            total=sum(parts.values()),
            count=count,
            tokens=local.tokens,
            prediction=prediction,
            masked_targets=wanted,
            weights=weights,
            student=encoded,
            parts=parts,
            mask=mask,
            visible=visible,
            metrics={k: x / count for k, x in scalars(prediction, wanted, weights).items()},
        )

    def forward(params, teacher, batch, draw: StepKeys):
        masked = draw_masks(model, sampler, corrupt, batch, draw)
        return forward_with_masks(params, teacher, batch, *masked, draw.noise_key)

    return Objective(forward_with_masks, forward, monitor)
