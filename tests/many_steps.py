"""Takes training steps and writes down all that must not depend on where they ran.

Run by test_multiprocess.py in its own process and, as a script, in each process of a larger run:

    python tests/many_steps.py FOLDER NAME:DATA,FSDP ...
"""

import dataclasses
import sys
from pathlib import Path

import jax
import numpy as np
from configs_for_tests import config_of
from jax.experimental import multihost_utils

from data2vec_jax import masking
from data2vec_jax.core import distributed, sharding
from data2vec_jax.core.run import Run
from data2vec_jax.tasks import pretrain

STEPS = 20


def config(name):
    """The smoke config of a recipe with every dropout on, and tiny weights split as well."""
    config = config_of(name)
    config.model.encoder.update(dropout=0.1, attention_dropout=0.1, layerdrop=0.1)
    config.total_steps = STEPS
    return config.to_dict() | {"sharding": {"min_size": 256}}


def showing_masks(loss):
    """`loss` with the masks that it drew among its metrics."""
    draw, drawn = masking.sample, []

    def sample(*args):
        drawn.append(draw(*args))
        return drawn[-1]

    def wrapped(params, teacher, batch, given):
        masking.sample = sample
        try:
            total, count, metrics = loss(params, teacher, batch, given)
        finally:
            masking.sample = draw
        return total, count, metrics | {"masks": drawn.pop()}

    return wrapped


def take_steps(name, data, fsdp, devices=None):
    """Example ids and masks of each step, losses, and the last parameters, whole, as numpy."""
    options = config(name)
    devices = jax.devices() if devices is None else devices
    if 1 < jax.local_device_count() < len(devices):
        # As on TPU pods, where a process holds rows of a batch that are not adjacent.
        devices = [*devices[::2], *devices[1::2]]
    mesh = sharding.make_mesh(data, fsdp, devices=devices)

    def whole(tree):
        distributed.barrier()  # this compiles
        return multihost_utils.process_allgather(tree, tiled=True)

    found = {}
    with jax.set_mesh(mesh):
        task = pretrain.make(options)
        task = dataclasses.replace(task, loss=showing_masks(task.loss))
        run = Run(options, task, mesh)
        state = run.init(options["seed"])
        for step, batch in enumerate(task.data(0)):
            state, metrics = run.program(batch)(state, batch)
            found[f"ids/{step}"] = whole(batch["example_id"])
            found[f"masks/{step}"] = whole(metrics["masks"])
            found[f"loss/{step}"] = whole(metrics["loss"])
        assert int(state.step) == STEPS
        if fsdp > 1:
            split = [not x.is_fully_replicated for x in jax.tree.leaves(state.params)]
            assert sum(split) > len(split) / 4  # or nothing was tested
        for path, x in jax.tree.leaves_with_path(whole(state.params)):
            found["params/" + jax.tree_util.keystr(path, simple=True, separator="/")] = x
    return found


if __name__ == "__main__":
    distributed.start()
    for job in sys.argv[2:]:
        name, _, sizes = job.partition(":")
        found = take_steps(name, *map(int, sizes.split(",")))
        if distributed.is_main_process():
            np.savez(Path(sys.argv[1]) / f"{name}.npz", **found)
    distributed.barrier()
