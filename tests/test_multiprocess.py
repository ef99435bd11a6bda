"""Real processes on this machine: the same steps, stopped, resumed, and failing together."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import many_steps
import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
TESTS, LAUNCHER = ROOT / "tests", ROOT / "launch/processes.py"
# Lightly compiled, as in this process, see conftest.py.
ENV = os.environ | {"PYTHONPATH": f"{ROOT}:{TESTS}", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
pytestmark = [
    pytest.mark.xdist_group("processes"),  # one after the other, with one module fixture
    pytest.mark.usefixtures("light_compilation"),
]


def launch(script, arguments, processes=1, devices=1, **options):
    """The launcher as a process of its own: `processes` x `script` with `arguments`."""
    code = "import sys, processes; sys.exit(processes.run(sys.argv[3:], *map(int, sys.argv[1:3])))"
    command = [sys.executable, *map(str, script), *map(str, arguments)]
    return subprocess.Popen(
        [sys.executable, "-c", code, str(processes), str(devices), *command],
        cwd=ROOT,
        env=ENV | {"PYTHONPATH": f"{ENV['PYTHONPATH']}:{LAUNCHER.parent}"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def finish(process):
    """Exit code and stderr."""
    _, text = process.communicate(timeout=600)
    return process.returncode, text


# The same steps everywhere ------------------------------------------------------------------------

# (processes, devices of each) -> (data, fsdp) of each recipe
TOPOLOGIES = {
    (1, 1): {"speech_v1": (1, 1), "vision_v2": (1, 1)},
    (1, 8): {"speech_v1": (2, 4), "vision_v2": (8, 1)},
    (2, 2): {"speech_v1": (2, 2)},
    (4, 1): {"vision_v2": (2, 2)},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """(processes, devices) -> recipe -> what `many_steps.take_steps` found."""
    found = {}
    for (processes, devices), meshes in TOPOLOGIES.items():
        if processes == 1:
            some = jax.devices()[:devices]
            took = {name: many_steps.take_steps(name, *mesh, some) for name, mesh in meshes.items()}
        else:
            folder = tmp_path_factory.mktemp("steps")
            jobs = [f"{name}:{data},{fsdp}" for name, (data, fsdp) in meshes.items()]
            script = [TESTS / "many_steps.py"]
            code, text = finish(launch(script, [folder, *jobs], processes, devices))
            assert code == 0, text
            took = {name: dict(np.load(folder / f"{name}.npz")) for name in meshes}
        found[processes, devices] = took
    return found


@pytest.mark.parametrize(
    "topology, recipe",
    [(topology, recipe) for topology in list(TOPOLOGIES)[1:] for recipe in TOPOLOGIES[topology]],
    ids=lambda x: x if isinstance(x, str) else f"{x[0]}x{x[1]}",
)
def test_twenty_steps_are_the_same_everywhere(runs, recipe, topology):
    one, other = runs[1, 1][recipe], runs[topology][recipe]
    assert one.keys() == other.keys()
    moved = []
    for name, a in one.items():
        b = other[name]
        kind = name.split("/")[0]
        if kind in ("ids", "masks"):
            np.testing.assert_array_equal(a, b, name)
        elif kind == "loss":
            assert abs(a - b) <= 1e-5 * abs(a), name
        else:
            if name.endswith("qkv/bias"):  # the true gradient of keys' biases is zero
                (a, b) = (np.delete(np.stack(np.split(x, 3, -1)), 1, 0) for x in (a, b))
            error = np.linalg.norm(a - b) / (np.linalg.norm(a) + 1e-30)
            assert error <= 1e-4, (name, error)
            moved.append(error > 0)
    assert sum(name.startswith("loss") for name in one) == many_steps.STEPS
    assert any(moved) and one["masks/0"].any()
    assert not np.array_equal(one["ids/0"], one["ids/1"])


# Stopped and resumed ------------------------------------------------------------------------------


def noted(path):
    """step -> example ids of the whole batch, from the notes of all processes."""
    rows = {}
    for file in path.parent.glob(f"{path.name}.*"):
        for line in file.read_text().splitlines():
            step, blocks = json.loads(line)
            for start, ids in blocks:
                assert (step, start) not in rows, "a step was taken twice"
                rows[step, start] = ids
    batches = {}
    for step, start in sorted(rows):
        batches.setdefault(step, []).extend(rows[step, start])
    return batches


def losses(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if line["split"] == "train"}


TOTAL = 100


def train(folder, *options, pause=0.0):
    """Script and arguments of a run in `folder`/run that notes what it consumes."""
    return [TESTS / "noting_train.py", folder / "notes", pause], [
        f"--config={ROOT}/configs/vision_v1.py:smoke",
        f"--workdir={folder / 'run'}",
        f"--config.total_steps={TOTAL}",
        *options,
    ]


def await_step(process, workdir, step):
    file = workdir / "metrics.jsonl"
    while process.poll() is None and not (file.exists() and len(losses(workdir)) >= step):
        time.sleep(0.05)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run of one process that nobody stopped."""
    folder = tmp_path_factory.mktemp("whole")
    code, text = finish(launch(*train(folder)))
    assert code == 0, text
    return folder


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run of 4 processes with fsdp=4 that Ctrl-C stopped: its folder, exit code, stderr."""
    folder = tmp_path_factory.mktemp("stopped")
    process = launch(*train(folder, "--config.mesh.fsdp=4", pause=0.1), processes=4)
    await_step(process, folder / "run", 5)
    process.send_signal(signal.SIGINT)
    return folder, *finish(process)


def test_ctrl_c_stops_all_after_the_same_step(stopped):
    folder, code, text = stopped
    assert code == 130, text
    step = max(losses(folder / "run"))
    assert 5 <= step < TOTAL
    assert f"stopped after step {step:,} of {TOTAL:,}; the same command resumes" in text
    assert "Traceback" not in text
    assert [int(p.name) for p in (folder / "run/checkpoints").iterdir()] == [step]
    notes = [(folder / f"notes.{i}").read_text().splitlines() for i in range(4)]
    assert [json.loads(lines[-1])[0] for lines in notes] == [step] * 4


@pytest.mark.parametrize("processes, fsdp", [(1, 1), (2, 2)], ids=lambda n: str(n))
def test_other_processes_resume_with_the_next_batch(whole, stopped, processes, fsdp, tmp_path):
    folder = tmp_path / "again"
    shutil.copytree(stopped[0], folder)
    step = max(losses(folder / "run"))
    options = train(folder, f"--config.mesh.fsdp={fsdp}")
    code, text = finish(launch(*options, processes=processes))
    assert code == 0 and f"step {step:,} of {TOTAL:,}" in text, text
    assert noted(folder / "notes") == noted(whole / "notes")  # each example in its place, once
    ours, theirs = losses(folder / "run"), losses(whole / "run")
    assert list(ours) == list(theirs) == list(range(1, TOTAL + 1))
    np.testing.assert_allclose(list(ours.values()), list(theirs.values()), rtol=1e-4)


def test_sigterm_to_one_process_stops_all_and_the_same_command_resumes(tmp_path):
    options = train(tmp_path, pause=0.1)
    process = launch(*options, processes=2)
    await_step(process, tmp_path / "run", 3)
    (_, second) = children(process)
    os.kill(second, signal.SIGTERM)
    code, text = finish(process)
    assert code == 130 and "the same command resumes" in text, text
    step = max(losses(tmp_path / "run"))
    process = launch(*options, processes=2)
    await_step(process, tmp_path / "run", step + 2)
    process.send_signal(signal.SIGTERM)
    code, text = finish(process)
    assert code == 130 and f"step {step} of {TOTAL}" in text, text
    assert list(losses(tmp_path / "run")) == list(range(1, max(noted(tmp_path / "notes")) + 1))


# Failing together ---------------------------------------------------------------------------------


def children(process):
    """Process ids of the launcher's children, in order."""
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True)
    return sorted(map(int, found.stdout.split()))


