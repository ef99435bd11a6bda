"""The page of a reference run: what each version has learned, at which cost, with pictures.

Its folder has a `summary.json` of {start: result}, where a start is one of `NAMES` and a result is
what launch/reference.py writes. The pictures are made from the checkpoints of its 'workdir' (START/
in the folder if it names none) and the examples of its 'source' (that of pretraining). Whatever
else a result does not have is left out.
"""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data2vec_jax.core.errors import UserError
from data2vec_jax.report import charts
from data2vec_jax.report.cards import Card, Cards
from data2vec_jax.report.charts import Curve, Level, number
from data2vec_jax.report.pictures import Pictures, pictures
from data2vec_jax.report.runs import ProbeScores

NAMES = {
    "v2": "data2vec 2.0",
    "v1": "data2vec 1.0",
    "lora": "2.0, LoRA",
    "dora": "2.0, DoRA",
    "scratch": "from scratch",
}
INKS = dict(zip(NAMES, ("series-0", "series-1", "series-2", "series-3", "muted"), strict=True))
# Probe -> its title, and the key of its curve.
PROBES = {"linear_probe": ("Linear probe", "dev_curve"), "knn": ("k-NN", "dev_curve_knn")}
UNIT = " %"
OF_A_CHOICE = "dev", "rate", "updates", "seconds"  # of a result of fine-tuning; the rest are scores


def is_reference(summary: Mapping[str, Any]) -> bool:
    """Whether a summary.json is that of a reference run, and not of a demo."""
    entries = [entry for entry in summary.values() if isinstance(entry, Mapping)]
    return any("dev_curve" in entry or "finetuned" in entry for entry in entries)


def context(workdir: Path, summary: Mapping[str, Any], cards: Cards) -> dict[str, Any]:
    """What reference.html needs. The pictures take a pass over the held-out examples."""
    found = {start: summary[start] for start in NAMES if start in summary}
    probed = {start: result for start, result in found.items() if start != "scratch"}
    pretrained = {start: result for start, result in probed.items() if "dev_curve" in result}
    charts_of_probes = [_over_updates(probe, pretrained, cards) for probe in PROBES]
    return {
        "kind": "reference",
        "costs": [_cost(start, result) for start, result in pretrained.items()],
        "update_cards": [card for card in charts_of_probes if card],
        "block_cards": _over_blocks(pretrained, cards),
        "share_cards": _over_shares(found, cards),
        "share_rows": _share_rows(found),
        "pictures": [
            (NAMES[start], *_pictures(Path(result.get("workdir", workdir / start)), result))
            for start, result in pretrained.items()
        ],
    }


# Tables -------------------------------------------------------------------------------------------


def mean_and_range(scores: Sequence[float], unit: str = UNIT) -> str:
    """'94.9 % (94.9 to 95.0)' of scores from 0 to 1, without the range if there is one; '' of none.

    unit: what stands behind the mean.
    """
    percent = [100 * score for score in scores]
    if not percent:
        return ""
    text = f"{statistics.fmean(percent):.1f}{unit}"
    return f"{text} ({min(percent):.1f} to {max(percent):.1f})" if len(percent) > 1 else text


def _cost(start: str, result: Mapping[str, Any]) -> list[str]:
    """A row: name, updates, minutes, FLOPs, update of the checkpoint, scores of test."""
    seconds, flops = result.get("seconds"), result.get("flops")
    scores = [
        mean_and_range(result.get(side, {}).get(probe, ()))
        for probe in PROBES
        for side in ("hand_made", "test")
    ]
    return [
        NAMES[start],
        number(result["updates"]) if "updates" in result else "",
        f"{seconds / 60:.0f}" if seconds else "",
        charts.short(float(f"{flops:.3g}")) if flops else "",
        number(result["step"]) if "step" in result else "",
        *scores,
    ]


