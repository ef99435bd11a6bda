"""What the loop runs: a task is a record of pure functions."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np

from data2vec_jax.core.bad_examples import MAX_BAD_SHARE, BadExample
from data2vec_jax.core.state import TrainState

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
    data: first batch number -> iterable of global batches; None for a program that is compiled and
      not run. One in which examples were replaced has the key `bad_examples.KEY`: a list of them.
    size: examples of the corpus. bad: those of them that are known from the start to be unreadable.
    max_bad_share: see `pretrain.DataConfig`.
    evals: name -> function of the state that returns scalars.
    averaged: path patterns of the teacher's own parameters; () for no teacher.
    flops: shapes of a global batch -> FLOPs of one train step on it, all chips together.
    order: fingerprint of the examples and their order, on which all processes must agree, and a
      run and its continuation.
    notes: lines for the user at the start.
    save_assets: writes what the workdir needs beside the parameters (a tokenizer) into a folder.
    renewed: a checkpoint's path -> {part of its parameters: why}, of parts that mean something else
      in this run, and begin anew: a head of other classes.
    init_from: (parameters, paths of those that the checkpoint did not have, its path) ->
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
    size: int = 0
    bad: Sequence[BadExample] = ()
    max_bad_share: float = MAX_BAD_SHARE
    order: str = ""
    notes: Sequence[str] = ()
    save_assets: Callable[[Path], None] = lambda folder: None
    renewed: Callable[[str], Mapping[str, str]] = lambda path: {}
    init_from: Callable[..., dict[str, Any]] = lambda params, new, path: params

    def mean(self, values: Sequence[float]) -> float:
        """The mean of one value of each bucket, weighted by how often the bucket occurs."""
        return float(np.dot(self.shares, values))
