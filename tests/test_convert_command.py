"""`python -m data2vec_jax.convert`: report, verification, and what it says to wrong inputs."""

import json
import os
import shutil
import subprocess
import sys
import tracemalloc
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import data2vec_jax
from data2vec_jax.cli.output import run_main
from data2vec_jax.convert import __main__ as command
from data2vec_jax.convert import ours, pickles
from data2vec_jax.convert.tables import entries_of
from data2vec_jax.core import checkpoints, files, safetensors
from data2vec_jax.core.errors import UserError
from data2vec_jax.core.state import TrainState
from data2vec_jax.core.trees import flatten

ROOT = Path(__file__).resolve().parent.parent
GOLDENS = ROOT / "tests/goldens/checkpoints"
TEXT, SPEECH = GOLDENS / "Data2VecTextModel", GOLDENS / "fairseq_audio_v1/checkpoint.pt"


def run(*arguments):
    command.main([str(a) for a in arguments])


def test_every_tensor_is_reported(tmp_path, capsys):
    run(GOLDENS / "fairseq_text_v1/checkpoint.pt", tmp_path / "hf", "--to=hf", "--missing=pooler")
    lines = capsys.readouterr().out.splitlines()
    names = set(pickles.tensors(pickles.read(GOLDENS / "fairseq_text_v1/checkpoint.pt")["model"]))
    read = "\n".join(lines[: lines.index("written:")])
    counted = sum(
        int(x.split(" of them")[0].split("(")[-1]) if " of them" in x else 1
        for x in read.splitlines()[1:]
    )
    assert counted == len(names)
    block = "encoder.sentence_encoder.layers"
    assert (
        f"  transformed  {block}.0.self_attn.q_proj.weight ... {block}.1.self_attn.v_proj.weight "
        "(6 of them) [32, 32] -> encoder/blocks/qkv/kernel [2, 32, 96]" in lines
    )
    assert (
        "  matched      encoder.sentence_encoder.embed_tokens.weight [55, 32] -> embeddings/tokens "
        "[55, 32]" in lines
    )
    for text in (
        "  unused       encoder.sentence_encoder.version [1]: of a layout long gone",
        "  unused       head/linear0/kernel [32, 64]: the prediction head of pretraining has no",
        "  unused       teacher/embeddings/tokens [55, 32]: the teacher of pretraining has no",
        "  transformed  encoder/blocks/up/kernel[1] -> data2vec_text.encoder.layer.1.intermediate.",
        "  added        data2vec_text.embeddings.token_type_embeddings.weight [1, 32]: a constant",
    ):
        assert any(line.startswith(text) for line in lines), text
    assert {path.name for path in (tmp_path / "hf").iterdir()} == {
        "config.json",
        "model.safetensors",
        "README.md",
    }


def test_verification_prints_each_layer(tmp_path, capsys):
    pytest.importorskip("transformers")
    run(SPEECH, tmp_path / "jax", "--to=jax", "--verify")
    lines = [x.split() for x in capsys.readouterr().out.splitlines() if x.startswith("difference")]
    assert [x[1:-1] for x in lines] == [
        ["layer", "0"],
        ["layer", "1"],
        ["layer", "2"],
        ["last_hidden_state"],
        ["extract_features"],
    ]
    assert all(0 <= float(x[-1]) < 1e-4 for x in lines)


def halved(state):
    return {name: array / 2 for name, array in state.items()}


def test_the_teacher_can_take_the_students_place(tmp_path):
    source = rewritten(tmp_path, lambda c: c["model"]["_ema"].update(halved(c["model"]["_ema"])))
    run(source, tmp_path / "jax", "--to=jax", "--weights=teacher")
    both, teacher = data2vec_jax.load(source), data2vec_jax.load(tmp_path / "jax")
    block = lambda params: params["encoder"]["blocks"]["up"]["kernel"]  # noqa: E731
    np.testing.assert_array_equal(block(teacher.params), block(both.teacher))
    assert not np.array_equal(block(teacher.params), block(both.params)) and not teacher.teacher
    with pytest.raises(UserError, match="holds no teacher"):
        run(TEXT, tmp_path / "new", "--to=jax", "--weights=teacher")