def test_a_death_ends_all(tmp_path):
    """Of the first; faults/test_many_processes.py kills the second."""
    process = launch(*train(tmp_path, pause=0.1), processes=2)
    await_step(process, tmp_path / "run", 3)
    pids = children(process)
    os.kill(pids[0], signal.SIGKILL)
    code, text = finish(process)
    assert code == 137, text
    assert "process 0 ended with code 137; the others were stopped" in text
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


FAILS = """
import sys
from data2vec_jax import train
from data2vec_jax.core import distributed
from data2vec_jax.core.errors import UserError
from data2vec_jax.data import batches

read = batches.HostBatchReader.__call__
def fail(self, n):
    if n == 3 and not distributed.is_main_process():
        raise eval(sys.argv[1])
    return read(self, n)

batches.HostBatchReader.__call__ = fail
train.main(["train", *sys.argv[2:]])
"""


@pytest.mark.parametrize(
    "error, code, line",
    [
        ("UserError('a bad file')", 2, "error: a bad file"),
        ("ValueError('a bug')", 1, "ValueError: a bug"),
    ],
)
def test_one_that_fails_alone_does_not_leave_the_others_waiting(error, code, line, tmp_path):
    _, options = train(tmp_path)
    found, text = finish(launch(["-c", FAILS, error], options, processes=2))
    assert found == code, text
    assert line in text and f"process 1 ended with code {code}" in text


def test_a_mistake_is_one_line(tmp_path):
    """Though each process finds it; test_train has more mistakes, in one process."""
    _, common = train(tmp_path)
    options = [*common, "--config.mesh.fsdp=3"]
    code, text = finish(launch(["-m", "data2vec_jax.train"], options, processes=2))
    assert code == 2, text
    assert "fsdp=3 does not use the 2 devices; use data=-1 and fsdp=2" in text
    assert len(text.strip().splitlines()) == 1, text


@pytest.mark.parametrize(
    "last, expected",
    [
        ("--config.optim.clip=3.5", "config.optim.clip is 3.0 in process 0 and 3.5 in process 2"),
        ("--workdir=/tmp/elsewhere", "workdir is "),
    ],
)
def test_processes_with_different_configs_refuse_to_start(last, expected, tmp_path):
    sys.path.insert(0, str(LAUNCHER.parent))
    import processes as launcher

    _, common = train(tmp_path)
    env = launcher.environment(3, 1) | {"PYTHONPATH": ENV["PYTHONPATH"]}
    command = [sys.executable, "-m", "data2vec_jax.train", *common]
    started = [
        subprocess.Popen(
            [*command, *([last] if i == 2 else [])],
            env=env | {"PROCESS_ID": str(i)},
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(3)
    ]
    for process in started:
        code, text = finish(process)
        assert code == 2, text
        assert expected in text and len(text.strip().splitlines()) == 1, text
    assert not (tmp_path / "run").exists()
