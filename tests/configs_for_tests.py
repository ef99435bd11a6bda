"""What test files share: recipes by name, items as a source, runs of a few steps, modules."""

import importlib
import importlib.util
import json
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp
import pytest

from data2vec_jax import train
from data2vec_jax.core import distributed, sharding
from data2vec_jax.core.run import Run
from data2vec_jax.data.sources import Source
from data2vec_jax.tasks import pretrain

ROOT = Path(__file__).resolve().parent.parent


class Items(Source):
    """A source of items that are in memory. field: of the signal, whose lengths are measured."""

    def __init__(self, items, uri="items", split="train", field="audio"):
        super().__init__(uri, split, codec=None)
        self.held, self.signal = items, field

    def __len__(self):
        return len(self.held)

    def _load(self, i):
        return self.held[i]

    def lengths(self):
        return np.array([len(item[self.signal]) for item in self.held])


def config_of(name, variant="smoke", **changes):
    """The config of a recipe's variant, with other values for some of its options."""
    config = importlib.import_module(f"data2vec_jax.configs.{name}").get_config(variant)
    config.update(changes)
    return config


def module_of(path):
    """A file of the repository as a module that nobody else has."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def quiet(config):
    """A config without any dropout, and with a rate at which the first update moves."""
    config = config.to_dict()
    encoder = dict(dropout=0.0, attention_dropout=0.0, layerdrop=0.0, drop_path=0.0)
    config["model"] |= {"encoder": config["model"]["encoder"] | encoder, "dropout": 0.0}
    if "decoder" in config["model"]:
        config["model"]["decoder"]["dropout"] = 0.0
    config["schedule"] |= {"peak": 1e-3, "warmup": 0.0}
    return config


def run_steps(config, mesh_shape, steps=2):
    data, fsdp = mesh_shape
    mesh = sharding.make_mesh(data, fsdp, devices=jax.devices()[: data * fsdp])
    with jax.set_mesh(mesh):
        task = pretrain.make(config)
        run = Run(config, task, mesh)
        state, scalars = run.init(0), []
        for _, batch in zip(range(steps), task.data(0), strict=False):
            state, metrics = run.program(batch)(state, batch)
            scalars.append(jax.device_get(metrics))
    return jax.device_get(state.params), scalars, run


def assert_close(params, other, limit):
    """Relative L2 error of each tensor; the true gradient of key biases is zero, and Adam turns
    its rounding noise into steps, so theirs is not compared."""
    for (path, a), b in zip(jax.tree.leaves_with_path(params), jax.tree.leaves(other), strict=True):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name.endswith("qkv/bias"):
            queries, _, values = np.split(np.stack([a, b]), 3, axis=-1)
            a, b = np.concatenate([queries, values], axis=-1)
        assert np.linalg.norm(a - b) / (np.linalg.norm(a) + 1e-6) < limit, name


def losses_whole_and_in_parts(config, folder, monkeypatch):
    """[(step, loss)] of a run in `folder`/whole, and of the same run stopped after 2 updates."""
    programs, stops = {}, distributed.Interrupt.stops
    train.train(config, folder / "whole", programs=programs, verbose=False)
    monkeypatch.setattr(distributed.Interrupt, "stops", lambda self, step: step == 2)
    with pytest.raises(SystemExit):
        train.train(config, folder / "parts", programs=programs, verbose=False)
    monkeypatch.setattr(distributed.Interrupt, "stops", stops)
    train.train(config, folder / "parts", programs=programs, verbose=False)
    lines = [
        [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("whole", "parts")
    ]
    return [[(line["step"], line["loss"]) for line in part] for part in lines]


def state_of(workdir, step):
    """Every array of a checkpoint, read by orbax alone, on any number of devices."""
    folder = workdir / f"checkpoints/{step}"
    shapes = ocp.metadata(folder, checkpointable_name="state").metadata
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), shapes)
    found = {}
    tree = ocp.load(folder, abstract, checkpointable_name="state")
    for path, leaf in jax.tree.leaves_with_path(tree):
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        found[jax.tree_util.keystr(path)] = np.asarray(leaf)
    return found