def test_no_second_copy_is_in_memory(tmp_path):
    """Arrays are mapped or made one by one, in both directions."""
    shape = dict(width=128, vocab_size=9000, encoder=dict(depth=8, heads=2, mlp=512))
    config = {"modality": "text", "model": shape}
    made = {path: np.ones(size, np.float32) for path, size in ours.shapes_of(config).items()}
    made = {path: x for path, x in made.items() if not path.startswith("head/")}
    ours.save(ours.Checkpoint(tmp_path, config, entries_of(made)), tmp_path / "first")
    size, largest = (f(x.nbytes for x in made.values()) for f in (sum, max))
    assert size > 10e6
    for source, target in (("first", "hf"), ("hf", "jax"), ("jax", "fairseq")):
        tracemalloc.start()
        run(tmp_path / source, tmp_path / target, f"--to={target}")
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 2 * largest + 2e6 < size


# Wrong inputs -------------------------------------------------------------------------------------


def damaged(folder, kind):
    """A copy of a checkpoint with something wrong."""
    source = folder / "source"
    shutil.copytree(TEXT, source)
    weights = source / "model.safetensors"
    if kind == "truncated":
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif kind == "no config":
        (source / "config.json").unlink()
    elif kind == "no weights":
        weights.unlink()
    elif kind == "config is no json":
        (source / "config.json").write_text("{")
    elif kind in ("half", "a layer"):
        state = safetensors.SafeTensors(weights)
        names = [
            n for n in state if ("layer.1.output" not in n if kind == "a layer" else n > "query")
        ]
        safetensors.write_safetensors(
            folder / "new", entries_of({n: np.array(state[n]) for n in names}), {"format": "pt"}
        )
        (folder / "new").replace(weights)
    elif kind == "another architecture":
        change(source, architectures=["T5Model"], model_type="t5")
    elif kind == "another head":
        change(source, architectures=["Data2VecTextForMaskedLM"])
    elif kind == "senseless config":
        change(source, num_attention_heads="four")
    return source


def change(folder, **values):
    config = json.loads((folder / "config.json").read_text())
    files.write_json(folder / "config.json", config | values)


