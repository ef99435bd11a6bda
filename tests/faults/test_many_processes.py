"""Several processes of one run: one of them is killed, and starts of every recipe.

    python tests/faults/test_many_processes.py kills 6
    python tests/faults/test_many_processes.py kills 20 1
    python tests/faults/test_many_processes.py starts 21 2 8

The first kills one of two processes so many times, resumes each time, and compares with a run
without kills. The second does this with a run of one process and two readers. The third starts the
smoke configs in turn, here 21 times with 2 processes and every second round beside 8 busy loops,
and compares the metrics of each start with the first of its kind.
"""

import contextlib
import itertools
import json
import os
import random
import re
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import numpy as np
import pytest
from configs_for_tests import state_of

from data2vec_jax.core.checkpoints import Checkpoints

ROOT = Path(__file__).resolve().parents[2]
SHARED_MEMORY = Path("/dev/shm")
RECIPES = ["vision_v2", "speech_v2", "text_v2", "sound_v2", "vision_v1", "speech_v1", "text_v1"]
TOTAL, EVERY = 60, 4
MARK = "DATA2VEC_TEST"  # an environment variable: what we started, also what became an orphan
GRACE_SECONDS, END_SECONDS = 5, 15  # the launcher's; from a kill to the end of all
pytestmark = pytest.mark.xdist_group("processes")  # one after the other


