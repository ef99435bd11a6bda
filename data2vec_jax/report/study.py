"""The page and the table of a study: scores of its points beside the paper's finding, and costs.

Its summary.json, which `data2vec_jax.ablate` writes, has 'study', 'points' {name: one run a seed,
as of `ablate.measured`}, and of an ablation 'finding', 'paper' {point: word error rate}, 'ordered'
and 'diverged' {run: why it has no result}. A point 'A x B' stands over A, on the curve of B.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from data2vec_jax.report import charts
from data2vec_jax.report.cards import Card, Cards
from data2vec_jax.report.charts import Level
from data2vec_jax.report.reference import UNIT, mean_and_range

Runs = Sequence[Mapping[str, Any]]

PROBES = {"linear_probe": "Linear probe", "knn": "k-NN"}
BASELINES = {"untrained": "muted", "hand_made": "ink"}  # what runs are compared with


def is_study(summary: Mapping[str, Any]) -> bool:
    """Whether a summary.json is that of a study."""
    points = summary.get("points")
    if "study" not in summary or not isinstance(points, Mapping) or not points:
        return False
    runs = [run for found in points.values() for run in found or [None]]
    return all(isinstance(run, Mapping) and run.get("probes") for run in runs)


def last(run: Mapping[str, Any]) -> Mapping[str, Any]:
    """The probes of a run's newest checkpoint."""
    return run["probes"][str(run["updates"])]


def baseline(runs: Runs, side: str) -> Runs:
    """The probes of an untrained encoder or of hand-made features, of the runs that have them."""
    return [run["probes"][side] for run in runs if run["probes"].get(side)]


def table(summary: Mapping[str, Any]) -> list[list[str]]:
    """Head and rows: points, and what they are compared with. Columns without a cell are left out.

    Scores are those of the test split, in per cent.
    """
    rows, others = [], []
    for name, runs in summary["points"].items():
        numbers = {k: [run[k] for run in runs if run[k] is not None] for k in runs[0]}
        del numbers["probes"]
        costs = {k: charts.short(float(f"{np.mean(v):.3g}")) for k, v in numbers.items() if v}
        paper = {"paper, WER": str(summary.get("paper", {}).get(name, ""))}
        rows.append({"": name} | paper | _scores([last(run) for run in runs]) | costs)
        for side in BASELINES:
            if found := baseline(runs, side):
                of = "" if "finding" in summary else f"{name}: "
                others.append({"": of + side.replace("_", "-")} | _scores(found))
    rows += others
    rows += [{"": run, "runs": f"0: {why}"} for run, why in summary.get("diverged", {}).items()]
    # A method without a teacher has fewer columns than others.
    keys = dict.fromkeys([*max(rows, key=len), *(key for row in rows for key in row)])
    head = [key for key in keys if not key or any(row.get(key) for row in rows)]
    return [head, *([row.get(key, "") for key in head] for row in rows)]


def _scores(probed: Runs) -> dict[str, str]:
    blocks = dict.fromkeys(result["blocks"]["linear_probe"] for result in probed)
    scores = {PROBES[key]: mean_and_range([r[key] for r in probed], "") for key in PROBES}
    return {"runs": str(len(probed))} | scores | {"read from": "; ".join(blocks)}


def markdown(summary: Mapping[str, Any]) -> str:
    """The finding and the table, as a file of its own."""
    head, *rows = table(summary)
    lines = [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]
    finding = [f"The paper: {summary['finding']}.", ""] if "finding" in summary else []
    return "\n".join([f"# {summary['study']}", "", *finding, *lines]) + "\n"


def context(summary: Mapping[str, Any], cards: Cards) -> dict[str, Any]:
    """What study.html needs. Only an ablation has a finding."""
    points, finding = summary["points"], summary.get("finding")
    first, drawn = next(iter(points.values())), []
    for key, title in PROBES.items() if finding else ():
        scores = {name: [100 * last(run)[key] for run in runs] for name, runs in points.items()}
        levels = [
            Level(side.replace("_", "-"), float(np.mean([100 * one[key] for one in found])), ink)
            for side, ink in BASELINES.items()
            if (found := baseline(first, side))
        ]
        drawn.append(_over_points(title, scores, levels, summary, cards))
    if finding and summary["paper"]:
        errors = {name: [value] for name, value in summary["paper"].items()}
        drawn.append(_over_points("The paper: word error rate", errors, (), summary, cards))
    costs = [run["FLOPs"] for runs in points.values() for run in runs]
    if not finding or max(costs) > 1.1 * min(costs):
        drawn += [_over_flops(key, points, cards) for key in PROBES]
    return {"kind": "study", "finding": finding, "cards": drawn, "table_rows": table(summary)}


def _over_points(
    title: str, scores: Any, levels: Sequence[Level], summary: Mapping[str, Any], cards: Cards
) -> Card:
    found: dict[str, dict[str, Sequence[float]]] = {}
    for name, values in scores.items():
        place, _, size = name.partition(" x ")
        found.setdefault(f"x {size}" if size else title, {})[place] = values
    sizes = sorted(found, key=lambda size: (len(size), size))  # ours and the paper's in one order
    curves = {size: (charts.colour(i), found[size]) for i, size in enumerate(sizes)}
    names = {place: place for place in (name.partition(" x ")[0] for name in scores)}
    what, joined = summary["study"], summary["ordered"]
    return cards.draw_scores_over(title, what, curves, UNIT, names, levels, joined)


def scores_over_flops(key: str, runs: Runs) -> dict[float, list[float]]:
    """FLOPs of training, ascending -> scores of dev, in per cent, of the best block, a run each."""
    found: dict[float, list[float]] = {}
    for run in runs:
        for step in (step for step in run["probes"] if step.isdigit()):
            best = max(run["probes"][step]["dev"][key].values())
            found.setdefault(int(step) / run["updates"] * run["FLOPs"], []).append(100 * best)
    return dict(sorted(found.items()))


def _over_flops(key: str, points: Mapping[str, Runs], cards: Cards) -> Card:
    """Scores of dev, with the best block, at each checkpoint that was probed."""
    curves: dict[str, tuple[str, dict[float, list[float]]]] = {}
    for name, runs in points.items():
        curves[name] = charts.colour(len(curves)), scores_over_flops(key, runs)
    return cards.draw_scores_over(f"{PROBES[key]}, dev", "FLOPs of training", curves, UNIT)
