"""metrics/ against small independent references, and the writer against a crash."""

import io
import json
import math
import subprocess
import sys
import time
import types
from unittest.mock import ANY

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from data2vec_jax.core.config import check_section
from data2vec_jax.core.errors import UserError
from data2vec_jax.metrics.collapse import CollapseConfig, CollapseMonitor
from data2vec_jax.metrics.hardware import peak_bytes, peak_flops, peak_of_kind
from data2vec_jax.metrics.parameters import parameter_table
from data2vec_jax.metrics.statistics import effective_rank, explained_shares, mean_std
from data2vec_jax.metrics.throughput import (
    Stopwatch,
    Throughput,
    last_moment,
    process_start,
)
from data2vec_jax.metrics.writer import Writer, read_lines
from data2vec_jax.objectives import targets
from data2vec_jax.objectives.contract import Intermediates


def read(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


class Clock:
    """A clock that stands still until told otherwise."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        for name in ("monotonic", "time"):
            monkeypatch.setattr(time, name, lambda: self.now)


# --- writer -------------------------------------------------------------------------------------


def test_a_line_has_step_split_and_every_digit(tmp_path):
    scalars = {"loss": jnp.float32(0.1), "rate": 1 / 3, "tiny": 1e-300, "count": 7}
    with Writer(tmp_path, total_steps=1, progress=False, tensorboard=False) as writer:
        writer.write(1, "train", scalars)
    text = (tmp_path / "metrics.jsonl").read_text()
    assert text == (
        '{"step": 1, "split": "train", "loss": 0.10000000149011612, '
        '"rate": 0.3333333333333333, "tiny": 1e-300, "count": 7}\n'
    )


def test_non_finite_values_are_strings_and_read_back_as_floats(tmp_path):
    with Writer(tmp_path, total_steps=1, progress=False, tensorboard=False) as writer:
        writer.write(1, "train", {"a": jnp.nan * jnp.ones(()), "b": math.inf, "c": -math.inf})
    (line,) = read(tmp_path)
    assert line == {"step": 1, "split": "train", "a": "nan", "b": "inf", "c": "-inf"}
    (line,) = read_lines(tmp_path / "metrics.jsonl")
    assert math.isnan(line["a"]) and line["b"] == math.inf and line["c"] == -math.inf


class Pending:
    """Stands for an array still being computed: reading it too early is an error."""

    shape = ()

    def __init__(self):
        self.ready = False

    def __array__(self, dtype=None, copy=None):
        assert self.ready, "the writer waited for a step it should not have waited for"
        return np.float32(3.0)


def test_a_step_is_read_only_when_the_next_one_has_been_dispatched(tmp_path):
    writer = Writer(tmp_path, total_steps=3, progress=False, tensorboard=False)
    first, second, score = Pending(), Pending(), Pending()
    assert writer.write(1, "train", {"loss": first}) == []
    assert writer.write(1, "eval", {"score": score}) == []  # same step: still nothing is read
    assert read(tmp_path) == []
    first.ready = score.ready = True
    assert writer.write(2, "train", {"loss": second}) == [
        {"step": 1, "split": "train", "loss": 3.0},
        {"step": 1, "split": "eval", "score": 3.0},
    ]
    assert [line["step"] for line in read(tmp_path)] == [1, 1]
    second.ready = True
    assert [line["step"] for line in writer.flush()] == [2]
    assert writer.flush() == []
    assert [line["step"] for line in read(tmp_path)] == [1, 1, 2]
    writer.close()


def test_steps_may_be_skipped_and_advance_writes_what_is_due(tmp_path):
    writer = Writer(tmp_path, total_steps=40, progress=False, tensorboard=False)
    seen = []
    for step in range(1, 41):
        if step % 10 == 0:
            seen += writer.write(step, "train", {"loss": step})
        else:
            seen += writer.advance(step)
        if step == 11:
            assert [line["step"] for line in read(tmp_path)] == [10]
    assert [line["step"] for line in seen] == [10, 20, 30]
    writer.close()
    assert [line["step"] for line in read(tmp_path)] == [10, 20, 30, 40]


def test_device_arrays_pass_the_transfer_guard(tmp_path):
    step = jax.jit(lambda x: {"loss": x.sum(), "count": jnp.int32(3)})
    x = jnp.ones(4)
    with (
        jax.transfer_guard("disallow"),
        Writer(tmp_path, total_steps=2, progress=False, tensorboard=False) as writer,
    ):
        for n in (1, 2):
            writer.write(n, "train", step(x))
    assert read(tmp_path)[1] == {"step": 2, "split": "train", "loss": 4.0, "count": 3}


def test_resume_drops_the_torn_line_and_all_beyond_the_checkpoint(tmp_path):
    with Writer(tmp_path, total_steps=9, progress=False, tensorboard=False) as writer:
        for step in range(1, 6):
            writer.write(step, "train", {"loss": float(step)})
        writer.write(5, "eval", {"score": 0.5})
    path = tmp_path / "metrics.jsonl"
    kept = b"".join(path.read_bytes().splitlines(keepends=True)[:3])
    path.write_bytes(path.read_bytes() + b'{"step": 6, "split": "tr\xc3')  # cut in mid-character
    assert [line["step"] for line in read_lines(path)] == [1, 2, 3, 4, 5, 5]
    with Writer(
        tmp_path, total_steps=9, resume_step=3, progress=False, tensorboard=False
    ) as writer:
        assert path.read_bytes() == kept  # byte for byte
        for step in range(4, 8):
            writer.write(step, "train", {"loss": -float(step)})
    lines = read(tmp_path)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6, 7]
    assert [line["loss"] for line in lines] == [1, 2, 3, -4, -5, -6, -7]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.jsonl"]


def test_a_whole_last_line_without_its_newline_is_kept(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "split": "train", "loss": 1.0}')
    with Writer(
        tmp_path, total_steps=2, resume_step=1, progress=False, tensorboard=False
    ) as writer:
        writer.write(2, "train", {"loss": 2.0})
    assert [line["loss"] for line in read(tmp_path)] == [1.0, 2.0]


def test_an_eval_repeated_at_the_restored_step_is_written_once(tmp_path):
    for resume in (0, 2):
        with Writer(
            tmp_path, total_steps=4, resume_step=resume, progress=False, tensorboard=False
        ) as writer:
            if resume == 0:
                writer.write(2, "train", {"loss": 1.0})
            writer.write(2, "eval", {"score": 1.0})
            writer.write(2, "probe", {"score": 1.0})
    assert [(x["step"], x["split"]) for x in read(tmp_path)] == [
        (2, "train"),
        (2, "eval"),
        (2, "probe"),
    ]


def test_a_run_from_the_start_begins_a_new_file(tmp_path):
    for value in (1.0, 2.0):
        with Writer(tmp_path, total_steps=1, progress=False, tensorboard=False) as writer:
            writer.write(0, "eval", {"score": value})
            writer.write(1, "train", {"loss": value})
    assert [list(line.values())[2] for line in read(tmp_path)] == [2.0, 2.0]


def test_a_disabled_writer_returns_the_same_lines_and_writes_nothing(tmp_path):
    with Writer(tmp_path / "no", total_steps=2, enabled=False) as writer:
        assert writer.write(1, "train", {"loss": jnp.float32(2)}) == []
        assert writer.write(2, "train", {"loss": 1}) == [{"step": 1, "split": "train", "loss": 2}]
        writer.note("unseen")
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    "step, scalars, message",
    [
        (5, {"loss": jnp.ones(2)}, r"'loss' has shape \(2,\)"),
        (5, {"step": 1.0}, "cannot be called 'step'"),
        (1, {"loss": 1.0}, "step 1 comes after step 2"),
    ],
)
def test_a_wrong_call_says_what_is_wrong(tmp_path, step, scalars, message):
    writer = Writer(tmp_path, total_steps=9, progress=False, tensorboard=False)
    writer.write(2, "train", {})
    with pytest.raises(ValueError, match=message):
        writer.write(step, "train", scalars)
    writer.close()


def test_an_unwritable_workdir_is_the_users_to_mend(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write metrics"):
        Writer(tmp_path / "file", total_steps=1)


def test_the_first_error_is_not_hidden_by_the_pending_step(tmp_path):
    with (
        pytest.raises(KeyError, match="first"),
        Writer(tmp_path, total_steps=2, progress=False, tensorboard=False) as writer,
    ):
        writer.write(1, "train", {"loss": Pending()})
        raise KeyError("first")


def test_tensorboard_reads_each_step_once_after_a_resume(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for resume, sign in ((0, 1), (3, -1), (4, 10)):
        with Writer(tmp_path, total_steps=9, resume_step=resume, progress=False) as writer:
            for step in range(resume + 1, 7):
                writer.write(step, "train", {"loss": jnp.float32(sign * step)})
    assert len(list(tmp_path.glob("events.out.tfevents.*"))) == 3  # all within one second
    events = EventAccumulator(str(tmp_path)).Reload()
    assert events.Tags()["scalars"] == ["train/loss"]
    values = [(e.step, e.value) for e in events.Scalars("train/loss")]
    assert values == [(1, 1), (2, 2), (3, 3), (4, -4), (5, 50), (6, 60)]
    assert [line["loss"] for line in read(tmp_path)] == [v for _, v in values]


def test_rates_join_the_train_line_when_its_arrays_have_arrived(tmp_path):
    asked = []

    def rates(step):
        asked.append(step)
        return {"mfu": 0.5}

    with Writer(tmp_path, total_steps=2, progress=False, tensorboard=False, rates=rates) as writer:
        writer.write(1, "train", {"loss": 1.0})
        writer.write(1, "eval", {"score": 1.0})
        assert asked == []
    assert asked == [1]
    assert [line.get("mfu") for line in read(tmp_path)] == [0.5, None]


# --- progress -----------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self):
        return True


def run_progress(tmp_path, stream, clock, seconds):
    with Writer(tmp_path, total_steps=30, tensorboard=False, stream=stream) as writer:
        for step in range(1, 31):
            clock.now += seconds
            writer.write(step, "train", {"loss": 0.5, "examples_per_second": 1234.5})
            if step == 15:
                writer.note("a note")
        writer.write(30, "eval", {"accuracy": 0.75})


def test_a_log_file_gets_the_first_the_last_and_one_line_in_ten_seconds(tmp_path, monkeypatch):
    stream = io.StringIO()
    run_progress(tmp_path, stream, Clock(monkeypatch), seconds=2.5)
    lines = stream.getvalue().splitlines()
    steps = [line.split("/")[0] for line in lines if "loss" in line]
    # Written one step late, that is 2.5 s apart: each fourth line is due.
    assert steps == [f"step {n}" for n in (1, 5, 9, 13, 17, 21, 25, 29, 30)]
    assert lines[0] == "step 1/30  loss 0.5  1,234 examples/s"
    assert lines[1] == "step 5/30  loss 0.5  1,234 examples/s  ETA 0:01:02"  # 25 steps of 2.5 s
    assert "a note" in lines and lines[-1] == "step 30  eval  accuracy 0.75"


def test_a_terminal_gets_one_line_updated_in_place(tmp_path, monkeypatch):
    stream = Terminal()
    run_progress(tmp_path, stream, Clock(monkeypatch), seconds=0.5)
    screen = stream.getvalue().split("\n")
    assert screen[0].endswith("\r\x1b[Ka note")  # the bar was wiped first
    assert screen[0].count("\rstep ") == 14 and screen[1].count("\rstep ") == 17
    assert screen[1].endswith("\r\x1b[Kstep 30  eval  accuracy 0.75")
    assert "\rstep 30/30" in screen[2] and screen[3:] == [""]


def test_the_last_line_is_shown_even_if_the_run_stops_early(tmp_path, monkeypatch):
    Clock(monkeypatch)
    stream = io.StringIO()
    with Writer(tmp_path, total_steps=30, tensorboard=False, stream=stream) as writer:
        for step in range(1, 6):
            writer.write(step, "train", {"loss": 1.0})
    assert [line.split("/")[0] for line in stream.getvalue().splitlines()] == ["step 1", "step 5"]


# --- time ---------------------------------------------------------------------------------------


def test_stopwatch_gives_each_second_to_the_innermost_block(monkeypatch):
    clock = Clock(monkeypatch)
    watch = Stopwatch()
    clock.now += 1  # start
    with watch.measure("train"):
        clock.now += 5
        with watch.measure("save"):
            clock.now += 2
        clock.now += 1
    with pytest.raises(RuntimeError), watch.measure("eval"):
        clock.now += 3
        raise RuntimeError
    got = {k: v for k, v in watch.seconds().items() if v}
    assert got == {"start-up": 1, "train": 6, "save": 2, "eval": 3}
    assert watch.goodput == 6 / 12
    assert watch.account() == "goodput 50 % of 12 s: train 6 s, eval 3 s, save 2 s, start-up 1 s"
    with pytest.raises(ValueError, match="'trian'"), watch.measure("trian"):
        pass


def live(clock, watch, steps, save_after=None, state=None):
    """A process: 5 s of start-up, 2 s of restore, 7 s of compiler, then a second for each step."""
    clock.now += 5
    with watch.measure("restore"):
        clock.now += 2
    with watch.measure("compile"):
        clock.now += 7
    for step in range(steps):
        if step == save_after:
            state = json.loads(json.dumps(watch.state_dict()))
            with watch.measure("save"):
                clock.now += 3
        with watch.measure("train"):
            clock.now += 1
    return state


@pytest.mark.parametrize("noted", [True, False], ids=["noted", "not noted"])
def test_goodput_counts_what_restarts_cost(noted, monkeypatch):
    clock = Clock(monkeypatch)
    start = clock.now
    first = Stopwatch()
    live(clock, first, 20)  # killed before its first checkpoint
    last = json.loads(json.dumps(first.state_dict()))
    clock.now += 10
    second = Stopwatch()
    second.load({}, last)
    state = live(clock, second, 60, save_after=40)
    last = json.loads(json.dumps(second.state_dict()))
    clock.now += 100  # until the scheduler starts it again
    third = Stopwatch()
    clock.now += 4  # until it has read the checkpoint
    third.load(state, last if noted else None)
    live(clock, third, 8)
    seconds = third.seconds()
    assert sum(seconds.values()) == clock.now - start
    assert seconds["train"] == 40 + 8
    if noted:
        # Twenty steps of the first process and twenty of the second were done again.
        want = {"lost": 40, "idle": 110, "save": 3, "restore": 6, "compile": 21, "start-up": 19}
    else:  # it is not known when the second process ended
        want = {"lost": 143, "idle": 10, "save": 0, "restore": 6, "compile": 21, "start-up": 19}
    assert {name: seconds[name] for name in want} == want
    assert third.goodput == pytest.approx(48 / (clock.now - start))


def test_the_last_moment_of_a_process_is_noted(tmp_path):
    assert last_moment(tmp_path) is None
    watch = Stopwatch(started=time.time() - 100)
    with watch.kept(tmp_path), watch.measure("train"):
        time.sleep(1.5)  # longer than the time between two notes
        noted = last_moment(tmp_path)
    assert 100.9 < sum(noted["seconds"].values()) < 101.5
    assert noted["seconds"]["train"] > 0.9 and time.time() - noted["saved_at"] < 1
    assert last_moment(tmp_path)["seconds"]["train"] >= 1.5
    (tmp_path / "clock.json").write_text('{"seconds": {"train": "x"}}')
    assert last_moment(tmp_path) is None


def test_when_this_process_began():
    assert 0 < time.time() - process_start() < 24 * 3600
    code = (
        "import time; t = time.time(); from data2vec_jax.metrics.throughput import process_start;"
        "time.sleep(1); print(t - process_start())"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 0 < float(out.stdout) < 5


def test_peak_bytes_are_those_of_the_process_or_of_its_fullest_device(monkeypatch):
    # A process of its own: threads of other tests take and free memory in this one.
    code = (
        "import numpy as np; from data2vec_jax.metrics.hardware import forget_peak, peak_bytes;"
        "before = peak_bytes(); held = np.ones(2**24); grown = peak_bytes() - before; del held;"
        "left = peak_bytes() - before; forget_peak(); print(grown, left, peak_bytes() - before)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    grown, left, forgotten = (float(x) / 2**20 for x in out.stdout.split())
    assert 115 < grown < 190 and left > 100 and forgotten < 90  # of 128 MiB
    stats = [{"peak_bytes_in_use": 7, "bytes_in_use": 9}, None, {"peak_bytes_in_use": 8}]
    devices = [types.SimpleNamespace(memory_stats=lambda s=s: s) for s in stats]
    monkeypatch.setattr(jax, "local_devices", lambda: devices)
    assert peak_bytes() == 8


def test_throughput_leaves_out_compile_eval_and_save(monkeypatch):
    clock = Clock(monkeypatch)
    devices = [types.SimpleNamespace(platform="gpu", device_kind="NVIDIA A100-SXM4-80GB")] * 4
    watch = Stopwatch()
    clock.now += 50
    speed = Throughput(watch, batch_size=32, flops_per_step=312e12, devices=devices, start_step=10)
    with watch.measure("compile"):
        clock.now += 100
    with watch.measure("data"):
        clock.now += 1
    with watch.measure("train"):
        clock.now += 3
    # Two steps in 4 s; two steps' FLOPs are half of one second of the four devices.
    assert speed.read(12) == {
        "examples_per_second": 16.0,
        "mfu": 0.5 / 4,
        "goodput": pytest.approx(3 / 154),
        "peak_bytes": ANY,
    }
    with watch.measure("eval"):
        clock.now += 7
    with watch.measure("train"):
        clock.now += 1
    assert speed.read(13)["examples_per_second"] == 32.0
    assert all(map(math.isfinite, speed.read(13).values()))  # asked twice for one step


def test_speed_of_short_steps_is_taken_over_a_second(monkeypatch):
    clock = Clock(monkeypatch)
    device = types.SimpleNamespace(platform="gpu", device_kind="Tesla T4")
    speed = Throughput(Stopwatch(), batch_size=8, flops_per_step=1.0, devices=[device])
    for step in range(1, 41):
        clock.now += 0.125
        assert speed.read(step)["examples_per_second"] == 64.0
    # The flush before an eval: the next step is found done at once.
    assert speed.read(41)["examples_per_second"] == pytest.approx(64.0 * 9 / 8)


def test_mfu_is_finite_on_this_machine():
    speed = Throughput(Stopwatch(), batch_size=1, flops_per_step=1e9, devices=jax.devices())
    time.sleep(0.01)
    assert 0 < speed.read(1)["mfu"] < math.inf


@pytest.mark.parametrize(
    "kind, cores, teraflops",
    [
        ("TPU v4", 1, 137.5),
        ("TPU v4", 2, 275),
        ("TPU v5", 2, 459),
        ("TPU v5p", 2, 459),
        ("TPU v5 lite", 1, 197),
        ("TPU v6 lite", 1, 918),
        ("TPU7x", 1, 1153.5),
    ],
)
def test_a_tpu_device_is_a_core_or_a_chip(kind, cores, teraflops):
    device = types.SimpleNamespace(platform="tpu", device_kind=kind, num_cores=cores)
    assert peak_flops([device] * 8) == pytest.approx(8 * teraflops * 1e12)


@pytest.mark.parametrize(
    "kind, teraflops",
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA A100-PCIE-40GB", 312),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("Tesla V100-SXM2-16GB", 125),
        ("Tesla T4", 65),
        ("NVIDIA GeForce RTX 4090", 165),
        ("NVIDIA A10G", None),  # not an A10
        ("Quadro T400", None),
    ],
)
def test_gpu_names_are_matched_by_whole_words(kind, teraflops):
    assert peak_of_kind(kind) == (teraflops and teraflops * 1e12)


# --- statistics ---------------------------------------------------------------------------------


def anova(y, w):
    """Adjusted shares by explicit loops in float64: 1 - MS(within) / MS(total)."""
    cells = {(b, t): y[b, t].astype(np.float64) for b, t in np.argwhere(w)}
    grand = np.mean(list(cells.values()), axis=0)
    total = sum(((v - grand) ** 2).sum() for v in cells.values()) / (len(cells) - 1)
    shares = []
    for axis in (1, 0):  # group by position, by example
        groups = {}
        for key, v in cells.items():
            groups.setdefault(key[axis], []).append(v)
        within = sum(((np.array(g) - np.mean(g, axis=0)) ** 2).sum() for g in groups.values())
        shares.append(max(0.0, 1 - within / (len(cells) - len(groups)) / total))
    return shares


@pytest.mark.parametrize("weighted", [False, True])
def test_statistics_equal_numpy(weighted):
    rng = np.random.default_rng(0)
    position, example = rng.normal(size=(1, 9, 6)), rng.normal(size=(7, 1, 6))
    y = (50 + position + 0.7 * example + 0.5 * rng.normal(size=(7, 9, 6))).astype(np.float32)
    w = rng.random((7, 9)) < 0.6 if weighted else np.ones((7, 9), bool)
    given = jnp.asarray(w) if weighted else None
    y_given = np.where(w[..., None], y, np.nan)  # padding may hold anything
    rows = y[w].astype(np.float64)

    want = np.sqrt(rows.var(axis=0, ddof=1) + 1e-6).mean()
    np.testing.assert_allclose(jax.jit(mean_std)(y_given, given), want, rtol=1e-5)
    flat = given.reshape(-1) if weighted else None
    np.testing.assert_allclose(mean_std(y_given.reshape(-1, 6), flat), want, rtol=1e-5)

    shares = jax.jit(explained_shares)(y_given, given)
    np.testing.assert_allclose(shares, anova(y, w), rtol=1e-4)
    assert 0.3 < shares[0] < 0.8 and 0.1 < shares[1] < 0.5  # the test is not about zeros

    eigenvalues = np.linalg.eigvalsh(np.cov(rows.T))
    want = eigenvalues.sum() ** 2 / (eigenvalues**2).sum()
    np.testing.assert_allclose(jax.jit(effective_rank)(y_given, given), want, rtol=1e-4)


def test_mean_std_keeps_its_digits_when_the_mean_is_large():
    rng = np.random.default_rng(0)
    y = (1000 + 0.05 * rng.normal(size=(4096, 8))).astype(np.float32)
    want = np.sqrt(y.astype(np.float64).var(axis=0, ddof=1) + 1e-6).mean()
    np.testing.assert_allclose(mean_std(y), want, rtol=1e-3)


def test_shares_of_pure_noise_are_near_zero_and_of_collapse_one():
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(4, 50, 16)).astype(np.float32)  # raw share by position: 0.25
    assert max(map(float, explained_shares(noise))) < 0.03
    same = np.broadcast_to(noise[:1], noise.shape)
    np.testing.assert_allclose(explained_shares(same), [1, 0], atol=1e-5)
    flat = np.broadcast_to(noise[:, :1], noise.shape)
    np.testing.assert_allclose(explained_shares(flat), [0, 1], atol=1e-5)


@pytest.mark.parametrize(
    "y",
    [
        np.full((3, 5, 4), 0.1, np.float32),  # constant: no variance to explain
        np.random.default_rng(0).normal(size=(1, 1, 4)).astype(np.float32),
        np.zeros((2, 2, 4), np.float32),
    ],
)
def test_degenerate_arrays_give_finite_numbers(y):
    assert float(mean_std(y)) == pytest.approx(1e-3, rel=1e-2)
    assert list(map(float, explained_shares(y))) == [0, 0]
    assert float(effective_rank(y)) == 0
    nothing = jnp.zeros(y.shape[:2])
    assert float(mean_std(y, nothing)) == pytest.approx(1e-3)
    assert list(map(float, explained_shares(y, nothing))) == [0, 0]


def test_one_example_has_no_share_by_position():
    y = np.random.default_rng(0).normal(size=(1, 5, 4)).astype(np.float32)
    assert list(map(float, explained_shares(y))) == [0, 0]


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_effective_rank_counts_directions_at_any_scale(rank):
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.normal(size=(8, 8)))[0][:rank]
    for scale in (1e-8, 1.0, 1e8):
        x = (scale * rng.normal(size=(20_000, rank)) @ basis).astype(np.float32)
        assert float(effective_rank(x)) == pytest.approx(rank, rel=0.01)


def test_statistics_do_not_depend_on_the_sharding():
    rng = np.random.default_rng(0)
    n = len(jax.devices())
    y = rng.normal(size=(2 * n, 6, 8)).astype(np.float32) + rng.normal(size=(1, 6, 8))
    w = rng.random((2 * n, 6)) < 0.7
    mesh = jax.make_mesh((n,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    @jax.jit
    def statistics(y, w):
        shares = explained_shares(y, w)
        return mean_std(y, w), *shares, effective_rank(y, w)

    split = NamedSharding(mesh, P("data"))
    got = statistics(jax.device_put(y, split), jax.device_put(w, split))
    np.testing.assert_allclose(got, statistics(y, w), rtol=1e-5)


# --- alarms -------------------------------------------------------------------------------------


def test_an_alarm_sounds_once_until_the_value_has_recovered():
    monitor = CollapseMonitor(CollapseConfig())
    values = [0.5, 0.09, 0.08, 0.101, 0.09, 0.2, 0.05]  # 0.101 is no recovery yet
    texts = [monitor.check(n, {"target_std": v}) for n, v in enumerate(values, 1)]
    assert [len(t) for t in texts] == [0, 1, 0, 0, 0, 0, 1]
    (text,) = texts[1]
    assert "step 2" in text and "0.09 < 0.1" in text and "learning rate" in text
    assert "\n" not in text


def test_each_kind_of_collapse_has_its_alarm():
    monitor = CollapseMonitor(CollapseConfig())
    healthy = {
        "target_std": 0.5,
        "pred_std": 0.4,
        "target_by_position": 0.2,
        "target_by_example": 0.1,
        "loss": 1.0,
    }
    assert monitor.check(1, healthy) == []
    assert monitor.check(2, {"loss": 1.0}) == []
    bad = {
        "target_std": 0.01,
        "pred_std": 0.001,
        "target_by_position": 0.95,
        "target_by_example": 0.99,
    }
    texts = monitor.check(3, bad)
    assert len(texts) == 4
    assert "95%" in texts[2] and "position" in texts[2] and "over time" in texts[3]
    assert monitor.check(4, healthy) == [] and len(monitor.check(5, bad)) == 4


def test_a_front_end_that_loses_its_variety_has_an_alarm():
    """The waveform demo of speech, whose linear probe called it better than nothing."""
    ranks = [20.0, 12.0, 5.1, 4.9, 2.0, 1.7]  # a quarter of the highest is 5
    monitor = CollapseMonitor(CollapseConfig(action="stop", after=0))  # a rank only warns
    texts = [monitor.check(n, {"feature_rank": rank}) for n, rank in enumerate(ranks, 1)]
    assert [len(t) for t in texts] == [0, 0, 0, 1, 0, 0]
    assert "effective rank 4.9" in texts[3][0] and "above 5)" in texts[3][0]
    healthy = CollapseMonitor(CollapseConfig())
    for rank in (6.78, 7.13, 3.55, 7.15):  # of the demo with log-mel frames
        assert healthy.check(1, {"feature_rank": rank}) == []
    off = CollapseMonitor(CollapseConfig(min_rank_share=0))
    assert [off.check(1, {"feature_rank": rank}) for rank in (20.0, 1.0)] == [[], []]


def test_targets_of_one_direction_have_an_alarm():
    """Speech, 200 updates, whose warm-up was too short: their spread was that of a healthy run."""
    ranks = [11.8, 3.4, 2.8, 2.1, 1.7, 1.05]
    monitor = CollapseMonitor(CollapseConfig())
    texts = [
        monitor.check(n, {"target_rank": rank, "target_std": 0.87}) for n, rank in enumerate(ranks)
    ]
    assert [len(t) for t in texts] == [0, 0, 0, 0, 1, 0]
    assert "targets have lost their variety (effective rank 1.7 < 2)" in texts[4][0]
    healthy, low = CollapseMonitor(CollapseConfig()), CollapseMonitor(CollapseConfig())
    for rank in (11.8, 12.2, 4.6, 3.1, 8.9):  # the same with a longer one
        assert healthy.check(1, {"target_rank": rank}) == []
    for rank in (1.5, 1.2, 2.6):  # it starts so and has not fallen
        assert low.check(1, {"target_rank": rank}) == []


def test_the_rank_of_targets_is_of_positions_without_padding():
    x = np.random.default_rng(0).normal(size=(2, 6, 5)).astype(np.float32)
    valid = np.arange(6) < np.array([[6], [3]])
    tokens = types.SimpleNamespace(x=jnp.ones((2, 6, 3)), valid=jnp.array(valid))
    part = dict(prediction=x[:, :2], masked_targets=x[:, :2], weights=np.ones((2, 2)))
    found = Intermediates(total=0.0, count=4.0, tokens=tokens, targets=x, **part)
    eigenvalues = np.linalg.eigvalsh(np.cov(x[valid].T))
    wanted = eigenvalues.sum() ** 2 / (eigenvalues**2).sum()
    assert float(targets.monitor(found)["target_rank"]) == pytest.approx(wanted, rel=1e-5)


def test_a_front_end_whose_spread_falls_has_an_alarm():
    """As where a rate of ten times the recipe's had it fall from 0.34 to 0.0015."""
    monitor = CollapseMonitor(CollapseConfig())
    spreads = [0.2, 0.34, 0.1, 0.03, 0.0015]
    texts = [monitor.check(n, {"feature_std": spread}) for n, spread in enumerate(spreads, 1)]
    assert [len(t) for t in texts] == [0, 0, 0, 1, 0]
    assert "front end is collapsing" in texts[3][0] and "0.03, once far above 0.034" in texts[3][0]


@pytest.mark.parametrize("decay", [{"ema_decay": 0.0}, {}])
def test_a_teacher_that_is_the_student_has_an_alarm(decay):
    monitor = CollapseMonitor(CollapseConfig())
    line = {"target_std": 0.5, "learning_rate": 1e-3} | decay
    (text,) = monitor.check(1, line)
    assert "the teacher is the student" in text and "averaged" in text
    assert monitor.check(2, line | {"ema_decay": 0.99}) == []
    assert monitor.check(3, {"target_std": 0.5}) == []  # no training line


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["target_std", "target_by_position", "feature_rank"])
def test_no_number_is_an_alarm_and_no_collapse(name, value):
    monitor = CollapseMonitor(CollapseConfig(action="stop", after=0))
    assert monitor.check(1, {name: 0.5, "feature_rank": 9.0}) == []
    (text,) = monitor.check(2, {"feature_rank": 9.0, name: value})
    assert f"step 2: {name} is {value}" in text
    assert monitor.check(3, {name: 8.0 if name == "feature_rank" else 0.5}) == []


