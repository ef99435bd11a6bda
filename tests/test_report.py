"""report/: the page holds the numbers, needs nothing from outside, and errors are one line."""

import html.parser
import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest

from data2vec_jax.core.errors import UserError
from data2vec_jax.metrics.collapse import CollapseConfig
from data2vec_jax.report import charts, page, runs
from data2vec_jax.report.charts import Curve

VOID = {"meta"}  # all others are closed, by a tag of their own or by "/>"


class Page(html.parser.HTMLParser):
    """Checks that tags nest, that ids are unique and that nothing is loaded; collects text,
    tables and charts."""

    def __init__(self, text):
        super().__init__()
        self.stack, self.tables, self.bold, self.charts, self.ids = [], [], [], [], []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.stack, f"unclosed: {self.stack}"
        assert len(set(self.ids)) == len(self.ids)
        assert not re.search(r"https?:|//|@import|url\((?!#)", text)
        for name in re.findall(r'(?:url\(|href=")#([^)"]*)', text):
            assert name in self.ids
        defined = set(re.findall(r"--([\w-]+):", text))
        assert set(re.findall(r"var\(--([\w-]+)\)", text)) <= defined

    def handle_starttag(self, tag, attributes):
        assert tag not in ("script", "link", "img", "iframe", "object", "embed", "base"), tag
        for name, value in attributes:
            assert name not in ("src", "srcset", "xlink:href") and not name.startswith("on")
            assert name != "href" or value.startswith("#")
        attributes = dict(attributes)
        self.ids += [attributes["id"]] if "id" in attributes else []
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("th", "td"):
            self.tables[-1][-1].append("")
        if tag == "svg":
            self.charts.append(attributes["aria-label"].removesuffix(" over steps"))
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.stack.pop()

    def handle_endtag(self, tag):
        assert self.stack and self.stack[-1] == tag, f"</{tag}> inside {self.stack[-3:]}"
        self.stack.pop()

    def handle_data(self, data):
        if "style" not in self.stack:
            self.text += data
        if {"th", "td"} & set(self.stack):
            self.tables[-1][-1][-1] += data
            if "b" in self.stack and "small" not in self.stack:
                self.bold.append(data.strip())


def train_line(step, **scalars):
    return {
        "step": step,
        "split": "train",
        "loss": 2.0 / step,
        "learning_rate": 0.00025,
        "ema_decay": 0.99999,
        "grad_norm": 1.5,
        "target_std": 0.61803,
        "pred_std": 0.31416,
        "masked_fraction": 0.65,
        "target_by_position": 0.11,
        "target_by_example": 0.22,
        "feature_rank": 17.25,
        "target_rank": 9.5,
        "examples_per_second": 1234.5,
        "mfu": 0.4321,
        **scalars,
    }


def write(folder: Path, lines, config=None, tail=""):
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text + tail)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))


def make(folder: Path) -> Page:
    page.main([str(folder)])
    return Page((folder / "report.html").read_text(encoding="utf-8"))


@pytest.fixture
def figures(monkeypatch):
    """The figures of a page, by title; drawn as ever."""
    found, draw = {}, charts.to_svg

    def to_svg(figure, *, label, **options):
        found[label.removesuffix(" over steps")] = figure
        return draw(figure, label=label, **options)

    monkeypatch.setattr(charts, "to_svg", to_svg)
    return found


def curves(figure):
    """Name -> (x, y) of a chart's main lines."""
    lines = figure.axes[0].lines
    return {x.get_label(): x.get_xydata().T for x in lines if not x.get_label().startswith("_")}


def limits(figure):
    return [line.get_ydata()[0] for line in figure.axes[0].lines if line.get_gid() == "limit"]


# --- a run --------------------------------------------------------------------------------------