FOLDERS = {
    "truncated": "model.safetensors: cut short; '",
    "no config": "no config.json in it",
    "no weights": "no model.safetensors in it",
    "config is no json": "config.json: not JSON",
    "half": "it lacks '",
    "a layer": "encoder/blocks/down/kernel is [1, 48, 32], and should be [2, 48, 32]",
    "another architecture": "not data2vec; its weights are of another model",
    "another head": "it lacks 'task/",
    "senseless config": "source: config.model.encoder.heads: 'four' is not a whole number",
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_wrong_folder_is_one_line(kind, tmp_path):
    source = damaged(tmp_path, kind)
    for to in ("jax", "hf", "fairseq"):
        with pytest.raises(UserError) as error:
            run(source, tmp_path / "out/target", f"--to={to}")
        assert FOLDERS[kind] in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def rewritten(tmp_path, edit):
    """A fairseq file after an edit of its content."""
    content = pickles.read(SPEECH)
    edit(content)

    def tensors(value):
        if isinstance(value, np.ndarray):
            return entries_of({"x": value})[0]
        return {k: tensors(v) for k, v in value.items()} if isinstance(value, dict) else value

    pickles.write(tmp_path / "a.pt", tensors(content))
    return tmp_path / "a.pt"


def other_model(content):
    content["model"] = {"layer.weight": np.ones((2, 2), np.float32)}


FILES = {
    "half": (
        lambda c: c["model"].pop("mask_emb") is c["model"].pop("post_extract_proj.bias"),
        "it lacks 'frontend/projection/bias'",
    ),
    "a layer": (
        lambda c: c["model"].pop("encoder.layers.0.fc1.weight"),
        "lack 'encoder.layers.0.fc1.weight'",
    ),
    "another model": (other_model, "not data2vec"),
    "no settings": (lambda c: c.pop("cfg"), "no settings"),
    "no weights": (lambda c: c.pop("model"), "no weights below 'model'"),
    "unknown": (
        lambda c: c["model"].update(extra=np.ones(2, np.float32)),
        "the weights have 'extra'",
    ),
    "another layer": (
        lambda c: c["cfg"]["model"].update(layer_type="conformer"),
        "'layer_type' = 'conformer' is not supported",
    ),
}


def sharded(folder):
    """The checkpoint in two files and an index of them."""
    source = folder / "source"
    shutil.copytree(TEXT, source)
    state = safetensors.SafeTensors(source / "model.safetensors")
    names, places = sorted(state), {}
    for number, part in enumerate((names[::2], names[1::2])):
        shard = f"model-0000{number + 1}-of-00002.safetensors"
        safetensors.write_safetensors(
            source / shard, entries_of({n: np.array(state[n]) for n in part}), {"format": "pt"}
        )
        places |= dict.fromkeys(part, shard)
    files.write_json(source / "model.safetensors.index.json", {"weight_map": places})
    (source / "model.safetensors").unlink()
    return source


def test_shards_are_joined_and_a_missing_one_is_named(tmp_path):
    source = sharded(tmp_path)
    run(source, tmp_path / "jax", "--to=jax")
    run(TEXT, tmp_path / "whole", "--to=jax")
    weights = [(tmp_path / x / "model.safetensors").read_bytes() for x in ("jax", "whole")]
    assert weights[0] == weights[1]
    (source / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match=r"-00002\.safetensors is missing"):
        run(source, tmp_path / "out/target", "--to=hf")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", FILES)
def test_a_wrong_file_is_one_line(kind, tmp_path):
    edit, message = FILES[kind]
    source = rewritten(tmp_path, edit)
    with pytest.raises(UserError) as error:
        run(source, tmp_path / "out/target", "--to=hf")
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_failed_export_leaves_nothing(tmp_path):
    source = rewritten(tmp_path, lambda c: c["cfg"]["model"].update(layer_norm_first=True))
    with pytest.raises(UserError, match="'pre', only for 'post'"):
        run(source, tmp_path / "out/target", "--to=hf")
    assert not (tmp_path / "out").exists()


UNFIT = {
    "fairseq": (GOLDENS / "Data2VecTextForTokenClassification", "has no place for 'frames'"),
    "peft": (TEXT, "has no adapters"),
}


@pytest.mark.parametrize("to", UNFIT)
def test_what_a_layout_cannot_hold_is_named(to, tmp_path):
    source, message = UNFIT[to]
    with pytest.raises(UserError, match=message):
        run(source, tmp_path / "out/target", f"--to={to}")
    assert not (tmp_path / "out").exists()


def workdir(folder):
    """A training run's folder with the weights of a small model as its student and teacher."""
    run(TEXT, folder / "jax", "--to=jax")
    made = data2vec_jax.load(folder / "jax")
    config = {key: made.config[key] for key in ("modality", "model")}
    params = {key: value for key, value in made.params.items() if key != "task"}
    teacher = jax.tree.map(lambda x: x / 2, params)
    state = TrainState(jnp.int32(3), params, teacher, (), jax.random.key(0))
    target = folder / "workdir"
    with checkpoints.Checkpoints(target / "checkpoints", every=1) as store:
        store.save(3, state, {"batch": 3}, force=True)
    files.write_json(target / "config.json", config)
    return target


def test_a_workdir_is_read_and_a_damaged_one_is_named(tmp_path):
    source = workdir(tmp_path)
    run(source, tmp_path / "again", "--to=jax")
    student, again = data2vec_jax.load(source), data2vec_jax.load(tmp_path / "again")
    for part in ("params", "teacher"):
        a, b = (flatten(getattr(x, part)) for x in (student, again))
        assert a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)
    assert not np.array_equal(
        *(flatten(x)["embeddings/tokens"] for x in (student.params, student.teacher))
    )
    # All that a write of 5 kB or more has left behind: the arrays, of student and teacher alike.
    large = [p for p in source.rglob("*") if p.is_file() and p.stat().st_size > 5000]
    for path in large:
        path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"checkpoint .* is damaged \(") as error:
        run(source, tmp_path / "out/target", "--to=hf")
    assert large and "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_sections_of_older_folders_are_read(tmp_path):
    checkpoint = ours.open_checkpoint(GOLDENS / "Data2VecAudioForCTC")
    adapter = dict(width=checkpoint.config["model"]["width"], layers=1)
    config = checkpoint.config | {"conv_adapter": adapter}
    rng = np.random.default_rng(0)
    tensors = {
        path: rng.normal(size=shape).astype(np.float32)
        for path, shape in ours.shapes_of(config).items()
    }
    ours.save(ours.Checkpoint(tmp_path, config, entries_of(tensors)), tmp_path / "new")
    shutil.copytree(tmp_path / "new", tmp_path / "old")
    stored = files.read_json(tmp_path / "old/config.json")
    stored["task"], stored["adapter"] = stored.pop("head"), stored.pop("conv_adapter")
    files.write_json(tmp_path / "old/config.json", stored)
    new, old = (data2vec_jax.load(tmp_path / name) for name in ("new", "old"))
    assert new.config == old.config and {"head", "conv_adapter"} <= old.config.keys()
    audio = rng.normal(size=(2, 4000)).astype(np.float32)
    np.testing.assert_array_equal(new(audio).logits, old(audio).logits)


