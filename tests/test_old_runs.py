"""Workdirs that older code made, in tests/fixtures/old_runs: today's code resumes and reads them.

Each holds checkpoint 2 of 4 and the metrics of all four steps; made at commit 0f965e3 by

    train --config=configs/vision_v2.py:smoke --workdir=vision           (a smaller network)
    train --config=configs/finetune_imagenet.py:smoke --workdir=classify --start=vision
    train --config=configs/finetune_librispeech.py:smoke --workdir=ctc
    train --config=configs/text_v1.py:smoke --workdir=text

with the options below, by the names that they had then.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import data2vec_jax
from data2vec_jax.convert.__main__ import main as convert
from data2vec_jax.core import checkpoints
from data2vec_jax.core.config import RENAMED, current_name, with_current_names
from data2vec_jax.metrics.writer import FILE, read_lines
from data2vec_jax.report.__main__ import main as report

ROOT = Path(__file__).resolve().parent.parent
OLD = Path(__file__).parent / "fixtures/old_runs"
COMMON = ("checkpoint.every=2", "checkpoint.keep=2", "eval_every=0", "model.width=16")
SMALL = (*COMMON, "model.encoder.heads=2", "model.encoder.mlp=16", "model.encoder.depth=2")
RUNS = {
    "vision": ("vision_v2", (*SMALL, "model.decoder.width=16", "model.decoder.layers=1")),
    "classify": (
        "finetune_imagenet",
        (*COMMON[:3], "model_changes.encoder.drop_path=0.2", "layers.decay=0.7"),
    ),
    "text": (
        "text_v1",
        (
            *SMALL,
            "model.vocab_size=400",
            "examples.vocab_size=400",
            "model.leave=0.1",
            "model.random=0.1",
        ),
    ),
    "ctc": (
        "finetune_librispeech",
        (
            *SMALL[:-1],
            "model.encoder.depth=1",
            "model.positions.depth=1",
            "data.multiple=4",
            "data.batch_size=4",
        ),
    ),
}


@pytest.fixture
def old(tmp_path, monkeypatch):
    """A folder with a copy of the workdirs; the working directory, as their paths are relative."""
    shutil.copytree(OLD, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_old_runs_resume(old):
    """The losses are the old code's, but for the rounding of float32."""
    commands = [
        [
            "train",
            f"--config={ROOT}/data2vec_jax/configs/{config}.py:smoke",
            f"--workdir={name}",
            *(["--start=vision"] if name == "classify" else []),
            *(f"--config.{option}" for option in options),
        ]
        for name, (config, options) in RUNS.items()
    ]
    program = "import sys, json; from data2vec_jax.train import main\n"
    program += "for command in json.loads(sys.argv[1]): main(command)"
    done = subprocess.run(  # with one device, as they were made
        [sys.executable, "-c", program, json.dumps(commands)],
        # Each program runs twice: one that is compiled lightly is the faster one.
        env=os.environ
        | {"XLA_FLAGS": "", "PYTHONPATH": str(ROOT), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    for name in RUNS:
        before, after = (
            [line for line in read_lines(folder / name / FILE) if line["split"] == "train"]
            for folder in (OLD, old)
        )
        assert [line["step"] for line in after] == [1, 2, 3, 4]
        for key in ("loss", "grad_norm", "learning_rate"):
            numbers = ([line[key] for line in lines] for lines in (after, before))
            # Another processor, XLA or number of cores rounds sums otherwise, and later steps
            # amplify that: 3e-5 of a norm of gradients was seen.
            np.testing.assert_allclose(*numbers, rtol=1e-4, err_msg=f"{name} {key}")
        stored = json.loads((old / name / "config.json").read_text())
        for gone in RENAMED:
            section, _, key = gone.rpartition(".")
            assert key not in (stored.get(section, {}) if section else stored), gone


@pytest.mark.parametrize("name", RUNS)
def test_an_old_run_is_read(name, old):
    config = checkpoints.load_config(name)
    assert ("init_from" in config) == ("layerwise_lr" in config) == (name == "classify")
    assert config["model"].get("keep_prob") == (0.1 if name == "text" else None)
    assert config["data"].get("rows_multiple_of") == (4 if name == "ctc" else None)
    assert checkpoints.load_params(name)["encoder"]
    model = data2vec_jax.load(name)
    assert model.config["modality"] == config["modality"]
    convert([name, f"{name}_jax", "--to=jax"])
    report([name])
    assert (old / name / "report.html").exists()


def test_names_of_options():
    assert current_name("data.multiple") == "data.rows_multiple_of"
    assert current_name("model_changes.random") == "model_overrides.replace_prob"
    assert current_name("layers.decay") == "layerwise_lr.decay"
    assert current_name("model.encoder.layers") == "model.encoder.layers"


@pytest.mark.parametrize("old, action", [(True, "stop"), (False, "warn"), ("True", "stop")])
def test_an_old_switch_is_read(old, action):
    config = with_current_names({"collapse": {"abort": old, "after": 7}})
    assert config == {"collapse": {"action": action, "after": 7}}
    assert with_current_names({"collapse": {"action": "stop"}}) == {"collapse": {"action": "stop"}}
