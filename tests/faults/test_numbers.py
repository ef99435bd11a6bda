"""Numbers that would spoil a run: NaN, Inf and too large ones in an example or in a gradient."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import poisoned_train
import pytest
from configs_for_tests import config_of

from data2vec_jax import train as trainer
from data2vec_jax.core import distributed, optimizer, sharding
from data2vec_jax.core.checkpoints import Checkpoints, load_params
from data2vec_jax.core.errors import UserError
from data2vec_jax.core.run import Run
from data2vec_jax.core.task import Task
from data2vec_jax.core.train_step import init_state, make_train_step
from data2vec_jax.metrics.skipped import SkippedError
from data2vec_jax.metrics.writer import read_lines
from data2vec_jax.tasks import pretrain
from data2vec_jax.tasks.registry import check_config

ROOT = Path(__file__).resolve().parent.parent.parent
VALUES = (np.nan, np.inf, 1e38)
RECIPES = ("vision_v1", "speech_v1", "text_v1")
STEPS = 6


def config(name, **changes):
    """A recipe's smoke config on one device, at a rate at which every update moves."""
    made = config_of(name, **{"dtype": "float32", "total_steps": STEPS} | changes)
    made.schedule = dict(kind="linear", peak=1e-3, warmup=0.0)
    made.ema = dict(start=0.9, end=0.9, anneal=1.0)
    return made.to_dict()


def leaves(tree):
    """Path -> array of everything but the place in the schedule."""
    found = jax.tree.leaves_with_path(
        tree, is_leaf=lambda x: isinstance(x, optax.ScaleByScheduleState)
    )
    return {
        jax.tree_util.keystr(path): np.asarray(x)
        for path, x in found
        if not isinstance(x, optax.ScaleByScheduleState)
    }


def equal(one, other):
    one, other = leaves(one), leaves(other)
    assert one.keys() == other.keys()
    return all(np.array_equal(x, other[path]) for path, x in one.items())


# The step -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECIPES)
def test_a_spoiled_update_changes_nothing_and_the_next_is_sound(name):
    options = config(name, total_steps=20)
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        task = poisoned_train.poisonable(pretrain.make(options))
        run, data = Run(options, task, mesh), pretrain.make(options).data(0)
        clean = [dict(batch) for _, batch in zip(range(3), data, strict=False)]
        rows = clean[0]["example_id"].shape
        clean = [b | dict.fromkeys(poisoned_train.WHERE, np.zeros(rows, np.float32)) for b in clean]
        state, metrics = run.program(clean[0])(run.init(0), clean[0])
        assert metrics["skipped"] == 0
        before = jax.device_get(state.replace(key=None))
        for where in poisoned_train.WHERE:
            for value in VALUES:
                spoiled = np.zeros(rows, np.float32)
                spoiled[1] = value
                number = int(state.step)
                state, metrics = run.program(clean[1])(state, clean[1] | {where: spoiled})
                after = jax.device_get(state.replace(key=None))
                assert metrics["skipped"] == 1, (where, value)
                assert int(after.step) == number + 1
                for part in ("params", "teacher", "opt_state"):
                    assert equal(getattr(before, part), getattr(after, part)), (where, value, part)
                if where == "gradient":
                    assert np.isfinite(metrics["loss"])
        state, metrics = run.program(clean[2])(state, clean[2])
        after = jax.device_get(state.replace(key=None))
        assert metrics["skipped"] == 0 and np.isfinite(metrics["loss"])
        assert not equal(before.params, after.params) and not equal(before.teacher, after.teacher)
        # The schedule has gone on with the steps, Adam's bias correction with what it averaged.
        assert metrics["learning_rate"] == pytest.approx(1e-3 * 13 / 20, rel=1e-6)
        counting = [s for s in after.opt_state if "count" in getattr(s, "_fields", ())]
        counts = {type(s).__name__: int(s.count) for s in counting}
        assert counts == {"AdamState": 2, "ScaleByScheduleState": 8}


def toy(max_deviations, kind="sgd"):
    """(first state, step) of one weight whose gradient is the batch's mean."""
    tx = optimizer.make_optimizer(lambda n: 0.1, optimizer.OptimizerConfig(kind=kind))
    tx = optimizer.watching_norm(tx) if max_deviations else tx
    task = Task(
        shapes=(),
        shares=(),
        init=lambda key: {"w": jnp.zeros(1)},
        loss=lambda params, teacher, batch, draw: (
            jnp.sum(batch["x"] * params["w"]),
            jnp.float32(batch["x"].size),
            {},
        ),
    )
    step = make_train_step(task, tx, None, lambda n: 0.1, max_deviations=max_deviations)
    return init_state(task, tx, jax.random.key(0)), jax.jit(step)


def test_a_spike_is_skipped_if_asked_for_and_does_not_move_the_mean():
    rng = np.random.default_rng(0)
    norms = 1.0 + 0.1 * rng.standard_normal(300)
    norms[50], norms[200], norms[250] = 5.0, 5.0, 1.3  # in the first hundred nothing is a spike
    for limit, expected in ((None, []), (6.0, [200])):
        state, step = toy(limit)
        skipped = []
        for n, norm in enumerate(norms):
            state, metrics = step(state, {"x": jnp.full(4, norm, jnp.float32)})
            skipped += [n] if metrics["skipped"] else []
        assert skipped == expected
    statistics = state.opt_state.norm
    assert int(statistics.count) == 299
    assert float(statistics.mean) == pytest.approx(1.0, abs=0.05)
    assert 0.05 < float(jnp.sqrt(statistics.variance)) < 0.2


