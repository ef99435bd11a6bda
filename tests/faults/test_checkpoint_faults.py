"""Damaged checkpoints and failed saves: what is lost is said, and nothing else is lost.

`python tests/faults/test_checkpoint_faults.py 100 50` flips so many bits in arrays, and in the rest
of the newest checkpoint, one at a time, and prints what became of them.
"""

import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import conftest  # noqa: F401  (its settings, before JAX starts)

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from configs_for_tests import config_of

from data2vec_jax import train
from data2vec_jax.core.checkpoints import Checkpoints, load_params
from data2vec_jax.core.errors import UserError
from data2vec_jax.core.state import TrainState

pytestmark = pytest.mark.xdist_group("checkpoint_faults")  # its fixtures are made once

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = {}  # compiled once for all runs of this file


def state_of(step):
    """A state of which all numbers depend on `step`."""
    draw = np.random.default_rng(step).normal
    params = {
        "block": {"kernel": draw(size=(64, 48)), "bias": draw(size=48)},
        "half": draw(size=(9, 5)).astype(jnp.bfloat16),
    }
    params = jax.tree.map(lambda x: jnp.asarray(x, x.dtype if x.dtype != float else None), params)
    moments = jax.tree.map(lambda x: x / 2, params)
    teacher = {"block": {"kernel": -params["block"]["kernel"]}}
    return TrainState(jnp.int32(step), params, teacher, (moments,), jax.random.key(step))


def shapes():
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        jax.eval_shape(lambda: state_of(0)),
    )


def bits(state):
    """All bytes of a state, in order."""
    state = state.replace(key=jax.random.key_data(state.key))
    return b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state))


def save_steps(directory, steps):
    with Checkpoints(directory, every=1, keep=9) as checkpoints:
        for step in steps:
            checkpoints.save(step, state_of(step), {"batch": step, "note": "x" * 40})


