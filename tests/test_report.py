"""report.py: the page holds the numbers, needs nothing from outside, and errors are one line."""

import html.parser
import json
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest

from data2vec_jax.core.errors import UserError
from data2vec_jax.report import page as report

VOID = {"meta"}  # all others are closed, by a tag of their own or by "/>"


class Page(html.parser.HTMLParser):
    """Checks that tags nest and that nothing is loaded; collects text, tables and curves."""

    def __init__(self, text):
        super().__init__()
        self.stack, self.tables, self.bold, self.curves, self.charts = [], [], [], [], []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.stack, f"unclosed: {self.stack}"
        assert not re.search(r"https?:|//|@import|url\(", text)

    def handle_starttag(self, tag, attributes):
        assert tag not in ("script", "link", "img", "iframe", "object", "embed", "base"), tag
        for name, value in attributes:
            assert name not in ("src", "srcset", "xlink:href") and not name.startswith("on")
            assert name != "href" or value.startswith("#")
        attributes = dict(attributes)
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("th", "td"):
            self.tables[-1][-1].append("")
        if tag == "polyline" and attributes.get("class") != "raw":
            points = [tuple(map(float, p.split(","))) for p in attributes["points"].split()]
            self.curves.append(np.array(points))
        if tag == "svg" and "aria-label" in attributes:
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
        "step": step, "split": "train", "loss": 2.0 / step, "learning_rate": 0.00025,
        "ema_decay": 0.99999, "grad_norm": 1.5, "target_std": 0.61803, "pred_std": 0.31416,
        "masked_fraction": 0.65, "target_by_position": 0.11, "target_by_example": 0.22,
        "feature_rank": 17.25, "examples_per_second": 1234.5, "mfu": 0.4321, **scalars,
    }  # fmt: skip


def write(folder: Path, lines, config=None, tail=""):
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text + tail)
    if config:
        (folder / "config.json").write_text(json.dumps(config))


def make(folder: Path) -> Page:
    report.main([str(folder)])
    return Page((folder / "report.html").read_text(encoding="utf-8"))


def test_a_run_shows_its_numbers_curves_evals_and_config(tmp_path, capsys):
    lines = [train_line(n) for n in range(1, 31)]
    lines += [{"step": n, "split": "probe", "accuracy": n / 40} for n in (10, 20, 30)]
    config = {"total_steps": 5000, "seed": 7, "data": {"batch_size": 64, "source": "<b>&x"}}
    write(tmp_path, lines, config, tail='{"step": 31, "spl')
    page = make(tmp_path)
    assert capsys.readouterr().out.strip() == str(tmp_path / "report.html")
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "config.json", "metrics.jsonl", "report.html",
    ]  # fmt: skip
    for text in ("30updates of 5,000", "0.618", "0.3142", "43.2%", "0.99999", "No sign of coll"):
        assert text in page.text
    assert page.charts == [
        "Loss", "Spread of targets and predictions", "Hidden collapse", "Feature rank",
        "Gradient norm", "Learning rate", "Decay of the teacher's average", "Masked share",
        "Examples per second", "Use of the hardware", "probe: accuracy",
    ]  # fmt: skip
    evals, scalars, options = page.tables
    assert evals == [["step", "accuracy"], ["10", "0.25"], ["20", "0.5"], ["30", "0.75"]]
    assert ["loss", "0.06667", "2", "0.06667", "2"] in scalars
    assert ["learning_rate", *["0.00025"] * 4] in scalars
    assert ["data.source", "<b>&x"] in options and ["total_steps", "5000"] in options


def test_a_curve_is_where_its_numbers_are():
    x = np.arange(1, 11)
    y = np.where(x <= 5, 0.0, 10.0)
    curve = report.Curve("y", x, y, "#000", smooth=False)
    page = Page(report.line_chart([curve], title="t", span=(0.0, 10.0)))
    (points,) = page.curves
    assert len(points) == 10
    gaps = np.diff(points[:, 0])
    np.testing.assert_allclose(gaps, gaps[0], atol=0.11)  # one decimal each
    assert points[-1, 0] == report.WIDTH - report.LEFT - report.RIGHT
    assert set(points[:5, 1]) == {report.HEIGHT - report.TOP - report.BOTTOM}  # 0 at the bottom
    assert len(set(points[5:, 1])) == 1 and 0 <= points[-1, 1] < 20


