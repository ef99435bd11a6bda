"""`python -m data2vec_jax.ablate`: points of the papers, runs in parts, tables and pictures."""

import json
import re

import numpy as np
import pytest
from configs_for_tests import config_of

from data2vec_jax import ablate, train
from data2vec_jax.core.config import differences
from data2vec_jax.core.errors import UserError
from data2vec_jax.report import study
from data2vec_jax.tasks import pretrain

pytestmark = [
    pytest.mark.xdist_group("ablate"),  # its fixtures are made once
    pytest.mark.usefixtures("quick_probes"),
]


def points(name, recipe, variant):
    return ablate.STUDIES[name].points(config_of(recipe, variant).to_dict())


def test_points_are_the_papers():
    """Figure 2 and Tables 5, 7 and 8 of 1.0, on its recipe of speech."""
    assert [*points("top_k", "speech_v1", "base")] == [f"K={k}" for k in (1, 2, 3, 4, 6, 8, 10, 12)]
    for name in ("target", "masking", "beta"):
        assert {*ablate.STUDIES[name].paper} <= {*points(name, "speech_v1", "base")}
    assert points("target", "speech_v1", "base")["residual"] == {"objective.target": "residual"}
    assert points("beta", "speech_v1", "base")["0.25"] == {"objective.beta": 0.25}
    masks = points("masking", "speech_v1", "base")
    assert len(masks) == 9
    own = config_of("speech_v1", "base").mask

    def covered(prob, width):
        """The share of a long row that random spans cover."""
        starts = np.random.default_rng(0).random(500_000) < prob / width
        return np.mean(np.convolve(starts, np.ones(width)) > 0)

    for name, options in masks.items():
        prob, width = options["mask.prob"], options["mask.width"]
        assert name == f"{prob:g} x {width}"
        wanted = own.masked * covered(prob, width) / covered(own.prob, own.width)
        assert options["mask.masked"] == pytest.approx(wanted, rel=0.01)
    assert masks["0.65 x 10"]["mask.masked"] == own.masked


def test_rates_of_blocks_are_odds():
    masks = points("masking", "vision_v2", "base")  # .8 is 4 to 1
    assert {o["mask.ratio"] for o in masks.values()} == {0.667, 0.8, 0.889}
    assert {o["mask.width"] for o in masks.values()} == {2, 3, 4}
    assert [*points("masking", "text_v2", "base")] == ["0.316", "0.48", "0.649"]
    rectangles = points("masking", "vision_v1", "base").values()
    assert {(o["mask.count"], o["mask.min_patches"]) for o in rectangles} == {
        (count, least) for count in (92, 120, 147) for least in (8, 16, 24)
    }
    with pytest.raises(UserError, match=r"^config\.mask: mine has no prob, ratio or count to vary"):
        ablate.masking({"mask": {"kind": "mine"}})


def test_decays_vary_the_horizon():
    found = points("decay", "vision_v2", "base")  # 0.9998 to 0.99999
    short = points("decay", "demo", "text,v2")  # a quarter of the horizon is below the start
    assert len(short) == 6 and "0.966667 to 0.966667" in short
    ends = {(o["ema.start"], round(o["ema.end"], 7)) for o in found.values()}
    own, held = (0.9998, 0.99999), {(0.9998, 0.9998), (0.99999, 0.99999)}
    assert ends == {own, *held, (0.0, 0.0), (0.9998, 0.99996), (0.9998, 0.9999975)}
    assert next(iter(found)) == "0.9998 to 0.99999"


