"""Losses of heads, in float32.   B batch, T frames, U labels of a row, C classes, V vocabulary.

Labels below 0 are none.
"""

from typing import Literal

import jax
import jax.numpy as jnp
import optax

from data2vec_jax.models.layers import Array, wide


def cross_entropy(logits: Array, labels: Array) -> Array:
    """Mean over the labels that are classes. logits [..., C], labels int [...]."""
    used = (labels >= 0) & (labels < logits.shape[-1])
    logs = jax.nn.log_softmax(wide(logits))
    picked = jnp.take_along_axis(logs, jnp.where(used, labels, 0)[..., None], -1)[..., 0]
    return -jnp.sum(picked * used) / jnp.sum(used)


def problem_loss(problem: str | None, logits: Array, labels: Array) -> Array:
    """Loss of a classifier of rows; logits [B, C].

    problem: 'regression' (squared error; labels [B] or [B, C]), 'single_label_classification'
    (labels int [B]) or 'multi_label_classification' (labels float [B, C]). None: by the labels.
    """
    if problem is None:
        whole = jnp.issubdtype(labels.dtype, jnp.integer)
        problem = "single_label_classification" if whole else "multi_label_classification"
        problem = "regression" if logits.shape[-1] == 1 else problem
    if problem == "regression":
        return jnp.mean(jnp.square(logits.reshape(labels.shape) - labels))
    if problem == "single_label_classification":
        return cross_entropy(logits, labels.reshape(-1))
    return jnp.mean(optax.sigmoid_binary_cross_entropy(wide(logits), labels.astype(jnp.float32)))


Problem = Literal["regression", "single_label_classification", "multi_label_classification"] | None


def ctc_losses(logits: Array, lengths: Array, labels: Array, blank: int) -> Array:
    """Connectionist temporal classification (Graves 2006): -log p of each row, [B].

    logits [B, T, V], lengths int [B], labels int [B, U]: those below 0, or equal to `blank`, are
    none, wherever they stand. Infinite where there are fewer frames than labels, counting a blank
    between equal ones.
    """
    real = (labels >= 0) & (labels != blank)
    order = jnp.argsort(~real, axis=1, stable=True)  # labels first
    labels = jnp.take_along_axis(labels, order, 1)
    real = jnp.take_along_axis(real, order, 1)
    equal = jnp.sum((labels[:, 1:] == labels[:, :-1]) & real[:, 1:], 1)
    feasible = lengths >= jnp.sum(real, 1) + equal
    padding = jnp.arange(logits.shape[1]) >= lengths[:, None]
    losses = optax.ctc_loss(
        wide(logits),
        padding.astype(jnp.float32),
        jnp.where(real, labels, 0),
        (~real).astype(jnp.float32),
        blank_id=blank,
    )
    return jnp.where(feasible, losses, jnp.inf)
