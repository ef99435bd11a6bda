"""Where the time of a step goes, by ablation."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from data2vec_jax.bench.measure import BUDGET, seconds_of
from data2vec_jax.bench.subject import Subject
from data2vec_jax.core.train_step import step_keys
from data2vec_jax.objectives.contract import Intermediates
from data2vec_jax.objectives.targets import owns_features


def parts_of(
    subject: Subject, step_seconds: float, compile_seconds: float, deadline: float
) -> dict[str, float] | None:
    """Seconds of each part of a step, by ablation: of programs that stop early.

    None if they would not be over at the `deadline`, in `time.monotonic()`; each program may take
    as long to compile as the step.

    What a program does not return is not computed, so 'teacher' is a program that returns nothing
    but targets, less the front end where it is the student's. 'loss' is what gradients take beyond
    student and teacher, with the statistics for the metrics; 'update' what a step takes beyond
    gradients. Differences of measurements: at least 0.
    """
    objective = subject.objective

    def forward(params, state, batch):
        return objective.forward(params, state.teacher, batch, step_keys(state))

    def gradient_of(choose):
        def run(state, batch):
            def number(params):
                return jnp.sum(
                    jnp.square(choose(forward(params, state, batch)).astype(jnp.float32))
                )

            return jax.grad(number)(state.params)

        return run

    def gradients(state, batch):
        def total(params):
            loss, *rest = objective.loss(params, state.teacher, batch, step_keys(state))
            return loss, rest

        return jax.value_and_grad(total, has_aux=True)(state.params)

    programs = {
        "masks": lambda state, batch: forward(state.params, state, batch).weights,
        "features": lambda state, batch: forward(state.params, state, batch).tokens.x,
        "frontend": gradient_of(lambda s: s.tokens.x),
        "targets": lambda state, batch: targets_of(forward(state.params, state, batch)),
        "prediction": gradient_of(lambda s: s.prediction),
        "gradients": gradients,
    }
    took = {}
    for name, program in programs.items():
        if time.monotonic() + compile_seconds + 2 * step_seconds > deadline:
            return None
        took[name] = _seconds(jax.jit(program), subject)
    own = owns_features(subject.model, subject.state.teacher)
    shared = 0.0 if own else took["features"]
    parts = {
        "frontend": took["frontend"],
        "masks": took["masks"],
        "student": took["prediction"] - took["frontend"] - took["masks"],
        "teacher": max(took["targets"] - shared, 0.0),
    }
    parts["loss"] = took["gradients"] - took["prediction"] - parts["teacher"]
    parts["update"] = step_seconds - took["gradients"]
    return {name: max(seconds, 0.0) for name, seconds in parts.items()}


def targets_of(found: Intermediates) -> Any:
    """What the teacher made; None without one."""
    if found.targets is None and found.teacher is not None:
        return found.masked_targets
    return found.targets


def _seconds(program: Callable, subject: Subject) -> float:
    """The median of three runs after a first; of long ones, a single run."""
    with jax.set_mesh(subject.mesh):
        call = lambda: jax.block_until_ready(program(subject.state, subject.batch))  # noqa: E731
        call()
        took = [seconds_of(call)]
        while len(took) < 3 and took[0] < BUDGET / 30:
            took.append(seconds_of(call))
        return statistics.median(took)
