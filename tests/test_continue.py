"""Pretraining goes on from a checkpoint of other code: student and teacher of the recorded runs,
put into their files, converted, and begun from. The first loss is the recorded one.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import reference_v2
from configs_for_tests import config_of
from recorded import LOSS, NAMES, load, quick_jit

import data2vec_jax
from data2vec_jax import train
from data2vec_jax.convert import __main__ as command
from data2vec_jax.convert import pickles
from data2vec_jax.convert.tables import entries_of
from data2vec_jax.core import checkpoints
from data2vec_jax.core.errors import UserError
from data2vec_jax.core.state import TrainState, select
from data2vec_jax.core.trees import flatten

CASES = [name for name in NAMES if "generation" in load(name).info]


def stored(case, path):
    """The case's first student and teacher in the layout of the authors' file."""
    info, student, teacher = case.info, case.part("student/"), case.part("teacher/")

    def entries(state):
        return {entry.name: entry for entry in entries_of(state)}

    model, average = entries(student), entries(teacher)
    if "beit" in info["generation"]:
        size = info["model"]["patch_size"]
        flags = {"model": "beit_fairseq", **info["model"], "patch_size": size}
        return pickles.write(path, {"model": model, "model_ema": average, "args": flags})
    if "2.0" in info["generation"]:
        name = info["modality"]
        part = info["modality_cfg"] | {"decoder": info.get("decoder", {})}
        flags = info["model"] | {"modalities": {name: part}, "supported_modality": name.upper()}
        content = model | {"_ema": average}
    elif info["modality"] == "text":
        transformer = info["transformer"] | {"encoder": info["encoder"]}
        flags = {"_name": "data2vec_text", **info["model"], "transformer": transformer}
        content = model | {"encoder._ema": average}
    else:
        flags = {"_name": "data2vec_audio", **info["model"]}
        content = model | {"_ema": average}
    flags = json.loads(json.dumps(flags))
    pickles.write(path, {"model": content, "cfg": {"model": flags}, "extra_state": {}})


def first_state(model, batch, averaged, path):
    """The state of a run that begins from `path`."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), batch)["params"]
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    state = TrainState(jnp.int32(0), zeros, select(zeros, averaged), (), jax.random.key(0))
    return checkpoints.init_state_from(path, state, jax.eval_shape(lambda: state))


@pytest.mark.parametrize("name", CASES)
def test_first_loss_is_the_recorded_one(name, tmp_path):
    case = load(name)
    stored(case, tmp_path / "theirs.pt")
    command.main([str(tmp_path / "theirs.pt"), str(tmp_path / "ours"), "--to=jax"])
    second = "2.0" in case.info["generation"]
    setup = (reference_v2 if second else reference).setup(case)
    state, new = first_state(setup.model, setup.batch, setup.config["averaged"], tmp_path / "ours")
    assert new == []
    converted = json.loads((tmp_path / "ours/config.json").read_text())
    assert converted["model"]["width"] == setup.config["model"]["width"]
    if second:
        stages = quick_jit(setup.given)(state.params, state.teacher)
    else:
        most = int(setup.mask.sum(-1).max())
        given = (setup.batch, setup.visible, setup.mask, most, None)
        program = quick_jit(
            lambda params, teacher: setup.objective.forward_with_masks(params, teacher, *given)
        )
        stages = program(state.params, state.teacher)
    sums = second or setup.sums
    loss = float(stages.total if sums else stages.total / stages.count)
    recorded = float(case.arrays["fwd/loss"])
    assert abs(loss - recorded) <= LOSS * abs(recorded)


def test_a_checkpoint_of_our_own_can_be_begun_from(tmp_path):
    """A teacher that is not there is its student; a head that is not there is new."""
    case = load(next(name for name in CASES if "audio" in name))
    stored(case, tmp_path / "theirs.pt")
    command.main(
        [str(tmp_path / "theirs.pt"), str(tmp_path / "ours"), "--to=jax", "--weights=teacher"]
    )
    setup = reference.setup(case)
    averaged = ("^encoder/", "^norm/", "^frontend/")
    state, new = first_state(setup.model, setup.batch, averaged, tmp_path / "ours")
    assert new == [] and {*state.teacher} == {"encoder", "norm", "frontend"}
    for path, value in flatten(state.teacher).items():
        np.testing.assert_array_equal(value, flatten(state.params)[path])
        assert value is not flatten(state.params)[path]
    loaded = data2vec_jax.load(tmp_path / "ours")
    np.testing.assert_array_equal(state.teacher["norm"]["scale"], loaded.params["norm"]["scale"])


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    audio, vision = (
        next(name for name in CASES if kind in name) for kind in ("audio", "vision_v1")
    )
    stored(load(vision), tmp_path / "theirs.pth")
    command.main([str(tmp_path / "theirs.pth"), str(tmp_path / "ours"), "--to=jax"])
    setup = reference.setup(load(audio))
    with pytest.raises(UserError, match="does not fit the config"):
        first_state(setup.model, setup.batch, (), tmp_path / "ours")


@pytest.mark.usefixtures("light_compilation")
def test_the_loop_begins_from_a_checkpoint(tmp_path, capfd):
    config = config_of("vision_v1", "smoke").to_dict()
    config, programs = config | {"total_steps": 1}, {}
    train.train(config, tmp_path / "first", programs=programs)
    config = config | {"seed": 7}
    init_from = str(tmp_path / "first")
    state = train.train(config, tmp_path / "second", programs=programs, init_from=init_from)
    assert f"initialised from {init_from}; 0 new parameters" in capfd.readouterr().err
    first = checkpoints.load_params(tmp_path / "first")
    same = jax.tree.map(
        lambda a, b: float(np.abs(a - b).max()), first, jax.device_get(state.params)
    )
    assert max(jax.tree.leaves(same)) < 0.1  # one update away, and not another initialisation
