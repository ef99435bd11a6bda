"""`prepare --runner`: Apache Beam makes the shards that local processes make.

Prism is a program that Beam downloads, so it is not run here: its client talks to Beam's own job
service, a server in another process, by the protocol that prism, Flink and Spark have in common.
"""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import soundfile

from data2vec_jax.core.errors import UserError
from data2vec_jax.data.sources import open_source
from data2vec_jax.modalities.speech.codec import CODEC
from data2vec_jax.prepare import beam, corpus, shards
from data2vec_jax.prepare.__main__ import main
from data2vec_jax.prepare.shards import ShardMaker

ROOT = Path(__file__).parents[1]
COUNT = 20


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    """Those of the command: 20 files with transcripts, one of them damaged, for 10 shards."""
    place = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    for n in range(COUNT):
        soundfile.write(place / f"{n:02}.wav", 0.1 * rng.standard_normal(2000 + 100 * n), 16_000)
        (place / f"{n:02}.txt").write_text(f"Zażółć 语音 {n}")
    (place / "07.wav").write_bytes(b"no audio")
    source = f"--source=transcribed:{place}"
    return ["speech", source, "--shard_mb=0.01", "--max_bad_share=0.1", "--licence=CC0"]


@pytest.fixture(scope="module")
def local(arguments, tmp_path_factory):
    """The files that one local process makes."""
    target = tmp_path_factory.mktemp("local") / "shards"
    main([*arguments, f"--target={target}", "--workers=1"])
    return files(target)


@pytest.fixture(scope="module")
def job_service(tmp_path_factory):
    """The address of Beam's own job service, in another process."""
    place = tmp_path_factory.mktemp("service")
    module = "apache_beam.runners.portability.local_job_service_main"
    with open(place / "log", "w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", module, f"--port_file={place / 'port'}"], stdout=log, stderr=log
        )
    try:
        until(lambda: (place / "port").exists() and (place / "port").read_text(), process)
        yield f"localhost:{(place / 'port').read_text()}"
    finally:
        process.kill()
        process.wait()


def files(folder):
    """Name -> bytes of all files below a folder."""
    return {p.name: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def until(condition, process):
    """Waits for a condition while a process runs."""
    deadline = time.monotonic() + 300
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)


def refused(message, *arguments):
    """The command ends with one line that says `message`."""
    with pytest.raises(UserError) as error:
        main(list(arguments))
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("runner", ["direct", "processes", "prism"])
def test_shards_are_those_of_local_processes(arguments, local, tmp_path, runner, request):
    options = ["--runner=direct"]
    if runner == "processes":
        options += ["--", "--direct_running_mode=multi_processing", "--direct_num_workers=2"]
    if runner == "prism":
        options = ["--runner=prism", "--"]
        options += [f"--job_endpoint={request.getfixturevalue('job_service')}"]
    main([*arguments, f"--target={tmp_path / 'shards'}", *options])
    assert files(tmp_path / "shards") == local
    manifest = json.loads(local["manifest.json"])
    assert len(manifest["shards"]) > 5
    assert manifest["splits"]["train"]["bad"] == {"unreadable": 1}
    assert len(open_source(f"array_record:{tmp_path / 'shards'}", codec=CODEC)) == COUNT - 1


def test_goes_on_after_a_kill(arguments, local, tmp_path):
    target = tmp_path / "shards"
    again = [*arguments, f"--target={target}", "--runner=direct"]
    slow = (  # so that the kill comes in the middle
        "import time; from data2vec_jax.prepare import __main__, shards\n"
        "make = shards.prepare_example\n"
        "def slower(*x): time.sleep(0.1); return make(*x)\n"
        "shards.prepare_example = slower\n"
        f"__main__.main({again!r})"
    )
    process = subprocess.Popen([sys.executable, "-c", slow], cwd=ROOT)
    until(lambda: len(list(target.glob("unfinished/*.array_record"))) >= 2, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = {path.name for path in target.glob("unfinished/*.array_record")}
    assert 2 <= len(done) < len(json.loads(local["manifest.json"])["shards"])
    (target / "train-00000.array_record.0.partial").write_text("of a worker that was killed")
    before = {name: os.stat(target / name).st_mtime_ns for name in done}
    main(again)
    assert before == {name: os.stat(target / name).st_mtime_ns for name in done}
    assert files(target) == local


def test_two_workers_may_make_a_shard_at_a_time(arguments, tmp_path, monkeypatch):
    """Beam may start a worker again while the one that it took for dead goes on."""
    write = shards.write_json
    monkeypatch.setattr(shards, "write_json", lambda *x: (write(*x), time.sleep(0.01)))
    source = open_source(arguments[1].removeprefix("--source="), codec=CODEC)
    block = next(corpus.blocks({"train": source}, 20_000))
    (tmp_path / "unfinished").mkdir()
    maker = ShardMaker(str(tmp_path), dataclasses.replace(CODEC, kinds={}), None, "")

    def work(turn):
        # Other options each time, so that no one finds the shard finished.
        return dataclasses.replace(maker, options=str(turn))(block) | {"digest": ""}

    with ThreadPoolExecutor(4) as pool:
        reports = list(pool.map(work, range(40)))
    assert all(report == reports[0] for report in reports)
    assert not [path for path in tmp_path.rglob("*") if path.suffix == ".partial"]


def test_mistakes(arguments, tmp_path, monkeypatch):
    target = f"--target={tmp_path / 'shards'}"
    refused("Unexpected pipeline runner: drect", *arguments, target, "--runner=drect")
    wrong = ["--runner=direct", "--", "--direct_num_workers=many"]
    refused("invalid int value: 'many'", *arguments, target, *wrong)
    refused("required option: project", *arguments, target, "--runner=dataflow")
    refused("are those of a --runner", *arguments, target, "--", "--project=mine")
    refused("--check has --workers", *arguments, f"--check={tmp_path / 'c'}", "--runner=direct")
    assert not (tmp_path / "shards").exists()
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "apache_beam", None)  # is not installed
        refused("pip install apache-beam", *arguments, target, "--runner=direct")
    with monkeypatch.context() as patch:
        patch.setattr(beam, "make_stored", lambda name, make: None)  # sees no such folder
        refused("do they all see", *arguments, target, "--runner=direct")
    os.mkdir(tmp_path / "shards" / "train-00003.array_record")
    refused("train-00003.array_record", *arguments, target, "--runner=direct")


def test_is_imported_for_a_runner_only(arguments, tmp_path):
    options = [*arguments, f"--target={tmp_path / 'shards'}", "--workers=1"]
    code = (
        "import sys; from data2vec_jax.prepare.__main__ import main\n"
        f"main({options!r})\n"
        "assert 'apache_beam' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
