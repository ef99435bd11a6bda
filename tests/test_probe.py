"""Probes on data with a known answer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data2vec_jax.core.errors import UserError
from data2vec_jax.modalities.contract import Labelled
from data2vec_jax.modalities.text.modality import MODALITY
from data2vec_jax.modalities.vision.model import VisionConfig
from data2vec_jax.tasks import probe


def blobs(n, spread, seed):
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 5, n)
    centres = np.random.default_rng(0).normal(size=(5, 8)) * 3
    return (centres[y] + spread * rng.normal(size=(n, 8))).astype(np.float32), y


def test_separable_classes_are_found():
    train, test = blobs(400, 0.3, 1), blobs(200, 0.3, 2)
    assert probe.linear(train, test) > 0.99
    assert probe.knn(train, test) > 0.99


def test_linear_probe_is_at_the_bayes_rate_of_two_gaussians():
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, 20_000)
    x = (rng.normal(size=(20_000, 4)) + np.array([1.0, 0, 0, 0]) * (2 * y[:, None] - 1)).astype(
        np.float32
    )
    score = probe.linear((x[:10_000], y[:10_000]), (x[10_000:], y[10_000:]))
    assert abs(score - 0.8413) < 0.01  # Phi(1)


def test_labels_without_information_are_guessed():
    (x, _), (x_test, _) = blobs(2000, 1.0, 1), blobs(1000, 1.0, 2)
    rng = np.random.default_rng(3)
    y, y_test = rng.integers(0, 5, 2000), rng.integers(0, 5, 1000)
    assert probe.linear((x, y), (x_test, y_test)) < 0.26
    assert probe.knn((x, y), (x_test, y_test)) < 0.26


def test_knn_equals_a_loop():
    (x, y), (q, _) = blobs(50, 2.0, 1), blobs(20, 2.0, 2)
    mean = x.mean(0)
    unit = lambda a: (a - mean) / np.linalg.norm(a - mean, axis=1, keepdims=True)  # noqa: E731
    wanted = []
    for row in unit(q):
        similarity = unit(x) @ row
        near = np.argsort(-similarity)[:7]
        votes = np.zeros(5)
        np.add.at(votes, y[near], np.exp(similarity[near] / 0.07))
        wanted.append(votes.argmax())
    assert probe.knn((x, y), (q, np.array(wanted)), k=7) == 1.0


def test_features_are_means_of_tokens_in_any_batching():
    model = VisionConfig(
        width=16, image=8, patch=4, mean=(0.5,), std=(0.5,), encoder=dict(depth=2, heads=2, mlp=32)
    ).make()
    images = np.random.default_rng(0).integers(0, 255, (10, 8, 8, 1), dtype=np.uint8)
    params = model.init(jax.random.key(0), {"image": jnp.asarray(images)})["params"]
    data = Labelled({"image": images}, np.arange(10) % 3)
    encode = probe.make_encode(model)
    small, labels = probe.features(encode, params, data, batch=4)
    large, _ = probe.features(encode, params, data, batch=10)
    np.testing.assert_allclose(small, large, rtol=1e-5, atol=1e-6)
    x, _ = encode(params, {"image": images})
    np.testing.assert_allclose(large, x.mean(1), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(labels, data.labels)
    frames = Labelled({"image": images}, np.tile([-1, 0, 1, -1], (10, 1)))
    some, which = probe.features(encode, params, frames)
    assert some.shape == (20, 16) and (which == np.tile([0, 1], 10)).all()
    layered = probe.make_encode(model, (-1,))(params, {"image": images})[0]
    assert layered.shape == (10, 4, 16)


def test_attention_finds_the_position_that_tells_and_no_padding():
    """One of six positions, marked, says the class; the mean over positions says little of it."""

    def rows(n, seed):
        rng = np.random.default_rng(seed)
        x, y = rng.normal(size=(n, 6, 16)).astype(np.float32), rng.integers(0, 4, n)
        valid = np.arange(6) < rng.integers(2, 7, (n, 1))
        place = (rng.random(n) * valid.sum(1)).astype(int)
        x[np.arange(n), place, :4] = 2 * np.eye(4)[y]
        x[np.arange(n), place, 4] = 6.0
        x[~valid] = 50.0
        return probe.Tokens(x, valid, y)

    train, test = rows(800, 0), rows(300, 1)
    assert probe.attentive(train, test) > 0.9
    means = [
        (np.stack([r[v].mean(0) for r, v in zip(t.x, t.valid, strict=True)]), t.y)
        for t in (train, test)
    ]
    assert probe.linear(*means) < 0.85


def test_labels_of_tables_have_the_numbers_of_the_training_file(tmp_path):
    def table(split, *labels):
        rows = "".join(f"a text of some words {i},{label}\n" for i, label in enumerate(labels))
        (tmp_path / f"{split}.csv").write_text(f"text,label\n{rows}")

    def found():
        data = {"source": f"manifest:{tmp_path}/{{split}}.csv", "split": "train"}
        examples = {"lengths": (16,), "vocab_size": 300}
        config = {"data": data, "examples": examples}
        return [
            part.labels.tolist() for part in probe.labelled(MODALITY, config, ("train", "test"))
        ]

    table("train", "a", "b", "c", "b")
    table("test", "c", "b")
    assert found() == [[0, 1, 2, 1], [2, 1]]
    table("test", "b", "d")
    with pytest.raises(UserError, match=r"test\.csv:3: unknown label 'd'"):
        found()
    table("test", "b", "")
    with pytest.raises(UserError, match=r"test\.csv:3: no label"):
        found()
    table("train", "1", "0.5")
    with pytest.raises(UserError, match=r"train\.csv:2: label 1.0 is not a class"):
        found()
