"""What objectives share that compare views of an example, without masks.

B batch, V views of an example.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from data2vec_jax.core.state import overlay
from data2vec_jax.core.train_step import StepKeys
from data2vec_jax.metrics.statistics import effective_rank, mean_std
from data2vec_jax.models.base import ViewBatch
from data2vec_jax.objectives.contract import Intermediates, Objective

Array = jax.Array


class Seen(NamedTuple):
    """Views of a batch, rows of an example adjacent: the front end's output, the encoder's, and
    what the head made of it, [B, V, ...]."""

    tokens: Any
    encoded: Any
    made: Array


def see(model: Any, params: Any, views: ViewBatch, keys: Any = (None, None)) -> Seen:
    """One pass. keys: of the front end's noise and of the encoder's; None for none."""
    front_key, encoder_key = keys
    apply, weights = model.apply, {"params": params}
    tokens = apply(weights, views.batch, front_key, method="features")
    encoded = apply(weights, tokens, None, encoder_key, method="encode", **views.options)
    made = apply(weights, encoded, None, None, views=views.count, method="solve")
    return Seen(tokens, encoded, made.reshape(-1, views.count, *made.shape[1:]))


def see_by_teacher(model: Any, params: Any, teacher: Any, views: ViewBatch) -> Seen:
    """The same of the teacher, without noise and without gradient."""
    average = jax.lax.stop_gradient(overlay(params, teacher))
    return jax.lax.stop_gradient(see(model, average, views))


def intermediates(student: Seen, teacher: Seen, total: Array, **found: Any) -> Intermediates:
    """What every such objective returns: the loss is a sum over examples. found: `prediction` and
    `masked_targets`, [B, V, ...], and more."""
    rows = found["prediction"].shape[:2]
    return Intermediates(
        total=total,
        count=jnp.float32(rows[0]),
        tokens=student.tokens,
        weights=jnp.ones(rows),
        student=student.encoded,
        teacher=teacher.encoded,
        **found,
    )


def objective(forward_with_views: Callable[..., Intermediates]) -> Objective:
    """The objective of a function of (params, teacher, batch, completed updates, noise key)."""

    def forward(params, teacher, batch, draw: StepKeys):
        return forward_with_views(params, teacher, batch, draw.step, draw.noise_key)

    return Objective(forward_with_views, forward, monitor)


def monitor(found: Intermediates) -> dict[str, Array]:
    """Scalars that tell learning from collapse; see `metrics.collapse`."""
    scalars = {
        "pred_std": mean_std(found.prediction),
        "target_std": mean_std(found.masked_targets),
        "feature_std": mean_std(found.tokens.x),
        "feature_rank": effective_rank(found.tokens.x),
    }
    return jax.lax.stop_gradient(scalars)


def flops_of_views(
    model: Any, shapes: Mapping[str, Any], forward: Callable[..., Mapping[str, float]]
) -> dict[str, float]:
    """As of `ObjectiveConfig.forward_flops`: the student sees all views, the teacher the large
    ones, both with the head."""
    (large, of_large), *small = [
        (count, forward(m, 0, math.prod(m.grid))) for count, m in model.view_models(shapes)
    ]
    student = large * of_large["student"]
    return {
        "frontend": large * of_large["frontend"],
        "encoder": student,
        "student": student + sum(n * (of["frontend"] + of["student"]) for n, of in small),
    }
