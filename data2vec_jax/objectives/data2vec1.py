"""data2vec 1.0 (arXiv 2202.03555): a student that sees a masked input regresses what the teacher,
its own moving average, makes of the whole input.

B batch, T tokens, M masked positions of a row, D width.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from data2vec_jax import masking
from data2vec_jax.models.encoder import Record
from data2vec_jax.models.layers import take
from data2vec_jax.objectives.targets import (
    Draw,
    Norm,
    Objective,
    Stages,
    monitor,
    normaliser,
    regression,
    scale_of,
    variance_penalty,
)  # fmt: skip
from data2vec_jax.state import overlay

Array = jax.Array


def make_loss(
    model: Any,
    sampler: Callable[[Mapping[str, Any]], masking.Sampler],
    corrupt: Callable[..., Any] | None = None,
    shares_features: bool = False,
    *,
    top_k: int | Sequence[int],
    target: str = "ffn",
    layer_norms: Sequence[Norm] = (),
    final_norms: Sequence[Norm] = (),
    beta: float = 0.0,
    scale: str | float = "rsqrt_width",
    variance_weight: float = 0.0,
    variance_margin: float = 0.5,
) -> Objective:
    """The objective of a batch. Config section `objective`.

    model: see `modalities.contract.Modality`. sampler: shapes of a batch -> its mask sampler.
    corrupt: masks the input rather than the features (text). shares_features: the teacher consumes
    the student's own unmasked features, if there are any (speech).

    top_k: K uppermost blocks averaged, or the numbers of the blocks. target: 'ffn' or 'block'.
    layer_norms, final_norms: of each block's output, and of the average. beta: of smooth L1, 0 for
    squared error. scale: factor on the sum over channels (see `targets.scale_of`).
    variance_weight, variance_margin: of `targets.variance_penalty`.
    """
    apply = model.apply
    top_k = top_k if isinstance(top_k, int) else tuple(top_k)
    factor = scale_of(scale, model.width)

    def given(
        params: Any, teacher: Any, batch: Mapping[str, Array], visible: Mapping[str, Array],
        mask: Array, most: int, key: Array | None, collect: bool = False,
    ) -> Stages:  # fmt: skip
        """Everything after the masks. mask bool [B, T], at most `most` = M True in a row.

        visible: what the student sees. collect: keep the outputs of every layer.
        """
        positions = masking.positions(mask, most)  # [B, M]
        weights = (jnp.arange(most) < jnp.sum(mask, -1, keepdims=True)).astype(jnp.float32)

        # Student: the masked input at full length, then a prediction at each masked position.
        front_key, encoder_key = (None, None) if key is None else jax.random.split(key)
        student = {"params": params}
        tokens = apply(student, visible, front_key, method="features")
        encoded = apply(student, tokens, mask, encoder_key, collect=collect, method="encode")
        prediction = apply(student, take(encoded.x, positions), method="predict")  # [B, M, D]

        # Teacher: the whole input, without dropout or gradient.
        average = {"params": jax.lax.stop_gradient(overlay(params, teacher))}
        shared = shares_features and corrupt is None
        whole = tokens if shared else apply(average, batch, method="features")
        whole = jax.lax.stop_gradient(whole)

        # Targets: the mean of the K uppermost blocks, each normalised, then normalised again.
        counted = whole.valid if model.padding == "exact" else None
        record = Record(top_k, target, normaliser(layer_norms, counted))
        teaching = apply(average, whole, record=record, collect=collect, method="encode")
        targets = normaliser(final_norms, counted)(teaching.targets)
        targets = jax.lax.stop_gradient(targets)  # [B, T, D]
        wanted = take(targets, positions)  # [B, M, D]

        # Regression at the masked positions.
        count = jnp.sum(weights)
        parts = {"regression": factor * jnp.sum(regression(prediction, wanted, beta) * weights)}
        total = parts["regression"]
        if variance_weight:
            parts["variance"] = variance_penalty(prediction, weights, variance_margin)
            total = total + count * variance_weight * parts["variance"]
        return Stages(
            total, count, tokens, prediction, targets, wanted, weights, encoded, teaching, parts
        )

    def loss(params, teacher, batch, draw: Draw):
        masks = sampler(batch)  # an exact count per row: every shape is static
        valid = model.valid_lengths(batch)
        mask = masking.sample(masks, draw.masks, draw.step, batch["example_id"], 1, valid)[:, 0]
        visible = batch
        if corrupt is not None:
            visible, mask = corrupt(model, batch, mask, draw)
        most = masks.count(masks.length)
        stages = given(params, teacher, batch, visible, mask, most, draw.noise)
        return stages.total, stages.count, monitor(stages)

    return Objective(loss, given)