OWN = """
import dataclasses
import jax
import jax.numpy as jnp
from data2vec_jax.modalities.contract import Inference
from data2vec_jax.modalities.speech.modality import MODALITY as SPEECH

def example(model):
    return {"audio": jax.ShapeDtypeStruct((1, 400), jnp.float32)}

MODALITY = dataclasses.replace(SPEECH, inference=Inference("audio", example))
"""


def test_a_modality_of_the_user_is_loaded(tmp_path, monkeypatch):
    (tmp_path / "my_lab").mkdir()
    (tmp_path / "my_lab/eeg.py").write_text(OWN)
    (tmp_path / "my_lab/silent.py").write_text(OWN.replace('Inference("audio", example)', "None"))
    monkeypatch.syspath_prepend(tmp_path)
    run(SPEECH, tmp_path / "eeg", "--to=jax")
    speech, config = data2vec_jax.load(SPEECH), files.read_json(tmp_path / "eeg/config.json")
    files.write_json(tmp_path / "eeg/config.json", config | {"modality": "my_lab.eeg"})
    own, audio = data2vec_jax.load(tmp_path / "eeg"), np.random.default_rng(0).normal(size=(2, 900))
    padding = np.arange(900) >= np.array([[900], [700]])
    wanted, found = (load(audio.astype(np.float32), padding) for load in (speech, own))
    np.testing.assert_allclose(found.last_hidden_state, wanted.last_hidden_state, atol=1e-6)
    assert len(found.hidden_states) == len(wanted.hidden_states) and found.logits is None
    for to in ("hf", "fairseq"):
        with pytest.raises(UserError, match=f"--to={to}: there is no layout for this my_lab.eeg"):
            run(tmp_path / "eeg", tmp_path / "target", f"--to={to}")
    files.write_json(tmp_path / "eeg/config.json", config | {"modality": "my_lab.silent"})
    with pytest.raises(UserError, match=r"config\.modality: 'my_lab\.silent' cannot be loaded"):
        data2vec_jax.load(tmp_path / "eeg")


class Harm:
    def __reduce__(self):
        return os.mkdir, ("harm",)


@pytest.mark.parametrize("kind", ["code", "truncated", "no folder"])
def test_the_command_exits_with_2(kind, tmp_path, monkeypatch, capsys):
    torch = pytest.importorskip("torch")
    source, target = TEXT, "target"
    if kind == "no folder":  # it cannot be made, below a file
        (tmp_path / "file").write_text("")
        target, message = "file/target", "cannot write file/target: "
    elif kind == "code":
        source, message = tmp_path / "a.pt", "asks to run"
        torch.save({"model": {"a": torch.ones(2)}, "cfg": Harm()}, source)
    else:
        source, message = damaged(tmp_path, kind), "cut short"
    before = {*os.listdir(tmp_path)}
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        run_main(lambda: run(source, target, "--to=jax"))
    out = capsys.readouterr()
    assert stopped.value.code == 2 and out.out == ""
    assert out.err.startswith("error: ") and out.err.count("\n") == 1 and message in out.err
    assert {*os.listdir(tmp_path)} == before


def test_a_process_that_is_refused_ends_with_2(tmp_path):
    out = subprocess.run(
        [sys.executable, "-m", "data2vec_jax.convert", TEXT, "target", "--to=jaxx"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert out.returncode == 2 and out.stdout == ""
    assert out.stderr.startswith("error: argument --to: invalid choice: 'jaxx'")
    assert out.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "option, message",
    [
        ("--to=jaxx", "invalid choice: 'jaxx'"),
        ("--missing=(", "not a regular expression"),
        ("--weights=both", "invalid choice: 'both'"),
        ("--base=x", "not an adapter"),
        ("-x", "-x"),
    ],
)
def test_wrong_options_are_named(option, message, tmp_path):
    with pytest.raises(UserError, match=message):
        run(TEXT, tmp_path / "target", "--to=jax", option)
    assert not (tmp_path / "target").exists()


def test_an_existing_target_is_kept(tmp_path):
    (tmp_path / "target").mkdir()
    (tmp_path / "target/mine").write_text("")
    with pytest.raises(UserError, match="exists"):
        run(TEXT, tmp_path / "target", "--to=jax")
    assert os.listdir(tmp_path / "target") == ["mine"]
