"""The page of a workdir: what `runs` has read and `charts` has drawn, put into template.html."""

import dataclasses
import datetime
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data2vec_jax.cli.arguments import Arguments, user_path
from data2vec_jax.core.errors import UserError, nearest
from data2vec_jax.metrics.collapse import WARNINGS
from data2vec_jax.metrics.writer import FILE
from data2vec_jax.report import charts, reference, study
from data2vec_jax.report.cards import Card, Cards, Chart, curve_of
from data2vec_jax.report.charts import number
from data2vec_jax.report.runs import (
    SUMMARY,
    ProbeScores,
    RunRecord,
    probe_scores,
    read_groups,
    read_json,
    read_run,
)

# Options that say what a run is, shown at the top of its page.
KEY_OPTIONS = (
    "task",
    "modality",
    "objective.name",
    "head.name",
    "init_from",
    "data.source",
    "data.batch_size",
    "seed",
    "dtype",
)
EVALS_SHOWN = 12  # the latest; the others fold away


CHARTS = (
    Chart(
        "Loss",
        ("loss",),
        "Of the student against the teacher; lower is not always better.",
        log=True,
    ),
    Chart(
        "Spread of targets and predictions",
        ("target_std", "pred_std"),
        "Standard deviation over what is predicted. Near 0 means collapse.",
        include=(0.0,),
    ),
    Chart(
        "Hidden collapse",
        ("target_by_position", "target_by_example"),
        "Share of the targets' variance that position or example alone explains, beyond chance."
        " Near 1, the loss can fall without learning.",
        include=(0.0, 1.0),
    ),
    Chart(
        "Ranks",
        ("feature_rank", "target_rank"),
        "Directions that the student's input features, and the targets, use evenly (participation"
        " ratio).",
        include=(0.0,),
    ),
    Chart("Gradient norm", ("grad_norm",), "Before clipping.", log=True),
    Chart("Learning rate", ("learning_rate",), smooth=False, include=(0.0,)),
    Chart("Decay of the teacher's average", ("ema_decay",), smooth=False),
    Chart(
        "Masked share", ("masked_fraction",), "Of the positions of an example.", include=(0.0, 1.0)
    ),
    Chart(
        "Examples per second",
        ("examples_per_second",),
        "Without compilation, evals and saves.",
        include=(0.0,),
    ),
    Chart(
        "Use of the hardware",
        ("mfu", "goodput"),
        "MFU: the model's FLOPs over the hardware's peak. Goodput: train steps' share of all time.",
        include=(0.0,),
    ),
)
FINETUNING_LOSS = "On the labels of the batch; with augmentation, above the loss of evals."

# In a demo's page: one chart a scalar, one curve a seed.
SEED_CHARTS = (
    "loss",
    "target_std",
    "pred_std",
    "target_by_position",
    "target_by_example",
    "feature_rank",
    "target_rank",
)


@dataclasses.dataclass(frozen=True)
class Eval:
    """The lines of a split as a table, the earlier ones apart, and its curves."""

    split: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    earlier: Sequence[Sequence[str]]
    cards: Sequence[Card]


@dataclasses.dataclass(frozen=True)
class ProbeRow:
    """A probe's scores as text: (mean, spread) before and after, and whether the gain is clear.

    hand_made: (score, name) of hand-made features, ('', '') if there are none.
    """

    recipe: str
    probe: str
    hand_made: tuple[str, str]
    untrained: tuple[str, str]
    pretrained: tuple[str, str]
    block: str
    gain: str
    clear: bool
    verdict: str


# --- a run --------------------------------------------------------------------------------------


def _run_context(run: RunRecord) -> dict[str, Any]:
    """What template.html needs to show one run."""
    options = run.options()
    cards = Cards()
    return {
        "kind": "run",
        "keys": [(key, options[key]) for key in KEY_OPTIONS if options.get(key) is not None],
        "tiles": _tiles(run),
        "warnings": run.warnings(),
        "health": _health(run),
        "cards": _run_cards(run, cards),
        "evals": _evals(run, cards),
        "scalars": _scalar_rows(run),
        "options": [
            (path, value if isinstance(value, str) else json.dumps(value))
            for path, value in options.items()
        ],
    }


def _tiles(run: RunRecord) -> list[tuple[str, str]]:
    """(label, value) of the few numbers that one looks for first."""
    if not run.train:
        return []
    last, total = run.train[-1], run.config.get("total_steps")
    tiles = [(f"updates of {number(total)}" if total else "updates", number(last["step"]))]
    labels = {"target_std": "target std", "pred_std": "pred std"} | {
        "examples_per_second": "examples/s"
    }
    for name in ("loss", "target_std", "pred_std", "examples_per_second"):
        if name in last:
            tiles.append((labels.get(name, name), number(last[name])))
    for name in ("mfu", "goodput"):
        if name in last:
            tiles.append((name, f"{100 * last[name]:.3g}%"))
    return tiles


