"""Readers that are killed, stopped, stuck or left alone: real processes and real signals."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from data2vec_jax.core.errors import UserError
from data2vec_jax.data import readers

ROOT = Path(__file__).resolve().parents[2]
SHARED_MEMORY = Path("/dev/shm")
pytestmark = pytest.mark.xdist_group("readers")  # one after the other


def batch(n):
    """What a reader gives: large enough to fill a socket, and different in each batch."""
    return {"x": np.random.default_rng(n).random((300, 300)), "reader": np.array(os.getpid())}


class Stuck:
    """`batch`, but batch `stuck` opens a FIFO that nobody writes to."""

    def __init__(self, fifo, stuck):
        self.fifo, self.stuck = fifo, stuck

    def __call__(self, n):
        if n == self.stuck:
            open(self.fifo).close()
        return batch(n)


class Fails:
    """`batch`, but batch 3 raises."""

    def __init__(self, error):
        self.error = error

    def __call__(self, n):
        if n == 3:
            raise self.error
        return batch(n)


def read(function=batch, stop=40, workers=2, **options):
    options = {"prefetch": 1, "place": lambda batch: batch, "reader_timeout": 3.0} | options
    return readers.stream(function, 0, stop, workers=workers, **options)


def equal(found, start=0):
    for n, got in enumerate(found, start):
        np.testing.assert_array_equal(got["x"], batch(n)["x"])


def gone(pid):
    """Whether a process has ended, also one that nobody has waited for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def await_end(pids, seconds=10):
    deadline = time.monotonic() + seconds
    while not all(map(gone, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return [pid for pid in pids if not gone(pid)]


BEGUN = []


def begin(*arguments, **options):
    BEGUN.append(subprocess.Popen(*arguments, **options))
    return BEGUN[-1]


@pytest.fixture(autouse=True)
def _no_process_is_left():
    yield
    while BEGUN:
        BEGUN.pop().kill()


@pytest.mark.parametrize(
    "number, text",
    [
        (signal.SIGKILL, "was killed by signal 9"),
        (signal.SIGSTOP, "has given no batch for 3 s and is stopped"),
    ],
    ids=["killed", "stopped"],
)
def test_a_reader_is_replaced_once(number, text, capfd):
    batches = read()
    begun = [next(batches) for _ in range(4)]
    first = int(begun[1]["reader"])  # reader 1 of 0 and 1
    os.kill(first, number)
    begun += [next(batches) for _ in range(16)]
    equal(begun)
    second = int(begun[19]["reader"])
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"reader 1 of 2 (process {first}) {text}; another one goes on from")
    assert second != first and gone(first)
    others = {int(b["reader"]) for b in begun[::2]}
    assert len(others) == 1  # the other reader went on
    os.kill(second, number)
    with pytest.raises(UserError) as error:
        for _ in range(20):
            next(batches)
    message = str(error.value)
    assert message.startswith(f"reader 1 of 2 (process {second}) {text} again, at batch ")
    assert not await_end([second, *others])
    assert capfd.readouterr().err == ""


def test_a_reader_that_is_stuck_in_a_file(tmp_path, capfd):
    os.mkfifo(tmp_path / "fifo")
    batches = read(Stuck(tmp_path / "fifo", 4))
    found = [next(batches) for _ in range(4)]
    with pytest.raises(UserError, match=r"no batch for 3 s again, at batch 4"):
        next(batches)
    assert "another one goes on from batch 4" in capfd.readouterr().err
    equal(found)


def test_a_thread_that_is_stuck_does_not_keep_the_process(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    code = (
        "from test_readers import Stuck, read\n"
        "from data2vec_jax.cli.output import run_main\n"
        f"run_main(lambda: list(read(Stuck({str(tmp_path / 'fifo')!r}, 4), workers=0)))"
    )
    done = script(code).communicate(timeout=60)[1]
    assert done == "error: reader 0 of 2 (a thread) has given no batch for 3 s, at batch 4\n"


@pytest.mark.parametrize("workers", [0, 2])
def test_what_reading_raises(workers):
    with pytest.raises(UserError, match=r"^row 7 is empty$"):
        list(read(Fails(UserError("row 7 is empty")), workers=workers))
    kind = RuntimeError if workers else ZeroDivisionError
    with pytest.raises(kind, match="batch 3:\n(.|\n)*raise self.error" if workers else "by zero"):
        list(read(Fails(ZeroDivisionError("by zero")), workers=workers))


def test_notices_to_the_group_are_not_for_readers(capfd):
    batches = read(reader_timeout=100.0)
    found = [next(batches) for _ in range(4)]
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        os.kill(int(found[0]["reader"]), number)
    equal([*found, *batches])
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("workers", [0, 2])
def test_the_wait_can_be_left(workers, tmp_path):
    os.mkfifo(tmp_path / "fifo")
    batches = read(Stuck(tmp_path / "fifo", 2), workers=workers, reader_timeout=100.0)
    pids = {int(next(batches)["reader"]) for _ in range(2)} - {os.getpid()}

    def leave(number, frame):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, leave)
    signal.setitimer(signal.ITIMER_REAL, 0.5)
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        next(batches)
    assert time.monotonic() - start < 5
    signal.signal(signal.SIGALRM, before)
    assert not await_end(pids)


def test_options():
    with pytest.raises(UserError, match=r"config\.data\.reader_timeout: 0 is not above 0"):
        read(reader_timeout=0)


# The end of the process that reads ----------------------------------------------------------------

ENDLESS = """
import sys
from test_readers import batch, read
from data2vec_jax.data import readers

if "without prctl" in sys.argv:  # as on other systems than Linux
    readers.ctypes = None
if __name__ == "__main__":
    batches = read(stop=10**9, reader_timeout=100.0)
    pids = [int(next(batches)["reader"]) for _ in range(2)]
    print(*pids, flush=True)
    for _ in batches:
        pass
"""


def script(code, *arguments):
    """A process in a group of its own that runs `code`, a file so that readers can import it."""
    return begin(
        [sys.executable, *(["-c", code] if "\n" in code else [code]), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{Path(__file__).parent}"},
        start_new_session=True,
    )


def in_session(session):
    """Processes of a session that have not ended: readers, and Python's tracker of resources."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, _, own = stat.read_text().rpartition(")")[2].split()[:4]
            found += [int(stat.parent.name)] if int(own) == session and state != "Z" else []
    return found


@pytest.mark.parametrize("case", ["running", "stopped", "without prctl"])
def test_no_reader_outlives_a_kill_9(case, tmp_path):
    before = set(SHARED_MEMORY.iterdir())
    (tmp_path / "endless.py").write_text(ENDLESS)
    process = script(str(tmp_path / "endless.py"), case)
    pids = list(map(int, process.stdout.readline().split()))
    assert len(set(pids)) == 2
    assert set(in_session(process.pid)) >= {process.pid, *pids}
    if case == "stopped":
        os.kill(pids[0], signal.SIGSTOP)
    process.kill()
    text = process.communicate(timeout=20)[1]  # ends when nobody holds its stderr any more
    assert text == ""
    assert not await_end(in_session(process.pid))
    assert set(SHARED_MEMORY.iterdir()) <= before


# Whole runs ---------------------------------------------------------------------------------------

TOTAL = 80
# The larger the batches, the fewer of them wait in a socket.
CONFIG = f"""
from data2vec_jax.configs import vision_v1

def get_config(workers):
    c = vision_v1.get_config("smoke")
    c.data.update(batch_size=64, workers=int(workers), prefetch=1, reader_timeout=20.0)
    c.checkpoint.every = 10
    c.total_steps = {TOTAL}
    return c
"""


def start(folder, workers):
    """A trainer that takes at least 0.05 s for a step, in a session of its own."""
    (folder.parent / "config.py").write_text(CONFIG)
    command = [sys.executable, ROOT / "tests/noting_train.py", folder / "notes", "0.05"]
    command += [f"--config={folder.parent / 'config.py'}:{workers}", f"--workdir={folder / 'run'}"]
    return begin(
        list(map(str, command)),
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"XLA_FLAGS": "", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
        start_new_session=True,
    )


def lines(workdir):
    """The lines of metrics, without what depends on the machine."""
    found = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    of_time = ("examples_per_second", "mfu", "goodput", "peak_bytes")
    return [{k: v for k, v in line.items() if k not in of_time} for line in found]


def await_step(process, workdir, step):
    file = workdir / "metrics.jsonl"  # a line for each step
    while process.poll() is None and not (file.exists() and file.read_text().count("\n") >= step):
        time.sleep(0.05)
    assert process.poll() is None, process.stderr.read()


def reader_ids(process):
    """The reader processes of a trainer, in the order of their start."""
    found = []
    for pid in sorted(in_session(process.pid)):
        with contextlib.suppress(OSError):
            if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(pid)
    return found


def test_a_run_whose_readers_are_stopped_and_that_is_killed(tmp_path):
    # Here, since the readers of the other tests import this file, and need none of it.
    from configs_for_tests import state_of

    whole, run = tmp_path / "whole", tmp_path / "parts/run"
    for folder in (whole, run.parent):
        folder.mkdir()
    process = start(whole, 0)
    assert process.wait(timeout=600) == 0, process.stderr.read()

    began, before = time.time(), set(SHARED_MEMORY.iterdir())
    process = start(run.parent, 2)
    await_step(process, run, 5)
    first = reader_ids(process)
    os.kill(first[0], signal.SIGSTOP)
    text = next(line for line in process.stderr if "reader" in line)
    assert f"(process {first[0]}) has given no batch for 20 s and is stopped; another" in text
    while not (second := set(reader_ids(process)) - set(first)):
        time.sleep(0.05)
    await_step(process, run, lines(run)[-1]["step"] + 4)  # it has sent some
    os.kill(second.pop(), signal.SIGSTOP)
    text = process.communicate(timeout=300)[1]
    last, step = text.splitlines()[-1], lines(run)[-1]["step"]
    assert process.returncode == 2, text
    assert last.startswith("error: reader ") and "is stopped again, at batch" in last
    assert last.endswith(f"; step {step} is saved, and the same command goes on from there")
    assert (run / f"checkpoints/{step}").is_dir()
    assert not await_end(in_session(process.pid))

    process = start(run.parent, 2)
    await_step(process, run, step + 6)
    assert len(reader_ids(process)) == 2
    process.kill()
    assert "Traceback" not in process.communicate(timeout=20)[1]
    assert not await_end(in_session(process.pid))

    process = start(run.parent, 2)
    text = next(line for line in process.stderr if line.startswith("goodput"))
    took = time.time() - began
    assert process.wait(timeout=60) == 0
    assert set(SHARED_MEMORY.iterdir()) <= before
    assert lines(run) == lines(whole / "run")
    wanted, found = (state_of(workdir, TOTAL) for workdir in (whole / "run", run))
    assert wanted.keys() == found.keys() and len(found) > 50
    for name, array in wanted.items():
        np.testing.assert_array_equal(found[name], array, name, strict=True)

    account = re.match(r"goodput \d+ % of ([\d,]+) s: (.*)$", text)
    parts = {name: int(n) for name, n in re.findall(r"([a-z-]+) (\d+) s", account[2])}
    assert parts.keys() >= {"train", "start-up", "save"}  # less than half a second is not told
    assert sum(parts.values()) == int(account[1].replace(",", ""))
    assert abs(sum(parts.values()) - took) <= 2, text  # processes start, lines are read


@pytest.mark.parametrize(
    "recipe",
    ["finetune_text", "finetune_imagenet", "finetune_sound", "finetune_librispeech", "text_v2"],
)
def test_batches_of_a_recipe_are_the_same_from_a_process(recipe):
    import jax  # not above: the readers of the other tests import this file

    from data2vec_jax.core import sharding
    from data2vec_jax.tasks.registry import task_module
    from tests.configs_for_tests import config_of

    found = []
    for workers in (0, 1):
        config = config_of(recipe, data={"workers": workers}).to_dict()
        module = task_module(config)
        config = module.resolve_config(config, None)
        with jax.set_mesh(sharding.make_mesh(**config["mesh"])):
            batches = module.make(config).data(0)
            found.append(jax.device_get([next(batches) for _ in range(2)]))
            batches.close()
    assert jax.tree.structure(found[0]) == jax.tree.structure(found[1])
    for one, two in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_array_equal(one, two)