def test_a_run_shows_its_numbers_curves_evals_and_config(tmp_path, capsys, figures):
    lines = [train_line(n) for n in range(1, 16)]
    lines += [{"step": n, "split": "probe", "accuracy": n / 20} for n in (5, 10, 15)]
    config = {
        "total_steps": 5000,
        "seed": 7,
        "modality": "speech",
        "objective": {"name": "data2vec2", "empty": {}},
        "start": "runs/base",  # an old run's `init_from`
        "data": {"batch_size": 64, "source": "<b>&x"},
    }
    write(tmp_path, lines, config, tail='{"step": 31, "spl')
    made = make(tmp_path)
    assert capsys.readouterr().out.strip() == str(tmp_path / "report.html")
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == ["config.json", "metrics.jsonl", "report.html"]
    for text in ("updates of 5,000", "0.618", "0.3142", "43.2%", "0.99999", "No sign of coll"):
        assert text in made.text
    for text in (
        "init_from runs/base",
        "modality speech",
        "objective.name data2vec2",
        "seed 7",
        "data.batch_size 64",
    ):
        assert text in made.text
    assert made.charts == [
        "Loss",
        "Spread of targets and predictions",
        "Hidden collapse",
        "Ranks",
        "Gradient norm",
        "Learning rate",
        "Decay of the teacher's average",
        "Masked share",
        "Examples per second",
        "Use of the hardware",
        "probe: accuracy",
    ]
    drawn = {name: xy for figure in figures.values() for name, xy in curves(figure).items()}
    scalars = {name for line in lines for name in line} - {"step", "split"}
    assert set(drawn) == scalars
    for name in scalars:
        want = [(line["step"], line[name]) for line in lines if name in line]
        np.testing.assert_array_equal(drawn[name].T, want)

    evals, scalars, options = made.tables
    assert evals == [["step", "accuracy"], ["5", "0.25"], ["10", "0.5"], ["15", "0.75"]]
    assert ["loss", "0.1333", "2", "0.1333", "2"] in scalars
    assert ["learning_rate", *["0.00025"] * 4] in scalars
    assert options == [
        ["total_steps", "5000"],
        ["seed", "7"],
        ["modality", "speech"],
        ["objective.name", "data2vec2"],
        ["objective.empty", "{}"],
        ["data.batch_size", "64"],
        ["data.source", "<b>&x"],
        ["init_from", "runs/base"],
    ]


def test_every_eval_is_in_the_page(tmp_path):
    lines = [{"step": n, "split": "test", "wer": n / 8} for n in range(1, 21)]
    write(tmp_path, lines)
    latest, earlier = make(tmp_path).tables
    rows = earlier[1:] + latest[1:]
    assert [(int(a), float(b)) for a, b in rows] == [(n, n / 8) for n in range(1, 21)]


def test_limits_are_those_of_the_runs_config(tmp_path, figures):
    limit = {"min_target_std": 0.25, "min_pred_std": 0.0, "max_example_share": 0.8}
    write(tmp_path, [train_line(1), train_line(2)], {"collapse": limit})
    made = make(tmp_path)
    assert limits(figures["Spread of targets and predictions"]) == [0.25]  # pred_std is off
    assert limits(figures["Hidden collapse"]) == [0.9, 0.8]
    assert limits(figures["Loss"]) == []
    assert "alarm (target_std below 0.25)" in made.text
    assert "Alarms switched off: pred_std" in made.text

    assert "No sign of collapse" in made.text  # 0.618 is above 0.25
    write(tmp_path, [train_line(1)], {"collapse": {"min_target_std": 0.7}})
    made = make(tmp_path)
    assert "No sign" not in made.text and "target_std 0.618 < 0.7" in made.text
    write(tmp_path, [train_line(1, target_std=0.01)], {"collapse": {"warn_after": 100}})
    made = make(tmp_path)
    assert "waits for step 100" in made.text and "hardly vary" not in made.text
    off = {"min_target_std": 0, "min_pred_std": 0, "min_rank_share": 0}
    off |= {"min_spread_share": 0, "min_target_rank": 0, "min_decay": 0}
    off |= {"max_position_share": 1, "max_example_share": 1}
    write(tmp_path, [train_line(1, target_std=0.01)], {"collapse": off})
    assert "switched off in this run's config" in make(tmp_path).text


def test_a_rank_that_has_fallen_is_told(tmp_path):
    """The alarm looks back at the highest rank, so the report must, too."""
    write(tmp_path, [train_line(1, feature_rank=20.0), train_line(2, feature_rank=1.7)])
    assert "effective rank 1.7, once far above 5)" in make(tmp_path).text


def test_a_collapsed_run_is_called_so(tmp_path):
    config = {"collapse": {"abort": True, "after": 0}}  # the report tells, and goes on
    write(tmp_path, [train_line(1, target_by_position=0.97, pred_std=0.001)], config)
    made = make(tmp_path)
    assert "position alone explains 97%" in made.text and "No sign" not in made.text
    assert "predictions hardly vary" in made.text


