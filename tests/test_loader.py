"""`bench --data-only`: its numbers agree with each other, and PyTorch's side reads the same files.

Also what keeps an index of many examples small.
"""

import json
import pickle

import conftest
import numpy as np
import pytest
import soundfile
import torch
from configs_for_tests import config_of
from PIL import Image

from data2vec_jax.bench import __main__ as command
from data2vec_jax.bench import loader
from data2vec_jax.core.errors import UserError
from data2vec_jax.data.sources.columns import Strings, appended, taken
from data2vec_jax.data.sources.manifest import missing_files
from data2vec_jax.modalities import contract
from data2vec_jax.tasks import pretrain


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(loader, "PART_SECONDS", 0.1)
    monkeypatch.setattr(loader, "PASS_SECONDS", 0.01)


def opened(name, **data):
    config = config_of(name).to_dict()
    config["data"] |= data
    return contract.get(config["modality"]), *pretrain.open_examples(config)


def test_numbers_agree(tmp_path, quick, capsys):
    file, plan = tmp_path / "bench.json", tmp_path / "plan.json"
    plan.write_text(json.dumps({"step_seconds_estimate": 0.5, "batch_size": 64, "devices": 4}))
    config = f"--config={conftest.ROOT / 'configs/speech_v2.py'}:smoke"
    options = [
        "--data-only",
        "--peer",
        "--batch=4",
        "--seconds=1",
        f"--plan={plan}",
        f"--json={file}",
    ]
    command.main(["bench", config, *options])
    said, result = capsys.readouterr().out, json.loads(file.read_text())
    core = result["examples_per_second_of_a_core"]
    assert core == pytest.approx(result["rows_of_batches"] / result["core_seconds_per_batch"])
    assert set(result["seconds_of_parts"]) == {"read", "decode", "augment", "collate", "transfer"}
    assert all(seconds > 0 for seconds in result["seconds_of_parts"].values())
    theirs = result["peer"]["core_seconds_per_batch"]
    assert result["peer"]["ratio"] == pytest.approx(theirs / result["core_seconds_per_batch"])
    # 16 examples of a device in half a second, at `core` a second on a core.
    assert result["feeds"]["cores"] == pytest.approx(16 / 0.5 / core)
    assert len(result["examples_per_second"]) == len(result["peer"]["examples_per_second"]) == 2
    assert "ratio of a core" in said and "such cores" in said


def test_speech_of_the_peer_is_a_crop_of_ours():
    modality, source, examples, _ = opened("speech_v2")
    load = loader.peer_of(modality, source, examples)
    ours = examples.load(3, 0, np.random.default_rng(0))["audio"]
    whole = soundfile.read(source.location_of_file(3), dtype="float32")[0]
    whole = (whole - whole.mean()) / np.sqrt(whole.var() + 1e-5)
    for crop in (ours, load(3, 0)["audio"].numpy()):
        assert crop.shape == ours.shape
        starts = np.flatnonzero(np.isclose(whole[: len(whole) - len(crop) + 1], crop[0], atol=1e-4))
        assert any(np.allclose(whole[s : s + len(crop)], crop, atol=1e-3) for s in starts)


def test_text_of_the_peer_has_our_tokens():
    modality, source, examples, _ = opened("text_v2")
    load = loader.peer_of(modality, source, examples)
    text, bucket = source[0]["text"], len(examples.layout.buckets) - 1
    wanted = examples.tokenizer.encode(text, literal=True)[: examples.layout.buckets[-1] - 2]
    assert load(0, bucket)["tokens"][1 : len(wanted) + 1].tolist() == wanted


def test_sound_of_the_peer_is_our_spectrogram():
    modality, source, examples, _ = opened("sound_v2")
    load = loader.peer_of(modality, source, examples)
    ours = examples.load(0, 0, None)["spectrogram"][..., 0]
    theirs = load(0, 0)["spectrogram"].numpy()
    assert np.quantile(np.abs(ours - theirs), 0.99) < 0.05


def test_images_of_the_peer_are_ours_without_chance(tmp_path):
    """A flat part of a picture stays what it is, normalised."""
    Image.new("RGB", (40, 40), (200, 100, 50)).save(tmp_path / "a.png")
    modality = contract.get("vision")
    source = loader.pretrain.open_source(f"folder:{tmp_path}", codec=modality.codec)
    examples = modality.examples(source, image=16, jitter=0.0)
    image = loader.peer_of(modality, source, examples)(0, 0)["image"]
    assert image.shape == (3, 16, 16)
    wanted = (200 / 255 - 0.485) / 0.229
    assert torch.allclose(image[0], torch.tensor(wanted))


def test_sources_without_files_have_no_peer():
    modality, source, examples, _ = opened("vision_v2")
    with pytest.raises(UserError, match="neither files nor texts"):
        loader.peer_of(modality, source, examples)


def test_a_modality_without_a_peer_is_refused():
    _, source, examples, _ = opened("speech_v2")
    bare = contract.Modality("eeg", None, None, None, None, None)
    with pytest.raises(UserError, match="'eeg' has no loader"):
        loader.peer_of(bare, source, examples)


@pytest.mark.parametrize(
    "options, text",
    [
        (["--step_ms=9"], "--step_ms: with --data-only"),
        (["--data-only", "--step_ms=9", "--plan=a"], "one of --step_ms and --plan"),
        (["--data-only", "--step_ms=fast"], "--step_ms=fast is not a number"),
        (["--data-only", "--sweep"], "--sweep: of steps"),
        (["--data-only", "--plan=none.json"], "none.json: No such file"),
        (["--data-only", "--config.data.source=folder:/none"], "no folder '/none'"),
    ],
)
def test_wrong_options_are_one_line(options, text, capsys):
    config = f"--config={conftest.ROOT / 'configs/speech_v2.py'}:smoke"
    with pytest.raises(SystemExit) as stopped:
        command.main(["bench", config, *options])
    assert stopped.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and text in error


def test_columns_are_lists_of_texts():
    texts = ["a", "", None, "ü" * 300, "\ud800", "日本"]
    column = Strings(texts)
    for made in (column, pickle.loads(pickle.dumps(column, protocol=5))):
        assert list(made) == texts and len(made) == 6 and made[-1] == "日本" and made == column
        assert list(taken(made, [5, 2, 0])) == ["日本", None, "a"]
        with pytest.raises(IndexError):
            made[6]
    assert column != Strings([*texts[:-1], "日"]) and column != Strings(["a", "", ""])
    assert appended(column, ["x"]) == [*texts, ["x"]]


def test_columns_take_little_memory():
    column = Strings(f"{i:020}" for i in range(10_000))
    assert sum(a.nbytes for a in column.__getstate__()[:2]) == 10_000 * (20 + 4)


def test_missing_files_of_many_folders(tmp_path, monkeypatch):
    monkeypatch.setattr("data2vec_jax.data.sources.manifest.ROWS", 3)
    for name in ("a/0", "a/1", "b/0"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    paths = ["a/0", "b/0", "a/2", None, "c/0", "a/1", "b/1", "b/0"]
    found = dict(missing_files(str(tmp_path), paths, skip={6}))
    assert {i: path.removeprefix(f"{tmp_path}/") for i, path in found.items()} == {
        2: "a/2",
        4: "c/0",
    }
