"""Probes on data with a known answer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from configs_for_tests import Items
from PIL import Image

from data2vec_jax.core.errors import UserError
from data2vec_jax.modalities import contract
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


SMALL = dict(width=16, image=8, patch=4, mean=(0.5,), std=(0.5,))


def small_model(depth=2, **encoder):
    """A vision model of 4 patches, its parameters, and 10 images."""
    model = VisionConfig(**SMALL, encoder=dict(depth=depth, heads=2, mlp=32) | encoder).make()
    images = np.random.default_rng(0).integers(0, 255, (10, 8, 8, 1), dtype=np.uint8)
    params = model.init(jax.random.key(0), {"image": jnp.asarray(images)})["params"]
    return model, params, images


def test_features_are_means_of_tokens_in_any_batching():
    model, params, images = small_model()
    data = Labelled({"image": images}, np.arange(10) % 3)
    encode = probe.make_encode(model)
    small, labels = probe.features(encode, params, data, batch=4)
    large, _ = probe.features(encode, params, data, batch=10)
    np.testing.assert_allclose(small, large, rtol=1e-5, atol=1e-6)
    x, _ = encode.output(params, {"image": images})
    np.testing.assert_allclose(large, x.mean(1), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(labels, data.labels)
    frames = Labelled({"image": images}, np.tile([-1, 0, 1, -1], (10, 1)))
    some, which = probe.features(encode, params, frames, batch=4)
    np.testing.assert_allclose(some, x[:, 1:3].reshape(20, 16), rtol=1e-5, atol=1e-6)
    assert (which == np.tile([0, 1], 10)).all()


@pytest.mark.parametrize("norm", ["post", "pre"])
def test_candidates_are_the_states_of_one_forward_pass(norm):
    model, params, images = small_model(depth=3, norm=norm)
    found = probe.make_encode(model).candidates(params, {"image": images}, pooled=True)
    tokens = model.apply({"params": params}, {"image": images}, method="features")
    out = model.apply({"params": params}, tokens, method="encode", collect=True)
    wanted = {"front end": tokens.x.mean(1)}
    wanted |= {f"block {i + 1}": out.layers[i, :, 1:].mean(1) for i in range(3)}
    wanted["mean of blocks"] = sum(wanted[f"block {i + 1}"] for i in range(3)) / 3
    wanted["output"] = out.x.mean(1)
    wanted |= {f"block {i + 1}, class token": out.layers[i, :, 0] for i in range(3)}
    wanted["output, class token"] = out.class_tokens[:, 0]
    assert list(found) == list(wanted)
    for name, x in wanted.items():
        np.testing.assert_allclose(found[name], x, rtol=1e-4, atol=1e-5, err_msg=name)
    data = Labelled({"image": np.tile(images, (3, 1, 1, 1))}, np.arange(30) % 3)
    asked = probe.probe(probe.make_encode(model), params, data, data)["dev"]["knn"]
    assert ("output" in asked) == (norm == "pre"), "a norm follows the last pre-norm block only"
    frames = probe.make_encode(model).candidates(params, {"image": images}, pooled=False)
    assert not [name for name in frames if "token" in name]
    np.testing.assert_allclose(frames["block 2"], out.layers[1, :, 1:], rtol=1e-4, atol=1e-5)


def test_rows_are_spaced_over_all_frames_and_keep_their_example():
    """`read` encodes batches of those examples that are needed; a loop takes all of them."""
    labels = np.random.default_rng(0).integers(-1, 3, (11, 5))
    values = np.arange(55.0).reshape(11, 5, 1)
    seen = []

    def run(inputs):
        seen.append(inputs["x"][:, 0, 0] // 5)
        return {"x": inputs["x"], "twice": 2 * inputs["x"]}

    found = probe.read(run, Labelled({"x": values}, labels), 6, batch=3)
    every = [(i, t) for i in range(11) for t in range(5) if labels[i, t] >= 0]
    every = every[:: -(-len(every) // 6)]
    assert found.example.tolist() == [i for i, _ in every]
    assert found.y.tolist() == [labels[i, t] for i, t in every]
    assert found.x["x"][:, 0].tolist() == [5.0 * i + t for i, t in every]
    np.testing.assert_array_equal(found.x["twice"], 2 * found.x["x"])
    assert {len(batch) for batch in seen} == {3}
    assert set(np.concatenate(seen)) == set(found.example)
    whole = probe.read(lambda i: {"x": i["x"][:, 0]}, Labelled({"x": values}, labels[:, 0]), None)
    assert whole.example.tolist() == np.flatnonzero(labels[:, 0] >= 0).tolist()


def planted(n, seed, where, frames=1):
    """Rows whose label is in one of four features, and noise in the others."""
    rng = np.random.default_rng(seed)
    y, example = rng.integers(0, 4, n), np.arange(n) // frames
    x = {f"block {i + 1}": rng.normal(size=(n, 6)).astype(np.float32) for i in range(4)}
    x[where][:, :4] += 2.5 * np.eye(4)[y]
    return probe.Rows(x, y, example)


def test_the_block_that_holds_the_label_is_found():
    sets = planted(300, 0, "block 2"), planted(200, 1, "block 2")
    found = probe.judge(*sets)
    assert found["blocks"] == {"linear_probe": "block 2", "knn": "block 2"}
    assert found["linear_probe"] > 0.8 and found["knn"] > 0.8
    last = probe.judge(*(rows._replace(x={"block 4": rows.x["block 4"]}) for rows in sets))
    assert last["linear_probe"] < 0.4 and last["knn"] < 0.4


def test_examples_are_on_one_side_of_the_dev_split():
    example = np.repeat(np.random.default_rng(0).permutation(50), 7)
    held = probe.dev_split(example)
    assert held.sum() == 70 and len(set(example[held])) == 10
    assert not set(example[held]) & set(example[~held])
    np.testing.assert_array_equal(held, probe.dev_split(example))
    assert probe.dev_split(np.arange(2)).sum() == 1
    with pytest.raises(UserError, match="1 labelled example cannot be split"):
        probe.dev_split(np.zeros(9, int))


def test_what_is_chosen_is_best_on_dev_and_test_rows_are_used_once(monkeypatch):
    """All choices are recomputed by loops; the classifiers note which rows they are given."""
    train, test = planted(200, 0, "block 3", frames=4), planted(100, 1, "block 3")
    train.x["block 3"][:, 4:] *= 30  # a scale that tells the two scalings apart
    calls = []

    def noting(name):
        real = getattr(probe, name)

        def call(first, second, **options):
            score = real(first, second, **options)
            calls.append((name, first, second, options, score))
            return score

        monkeypatch.setattr(probe, name, call)
        return real

    linear, knn = noting("linear"), noting("knn")
    found = probe.judge(train, test)
    held = probe.dev_split(train.example)

    def sides(name):
        x, y = train.x[name], train.y
        return (x[~held], y[~held]), (x[held], y[held])

    names = list(train.x)
    by_name = [max(linear(*sides(name), prior=p) for p in (1.0, 10.0)) for name in names]
    best = names[int(np.argmax(by_name))]
    options = [(s, p) for s in ("each", "all") for p in (100.0, 10.0, 1.0, 0.1)]
    by_option = [linear(*sides(best), scaling=s, prior=p) for s, p in options]
    scaling, prior = options[int(np.argmax(by_option))]
    near = [(n, s) for n in names for s in ("each", "all")]
    name, how = near[int(np.argmax([knn(*sides(n), scaling=s) for n, s in near]))]
    assert found["blocks"] == {"linear_probe": best, "knn": name}
    assert found["scaling"] == {"linear_probe": scaling, "knn": how}
    assert found["prior"] == prior
    assert found["dev"]["linear_probe"] == dict(zip(names, by_name, strict=True))
    whole = (train.x[best], train.y), (test.x[best], test.y)
    assert found["linear_probe"] == linear(*whole, scaling=scaling, prior=prior)
    on_test = [call for call in calls if call[2][1] is test.y]
    assert [call[0] for call in on_test] == ["linear", "knn"]
    assert all(len(call[1][1]) == len(train.y) for call in on_test), "fitted to all labels"
    for _, first, second, *_ in (call for call in calls if call[2][1] is not test.y):
        assert len(first[1]) + len(second[1]) == len(train.y)


def test_columns_that_do_not_vary_become_zero():
    rng = np.random.default_rng(0)
    x, other = rng.normal(size=(2, 50, 3)) * (1.0, 10.0, 0.0) + 5
    other[:, 2] = 1e6  # a token that no training text has
    deviations = [np.std(x[:, i]) for i in range(3)]
    one = np.sqrt(sum(d * d for d in deviations) / 3)
    for scaling, by in (("each", [*deviations[:2], 1]), ("all", [one] * 3)):
        a, b = probe.scaled(scaling, x.astype(np.float32), other.astype(np.float32))
        np.testing.assert_allclose(a, (x - x.mean(0)) / by, atol=1e-4)
        assert np.abs(b).max() < 10 and not b[:, 2].any()


def test_a_strong_prior_is_chosen_where_labels_are_few_and_noisy():
    def rows(n, seed, noise):
        rng = np.random.default_rng(seed)
        y = rng.integers(0, 2, n)
        x = rng.normal(size=(n, 80)) + 0.25 * (2 * y[:, None] - 1) * (np.arange(80) < 40)
        y = np.where(rng.random(n) < noise, 1 - y, y)
        return probe.Rows({"x": x.astype(np.float32)}, y, np.arange(n))

    assert probe.judge(rows(100, 0, 0.2), rows(100, 1, 0.0))["prior"] >= 10.0


def test_what_a_summary_says_of_several_seeds():
    def result(score, block):
        dev = {name: {"block 1": score, "block 2": score / 2} for name in probe.PROBES}
        blocks = {"linear_probe": block, "knn": "block 9"}
        return {"linear_probe": score, "knn": 1 - score, "blocks": blocks, "dev": dev}

    before, after = [result(0.3, "block 1"), result(0.4, "a")], [result(0.6, "b"), result(0.5, "c")]
    found = probe.compared(before, after, result(0.55, "pixels"))
    wanted = {"untrained": [0.3, 0.4], "pretrained": [0.6, 0.5], "hand_made": 0.55}
    assert found["linear_probe"] == wanted
    assert found["verdict"] == {"linear_probe": "better than untrained only", "knn": "no gain"}
    assert found["block"] == "b"
    assert found["blocks"]["linear_probe"] == {
        "untrained": ["block 1", "a"],
        "pretrained": ["b", "c"],
    }
    assert found["dev"]["knn"]["pretrained"] == {"block 1": 0.6, "block 2": 0.3}
    assert found["dev"]["knn"]["hand_made"] == 0.55
    none = probe.compared(before[:1], after[:1], None)
    assert none["verdict"]["linear_probe"] == "better than untrained"
    assert none["linear_probe"]["hand_made"] is None and none["dev"]["knn"]["hand_made"] is None


@pytest.mark.parametrize(
    ("pretrained", "untrained", "hand_made", "wanted"),
    [
        ([0.9, 0.8], [0.5, 0.6], 0.7, "better than hand-made features"),
        ([0.9, 0.7], [0.5, 0.6], 0.7, "better than untrained only"),
        ([0.9, 0.65], [0.5, 0.6], 0.7, "better than untrained only"),
        ([0.9, 0.6], [0.5, 0.6], 0.7, "no gain"),
        ([0.9, 0.8], [0.95, 0.6], 0.7, "no gain"),  # above hand-made features, and no gain
        ([0.9], [0.5], None, "better than untrained"),
        ([0.4], [0.5], None, "no gain"),
    ],
)
def test_the_verdict_is_about_every_seed(pretrained, untrained, hand_made, wanted):
    assert probe.verdict(pretrained, untrained, hand_made) == wanted


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

    def parts():
        data = {"source": f"manifest:{tmp_path}/{{split}}.csv", "split": "train"}
        examples = {"lengths": (16,), "vocab_size": 300}
        config = {"data": data, "examples": examples}
        return probe.labelled(MODALITY, config, ("train", "test"))

    def found():
        return [part.labels.tolist() for part in parts()]

    table("train", "a", "b", "c", "b")
    table("test", "c", "b")
    assert found() == [[0, 1, 2, 1], [2, 1]] and parts()[1].unknown == 0
    table("test", "b", "d", "c", "d")
    with pytest.warns(UserWarning, match=r"2 of 4 .*test\.csv:3: .*unknown label 'd'"):
        assert found() == [[0, 1, 2, 1], [1, 2]]
    with pytest.warns(UserWarning):
        assert parts()[1].unknown == 0.5
    table("test", "d", "e")
    with pytest.raises(UserError, match=r"test\.csv:2: .*unknown label 'd'"):
        found()
    table("test", "b", "")
    with pytest.raises(UserError, match=r"test\.csv:3: no label"):
        found()
    table("train", "1", "0.5")
    with pytest.raises(UserError, match=r"train\.csv:2: label 1.0 is not a class"):
        found()


def test_classes_without_a_training_example_are_left_out_and_counted(tmp_path):
    """The splits of a folder have the classes of all of them."""
    for i, place in enumerate(("train/cat", "train/eel", "test/eel", "test/dog", "test/cat")):
        (tmp_path / place).mkdir(parents=True)
        for name in "ab":
            image = (np.arange(64) + 10 * i).astype(np.uint8)
            Image.fromarray(image.reshape(8, 8)).save(tmp_path / place / f"{name}.png")
    config = {
        "data": {"source": f"folder:{tmp_path}", "split": "train"},
        "examples": {"image": 8, "channels": 1},
    }
    train, test = probe.labelled(contract.get("vision"), config, ("train", "test"))
    assert test.names == ("cat", "dog", "eel") and test.unknown == pytest.approx(1 / 3)
    assert test.labels.tolist() == [0, 0, 2, 2] and train.unknown == 0
    means = test.inputs["image"].mean((1, 2, 3)) - 31.5
    np.testing.assert_allclose(means, [40, 40, 20, 20], atol=0.5)  # and none of a dog: 30


def test_frames_of_classes_without_a_training_frame_are_left_out_and_counted():
    train = Labelled({}, np.array([[0, 1, -1], [2, 1, 1]]))
    part = Labelled({}, np.array([[-1, 3, 0], [2, 3, -1]]))
    source = Items([{}, {}], split="test")
    found = probe.of_known_classes(train, part, source)
    assert found.labels.tolist() == [[-1, -1, 0], [2, -1, -1]] and found.unknown == 0.5
    with pytest.raises(UserError, match="training has none of its classes"):
        probe.of_known_classes(train, Labelled({}, np.array([[3, -1]])), source)
