"""The page of a reference run: its numbers, and pictures made from a checkpoint of two steps."""

import base64
import dataclasses
import io
import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
from configs_for_tests import config_of, module_of
from PIL import Image
from test_report import Page, curves, figures  # noqa: F401  (a fixture)

from data2vec_jax import train
from data2vec_jax.core.errors import UserError
from data2vec_jax.data.sources import open_source
from data2vec_jax.modalities import contract
from data2vec_jax.modalities.contract import Drawing, Labelled
from data2vec_jax.report import page, pictures
from data2vec_jax.tasks import probe

pytestmark = pytest.mark.xdist_group("report_reference")  # its fixtures are made once

SCORES = {"front end": 0.2, "block 1": 0.4, "block 2": 0.5}
RESULT = {
    "updates": 12_000,
    "seconds": 4_711.2,
    "flops": 2.87165e14,
    "step": 10,
    "dev_curve": [[5, 0.8], [10, 0.9]],
    "dev_curve_knn": [[5, 0.7], [10, 0.75]],
    "blocks": [{"linear_probe": "block 2", "knn": "block 1"}],
    "test": {"linear_probe": [0.88, 0.9, 0.89], "knn": [0.7]},
    "hand_made": {"linear_probe": [0.86], "knn": [0.89]},
}
COMPARED = {
    "dev": {"linear_probe": SCORES, "knn": SCORES},
    "untrained": {"linear_probe": 0.5, "knn": 0.4, "dev": {"linear_probe": {"front end": 0.1}}},
    "hand_made_dev": {"linear_probe": 0.85, "knn": 0.95},
}


def tuned(low, high):
    few = {"dev": [], "rate": 1e-3, "updates": 300, "seconds": [60, 120], "accuracy": [low, high]}
    return {"0.02": few, "1": few | {"accuracy": [0.99], "updates": 6000}}


def made(folder, summary):
    (folder / "summary.json").write_text(json.dumps(summary))
    page.main([str(folder)])
    return read((folder / "report.html").read_text(encoding="utf-8"))


def read(text):
    """The page, checked as every page is; its pictures are inside it, and are taken out first."""
    return Page(re.sub(r'<img src="data:image/webp;base64,[\w+/=]+" alt="([^"]*)">', r"\1", text))


# --- numbers ------------------------------------------------------------------------------------


def test_numbers_and_curves_of_all_starts(tmp_path, figures):  # noqa: F811
    summary = {
        "v2": RESULT | COMPARED | {"finetuned": tuned(0.8, 0.9)},
        "v1": RESULT | {"dev_curve": [[5, 0.6], [10, 0.65]]},
        "scratch": {"task": "digits", "finetuned": tuned(0.4, 0.5)},
    }
    found = made(tmp_path, summary)
    cost, shares = found.tables
    v2 = ["data2vec 2.0", "12,000", "79", "287T", "10"]
    scores = ["86.0 %", "89.0 % (88.0 to 90.0)", "89.0 %", "70.0 %"]
    assert cost[1:] == [[*v2, *scores], ["data2vec 1.0", *v2[1:], *scores]]
    assert shares[1] == [
        "2 %",
        "data2vec 2.0",
        "0.001",
        "300",
        "1.5",
        "accuracy 85.0 % (80.0 to 90.0)",
    ]
    assert [row[:2] for row in shares[1:]] == [
        ["2 %", "data2vec 2.0"],
        ["2 %", "from scratch"],
        ["100 %", "data2vec 2.0"],
        ["100 %", "from scratch"],
    ]
    assert found.charts == [
        "Linear probe over updates",
        "k-NN over updates",
        "data2vec 2.0 · Linear probe over blocks",
        "data2vec 2.0 · k-NN over blocks",
        "accuracy over shares of the labels",
    ]
    assert {
        name: xy.tolist() for name, xy in curves(figures["Linear probe over updates"]).items()
    } == {
        "data2vec 2.0": [[5, 10], [80, 90]],
        "data2vec 1.0": [[5, 10], [60, 65]],
    }
    axes = figures["Linear probe over updates"].axes[0]
    levels = [line.get_ydata()[0] for line in axes.lines if line.is_dashed()]
    assert levels == [85, 50] and axes.get_ylim()[0] < 50
    tuned_curves = curves(figures["accuracy over shares of the labels"])
    assert tuned_curves["data2vec 2.0"][1].tolist() == pytest.approx([85, 99])
    assert tuned_curves["from scratch"][1].tolist() == pytest.approx([45, 99])
    assert "Dashed: hand-made and untrained." in found.text
    # No checkpoints are there, and the page says so.
    assert found.text.count("Not made: no checkpoint at") == 2


def test_a_result_without_what_came_later_has_a_page(tmp_path, figures):  # noqa: F811
    found = made(tmp_path, {"v2": RESULT})
    assert found.charts == ["Linear probe over updates", "k-NN over updates"]
    assert not any(line.is_dashed() for line in figures[found.charts[0]].axes[0].lines)
    found = made(tmp_path, {"scratch": {"finetuned": tuned(0.4, 0.5)}})
    assert found.charts == ["accuracy over shares of the labels"] and len(found.tables) == 1