def start(recipe, workdir, processes, *options):
    """`launch/local.sh`, whose processes bear the mark `workdir`."""
    command = ["bash", ROOT / "launch/local.sh", f"--processes={processes}"]
    command += [f"--config={ROOT}/configs/{recipe}.py:smoke", f"--workdir={workdir}", *options]
    return subprocess.Popen(
        list(map(str, command)),
        # Process 1 finds no compiled program, and these steps need not be fast.
        env=os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=0", MARK: str(workdir)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def alive(workdir):
    """Processes with the mark `workdir` that have not ended -> their parents (Linux)."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            marks = (folder / "environ").read_bytes().split(b"\0")
            state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
            if f"{MARK}={workdir}".encode() in marks and state != "Z":
                found[int(folder.name)] = int(parent)
    return found


def await_end(workdir, seconds=5):
    """Who of the marked processes is left after so many seconds."""
    deadline = time.monotonic() + seconds
    while (left := alive(workdir)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left


def end_all(workdir):
    for pid in alive(workdir):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def lines(workdir):
    """The lines of metrics, without what depends on the machine."""
    found = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    of_time = ("examples_per_second", "mfu", "goodput", "peak_bytes")
    return [{k: v for k, v in line.items() if k not in of_time} for line in found]


# One of two is killed -----------------------------------------------------------------------------


# When it is killed, in turn, by the number of processes.
MOMENTS = {
    1: ["save", "any time", "save", "start", "save"],
    2: ["save", "save", "any time", "any time"],
}


def small(workdir, processes):
    options = ["model.width=16", "data.batch_size=8", f"total_steps={TOTAL}", "log_every=1"]
    options += [f"checkpoint.every={EVERY}", f"data.workers={2 // processes}"]
    return start("vision_v1", workdir, processes, *(f"--config.{option}" for option in options))


def children(pid):
    """The processes that `pid` has begun, in their order; fast, since a run is short."""
    found = []
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            found += map(int, (task / "children").read_text().split())
    return sorted(found)


def unfinished_saves(checkpoints):
    """Folders of saves that have not ended, as (name, inode)."""
    with contextlib.suppress(FileNotFoundError):
        return {(e.name, e.inode()) for e in os.scandir(checkpoints) if "tmp" in e.name}
    return set()


def kill_one(process, workdir, processes, victim, when, step):
    """Kills one of the processes after `step`, in the middle of a save or not, or at the start.

    Returns seconds to the end of all, and what was said.
    """
    if when == "start":
        time.sleep(step / TOTAL * 5)
        process.kill()
        return 0.0, process.communicate(timeout=120)[1]
    file, checkpoints = workdir / "metrics.jsonl", workdir / "checkpoints"
    unfinished, deadline = unfinished_saves(checkpoints), time.monotonic() + 300
    trainers, readers = [], []
    # The lines may be of an earlier start, before the readers of this one.
    while len(readers) < 2 or not file.exists() or file.read_text().count("\n") < step:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline, (trainers, readers)
        time.sleep(0.01)
        trainers = [process.pid] if processes == 1 else children(process.pid)
        readers = [pid for trainer in trainers for pid in children(trainer)]
    assert len(trainers) == processes
    while when == "save" and not unfinished_saves(checkpoints) - unfinished:
        assert process.poll() is None, "it ended before it saved"
        time.sleep(0.001)
    os.kill(trainers[victim], signal.SIGKILL)
    began = time.monotonic()
    text = process.communicate(timeout=120)[1]
    return time.monotonic() - began, text


def kill_many(folder, kills, processes=2, seed=0):
    """Kills and resumes a run so many times, then lets it come to its end.

    Yields what was killed, seconds to the end of all, and what was said; then the same of the end.
    """
    whole, run, rng = folder / "whole", folder / "run", random.Random(seed)
    process = small(whole, processes)
    text = process.communicate(timeout=600)[1]
    assert process.returncode == 0, text

    before = set(SHARED_MEMORY.iterdir())
    try:
        for i in range(kills):
            victim, moments = (i + 1) % processes, MOMENTS[processes]
            when = moments[i % len(moments)]
            first, last = (max(1, TOTAL * 3 // 4 * n // kills) for n in (i, i + 1))
            process = small(run, processes)
            seconds, text = kill_one(
                process, run, processes, victim, when, rng.randint(first, last)
            )
            yield f"process {victim}, {when}", seconds, text
            assert "Traceback" not in text, text
            if processes == 1:
                assert process.returncode == -signal.SIGKILL, text
            else:
                assert process.returncode == 137, text
                assert f"process {victim} ended with code 137; the others were stopped" in text
            if victim == 1 and seconds < GRACE_SECONDS:  # it was process 0 that ended by itself
                assert "error: another process is gone (" in text, text
            assert seconds < END_SECONDS, text
            assert not await_end(run)
            assert set(SHARED_MEMORY.iterdir()) <= before
        process, began = small(run, processes), time.monotonic()
        text = process.communicate(timeout=600)[1]
        assert process.returncode == 0, text
        assert not await_end(run)
        assert set(SHARED_MEMORY.iterdir()) <= before
        yield "none, to the end", time.monotonic() - began, text
    finally:
        end_all(run)
    assert lines(run) == lines(whole)
    wanted, arrays = (state_of(workdir, TOTAL) for workdir in (whole, run))
    assert wanted.keys() == arrays.keys() and len(arrays) > 50
    for name, array in wanted.items():
        np.testing.assert_array_equal(arrays[name], array, name, strict=True)


def test_one_of_two_is_killed(tmp_path):
    assert len(list(kill_many(tmp_path, 1))) == 2


# One of two fails ---------------------------------------------------------------------------------


def save_together(directory, port, process):
    """Other process: one of two. The second cannot write its arrays of the first save."""
    jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=int(process))
    mesh = jax.make_mesh((2,), ("data",))
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    whole = np.random.default_rng(0).random((2, 1 << 18), "float32")
    state = {"x": jax.make_array_from_callback(whole.shape, place, lambda index: whole[index])}
    with Checkpoints(directory, every=1, keep=9, timeout=6) as checkpoints:
        for step in (1, 2):
            if process == "1":
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                room = 40_000 if step == 1 else resource.RLIM_INFINITY
                resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
            began = time.monotonic()
            checkpoints.save(step, state, {"batch": step})
            checkpoints.wait()
            print(f"save {step}: {time.monotonic() - began:.1f} s", flush=True)


def test_one_that_cannot_write_delays_the_next_save_by_the_timeout(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    env = os.environ | {"XLA_FLAGS": "", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, __file__, "save_together", tmp_path / "checkpoints", port]
    pair = [
        subprocess.Popen([*map(str, command), i], env=env, stdout=-1, stderr=-1, text=True)
        for i in "01"
    ]
    for process, (out, err) in [(p, p.communicate(timeout=120)) for p in pair]:
        assert process.returncode == 0, err
        first, second = map(float, re.findall(r"^save \d: (\S+) s$", out, re.M))
        assert 4 < first < 30 and second < 5, out
        told = [line for line in err.splitlines() if "NOT SAVED" in line]
        assert len(told) == (process is pair[0]), err
    assert "Traceback" not in err
    assert os.listdir(tmp_path / "checkpoints") == ["2"]


# Starts -------------------------------------------------------------------------------------------


def starts(folder, count, processes, burners=0, recipes=RECIPES, steps=3):
    """Starts the recipes in turn, every second round beside busy loops.

    Yields recipe, number of busy loops, exit code, whether it is like the first, seconds.
    """
    first = {}
    loop = ["nice", "-n", "5", sys.executable, "-c", "while True: pass"]
    for i, recipe in zip(range(count), itertools.cycle(recipes)):
        workdir, began = folder / f"{recipe}-{processes}-{i}", time.monotonic()
        beside = burners if i // len(recipes) % 2 else 0
        loops = [subprocess.Popen(loop) for _ in range(beside)]
        options = [f"--config.total_steps={steps}", "--config.log_every=1"]
        process = start(recipe, workdir, processes, *options)
        try:
            text = process.communicate(timeout=900)[1]
        finally:
            end_all(workdir)
            for other in loops:
                other.kill()
                other.wait()
        same = False
        if process.returncode:
            print(text, file=sys.stderr)
        else:
            found = lines(workdir)
            assert [line["step"] for line in found] == [*range(1, steps + 1)]
            same = found == first.setdefault(recipe, found)
        yield recipe, beside, process.returncode, same, time.monotonic() - began


def main(what, count, processes=2, burners=0):
    with tempfile.TemporaryDirectory() as place:
        if what == "kills":
            for kind, seconds, text in kill_many(Path(place), int(count), int(processes)):
                lines = len(text.splitlines())
                print(f"{kind}: all ended after {seconds:.1f} s, {lines} lines", flush=True)
                print(text, file=sys.stderr, flush=True)
            print(*(line for line in text.splitlines() if line.startswith("goodput")))
            print("lines of metrics, and all arrays of the last checkpoint, are equal")
            return
        found = []
        for result in starts(Path(place), int(count), int(processes), int(burners)):
            found.append(result)
            text = "{} with {} busy loops: code {}, like the first: {}, {:.0f} s"
            print(text.format(*result), flush=True)
        good = sum(not code and same for _, _, code, same, _ in found)
        print(f"{good} of {len(found)} starts of {processes} processes")


if __name__ == "__main__":
    save_together(*sys.argv[2:]) if sys.argv[1] == "save_together" else main(*sys.argv[1:])
