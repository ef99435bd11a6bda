"""I-JEPA (arXiv 2301.08243): from a part of an image, predict what the teacher, the student's
moving average, makes of other parts of it (baselines spec 7).

    masking     K blocks are targets; the student sees a large square without them:
                `masking.multiblock`
    teacher     the whole image; h = LN of the encoder's output (no affine, eps 1e-5)
    predictor   `models.pretext.BlockPredictor`, on each target alone
    objective   smooth L1 (beta 1) of z - h, a mean over D, summed over target tokens

B batch, K targets of an example, T tokens, V of them visible, N positions of the largest target,
D width.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from data2vec_jax import masking
from data2vec_jax.core.config import NonNegativeFloat, check_section
from data2vec_jax.core.train_step import StepKeys
from data2vec_jax.models import pretext
from data2vec_jax.models.layers import gather_tokens, repeat, split
from data2vec_jax.objectives.contract import FewPatchesConfig, Intermediates, Objective
from data2vec_jax.objectives.targets import make_teacher, monitor, regression

Array = jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(FewPatchesConfig):
    """Config section `objective` with the name 'ijepa'."""

    predictor: Mapping = dataclasses.field(default_factory=dict)  # of `pretext.BlockPredictor`
    beta: NonNegativeFloat = 1.0  # of smooth L1

    needs_teacher: ClassVar[bool] = True
    masks: ClassVar[str] = "multiblock"

    def pretext(self, model: Any) -> pretext.BlockPredictor:
        """The predictor of a model of patches."""
        given = dict(out=model.width, grid=model.grid, dtype=model.dtype)
        check_section("objective.predictor", self.predictor, pretext.BlockPredictor, given)
        return pretext.BlockPredictor(**self.predictor, **given)

    def forward_flops(self, model, shapes, sample, forward) -> Mapping[str, float]:
        """See `ObjectiveConfig`: the predictor runs once for each target."""
        visible = sample.length - sample.count(sample.length)
        parts = forward(model.clone(pretext=None), 0, visible)
        sizes = dict(tokens=visible, masked=sample.largest, targets=sample.targets)
        predictor = model.pretext.flops(width=model.width, **sizes)
        return {**parts, "student": parts["student"] + predictor}


def make_loss(config: Config, model: Any, sampler: Any, corrupt: Any) -> Objective:
    """The objective of a batch; arguments as of `contract`. sampler: returns a
    `masking.BlockSampler`. corrupt: not used, masked patches are left out."""
    del corrupt
    apply = model.apply
    teach = make_teacher(model, 1, "output", (), ("layer",))

    def forward_with_masks(
        params: Any,
        teacher: Any,
        batch: Mapping[str, Array],
        mask: Array,
        targets: Array,
        sizes: tuple[int, int],
        key: Array | None,
    ) -> Intermediates:
        """Everything after the masks. mask bool [B, T], V of a row False; targets bool [B, K, T];
        sizes: V and N."""
        targets = targets.reshape(-1, targets.shape[-1])  # [B * K, T], those of an example adjacent
        visible, largest = sizes
        keep = masking.kept(mask, visible)  # [B, V]
        places = masking.positions(targets, largest)  # [B * K, N]
        weights = masking.weights(targets, largest)
        front_key, encoder_key = split(key, 2)

        student = {"params": params}
        tokens = apply(student, batch, front_key, method="features")
        encoded = apply(student, tokens, None, encoder_key, keep=keep, method="encode")
        prediction = apply(student, encoded, mask, places, valid=weights > 0, method="solve")
        average, whole = teach(params, teacher, batch, tokens)  # [B, T, D]
        wanted = gather_tokens(repeat(whole, len(places)), places)
        losses = regression(prediction, wanted, config.beta) / model.width
        total = jnp.sum(losses * weights)
        return Intermediates(
            total=total,
            count=jnp.sum(weights),
            tokens=tokens,
            prediction=prediction,
            targets=whole,
            masked_targets=wanted,
            weights=weights,
            student=encoded,
            teacher=average,
            parts={"regression": total},
            mask=mask,
            visible=batch,
        )

    def forward(params, teacher, batch, draw: StepKeys):
        masks = sampler(batch)
        ids = batch["example_id"]
        drawn = masking.sample(masks.parts, draw.mask_key, draw.step, ids, 1)[:, 0]  # [B, 1 + K, T]
        sizes = masks.length - masks.count(masks.length), masks.largest
        key = draw.noise_key
        return forward_with_masks(params, teacher, batch, drawn[:, 0], drawn[:, 1:], sizes, key)

    return Objective(forward_with_masks, forward, monitor)
