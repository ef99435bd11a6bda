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
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from data2vec_jax.core.config import Size
from data2vec_jax.models import pretext
from data2vec_jax.models.layers import split, unit_length
from data2vec_jax.objectives import views
from data2vec_jax.objectives.contract import Intermediates, Objective, ObjectiveConfig

Array = jax.Array

LEAST = 1e-6  # length that vectors are divided by


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


def losses(predictions: Array, projections: Array) -> Array:
    """[B, 2, P], of the student, and [B, 2, P], of the teacher -> [B]."""
    p, z = (unit_length(x, LEAST) for x in (predictions, projections[:, ::-1]))
    return jnp.sum(jnp.square(p - z), (1, 2))


def make_loss(config: Config, model: Any, *_: Any) -> Objective:
    """The objective of a batch. model: with a `pretext`. Nothing is masked."""
    scale = math.sqrt(config.size)

    def forward_with_views(
        params: Any,
        teacher: Any,
        batch: Mapping[str, Array],
        step: Array,
        key: Array | None,
    ) -> Intermediates:
        """Everything but the draw. step: not used."""
        del step
        large = model.views(batch)[0]
        student = views.see(model, params, large, split(key, 2))
        average = views.see_by_teacher(model, params, teacher, large)
        prediction, projection = student.made[:, :, 1], average.made[:, :, 0]
        total = jnp.sum(losses(prediction, projection))
        return views.intermediates(
            student,
            average,
            total,
            # A deviation of 1 is that of directions without any preference.
            prediction=scale * unit_length(prediction, LEAST),
            masked_targets=scale * unit_length(projection, LEAST),
            parts={"byol": total},
        )

    return views.objective(forward_with_views)