def flip(file, rng):
    """Flips one random bit of a file."""
    data = bytearray(file.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    file.write_bytes(data)


def in_arrays(folder):
    """Files of arrays, and all others; one file as often as it has bytes, so bits are alike."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)
    arrays = [path for path in files if path.parent.name == "d"]
    return arrays, [path for path in files if path not in arrays]


def after_flip(directory, file, seed):
    """What becomes of one flipped bit: 'found', 'harmless', or what is wrong."""
    flip(file, random.Random(seed))
    lines = []
    with Checkpoints(directory, every=1, keep=9) as checkpoints:
        checkpoints.tell = lines.append
        state, position = checkpoints.restore(shapes())
    step = position["batch"]
    expected = {"batch": step, "note": "x" * 40}
    if bits(state) != bits(state_of(step)) or position != expected:
        return f"{file.relative_to(directory)}: restored as if sound"
    if step == 20:
        return "harmless" if not lines else f"{file.name}: {lines}"
    told = len(lines) == 1 and "going on from step 10, 10 steps are lost" in lines[0]
    aside = (directory / "damaged-20").is_dir() and not (directory / "20").exists()
    return "found" if step == 10 and told and aside else f"{file.name}: step {step}, {lines}"


def flip_many(folder, in_array, elsewhere):
    """(kind, seed) -> what became of a flipped bit, each in a fresh copy of two checkpoints."""
    save_steps(folder / "sound", (10, 20))
    results = {}
    for kind, number in (("arrays", in_array), ("elsewhere", elsewhere)):
        for seed in range(number):
            copy = folder / f"{kind}-{seed}"
            shutil.copytree(folder / "sound", copy)
            files = in_arrays(copy / "20")[kind == "elsewhere"]
            sizes = [file.stat().st_size for file in files]
            # Bytes alike in arrays; files alike elsewhere, where most bytes are of one file.
            weights = sizes if kind == "arrays" else None
            file = random.Random(seed).choices(files, weights)[0]
            results[kind, seed] = after_flip(copy, file, seed)
            shutil.rmtree(copy)
    return results


def test_flipped_bits_are_found(tmp_path):
    results = flip_many(tmp_path, 12, 8)
    assert set(results.values()) <= {"found", "harmless"}, results
    assert sum(result == "found" for (kind, _), result in results.items() if kind == "arrays") >= 8


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """Checkpoints 10 and 20."""
    save_steps(path := tmp_path_factory.mktemp("sound") / "checkpoints", (10, 20))
    return path


@pytest.fixture
def copy(sound, tmp_path):
    return Path(shutil.copytree(sound, tmp_path / "checkpoints"))


def restored(directory):
    """The step that is restored, and the lines that the user gets."""
    lines = []
    with Checkpoints(directory, every=1, keep=9) as checkpoints:
        checkpoints.tell = lines.append
        state, position = checkpoints.restore(shapes())
    assert bits(state) == bits(state_of(position["batch"]))
    return position["batch"], lines


def test_a_step_under_another_number(copy):
    """The name, the position, the manifest and the state must agree."""
    shutil.copytree(copy / "10", copy / "41")
    step, (line,) = restored(copy)
    assert step == 20 and "checkpoint 41 is damaged (its files are of step 10)" in line
    shutil.copytree(copy / "10", copy / "42")
    (copy / "42/position/data.json").write_text('{"batch": 42}')
    shutil.rmtree(copy / "42/manifest")  # as of before there were manifests
    metadata = copy / "42/_CHECKPOINT_METADATA"
    metadata.write_text(metadata.read_text().replace('"manifest"', '"other"'))
    step, (line,) = restored(copy)
    assert step == 20 and "checkpoint 42 is damaged (its state is of step 10)" in line


@pytest.mark.parametrize("text", ['{"batch": 20}', "[]", "{}", '{"batch": null}', "not json", ""])
def test_a_position_of_others(copy, text):
    (copy / "20/position/data.json").write_text(text)
    step, (line,) = restored(copy)
    assert step == 10 and "checkpoint 20 is damaged (" in line and "position" in line


def test_incomplete_folders_beside_sound_ones(copy):
    for step in (5, 30):
        (copy / str(step) / "state").mkdir(parents=True)
    step, (line,) = restored(copy)
    assert step == 20 and "checkpoint 5 is damaged (it is incomplete)" in line
    assert line.endswith("going on from step 20, 10 steps are lost")
    assert sorted(os.listdir(copy)) == ["10", "20", "damaged-30", "damaged-5"]
    assert restored(copy) == (20, [])  # said once


def test_nothing_sound_is_left(copy):
    """The run does not begin anew, and nothing is renamed."""
    for step in (10, 20):
        (copy / str(step) / "position/data.json").write_text("[]")
    for _ in range(2):
        with pytest.raises(UserError, match=r"no sound checkpoint is left in .* to begin anew,"):
            restored(copy)
        assert sorted(os.listdir(copy)) == ["10", "20"]
    for step in (10, 20):
        (copy / str(step) / "_CHECKPOINT_METADATA").unlink()
    with pytest.raises(UserError, match=r"no sound checkpoint .*10 is damaged \(it is incomplete"):
        restored(copy)


def test_load_params_refuses_what_differs(copy):
    """It renames nothing: the place may be read-only, or another run's."""
    files = in_arrays(copy / "20")[0]
    file = max(files, key=lambda path: path.stat().st_size)
    whole = file.read_bytes()
    refused = 0
    for seed in range(12):
        flip(file, random.Random(seed))
        for abstract in (None, shapes().params, {"half": jax.ShapeDtypeStruct((9, 5), "float32")}):
            try:
                params = load_params(copy.parent, abstract)
            except UserError as error:
                assert f"{copy}/20 is damaged (" in str(error), error
                assert str(error).endswith(f"; the one before it is {copy}/10")
                refused += 1
                continue
            sound = state_of(20).params
            sound = sound if abstract is None or len(abstract) > 1 else {"half": sound["half"]}
            jax.tree.map(np.testing.assert_array_equal, params, sound)
        file.write_bytes(whole)
    assert refused >= 3
    assert sorted(os.listdir(copy)) == ["10", "20"]


def test_a_state_that_is_not_finite_is_not_saved(copy):
    lines = []
    state = state_of(30)
    state.params["block"]["bias"] = state.params["block"]["bias"].at[7].set(jnp.nan)
    with Checkpoints(copy, every=1, keep=9) as checkpoints:
        checkpoints.tell = lines.append
        assert not checkpoints.save(30, state, {"batch": 30})
        reason = "params/block/bias is not finite"
        assert lines == [
            f"CHECKPOINT 30 IS NOT SAVED: {reason}; the newest on disk is of step 20; "
            "training goes on"
        ]
        with pytest.raises(UserError, match=rf"state of step 30 is not on disk .*\({reason}\)"):
            checkpoints.finish(30, state, {"batch": 30})
        assert checkpoints.save(31, state_of(31), {"batch": 31})
    assert restored(copy) == (31, [])


# Whole runs ---------------------------------------------------------------------------------------


def config_for(steps=8, **changes):
    config = config_of("vision_v1", total_steps=steps, **changes).to_dict()
    config["checkpoint"] = {"every": 2, "keep": 3}
    config["model"]["width"], config["data"]["batch_size"] = 16, 8
    config["model"]["encoder"] |= {"heads": 2, "depth": 2}
    config["mesh"] = {"data": 8, "fsdp": 1}
    return config


def run(workdir, **changes):
    return train.train(config_for(**changes), workdir, programs=PROGRAMS, verbose=False)


def losses(workdir):
    lines = (json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines())
    return [(line["step"], line["loss"], line["grad_norm"]) for line in lines]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, light_compilation):
    """The workdir of a run of 8 steps with checkpoints 4, 6 and 8; its last state."""
    workdir = tmp_path_factory.mktemp("whole")
    return workdir, run(workdir)


@pytest.fixture
def workdir(whole, tmp_path):
    return Path(shutil.copytree(whole[0], tmp_path / "copy"))


