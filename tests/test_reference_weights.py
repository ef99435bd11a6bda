"""The weights in the package: they load anywhere without a network, and beat hand-made features."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from configs_for_tests import config_of

import data2vec_jax
from data2vec_jax import train
from data2vec_jax.convert import ours
from data2vec_jax.core import checkpoints
from data2vec_jax.core.errors import UserError
from data2vec_jax.tasks import pretrain, probe

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "data2vec_jax/reference"
NAMES = sorted(path.name for path in FOLDER.iterdir() if path.is_dir())
LIMIT = 6_000_000, 20_000_000  # bytes of one file, and of all


def test_they_are_small():
    sizes = [path.stat().st_size for path in FOLDER.glob("*/model.safetensors")]
    assert sizes and max(sizes) <= LIMIT[0] and sum(sizes) <= LIMIT[1]


@pytest.mark.parametrize("name", NAMES)
def test_they_load_in_an_empty_folder(name, tmp_path):
    program = f"""
import json, data2vec_jax, jax
loaded = data2vec_jax.load("reference:{name}")
leaves = jax.tree.leaves(loaded.params)
print(json.dumps([sum(x.size for x in leaves), sorted({{str(x.dtype) for x in leaves}})]))
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    count, dtypes = json.loads(done.stdout.splitlines()[-1])
    assert dtypes == ["float32"] and count > 100_000
    # Two bytes for each, and the file's table of contents.
    assert 0 < (FOLDER / name / "model.safetensors").stat().st_size - 2 * count < 20_000


def test_an_unknown_name_is_said():
    with pytest.raises(UserError, match=r"no reference weights 'digit'; did you mean 'digits'"):
        data2vec_jax.load("reference:digit")


def test_a_folder_may_be_called_reference(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert checkpoints.located("reference") == "reference"
    assert checkpoints.located(Path("reference/digits")) == Path("reference/digits")
    with pytest.raises(UserError, match="reference does not exist"):
        data2vec_jax.load("reference")


def test_digits_are_read_better_than_from_pixels():
    """1,000 labels of the shipped digits, whose images (not labels) pretraining has seen."""
    loaded = data2vec_jax.load("reference:digits")
    config = config_of("demo", "vision,v2").to_dict()
    modality, _ = pretrain.make_model(config)
    parts = probe.labelled(modality, config, ("train", "test"))
    encode = probe.make_encode(ours.model_of(loaded.config))
    ours_, pixels = (
        probe.probe(encode, loaded.params, *parts, limit=1_000),
        probe.probe_hand_made(modality, *parts, limit=1_000),
    )
    assert ours_["linear_probe"] > pixels["linear_probe"] + 0.03
    assert ours_["knn"] > pixels["knn"]


def test_fine_tuning_starts_from_them(tmp_path):
    config = config_of("finetune_imagenet", "demo").to_dict()
    model = ours.open_checkpoint("reference:digits").config["model"]
    config |= {"total_steps": 1, "eval_every": 0, "model": model}
    config["data"] |= {"eval_split": "", "batch_size": 8}
    config["schedule"] |= {"peak": 0.0}
    state = train.train(config, tmp_path, verbose=False, init_from="reference:digits")
    loaded = data2vec_jax.load("reference:digits")
    np.testing.assert_array_equal(
        state.params["patches"]["kernel"], loaded.params["patches"]["kernel"]
    )
