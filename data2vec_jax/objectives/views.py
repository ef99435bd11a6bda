"""What objectives share that compare views of an image, without masks.

B batch, V views of an example, S of them as large as the model's images, D width.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from data2vec_jax.core.state import overlay
from data2vec_jax.metrics.statistics import effective_rank, mean_std
from data2vec_jax.objectives.contract import Intermediates

Array = jax.Array


class Seen(NamedTuple):
    """Views of a batch, rows of an example adjacent: the front end's output, the encoder's, and
    what the head made of it, [B, V, ...]."""

    tokens: Any
    encoded: Any
    made: Array


def large_views(batch: Mapping[str, Array]) -> Array:
    """[B, S, height, width, C]; of held-out examples, which have one image, that image twice."""
    return jnp.stack([batch["image"], batch.get("twin", batch["image"])], 1)


def see(
    model: Any,
    params: Any,
    images: Array,
    keys: Any = (None, None),
    collect: bool = False,
) -> Seen:
    """One pass of images [B, V, height, width, C], of any size. keys: of the front end's noise and
    of the encoder's; None for none. collect: keep every layer's output."""
    B, V, *size = images.shape
    front_key, encoder_key = keys
    apply, weights = model.apply, {"params": params}
    tokens = apply(weights, {"image": images.reshape(B * V, *size)}, front_key, method="features")
    grid = model.patches.grid(*size[:2])
    options = dict(collect=collect, grid=grid, method="encode")
    encoded = apply(weights, tokens, None, encoder_key, **options)
    made = apply(weights, encoded, None, None, views=V, method="solve")
    return Seen(tokens, encoded, made.reshape(B, V, *made.shape[1:]))


def see_by_teacher(model: Any, params: Any, teacher: Any, images: Array, collect: bool) -> Seen:
    """The same of the teacher, without noise and without gradient."""
    average = jax.lax.stop_gradient(overlay(params, teacher))
    return jax.lax.stop_gradient(see(model, average, images, collect=collect))


def intermediates(student: Seen, teacher: Seen, total: Array, **found: Any) -> Intermediates:
    """What every such objective returns: the loss is a sum over examples. found: `prediction` and
    `masked_targets`, [B, V, ...], and more."""
    rows = found["prediction"].shape[:2]
    return Intermediates(
        total=total,
        count=jnp.float32(rows[0]),
        tokens=student.tokens,
        targets=None,
        weights=jnp.ones(rows),
        student=student.encoded,
        teacher=teacher.encoded,
        **found,
    )


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
    model: Any,
    shapes: Mapping[str, Any],
    forward: Callable[..., Mapping[str, float]],
) -> dict[str, float]:
    """As of `ObjectiveConfig.forward_flops`: the student sees all views, the teacher the large
    ones, both with the head."""

    def one(model):
        return forward(model, 0, model.grid[0] * model.grid[1])

    large, small = one(model), 0.0
    if "local" in shapes:
        views, *size = shapes["local"].shape[:3]
        parts = one(model.clone(image=tuple(size)))
        small = views * (parts["frontend"] + parts["student"])
    student = 2 * large["student"]
    return {"frontend": 2 * large["frontend"], "encoder": student, "student": student + small}
