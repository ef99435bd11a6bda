"""Runs that go back to a healthy checkpoint, at a lower rate, when their predictions collapse."""

import json
import shutil

import jax
import numpy as np
import pytest
from configs_for_tests import config_of

from data2vec_jax import train as trainer
from data2vec_jax.core import sharding
from data2vec_jax.core.checkpoints import load_params
from data2vec_jax.core.errors import UserError
from data2vec_jax.core.run import Run
from data2vec_jax.metrics.writer import read_lines
from data2vec_jax.tasks import pretrain

pytestmark = pytest.mark.xdist_group("collapse")  # its fixtures are made once

STEPS, PEAK, LIMIT, AFTER, EVERY, FACTOR = 18, 0.05, 0.05, 16, 3, 0.25
MEASURED = ("loss", "learning_rate", "pred_std", "target_std", "grad_norm")


class Collapsing(Run):
    """A run whose `pred_std` is below the limit after 12 updates, and only at the full rate.

    All other numbers are true. Where a real run collapses depends on how sums are rounded.
    """

    def program(self, batch):
        program = super().program(batch)

        def told(state, batch):
            collapsed = jax.device_get(state.step) >= 12 and self.rate == 1
            state, scalars = program(state, batch)
            return state, scalars | {"pred_std": np.float32(LIMIT / 2 if collapsed else 1)}

        return told


def config(**collapse):
    made = config_of("vision_v1", dtype="float32", total_steps=STEPS, log_every=1, eval_every=0)
    made.schedule = dict(kind="constant", peak=PEAK, warmup=0.0)
    made.checkpoint = dict(every=EVERY, keep=1)
    made = made.to_dict()
    made["collapse"] = {"action": "back", "acts_on": ["pred_std"], "after": AFTER}
    made["collapse"] |= {"min_pred_std": LIMIT, "min_target_std": 0.0, "rate_factor": FACTOR}
    made["collapse"] |= collapse
    return made


def reference(options):
    """The same by hand: (line of each step, parameters at the end, steps gone back from and to)."""
    mesh = sharding.make_mesh()
    kept, lines, moves = {}, {}, []
    with jax.set_mesh(mesh):
        task = pretrain.make(options)
        run = Collapsing(options, task, mesh)
        state, step, healthy, ill = run.init(options["seed"]), 0, 0, False
        while step < STEPS:
            batch = next(iter(task.data(step)))
            step += 1
            state, scalars = run.program(batch)(state, batch)
            lines[step] = {name: float(scalars[name]) for name in MEASURED}
            value = lines[step]["pred_std"]
            ill = value < LIMIT or (ill and value <= 1.1 * LIMIT)
            if value < LIMIT and step > AFTER and len(moves) < 3:
                moves.append((step, healthy))
                run = Collapsing(options, task, mesh, rate=FACTOR ** len(moves))
                step, ill = healthy, False
                state = kept[step].replace(key=jax.random.wrap_key_data(kept[step].key))
            elif step % EVERY == 0 and not ill:
                healthy = step
                kept[step] = jax.device_get(state.replace(key=jax.random.key_data(state.key)))
    return lines, jax.device_get(state.params), moves


@pytest.fixture(scope="module")
def collapsing(light_compilation):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "Run", Collapsing)
        yield


@pytest.fixture(scope="module")
def gone_back(collapsing, tmp_path_factory):
    """(workdir, what it should hold) of a run that has gone back."""
    workdir = tmp_path_factory.mktemp("collapse") / "run"
    trainer.train(config(), workdir, verbose=False)
    return workdir, reference(config())


def compare(workdir, expected):
    lines, params, _ = expected
    found = {x["step"]: x for x in read_lines(workdir / "metrics.jsonl") if x["split"] == "train"}
    assert found.keys() == lines.keys()
    for step, line in lines.items():
        assert {name: found[step][name] for name in MEASURED} == line, step
    for one, other in zip(
        jax.tree.leaves(load_params(workdir)), jax.tree.leaves(params), strict=True
    ):
        np.testing.assert_array_equal(one, other)


def test_the_run_goes_on_from_the_newest_healthy_checkpoint(gone_back):
    workdir, expected = gone_back
    lines, _, moves = expected
    assert moves == [(17, 12)]  # 15 was saved in collapse, and with keep=1 in the place of 12
    compare(workdir, expected)
    rates = [line["learning_rate"] for line in lines.values()]
    assert rates == pytest.approx([PEAK] * 12 + [PEAK * FACTOR] * 6)


def test_nothing_is_lost(gone_back):
    workdir, _ = gone_back
    names = {path.name for path in (workdir / "checkpoints").iterdir()}
    assert {"collapsed-15", str(STEPS)} <= names and "15" not in names
    before = read_lines(workdir / "metrics.jsonl.collapsed-17")
    assert [line["step"] for line in before] == list(range(1, 19))  # they are read one step late
    assert before[16]["pred_std"] < LIMIT


def test_a_resumed_run_stays_at_the_lower_rate(gone_back, tmp_path):
    _, expected = gone_back
    options = config() | {"checkpoint": {"every": EVERY, "keep": 10}}
    trainer.train(options, tmp_path, verbose=False)
    shutil.rmtree(tmp_path / "checkpoints" / str(STEPS))
    position = json.loads((tmp_path / "checkpoints/15/position/data.json").read_text())
    assert position["collapse"]["returns"] == 1
    trainer.train(options, tmp_path, verbose=False)
    compare(tmp_path, expected)


def test_a_run_that_goes_back_too_often_ends(tmp_path, capfd):
    options = config(min_pred_std=1e3, after=3, max_returns=2)
    with pytest.raises(UserError, match=r"has not helped") as error:
        trainer.train(options, tmp_path, verbose=False)
    assert "\n" not in str(error.value)
    told = capfd.readouterr().err
    assert "going back to step 0, at 0.25 of the learning rate (1 of 2 times)" in told
    assert "at 0.0625 of the learning rate (2 of 2 times)" in told