def test_values_that_are_not_finite_are_left_out_and_said_so(tmp_path, figures):
    write(tmp_path, [train_line(1), train_line(2, loss="nan"), train_line(3, loss="inf")])
    made = make(tmp_path)
    assert "2 values are not finite" in made.text and "step 3: not finite: loss" in made.text
    np.testing.assert_array_equal(curves(figures["Loss"])["loss"], [[1], [2]])
    write(tmp_path, [train_line(1, loss="nan", target_std="nan")])
    made = make(tmp_path)
    assert "Loss" not in made.charts and "No sign of collapse" not in made.text


@pytest.mark.parametrize(
    "lines",
    [
        [{"step": 1, "split": "train", "loss": 1.0}],
        [{"step": 1, "split": "train"}],
        [{"step": 0, "split": "test", "accuracy": 0.5, "words": "no number"}],
        [{"step": 5, "split": "train", "new_part": 0.0}, {"step": 6, "split": "train"}],
    ],
)
def test_missing_metrics_are_simply_absent(tmp_path, lines):
    write(tmp_path, lines)
    made = make(tmp_path)
    if "new_part" in lines[0]:
        assert made.charts == ["new_part"]  # scalars nobody told the report about are drawn too


# --- a demo -------------------------------------------------------------------------------------

SUMMARY = {
    "vision_v2": {
        "linear_probe": {"untrained": [0.65, 0.66, 0.67], "pretrained": [0.83, 0.84, 0.82]},
        "knn": {"untrained": [0.41, 0.42, 0.43], "pretrained": [0.41, 0.43, 0.45]},
        "target_std": 0.654,
        "pred_std": 0.321,
        "seconds": 154.25,
    },
    "text": {
        "linear_probe": {"untrained": [0.3], "pretrained": [0.2]},
        "knn": {"untrained": [], "pretrained": None},
        "target_std": 0.5,
    },
}


def test_a_demo_shows_probes_with_spreads_and_curves_by_seed(tmp_path, figures):
    (tmp_path / "summary.json").write_text(json.dumps(SUMMARY))
    config = {"collapse": {"min_pred_std": 0.02}}
    for seed in (0, 1, 10, 2):
        lines = [train_line(n, loss=1.0 + seed) for n in range(1, 4)]
        write(tmp_path / "vision_v2" / f"seed{seed}", lines, config)
    write(tmp_path / "text" / "seed0", [])
    made = make(tmp_path)
    probes, numbers = made.tables
    probes = [[" ".join(cell.split()) for cell in row] for row in probes]
    minus = "\N{MINUS SIGN}"
    assert probes == [
        ["", "untrained", "pretrained", "gain"],
        # numpy.std([.65, .66, .67], ddof=1) is .01, and so on
        ["vision_v2 linear probe", "66.0 % ± 1.0", "83.0 % ± 1.0", "+17.0"],
        ["vision_v2 knn", "42.0 % ± 1.0", "43.0 % ± 2.0", "+1.0"],
        ["text linear probe", "30.0 %", "20.0 %", f"{minus}10.0"],
    ]
    assert made.bold == ["83.0 %"]  # the others overlap, or have one seed
    assert ["vision_v2", "0.654", "0.321", "154.2"] in numbers
    assert ["text", "0.5", "", ""] in numbers
    names = ["loss", "target_std", "pred_std", "target_by_position", "target_by_example"]
    assert made.charts == [
        "probe scores before and after pretraining",
        *names,
        "feature_rank",
        "target_rank",
    ]
    seeds = {name: y.tolist() for name, (_, y) in curves(figures["loss"]).items()}
    assert seeds == {f"seed{n}": [1.0 + n] * 3 for n in (0, 1, 2, 10)}
    assert list(seeds) == ["seed0", "seed1", "seed2", "seed10"]
    assert limits(figures["pred_std"]) == [0.02] and limits(figures["target_std"]) == [0.1]
    assert made.text.index("vision_v2") < made.text.index("No lines yet")

    bars = {name: x.tolist() for name, (x, _) in curves(figures[made.charts[0]]).items()}
    assert bars == {
        "vision_v2 · linear probe": pytest.approx([66, 83]),
        "vision_v2 · knn": pytest.approx([42, 43]),
        "text · linear probe": pytest.approx([30, 20]),
    }


