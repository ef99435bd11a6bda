"""`python -m data2vec_jax.evaluate` on runs of the loop."""

import functools
import json
import re
import shutil
import statistics
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from configs_for_tests import config_of
from PIL import Image

from data2vec_jax import evaluate, train
from data2vec_jax.convert import export, ours
from data2vec_jax.convert.tables import entries_of
from data2vec_jax.core.errors import UserError
from data2vec_jax.metrics.writer import FILE, read_lines
from data2vec_jax.modalities.contract import Labelled
from data2vec_jax.tasks import probe

pytestmark = [
    pytest.mark.xdist_group("evaluate"),  # its fixtures are made once
    pytest.mark.usefixtures("quick_probes"),
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two seeds of a run, and one of another rate."""
    folder = tmp_path_factory.mktemp("runs")
    config = config_of("finetune_imagenet", "smoke")
    config.total_steps = 1
    config.loss = {}
    config.data.share = 0.02
    programs: dict = {}
    for name, seed, peak in (("a/0", 0, 2e-3), ("a/1", 1, 2e-3), ("b", 0, 1e-3)):
        config.seed, config.schedule.peak = seed, peak
        same = programs if name != "b" else {}
        train.train(config.to_dict(), folder / name, programs=same, verbose=False)
    return folder


def recorded(folder):
    """The scores that the loop wrote."""
    (line,) = [x for x in read_lines(folder / FILE) if x["split"] == "test"]
    return line


def test_scores_are_those_of_the_loop_and_seeds_share_a_row(runs, tmp_path, capsys):
    workdirs = [str(runs / name) for name in ("a/0", "a/1", "b")]
    out, card = tmp_path / "scores.json", tmp_path / "card.md"
    evaluate.main([*workdirs, f"--json={out}", f"--markdown={card}"])
    first, second = json.loads(out.read_text())
    assert first["workdirs"] == workdirs[:2] and first["seeds"] == [0, 1]
    lines = [recorded(runs / name) for name in ("a/0", "a/1")]
    for metric in ("accuracy", "top5_accuracy", "loss"):
        score, wanted = first["scores"][f"test {metric}"], [line[metric] for line in lines]
        assert score["values"] == pytest.approx(wanted, rel=1e-4)
        assert score["mean"] == pytest.approx(statistics.fmean(wanted), rel=1e-4)
        assert score["std"] == pytest.approx(statistics.stdev(wanted), rel=1e-2, abs=1e-4)
    assert second["workdirs"] == workdirs[2:] and second["scores"]["test loss"]["std"] == 0
    D, F = 32, 64  # width, hidden; two blocks, patches of 16 pixels, ten classes, norms of 2 D
    block = (3 * D * D + 3 * D) + (D * D + D) + (D * F + F) + (F * D + D) + 2 * 2 * D
    outside = (16 * D + D) + D + 2 * D + 2 * D + (10 * D + 10)  # with class token and two norms
    assert second["trained_parameters"] == second["parameters"] == 2 * block + outside
    said = capsys.readouterr().out.splitlines()
    accuracy = [100 * line["accuracy"] for line in lines]
    low, high = f"{min(accuracy):.2f}", f"{max(accuracy):.2f}"
    assert (
        len(said) == 3 and f"({low} to {high})" in said[1] and said[1].startswith(str(runs / "a"))
    )
    text = card.read_text()
    assert "| --- |" in text and "`samples:digits`" in text and "seeds 0, 1" in text


def test_comparison_has_a_row_for_each_argument(runs, capsys):
    evaluate.main(["--compare", f"both={runs / 'a'}", f"{runs / 'b'}", f"one={runs / 'a/1'}"])
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [row[0] for row in rows[1:]] == ["both", str(runs / "b"), "one"]
    assert [row[1] for row in rows[1:]] == ["2", "1", "1"]


def test_other_examples_than_in_training(runs, tmp_path):
    out = tmp_path / "scores.json"
    evaluate.main([str(runs / "b"), f"--json={out}", "--set", "data.eval_split=train"])
    (row,) = json.loads(out.read_text())
    assert set(row["scores"]) == {"train loss", "train accuracy", "train top5_accuracy"}
    with pytest.raises(UserError, match="--set model"):
        evaluate.evaluate(str(runs / "b"), {"model.width": 3})
    with pytest.raises(UserError, match="not a workdir"):
        evaluate.main([str(tmp_path)])
    with pytest.raises(UserError, match="not a pretraining run"):
        evaluate.main([str(runs / "b"), f"--features={tmp_path}/x.npz"])


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A pretraining run at a rate of 0."""
    config, folder = config_of("vision_v1", "smoke"), tmp_path_factory.mktemp("pretrained") / "a"
    config.update(total_steps=1, seed=3)
    config.schedule.update(peak=0.0, floor=0.0)
    config.data.eval_split = None
    train.train(config.to_dict(), folder, verbose=False)
    return folder


def fingerprint(encode, params, train, test):
    """In place of `probe.probe`: means of features, which differ more than scores do."""
    x, _ = probe.features(encode, params, test.take(np.arange(64)))
    assert test.inputs["image"].dtype == np.uint8 and len(train.labels) > len(test.labels) > 64
    found = dict.fromkeys(probe.PROBES, float(np.mean(x * np.arange(x.shape[1]))))
    words = dict.fromkeys(probe.PROBES, "output")
    return found | {"blocks": words, "dev": {key: {"output": 0.0} for key in probe.PROBES}}


def test_other_checkpoints_are_probed_on_the_data_of_a_run(
    pretrained, tmp_path, capsys, monkeypatch
):
    """A run's weights in another format; then a network of another size and number of channels."""
    monkeypatch.setattr(probe, "probe", fingerprint)
    monkeypatch.setattr(probe, "probe_hand_made", lambda *_: None)
    monkeypatch.setattr(probe, "tokens", lambda encode, params, part: part)
    monkeypatch.setattr(probe, "attentive", lambda train, test: 0.0)
    checkpoint = ours.open_checkpoint(pretrained)
    export.export(checkpoint, tmp_path / "same", "hf")
    options = dict(width=8, image=10, patch=5, shared_relative=False, absolute=True)
    options["encoder"] = dict(depth=1, heads=2, mlp=8, norm="pre", qkv_bias="qv")
    config = {"modality": "vision", "model": options}
    zeros = {path: np.zeros(shape, np.float32) for path, shape in ours.shapes_of(config).items()}
    small = replace(checkpoint, config=config, entries=entries_of(zeros))
    export.export(small, tmp_path / "small", "jax")
    for name in ("same", "small"):
        with pytest.raises(UserError, match="name a pretraining run of vision beside it"):
            evaluate.evaluate(str(tmp_path / name), {})
    rows = [str(pretrained), f"same={tmp_path}/same", f"small={tmp_path}/small"]
    files = [f"--json={tmp_path}/a.json", f"--markdown={tmp_path}/a.md"]
    evaluate.main(["--compare", *rows, *files])
    first, same, small = json.loads((tmp_path / "a.json").read_text())
    for metric, score in first["scores"].items():
        found = same["scores"][metric]["values"]
        assert score["values"] == pytest.approx(found, rel=1e-3, abs=1e-5), metric
    assert same["forward_flops"] == first["forward_flops"]
    N, D = 5, 8  # four patches of 5 x 5 x 3 numbers and a class token
    assert small["forward_flops"] == 2 * 4 * 75 * D + N * (8 * D**2 + 4 * N * D + 4 * D * 8)
    assert small["parameters"] == sum(x.size for x in zeros.values())
    assert small["scores"]["test knn"]["values"] == [0.0]  # its weights are zeros
    table = capsys.readouterr().out
    assert "forward MFLOPs" in table and "\nsmall, knn: " in table
    assert f"`small`: the checkpoint {tmp_path}/small, probed on" in (tmp_path / "a.md").read_text()


def test_scores_of_a_probe_count_classes_that_training_has_not(pretrained, monkeypatch):
    config = json.loads((pretrained / "config.json").read_text())
    found = {"linear_probe": 0.5, "knn": 0.25}
    results = dict(probe=found, probe_hand_made=None, tokens=(), attentive=0.75)
    for name, result in results.items():
        monkeypatch.setattr(probe, name, lambda *_, result=result, **more: result)
    size = config["model"]["image"]
    part = Labelled({"image": np.zeros((2, size, size, 1), np.uint8)}, np.arange(2))
    for unknown in (0.25, 0.0):
        frozen = ("train", "dev"), [part, part._replace(unknown=unknown)], None
        scores = evaluate.probed(pretrained, config, frozen, {}, {})["scores"]["dev"]
        assert scores["linear_probe"] == scores["linear_probe untrained"] == 0.5
        assert scores.get("unknown_classes", 0.0) == unknown


def test_a_pretrained_encoder_is_probed_beside_an_untrained_one(pretrained, tmp_path, monkeypatch):
    """At a rate of 0 they are the same encoder."""
    monkeypatch.setattr(probe, "attentive", functools.partial(probe.attentive, steps=100))
    run = evaluate.evaluate(str(pretrained), {})
    scores, probes = run["scores"]["test"], ("linear_probe", "knn")
    both = {*probes, "attentive_probe"}
    wanted = (
        both | {f"{name} untrained" for name in both} | {f"{name} hand-made" for name in probes}
    )
    assert set(scores) == wanted
    for name in both:
        assert scores[name] == scores[f"{name} untrained"] > 0.15  # of ten classes
    for name in probes:  # features that are alike up to rounding, so another may be chosen
        dev = [run["probes"][kind]["dev"][name] for kind in ("", " untrained")]
        assert dev[0] == pytest.approx(dev[1], abs=0.01)
    row = evaluate.summary("a", [run])
    assert row["verdict"] == dict.fromkeys(probes, "no gain")
    for name in probes:
        assert scores[f"{name} hand-made"] > 0.7
        assert row["scores"][f"test {name} hand-made"]["blocks"] == ["pixels"]
        (block,) = row["scores"][f"test {name}"]["blocks"]
        (dev,) = row["scores"][f"test {name}"]["dev"]
        assert dev[block] == max(dev.values()) > 0.1
    lines = evaluate.table([row])
    cell = dict(zip(*lines, strict=True))["test knn hand-made"]
    assert cell == f"{100 * scores['knn hand-made']:.2f}, pixels"
    assert evaluate.sentences(row) == ["a, linear probe: no gain", "a, knn: no gain"]
    card = evaluate.markdown(lines, [row], {run["workdir"]: run})
    assert card.endswith("\na, linear probe: no gain.\n\na, knn: no gain.\n")
    two = evaluate.summary("a", [run, run | {"seed": 4}])
    assert len(two["scores"]["test knn"]["blocks"]) == 2
    (block,) = row["scores"]["test knn"]["blocks"]
    assert evaluate.cell("test knn", two["scores"]["test knn"]).endswith(f"), {block}")
    file = tmp_path / "features.npz"
    evaluate.main([str(pretrained), f"--features={file}"])
    with np.load(file) as kept:
        assert set(kept) == {"train_x", "train_y", "test_x", "test_y"}
        assert kept["test_x"].shape == (len(kept["test_y"]), 32)
        parts = [(kept[f"{name}_x"], kept[f"{name}_y"]) for name in ("train", "test")]
    assert probe.knn(*parts) > 0.15
    with pytest.raises(UserError, match="takes one run"):
        evaluate.main([str(pretrained), str(pretrained), f"--features={file}"])
    Image.new("L", (16, 16)).save(tmp_path / "a.png")
    (tmp_path / "images.csv").write_text("path\na.png\na.png\n")
    with pytest.raises(UserError, match="no labels"):
        source = {"data.source": f"manifest:{tmp_path}/images.csv"}
        evaluate.evaluate(str(pretrained), {**source, "data.eval_split": "train"})


@pytest.mark.parametrize(
    ("modality", "source", "split", "width", "metric", "wanted"),
    [
        ("text", "glue:/x/CoLA", "dev", 768, "matthews", 62.2),
        ("text", "glue:/x/CoLA", "dev", 768, "loss", None),
        ("text", "glue:/x/MNLI", "dev_matched", 768, "accuracy", 83.2),
        ("text", "glue:/x/MNLI", "dev_matched", 96, "accuracy", None),
        ("speech", "librispeech:/x", "test-other", 1024, "wer_lm", 6.3),
        ("speech", "librispeech:/x", "test-other", 1024, "wer", None),
        ("vision", "imagenet:/x", "val", 1024, "accuracy", 86.6),
        ("vision", "samples:digits", "test", 768, "accuracy", None),
    ],
)
def test_the_paper_stands_beside_its_own_tasks_only(modality, source, split, width, metric, wanted):
    config = {"data": {"source": source, "split": "1h"}, "model": {"width": width}}
    assert evaluate.paper(config | {"modality": modality}, split, metric) == wanted


def test_the_same_run_twice_and_rows_of_one_name(runs, tmp_path, monkeypatch):
    out = tmp_path / "scores.json"
    monkeypatch.chdir(runs)
    evaluate.main(["b", str(runs / "b"), "a/0", f"--json={out}"])  # it is evaluated once
    assert [row["seeds"] for row in json.loads(out.read_text())] == [[0], [0]]
    evaluate.main(["--compare", "x=b", "x=a/0", f"--json={out}"])
    rows = json.loads(out.read_text())
    assert [(row["name"], Path(row["workdirs"][0]).name) for row in rows] == [
        ("x", "b"),
        ("x", "0"),
    ]
    for bad, why in (("x=b,typo", "typo: not a workdir"), ("b,./b", "b is in it twice")):
        with pytest.raises(UserError, match=why):
            evaluate.main(["--compare", bad])
    (runs / "rate=1").symlink_to(runs / "b")
    evaluate.main(["rate=1"])


def test_runs_of_one_seed_from_two_starts_are_no_seeds_of_one():
    starts = [(0, "p0"), (1, "p1"), (0, "q0"), (1, "q1")]
    runs = [
        {
            "workdir": f"r{i}",
            "seed": seed,
            "config": {"examples": {}, "seed": seed, "init_from": start},
        }
        for i, (seed, start) in enumerate(starts)
    ]
    groups = evaluate.grouped(runs)
    assert [(name, [run["workdir"] for run in group]) for name, group in groups] == [
        ("r*", ["r0", "r1"]),
        ("r*", ["r2", "r3"]),
    ]


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["--json=/nowhere/x.json"], "--json=/nowhere/x.json: not a file in an existing folder"),
        (["--markdown=/tmp"], "--markdown=/tmp: not a file"),
        (["--jsn=x"], "unrecognized arguments: --jsn=x"),
        (["--set", "data.batch_size=many"], "config.data.batch_size: 'many' is not a whole number"),
        (["--set", "data.batch_size=0"], "config.data.batch_size: 0 is not a whole number from 1"),
        (["--set", "data.workers=-1"], "config.data.workers: -1 is not a whole number from 0"),
        (["--set", "data.share=true"], "config.data.share: True is not a number"),
        (["--set", "scoring.metrics=accuracy"], "scoring.metrics: 'accuracy' is not a list"),
        (["--set", "mesh.fdsp=2"], "config.mesh.fdsp: no such option; did you mean 'fsdp'"),
        (["--set", "scorin.metrics=[]"], "did you mean 'scoring.metrics'"),
    ],
)
def test_wrong_words_are_refused_in_one_line(runs, options, why):
    with pytest.raises(UserError, match=re.escape(why)):
        evaluate.main([str(runs / "b"), *options])


