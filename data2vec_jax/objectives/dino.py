"""DINO (arXiv 2104.14294): of several views of an image, say what the teacher, the student's moving
average, says of another one (baselines spec 6).

    views       two large ones, which both see, and small ones, which the student alone sees
    head        `models.pretext.Prototypes`: K cosines s of the student, t of the teacher
    targets     q = softmax((t - c) / teacher_temperature)
    centre      c <- momentum * c + (1 - momentum) * mean of t, after the loss
    objective   mean over pairs of a large view and another one of -sum q log softmax(s / 0.1),
                summed over images

B batch, V views, K outputs.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from data2vec_jax.core.config import DropRate, NonNegativeInt, PositiveFloat, Size
from data2vec_jax.core.state import overlay
from data2vec_jax.models import pretext
from data2vec_jax.models.layers import split
from data2vec_jax.objectives import views
from data2vec_jax.objectives.contract import Intermediates, Objective, ObjectiveConfig

Array = jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(ObjectiveConfig):
    """Config section `objective` with the name 'dino'."""

    outputs: Size = 65_536  # K
    hidden: Size = 2_048  # of the head
    size: Size = 256  # of the vectors whose cosines are taken
    temperature: PositiveFloat = 0.1  # of the student
    teacher_temperature: PositiveFloat = 0.04
    # It goes from here to `teacher_temperature`, on a line over so many updates.
    first_teacher_temperature: PositiveFloat = 0.04
    temperature_updates: NonNegativeInt = 0
    momentum: DropRate = 0.9  # of the centre
    frozen_updates: NonNegativeInt = 0  # in which the last layer stays as it is

    needs_teacher: ClassVar[bool] = True
    masks: ClassVar[str] = ""
    needs_views: ClassVar[str] = "all"

    def pretext(self, model: Any) -> pretext.Prototypes:
        """The head."""
        sizes = dict(outputs=self.outputs, hidden=self.hidden, size=self.size)
        return pretext.Prototypes(**sizes, dtype=model.dtype)

    def forward_flops(self, model, shapes, sample, forward) -> Mapping[str, float]:
        """See `views.flops_of_views`."""
        return views.flops_of_views(model, shapes, forward)


def losses(student: Array, teacher: Array, centre: Array, temperatures: tuple[Any, Any]) -> Array:
    """[B, V, K] and [B, 2, K], raw outputs, of which the first two views are the same -> [B].
    temperatures: of the student and of the teacher."""
    q = jax.nn.softmax((teacher - centre) / temperatures[1])
    logs = jax.nn.log_softmax(student / temperatures[0])
    entropies = -jnp.einsum("bik,bjk->bij", q, logs, precision="highest")
    other = 1.0 - jnp.eye(*entropies.shape[1:])  # a view is not compared with itself
    return jnp.sum(entropies * other, (1, 2)) / jnp.sum(other)


def make_loss(config: Config, model: Any, *_: Any) -> Objective:
    """The objective of a batch. model: with a `pretext`. Nothing is masked."""

    def teacher_temperature(step):
        first, last = config.first_teacher_temperature, config.teacher_temperature
        done = jnp.minimum(step / max(config.temperature_updates, 1), 1.0)
        return first + (last - first) * done if config.temperature_updates else last

    def forward_with_views(
        params: Any,
        teacher: Any,
        batch: Mapping[str, Array],
        step: Array,
        key: Array | None,
    ) -> Intermediates:
        """Everything but the draw. step: completed updates."""
        centre = jax.lax.stop_gradient(params["pretext"]["centre"])
        if config.frozen_updates:
            last = params["pretext"]["vectors"]
            frozen = jnp.where(step < config.frozen_updates, jax.lax.stop_gradient(last), last)
            params = overlay(params, {"pretext": {"vectors": frozen}})
        keys, (large, *small) = split(key, 4), model.views(batch)
        student = views.see(model, params, large, keys[:2])
        said = [student.made, *(views.see(model, params, v, keys[2:]).made for v in small)]
        said = jnp.concatenate(said, 1)  # [B, V, K]
        average = views.see_by_teacher(model, params, teacher, large)
        temperatures = config.temperature, teacher_temperature(step)
        total = jnp.sum(losses(said, average.made, centre, temperatures))
        new = config.momentum * centre + (1 - config.momentum) * jnp.mean(average.made, (0, 1))
        return views.intermediates(
            student,
            average,
            total,
            # As the softmaxes see them, and without the centre, which is the same for all.
            prediction=said / temperatures[0],
            masked_targets=average.made / temperatures[1],
            parts={"dino": total},
            metrics={"assigned": {"pretext": {"centre": new}}},
        )

    return views.objective(forward_with_views)