# --- pictures -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory, light_compilation):
    """Workdir of two steps on the digits, checkpoints of both, and its config."""
    folder = tmp_path_factory.mktemp("reference") / "v2"
    config = config_of("demo", "vision,v2", total_steps=2, log_every=1).to_dict()
    config["model"]["encoder"]["depth"] = config["objective"]["top_k"] = 2
    config["checkpoint"] = {"every": 1, "keep": 2}
    train.train(config, folder, verbose=False)
    return folder, config


def pixels(tile):
    """uint8 [height, width, 3] of a tile's image."""
    data = base64.b64decode(tile.image.removeprefix("data:image/webp;base64,"))
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


@pytest.fixture(scope="module")
def drawn(run):
    return pictures.pictures(run[0], 2, "block 1")


@pytest.fixture(scope="module")
def digits():
    codec = contract.get("vision").codec
    source = open_source("samples:digits", "test", codec=codec)
    items = [source[i] for i in range(len(source))]
    return {item["image"].tobytes(): item["label"] for item in items}


def test_neighbours_are_other_examples_of_the_test_split(drawn, digits):
    assert len(drawn.neighbours) == 8 and all(len(row) == 6 for row in drawn.neighbours)
    assert len({row[0].caption for row in drawn.neighbours}) == 8
    for query, *near in drawn.neighbours:
        found = [pixels(tile)[..., :1].tobytes() for tile in (query, *near)]
        assert [str(digits[x]) for x in found] == [tile.caption for tile in (query, *near)]
        assert len(set(found)) == 6
        assert query.same is None
        assert [tile.same for tile in near] == [tile.caption == query.caption for tile in near]
    share, count = re.match(
        r"([\d.]+) % of the 5 nearest of all ([\d,]+) examples", drawn.agreement
    ).groups()
    assert 20 < float(share) < 95 and count == "1,000"


def test_masks_cover_what_they_say(drawn):
    for plain, *masked in drawn.masks:
        assert len(masked) == 3
        for tile in masked:
            covered = (pixels(tile) == pictures.COVER).all(-1)
            said = int(re.match(r"(\d+) % masked", tile.caption)[1])
            assert 100 * covered.mean() == pytest.approx(said, abs=0.5)
            np.testing.assert_array_equal(pixels(tile)[~covered], pixels(plain)[~covered])
        assert len({tile.image for tile in masked}) == 3


def test_feature_maps_have_a_colour_for_each_patch(run, drawn):
    side = 28 // run[1]["model"]["patch"]
    assert len(drawn.maps) == len(drawn.masks) == 6
    for plain, front, block in drawn.maps:
        assert pixels(plain).shape == (28, 28, 3)
        assert (front.caption, block.caption) == ("front end", "block 1")
        for tile in (front, block):
            assert pixels(tile).shape == (side, side, 3)
            assert len(np.unique(pixels(tile).reshape(-1, 3), axis=0)) > side


def test_the_page_of_a_run_holds_its_pictures_and_is_small(run, drawn, tmp_path):
    summary = {"v2": RESULT | {"step": 2, "workdir": str(run[0]), "source": "samples:digits"}}
    assert drawn.agreement in " ".join(made(tmp_path, summary).text.split())
    text = (tmp_path / "report.html").read_text()
    shown = [tile.image for row in (*drawn.neighbours, *drawn.masks) for tile in row]
    assert all(image in text for image in shown) and len(text) < 1_500_000


def test_a_modality_without_a_drawing_has_no_pictures(run, monkeypatch):
    bare = dataclasses.replace(contract.get("vision"), drawing=None)
    monkeypatch.setattr(contract, "get", lambda name: bare)
    assert pictures.pictures(run[0], 2, "block 1") is None


def test_missing_data_is_said(run):
    with pytest.raises(UserError, match="no samples 'nothing'"):
        pictures.pictures(run[0], 2, "block 1", "samples:nothing")


def test_launch_computes_what_a_result_lacks(run, monkeypatch, tmp_path):
    reference, (folder, config) = module_of("launch/reference.py"), run
    read_labels = probe.labelled

    def labelled(modality, config, splits):  # the samples have no split dev
        return read_labels(modality, config, ["test" if s == "dev" else s for s in splits])

    monkeypatch.setattr(probe, "labelled", labelled)
    monkeypatch.setattr(reference, "config_of", lambda name, version: config)
    monkeypatch.setattr(reference, "workdir_of", lambda name, version: folder)
    monkeypatch.setattr(reference, "RUNS", tmp_path)
    monkeypatch.setattr(reference, "SEEDS", 1)
    monkeypatch.setattr(reference, "RESULTS", tmp_path / "results")
    monkeypatch.setitem(
        reference.TASKS, "digits", reference.replace(reference.TASKS["digits"], labels=100)
    )
    found = reference.compared("digits", "v2", 2)
    names = {"front end", "block 1", "block 2", "mean of blocks"}
    for metric in probe.PROBES:
        assert names <= set(found["dev"][metric]) == set(found["untrained"]["dev"][metric])
        assert 0.2 < found["untrained"][metric] < found["hand_made_dev"][metric] < 1
    assert found["dev"] != found["untrained"]["dev"]

    reference.RESULTS.mkdir()
    (tmp_path / "results/digits-v2.json").write_text(json.dumps(RESULT | {"step": 2} | found))
    reference.write_page("digits")
    text = (tmp_path / "digits/report.html").read_text()
    assert "over blocks" in text and text.count("data:image/webp") > 80


