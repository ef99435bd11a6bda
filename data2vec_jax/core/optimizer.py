"""Learning-rate schedules and one optax chain: clip, AdamW (or SGD, LARS), schedule."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from data2vec_jax.core.config import (
    DropRate,
    NonNegativeFloat,
    Pattern,
    PositiveFloat,
    Range,
    Share,
    check_section,
    choose,
)
from data2vec_jax.core.errors import UserError
from data2vec_jax.core.state import matches, path_name

Schedule = Callable[[Any], jax.Array]


def cosine(
    total_steps: int,
    *,
    peak: NonNegativeFloat,
    warmup: Share,
    floor: NonNegativeFloat = 0.0,
    start: NonNegativeFloat = 0.0,
    inclusive: bool = False,
) -> Schedule:
    """Linear from `start` to `peak`, then half a cosine down to `floor` at `total_steps`.

    `warmup` is a share of `total_steps`. `inclusive`: the last warm-up step is already at the
    peak (1.0 vision); otherwise the first step after it is (fairseq). Spec 9.1, 9.2.
    """
    steps = min(round(warmup * total_steps), total_steps)
    ramp = max(steps - 1 if inclusive else steps, 1)

    def schedule(n):
        n = jnp.asarray(n, jnp.float32)
        # (1 + cos(pi t)) / 2 = sin(pi (1 - t) / 2)^2, which keeps its digits towards the end.
        rest = jnp.clip((total_steps - n) / max(total_steps - steps, 1), 0.0, 1.0)
        after = floor + (peak - floor) * jnp.square(jnp.sin(0.5 * jnp.pi * rest))
        return jnp.where(n < steps, start + (peak - start) * n / ramp, after)

    return schedule


def tri_stage(
    total_steps: int,
    *,
    peak: NonNegativeFloat,
    warmup: Share,
    hold: Share,
    decay: Share,
    start_scale: Share = 0.01,
    end_scale: Annotated[float, Range(above=0, most=1)] = 0.01,
) -> Schedule:
    """Linear warm-up, constant, then *exponential* decay; the three shares of `total_steps`.

    The paper says linear decay, the code decays exponentially (spec 11, trap 17).
    """
    if warmup + hold + decay > 1 + 1e-6:
        raise UserError(
            f"config.schedule: warmup={warmup}, hold={hold} and decay={decay} add up to more than 1"
        )
    # Whole updates, rounded down, but for what a share loses in floating point.
    up, flat, down = (int(share * total_steps + 1e-6) for share in (warmup, hold, decay))
    rate = math.log(end_scale) / max(down, 1)

    def schedule(n):
        n = jnp.asarray(n, jnp.float32)
        rising = peak * (start_scale + (1.0 - start_scale) * n / max(up, 1))
        falling = peak * jnp.exp(rate * jnp.clip(n - up - flat, 0, down))
        return jnp.where(n < up, rising, jnp.where(n < up + flat, peak, falling))

    return schedule


def linear(total_steps: int, *, peak: NonNegativeFloat, warmup: Share) -> Schedule:
    """Linear from 0 to `peak` over a share of `total_steps`, then to 0 (conversion spec 3.2)."""
    steps = round(warmup * total_steps)

    def schedule(n):
        n = jnp.asarray(n, jnp.float32)
        falling = (total_steps - n) / max(total_steps - steps, 1)
        return peak * jnp.where(n < steps, n / max(steps, 1), jnp.clip(falling, 0.0, 1.0))

    return schedule


def constant(total_steps: int, *, peak: NonNegativeFloat, warmup: Share = 0.0) -> Schedule:
    """Linear warm-up over a share of `total_steps`, then constant."""
    steps = round(warmup * total_steps)

    def schedule(n):
        return peak * jnp.minimum(1.0, (jnp.asarray(n, jnp.float32) + (steps == 0)) / max(steps, 1))

    return schedule


SCHEDULES = {
    "cosine": cosine,
    "tri_stage": tri_stage,
    "linear": linear,
    "constant": constant,
}


def make_schedule(total_steps: int, /, **options: Any) -> Schedule:
    """Learning rate by completed updates. Config section `schedule`: `kind`, and its options.

    Raises UserError: an unknown kind or option, or an impossible value.
    """
    kind = choose("schedule", options, "kind", SCHEDULES)
    del options["kind"]
    check_section("schedule", options, SCHEDULES[kind], given=("total_steps",))
    return SCHEDULES[kind](total_steps, **options)


def scaled(schedule: Schedule, factor: float) -> Schedule:
    """`factor` times a schedule."""
    return lambda step: factor * schedule(step)


class AdamState(NamedTuple):
    """count: int32 scalar. mu, nu: first and second moments, like the parameters."""

    count: jax.Array
    mu: Any
    nu: Any


def _one_minus_power(beta: float, count: jax.Array) -> jax.Array:
    """1 - beta^count; the difference itself would lose four digits at beta 0.999, count 1."""
    return -jnp.expm1(count * math.log(beta)) if beta else jnp.float32(1)


def scale_by_adam(b1: float, b2: float, eps: float, eps_on: str) -> optax.GradientTransformation:
    """Adam's direction with eps added to the 'raw' or to the 'corrected' root of nu.

    'raw' is fairseq: mu / (sqrt(nu) + eps) * sqrt(1 - b2^t) / (1 - b1^t); 'corrected' is the
    textbook and PyTorch. They differ only in the first steps (spec 9.1).
    """

    def init(params):
        zeros = lambda: jax.tree.map(jnp.zeros_like, params)  # noqa: E731
        return AdamState(jnp.zeros([], jnp.int32), zeros(), zeros())

    def update(grads, state, params=None):
        del params
        count = state.count + 1
        mu = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.mu, grads)
        nu = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * jnp.square(g), state.nu, grads)
        first, second = _one_minus_power(b1, count), jnp.sqrt(_one_minus_power(b2, count))
        added = eps if eps_on == "raw" else eps * second
        directions = jax.tree.map(lambda m, v: m * (second / first) / (jnp.sqrt(v) + added), mu, nu)
        return directions, AdamState(count, mu, nu)

    return optax.GradientTransformation(init, update)


class NormStatistics(NamedTuple):
    """Running mean and variance of the gradient's norm, over about the last `NORM_MEMORY` applied
    updates. count: int32, of all applied ones."""

    count: jax.Array
    mean: jax.Array
    variance: jax.Array

    def limit(self, deviations: float) -> jax.Array:
        """The largest norm that is no spike; none is one before `NORM_MEMORY` updates."""
        limit = self.mean + deviations * jnp.sqrt(self.variance)
        return jnp.where(self.count < NORM_MEMORY, jnp.inf, limit)


class WatchedState(NamedTuple):
    """State of an optimiser that `watching_norm` made."""

    inner: Any
    norm: NormStatistics


NORM_MEMORY = 100  # updates


def watching_norm(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """`tx`, whose state also holds the `NormStatistics` of the gradients."""

    def init(params):
        zero = jnp.zeros([], jnp.float32)
        return WatchedState(tx.init(params), NormStatistics(jnp.int32(0), zero, zero))

    def update(grads, state, params=None):
        updates, inner = tx.update(grads, state.inner, params)
        count, mean, variance = state.norm
        share = 1.0 / jnp.minimum(count + 1, NORM_MEMORY)
        change = optax.tree.norm(grads) - mean
        variance = (1.0 - share) * (variance + share * change**2)
        return updates, WatchedState(
            inner, NormStatistics(count + 1, mean + share * change, variance)
        )

    return optax.GradientTransformation(init, update)


def clip_by_norm(limit: float, each: bool = False) -> optax.GradientTransformation:
    """Scales gradients by min(1, limit / (norm + 1e-6)), as PyTorch does (spec 9.1).

    each: every parameter by its own norm, of stacked layers every layer (baselines spec 6).
    """

    def one(key_path, g):
        norm = jnp.sqrt(jnp.sum(jnp.square(g), layer_axes(key_path, g), keepdims=True))
        return g * jnp.minimum(1.0, limit / (norm + 1e-6))

    def update(grads, state, params=None):
        del params
        if each:
            return jax.tree_util.tree_map_with_path(one, grads), state
        factor = jnp.minimum(1.0, limit / (optax.tree.norm(grads) + 1e-6))
        return jax.tree.map(lambda g: g * factor, grads), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def scale_by_trust_ratio(coefficient: float) -> optax.GradientTransformation:
    """LARS (You 2017): directions of matrices times coefficient |p| / |direction|, or 1 where one
    of them is 0; of stacked layers each by its own. Vectors stay as they are."""

    def one(key_path, u, p):
        axes = layer_axes(key_path, p)
        if len(axes) < 2:
            return u
        norms = [jnp.sqrt(jnp.sum(jnp.square(x), axes, keepdims=True)) for x in (p, u)]
        used = (norms[0] > 0) & (norms[1] > 0)
        return u * jnp.where(used, coefficient * norms[0] / jnp.where(used, norms[1], 1.0), 1.0)

    def update(updates, state, params=None):
        return jax.tree_util.tree_map_with_path(one, updates, params), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def layer_axes(key_path: Sequence[Any], x: jax.Array) -> tuple[int, ...]:
    """Axes of one layer's parameter: blocks are stacked along the first."""
    return tuple(range("/blocks/" in f"/{path_name(key_path)}", x.ndim))