NEW = {
    "vision_v2": {
        "hand_made": "pixels",
        "linear_probe": {"untrained": [0.5, 0.6], "hand_made": 0.875, "pretrained": [0.9]},
        "knn": {"untrained": [0.3, 0.2], "hand_made": None, "pretrained": [0.1]},
        "block": "block 2",
        "blocks": {
            "linear_probe": {"untrained": ["block 1", "block 1"], "pretrained": ["block 2"]},
            "knn": {"untrained": ["block 1", "block 1"], "pretrained": ["front end"]},
        },
        "verdict": {"linear_probe": "better than hand-made features", "knn": "no gain"},
        "dev": {
            "linear_probe": {
                "untrained": {"front end": 0.2, "block 1": 0.5, "mean of blocks": 0.4},
                "hand_made": 0.85,
                "pretrained": {
                    "front end": 0.3,
                    "block 1": 0.8,
                    "mean of blocks": 0.7,
                    "block 1, class token": 0.6,
                },
            },
        },
    },
    "text": SUMMARY["text"],  # of old
}


def test_a_demo_shows_hand_made_features_blocks_and_verdicts(tmp_path, figures):
    (tmp_path / "summary.json").write_text(json.dumps(NEW))
    made = make(tmp_path)
    rows = [[" ".join(cell.split()) for cell in row] for row in made.tables[0]]
    minus = "\N{MINUS SIGN}"
    better = "better than hand-made features"
    first = [
        "vision_v2 linear probe",
        "87.5 % pixels",
        "55.0 % ± 7.1",
        "90.0 %",
        "block 2",
        "+35.0",
    ]
    assert rows == [
        ["", "hand-made", "untrained", "pretrained", "from", "gain", ""],
        [*first, better],
        ["vision_v2 knn", "", "25.0 % ± 7.1", "10.0 %", "front end", f"{minus}15.0", "no gain"],
        ["text linear probe", "", "30.0 %", "20.0 %", "", f"{minus}10.0", ""],
    ]
    probes, *blocks = made.charts
    assert blocks == ["vision_v2 · linear probe over blocks"]
    diamonds = [x for x in figures[probes].axes[0].lines if x.get_marker() == "D"]
    assert [x.get_xdata().tolist() for x in diamonds] == [[87.5]]
    low, high = figures[probes].axes[0].get_xlim()
    assert low < 10 and high > 90
    axes = figures[blocks[0]].axes[0]
    assert [text.get_text() for text in axes.get_xticklabels()] == ["front", "1", "mean"]
    found = {name: y.tolist() for name, (_, y) in curves(figures[blocks[0]]).items()}
    assert found == {
        "untrained": [20, 50],
        "untrained, class token": [],
        "pretrained": [30, 80],
        "pretrained, class token": [60],
    }
    page_text = (tmp_path / "report.html").read_text()
    assert "<title>pretrained, mean of blocks: 70%</title>" in page_text
    assert "<title>pixels: 87.5%</title>" in page_text


def test_a_demo_under_way_has_no_summary_yet(tmp_path):
    write(tmp_path / "speech" / "seed0", [train_line(1)])
    assert "loss" in make(tmp_path).charts


def test_scores_in_percent_are_not_multiplied(tmp_path):
    scores = {"asr": {"wer": {"untrained": [90.0, 91.0], "pretrained": [12.5, 12.5]}}}
    (tmp_path / "summary.json").write_text(json.dumps(scores))
    row = make(tmp_path).tables[0][1]
    assert row[1:] == ["90.5 ± 0.7", "12.5 ± 0.0", "\N{MINUS SIGN}78.0"]


def test_picture_of_the_probes_is_an_svg_file():
    scores = {"untrained": [0.25, 0.5], "pretrained": [0.75, 1.0]}
    text = page.picture({"text": {"linear_probe": scores, "seconds": 3.0}})
    assert "var(" not in text and text == page.picture({"text": {"linear_probe": scores}})
    root = ElementTree.fromstring(text)
    space = "{http://www.w3.org/2000/svg}"
    assert root.tag == f"{space}svg"
    titles = [t.text for t in root.iter(f"{space}title")]
    assert titles == ["untrained: 25 %", "untrained: 50 %", "pretrained: 75 %", "pretrained: 100 %"]
    texts = [t.text for t in root.iter(f"{space}text")]
    assert "text · linear probe" in texts and "+50.0" in texts


# --- charts -------------------------------------------------------------------------------------


def test_long_runs_stay_small_and_a_spike_does_not_flatten_them():
    rng = np.random.default_rng(0)
    x = np.arange(1, 50_001)
    y = 3 + 0.1 * rng.normal(size=x.size)
    y[12_345] = 1e9
    figure = charts.line_figure([Curve("y", x, y, "series-0")])
    low, high = figure.axes[0].get_ylim()
    assert 2 < low < 3 < high < 4
    assert curves(figure)["y"].shape == (2, charts.POINTS)
    assert len(charts.to_svg(figure, label="y")) < 20_000


