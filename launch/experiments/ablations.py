"""K, target and masks of data2vec 2.0 on digits and Russian speech, three seeds of each point.

    python launch/experiments/ablations.py digits target [--part=1/2]
    python launch/experiments/ablations.py page

The first is `python -m data2vec_jax.ablate` with the settings of these small runs, in
runs/ablations; the last makes the picture and the tables in docs/comparison.md of all that is done
there. corpora.py makes the corpora. Digits take two minutes of a core a run, speech one and a half.
"""

import argparse
import statistics
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # a checkout need not be installed

from grid import PAPERS_SPEECH
from pages import fill, markdown, pyplot

from data2vec_jax import ablate
from data2vec_jax.cli.output import as_json, run_main
from data2vec_jax.configs import common
from data2vec_jax.core.files import read_json
from data2vec_jax.report import study
from data2vec_jax.report.reference import mean_and_range
from data2vec_jax.report.runs import SUMMARY

RUNS = Path("runs/ablations")
RESULTS = Path(__file__).with_name("ablations")
PICTURE = RESULTS.with_suffix(".svg")
PAGE = ROOT / "docs/comparison.md"
STUDIES = "top_k", "target", "masking"
CORPORA = {  # config, source, labels of a probe, options
    "digits": ("demo:vision,v2", "array_record:runs/corpora/shards/mnist", 1_000, {}),
    "speech": ("demo:speech,v2", "manifest:runs/corpora/phones.tsv", 20_000, PAPERS_SPEECH),
}
SCORES = {"linear_probe": "linear", "knn": "k-NN"}


def train(name: str, what: str, part: str) -> None:
    """Trains and probes the runs of a study, or a part of them."""
    config, source, labels, own = CORPORA[name]
    updates = 200 if (name, what) == ("digits", "masking") else 300
    options = {"data.source": source, "data.eval_split": "test", "total_steps": updates, **own}
    decay = common.short_decay(updates)
    options |= {f"ema.{end}": f"{decay[end]:.5f}" for end in ("start", "end")}
    words = [f"--config={config}", f"--workdir={RUNS / name}", f"--labels={labels}"]
    words += [f"--config.{key}={value}" for key, value in options.items()]
    ablate.main(["ablate", what, *words, "--seeds=3", f"--part={part}"])


def kept(summary: Mapping[str, Any]) -> dict[str, Any]:
    """What of a summary is committed: in per cent, a seed each, test scores and how much of the
    targets' variance the position alone explains at the end."""
    first, found = next(iter(summary["points"].values())), {}
    for name, runs in summary["points"].items():
        found[name] = {m: [100 * study.last(run)[m] for run in runs] for m in SCORES}
        position = [100 * run["target_by_position"] for run in runs]
        found[name] |= {"position": position, "FLOPs": runs[0]["FLOPs"]}
    for side in ("untrained", "hand_made"):
        found[side] = {m: [100 * x[m] for x in study.baseline(first, side)] for m in SCORES}
    return found


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """A row for each point: mean and range over seeds."""
    rows = []
    for name, found in results.items():
        for point, line in found.items():
            cells = [mean_and_range([x / 100 for x in line[m]], "") for m in SCORES]
            if trained := "FLOPs" in line:
                cells.append(f"{statistics.fmean(line['position']):.0f} %")
            flops = f"{line['FLOPs']:.1e}" if trained else ""
            rows.append([name, point.replace("_", "-"), flops, *cells, *[""] * (not trained)])
    return markdown(("corpus", "point", "FLOPs", *SCORES.values(), "position explains"), rows)


def draw_panel(panel: Any, found: Mapping[str, Mapping[str, Any]]) -> None:
    """Both probes at each point of a study: a dot for each seed, a dash for their mean."""
    points = [point for point in found if "FLOPs" in found[point]]
    for key, ink in zip(SCORES, ("#1971c2", "#e8590c"), strict=True):
        for x, point in enumerate(points):
            seeds = found[point][key]
            panel.plot([x] * len(seeds), seeds, "o", color=ink, alpha=0.5, markersize=4)
        means = [statistics.fmean(found[point][key]) for point in points]
        panel.plot(range(len(points)), means, "_", color=ink, markersize=14)
        for side, style in (("untrained", ":"), ("hand_made", "--")):
            level = statistics.fmean(found[side][key])
            panel.axhline(level, color=ink, linestyle=style, linewidth=1)
    slanted = {"rotation": 35, "ha": "right"} if len(points) > 4 else {}
    panel.set_xticks(range(len(points)), points, fontsize=8, **slanted)
    panel.set_ylabel("test, %")
    panel.grid(True, axis="y", color="#e9ecef")


def draw(results: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> None:
    """A row of panels for each corpus, a panel for each study."""
    plt = pyplot()
    figure, panels = plt.subplots(len(CORPORA), len(STUDIES), figsize=(13, 6.4), squeeze=False)
    for column, (what, of_corpora) in enumerate(results.items()):
        for row, name in enumerate(CORPORA):
            panel = panels[row][column]
            panel.set_title(f"{what}, {name}", fontsize=9)
            if name in of_corpora:
                draw_panel(panel, of_corpora[name])
            else:
                panel.set_visible(False)
    about = "blue: linear, orange: k-NN; dotted: untrained, dashed: hand-made features"
    figure.suptitle(about, fontsize=9)
    figure.tight_layout()
    figure.savefig(PICTURE, metadata={"Date": None})


def page() -> None:
    """Commits what is new in `RUNS`, and draws all that is committed."""
    RESULTS.mkdir(exist_ok=True)
    results: dict[str, dict[str, Any]] = {what: {} for what in STUDIES}
    for what, of_corpora in results.items():
        for name in CORPORA:
            path, new = RESULTS / f"{name}-{what}.json", RUNS / name / what / SUMMARY
            if new.exists():
                path.write_text(as_json(kept(read_json(new))))
            if path.exists():
                of_corpora[name] = read_json(path)
    fill(PAGE, {f"ablation: {what}": table(found) for what, found in results.items()})
    draw(results)


def main() -> None:
    """The command: see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("name", choices=(*CORPORA, "page"))
    parser.add_argument("study", nargs="?", choices=STUDIES)
    parser.add_argument("--part", default="1/1")
    options = parser.parse_args()
    if (options.name == "page") != (options.study is None):
        parser.error("give a corpus and a study, or page alone")

    def command():
        if options.name == "page":
            page()
        else:
            train(options.name, options.study, options.part)

    run_main(command)


if __name__ == "__main__":
    main()