def test_which_alarms_stop_a_run_can_be_chosen():
    strict = CollapseMonitor(CollapseConfig(action="stop", after=0, acts_on=("feature_rank",)))
    assert len(strict.check(1, {"target_std": 0.0, "feature_rank": 20.0})) == 1
    with pytest.raises(UserError, match="effective rank 1"):
        strict.check(2, {"feature_rank": 1.0})
    for wrong in ({"action": "halt"}, {"acts_on": ("rank",)}):
        with pytest.raises(UserError, match=r"config\.collapse"):
            check_section("collapse", wrong, CollapseConfig)


def test_limits_can_be_switched_off_and_warnings_delayed():
    off = CollapseMonitor(
        CollapseConfig(
            min_target_std=0,
            min_pred_std=0,
            max_position_share=1,
            max_example_share=1,
            action="stop",
        )
    )
    worst = {"target_std": 0, "pred_std": 0, "target_by_position": 1, "target_by_example": 1}
    assert off.check(9000, worst) == []
    late = CollapseMonitor(CollapseConfig(warn_after=10))
    assert late.check(10, worst) == [] and len(late.check(11, worst)) == 4


def test_a_stop_only_if_asked_for_and_only_after_the_given_step():
    bad, hidden = {"pred_std": 0.001}, {"target_by_position": 0.99}
    patient = CollapseMonitor(CollapseConfig(after=100))
    assert len(patient.check(101, bad)) == 1
    strict = CollapseMonitor(CollapseConfig(after=100, action="stop"))
    assert len(strict.check(100, bad)) == 1
    assert len(strict.check(101, hidden)) == 1  # shares only warn
    with pytest.raises(UserError, match=r"step 101: predictions hardly vary .*stopped"):
        strict.check(101, bad)


# --- parameters ---------------------------------------------------------------------------------


def test_parameter_table_groups_and_counts():
    def leaf(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    params = {
        "encoder": {
            "blocks": {"qkv": {"kernel": leaf(12, 64, 192), "bias": leaf(12, 192)}},
            "norm": {"scale": leaf(64)},
        },
        "mask_token": leaf(64),
        "head": {"kernel": np.zeros((64, 64), np.float32)},
    }
    table = parameter_table(params)
    rows = {line.split()[0]: line.split() for line in table.splitlines()}
    blocks = 12 * 64 * 192 + 12 * 192
    total = blocks + 64 + 64 + 64 * 64
    assert rows["total"] == ["total", f"{total:,}"]
    assert rows["encoder/blocks"][1:] == [f"{blocks:,}", f"{blocks / total:.1%}"]
    assert rows["qkv/kernel"][1:] == ["[12,", "64,", "192]", "float32", "147,456"]
    assert rows["head"][1] == "4,096" and rows["mask_token"][-1] == "64"
    assert len(table.splitlines()) == 2 + 4 + 5 + 2  # header, groups, leaves, total
