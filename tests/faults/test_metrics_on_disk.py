"""metrics.jsonl and TensorBoard's events on a disk that is full, or that somebody tidies up."""

import hashlib
import io
import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from data2vec_jax.core import bad_examples
from data2vec_jax.core.errors import UserError
from data2vec_jax.metrics.writer import FILE, Writer, read_lines

ROOT = Path(__file__).resolve().parents[2]


def write_to_a_limit(path):
    """Other process: lines beyond a limit on the size of files, as beyond a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # writes fail, or are cut short
    scalars = {"loss": 0.5}
    stream = io.StringIO()
    with Writer(path, total_steps=60, stream=stream) as writer:
        for step in range(1, 61):
            if step in (10, 50):
                room = 600 if step == 10 else resource.RLIM_INFINITY
                limits = room, resource.RLIM_INFINITY
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            writer.write(step, "train", scalars)
            if step == 40:
                writer.flush()
                digest = writer.digest()
        assert digest["lines"] == 40
    print(stream.getvalue())


def test_lines_wait_for_a_full_disk(tmp_path):
    """None is missing, none is torn, TensorBoard's file included; said once, and no traceback."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    done = subprocess.run(
        [sys.executable, __file__, "write_to_a_limit", tmp_path],
        env=os.environ | {"PYTHONPATH": f"{Path(__file__).resolve().parents[2]}"},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("CANNOT WRITE metrics.jsonl: File too large") == 1
    assert done.stdout.count("metrics.jsonl is written again; no line is missing") == 1
    assert [line["step"] for line in read_lines(tmp_path / FILE)] == list(range(1, 61))
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, 61))


def test_a_file_that_is_removed_is_made_anew(tmp_path):
    stream = io.StringIO()
    with Writer(tmp_path, total_steps=4, tensorboard=False, stream=stream) as writer:
        for step in range(1, 5):
            if step == 3:
                (tmp_path / FILE).unlink()
            writer.write(step, "train", {"loss": step})
        writer.flush()
        digest = writer.digest()
    left = (tmp_path / FILE).read_bytes()
    assert [line["step"] for line in read_lines(tmp_path / FILE)] == [2, 3, 4]
    assert digest["sha256"] == hashlib.sha256(left).hexdigest() and digest["lines"] == 3
    assert stream.getvalue().count("WAS REMOVED") == 1


def test_lines_of_bad_examples_wait_for_a_full_disk(tmp_path):
    """A file-size limit stands for the disk."""
    code = f"""
import resource, signal
from pathlib import Path
from data2vec_jax.core.bad_examples import BadExamplesFile
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
file = BadExamplesFile(Path({str(tmp_path)!r}))
lines = [{{"step": n, "example_id": n, "path": "p", "reason": "damaged"}} for n in range(40)]
file.append(lines[:1])
resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
for line in lines[1:39]:
    file.append([line])
print(file.path.read_text().count(chr(10)), flush=True)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
file.append()
file.append(lines[39:])
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert found.returncode == 0, found.stderr
    assert found.stdout == "1\n"
    written = (tmp_path / "bad_examples.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in written] == [*range(40)]


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])


def test_lines_of_bad_examples_that_are_not_ours(tmp_path):
    good = {"step": 1, "example_id": 3, "path": "a.png", "reason": "empty"}
    odd = [good | {"example_id": [1]}, good | {"reason": {}}, good | {"step": "1"}, [1], None]
    text = "\n".join(json.dumps(line) for line in (*odd, good))
    (tmp_path / bad_examples.FILE).write_text(text)
    kept = bad_examples.BadExamplesFile(tmp_path, resume_step=2)
    assert kept.kept == [good] == bad_examples.read_lines(tmp_path, 2)
    (tmp_path / "folder" / bad_examples.FILE).mkdir(parents=True)
    with pytest.raises(UserError, match=r"cannot write .*bad_examples\.jsonl: Is a directory"):
        bad_examples.BadExamplesFile(tmp_path / "folder", resume_step=2)
