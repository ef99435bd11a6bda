"""What data2vec 1.0 and 2.0 share: the teacher's targets, and the loss of a prediction.

B batch, T tokens, N masked positions of a row, D width, K layers averaged.

Spec 6 (targets) and 8 (losses). Everything is float32; normalisations have no affine part and
eps 1e-5. `valid` is bool [B, T] or None: padded positions take part in no statistic.
"""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from data2vec_jax.core.config import Length, NonNegativeInt, PositiveFloat, PositiveInt, Range
from data2vec_jax.core.errors import UserError
from data2vec_jax.core.state import overlay
from data2vec_jax.metrics.statistics import channel_std, effective_rank, explained_shares, mean_std
from data2vec_jax.models.encoder import Encoded, TargetSpec
from data2vec_jax.models.layers import normalise, wide

Array = jax.Array

EPS = 1e-5


class Intermediates(NamedTuple):
    """What an objective computes on its way, for the loss, the monitor and the golden tests.

    total, count: sum of the loss over masked positions, their number. tokens: the front end's
    output. prediction, masked_targets [rows, N, D] and weights [rows, N]: what entered the loss.
    targets [B, T, D]: at every position. student, teacher: what their encoders returned, with every
    layer's output if `collect` was asked for. parts: the loss's terms.
    mask: bool [rows, T], where the student sees nothing. visible: the batch that it sees.
    """

    total: Array
    count: Array
    tokens: Any
    prediction: Array
    targets: Array
    masked_targets: Array
    weights: Array
    student: Any = None
    teacher: Any = None
    parts: Mapping[str, Array] = MappingProxyType({})
    mask: Array | None = None
    visible: Mapping[str, Array] | None = None


class Objective(NamedTuple):
    """A loss, and what it computes on its way.

    loss: (params, teacher, batch, draw) -> (total, count, metrics); the batch's loss is
    total / count. forward: the same arguments -> Intermediates. forward_with_masks: the masks are
    given instead of drawn.
    """

    loss: Callable[..., tuple[Array, Array, dict[str, Array]]]
    forward_with_masks: Callable[..., Intermediates]
    forward: Callable[..., Intermediates]


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


def owns_features(model: Any, teacher: Mapping[str, Any]) -> bool:
    """Whether the teacher averages parameters of the front end, so that its features differ."""
    return model.frontend_params in teacher


def make_teacher(
    model: Any,
    top_k: int | Sequence[int],
    target: str,
    layer_norms: Sequence[Norm],
    final_norms: Sequence[Norm],
) -> Callable[..., tuple[Encoded, Array]]:
    """The targets of both papers: y = norm(1/K sum_l norm(a_l)), over the teacher's top K layers.

    a_l: what layer l makes of the whole input, without dropout: the output of its feed-forward part
    ('ffn') or of the block ('block'). The other options: see `data2vec1.Config`.

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
        encoded = model.apply(average, whole, record=record, collect=collect, method="encode")
        return encoded, jax.lax.stop_gradient(normaliser(final_norms, counted)(encoded.targets))

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
    tokens, targets, weights = found.tokens, found.targets, found.weights
    valid = tokens.valid
    present = jnp.ones(targets.shape[:2]) if valid is None else valid.astype(jnp.float32)
    by_position, by_example = explained_shares(targets, present)
    clones = found.masked_targets.shape[0] // targets.shape[0]
    scalars = {
        "target_std": mean_std(found.masked_targets, weights),
        "pred_std": mean_std(found.prediction, weights),
        "masked_fraction": jnp.sum(weights) / (clones * jnp.sum(present)),
        "target_by_position": by_position,
        "target_by_example": by_example,
        "feature_std": mean_std(tokens.x, present),
        "feature_rank": effective_rank(tokens.x, present),
    }
    return jax.lax.stop_gradient(scalars)
