"""What data2vec 1.0 and 2.0 share: the teacher's targets, and the loss of a prediction.

B batch, T tokens, N masked positions of a row, D width, K layers averaged.

Spec 6 (targets) and 8 (losses). Everything is float32; normalisations have no affine part and
eps 1e-5. `valid` is bool [B, T] or None: padded positions take part in no statistic.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp

from data2vec_jax.core.config import Length, NonNegativeInt, PositiveFloat, PositiveInt, Range
from data2vec_jax.core.errors import UserError
from data2vec_jax.core.state import overlay
from data2vec_jax.metrics.statistics import channel_std, effective_rank, explained_shares, mean_std
from data2vec_jax.models.encoder import Encoded, Source, TargetSpec
from data2vec_jax.models.layers import normalise, wide
from data2vec_jax.objectives import contract
from data2vec_jax.objectives.contract import Intermediates, present_positions

Array = jax.Array

EPS = 1e-5


AXES = {
    "layer": (2,),  # each position, across channels
    "instance": (1,),  # each example and channel, across positions
    "group": (1, 2),  # each example, across positions and channels
    "batch": (0, 1),  # each channel, across the whole batch
}

# The K uppermost blocks, or the numbers of some, from 0.
TopK = PositiveInt | Annotated[Sequence[NonNegativeInt], Length()]
# A name of `AXES`, or axes of [B, T, D] themselves.
Norm = Literal[*AXES] | Annotated[Sequence[Annotated[int, Range(0, 2)]], Length()]


def axes_of(norms: Sequence[Norm]) -> list[tuple[int, ...]]:
    """Axes of the statistics of target norms: names of `AXES`, or axes of [B, T, D] themselves."""
    return [AXES[norm] if isinstance(norm, str) else tuple(norm) for norm in norms]


def check_top_k(top_k: TopK, depth: int) -> None:
    """Raises UserError: an encoder of `depth` blocks does not have these."""
    inside = 1 <= top_k <= depth if isinstance(top_k, int) else set(top_k) <= {*range(depth)}
    if not inside or not top_k:
        raise UserError(f"config.objective.top_k: {top_k}, but the encoder has {depth} blocks")


def batch_statistics(norms: Sequence[Norm], variance_weight: float = 0.0) -> str:
    """As of `ObjectiveConfig`, of the target norms and of the penalty's weight."""
    mixes_rows = any(0 in axes for axes in axes_of(norms)) or variance_weight
    return "target norm 'batch' and objective.variance_weight" if mixes_rows else ""


def _standardise(x: Array, weights: Array | None, axes: tuple[int, ...]) -> Array:
    """Zero mean, unit biased variance over `axes` of x [B, T, D]; weights [B, T, 1] or None."""
    if weights is None:
        return normalise(x, EPS, axes)
    weights = jnp.broadcast_to(weights, x.shape)
    count = jnp.maximum(jnp.sum(weights, axes, keepdims=True), 1.0)
    centred = x - jnp.sum(x * weights, axes, keepdims=True) / count
    variance = jnp.sum(jnp.square(centred) * weights, axes, keepdims=True) / count
    return centred * jax.lax.rsqrt(variance + EPS)


def normaliser(norms: Sequence[Norm], valid: Array | None = None) -> Callable[[Array], Array]:
    """A function [B, T, D] -> [B, T, D] applying `norms` ('layer', ...) in order.

    valid: bool [B, T], positions that take part in the statistics; None for all.
    """
    steps = axes_of(norms)
    if valid is not None and any(0 in axes for axes in steps):
        raise UserError(
            "config.objective: target norm 'batch' mixes rows, and these have padding: use rows of "
            "one length and model.padding='reference', or another norm"
        )
    weights = None if valid is None else valid[..., None].astype(jnp.float32)

    def apply(x):
        for axes in steps:
            x = _standardise(x, None if axes == AXES["layer"] else weights, axes)
        return x

    return apply