def test_what_does_not_fit_is_left_out_or_refused(capsys):
    config = config_of("vision_v2").to_dict()
    found = ablate.configs_of("masking", config)  # a grid of 7 x 7
    assert "masking 0.889 x 4 is left out: config.mask.width" in capsys.readouterr().err
    assert "0.8 x 3" in found and "0.889 x 4" not in found
    changed = differences(config, found["0.667 x 2"])
    assert changed == ["collapse.action", "mask.ratio", "mask.width"]
    with pytest.raises(UserError, match=r"^config\.objective\.clones: no such option"):
        ablate.configs_of("clones", config_of("vision_v1").to_dict())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("top_q --workdir=x", "invalid choice: 'top_q'"),
        ("top_k --config=vision_v1:smoke", "--workdir"),
        ("top_k --workdir=x --part=3/2", "--part: '3/2' is not I/N, such as 2/8"),
        ("top_k --workdir=x --seeds=0", "--seeds: '0' is no whole number from 1 on"),
        ("top_k --workdir=x --seed=3", "no option --seed=3; did you mean '--seeds'?"),
        ("top_k --workdir=x --set data.eval_split=val", "--set is of compare; a study takes"),
        ("decay --workdir=x --config=vision_mae:smoke", "config.ema: this objective has no"),
        ("top_k --workdir=x --config=finetune_imagenet:smoke", "a recipe of fine-tuning"),
        ("top_k --workdir=x --config=vision_v1:smoke --config.data.eval_split=no", "no split 'no'"),
        ("top_k --workdir=x", "--config=NAME:VARIANT is missing"),
        ("top_k --workdir=x --config=vision_v1:smoke --config.no.such=1", "config.no"),
        ("compare --workdir=x", "compare takes"),
        ("compare nowhere --workdir=x", "nowhere: not a workdir"),
    ],
)
def test_mistakes_are_one_line(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        ablate.main(["ablate", *arguments.split()])
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not [*tmp_path.iterdir()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, light_compilation, quick_probes):
    """Two points of a study, two seeds, in three parts of which the second ends last."""
    folder = tmp_path_factory.mktemp("ablate")
    arguments = [
        "--config=vision_v1:smoke",
        "--config.total_steps=2",
        "--config.checkpoint.every=1",
    ]
    arguments += ["--config.checkpoint.keep=2", "--seeds=2", "--labels=100", f"--workdir={folder}"]
    arguments.append("--config.model.encoder.depth=2")
    for part in ("3/3", "1/3"):
        ablate.main(["ablate", "top_k", *arguments, f"--part={part}"])
        assert not (folder / "top_k/summary.json").exists()
    ablate.main(["ablate", "top_k", *arguments, "--part=2/3"])
    return folder, arguments


def test_parts_make_a_study_and_the_last_draws(folder, monkeypatch):
    folder, arguments = folder
    found = json.loads((folder / "top_k/summary.json").read_text())
    own = config_of("vision_v1").seed
    assert [*found["points"]] == ["K=1", "K=2"] and found["study"] == "top_k"
    for k, runs in enumerate(found["points"].values(), 1):
        for seed, run in enumerate(runs):
            config = json.loads((folder / f"top_k/K={k}/seed{seed}/config.json").read_text())
            assert (config["objective"]["top_k"], config["seed"]) == (k, own + seed)
            assert run["updates"] == 2 and run["seconds"] > 0
            task = pretrain.abstract_task(config)
            assert run["FLOPs"] == 2 * task.flops(task.shapes[0]) > 1e6
            assert run["peak_bytes"] > 2**27 and 0 < run["target_std"] < 2
            assert ("untrained" in run["probes"]) == ("hand_made" in run["probes"]) == (k == 1)
            assert 0 <= run["probes"]["2"]["linear_probe"] <= 1 and "1" not in run["probes"]

    one = folder / "top_k/K=1/seed0"
    assert ablate.is_done(one, 2) and not ablate.is_done(one, 3)  # not done if it goes on

    def never(*_, **__):
        raise AssertionError("what is done is not done again")

    page, table = folder / "top_k/report.html", (folder / "top_k/summary.md").read_text()
    before = (folder / "top_k/summary.json").read_text()
    page.unlink()
    monkeypatch.setattr(train, "train", never)
    monkeypatch.setattr(ablate.probe, "probe", never)
    ablate.main(["ablate", "top_k", *arguments])
    assert (folder / "top_k/summary.json").read_text() == before
    head, _, *rows = re.findall(r"^\|.*\|$", table, re.M)
    cells = [line.strip("| ").split(" | ") for line in rows]
    assert [c[0] for c in cells] == ["K=1", "K=2", "untrained", "hand-made"]
    scores = [run["probes"]["2"]["linear_probe"] for run in found["points"]["K=2"]]
    low, high = (f"{100 * x:.1f}" for x in (min(scores), max(scores)))
    assert f"({low} to {high})" in cells[1][2] and "peak_bytes" in head
    assert table.startswith("# top_k\n\nThe paper: 1.0, Figure 2, plotted only")
    text = page.read_text()
    assert text.count("<svg") == 2 and "K=2, " not in text and "strongly in speech" in text
    assert "Linear probe, K=2: " in text and "untrained: " in text


def test_other_runs_are_not_mistaken_for_these(folder, monkeypatch):
    """A workdir of another config, probes of other weights, a damaged file."""
    folder, arguments = folder
    with pytest.raises(UserError, match=r"holds a run of another config \(config\.schedule\.peak"):
        ablate.main(["ablate", "top_k", *arguments, "--config.schedule.peak=0.5"])

    one = folder / "top_k/K=1/seed0"
    before = (one / "probes.json").read_text()
    kept = json.loads(before)
    ablate.keep(one, kept | {"checkpoints": {"2": "of other weights"}})
    assert not ablate.is_done(one, 2)
    monkeypatch.setattr(ablate.probe, "probe", lambda *_, **__: kept["probes"]["2"] | {"new": 1})
    assert ablate.measured(one, 100, False, False)["probes"]["2"]["new"] == 1
    assert ablate.is_done(one, 2)
    (one / "checkpoints").rename(one / "elsewhere")  # its probes remain
    ablate.keep(one, json.loads(before))
    assert ablate.measured(one, 100, False, False)["updates"] == 2 and ablate.is_done(one, 2)
    with pytest.raises(UserError, match="has no checkpoint to probe"):
        ablate.measured(one, 99, False, False)
    (one / "elsewhere").rename(one / "checkpoints")
    for text in ("{", '{"probes": []}', '{"probes": {"2": {}}}'):
        (one / "probes.json").write_text(text)
        with pytest.raises(
            UserError, match=r"probes\.json.*; delete it, and the run is probed again"
        ):
            ablate.measured(one, 100, False, False)
    (one / "probes.json").write_text(before)


def test_a_run_that_diverges_is_a_result(tmp_path, folder, monkeypatch):
    """The others go on, and the table says why it has no scores."""
    monkeypatch.setattr(ablate.probe, "opened", lambda *_: None)
    monkeypatch.setattr(ablate, "measured", lambda *_: json.loads(json.dumps(line)))
    line = json.loads((folder[0] / "top_k/summary.json").read_text())["points"]["K=1"][0]

    def train_(config, workdir, **_):
        if config["objective"]["top_k"] == 1:
            workdir.mkdir(parents=True)
            raise ablate.SkippedError("step 13: the gradient norm is nan")
        ablate.keep(workdir, {"labels": 1, "flops": 1, "probes": line["probes"]})

    monkeypatch.setattr(train, "train", train_)
    arguments = [*folder[1][:-2], f"--workdir={tmp_path}", folder[1][-1]]
    (tmp_path / "top_k/K=2/seed0").mkdir(parents=True)
    (tmp_path / "top_k/K=2/seed1").mkdir(parents=True)
    ablate.main(["ablate", "top_k", *arguments])
    table = (tmp_path / "top_k/summary.md").read_text()
    assert "| K=1, seed 0 | 0: step 13: the gradient norm is nan |" in table
    assert re.search(r"\| K=2 \| 2 \|", table) and "| K=1 |" not in table
    assert "gradient norm is nan" in (tmp_path / "top_k/report.html").read_text()


def test_what_does_not_compare_is_refused(folder, tmp_path):
    runs, out = folder[0] / "top_k", f"--workdir={tmp_path}/out"
    for rows, message in {
        f"a={runs}/K=1 a={runs}/K=2": "two rows have the name a",
        f"a={runs}/K=1/seed0,{runs}/K=2/seed1": r"differ in config\.objective\.top_k; a row is of",
        f"a={runs}/K=1 --set data.source=no:where": "no:where",
    }.items():
        with pytest.raises(UserError, match=message):
            ablate.main(["ablate", "compare", *rows.split(), out])
    other = tmp_path / "other/seed0"
    other.mkdir(parents=True)
    config = json.loads((runs / "K=1/seed0/config.json").read_text())
    config["data"]["source"] = "folder:/elsewhere"
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="scores on other data do not compare; --set data"):
        ablate.main(["ablate", "compare", f"a={runs}/K=1", f"b={other}", out])
    with pytest.raises(UserError, match="has the page of another study"):
        ablate.main(["ablate", "compare", f"a={runs}/K=1", f"--workdir={runs}"])


