"""What `data2vec_jax.load` says of paths and arrays that it cannot read."""

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import data2vec_jax
from data2vec_jax.core.errors import UserError

TEXT = Path(__file__).parents[1] / "goldens/checkpoints/Data2VecTextModel"
AUDIO = np.random.default_rng(0).normal(size=(2, 16_000)).astype(np.float32)
TOKENS = np.full((2, 8), 5)
IMAGES = np.zeros((2, 28, 28, 1), np.float32)


@pytest.fixture(scope="module")
def models():
    shipped = {"speech": "speech", "sound": "sounds", "vision": "digits"}
    found = {kind: data2vec_jax.load(f"reference:{name}") for kind, name in shipped.items()}
    return found | {"text": data2vec_jax.load(TEXT)}


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("x" * 5_000, r"^x{80}: File name too long$"),
        ("a/" * 3_000, r"^(a/){40}: File name too long$"),
        ("refrence:digits", r"^refrence:digits does not exist; did you mean 'reference:digits'\?$"),
        ("Reference:digits", r"did you mean 'reference:digits'\?$"),
        ("references:speech", r"did you mean 'reference:speech'\?$"),
        ("difference:digits", r"^difference:digits does not exist$"),
    ],
    ids=["long name", "many folders", "typing error", "capital", "plural", "something else"],
)
def test_paths(path, said):
    with pytest.raises(UserError, match=said):
        data2vec_jax.load(path)


def test_a_folder_may_have_a_colon_in_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("references:mine").mkdir()
    with pytest.raises(UserError, match=r"^references:mine: no model\.safetensors in it"):
        data2vec_jax.load("references:mine")


def with_one(array, value):
    changed = np.array(array)
    changed.flat[7] = value
    return changed


@pytest.mark.parametrize(
    ("kind", "array", "said"),
    [
        ("speech", AUDIO[0], r"^audio of shape \(16000,\); the model reads \[batch, samples\]"),
        ("speech", AUDIO[None], r"^audio of shape \(1, 2, 16000\); the model reads"),
        ("speech", AUDIO[:, :399], r"\(2, 399\); .* of at least 400 samples at 16 kHz"),
        ("sound", AUDIO[0], r"^audio of shape \(16000,\); the model reads \[batch, samples\]"),
        ("vision", IMAGES[0], r"^images of shape \(28, 28, 1\); the model reads"),
        *(
            (kind, array, r"^\w+ of shape \(0, .*: nothing is in it$")
            for kind, array in (
                ("speech", AUDIO[:0]),
                ("sound", AUDIO[:0]),
                ("vision", IMAGES[:0]),
                ("text", TOKENS[:0]),
            )
        ),
        ("speech", AUDIO[:, :0], r"^audio of shape \(2, 0\): nothing is in it$"),
        ("text", TOKENS[:, :0], r"^tokens of shape \(2, 0\): nothing is in it$"),
        ("speech", with_one(AUDIO, np.nan), r"^audio: some numbers are NaN or infinite$"),
        ("sound", with_one(AUDIO, np.inf), r"^audio: some numbers are NaN or infinite$"),
        ("vision", with_one(IMAGES, -np.inf), r"^image: some numbers are NaN or infinite$"),
        ("text", TOKENS * 1.0, r"^tokens are float64, not integers$"),
        ("text", "a sentence", r"^tokens: <U10 in place of real numbers$"),
        ("speech", "a.wav", r"^audio: <U5 in place of real numbers$"),
        ("speech", None, r"^audio: object in place of real numbers$"),
        ("speech", AUDIO * 1j, r"^audio: complex64 in place of real numbers$"),
        ("speech", [[0.0] * 500, [0.0] * 400], r"^audio: rows of several lengths; pad them$"),
    ],
)
def test_arrays(models, kind, array, said):
    with pytest.raises(UserError, match=said):
        models[kind](array)


def test_masks(models):
    with pytest.raises(UserError, match=r"^padding_mask of shape \(2, 3\) for inputs of \(2, 16"):
        models["speech"](AUDIO, np.zeros((2, 3)))
    with pytest.raises(UserError, match=r"^a mask of shape \(2, 3\) for 49 frames"):
        models["speech"](AUDIO, mask=np.zeros((2, 3), bool))
    with pytest.raises(UserError, match=r"^padding_mask of shape \(8,\) for inputs of \(2, 8\)"):
        models["text"](TOKENS, np.zeros(8))


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64, ml_dtypes.bfloat16])
def test_one_frame_is_enough_in_any_precision(models, dtype):
    found = models["speech"](AUDIO[:, :400].astype(dtype)).last_hidden_state
    assert found.shape == (2, 1, 128) and np.isfinite(np.asarray(found)).all()
