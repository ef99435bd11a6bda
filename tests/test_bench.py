"""The benchmark: the PyTorch step beside it does the same, FLOPs are counted right, sizes grow."""

import json
import math
import subprocess
import sys
from pathlib import Path

import conftest
import jax
import numpy as np
import pytest
import torch
from configs_for_tests import config_of, module_of
from torch.utils.flop_counter import FlopCounterMode

from data2vec_jax.bench import __main__ as command
from data2vec_jax.bench import benchmark, measure, sweep, torch_baseline
from data2vec_jax.bench.subject import Subject, sized
from data2vec_jax.convert import export
from data2vec_jax.convert.ours import Checkpoint
from data2vec_jax.convert.tables import entries_of
from data2vec_jax.core.errors import UserError
from data2vec_jax.core.train_step import step_keys
from data2vec_jax.core.trees import flatten
from data2vec_jax.tasks import pretrain

ALL = [f"{modality}_v{version}" for modality in ("speech", "text", "vision") for version in (1, 2)]


def subject_of(name):
    """A smoke config without dropout, not compiled, in float32."""
    config = sized(config_of(name).to_dict(), None, jax.devices()[:1])
    config["model"]["dropout"] = 0.0
    config["model"]["encoder"] |= dict(
        dropout=0.0, attention_dropout=0.0, layerdrop=0.0, drop_path=0.0
    )
    return Subject(config, jax.devices()[:1])


def give_weights(other, subject):
    """Puts our student and teacher into the PyTorch step."""
    params = subject.state.params
    checkpoint = Checkpoint(None, subject.config, entries_of(flatten(params)))
    written = export.tensors(checkpoint, export.layout_for(subject.config, "hf"))
    state = {e.name.removeprefix("data2vec_text."): np.array(e.make()) for e in written.entries}
    own = other.model.model.state_dict()
    state = {k: torch.from_numpy(v) for k, v in state.items() if k in own}
    missing = other.model.model.load_state_dict(state, strict=False).missing_keys
    assert not [k for k in missing if "position_ids" not in k and "token_type" not in k], missing
    linears = [m for m in other.model.head.modules() if isinstance(m, torch.nn.Linear)]
    with torch.no_grad():
        for i, linear in enumerate(linears):
            ours = params["head"][f"linear{i}"]
            linear.weight.copy_(torch.from_numpy(np.array(ours["kernel"]).T))
            linear.bias.copy_(torch.from_numpy(np.array(ours["bias"])))
        for mean, new in zip(*other.pairs, strict=True):
            mean.copy_(new)


def conv_backward_flops(gradient, x, kernel, *_, **__):
    """Both gradients take what forward takes; PyTorch's own count forgets the groups."""
    return 2 * 2 * math.prod(gradient) * math.prod(kernel[1:])


@pytest.mark.parametrize("name", ["speech_v1", "text_v1", "vision_v1"])
def test_peer_has_our_loss_and_our_flops(name):
    subject = subject_of(name)
    other = benchmark.make_torch_baseline(subject, attention="eager")
    give_weights(other, subject)

    @jax.jit
    def ours(state, batch):
        stages = subject.objective.forward(state.params, state.teacher, batch, step_keys(state))
        return stages.total / stages.count

    loss = float(ours(subject.state, subject.host_batch))
    counter = FlopCounterMode(
        display=False, custom_mapping={torch.ops.aten.convolution_backward: conv_backward_flops}
    )
    with counter:
        theirs = other()
    assert theirs == pytest.approx(loss, rel=2e-4)
    assert counter.get_total_flops() == pytest.approx(subject.flops, rel=0.01)
    after = [new.detach() - mean for mean, new in zip(*other.pairs, strict=True)]
    assert max(float(d.abs().max()) for d in after) > 0  # the student moved, the average lags