def test_a_run_goes_on_from_the_newest_sound_checkpoint(whole, workdir, capsys):
    """By itself, and its numbers are those of a run to which nothing happened, bit for bit."""
    file = max(in_arrays(workdir / "checkpoints/8")[0], key=lambda path: path.stat().st_size)
    data = bytearray(file.read_bytes())
    for place in range(100, len(data), 2000):  # some bytes are of nothing that is read
        data[place] ^= 1
    file.write_bytes(data)
    (workdir / "checkpoints/6/position/data.json").unlink()
    state = run(workdir)
    told = [line for line in capsys.readouterr().err.splitlines() if "damaged" in line]
    assert len(told) == 1 and told[0].endswith("going on from step 4, 4 steps are lost"), told
    assert sorted(os.listdir(workdir / "checkpoints")) == ["4", "6", "8", "damaged-6", "damaged-8"]
    assert losses(workdir) == losses(whole[0])
    assert bits(state) == bits(whole[1])


@pytest.mark.parametrize("damage", ["removed", "cut", "changed"])
def test_damaged_metrics(whole, workdir, damage, capsys):
    """Said in one line, and what is left is kept."""
    file = workdir / "metrics.jsonl"
    text = file.read_text()
    if damage == "removed":
        file.unlink()
    else:
        file.write_text(text[:-500] if damage == "cut" else text.replace('"loss": 0', '"loss": 1'))
    left = file.read_text() if file.exists() else None
    run(workdir)
    (told,) = [line for line in capsys.readouterr().err.splitlines() if "metrics.jsonl" in line]
    if damage == "removed":
        assert told == "metrics.jsonl is gone; its lines up to step 8 are lost"
    else:
        assert "differs from what it was at step 8; it is kept as metrics.jsonl.damaged-8-" in told
        (kept,) = workdir.glob("metrics.jsonl.damaged-8-*")
        assert kept.read_text() == left


def test_another_config(workdir):
    """The checkpoint knows its config, whatever happens to config.json."""
    (workdir / "config.json").unlink()
    with pytest.raises(UserError, match=r"another config \(config\.seed differs\)"):
        run(workdir, seed=5)
    (workdir / "config.json").write_text("[1, 2]")
    with pytest.raises(UserError, match=r"config\.json is damaged; remove it"):
        run(workdir)
    (workdir / "config.json").unlink()
    run(workdir)
    assert json.loads((workdir / "config.json").read_text())["seed"] == 0


def test_a_folder_that_is_taken_away_while_the_run_goes_on(whole, tmp_path, capsys):
    """Saves fail aloud and are tried again; the end of the run is that of any other."""
    place, step = tmp_path / "checkpoints", iter(range(1, 9))
    ((shape, program),) = PROGRAMS.items()

    def vandal(state, batch):
        match next(step):
            case 4:  # after checkpoint 2
                while not (place / "2").exists():
                    time.sleep(0.01)
                shutil.rmtree(place)
                place.write_text("a file in its place")
            case 7:  # after two saves that fail
                place.unlink()
        return program(state, batch)

    state = train.train(config_for(), tmp_path, programs={shape: vandal}, verbose=False)
    lines = capsys.readouterr().err.splitlines()
    failed = [line.split(":")[0] for line in lines if "NOT SAVED" in line]
    assert failed == ["CHECKPOINT 4 IS NOT SAVED", "CHECKPOINT 6 IS NOT SAVED"], lines
    assert sum("was gone; it is made anew" in line for line in lines) == 1
    assert bits(state) == bits(whole[1]) and losses(tmp_path) == losses(whole[0])
    assert os.listdir(place) == ["8"]


def test_a_disk_that_is_full_to_the_end(tmp_path):
    """All steps are taken; each save that fails is said; the code of the end is not 0."""
    command = [sys.executable, "-m", "data2vec_jax.train", f"--workdir={tmp_path}"]
    command += [f"--config={ROOT}/data2vec_jax/configs/vision_v1.py:smoke"]
    command += ["--config.model.width=64", "--config.checkpoint.every=2"]
    done = subprocess.run(
        # A limit on the size of files is what any user can set; a full disk takes the same path.
        ["bash", "-c", 'ulimit -f 40; trap "" XFSZ; exec "$@"', "-", *command],
        capture_output=True,
        text=True,
        env=os.environ | {"XLA_FLAGS": "", "JAX_ENABLE_COMPILATION_CACHE": "0"},
        cwd=ROOT,
    )
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr and "Exception" not in done.stderr
    lines = done.stderr.splitlines()
    assert sum("IS NOT SAVED: no space left; there is none on disk" in line for line in lines) == 3
    assert lines[-1].startswith("error: the state of step 4 is not on disk"), lines[-1]
    assert [step for step, *_ in losses(tmp_path)] == [1, 2, 3, 4]
    assert os.listdir(tmp_path / "checkpoints") == []  # nor half of one


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        found = flip_many(Path(place), *map(int, sys.argv[1:3]))
    for kind in ("arrays", "elsewhere"):
        results = [result for (of, _), result in found.items() if of == kind]
        print(kind, {result: results.count(result) for result in sorted(set(results))})
