"""Targets and regression losses of data2vec 1.0 and 2.0.   B batch, T tokens, D width.

Spec 6 (targets) and 8 (losses). Everything is float32; normalisations have no affine part and
eps 1e-5. `valid` is bool [B, T] or None: padded positions take part in no statistic.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from data2vec_jax import metrics
from data2vec_jax.errors import UserError, nearest

Array = jax.Array
EPS = 1e-5


class Draw(NamedTuple):
    """The randomness of one update. Masks are a function of (masks, step, example id, clone)."""

    masks: Array  # PRNG key, the same in every step
    step: Array  # int32, completed updates
    noise: Array  # PRNG key of this step: dropout and decoder noise


class Stages(NamedTuple):
    """What an objective computes on its way, for the loss, the monitor and the golden tests.

    total, count: sum of the loss over masked positions, their number. tokens: the front end's
    output. prediction, wanted [rows, M, D] and weights [rows, M]: what entered the loss.
    targets [B, T, D]: at every position.
    """

    total: Array
    count: Array
    tokens: Any
    prediction: Array
    targets: Array
    wanted: Array
    weights: Array


class Objective(NamedTuple):
    """loss: (params, teacher, batch, draw) -> (total, count, metrics); the batch's loss is total /
    count. given: the same after the masks are drawn -> Stages."""

    loss: Callable[..., tuple[Array, Array, dict[str, Array]]]
    given: Callable[..., Stages]


def _standardise(x: Array, weights: Array | None, axes: tuple[int, ...]) -> Array:
    """Zero mean, unit biased variance over `axes` of x [B, T, D]; weights [B, T, 1] or None."""
    if weights is None:
        mean = jnp.mean(x, axes, keepdims=True)
        variance = jnp.mean(jnp.square(x - mean), axes, keepdims=True)
    else:
        count = jnp.maximum(jnp.sum(weights, axes, keepdims=True), 1.0)
        mean = jnp.sum(x * weights, axes, keepdims=True) / count
        variance = jnp.sum(jnp.square(x - mean) * weights, axes, keepdims=True) / count
    return (x - mean) * jax.lax.rsqrt(variance + EPS)


AXES = {
    "layer": (2,),  # each position, across channels
    "instance": (1,),  # each example and channel, across positions
    "batch": (0, 1),  # each channel, across the whole batch
}


def normaliser(names: Sequence[str], valid: Array | None = None) -> Callable[[Array], Array]:
    """A function [B, T, D] -> [B, T, D] applying the norms `names` ('layer', ...) in order."""
    for name in names:
        if name not in AXES:
            raise UserError(f"config.objective: no target norm '{name}'{nearest(name, AXES)}")
    weights = None if valid is None else valid[..., None].astype(jnp.float32)

    def apply(x):
        for name in names:
            x = _standardise(x, None if name == "layer" else weights, AXES[name])
        return x

    return apply


def regression(prediction: Array, target: Array, beta: float) -> Array:
    """Element loss, summed over channels: [..., D] -> [...].

    beta 0 is the squared error (no half); otherwise smooth L1: d^2 / (2 beta) below beta, |d| -
    beta / 2 above.
    """
    d = prediction.astype(jnp.float32) - target.astype(jnp.float32)
    if beta == 0.0:
        return jnp.sum(jnp.square(d), -1)
    size = jnp.abs(d)
    return jnp.sum(jnp.where(size < beta, jnp.square(d) / (2 * beta), size - beta / 2), -1)


SCALES = {"rsqrt_width": lambda width: width**-0.5, "mean": lambda width: 1.0 / width}


def scale_of(scale: str | float, width: int) -> float:
    """Factor on the loss of a position: a number, 1/sqrt(D) ('rsqrt_width') or 1/D ('mean')."""
    if isinstance(scale, (int, float)):
        return float(scale)
    if scale not in SCALES:
        raise UserError(f"config.objective.scale: no '{scale}'{nearest(scale, SCALES)}")
    return SCALES[scale](width)


def take(x: Array, positions: Array) -> Array:
    """x [B, T, D] at positions [B, M] -> [B, M, D]."""
    return jnp.take_along_axis(x, positions[..., None], axis=1)


def monitor(stages: Stages) -> dict[str, Array]:
    """Scalars that tell learning from collapse (spec 8.2; `metrics` says what each means)."""
    tokens, targets, weights = stages.tokens, stages.targets, stages.weights
    valid = tokens.valid
    present = jnp.ones(targets.shape[:2]) if valid is None else valid.astype(jnp.float32)
    by_position, by_example = metrics.explained_shares(targets, present)
    clones = stages.wanted.shape[0] // targets.shape[0]
    scalars = {
        "target_std": metrics.mean_std(stages.wanted, weights),
        "pred_std": metrics.mean_std(stages.prediction, weights),
        "masked_fraction": jnp.sum(weights) / (clones * jnp.sum(present)),
        "target_by_position": by_position,
        "target_by_example": by_example,
        "feature_std": metrics.mean_std(tokens.x, present),
        "feature_rank": metrics.effective_rank(tokens.x, present),
    }
    return jax.lax.stop_gradient(scalars)