def test_long_runs_stay_small_and_a_spike_does_not_flatten_them():
    rng = np.random.default_rng(0)
    x = np.arange(1, 50_001)
    y = 3 + 0.1 * rng.normal(size=x.size)
    y[12_345] = 1e9
    text = report.line_chart([report.Curve("y", x, y, "#000")], title="t")
    assert len(text) < 20_000
    labels = [float(t) for t in re.findall(r'class="y"[^>]*>([^<]*)<', text)]
    assert min(labels) > 2 and max(labels) < 4
    (points,) = Page(text).curves
    assert len(points) == report.BINS and np.ptp(points[:, 1]) < 60


def test_values_that_are_not_finite_are_left_out_and_said_so(tmp_path):
    write(tmp_path, [train_line(1), train_line(2, loss="nan"), train_line(3, loss="inf")])
    page = make(tmp_path)
    assert "2 values are not finite" in page.text and "step 3: not finite: loss" in page.text
    assert [len(page.curves[0]), len(page.curves[1])] == [1, 3]
    write(tmp_path, [train_line(1, loss="nan", target_std="nan")])
    page = make(tmp_path)
    assert "Loss" not in page.charts and "No sign of collapse" not in page.text


def test_a_collapsed_run_is_called_so(tmp_path):
    write(tmp_path, [train_line(1, target_by_position=0.97)])
    page = make(tmp_path)
    assert "position alone explains 97%" in page.text and "No sign" not in page.text


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
    page = make(tmp_path)
    if "new_part" in lines[0]:
        assert page.charts == ["new_part"]  # scalars nobody told the report about are drawn too


SUMMARY = {
    "vision_v2": {
        "linear_probe": {"untrained": [0.65, 0.66, 0.67], "pretrained": [0.83, 0.84, 0.82]},
        "knn": {"untrained": [0.41, 0.42, 0.43], "pretrained": [0.41, 0.43, 0.45]},
        "target_std": 0.654, "pred_std": 0.321, "seconds": 154.25,
    },
    "text": {
        "linear_probe": {"untrained": [0.3], "pretrained": [0.2]},
        "knn": {"untrained": [], "pretrained": None},
        "target_std": 0.5,
    },
}  # fmt: skip


def test_a_demo_shows_probes_with_spreads_and_curves_by_seed(tmp_path):
    (tmp_path / "summary.json").write_text(json.dumps(SUMMARY))
    for seed in (0, 1, 10, 2):
        lines = [train_line(n, loss=1.0 + seed) for n in range(1, 4)]
        write(tmp_path / "vision_v2" / f"seed{seed}", lines)
    write(tmp_path / "text" / "seed0", [])
    page = make(tmp_path)
    probes, numbers = page.tables
    minus = "\N{MINUS SIGN}"
    assert probes == [
        ["", "untrained", "pretrained", "gain"],
        # numpy.std([.65, .66, .67], ddof=1) is .01, and so on
        ["vision_v2linear probe", "66.0 % ± 1.0", "83.0 % ± 1.0", "+17.0"],
        ["vision_v2knn", "42.0 % ± 1.0", "43.0 % ± 2.0", "+1.0"],
        ["textlinear probe", "30.0 %", "20.0 %", f"{minus}10.0"],
    ]
    assert page.bold == ["83.0 %"]  # the others overlap, or have one seed
    assert ["vision_v2", "0.654", "0.321", "154.2"] in numbers
    assert ["text", "0.5", "", ""] in numbers
    assert page.charts == [
        "probe scores before and after", "loss", "target_std", "pred_std",
        "target_by_position", "target_by_example", "feature_rank",
    ]  # fmt: skip
    assert re.search(r"seed0 1\s*seed1 2\s*seed2 3\s*seed10 11", page.text)
    assert page.text.index("vision_v2") < page.text.index("No lines yet")