def test_columns_are_of_all_rows(folder):
    """A method without a teacher comes first, and hides no column of the others."""
    points = json.loads((folder[0] / "top_k/summary.json").read_text())["points"]
    for run in points["K=1"]:
        run["target_std"] = None
    head = study.table({"study": "compare", "points": points})[0]
    assert head == study.table({"study": "compare", "points": dict([*points.items()][::-1])})[0]
    assert "target_std" in head and head.index("target_std") < head.index("feature_rank")


def test_finished_runs_compare_by_cost(folder):
    runs, out = folder[0] / "top_k", folder[0] / "out"
    ablate.main(
        f"ablate compare two={runs}/K=2 one={runs}/K=1/seed1 --workdir={out} --labels=100".split()
    )
    found = json.loads((out / "summary.json").read_text())
    assert [len(rows) for rows in found["points"].values()] == [2, 1]
    curve = found["points"]["two"][0]["probes"]
    assert [*curve] == ["1", "2", "untrained", "hand_made"]  # every kept checkpoint
    flops = found["points"]["two"][0]["FLOPs"]
    names = {row[0] for row in study.table(found)[1:]}
    rows = ("", ": untrained", ": hand-made")
    assert names == {name + row for name in ("two", "one") for row in rows}
    means = [
        100 * np.mean([max(r["probes"][s]["dev"]["knn"].values()) for r in found["points"]["two"]])
        for s in "12"
    ]
    drawn = study.context(found, ablate.study.Cards())["cards"]
    assert [card.title for card in drawn] == ["Linear probe, dev", "k-NN, dev"]
    assert float(drawn[1].legend[0][2]) == pytest.approx(means[1], rel=1e-3)
    assert f"two, {study.charts.number(flops)} FLOPs" in drawn[1].svg