def owns_features(model: Any, teacher: Mapping[str, Any]) -> bool | None:
    """Whether the teacher averages parameters of the front end, so that its features differ; None
    without a teacher."""
    return model.frontend_params in teacher if teacher else None


def make_teacher(
    model: Any,
    top_k: int | Sequence[int],
    target: Source,
    layer_norms: Sequence[Norm],
    final_norms: Sequence[Norm],
) -> Callable[..., tuple[Encoded, Array]]:
    """The targets of both papers: y = norm(1/K sum_l norm(a_l)), over the teacher's top K layers.

    a_l: what layer l makes of the whole input, without dropout: the output of its feed-forward part
    ('ffn'), of the block ('block') or of another part of it (`encoder.Block`). target 'output' is
    what the encoder returns after its last norm, and neither averages nor normalises layers. The
    other options: see `data2vec1.Config`.

    Returns (params, teacher, batch, tokens, collect) -> (what the encoder returned, y [B, T, D]).
    teacher: averaged leaves, which stand in for the student's (`state.ema_update`). tokens: the
    student's features of the whole input, if it made any; a teacher that averages nothing of the
    front end consumes them (`owns_features`). No gradient passes.
    """
    top_k = top_k if isinstance(top_k, int) else tuple(top_k)

    def teach(params, teacher, batch, tokens=None, collect=False):
        average = {"params": jax.lax.stop_gradient(overlay(params, teacher))}
        own = tokens is None or owns_features(model, teacher)
        whole = model.apply(average, batch, method="features") if own else tokens
        whole = jax.lax.stop_gradient(whole)
        counted = whole.valid if model.padding == "exact" else None
        record = TargetSpec(top_k, target, normaliser(layer_norms, counted))
        record = None if target == "output" else record
        encoded = model.apply(average, whole, record=record, collect=collect, method="encode")
        averaged = wide(encoded.x) if record is None else encoded.targets
        return encoded, jax.lax.stop_gradient(normaliser(final_norms, counted)(averaged))

    return teach


def regression(prediction: Array, target: Array, beta: float) -> Array:
    """Element loss, summed over channels: [..., D] -> [...].

    beta 0 is the squared error (no half); otherwise smooth L1: d^2 / (2 beta) below beta, |d| -
    beta / 2 above. So a tiny beta is the L1 loss.
    """
    d = wide(prediction) - wide(target)
    if beta == 0.0:
        return jnp.sum(jnp.square(d), -1)
    size = jnp.abs(d)
    return jnp.sum(jnp.where(size < beta, jnp.square(d) / (2 * beta), size - beta / 2), -1)


SCALES = {"rsqrt_width": lambda width: width**-0.5, "mean": lambda width: 1.0 / width}
Scale = Literal[*SCALES] | PositiveFloat


def scale_of(scale: Scale, width: int) -> float:
    """Factor on the loss of a position: a number, 1/sqrt(D) ('rsqrt_width') or 1/D ('mean')."""
    if isinstance(scale, (int, float)):
        return float(scale)
    return SCALES[scale](width)


def variance_penalty(prediction: Array, weights: Array, margin: float) -> Array:
    """Mean over channels of max(0, margin - deviation over all predicted positions) (spec 8.2).

    prediction [B, N, D], weights [B, N]. It is a statistic of the whole batch.
    """
    return jnp.mean(jax.nn.relu(margin - channel_std(prediction, weights)))


def monitor(found: Intermediates) -> dict[str, Array]:
    """Scalars that tell learning from collapse (spec 8.2), explained in `metrics.collapse`."""
    present = present_positions(found)
    by_position, by_example = explained_shares(found.targets, present)
    scalars = {
        "target_std": mean_std(found.masked_targets, found.weights),
        "target_by_position": by_position,
        "target_by_example": by_example,
        "target_rank": effective_rank(found.targets, present),
    }
    return contract.monitor(found) | jax.lax.stop_gradient(scalars)
