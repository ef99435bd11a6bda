"""The train step of a config, compiled, and the memory that it takes."""

import re
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from data2vec_jax.core.run import Run
from data2vec_jax.tasks.registry import task_module


class Compiled(NamedTuple):
    """program: None if it does not fit. memory: bytes of one device. seconds: to compile, on the
    clock and of all cores together."""

    program: Any
    memory: dict[str, float]
    seconds: tuple[float, float]

    @property
    def total(self) -> float:
        return self.memory["total"]

    def fits(self, room: float | None) -> bool:
        """Whether the compiler took it, and it fits into `room` bytes if the compiler has no limit
        of its own (GPUs)."""
        return self.program is not None and (room is None or self.total <= room)


class Step:
    """The train step of a config on a mesh, with its largest batch, before it is compiled.

    state_bytes: of the state and the batch on one device.
    """

    def __init__(self, config: Mapping[str, Any], mesh: jax.sharding.Mesh):
        with jax.set_mesh(mesh):
            config = task_module(config).resolve_config(config)
            task = task_module(config).abstract_task(config)
            self.run = Run(config, task, mesh)
        self.batch = task.shapes[-1]
        self.rows = self.batch["example_id"].shape[0]
        self.flops = task.flops(self.batch)
        leaves = jax.tree.leaves(self.run.abstract)
        self.parameters = sum(x.size for x in jax.tree.leaves(self.run.abstract.params))
        state = sum(x.dtype.itemsize * np.prod(x.sharding.shard_shape(x.shape)) for x in leaves)
        rows = sum(v.dtype.itemsize * v.size for v in self.batch.values()) / mesh.size
        self.state_bytes = int(state + rows)

    def compile(self) -> Compiled:
        """The program, or what libtpu says of its size."""
        start = time.perf_counter(), time.process_time()

        def seconds():
            return time.perf_counter() - start[0], time.process_time() - start[1]

        try:
            program = self.run.program(self.batch)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            used = exhausted(str(error))
            memory = {
                "arguments": self.state_bytes,
                "temporaries": max(used - self.state_bytes, 0),
                "output": self.state_bytes,
                "total": used,
            }
            return Compiled(None, memory, seconds())
        took = seconds()
        m = program.memory_analysis()
        memory = {
            "arguments": m.argument_size_in_bytes,
            "temporaries": m.temp_size_in_bytes,
            "output": m.output_size_in_bytes,
            # When most is held, arguments included; temporaries, not all held at once, can sum to
            # more.
            "total": m.peak_memory_in_bytes + m.generated_code_size_in_bytes,
        }
        return Compiled(program, memory, took)


def exhausted(message: str) -> float:
    """Bytes that a refused program would use, from libtpu's message; nan if it does not say."""
    found = re.search(r"Used ([\d.]+)([KMGT]?) of", message)
    found = found or re.search(r"\(([\d.]+)([KMGT]?)\) exceeds", message)
    if not found:
        return float("nan")
    return float(found[1]) * 1024.0 ** " KMGT".index(found[2] or " ")
