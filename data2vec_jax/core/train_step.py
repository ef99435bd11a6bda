"""The one train step of every task: gradients, update, moving average of the teacher."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from data2vec_jax.core.config import NonNegativeInt, PositiveFloat
from data2vec_jax.core.state import Decay, TrainState, ema_update, overlay, select
from data2vec_jax.core.task import Scalars, Task


class StepKeys(NamedTuple):
    """The randomness of one update. Masks are a function of (mask_key, step, example id, clone)."""

    mask_key: jax.Array  # PRNG key, the same in every step
    step: jax.Array  # int32, completed updates
    noise_key: jax.Array  # PRNG key of this step: dropout and decoder noise


@dataclasses.dataclass(frozen=True, kw_only=True)
class SkipConfig:
    """Config section `skip`: which updates are not applied. One whose loss or gradient is not
    finite never is."""

    max_in_a_row: NonNegativeInt = 10  # updates not applied; at the next one the run ends
    # Nor is one whose gradient norm is more than so many deviations above its running mean; None
    # for no limit, as in the papers. The statistics are a part of the optimiser's state.
    max_deviations: PositiveFloat | None = None


def init_state(task: Task, tx: optax.GradientTransformation, key: jax.Array) -> TrainState:
    """The first state. The teacher starts as a copy of the student, in buffers of its own."""
    init_key, run_key = jax.random.split(key)
    params = task.init(init_key)
    teacher = jax.tree.map(lambda x: jnp.array(x, copy=True), params)
    teacher = select(teacher, task.averaged)
    return TrainState(jnp.int32(0), params, teacher, tx.init(params), run_key)


def step_keys(state: TrainState) -> StepKeys:
    """The randomness of the next update."""
    masks, noise = jax.random.split(state.key)
    return StepKeys(masks, state.step, jax.random.fold_in(noise, state.step))


def make_train_step(
    task: Task,
    tx: optax.GradientTransformation,
    decay: Callable[[jax.Array], Decay] | None,
    schedule: Callable[[jax.Array], jax.Array],
    accumulate: int = 1,
    shards: int = 1,
    max_deviations: float | None = None,
) -> Callable[[TrainState, Mapping[str, jax.Array]], tuple[TrainState, Scalars]]:
    """`train_step(state, batch) -> (state, metrics)`: pure, for one `jax.jit` with donation.

    accumulate: micro-batches per update; gradients of sums are added, then divided by the count of
    the whole batch, so that they equal the large batch's. shards: devices that rows are split over.
    decay: completed updates -> decay of the teacher's average; None without a teacher.
    max_deviations: see `SkipConfig`; `tx` is then made by `optimizer.watching_norm`.

    An update whose loss or gradient is not finite is not applied: parameters, teacher and moments
    stay as they are, bit for bit, and the metric `skipped` is 1. The step counts, for the learning
    rate too, so that later batches, masks and rates are what they would have been.
    """

    def gradients(state, batch, noise):
        draw = step_keys(state)._replace(noise_key=noise)

        def total(params):
            loss, count, metrics = task.loss(params, state.teacher, batch, draw)
            return loss, (count, metrics)

        (loss, (count, metrics)), grads = jax.value_and_grad(total, has_aux=True)(state.params)
        return grads, loss, count, metrics

    def train_step(state, batch):
        noise = step_keys(state).noise_key
        if accumulate == 1:
            grads, loss, count, metrics = gradients(state, batch, noise)
        else:
            parts = micro_batches(batch, accumulate, shards)
            noises = jax.random.split(noise, accumulate)
            zero = jax.eval_shape(gradients, state, jax.tree.map(lambda x: x[0], parts), noises[0])
            zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), zero)

            def add(sums, part):
                grads, loss, count, metrics = gradients(state, *part)
                metrics = jax.tree.map(lambda m: m * count, metrics)
                return jax.tree.map(jnp.add, sums, (grads, loss, count, metrics)), None

            (grads, loss, count, metrics), _ = jax.lax.scan(add, zero, (parts, noises))
            metrics = jax.tree.map(lambda m: m / count, metrics)
        grads = jax.tree.map(lambda g: g / count, grads)

        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        # Parameters that the loss sets and the optimiser does not learn, such as running averages.
        assigned = metrics.pop("assigned", {})
        params = overlay(params, assigned)
        done = state.step + 1
        teacher = state.teacher
        if task.averaged:
            teacher = ema_update(teacher, params, decay(done))

        loss, norm = loss / count, optax.tree.norm(grads)
        # The norm, a sum of squares, is finite only where Adam's moments stay so, and with them the
        # parameters. To look at the new parameters, too, would keep the choice below from being a
        # part of the update: on TPUs everything would be written and read once more.
        sound = jnp.isfinite(loss) & jnp.isfinite(norm)
        if max_deviations:
            sound &= norm <= state.opt_state.norm.limit(max_deviations)
        for value in jax.tree.leaves(assigned):
            sound &= jnp.isfinite(value).all()
        new, old = (params, teacher, opt_state), (state.params, state.teacher, state.opt_state)
        params, teacher, opt_state = choose(sound, new, old)
        metrics = metrics | {
            "loss": loss,
            "loss_count": count,
            "grad_norm": norm,
            "learning_rate": schedule(state.step),
            "skipped": 1 - sound.astype(jnp.int32),
        }
        if task.averaged:
            metrics["ema_decay"] = decay(done).value
        return TrainState(done, params, teacher, opt_state, state.key), metrics

    return train_step


def choose(sound: jax.Array, new: Any, old: Any) -> Any:
    """`new` if `sound` (bool []), else `old`; but the place in the schedule goes on."""

    def pick(new, old):
        if isinstance(new, optax.ScaleByScheduleState):
            return new
        return jnp.where(sound, new, old)

    clock = lambda x: isinstance(x, optax.ScaleByScheduleState)  # noqa: E731
    return jax.tree.map(pick, new, old, is_leaf=clock)


def micro_batches(batch: Any, parts: int, shards: int) -> Any:
    """Rows [G, ...] of a global batch -> [parts, G / parts, ...]; devices keep their rows."""

    def split(x):
        rows = x.reshape(shards, parts, -1, *x.shape[1:])
        return jnp.moveaxis(rows, 1, 0).reshape(parts, -1, *x.shape[1:])

    return jax.tree.map(split, batch)