def test_a_demo_under_way_has_no_summary_yet(tmp_path):
    write(tmp_path / "speech" / "seed0", [train_line(1)])
    assert "loss" in make(tmp_path).charts


def test_scores_in_percent_are_not_multiplied(tmp_path):
    scores = {"asr": {"wer": {"untrained": [90.0, 91.0], "pretrained": [12.5, 12.5]}}}
    (tmp_path / "summary.json").write_text(json.dumps(scores))
    assert make(tmp_path).tables[0][1][1:] == ["90.5 ± 0.7", "12.5 ± 0.0", "\N{MINUS SIGN}78.0"]


@pytest.mark.parametrize(
    "low, high, want",
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (0.9991, 0.9999, [0.9992, 0.9994, 0.9996, 0.9998]),
        (-3, 3, [-2, 0, 2]),
        (0, 400_000, [0, 100_000, 200_000, 300_000, 400_000]),
    ],
)
def test_ticks_are_round_and_inside(low, high, want):
    assert report.ticks(low, high) == want


@pytest.mark.parametrize("low, high", [(1e-9, 1e9), (0.3, 20), (4, 100)])
def test_log_ticks_are_few_and_inside(low, high):
    marks = report.log_ticks(low, high)
    assert 2 <= len(marks) <= 8 and all(low * 0.99 <= m <= high * 1.01 for m in marks)


def test_moving_mean_equals_a_loop():
    y = np.random.default_rng(0).normal(size=30)
    want = []
    for i in range(30):
        half = min(3, i, 29 - i)
        want.append(y[i - half : i + half + 1].mean())
    np.testing.assert_allclose(report._moving_mean(y, 7), want)


def run_command(*args):
    root = Path(report.__file__).parents[1]
    return subprocess.run(
        [sys.executable, "-m", "data2vec_jax.report", *map(str, args)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(root)},
    )


def test_users_mistakes_are_one_line_and_exit_code_2(tmp_path):
    (tmp_path / "speech").mkdir()
    result = run_command(tmp_path / "speach")
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.count("\n") == 1 and "did you mean 'speech'?" in result.stderr


def test_picture_of_the_probes_is_an_svg_file():
    scores = {"untrained": [0.25, 0.5], "pretrained": [0.75, 1.0]}
    summary = {"text": {"linear_probe": scores, "seconds": 3.0}}
    root = ElementTree.fromstring(report.picture(summary))
    space = "{http://www.w3.org/2000/svg}"
    assert root.tag == f"{space}svg"
    titles = [t.text for t in root.iter(f"{space}title")]
    assert titles == ["untrained: 25 %", "untrained: 50 %", "pretrained: 75 %", "pretrained: 100 %"]
    assert "text · linear probe" in [t.text for t in root.iter(f"{space}text")]
    assert ".gain{" in root.find(f"{space}style").text


def test_nothing_to_show_is_said(tmp_path):
    with pytest.raises(UserError, match="no folder"):
        report.main([str(tmp_path / "a" / "b")])
    with pytest.raises(UserError, match="nothing to report"):
        report.main([str(tmp_path)])
    write(tmp_path, [], tail='{"step": 1')
    with pytest.raises(UserError, match="no whole line yet"):
        report.main([str(tmp_path)])
    write(tmp_path, [train_line(1)])
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json is not JSON"):
        report.main([str(tmp_path)])
    (tmp_path / "summary.json").write_text("{}")
    (tmp_path / "metrics.jsonl").unlink()
    with pytest.raises(UserError, match="no scores and no runs"):
        report.main([str(tmp_path)])
    (tmp_path / "summary.json").write_text("[]")
    with pytest.raises(UserError, match="does not hold an object"):
        report.main([str(tmp_path)])
    assert not (tmp_path / "report.html").exists()
