"""Hand-made features against other libraries and loops."""

import numpy as np
import pytest
from sklearn.feature_extraction.text import TfidfVectorizer

from data2vec_jax.data.fbank import Fbank, log_mel
from data2vec_jax.data.sources import open_source
from data2vec_jax.modalities import contract
from data2vec_jax.modalities.contract import Labelled
from data2vec_jax.modalities.speech.data import labelled as speech_labelled
from data2vec_jax.modalities.text import data as text_data
from data2vec_jax.modalities.text.tokenizer import Tokenizer
from data2vec_jax.tasks import probe


def features(name, train, inputs=None):
    return contract.get(name).hand_made.make(train, train if inputs is None else inputs)


def token_rows(n, seed, highest):
    """Rows with `<s>` and `</s>`, padded, of tokens that are not equally frequent."""
    rng = np.random.default_rng(seed)
    rows = np.full((n, 20), Tokenizer.pad)
    for row in rows:
        length = rng.integers(3, 18)
        row[0], row[length + 1] = Tokenizer.bos, Tokenizer.eos
        row[1 : length + 1] = (4 + (highest - 4) * rng.random(length) ** 3).astype(int)
    return rows


def words(rows):
    return [" ".join(f"w{t}" for t in row if t >= 4) for row in rows]


@pytest.mark.parametrize("highest", [30, 400])
def test_tf_idf_is_that_of_scikit_learn(highest, monkeypatch):
    train, test = token_rows(60, 0, highest), token_rows(40, 1, highest)
    model = TfidfVectorizer(token_pattern=r"\S+", dtype=np.float64).fit(words(train))
    columns = sorted(model.vocabulary_, key=lambda word: int(word[1:]))
    columns = [model.vocabulary_[word] for word in columns]
    for rows in (train, test):
        found = features("text", {"tokens": train}, {"tokens": rows})
        assert found.dtype == np.float32
        wanted = model.transform(words(rows)).toarray()[:, columns]
        np.testing.assert_allclose(found, wanted, atol=1e-6)
    monkeypatch.setattr(text_data, "TERMS", 5)
    found = features("text", {"tokens": train})
    counts = [sum(t in row for row in train.tolist()) for t in range(4, highest)]
    kept = np.sort(np.argsort(-np.array(counts), kind="stable")[:5]) + 4
    wanted = TfidfVectorizer(token_pattern=r"\S+", vocabulary=[f"w{t}" for t in kept])
    np.testing.assert_allclose(found, wanted.fit_transform(words(train)).toarray(), atol=1e-6)


def test_a_text_of_new_tokens_alone_is_zero():
    train, other = np.array([[0, 4, 5, 2]]), np.array([[0, 9, 3, 2]])
    assert not features("text", {"tokens": train}, {"tokens": other}).any()


def test_log_mel_is_stacked_as_a_loop_does_and_its_frames_are_the_labels():
    source = open_source("samples:speech", "test", codec=contract.get("speech").codec)
    data = speech_labelled(source, None, crops=(1.0,))
    audio = data.inputs["audio"][:3]
    found = features("speech", {"audio": audio})
    assert found.shape == (3, data.labels.shape[1], 720) and found.dtype == np.float32
    for row, piece in zip(found, audio, strict=True):
        frames = []
        for t in range(len(row)):  # 25 ms from where the label's frame begins
            (frame,) = log_mel(piece[320 * t : 320 * t + 400], Fbank())
            frames.append(frame)
        for t in range(len(row)):
            near = [frames[min(max(t + k, 0), len(row) - 1)] for k in range(-4, 5)]
            np.testing.assert_allclose(row[t], np.concatenate(near), atol=1e-4)


def test_pixels_are_those_of_the_image_and_means_of_squares_in_large_ones():
    rng = np.random.default_rng(0)
    small = rng.integers(0, 256, (2, 28, 28, 1), dtype=np.uint8)
    np.testing.assert_allclose(
        features("vision", {"image": small}), small.reshape(2, -1) / 255, atol=1e-6
    )
    large = rng.integers(0, 256, (2, 70, 70, 3), dtype=np.uint8)  # squares of 3, one pixel over
    found = features("vision", {"image": large}).reshape(2, 23, 23, 3)
    for i in range(23):
        square = large[:, 3 * i : 3 * i + 3, 6:9] / 255
        np.testing.assert_allclose(found[:, i, 2], square.mean((1, 2)), atol=1e-6)


def test_statistics_of_sound_leave_padding_out():
    x = np.random.default_rng(0).normal(-8, 3, (2, 50, 128, 1)).astype(np.float32)
    x[1, 30:] = 0
    found = features("sound", {"spectrogram": x})
    for row, frames in zip(found, (x[0], x[1, :30]), strict=True):
        wanted = np.concatenate([frames[..., 0].mean(0), frames[..., 0].std(0)])
        np.testing.assert_allclose(row, wanted, rtol=1e-4)


def test_hand_made_features_are_probed_like_an_encoder():
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, 120)
    images = np.clip(rng.normal(100 + 80 * y[:, None], 20, (120, 16)), 0, 255)
    data = Labelled({"image": images.astype(np.uint8).reshape(-1, 4, 4, 1)}, y)
    found = probe.probe_hand_made(contract.get("vision"), data, data)
    assert found["linear_probe"] > 0.95 and found["knn"] > 0.95
    assert found["blocks"] == {"linear_probe": "pixels", "knn": "pixels"}
    assert {name for name in contract.names() if contract.get(name).hand_made} == {
        *("sound", "speech", "text", "vision")
    }
