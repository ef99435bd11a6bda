"""Notices to a trainer at every stage: real processes, real signals, a terminal that is closed."""

import fcntl
import json
import os
import pty
import re
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# One device, as a user's machine has.
ENV = os.environ | {"XLA_FLAGS": "", "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
TRAINER = [sys.executable, "-m", "data2vec_jax.train"]
pytestmark = pytest.mark.xdist_group("signals")  # one after the other

# The trainer, whose batch of step 6 does not come within an hour.
STUCK = """
import time
from data2vec_jax import train
from data2vec_jax.data import batches

read = batches.HostBatchReader.__call__
def stuck(self, n):
    if n == 5:
        time.sleep(3600)
    return read(self, n)

batches.HostBatchReader.__call__ = stuck
train.main()
"""

# The trainer, which writes to a file where it was if it aborts.
TRACED = """
import faulthandler, sys
faulthandler.enable(open(sys.argv.pop(1), "w"))
from data2vec_jax import train
train.main()
"""


BEGUN = []


@pytest.fixture(autouse=True)
def _no_process_is_left():
    yield
    while BEGUN:
        BEGUN.pop().kill()


def start(command, workdir, **how):
    arguments = ["--config=vision_v1:smoke", f"--workdir={workdir}", "--config.total_steps=100000"]
    how = {"stderr": subprocess.PIPE, "env": ENV} | how
    BEGUN.append(subprocess.Popen([*command, *arguments], text=True, cwd=ROOT, **how))
    return BEGUN[-1]


def read_until(process, pattern):
    """Its lines on stderr up to the first that matches."""
    lines = []
    for line in process.stderr:
        lines.append(line)
        if re.search(pattern, line):
            return lines
    pytest.fail(f"no line {pattern}, code {process.wait()}:\n{''.join(lines)}")


def end(process):
    """Exit code, and the rest of its stderr in lines."""
    _, text = process.communicate(timeout=300)
    return process.returncode, text.splitlines()


def steps(workdir):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["step"] for line in lines]


def saved(workdir):
    return [int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit()]


def await_step(process, workdir, step):
    file = workdir / "metrics.jsonl"
    while process.poll() is None and not (file.exists() and len(steps(workdir)) >= step):
        time.sleep(0.05)
    assert process.poll() is None


def catches(pid, number):
    """Whether a process has a handler of a signal (Linux)."""
    caught = re.search(r"^SigCgt:\s*(\w+)", Path(f"/proc/{pid}/status").read_text(), re.M)[1]
    return bool(int(caught, 16) >> (number - 1) & 1)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_notice_while_python_imports(number, tmp_path):
    process = start(TRAINER, tmp_path / "run")
    while not catches(process.pid, number):
        time.sleep(0.001)
    process.send_signal(number)
    code, lines = end(process)
    assert (code, lines) == (
        130,
        [f"stopped by {number.name}, with no step under way; checkpoints are as they were"],
    )
    assert not (tmp_path / "run").exists()


def test_a_notice_while_the_step_is_compiled(tmp_path):
    env = ENV | {"JAX_ENABLE_COMPILATION_CACHE": "0"}
    process = start(TRAINER, tmp_path, env=env)
    read_until(process, "step 0 of 100,000")
    while not (tmp_path / "clock.json").exists():  # a second after the start of the loop
        time.sleep(0.05)
    sent = time.monotonic()
    process.send_signal(signal.SIGTERM)
    code, lines = end(process)
    assert time.monotonic() - sent < 5
    assert code == 130
    assert lines[0] == "SIGTERM: stopping after this step, with a checkpoint"
    assert lines[1].startswith("goodput 0 % of ") and len(lines) == 3
    assert lines[2] == "stopped before the first of 100,000 steps; nothing was saved"
    assert saved(tmp_path) == []


def test_two_notices_while_no_batch_comes(tmp_path):
    (tmp_path / "stuck.py").write_text(STUCK)
    process = start([sys.executable, tmp_path / "stuck.py"], tmp_path / "run")
    await_step(process, tmp_path / "run", 4)  # the fifth line is written one step late
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    read_until(process, "SIGTERM: stopping")
    process.send_signal(signal.SIGTERM)
    code, lines = end(process)
    assert code == 130
    assert lines[0] == "SIGTERM is ignored: the run is stopping, and its checkpoint is saved"
    assert lines[-1] == "stopped after step 5 of 100,000; the same command resumes"
    assert saved(tmp_path / "run") == [5] and steps(tmp_path / "run") == [1, 2, 3, 4, 5]


def test_a_terminal_that_is_closed(tmp_path):
    ours, theirs = pty.openpty()

    def take_terminal():
        fcntl.ioctl(theirs, termios.TIOCSCTTY, 0)

    run, trace = tmp_path / "run", tmp_path / "trace"
    traced = [sys.executable, "-c", TRACED, trace]
    how = dict(stdin=theirs, stdout=theirs, stderr=theirs)
    process = start(traced, run, **how, start_new_session=True, preexec_fn=take_terminal)
    os.close(theirs)
    await_step(process, run, 3)
    os.close(ours)  # the kernel sends SIGHUP
    assert process.wait(timeout=300) == 130, trace.read_text()
    assert saved(run) == [max(steps(run))]


def test_two_notices_to_the_launcher_of_two_processes(tmp_path):
    launcher = [sys.executable, ROOT / "launch/processes.py", "2", "1"]
    process = start(launcher, tmp_path)
    await_step(process, tmp_path, 3)
    process.send_signal(signal.SIGHUP)
    read_until(process, "SIGINT: stopping")
    process.send_signal(signal.SIGTERM)
    code, lines = end(process)
    assert code == 130
    assert "SIGHUP is ignored: the run is stopping, and its checkpoint is saved" in lines
    last = max(steps(tmp_path))
    assert lines[-1] == f"stopped after step {last:,} of 100,000; the same command resumes"
    assert saved(tmp_path) == [last]
