"""BYOL (arXiv 2006.07733): of one view of an image, predict what the teacher, the student's moving
average, makes of another one (baselines spec 6).

    views       two
    head        `models.pretext.ProjectorPredictor`: z = projector(encoder), p = predictor(z)
    objective   |u(p1) - u(z2)|^2 + |u(p2) - u(z1)|^2, u(x) = x / |x|, p of the student, z of the
                teacher, summed over images

The teacher starts as a copy of the student; the authors' starts from a draw of its own.
B batch, P numbers of a projection.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from data2vec_jax.core.config import Size
from data2vec_jax.core.train_step import StepKeys
from data2vec_jax.models import pretext
from data2vec_jax.models.layers import split, wide
from data2vec_jax.objectives import views
from data2vec_jax.objectives.contract import Intermediates, Objective, ObjectiveConfig

Array = jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(ObjectiveConfig):
    """Config section `objective` with the name 'byol'."""

    hidden: Size = 4_096  # of projector and predictor
    size: Size = 256  # P

    needs_teacher: ClassVar[bool] = True
    masks: ClassVar[str] = ""
    needs_views: ClassVar[str] = "large"

    def batch_statistics(self) -> str:
        """See `ObjectiveConfig`."""
        return "batch norms of the projector and the predictor"

    def pretext(self, model: Any) -> pretext.ProjectorPredictor:
        """Projector and predictor."""
        return pretext.ProjectorPredictor(hidden=self.hidden, size=self.size, dtype=model.dtype)

    def forward_flops(self, model, shapes, sample, forward) -> Mapping[str, float]:
        """See `views.flops_of_views`; the teacher's predictor is of no use, and left out."""
        parts = views.flops_of_views(model, shapes, forward)
        predictor = 2 * 2.0 * self.hidden * 2 * self.size
        return {**parts, "encoder": parts["encoder"] - predictor}


def unit(x: Array) -> Array:
    """[..., P] divided by its length, of which the square is at least 1e-12."""
    x = wide(x)
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(x), -1, keepdims=True), 1e-12))


def losses(predictions: Array, projections: Array) -> Array:
    """[B, 2, P], of the student, and [B, 2, P], of the teacher -> [B]."""
    return jnp.sum(jnp.square(unit(predictions) - unit(projections[:, ::-1])), (1, 2))


def make_loss(
    config: Config,
    model: Any,
    sampler: Callable[..., None] | None = None,
    corrupt: Callable[..., Any] | None = None,
) -> Objective:
    """The objective of a batch. model: with a `pretext`. sampler, corrupt: not used."""
    del sampler, corrupt
    scale = math.sqrt(config.size)

    def forward_with_views(
        params: Any,
        teacher: Any,
        batch: Mapping[str, Array],
        key: Array | None,
        collect: bool = False,
    ) -> Intermediates:
        """Everything but the draw."""
        large = model.views(batch)[0]
        student = views.see(model, params, large, split(key, 2), collect)
        average = views.see_by_teacher(model, params, teacher, large, collect)
        prediction, projection = student.made[:, :, 1], average.made[:, :, 0]
        total = jnp.sum(losses(prediction, projection))
        return views.intermediates(
            student,
            average,
            total,
            # A deviation of 1 is that of directions without any preference.
            prediction=scale * unit(prediction),
            masked_targets=scale * unit(projection),
            parts={"byol": total},
        )

    def forward(params, teacher, batch, draw: StepKeys):
        return forward_with_views(params, teacher, batch, draw.noise_key)

    def loss(params, teacher, batch, draw: StepKeys):
        found = forward(params, teacher, batch, draw)
        return found.total, found.count, views.monitor(found)

    return Objective(loss, forward_with_views, forward)