def _health(run: RunRecord) -> str:
    """What it means that `run.warnings` found nothing; '' for a run without targets."""
    if not run.train or "target_std" not in run.train[-1]:
        return ""
    last = run.train[-1]
    watched = {name: limit for name, limit in run.limits.items() if name in last}
    if not watched:
        return "The collapse monitor is switched off in this run's config."
    if last["step"] <= run.collapse.warn_after:
        return f"The collapse monitor waits for step {run.collapse.warn_after:,}."
    values = (
        f"{name} {number(last[name])} (alarm {'below' if limit.minimum else 'above'}"
        f" {limit.value:g})"
        for name, limit in watched.items()
    )
    text = f"No sign of collapse in the last line: {', '.join(values)}."
    off = [name for name in WARNINGS if name in last and name not in watched]
    return f"{text} Alarms switched off: {', '.join(off)}." if off else text


def _run_cards(run: RunRecord, cards: Cards) -> list[Card]:
    names = run.scalars("train")
    known = {name for chart in CHARTS for name in chart.names}
    others = [Chart(name, (name,)) for name in names if name not in known]
    drawn = []
    for chart in (*CHARTS, *others):
        if chart.title == "Loss" and "target_std" not in names:
            chart = dataclasses.replace(chart, note=FINETUNING_LOSS)
        curves = [
            curve_of(run.train, name, label=name, colour=charts.colour(i), smooth=chart.smooth)
            for i, name in enumerate(name for name in chart.names if name in names)
        ]
        limits = {name: run.limits[name] for name in chart.names if name in run.limits}
        drawn.append(cards.draw(chart, curves, limits) if curves else None)
    return [card for card in drawn if card]


def _evals(run: RunRecord, cards: Cards) -> list[Eval]:
    """Of each split other than 'train'; curves if it has several lines."""
    found = []
    for split, lines in run.splits.items():
        if split == "train":
            continue
        names = run.scalars(split)
        rows = [
            [number(line["step"]), *(number(line[n]) if n in line else "" for n in names)]
            for line in lines
        ]
        drawn = [
            cards.draw(
                Chart(f"{split}: {name}", (name,)),
                [curve_of(lines, name, label=name, colour=charts.colour(2), smooth=False)],
            )
            for name in names
            if len(lines) > 1
        ]
        shown, earlier = rows[-EVALS_SHOWN:], rows[:-EVALS_SHOWN]
        found.append(Eval(split, ["step", *names], shown, earlier, [c for c in drawn if c]))
    return found


def _scalar_rows(run: RunRecord) -> list[list[str]]:
    """name, last, first, least, greatest of each training scalar."""
    rows = []
    for name in run.scalars("train"):
        values = [line[name] for line in run.train if name in line]
        finite = [v for v in values if math.isfinite(v)]
        extremes = [number(min(finite)), number(max(finite))] if finite else ["", ""]
        rows.append([name, number(values[-1]), number(values[0]), *extremes])
    return rows


# --- a demo -------------------------------------------------------------------------------------


def _demo_context(
    summary: Mapping[str, Any], groups: Mapping[str, list[RunRecord]]
) -> dict[str, Any]:
    """What template.html needs to show a demo's folder."""
    cards = Cards()
    order = list(summary)
    names = sorted(groups, key=lambda g: (order.index(g) if g in summary else len(order), g))
    return {
        "kind": "demo",
        "groups": [(name, _group_cards(groups[name], cards)) for name in names],
        **_probe_context(probe_scores(summary), cards),
        **_summary_numbers(summary),
    }


def _probe_context(probes: Sequence[ProbeScores], cards: Cards) -> dict[str, Any]:
    """Table and picture of the probes."""
    if not probes:
        return {"probes": []}
    probes, unit = _in_percent(probes)
    details = any(p.block or p.verdict or p.hand_made is not None for p in probes)
    counts = sorted({len(side) for p in probes for side in (p.untrained, p.pretrained)})
    return {
        "probes": [_probe_row(probe, unit) for probe in probes],
        "details": details,  # demos of old have none
        "probe_chart": cards.draw_probes(probes, unit.strip()),
        "block_cards": [cards.draw_blocks(p, unit.strip()) for p in probes if p.dev],
        "seeds": f"{'-'.join(map(str, counts))} seed{'s' if counts != [1] else ''}",
    }


def _in_percent(probes: Sequence[ProbeScores]) -> tuple[list[ProbeScores], str]:
    """Accuracies, from 0 to 1, as percent; scores that are percent already are left alone."""
    values = [v for p in probes for v in (*p.untrained, *p.pretrained)]
    if not all(0 <= v <= 1 for v in values):
        return list(probes), ""
    return [probe.scaled(100.0) for probe in probes], " %"


