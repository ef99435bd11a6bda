"""The state of a run, and the teacher: an exponential moving average of the student.

A model is `apply(params, ...)`. The student is `params`; the teacher is
`overlay(stop_gradient(params), teacher)`, where `teacher` holds only the averaged leaves. So a
leaf that is not averaged is shared with the student, and every averaging scope of the papers is
one list of path patterns.
"""

import re
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp

from data2vec_jax.core.config import Range, Share

Tree = dict[str, Any]


def shapes_of(init: Callable[[jax.Array], Any]) -> Any:
    """Shapes and dtypes of what `init` makes of a key.

    The key is made inside: devices of a mesh that is only planned for run nothing.
    """
    return jax.eval_shape(lambda: init(jax.random.key(0)))


@flax.struct.dataclass
class TrainState:
    """Everything that an update changes.

    step: int32 scalar, completed updates. params: the student, float32. teacher: the averaged
    leaves, float32 ({} without a teacher). opt_state: optax. key: typed PRNG key, constant.
    """

    step: jax.Array
    params: Tree
    teacher: Tree
    opt_state: Any
    key: jax.Array


def path_name(key_path: Sequence[Any]) -> str:
    """'encoder/blocks/qkv/kernel' for a jax key path."""
    return jax.tree_util.keystr(tuple(key_path), simple=True, separator="/")


def matches(patterns: Sequence[str], name: str) -> bool:
    """Whether any of the regular expressions `patterns` is found in the path `name`."""
    return any(re.search(pattern, name) for pattern in patterns)


def select(params: Tree, patterns: Sequence[str], prefix: str = "") -> Tree:
    """The sub-tree of leaves whose path matches one of `patterns`."""
    chosen = {}
    for name, value in params.items():
        path = f"{prefix}/{name}" if prefix else name
        if isinstance(value, dict):
            if below := select(value, patterns, path):
                chosen[name] = below
        elif matches(patterns, path):
            chosen[name] = value
    return chosen


def overlay(params: Tree, teacher: Tree) -> Tree:
    """`params` with the leaves of `teacher` in place of its own (a merge by path)."""
    merged = dict(params)
    for name, value in teacher.items():
        merged[name] = overlay(params[name], value) if isinstance(value, dict) else value
    return merged


class Decay(NamedTuple):
    """The decay of one average, float32, and 1 - decay, computed from the schedule.

    Near 1 float32 has steps of 6e-8: there 1.0 - value would be off by half, or zero too early.
    """

    value: jax.Array
    complement: jax.Array


def ema_decay(
    total_steps: int,
    *,
    start: Share,
    end: Share,
    anneal: Share,
    lag: Annotated[int, Range(0, 1)] = 0,
    kind: Literal["linear", "cosine"] = "linear",
) -> Callable[[jax.Array | int], Decay]:
    """Decay of the n-th average, n = completed updates: from `start` to `end`, on a line or (BYOL,
    DINO) in half a cosine.

    `anneal` is the share of `total_steps` after which the decay stays at `end`. The average taken
    after update n uses decay(n - lag): lag 0 in fairseq, 1 in the 1.0 vision code
    (spec 5.1). A decay of 1 freezes the teacher.
    """
    steps = round(anneal * total_steps)

    def decay(n):
        done = jnp.asarray(n, jnp.int32) - lag
        past, left = (x.astype(jnp.float32) for x in (done, steps - done))
        if kind == "cosine":  # by squares, which keep their digits at the end
            angle = 0.5 * jnp.pi / max(steps, 1)
            past, left = (jnp.square(jnp.sin(angle * x)) * steps for x in (past, left))
        ramp = start + (end - start) * past / max(steps, 1)
        # A mean of two positive numbers, weighted by whole numbers of steps: nothing cancels.
        complement = ((1.0 - start) * left + (1.0 - end) * past) / max(steps, 1)
        return Decay(
            jnp.where(done < steps, ramp, jnp.float32(end)),
            jnp.where(done < steps, complement, jnp.float32(1.0 - end)),
        )

    return decay


def ema_update(teacher: Tree, params: Tree, decay: Decay) -> Tree:
    """teacher <- decay * teacher + (1 - decay) * student, in float32, over the teacher's leaves."""

    def average(mean, new):
        # Only the small factor is used, so that the two weights add up to exactly one.
        return mean + decay.complement * (new.astype(mean.dtype) - mean)

    return jax.tree.map(average, teacher, restrict(params, teacher))


def restrict(params: Tree, like: Tree) -> Tree:
    """The leaves of `params` that `like` has."""
    return {
        name: restrict(params[name], value) if isinstance(value, dict) else params[name]
        for name, value in like.items()
    }