def decayed_weights(value: Schedule) -> optax.GradientTransformation:
    """Adds value(completed updates) * p to the direction of each parameter p."""

    def update(updates, state, params=None):
        added = jax.tree.map(lambda u, p: u + value(state.count) * p, updates, params)
        return added, optax.ScaleByScheduleState(state.count + 1)

    # This state is a clock, which goes on where an update is not applied.
    return optax.GradientTransformation(
        lambda params: optax.ScaleByScheduleState(jnp.zeros([], jnp.int32)), update
    )


def by_path(params: Any, patterns: Sequence[str]) -> Any:
    """A tree of bools: whether each leaf's path matches one of `patterns`."""
    return jax.tree_util.tree_map_with_path(lambda p, _: matches(patterns, path_name(p)), params)


def scale_by_path(rates: Sequence[tuple[str, Any]]) -> optax.GradientTransformation:
    """Multiplies updates by the factor of the first (pattern, factor) that matches their path.

    A factor is a number, or for stacked layers one number per layer.
    """

    def scale(key_path, x):
        name = path_name(key_path)
        factor = next((f for pattern, f in rates if matches((pattern,), name)), 1.0)
        return x * jnp.asarray(factor).reshape(-1, *(1,) * (x.ndim - 1)) if x.ndim else x * factor

    def update(updates, state, params=None):
        del params
        return jax.tree_util.tree_map_with_path(scale, updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Config section `optim`. Moments are float32, like the parameters."""

    kind: Literal["adamw", "sgd", "lars"] = "adamw"
    momentum: DropRate = 0.9  # of 'sgd' and 'lars', PyTorch's
    # Of 'lars': the trust ratio, for matrices (You 2017; conversion spec 2.3).
    trust: PositiveFloat = 0.001
    betas: tuple[DropRate, DropRate] = (0.9, 0.999)  # of 'adamw'
    eps: PositiveFloat = 1e-8  # of 'adamw'
    eps_on: Literal["corrected", "raw"] = "corrected"  # see `scale_by_adam`
    # Decoupled: lr * weight_decay * p; in 'sgd' and 'lars' a part of the gradients.
    weight_decay: NonNegativeFloat = 0.0
    no_decay: Sequence[Pattern] = ()  # path patterns of parameters that do not decay
    # The weight decay goes there in half a cosine over all updates; None: it stays.
    weight_decay_end: NonNegativeFloat | None = None
    clip: NonNegativeFloat | None = None  # limit of the global gradient norm, None for none
    # Or of the norm of each parameter's gradient; stacked layers are parameters of their own.
    clip_each: bool = False
    frozen: Sequence[Pattern] = ()  # path patterns of parameters that never change
    # (path pattern, factor of the learning rate, or one for each stacked layer); the first match
    # counts, 1 where none does.
    rates: Sequence[tuple[Pattern, NonNegativeFloat | Sequence[NonNegativeFloat]]] = ()


def make_optimizer(
    schedule: Schedule, config: OptimizerConfig, total_steps: int | None = None
) -> optax.GradientTransformation:
    """Clip, direction, decay, learning rate. schedule: completed updates -> learning rate.
    total_steps: of the run, for the schedule of the weight decay."""
    no_decay, frozen, rates = config.no_decay, config.frozen, config.rates
    decay, decayed = [], lambda params: jax.tree.map(lambda m: not m, by_path(params, no_decay))
    if config.weight_decay_end is not None:
        # From start to end: a cosine whose floor may be above its peak.
        ends = dict(peak=config.weight_decay, floor=config.weight_decay_end)
        value = cosine(total_steps, warmup=0.0, **ends)
        decay = [optax.masked(decayed_weights(value), decayed)]
    elif config.weight_decay:
        decay = [optax.add_decayed_weights(config.weight_decay, decayed)]
    directions = {
        "adamw": [scale_by_adam(*config.betas, config.eps, config.eps_on), *decay],
        "sgd": [*decay, optax.trace(config.momentum)],
        "lars": [*decay, scale_by_trust_ratio(config.trust), optax.trace(config.momentum)],
    }
    steps = [clip_by_norm(config.clip, config.clip_each)] if config.clip else []
    steps += directions[config.kind]
    steps.append(optax.scale_by_learning_rate(schedule))
    if rates:
        steps.append(scale_by_path(rates))
    if not frozen:
        return optax.chain(*steps)
    kept = lambda params: by_path(params, frozen)  # noqa: E731
    learning = lambda params: jax.tree.map(lambda m: not m, kept(params))  # noqa: E731
    # Frozen parameters have no moments, and their gradients no part in the norm that is clipped.
    return optax.chain(
        optax.masked(optax.chain(*steps), learning), optax.masked(optax.set_to_zero(), kept)
    )
