"""The command line as a user meets it: real processes, Ctrl-C, mistakes."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from configs_for_tests import config_of

from data2vec_jax import train
from data2vec_jax.core import lock
from data2vec_jax.core.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
ONE_DEVICE = os.environ | {"XLA_FLAGS": "", "PYTHONPATH": str(ROOT)}


def command(config, workdir, *options):
    return [
        sys.executable,
        "-m",
        "data2vec_jax.train",
        f"--config={ROOT}/configs/{config}",
        f"--workdir={workdir}",
        *options,
    ]


def run(config, workdir, *options, env=ONE_DEVICE):
    return subprocess.run(
        command(config, workdir, *options), capture_output=True, text=True, env=env, cwd=ROOT
    )


def losses(workdir):
    """(step, loss) of every line; the file's floats are exact."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"], line["grad_norm"]) for line in lines]


SCALARS = {
    "loss",
    "learning_rate",
    "ema_decay",
    "grad_norm",
    "target_std",
    "pred_std",
    "masked_fraction",
    "examples_per_second",
    "mfu",
}


@pytest.fixture(scope="module")
def vision_run(tmp_path_factory):
    """The workdir of vision_v1:smoke, trained by a process with one device."""
    workdir = tmp_path_factory.mktemp("vision")
    done = run("vision_v1.py:smoke", workdir)
    assert done.returncode == 0, done.stderr
    return workdir


SMOKE = [(m, v) for m in ("speech", "vision", "text") for v in (1, 2)] + [("sound", 2)]