def test_bench_with_peer_writes_numbers_that_agree(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(measure, "BLOCKS", 2)
    monkeypatch.setattr(measure, "LEAST_BLOCKS", 2)
    monkeypatch.setattr(benchmark, "DATA_STEPS", 2)
    file = tmp_path / "bench.json"
    config = f"--config={conftest.ROOT / 'configs/vision_v1.py'}:smoke"
    command.main(["bench", config, "--peer", "--batch=3", f"--json={file}"])
    said, result = capsys.readouterr().out, json.loads(file.read_text())
    assert result["batch_size"] == 3
    assert result["examples_per_second"] == pytest.approx(3 / result["step_seconds"])
    rate = result["flops_per_step"] / result["step_seconds"]
    assert result["mfu_of_measured_matmul"] == pytest.approx(
        rate / result["matmul_flops_per_second"]
    )
    assert 0 < result["mfu"] < 1
    assert result["peer"]["ratio"] == pytest.approx(
        result["peer"]["step_seconds"] / result["step_seconds"]
    )
    assert result["peak_bytes"] > 0 and result["compile_seconds"] > 0
    assert 0 <= result["data_wait"] <= 1
    assert result["flops_formula"] in said and "ratio" in said


@pytest.mark.parametrize(
    "ours, theirs, deadline, blocks",
    [(0.1, 0.1, 360, 7), (9, 11, 360, 3), (9, 11, 130, 2), (200, 300, 360, 1)],
)
def test_blocks_end_in_time(ours, theirs, deadline, blocks, monkeypatch):
    """Steps of so many seconds by a clock of our own."""
    now = 0.0

    def wait(count, step):
        nonlocal now
        now += count * step

    monkeypatch.setattr(measure.time, "monotonic", lambda: now)
    monkeypatch.setattr(measure.time, "perf_counter", lambda: now)
    said, calls = [], [lambda n: wait(n, ours), lambda n: wait(n, theirs)]
    took = measure.alternate(calls, True, deadline=deadline, say=said.append)
    assert took == [pytest.approx([ours] * blocks), pytest.approx([theirs] * blocks)]
    assert len(said) == blocks and said[0].startswith(f"block 1: {1e3 * ours:,.1f} ms, ")
    assert blocks == 1 or now <= deadline


def test_what_there_is_no_time_for_is_left_out(capsys):
    config = f"--config={conftest.ROOT / 'configs/vision_v1.py'}:smoke"
    command.main(["bench", config, "--batch=3", "--seconds=1"])
    said = capsys.readouterr()
    assert "shares   not measured (no time left); waiting for data not measured" in said.out
    assert said.err.count("block ") == 1 and "median of 1 blocks" in said.out


def test_peer_is_of_1_0_only():
    with pytest.raises(UserError, match=r"1\.0 only"):
        torch_baseline.check(config_of("vision_v2", "base").to_dict())


def test_peer_reads_waveforms_only():
    config = config_of("speech_v1")
    torch_baseline.check(config.to_dict())
    config.model.frontend = dict(kind="mel")
    with pytest.raises(UserError, match=r"frontend\.kind='waveform'"):
        torch_baseline.check(config.to_dict())


def test_wrong_options_are_one_line(capsys):
    config = f"--config={conftest.ROOT / 'configs/vision_v1.py'}:smoke"
    for option in ("--batch=many", "--seconds=0"):
        with pytest.raises(SystemExit) as stopped:
            command.main(["bench", config, option])
        assert stopped.value.code == 2
        assert capsys.readouterr().err.startswith(f"error: {option}")


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("axis", ["batch", "length", "depth", "width", "clones"])
def test_sweep_scales_one_size_and_flops_follow(name, axis):
    base = sized(config_of(name, "base").to_dict(), None, jax.devices()[:1])
    flops, sizes = [], []
    for share in sweep.SHARES:
        config = sweep.scaled(base, axis, share)
        if config is None:
            assert axis == "clones" and name.endswith("1")
            return
        sizes.append(sweep.sizes_of(config))
        task = pretrain.abstract_task(config)
        flops.append(task.flops(task.shapes[-1]))
    assert sizes[-1 if axis != "batch" else 0] == sweep.sizes_of(base)
    changed = {key for key in sizes[0] if sizes[0][key] != sizes[-1][key]}
    assert changed == {axis}
    grows = sweep.exponent([s[axis] for s in sizes], flops)
    least, most = {"width": (0.5, 2.0), "length": (0.98, 1.3), "batch": (1, 1)}.get(axis, (0.4, 1))
    assert least - 1e-6 <= grows <= most + 1e-6


def test_exponent_is_that_of_a_power_law():
    assert sweep.exponent([1, 2, 4], [3 * n**1.5 for n in (1, 2, 4)]) == pytest.approx(1.5)
    assert math.isclose(sweep.exponent([1, 2], [5, 5]), 0.0, abs_tol=1e-12)


# launch/experiments/benchmarks.py -----------------------------------------------------------------


@pytest.fixture(scope="module")
def launch():
    return module_of("launch/experiments/benchmarks.py")


def test_the_page_holds_the_committed_benchmarks(launch):
    text, results = launch.PAGE.read_text(), launch.known()
    assert results
    for name, table in launch.tables(results).items():
        assert f"<!-- {name} -->\n{table}\n<!-- end of {name} -->\n" in text, (
            "python launch/experiments/benchmarks.py --tables"
        )
    wanted = launch.commands("cpu")
    for name, result in results.items():
        if name in wanted:
            asked = [a.removeprefix("--") for a in wanted[name] if a.startswith("--config")]
            assert result["config"] == " ".join(asked).removeprefix("config="), name
            assert ("--peer" in wanted[name]) == (result["peer"] is not None), name
            assert ("--sweep" in wanted[name]) == ("sweep" in result), name


def test_benchmarks_are_made_once(launch, tmp_path, monkeypatch):
    calls = []

    def measure(command, **_):
        calls.append(command)
        if "vision_v2" in command[3]:  # fails
            return subprocess.CompletedProcess(command, 2)
        old = "v1" in command[3]
        result = {
            "config": command[3].removeprefix("--config="),
            "step_seconds": 2.0,
            "seconds_of_parts": dict.fromkeys("abcdef", 0.5),
            "devices": 1,
            "device": "cpu",
            "dtype": "float32",
            "shapes": {"tokens": [4, 512], "example_id": [4]},
            "seconds_per_masked_view": 0.5 if old else 0.1,
            "mfu_of_measured_matmul": 0.25,
            "flops_per_masked_view": 4e9 if old else 1e9,
            "peak_bytes": 2**31,
            "compile_seconds": 9.0,
            "compile_seconds_from_cache": 1.0,
            "peer": {"step_seconds": 3.0, "ratio": 1.5} if "--peer" in command else None,
        }
        Path(command[-1].removeprefix("--json=")).write_text(json.dumps(result))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(launch, "FOLDER", tmp_path / "benchmarks")
    monkeypatch.setattr(launch, "PAGE", tmp_path / "page.md")
    monkeypatch.setattr(launch, "device", lambda: "cpu")
    monkeypatch.setattr(launch.subprocess, "run", measure)
    marks = "".join(f"<!-- {n} -->\nold\n<!-- end of {n} -->\n" for n in launch.tables({}))
    launch.PAGE.write_text(f"before\n{marks}after\n")
    monkeypatch.setattr(sys, "argv", ["benchmarks.py"])
    failing = sum("vision_v2" in name for name in launch.commands("cpu"))
    for expected in (len(launch.commands("cpu")), failing):  # the second time, those that failed
        calls.clear()
        with pytest.raises(SystemExit, match=rf"{failing} of \d+ failed: cpu-vision_v2"):
            launch.main()
        assert len(calls) == expected
    text = launch.PAGE.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert (
        "| 1 x cpu, float32 | text_v1:base | 4 x 512 | 2000 | 3000 | 1.50 | 500.0 | 25% |" in text
    )
    assert "| cpu | text | 500 | 100 | 20% | 25% |" in text
