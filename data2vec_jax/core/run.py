"""A task on a mesh: its optimiser, its first state and its compiled programs."""

import json
from collections.abc import Callable, Mapping
from typing import Any

import jax

from data2vec_jax.core import distributed, optimizer, sharding
from data2vec_jax.core.state import TrainState, ema_decay
from data2vec_jax.core.task import Task
from data2vec_jax.core.train_step import SkipConfig, init_state, make_train_step


class Run:
    """A task, its optimiser and its programs on a mesh: what train, demo and tests share.

    One program is compiled per shape of batch, ahead of time, so a second compilation of the same
    shape cannot happen. programs: filled by this run, and used by others that are given the same
    dict, where their configs differ in nothing but the seed and the section `data`. rate: a factor
    of the whole schedule.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        task: Task,
        mesh: jax.sharding.Mesh,
        programs: dict[Any, Callable] | None = None,
        rate: float = 1.0,
    ):
        self.config, self.task, self.mesh, self.rate = config, task, mesh, rate
        self.programs = {} if programs is None else programs
        # A schedule, for one, is a part of a program: another rate must not find it.
        same = {k: v for k, v in config.items() if k not in ("seed", "data")}
        self._key = json.dumps([same, rate], sort_keys=True, default=repr)
        steps = config["total_steps"]
        schedule = optimizer.make_schedule(steps, **config["schedule"])
        if rate != 1:
            schedule = optimizer.scaled(schedule, rate)
        self.tx = optimizer.make_optimizer(
            schedule, optimizer.OptimizerConfig(**config["optim"]), steps
        )
        self.skip = SkipConfig(**config.get("skip", {}))
        if self.skip.max_deviations:
            self.tx = optimizer.watching_norm(self.tx)
        decay = ema_decay(steps, **config["ema"]) if task.averaged else None
        self.train_step = make_train_step(
            task,
            self.tx,
            decay,
            schedule,
            config["accumulate"],
            mesh.size,
            self.skip.max_deviations,
        )
        self.abstract = jax.eval_shape(lambda seed: self._init(jax.random.key(seed)), 0)
        places = sharding.shardings(self.abstract, mesh, **config.get("sharding", {}))
        self.abstract = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), self.abstract, places
        )
        self._jit_init = jax.jit(self._init, out_shardings=places)
        self._jit_step = jax.jit(self.train_step, donate_argnums=0, out_shardings=(places, None))

    def at_rate(self, rate: float) -> "Run":
        """The same run with another factor of the schedule, and programs of its own."""
        same = self.config, self.task, self.mesh
        return self if rate == self.rate else type(self)(*same, rate=rate)

    def _init(self, key):
        return init_state(self.task, self.tx, key)

    def init(self, seed: int) -> TrainState:
        """The first state of a seed, sharded over the mesh."""
        with jax.set_mesh(self.mesh):
            key = jax.random.key(seed)
            return distributed.outside_python(self._jit_init.lower(key).compile)(key)

    def program(self, batch: Mapping[str, Any]) -> Callable:
        """The compiled train step for batches of this shape."""
        key = self._key, *sorted((k, v.shape, str(v.dtype)) for k, v in batch.items())
        if key not in self.programs:
            rows = jax.sharding.NamedSharding(self.mesh, sharding.BATCH)
            abstract = {
                k: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=rows) for k, v in batch.items()
            }
            with jax.set_mesh(self.mesh):
                self.programs[key] = self._jit_step.lower(self.abstract, abstract).compile()
            distributed.barrier()  # one found it in its cache, another compiles for minutes
        return self.programs[key]
