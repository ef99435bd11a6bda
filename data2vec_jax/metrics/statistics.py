"""Statistics of arrays on the device: standard deviation, explained variance, effective rank.

Shapes: B examples, T positions, D channels, N rows.
"""

import jax
import jax.numpy as jnp

ROUNDING = 1e-12  # of the mean square; a smaller variance is float32 rounding, and counts as 0


def _valid(x: jax.Array, weights: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """`x` in float32, 0 in invalid rows (where it may be NaN), and the weights as [..., 1]."""
    x = x.astype(jnp.float32)
    if weights is None:
        return x, jnp.ones((*x.shape[:-1], 1), jnp.float32)
    w = weights.astype(jnp.float32)[..., None]
    return jnp.where(w > 0, x, 0.0), w


def mean_std(y: jax.Array, weights: jax.Array | None = None) -> jax.Array:
    """Mean over channels of sqrt(variance over rows + 1e-6), variance with n - 1.

    fairseq's target_var and pred_var (spec 8.2), which are standard deviations. The variance takes
    two passes: the difference of sums loses all digits in float32 when the mean is large, and a
    collapsed model is just that case.

    Args:
      y: [..., D], all leading axes are rows.
      weights: [...] 0/1 validity of rows.

    Returns:
      float32 []. 1e-3 if fewer than two rows are valid.
    """
    return channel_std(y, weights).mean()


def channel_std(y: jax.Array, weights: jax.Array | None = None) -> jax.Array:
    """sqrt(variance over rows + 1e-6) of each channel, as in `mean_std`: [..., D] -> [D]."""
    y, w = _valid(y, weights)
    rows = tuple(range(y.ndim - 1))
    n = w.sum()
    mean = y.sum(rows) / jnp.maximum(n, 1.0)  # [D]
    variance = (w * (y - mean) ** 2).sum(rows) / jnp.maximum(n - 1.0, 1.0)  # [D]
    return jnp.sqrt(variance + 1e-6)


def explained_shares(y: jax.Array, weights: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
    """Shares of the variance that position alone, and example alone, explain.

    A model whose targets depend on position only (the same in every example) has a healthy
    `mean_std` and a falling loss, and learns nothing; its share by position is near 1.

    Each share is one minus the variance around the group means over the variance around the grand
    mean, both without bias (adjusted R squared; Kelley's epsilon squared of a one-way analysis of
    variance). A raw share would be about 1/B by position and 1/T by example for pure noise, which
    is large in a small batch; this one is 0 there on average, and still 1 if the group explains
    everything. Negative values are clipped to 0. A share that cannot be told apart from chance
    (by position with one example, by example with one position, or no variance at all) is 0.

    Args:
      y: [B, T, D].
      weights: [B, T] 0/1 validity, for instance the masked positions.

    Returns:
      (by_position, by_example), float32 [] each, from 0 to 1.
    """
    y, w = _valid(y, weights)
    n, raw = w.sum(), (y**2).sum()
    y = (y - y.sum((0, 1)) / jnp.maximum(n, 1.0)) * w  # deviations from the grand mean
    total = (y**2).sum()
    varies = total > ROUNDING * raw

    def share(axis: int) -> jax.Array:
        count = w.sum(axis)  # rows in each group
        between = (y.sum(axis) ** 2 / jnp.maximum(count, 1.0)).sum()
        # In float32, as all else: what is summed over devices in one type goes in one message.
        groups = (count > 0).astype(jnp.float32).sum()
        inside = (total - between) / jnp.maximum(n - groups, 1.0)
        around = total / jnp.maximum(n - 1.0, 1.0)
        adjusted = 1.0 - inside / jnp.maximum(around, 1e-30)
        return jnp.where(varies & (n > groups), jnp.clip(adjusted, 0.0, 1.0), 0.0)

    return share(0), share(1)


def effective_rank(x: jax.Array, weights: jax.Array | None = None) -> jax.Array:
    """Participation ratio of the covariance: (sum of eigenvalues)^2 / sum of their squares.

    k if the rows fill k directions evenly, near 1 if one direction dominates. Both sums are
    traces, of C and of C C, so no eigenvalue is computed. At most min(D, n - 1); read it beside
    the number of rows.

    Args:
      x: [..., D], all leading axes are rows.
      weights: [...] 0/1 validity of rows.

    Returns:
      float32 []. 0 if all rows are equal.
    """
    x, w = _valid(x, weights)
    rows = tuple(range(x.ndim - 1))
    raw = (x**2).sum()
    x = (x - x.sum(rows) / jnp.maximum(w.sum(), 1.0)) * w
    trace = (x**2).sum()
    # HIGH: three passes of bfloat16 on a TPU, tensorfloat32 on a GPU. To float32's last digit the
    # two ranks of a step would cost about 2 % of that of a ViT-B.
    c = jnp.tensordot(x, x, (rows, rows), precision=jax.lax.Precision.HIGH)  # [D, D]
    # Not x, before: the covariance would wait for the trace, and be a message of its own.
    c = c / jnp.maximum(trace, 1e-30)  # trace 1: no overflow below
    return jnp.where(trace > ROUNDING * raw, 1.0 / jnp.maximum((c**2).sum(), 1e-30), 0.0)