@pytest.mark.usefixtures("light_compilation")
@pytest.mark.parametrize("modality,version", SMOKE)
def test_smoke(modality, version, tmp_path, request, capsys):
    name = f"{modality}_v{version}"
    if name == "vision_v1":
        tmp_path = request.getfixturevalue("vision_run")
    else:
        train.train(config_of(name).to_dict(), tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert set(lines[0]) >= SCALARS
    for name in SCALARS - {"learning_rate"}:
        assert all(line[name] > 0 for line in lines), name
    assert all(math.isfinite(line["loss"]) and line["target_std"] > 0.1 for line in lines)
    assert (tmp_path / "config.json").exists() and list(tmp_path.glob("events*"))
    assert list((tmp_path / "checkpoints").iterdir())
    if modality == "text":
        assert list((tmp_path / "tokenizer").iterdir())
    train.train(config_of(f"{modality}_v{version}").to_dict(), tmp_path)
    assert "step 4 of 4" in capsys.readouterr().err


@pytest.mark.usefixtures("light_compilation")
def test_validation_loss(tmp_path):
    config = config_of("vision_v1", eval_every=2).to_dict()
    config["data"]["eval_batches"] = 3
    train.train(config, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    held_out = [line for line in lines if line["split"] == "validation"]
    assert [line["step"] for line in held_out] == [2, 4]
    assert all(0 < line["loss"] < 10 for line in held_out)
    assert held_out[0]["loss"] != held_out[1]["loss"]


def test_ctrl_c_and_again_equals_a_run_never_stopped(tmp_path):
    options = ("--config.total_steps=60", "--config.log_every=1", "--config.checkpoint.every=15")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run("demo.py:speech", whole, *options).returncode == 0

    def interrupt_after(step):
        process = subprocess.Popen(
            command("demo.py:speech", parts, *options),
            env=ONE_DEVICE,
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
        )
        file = parts / "metrics.jsonl"
        while process.poll() is None and not (file.exists() and len(losses(parts)) >= step):
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        return process.wait(), process.stderr.read()

    code, text = interrupt_after(7)
    assert code == 130 and "the same command resumes" in text, text
    first = losses(parts)
    assert 7 <= len(first) < 60
    # A kill -9 leaves no time to save: the next start goes on from the last checkpoint, and lines
    # beyond it are written again.
    process = subprocess.Popen(
        command("demo.py:speech", parts, *options),
        env=ONE_DEVICE,
        cwd=ROOT,
        stderr=subprocess.DEVNULL,
    )
    while process.poll() is None and len(losses(parts)) < 40:
        time.sleep(0.02)
    process.kill()
    process.wait()
    (parts / "metrics.jsonl").open("a").write('{"step": 41, "torn')
    done = run("demo.py:speech", parts, *options)
    assert done.returncode == 0, done.stderr
    assert losses(parts) == losses(whole)  # bit for bit, each step once


def test_two_processes_take_the_same_steps_as_one(vision_run, tmp_path):
    launcher = ["bash", str(ROOT / "launch/local.sh")]
    options = [f"--config={ROOT}/configs/vision_v1.py:smoke", "--config.mesh.fsdp=2"]
    env = {**ONE_DEVICE, "JAX_PLATFORMS": "cpu"}
    if not (ROOT / ".venv/bin/python").exists():  # the launcher would install one
        (tmp_path / "bin").mkdir()
        pytest.fail("run the tests through tests/run.sh, which makes .venv")
    two = tmp_path / "two"
    done = subprocess.run(
        [*launcher, "--processes=2", *options, f"--workdir={two}"],
        env=env,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    for (_, a, g), (_, b, h) in zip(losses(vision_run), losses(two), strict=True):
        assert a == pytest.approx(b, rel=1e-5) and g == pytest.approx(h, rel=1e-4)


MISTAKES = {
    "unknown key": (["--config.model.widht=64"], "width"),
    "unknown nested key": (["--config.data.batchsize=8"], "batch_size"),
    "wrong type": (["--config.total_steps=many"], "total_steps"),
    "missing folder": (["--config.data.source=folder:/nowhere/images"], "/nowhere/images"),
    "unknown source": (["--config.data.source=sample:digits"], "samples"),
    "not divisible": (["--config.accumulate=3"], "multiple of 24"),
    "mesh": (["--config.mesh.fsdp=3"], "fsdp=3"),
    "top_k": (["--config.objective.top_k=9"], "top_k"),
    "steps": (["--config.total_steps=0"], "total_steps"),
    "dtype": (["--config.dtype=float23"], "float32"),
    "unknown flag": (["--confgi=x"], "confgi"),
}


def one_line(text):
    """The message of a refused command: a line of its own, and no traceback."""
    assert "Traceback" not in text, text
    (line,) = text.strip().splitlines()
    return line


@pytest.fixture
def refusal(capsys, monkeypatch):
    """(arguments) -> the message with which the command refuses them, in this process."""

    def refuse(*arguments):
        monkeypatch.setattr(sys, "argv", ["train", *arguments])  # ml_collections reads it, too
        with pytest.raises(SystemExit) as stopped:
            train.main(sys.argv)
        assert stopped.value.code == 2
        return one_line(capsys.readouterr().err)

    return refuse


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_get_one_line_and_exit_code_2(name, tmp_path, refusal):
    options, expected = MISTAKES[name]
    recipe = f"--config={ROOT}/configs/vision_v1.py:smoke"
    assert expected in refusal(recipe, f"--workdir={tmp_path}", *options)


def test_unknown_recipe_and_variant(tmp_path, refusal):
    for recipe, expected in (("vision_v1.py:smok", "smok"), ("visoin_v1.py:smoke", "visoin_v1")):
        config = f"--config={ROOT}/configs/{recipe}"
        assert expected in refusal(config, f"--workdir={tmp_path}")


def test_a_refused_process_ends_with_code_2_and_one_line():
    done = subprocess.run(
        [sys.executable, "-m", "data2vec_jax.train"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=ONE_DEVICE,
    )
    assert done.returncode == 2 and "--config" in one_line(done.stderr)


def test_workdir_of_another_config(vision_run, tmp_path, capsys):
    workdir = tmp_path / "copy"
    shutil.copytree(vision_run, workdir)
    config = config_of("vision_v1").to_dict()
    other = config | {"optim": config["optim"] | {"weight_decay": 0.1}}
    with pytest.raises(UserError, match=r"config\.optim\.weight_decay differs"):
        train.train(other, workdir)
    faster = config | {"data": config["data"] | {"prefetch": 3}}
    train.train(faster, workdir)  # how fast is no part of what
    assert "step 4 of 4" in capsys.readouterr().err


def test_wrong_sample_rate(tmp_path):
    import numpy as np
    import soundfile

    folder = tmp_path / "audio"
    folder.mkdir()
    for i in range(9):
        noise = np.random.default_rng(i).normal(size=100_000) * 0.1
        soundfile.write(folder / f"{i}.wav", noise, 8000)
    config = config_of("speech_v1").to_dict()
    config["data"]["source"] = f"folder:{folder}"
    with pytest.raises(UserError, match=r"8000.*16000"):
        train.train(config, tmp_path / "w")


def test_worker_processes_read_the_same_batches(vision_run, tmp_path):
    done = run("vision_v1.py:smoke", tmp_path, "--config.data.workers=2")
    assert done.returncode == 0, done.stderr
    assert losses(vision_run) == losses(tmp_path)


def test_one_run_at_a_time_in_a_workdir(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "PATIENCE", 0.2)
    config = config_of("vision_v1").to_dict()
    with (
        lock.exclusive(tmp_path),
        pytest.raises(UserError, match=r"another process is at work in .*choose another --workdir"),
    ):
        train.train(config, tmp_path)
    assert not (tmp_path / "config.json").exists()
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, tmp_path], stdout=subprocess.PIPE, env=ONE_DEVICE
    )
    holder.stdout.readline()
    with pytest.raises(UserError, match="another process"), lock.exclusive(tmp_path):
        pass
    holder.kill()
    holder.wait()
    with lock.exclusive(tmp_path):  # a process that was killed holds nothing
        pass


HOLDER = """
import sys, time
from pathlib import Path
from data2vec_jax.core import lock
with lock.exclusive(Path(sys.argv[1])):
    print(flush=True)
    time.sleep(600)
"""


def test_a_config_that_a_full_disk_or_a_kill_would_cut(tmp_path, monkeypatch):
    """config.json is replaced in one move, and not written again where it is the same."""
    config = config_of("vision_v1").to_dict()
    train.claim_workdir(tmp_path, config)
    before = (tmp_path / "config.json").read_bytes()

    def full(path, text):
        path.open("w").close()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    train.claim_workdir(tmp_path, config)
    with pytest.raises(UserError, match="No space left on device"):
        train.claim_workdir(tmp_path, config | {"log_every": 7})
    assert (tmp_path / "config.json").read_bytes() == before


def test_workdirs_that_no_system_can_make(tmp_path):
    for name in ("a" * 300, "a\0b", "caf\udce9"):  # the last is Latin-1, as a system has it
        with pytest.raises(UserError, match="cannot write to --workdir"):
            train.make_workdir(tmp_path / name)
    for name in ("rate=[1e-3]", "what?/run", "*"):  # orbax would lose its own files in them
        with pytest.raises(UserError, match="no checkpoint could be read again"):
            train.make_workdir(tmp_path / name)
    assert not any(tmp_path.iterdir())
    (tmp_path / "config.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match=r"config\.json is damaged"):
        train.claim_workdir(tmp_path, {})