# --- parts --------------------------------------------------------------------------------------


def test_nearest_are_of_other_examples():
    rng = np.random.default_rng(0)
    x, example = rng.normal(size=(40, 6)).astype(np.float32), np.repeat(np.arange(10), 4)
    found = pictures.nearest_of(x.copy(), example, 3)
    z = x - x.mean(0)
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    for row in range(40):
        others = [i for i in range(40) if example[i] != example[row]]
        want = sorted(others, key=lambda i: -(z[i] @ z[row]))[:3]
        assert found[row].tolist() == want
    with pytest.raises(UserError, match="3 held-out examples are too few"):
        pictures.nearest_of(x[:12], example[:12], 3)


def test_colours_follow_features_and_not_places():
    rng = np.random.default_rng(0)
    place = 50 * rng.normal(size=(1, 7, 8))
    kind = rng.integers(0, 2, size=(30, 7))
    x = place + kind[..., None] * np.arange(1, 9) + 0.01 * rng.normal(size=(30, 7, 8))
    valid = np.ones((30, 7), bool)
    valid[3, 5:] = False
    x[3, 5:] = 1e6  # padding has no say
    red = pictures.components(x, valid)[..., 0].astype(float)
    a, b = red[valid & (kind == 0)], red[valid & (kind == 1)]
    assert abs(np.median(a) - np.median(b)) > 150 and max(a.std(), b.std()) < 60
    assert (pictures.components(x, valid)[3, 5:] == 128).all()


def test_one_of_each_class():
    labels = np.repeat(np.arange(20), 5)
    found = labels[pictures.one_of_each(labels, 8)]
    assert len(set(found)) == 8 and list(found) == sorted(found) and {0, 19} <= set(found)
    rows = pictures.one_of_each(np.zeros(9, int), 4)
    assert len(set(rows.tolist())) == 4


def test_frames_are_shown_in_the_middle_and_examples_with_all_their_labels():
    heat = np.tile(np.arange(40.0), (5, 1))  # brighter from left to right
    data = Labelled({"x": heat[None]}, np.array([[-1, 0, 0, 1, 1, 1, 0, -1]]), ("a", "b"))
    model = SimpleNamespace(mask_shape=lambda inputs: 40)
    artist = pictures.Artist(Drawing(lambda inputs: inputs["x"]), None, model, data)
    assert pictures.caption_of(data, 0) == "a b a" and artist.wide
    whole = artist.picture(0)
    part = pixels(artist.around(0, 20, "b", None))
    np.testing.assert_array_equal(part, whole[:, 20 - pictures.AROUND : 20 + pictures.AROUND + 1])
    edge = pixels(artist.around(0, 0, "a", None))
    assert edge.shape == part.shape and not edge[:, : pictures.AROUND].any()


def test_time_runs_to_the_right_and_masks_lie_over_their_patches():
    x = np.zeros((8, 4))
    x[0, 0] = 1.0  # first in time, lowest frequency
    x[7, 3] = 2.0
    data = Labelled({"x": x[None]}, np.array([0]))
    model = SimpleNamespace(mask_shape=lambda inputs: (4, 2))
    artist = pictures.Artist(Drawing(lambda inputs: inputs["x"], turned=True), None, model, data)
    bright = artist.picture(0).sum(-1)
    assert bright.shape == (4, 8) and bright[0, 7] == bright.max()
    assert bright[3, 0] > bright[2, 0] == bright.min()
    mask = np.zeros(8, bool)
    mask[0] = True  # first in time, low frequencies: bottom left
    covered = (pixels(artist.hidden(0, mask, "")) == pictures.COVER).all(-1)
    assert np.argwhere(covered).tolist() == [[2, 0], [2, 1], [3, 0], [3, 1]]


def test_words_are_hidden_and_joined_as_they_were():
    config = config_of("demo", "text,v2").to_dict()
    modality = contract.get("text")
    source = open_source(config["data"]["source"], "test", codec=modality.codec)
    like = modality.examples(source, **config["examples"] | {"vocab_size": 500})
    data = modality.labelled(source, like, **config["examples"] | {"vocab_size": 500})
    model = SimpleNamespace(mask_shape=lambda inputs: inputs["tokens"].shape[-1])
    artist = pictures.Artist(modality.drawing, like, model, data)
    words = artist.words(0)
    assert len(words) == data.inputs["tokens"].shape[1] and words[0] == ""
    assert source[0]["text"].startswith("".join(words).strip())
    mask = np.zeros(len(words), bool)
    mask[2] = True
    tile = artist.hidden(0, mask, "")
    hidden = [word for word, style in tile.words if style]
    assert hidden == [words[2]] and "".join(word for word, _ in tile.words) == "".join(words)
