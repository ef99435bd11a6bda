"""What is measured: the train step of a config, on random input of its longest examples."""

import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from data2vec_jax.bench.measure import own_cache
from data2vec_jax.core import sharding
from data2vec_jax.core.errors import UserError
from data2vec_jax.core.run import Run
from data2vec_jax.modalities import contract
from data2vec_jax.tasks import pretrain
from data2vec_jax.tasks.registry import check_config

PAPER_DEVICES = 16  # that the configs' global batches are meant for


def sized(config: Mapping[str, Any], rows: int | None, devices: Sequence[Any]) -> dict[str, Any]:
    """A copy of `config` with a batch of `rows` (None: the default), one length of examples."""
    config = json.loads(json.dumps(config))
    scale = contract.get(config["modality"]).bench
    cpu = devices[0].platform == "cpu"
    config["examples"] = scale.one_length(config["examples"], cpu)
    if rows is None and cpu:
        rows = scale.cpu_rows
    elif rows is None:
        rows = default_rows(config) * len(devices)
    replaced = {"batch_size": rows, "rows_multiple_of": None, "eval_split": None}
    config["data"] = config["data"] | replaced
    return config


def default_rows(config: Mapping[str, Any]) -> int:
    """Rows of a batch on one accelerator, where nobody says."""
    return max(config["data"]["batch_size"] // PAPER_DEVICES, 1)


def fake_batch(
    shapes: Mapping[str, jax.ShapeDtypeStruct], config: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    """Random arrays of these shapes, without padding."""
    rng = np.random.default_rng(config["seed"])
    least, most = contract.get(config["modality"]).bench.integers(config["model"])

    def array(name, s):
        if name == "example_id":
            return np.arange(s.shape[0], dtype=s.dtype)
        if np.issubdtype(s.dtype, np.integer):
            return rng.integers(least, most, s.shape).astype(s.dtype)
        return rng.standard_normal(s.shape).astype(s.dtype)

    return {name: array(name, s) for name, s in shapes.items()}


class Subject:
    """The train step of a config, and a state and a batch to run it on.

    `compile` comes before `steps`.
    """

    def __init__(self, config: Mapping[str, Any], devices: Sequence[Any]):
        check_config(config)
        if config.get("task", "pretrain") != "pretrain":
            raise UserError(f"config.task: bench runs pretraining, not '{config['task']}'")
        section = config["mesh"] if len(devices) > 1 else {}
        self.config, self.mesh = config, sharding.make_mesh(**section, devices=devices)
        self.modality, self.model = pretrain.make_model(config)
        self.objective, self.sampler = pretrain.make_objective(config, self.modality, self.model)
        self.clones = config["objective"].get("clones", 1)
        run = self._run()
        self.shapes = run.task.shapes[-1]
        self.rows = self.shapes["example_id"].shape[0]
        self.flops = run.task.flops(self.shapes)
        self.state = run.init(config["seed"])
        self.host_batch = fake_batch(self.shapes, config)
        self.batch = sharding.to_global(self.host_batch, self.mesh)

    def _run(self):
        with jax.set_mesh(self.mesh):
            return Run(self.config, pretrain.abstract_task(self.config), self.mesh)

    def compile(self, times: int) -> list[float]:
        """Makes the program `times` times; seconds of each, the first with an empty cache, the
        others with the one that it left."""
        seconds = []
        with own_cache():
            for _ in range(times):
                run = self._run()  # nothing traced yet
                start = time.perf_counter()
                self.program = run.program(self.shapes)
                seconds.append(time.perf_counter() - start)
        return seconds

    def steps(self, count: int) -> None:
        """Train steps as the loop runs them: the device is waited for at the end only."""
        for _ in range(count):
            self.state, scalars = self.program(self.state, self.batch)
        jax.block_until_ready((self.state, scalars))