def test_a_damaged_stopwatch_costs_no_scores(runs, tmp_path):
    (tmp_path / "checkpoints/3/position").mkdir(parents=True)
    for text in ("{", "[]", '{"stopwatch": 3}'):
        (tmp_path / "checkpoints/3/position/data.json").write_text(text)
        assert evaluate.train_seconds(tmp_path) is None


def test_a_file_that_cannot_be_written_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: False)  # root may write anywhere
    with pytest.raises(UserError, match=r"x\.json: no permission to write"):
        evaluate.check_writable(tmp_path / "x.json", "json")

    def full(path):
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match=r"^--json=x\.json: No space left on device$"):
        evaluate.write("json", Path("x.json"), full)


def test_one_checkpoint_of_a_run_that_has_a_damaged_one(runs, tmp_path, capsys):
    """What was set aside does not count; WORKDIR/checkpoints/STEP is read as it is."""
    shutil.copytree(runs / "b", tmp_path / "run")
    (step,) = (tmp_path / "run/checkpoints").iterdir()
    shutil.copytree(step, step.with_name("damaged-9"))
    seconds = evaluate.train_seconds(tmp_path / "run")
    assert seconds and evaluate.train_seconds(step) == seconds
    evaluate.main([str(step), f"--json={tmp_path}/x.json"])
    (row,) = json.loads((tmp_path / "x.json").read_text())
    assert row["name"] == str(step) and row["train_seconds"] == [seconds]
    assert row["scores"]["test accuracy"]["values"] == [recorded(runs / "b")["accuracy"]]