def _probe_row(probe: ProbeScores, unit: str) -> ProbeRow:
    before, after = probe.untrained, probe.pretrained
    gain = statistics.fmean(after) - statistics.fmean(before)
    return ProbeRow(
        recipe=probe.recipe,
        probe=probe.probe.replace("_", " "),
        hand_made=("", "")
        if probe.hand_made is None
        else (f"{probe.hand_made:.1f}{unit}", probe.reference),
        untrained=_mean_and_spread(before, unit),
        pretrained=_mean_and_spread(after, unit),
        block=probe.block,
        gain=charts.signed(gain),
        clear=min(len(before), len(after)) > 1 and gain > _spread(before) + _spread(after),
        verdict=probe.verdict,
    )


def _mean_and_spread(values: Sequence[float], unit: str) -> tuple[str, str]:
    spread = f"± {_spread(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.1f}{unit}", spread


def _spread(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def _summary_numbers(summary: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers of summary.json other than probes: a row for each recipe."""
    numbers = {
        recipe: {k: v for k, v in entry.items() if isinstance(v, (int, float))}
        for recipe, entry in summary.items()
        if isinstance(entry, Mapping)
    }
    columns = list(dict.fromkeys(name for entry in numbers.values() for name in entry))
    rows = [
        [recipe, *(number(entry[c]) if c in entry else "" for c in columns)]
        for recipe, entry in numbers.items()
    ]
    return {"number_columns": columns, "number_rows": rows}


def _group_cards(runs: Sequence[RunRecord], cards: Cards) -> list[Card]:
    """One chart a scalar, one colour a seed."""
    by_name = {name: chart for chart in CHARTS for name in chart.names}
    drawn = []
    for name in SEED_CHARTS:
        chart = dataclasses.replace(by_name[name], title=name, note="")
        curves = [
            curve_of(run.train, name, label=run.name, colour=charts.colour(i))
            for i, run in enumerate(runs)
            if any(name in line for line in run.train)
        ]
        limits = {key: limit for run in runs for key, limit in run.limits.items() if key == name}
        drawn.append(cards.draw(chart, curves, limits) if curves else None)
    return [card for card in drawn if card]


def picture(summary: Mapping[str, Any]) -> str:
    """The probes of a demo's summary.json as an SVG file of its own."""
    probes, unit = _in_percent(probe_scores(summary))
    figure = charts.probe_figure(probes, unit)
    return charts.to_svg(figure, label="probe scores before and after pretraining", file=True)


# --- the page -----------------------------------------------------------------------------------


def build(workdir: Path) -> str:
    """The page for a workdir, as HTML.

    Raises UserError: it holds nothing to show, or a file in it is damaged.
    """
    if not workdir.is_dir():
        hint = ""
        if workdir.parent.is_dir():
            folders = [p.name for p in workdir.parent.iterdir() if p.is_dir()]
            hint = nearest(workdir.name, folders) if folders else ""
        raise UserError(f"no folder '{workdir}'{hint}")
    has_summary, has_lines = (workdir / SUMMARY).exists(), (workdir / FILE).exists()
    groups = {} if has_lines and not has_summary else read_groups(workdir)
    if has_summary or groups:
        summary = read_json(workdir / SUMMARY) if has_summary else {}
        if reference.is_reference(summary):
            return render(workdir, "reference run", reference.context(workdir, summary, Cards()))
        if study.is_study(summary):
            return render(workdir, summary["study"], study.context(summary, Cards()))
        context = _demo_context(summary, groups)
        if not (groups or context["probes"] or context["number_columns"]):
            raise UserError(f"'{workdir}' holds no scores and no runs yet")
        runs = sum(map(len, groups.values()))
        return render(workdir, f"{runs} run{'' if runs == 1 else 's'}", context)
    if not has_lines:
        raise UserError(
            f"nothing to report in '{workdir}': no {FILE} (one run), no {SUMMARY} (a demo)"
        )
    run = read_run(workdir)
    if not run.splits:
        raise UserError(f"'{workdir / FILE}' holds no whole line yet")
    lines = sum(map(len, run.splits.values()))
    return render(workdir, f"{number(lines)} lines of {FILE}", _run_context(run))


def render(workdir: Path, subtitle: str, context: Mapping[str, Any]) -> str:
    """A page of template.html: `context` names its kind. The folder gives the title."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    folder = workdir.resolve()
    return environment.get_template("template.html").render(
        title=f"{folder.parent.name}/{folder.name}",
        subtitle=subtitle,
        colours=charts.COLOURS,
        now=datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        **context,
    )


def main(argv: Sequence[str] | None = None) -> None:
    """The command: see `python -m data2vec_jax.report --help`."""
    parser = Arguments(
        prog="python -m data2vec_jax.report",
        description="Writes WORKDIR/report.html: a page of a run, a demo or a reference run.",
    )
    parser.add_argument("workdir", metavar="WORKDIR", type=user_path)
    workdir = parser.parse_args(argv).workdir
    page = build(workdir)
    target = workdir / "report.html"
    temporary = target.with_name("report.html.tmp")  # a browser never sees half a page
    try:
        temporary.write_text(page, encoding="utf-8")
        temporary.replace(target)
    except OSError as error:
        raise UserError(f"cannot write '{target}': {error.strerror}") from None
    print(target)