@pytest.mark.parametrize("log", [False, True])
def test_a_wide_range_gets_a_logarithmic_axis_if_asked_for(log):
    y = np.geomspace(1e-2, 1e3, 10)
    figure = charts.line_figure([Curve("y", np.arange(10), y, "series-0")], log=log)
    assert figure.axes[0].get_yscale() == ("log" if log else "linear")
    narrow = charts.line_figure([Curve("y", np.arange(10), y[:2].repeat(5), "series-0")], log=log)
    assert narrow.axes[0].get_yscale() == "linear"


def test_axis_includes_what_it_must_and_limits_that_are_near():
    curve = Curve("y", np.arange(1, 5), np.array([3.0, 4.0, 3.5, 3.2]), "series-0")
    figure = charts.line_figure([curve], include=[0.0], limits=[5.0, 100.0])
    low, high = figure.axes[0].get_ylim()
    assert low == 0 and 5 < high < 6 and limits(figure) == [5.0]  # 100 would flatten the curve


def test_the_same_numbers_give_the_same_picture():
    def draw():
        curve = Curve("y", np.arange(30), np.sin(np.arange(30)), "series-0")
        return charts.to_svg(charts.line_figure([curve]), label="y", key="k")

    assert draw() == draw()


@pytest.mark.parametrize("low, high", [(1e-9, 1e9), (0.3, 20), (4, 100)])
def test_log_ticks_are_few_and_inside(low, high):
    marks = charts.log_ticks(low, high)
    assert 2 <= len(marks) <= 8 and all(low * 0.99 <= m <= high * 1.01 for m in marks)


def test_moving_mean_equals_a_loop():
    y = np.random.default_rng(0).normal(size=30)
    want = []
    for i in range(30):
        half = min(3, i, 29 - i)
        want.append(y[i - half : i + half + 1].mean())
    np.testing.assert_allclose(charts.moving_mean(y, 7), want)


def test_colours_of_a_page_are_those_of_the_palette():
    curve = Curve("y", np.arange(3), np.arange(3.0), charts.colour(1 + len(charts.SERIES)))
    svg = charts.to_svg(charts.line_figure([curve]), label="y")
    assert "var(--series-1)" in svg and not re.search("#[0-9a-f]{6}", svg)


# --- errors -------------------------------------------------------------------------------------


def test_users_mistakes_are_one_line_and_exit_code_2(tmp_path):
    (tmp_path / "speech").mkdir()
    command = [sys.executable, "-m", "data2vec_jax.report", str(tmp_path / "speach")]
    result = subprocess.run(
        command, capture_output=True, text=True, cwd=Path(page.__file__).parents[2]
    )
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.count("\n") == 1 and "did you mean 'speech'?" in result.stderr


def test_nothing_to_show_is_said(tmp_path):
    with pytest.raises(UserError, match="no folder"):
        page.main([str(tmp_path / "a" / "b")])
    with pytest.raises(UserError, match="nothing to report"):
        page.main([str(tmp_path)])
    write(tmp_path, [], tail='{"step": 1')
    with pytest.raises(UserError, match="no whole line yet"):
        page.main([str(tmp_path)])
    write(tmp_path, [train_line(1)])
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json is not JSON"):
        page.main([str(tmp_path)])
    (tmp_path / "config.json").write_text('{"collapse": {"min_std": 1}}')
    with pytest.raises(UserError, match=r"config\.collapse\.min_std: no such option"):
        page.main([str(tmp_path)])
    (tmp_path / "config.json").unlink()
    (tmp_path / "summary.json").write_text("{}")
    (tmp_path / "metrics.jsonl").unlink()
    with pytest.raises(UserError, match="no scores and no runs"):
        page.main([str(tmp_path)])
    (tmp_path / "summary.json").write_text("[]")
    with pytest.raises(UserError, match="does not hold an object"):
        page.main([str(tmp_path)])
    assert not (tmp_path / "report.html").exists()


def test_a_page_that_cannot_be_written_is_said(tmp_path):
    write(tmp_path, [train_line(1)])
    (tmp_path / "report.html").mkdir()
    with pytest.raises(UserError, match="cannot write"):
        page.main([str(tmp_path)])


def test_a_run_without_a_config_has_the_default_limits(tmp_path):
    write(tmp_path, [train_line(1)])
    assert runs.read_run(tmp_path).limits == CollapseConfig().limits(
        {"target_rank": 9.5, "feature_rank": 17.25, "feature_std": 0.0}
    )