@pytest.mark.parametrize(("moment", "value"), [("mu", np.nan), ("mu", np.inf), ("nu", np.nan)])
def test_a_spoiled_moment_is_found_by_the_next_loss(moment, value):
    state, step = toy(None, "adamw")
    state, _ = step(state, {"x": jnp.ones(4)})
    adam, *rest = state.opt_state
    spoiled = jax.tree.map(lambda x: jnp.full_like(x, value), getattr(adam, moment))
    state = state.replace(opt_state=(adam._replace(**{moment: spoiled}), *rest))
    state, _ = step(state, {"x": jnp.ones(4)})
    assert not np.isfinite(state.params["w"]).all()  # which is never saved, see checkpoints
    for _ in range(2):
        state, metrics = step(state, {"x": jnp.ones(4)})
        assert metrics["skipped"] == 1 and not np.isfinite(metrics["loss"])


# Whole runs ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def programs():
    return {}


def bad_lines(folder):
    return [json.loads(line) for line in (folder / "bad_examples.jsonl").read_text().splitlines()]


def test_a_run_goes_on_counts_and_resumes_exactly(tmp_path, monkeypatch, programs, capfd):
    poisoned_train.install("example", np.nan, {2}, monkeypatch.setattr)
    options = config("vision_v1", log_every=1)
    whole = trainer.train(options, tmp_path / "whole", programs=programs)
    assert "step 2: update not applied, the loss is nan (1 so far)" in capfd.readouterr().err
    stops = distributed.Interrupt.stops
    monkeypatch.setattr(distributed.Interrupt, "stops", lambda self, step: step == 4)
    with pytest.raises(SystemExit):
        trainer.train(options, tmp_path / "parts", programs=programs)
    monkeypatch.setattr(distributed.Interrupt, "stops", stops)
    parts = trainer.train(options, tmp_path / "parts", programs=programs)
    for one, other in zip(
        *(jax.tree.leaves(s.replace(key=None)) for s in (whole, parts)), strict=True
    ):
        np.testing.assert_array_equal(one, other)
    for folder in ("whole", "parts"):
        lines = read_lines(tmp_path / folder / "metrics.jsonl")
        assert [line["skipped"] for line in lines] == [0, 1, 0, 0, 0, 0]
        assert [line["skipped_updates"] for line in lines] == [0, 1, 1, 1, 1, 1]
        assert (
            np.isnan(lines[1]["loss"]) and np.isfinite([lines[i]["loss"] for i in (0, 2, 5)]).all()
        )
        bad = bad_lines(tmp_path / folder)
        assert {(line["step"], line["reason"]) for line in bad} == {(2, "update not applied")}
        assert (
            len({line["example_id"] for line in bad}) == len(bad) == options["data"]["batch_size"]
        )
        for part in ("params", "teacher"):
            kept = load_params(tmp_path / folder, subtree=part)
            assert all(np.isfinite(x).all() for x in jax.tree.leaves(kept))


def test_too_many_in_a_row_end_the_run_and_the_last_checkpoint_is_sound(
    tmp_path, monkeypatch, programs
):
    poisoned_train.install("example", np.nan, {2, 4, 5, 6}, monkeypatch.setattr)
    options = config("vision_v1", log_every=2, skip=dict(max_in_a_row=2))
    options["checkpoint"] |= {"every": 1, "keep": 1}
    with pytest.raises(SkippedError, match=r"^step 6: the loss is nan, and 3 updates.*peak"):
        trainer.train(options, tmp_path / "run", programs=programs)
    kept = load_params(tmp_path / "run")
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(kept))
    with Checkpoints(tmp_path / "run/checkpoints", every=0) as checkpoints:
        assert checkpoints.latest() == 5
    assert {line["step"] for line in bad_lines(tmp_path / "run")} == {2, 4, 5, 6}


def test_nonsense_is_refused():
    for options in ({"max_in_a_row": -1}, {"max_deviations": 0.0}, {"max_deviations": np.nan}):
        with pytest.raises(UserError, match=r"config\.skip"):
            check_config(config("vision_v1") | {"skip": options})


def test_two_processes_skip_alike(tmp_path):
    options = [
        f"--config={ROOT}/configs/vision_v1.py:smoke",
        "--config.dtype=float32",
        f"--config.total_steps={STEPS}",
        f"--workdir={tmp_path / 'run'}",
    ]
    code = "import sys, processes; sys.exit(processes.run(sys.argv[1:], 2, 1))"
    script = [sys.executable, str(ROOT / "tests/poisoned_train.py"), "example", "inf", "3"]
    paths = f"{ROOT}:{ROOT / 'tests'}:{ROOT / 'launch'}"
    done = subprocess.run(
        [sys.executable, "-c", code, *script, *options],
        env=os.environ | {"PYTHONPATH": paths, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    lines = read_lines(tmp_path / "run/metrics.jsonl")
    assert [line["skipped_updates"] for line in lines] == [0, 0, 1, 1, 1, 1]
    assert np.isfinite([line["loss"] for line in lines if line["step"] != 3]).all()
    bad = bad_lines(tmp_path / "run")  # of both processes' rows
    assert len(bad) == config("vision_v1")["data"]["batch_size"] and {b["step"] for b in bad} == {3}
    for part in ("params", "teacher"):
        kept = load_params(tmp_path / "run", subtree=part)
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(kept))
