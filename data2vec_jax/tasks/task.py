"""What the loop runs: a record of pure functions, and the one train step made from it."""

import importlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import optax

from data2vec_jax.errors import UserError, nearest
from data2vec_jax.objectives.targets import Draw
from data2vec_jax.state import TrainState, ema_update, overlay, select

Shapes = Mapping[str, jax.ShapeDtypeStruct]
Scalars = dict[str, jax.Array]


@dataclass(frozen=True)
class Task:
    """A training job.

    shapes: one entry per bucket, the arrays of a *global* batch. shares: how often each occurs.
    init: key -> parameters, nested dicts of float32.
    loss: (params, teacher, batch, draw) -> (sum, count, metrics); the loss is sum / count over the
      whole batch, whatever its split over devices or micro-batches. metrics: scalars; and maybe
      `assigned`, new values of parameters that are not learned, such as running averages.
    data: first batch number -> iterable of this process's rows of each global batch, numpy; None
      for a program that is compiled and not run.
    evals: name -> function of the state that returns scalars.
    averaged: path patterns of the teacher's own parameters; () for no teacher.
    flops: shapes of a global batch -> FLOPs of one train step on it, all chips together.
    order: fingerprint of the order of the examples, on which all processes must agree.
    notes: lines for the user at the start.
    save_assets: writes what the workdir needs beside the parameters (a tokenizer) into a folder.
    adopt: (parameters, paths of those that the checkpoint of the start did not have, its path) ->
      the parameters, of which some new ones depend on others (DoRA's lengths).
    """

    shapes: Sequence[Shapes]
    shares: Sequence[float]
    init: Callable[[jax.Array], dict[str, Any]]
    loss: Callable[..., tuple[jax.Array, jax.Array, Scalars]]
    data: Callable[[int], Iterable[Mapping[str, Any]]] | None = None
    evals: Mapping[str, Callable[[TrainState], Mapping[str, float]]] = field(default_factory=dict)
    averaged: Sequence[str] = ()
    flops: Callable[[Shapes], float] = lambda shapes: 0.0
    order: str = ""
    notes: Sequence[str] = ()
    save_assets: Callable[[Path], None] = lambda folder: None
    adopt: Callable[..., dict[str, Any]] = lambda params, new, start: params


# A task's module has: settings, whose arguments are the config; complete, (config, start) -> the
# config with what the checkpoint of the start decides; make, config -> Task; outline, the same
# without data.
MODULES = ("pretrain", "classify", "transcribe", "answer")


def module_of(config: Mapping[str, Any]) -> ModuleType:
    """The module of `config.task`."""
    name = config.get("task", "pretrain")
    if name not in MODULES:
        raise UserError(f"config.task: no task '{name}'{nearest(str(name), MODULES)}")
    return importlib.import_module(f"data2vec_jax.tasks.{name}")


def init_state(task: Task, tx: optax.GradientTransformation, key: jax.Array) -> TrainState:
    """The first state. The teacher starts as a copy of the student, in buffers of its own."""
    init_key, run_key = jax.random.split(key)
    params = task.init(init_key)
    teacher = jax.tree.map(lambda x: jnp.array(x, copy=True), params)
    teacher = select(teacher, task.averaged)
    return TrainState(jnp.int32(0), params, teacher, tx.init(params), run_key)


def draw_of(state: TrainState) -> Draw:
    """The randomness of the next update."""
    masks, noise = jax.random.split(state.key)
    return Draw(masks, state.step, jax.random.fold_in(noise, state.step))


def make_train_step(
    task: Task,
    tx: optax.GradientTransformation,
    decay: Callable[[jax.Array], jax.Array] | None,
    schedule: Callable[[jax.Array], jax.Array],
    accumulate: int = 1,
    shards: int = 1,
) -> Callable[[TrainState, Mapping[str, jax.Array]], tuple[TrainState, Scalars]]:
    """`train_step(state, batch) -> (state, metrics)`: pure, for one `jax.jit` with donation.

    accumulate: micro-batches per update; gradients of sums are added, then divided by the count of
    the whole batch, so that they equal the large batch's. shards: devices that rows are split over.
    decay: of the teacher's average, unused without one.
    """

    def gradients(state, batch, noise):
        draw = draw_of(state)._replace(noise=noise)

        def total(params):
            loss, count, metrics = task.loss(params, state.teacher, batch, draw)
            return loss, (count, metrics)

        (loss, (count, metrics)), grads = jax.value_and_grad(total, has_aux=True)(state.params)
        return grads, loss, count, metrics

    def train_step(state, batch):
        noise = draw_of(state).noise
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
        params = overlay(params, metrics.pop("assigned", {}))
        done = state.step + 1
        teacher = state.teacher
        if task.averaged:
            teacher = ema_update(teacher, params, decay(done))
        metrics = metrics | {
            "loss": loss / count,
            "loss_count": count,
            "grad_norm": optax.tree.norm(grads),
            "learning_rate": schedule(state.step),
        }
        if task.averaged:
            metrics["ema_decay"] = decay(done)
        return TrainState(done, params, teacher, opt_state, state.key), metrics

    return train_step


def micro_batches(batch: Any, parts: int, shards: int) -> Any:
    """[G, ...] -> [parts, G / parts, ...], every device keeping its own rows."""

    def split(x):
        rows = x.reshape(shards, parts, -1, *x.shape[1:])
        return jnp.moveaxis(rows, 1, 0).reshape(parts, -1, *x.shape[1:])

    return jax.tree.map(split, batch)
