"""The promise: a modality in this folder alone trains, resumes, plans, benches, probes and loads.

Every command is run as a user runs it, with the folder above this one in PYTHONPATH.
"""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import data2vec_jax
from data2vec_jax.convert import ours

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parent.parent
ENV = {**os.environ, "PYTHONPATH": f"{ROOT}:tests", "XLA_FLAGS": ""}  # one device
CONFIG = "--config=tests/plugin/sensors_v2.py"
COMMANDS = {
    "data": "plugin.activities runs/activities",
    "train": f"data2vec_jax.train {CONFIG} --workdir=runs/sensors",
    "evaluate": "data2vec_jax.evaluate runs/sensors --json=runs/scores.json",
    "report": "data2vec_jax.report runs/sensors",
    "convert": "data2vec_jax.convert runs/sensors runs/converted --to=jax",
    "plan": f"data2vec_jax.plan {CONFIG} --topology=v5e:2x2 --json=runs/plan.json",
    "bench": f"data2vec_jax.bench {CONFIG} --json=runs/bench.json",
}
pytestmark = pytest.mark.xdist_group("plugin")  # one run for all of them


def run(text, cwd):
    words = [sys.executable, "-m", *text.split()]
    done = subprocess.run(words, cwd=cwd, env=ENV, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def losses(workdir):
    text = (workdir / "metrics.jsonl").read_text() if (workdir / "metrics.jsonl").exists() else ""
    lines = [json.loads(line) for line in text.splitlines() if line.endswith("}")]
    return [(line["step"], line["loss"]) for line in lines if line["split"] == "train"]


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """An empty folder but for `tests`, in which the recordings are made and a model is trained."""
    folder = tmp_path_factory.mktemp("lab")
    (folder / "tests").symlink_to(FOLDER.parent)
    run(COMMANDS["data"], folder)
    assert "done: 120 steps" in run(COMMANDS["train"], folder)
    return folder


def test_it_is_one_small_folder():
    files = [path for path in FOLDER.glob("*.py") if path.name != "test_plugin.py"]
    assert sum(len(path.read_text().splitlines()) for path in files) < 150


def test_the_page_has_these_commands():
    page = (ROOT / "docs/add_a_modality.md").read_text()
    found = [line for line in page.splitlines() if line.startswith("python -m ")]
    assert sorted(found) == sorted(f"python -m {text}" for text in COMMANDS.values())


def test_it_is_stopped_and_resumes_bit_for_bit(lab):
    again = COMMANDS["train"].replace("runs/sensors", "runs/parts")
    process = subprocess.Popen(
        [sys.executable, "-m", *again.split()], cwd=lab, env=ENV, stderr=subprocess.PIPE, text=True
    )
    while process.poll() is None and len(losses(lab / "runs/parts")) < 2:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    said = process.communicate()[1]
    assert process.returncode == 130 and "the same command resumes" in said, said
    run(again, lab)
    whole, parts = losses(lab / "runs/sensors"), losses(lab / "runs/parts")
    assert whole[-1][0] == 120 and np.isfinite([loss for _, loss in whole]).all()
    assert parts == whole
    trees = [ours.open_checkpoint(lab / "runs" / name).tree() for name in ("sensors", "parts")]
    assert trees[0].keys() == trees[1].keys()
    for name, array in trees[0].items():
        np.testing.assert_array_equal(array, trees[1][name], err_msg=name)


def test_it_is_planned(lab):
    said = run(COMMANDS["plan"], lab)
    plan = json.loads((lab / "runs/plan.json").read_text())
    compiled = importlib.util.find_spec("libtpu") is not None
    assert plan["fits"] is (True if compiled else None), said
    assert plan["shapes"]["series"] == [16, 256, 3] and plan["flops_per_step"] > 0


def test_it_is_benched(lab):
    run(COMMANDS["bench"], lab)
    bench = json.loads((lab / "runs/bench.json").read_text())
    assert bench["shapes"]["series"] == [2, 256, 3]
    assert bench["examples_per_second"] > 0 and 0 <= bench["data_wait"] <= 1


def test_its_probe_is_better_than_untrained(lab):
    run(COMMANDS["evaluate"], lab)
    (row,) = json.loads((lab / "runs/scores.json").read_text())
    for probe in ("linear_probe", "knn"):
        trained, untrained = (
            row["scores"][f"test {probe}{which}"]["mean"] for which in ("", " untrained")
        )
        assert trained > untrained + 0.05 and trained > 0.6, row["scores"]  # of five classes
        assert row["verdict"][probe] == "better than untrained"  # it names no hand-made features
        assert row["scores"][f"test {probe}"]["blocks"], "the features that were chosen"
    assert not [name for name in row["scores"] if name.endswith("hand-made")]


def test_it_is_reported(lab):
    run(COMMANDS["report"], lab)
    page = (lab / "runs/sensors/report.html").read_text()
    assert "plugin" in page and "<svg" in page


def test_it_is_converted_and_loaded(lab):
    run(COMMANDS["convert"], lab)
    files = sorted((lab / "runs/activities/test").glob("*/*.npy"))[:2]
    series = np.stack([np.load(path)[:256] for path in files])
    found = [data2vec_jax.load(lab / "runs" / name)(series) for name in ("sensors", "converted")]
    assert found[0].last_hidden_state.shape == (2, 32, 32) and len(found[0].hidden_states) == 4
    for a, b in zip(found[0].hidden_states, found[1].hidden_states, strict=True):
        np.testing.assert_array_equal(a, b)