def _share_rows(found: Mapping[str, Any]) -> list[list[str]]:
    """Rows of share of the labels, start, rate and updates that dev chose, minutes, scores."""
    rows = []
    for start, result in found.items():
        for share, one in result.get("finetuned", {}).items():
            chosen = f"{one['rate']:g}", number(one["updates"])
            minutes = f"{statistics.fmean(one['seconds']) / 60:.1f}" if one.get("seconds") else ""
            scores = [f"{k} {mean_and_range(v)}" for k, v in _scores(one).items()]
            cells = [f"{100 * float(share):g} %", NAMES[start], *chosen, minutes, *scores]
            rows.append((float(share), cells))
    return [row for _, row in sorted(rows, key=lambda pair: pair[0])]


def _scores(one: Mapping[str, Any]) -> dict[str, list[float]]:
    """{metric: scores by seed} of a result of fine-tuning."""
    return {key: one[key] for key in one if key not in OF_A_CHOICE}


# Charts -------------------------------------------------------------------------------------------


def _over_updates(probe: str, pretrained: Mapping[str, Any], cards: Cards) -> Card | None:
    """Scores of a probe on dev over the updates of pretraining, of each version."""
    title, key = PROBES[probe]
    curves, levels = [], []
    for start, result in pretrained.items():
        points = np.array(result.get(key, ()), float).reshape(-1, 2)
        if len(points):
            x, y = points.T
            curves.append(Curve(NAMES[start], x, 100 * y, INKS[start], smooth=False))
    first = next(iter(pretrained.values()), {})
    for name, side, ink in (("hand-made", "hand_made_dev", "ink"), ("untrained",) * 2 + ("muted",)):
        if probe in first.get(side, {}):
            levels.append(Level(name, 100 * first[side][probe], ink))
    return cards.draw_scores(title, curves, levels, UNIT) if curves else None


def _over_blocks(pretrained: Mapping[str, Any], cards: Cards) -> list[Card]:
    """Scores of the features that a probe chooses from, a card for each version and probe."""
    drawn = []
    for start, result in pretrained.items():
        for probe, (title, _) in PROBES.items():
            sides = {"untrained": result.get("untrained", {}), "pretrained": result}
            dev = {
                name: {k: 100 * v for k, v in side["dev"][probe].items()}
                for name, side in sides.items()
                if side.get("dev", {}).get(probe)
            }
            if "pretrained" in dev:
                scores = ProbeScores(NAMES[start], title, (), (), dev=dev)
                drawn.append(cards.draw_blocks(scores, UNIT.strip()))
    return drawn


def _over_shares(found: Mapping[str, Any], cards: Cards) -> list[Card]:
    """Scores after fine-tuning over the share of the labels, a card for each metric."""
    metrics: dict[str, dict[str, tuple[str, dict[float, list[float]]]]] = {}
    for start, result in found.items():
        for share, one in result.get("finetuned", {}).items():
            for metric, scores in _scores(one).items():
                curves = metrics.setdefault(metric, {})
                _, points = curves.setdefault(NAMES[start], (INKS[start], {}))
                points[float(share)] = [100 * score for score in scores]
    drawn = []
    for metric, curves in metrics.items():
        shares = sorted({share for _, found in curves.values() for share in found})
        names = {share: f"{100 * share:g} %" for share in shares}
        what = "shares of the labels"
        drawn.append(cards.draw_scores_over(metric, what, curves, UNIT, names))
    return drawn


# Pictures -----------------------------------------------------------------------------------------


def _pictures(run: Path, result: Mapping[str, Any]) -> tuple[Pictures | None, str]:
    """Pictures of the checkpoint that dev chose, or why there are none."""
    if not result.get("blocks"):
        return None, "The result names no block."
    block = result["blocks"][0]["knn"]
    try:
        found = pictures(run, result["step"], block, result.get("source"))
    except UserError as error:
        return None, f"Not made: {error}."
    return found, f"Features: {block}." if found else "This modality says not how it is drawn."
