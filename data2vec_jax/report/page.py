"""A workdir -> one HTML page with curves and tables, readable without a network.

    python -m data2vec_jax.report WORKDIR

writes WORKDIR/report.html. A workdir is one run (config.json, metrics.jsonl), or the folder of a
demo: `summary.json` and one run for each modality and seed in `*/seed*/`. The pictures are SVG
written right here, so the page is one small file: no script, no font, no image to load.
"""

import dataclasses
import datetime
import html
import json
import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data2vec_jax.cli.arguments import Arguments
from data2vec_jax.core.errors import UserError, nearest
from data2vec_jax.metrics.collapse import CollapseConfig, CollapseMonitor
from data2vec_jax.metrics.writer import FILE, Line, read_lines

# Okabe and Ito's palette, in an order whose first colours also differ in brightness.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b8860b", "#56b4e9", "#6a3d9a", "#444444")
WIDTH, HEIGHT = 440, 220  # of a chart, in units of about one CSS pixel
LEFT, RIGHT, TOP, BOTTOM = 50, 18, 8, 26  # margins of its plot area
BINS = 180  # points on a curve; longer ones show medians, with a band from least to greatest


# --- reading ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Run:
    """One run: its folder's name, lines of metrics.jsonl by split, and its config."""

    name: str
    splits: Mapping[str, Sequence[Line]]
    config: Mapping[str, Any]

    @property
    def train(self) -> Sequence[Line]:
        return self.splits.get("train", ())

    def names(self, split: str) -> list[str]:
        """Scalars of a split, in order of appearance."""
        found = dict.fromkeys(name for line in self.splits[split] for name in line)
        return [name for name in found if name not in ("step", "split")]


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error})") from None


def read_run(folder: Path) -> Run:
    """Reads a run; lines cut short by a crash are left out."""
    splits: dict[str, list[Line]] = {}
    if (folder / FILE).exists():
        for line in read_lines(folder / FILE):
            numbers = {k: v for k, v in line.items() if isinstance(v, (int, float))}
            splits.setdefault(str(line["split"]), []).append(numbers)
    for lines in splits.values():
        lines.sort(key=lambda line: line["step"])
    config = _read_json(folder / "config.json") if (folder / "config.json").exists() else {}
    return Run(folder.name, splits, config if isinstance(config, dict) else {})


# --- text ---------------------------------------------------------------------------------------


def esc(text: Any) -> str:
    return html.escape(str(text))


def number(value: float) -> str:
    """Four significant digits, thousands apart."""
    if not math.isfinite(value):
        return str(value)
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    if 0.99 < abs(value) < 1:
        return f"{value:.6g}"  # a decay of 0.99999 is not 1
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}".replace("e-0", "e-").replace("e+0", "e+")


def short(value: float) -> str:
    """A number on an axis: 2500000 -> 2.5M."""
    for factor, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{value / factor:.4g}{unit}"
    return f"{value:.6g}".replace("e-0", "e-")


def signed(value: float) -> str:
    return f"{value:+.1f}".replace("-", "\N{MINUS SIGN}")


def table(head: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "") -> str:
    """An HTML table; cells are HTML already. The first column is a heading, the others numbers."""
    top = "".join(f"<th>{cell}</th>" for cell in head)
    body = "".join(
        f"<tr><th>{first}</th>" + "".join(f"<td>{cell}</td>" for cell in rest) + "</tr>"
        for first, *rest in rows
    )
    top = f"<thead><tr>{top}</tr></thead>" if head else ""
    return f'<div class="scroll"><table class="{kind}">{top}<tbody>{body}</tbody></table></div>'


# --- charts -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Curve:
    """y [N] over x [N] (finite or not), how it is called and drawn."""

    label: str
    x: np.ndarray
    y: np.ndarray
    colour: str
    smooth: bool = True


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) within [low, high]."""
    step = (high - low) / count
    power = 10.0 ** math.floor(math.log10(step))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= step * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    digits = max(0, -math.floor(math.log10(step)) + 1)
    return [round(i * step, digits) for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten within [low, high], with 2s and 5s between if they are few."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    every = max(1, len(powers) // 6)
    steps = (1, 2, 5) if len(powers) <= 3 else (1,)
    values = [m * 10.0**p for p in powers if p % every == 0 for m in steps]
    return [v for v in values if low * 0.999 <= v <= high * 1.001]


def _bins(curve: Curve) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """At most `BINS` points of the finite part: x, median, least, greatest; [n] each."""
    finite = np.isfinite(curve.y)
    x, y = curve.x[finite], curve.y[finite]
    if not len(x):
        return x, y, y, y
    count = min(BINS, len(x))
    parts = np.array_split(y, count)
    summary = np.array([(np.median(part), part.min(), part.max()) for part in parts])
    return np.array([part[-1] for part in np.array_split(x, count)]), *summary.T


def _moving_mean(y: np.ndarray, window: int) -> np.ndarray:
    """Centred mean over up to `window` points, fewer at the ends. [n] -> [n]"""
    sums = np.concatenate([[0.0], np.cumsum(y)])
    index, half = np.arange(len(y)), window // 2
    half = np.minimum(half, np.minimum(index, len(y) - 1 - index))  # symmetric: no lag
    return (sums[index + half + 1] - sums[index - half]) / (2 * half + 1)


def line_chart(
    curves: Sequence[Curve],
    *,
    title: str,
    note: str = "",
    alarms: Sequence[float] = (),
    span: tuple[float | None, float | None] = (None, None),
    log: bool = False,
) -> str:
    """A card with a legend, an SVG of curves over steps, and a sentence that explains it.

    Noisy curves show their points faintly and a moving mean boldly. `span` holds values that the
    vertical axis must include; `alarms` are dashed lines; `log` asks for a logarithmic axis,
    granted if the values are positive and cover more than a factor of 20.
    """
    drawn = []
    for curve in curves:
        x, middle, low, high = _bins(curve)
        noisy = curve.smooth and len(x) >= 20
        smooth = _moving_mean(middle, len(x) // 12) if noisy else middle
        drawn.append((curve, x, middle, low, high, smooth))
    if not any(len(x) for _, x, *_ in drawn):
        return ""

    # A single spike must not flatten the rest: the axis follows the smooth curves and all but the
    # most extreme points.
    lows = np.concatenate([d[3] for d in drawn])
    highs = np.concatenate([d[4] for d in drawn])
    smooths = np.concatenate([d[5] for d in drawn])
    low = min(smooths.min(), np.quantile(lows, 0.01), *(v for v in span[:1] if v is not None))
    high = max(smooths.max(), np.quantile(highs, 0.99), *(v for v in span[1:] if v is not None))
    log = log and lows.min() > 0 and high > 20 * low
    if not log:
        alarms = [a for a in alarms if low - (high - low) <= a <= high + (high - low)]
        low, high = min([low, *alarms]), max([high, *alarms])
        varies = high - low > 1e-6 * abs(high)  # else the axis would show rounding errors
        pad = 0.04 * (high - low) if varies else 0.1 * abs(high) or 1.0
        bottom = low if span[0] is not None and low >= span[0] else low - pad
        low, high = bottom, high + pad
        scale, marks = (lambda v: v), ticks(low, high)
    else:
        scale, marks = np.log10, log_ticks(low, high)
        alarms = [a for a in alarms if low <= a <= high]
    first = min(curve.x[0] for curve in curves if len(curve.x))
    last = max(curve.x[-1] for curve in curves if len(curve.x))
    first = 0 if first < 0.1 * last else first
    last = last if last > first else first + 1

    inner_w, inner_h = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

    def px(x: Any) -> Any:
        return (np.asarray(x, float) - first) / (last - first) * inner_w

    def py(y: Any) -> Any:
        share = (scale(np.asarray(y, float)) - scale(low)) / (scale(high) - scale(low))
        return (1 - share) * inner_h

    def path(x: Any, y: Any) -> str:
        return " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(px(x), py(y), strict=True))

    parts = []
    for mark in marks:
        y = TOP + float(py(mark))
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text class="y" x="{LEFT - 6}" y="{y + 4:.1f}">{short(mark)}</text>')
    for mark in ticks(first, last + 0.01 * (last - first), 4):
        x = LEFT + float(px(mark))
        parts.append(f'<text class="x" x="{x:.1f}" y="{HEIGHT - 8}">{short(mark)}</text>')
    for alarm in alarms:
        y = TOP + float(py(alarm))
        parts.append(f'<path class="alarm" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
    parts.append(  # an inner <svg> clips what a spike draws outside
        f'<svg x="{LEFT}" y="{TOP - 4}" width="{inner_w + 5}" height="{inner_h + 8}"'
        f' viewBox="0 -4 {inner_w + 5} {inner_h + 8}">'
    )
    for curve, x, middle, least, greatest, smooth in drawn:
        if not len(x):
            continue
        if len(x) < len(curve.y) and (greatest > least).any():
            band = path(np.r_[x, x[::-1]], np.r_[greatest, least[::-1]])
            parts.append(f'<polygon points="{band}" fill="{curve.colour}" opacity=".16"/>')
        elif smooth is not middle:
            parts.append(
                f'<polyline points="{path(x, middle)}" stroke="{curve.colour}" class="raw"/>'
            )
        parts.append(f'<polyline points="{path(x, smooth)}" stroke="{curve.colour}"/>')
        end = f"{curve.label}: {number(float(middle[-1]))} at step {number(float(x[-1]))}"
        parts.append(
            f'<circle cx="{px(x[-1]):.1f}" cy="{py(smooth[-1]):.1f}" r="3" fill="{curve.colour}">'
            f"<title>{esc(end)}</title></circle>"
        )
    parts.append("</svg>")

    broken = sum(int((~np.isfinite(c.y)).sum()) for c in curves)
    if broken:
        many = "1 value is" if broken == 1 else f"{broken:,} values are"
        note = f'{note} <b class="bad">{many} not finite.</b>'
    if log:
        note += " Logarithmic axis."
    legend = "".join(
        f'<span><i style="background:{c.colour}"></i>{esc(c.label)} <b>{number(float(c.y[-1]))}</b>'
        "</span>"
        for c in curves
        if len(c.y)
    )
    picture = (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{esc(title)} over steps">'
        f"{''.join(parts)}</svg>"
    )
    words = f"<p>{note.strip()}</p>" if note.strip() else ""
    return (
        f'<figure><figcaption><h3>{esc(title)}</h3><div class="legend">{legend}</div></figcaption>'
        f"{picture}{words}</figure>"
    )


def dots(rows: Sequence[tuple[str, Sequence[float], Sequence[float]]], unit: str) -> str:
    """An SVG with one line per (label, values before, values after): a dot a seed, a bar from
    mean to mean."""
    values = [v for _, before, after in rows for v in (*before, *after)]
    low, high = min(values), max(values)
    pad = 0.08 * (high - low) or 1.0
    low, high = max(low - pad, 0.0) if low >= 0 else low - pad, high + pad
    left, right, row_h, bottom = 12, 12, 44, 26
    height = row_h * len(rows) + bottom

    def px(v: float) -> float:
        return left + (v - low) / (high - low) * (WIDTH - left - right)

    parts = []
    for mark in ticks(low, high):
        parts.append(f'<path class="grid" d="M{px(mark):.1f} 0V{height - bottom}"/>')
        parts.append(
            f'<text class="x" x="{px(mark):.1f}" y="{height - 8}">{short(mark)}{unit}</text>'
        )
    for i, (label, before, after) in enumerate(rows):
        y = i * row_h + 30
        a, b = statistics.fmean(before), statistics.fmean(after)
        colour = COLOURS[0] if b >= a else COLOURS[1]
        parts.append(f'<text class="row" x="{left}" y="{y - 14}">{esc(label)}</text>')
        parts.append(f'<text class="gain" x="{WIDTH - right}" y="{y - 14}">{signed(b - a)}</text>')
        parts.append(
            f'<path d="M{px(a):.1f} {y}H{px(b):.1f}" stroke="{colour}" stroke-width="6"'
            ' opacity=".25"/>'
        )
        for kind, many, fill in (("untrained", before, "#fff"), ("pretrained", after, colour)):
            ring = "#666" if kind == "untrained" else colour
            for v in many:
                parts.append(
                    f'<circle cx="{px(v):.1f}" cy="{y}" r="4.5" fill="{fill}" stroke="{ring}"'
                    f' stroke-width="1.6"><title>{kind}: {number(v)}{unit}</title></circle>'
                )
    return (
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img"'
        f' aria-label="probe scores before and after">{"".join(parts)}</svg>'
    )


def dot_plot(rows: Sequence[tuple[str, Sequence[float], Sequence[float]]], unit: str) -> str:
    """A card of `dots`."""
    return (
        "<figure><figcaption><h3>Before and after pretraining</h3>"
        '<div class="legend"><span><i class="ring"></i>untrained</span>'
        f'<span><i style="background:{COLOURS[0]}"></i>pretrained</span></div></figcaption>'
        f"{dots(rows, unit)}"
        "<p>A dot for each seed; the bar joins the means. Orange: lower than before.</p></figure>"
    )


def picture(summary: Mapping[str, Any]) -> str:
    """The probes of a demo's summary.json (accuracies) as an SVG file of its own."""
    rows = [
        (f"{m} · {p.replace('_', ' ')}", [100 * v for v in before], [100 * v for v in after])
        for m, p, before, after in _probes(summary)
    ]
    rules = "".join(re.findall(r"^svg .*\n(?:fill:.*\n)?", STYLE, re.MULTILINE))
    start, rest = dots(rows, " %").split(">", 1)
    return (
        f'{start} xmlns="http://www.w3.org/2000/svg" font-family="sans-serif"><style>{rules}'
        f'</style><rect width="100%" height="100%" fill="#fff"/>{rest}\n'
    )


# --- a run --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Chart:
    """What to draw: a title, the names of scalars (regular expressions), and how."""

    title: str
    names: tuple[str, ...]
    note: str = ""
    smooth: bool = True
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


_STD = {"span": (0.0, None), "alarms": (0.1,)}
_SHARE = {"span": (0.0, 1.0), "alarms": (0.9,)}
_ZERO = {"span": (0.0, None)}
CHARTS = (
    Chart("Loss", ("loss",), "Of the student against the teacher; lower is not always better.",
          options={"log": True}),
    Chart("Spread of targets and predictions", ("target_std", "pred_std"),
          "Standard deviation over masked positions. Near 0 means collapse; dashed: alarm for"
          " targets.", options=_STD),
    Chart("Hidden collapse",
          ("target_by_position", "target_by_example"),
          "Share of the targets' variance that position or example alone explains, beyond chance."
          " Near 1, the loss can fall without learning; dashed: alarm.", options=_SHARE),
    Chart("Feature rank", ("feature_rank",),
          "Directions that the student's input features use evenly (participation ratio).",
          options=_ZERO),
    Chart("Gradient norm", ("grad_norm",), "Before clipping.", options={"log": True}),
    Chart("Learning rate", ("learning_rate",), smooth=False, options=_ZERO),
    Chart("Decay of the teacher's average", ("ema_decay",), smooth=False),
    Chart("Masked share", ("masked_fraction",), "Of the positions of an example.",
          options={"span": (0.0, 1.0)}),
    Chart("Examples per second", ("examples_per_second",),
          "Without compilation, evals and saves.", options=_ZERO),
    Chart("Use of the hardware", ("mfu", "goodput"),
          "MFU: the model's FLOPs over the hardware's peak. Goodput: train steps' share of all"
          " time.", options=_ZERO),
)  # fmt: skip
SEED_CHARTS = ("loss", "target_std", "pred_std", "target_by_position", "target_by_example",
               "feature_rank")  # fmt: skip


READING = (
    "A colour for each seed; the number is the last value. <b>target_std</b> and <b>pred_std</b>"
    " are the spread of targets and predictions: near 0 means collapse."
    " <b>target_by_position</b> and <b>target_by_example</b> are the shares of the targets'"
    " variance that position or example alone explains: near 1, the loss can fall without"
    " learning. <b>feature_rank</b> counts the directions that the student's input features use."
    " Dashed lines are the limits of the collapse monitor."
)


def _curve(lines: Sequence[Line], name: str, label: str, colour: str, smooth: bool) -> Curve:
    points = [(line["step"], line[name]) for line in lines if name in line]
    x, y = np.array(points, float).reshape(-1, 2).T
    return Curve(label, x, y, colour, smooth)


def _run_charts(run: Run) -> str:
    cards, done = [], set()
    names = run.names("train") if run.train else []
    rest = [Chart(n, (n,)) for n in names if not any(n in chart.names for chart in CHARTS)]
    for chart in (*CHARTS, *rest):
        found = [name for name in chart.names if name in names]
        done.update(found)
        curves = [
            _curve(run.train, name, name, COLOURS[i], chart.smooth) for i, name in enumerate(found)
        ]
        if curves:
            cards.append(line_chart(curves, title=chart.title, note=chart.note, **chart.options))
    return f'<div class="cards">{"".join(cards)}</div>' if cards else ""


def _tiles(run: Run) -> str:
    """The few numbers that one looks for first."""
    if not run.train:
        return ""
    last, total = run.train[-1], run.config.get("total_steps")
    updates = number(last["step"])
    tiles = [(f"updates of {number(total)}" if total else "updates", updates)]
    for name, label in (
        ("loss", "loss"), ("target_std", "target std"), ("pred_std", "pred std"),
        ("examples_per_second", "examples/s"),
    ):  # fmt: skip
        if name in last:
            tiles.append((label, number(last[name])))
    for name in ("mfu", "goodput"):
        if name in last:
            tiles.append((name, f"{last[name]:.1%}"))
    cells = "".join(f"<div><b>{value}</b>{label}</div>" for label, value in tiles)
    return f'<div class="tiles">{cells}</div>'


def _health(run: Run) -> str:
    """What the collapse monitor would say about the last line."""
    if not run.train or "target_std" not in run.train[-1]:
        return ""
    last = run.train[-1]
    warnings = CollapseMonitor(CollapseConfig(**run.config.get("collapse", {}))).check(
        last["step"], last
    )
    broken = [name for name, value in last.items() if not math.isfinite(value)]
    if broken:
        warnings.insert(0, f"step {last['step']:,}: not finite: {', '.join(broken)}")
    if warnings:
        return "".join(
            f'<p class="box warn">{esc(w.removeprefix("warning: "))}</p>' for w in warnings
        )
    return (
        '<p class="box good">No sign of collapse in the last line: targets and predictions vary,'
        " and neither position nor example alone explains the targets.</p>"
    )


def _evals(run: Run) -> str:
    parts = []
    for split in run.splits:
        if split == "train":
            continue
        lines, names = run.splits[split], run.names(split)
        rows = [
            [number(line["step"]), *(number(line[n]) if n in line else "" for n in names)]
            for line in lines[-12:]
        ]
        parts.append(f"<h3>{esc(split)}</h3>")
        if len(lines) > len(rows):
            parts.append(f"<p>The last {len(rows)} of {len(lines)}.</p>")
        parts.append(table(["step", *map(esc, names)], rows))
        if len(lines) > 1:
            cards = [
                line_chart([_curve(lines, n, n, COLOURS[2], False)], title=f"{split}: {n}")
                for n in names
            ]
            parts.append(f'<div class="cards">{"".join(cards)}</div>')
    return f"<h2>Evals</h2>{''.join(parts)}" if parts else ""


def _last_values(run: Run) -> str:
    if not run.train:
        return ""
    rows = []
    for name in run.names("train"):
        values = [line[name] for line in run.train if name in line]
        finite = [v for v in values if math.isfinite(v)]
        extremes = [number(min(finite)), number(max(finite))] if finite else ["", ""]
        rows.append([esc(name), number(values[-1]), number(values[0]), *extremes])
    return "<h2>Training scalars</h2>" + table(["", "last", "first", "least", "greatest"], rows)


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        path = f"{prefix}.{key}" if prefix else str(key)
        flat |= _flat(value, path) if isinstance(value, Mapping) and value else {path: value}
    return flat


def _config(run: Run) -> str:
    if not run.config:
        return ""
    rows = [
        [esc(path), esc(value if isinstance(value, str) else json.dumps(value))]
        for path, value in _flat(run.config).items()
    ]
    return f"<h2>Config</h2><details><summary>{len(rows)} options</summary>" + (
        table((), rows, "config") + "</details>"
    )


def _run_page(run: Run) -> str:
    first_words = [
        f"<code>{esc(key)}={esc(value)}</code>"
        for key, value in _flat(run.config).items()
        if key in ("task", "modality.name", "objective.name", "seed", "dtype", "data.batch_size")
    ]
    return "".join(
        (
            f'<p class="keys">{" ".join(first_words)}</p>' if first_words else "",
            _tiles(run),
            _health(run),
            _run_charts(run),
            _evals(run),
            _last_values(run),
            _config(run),
        )
    )


# --- a demo folder ------------------------------------------------------------------------------


def _spread(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def _probes(summary: Mapping[str, Any]) -> list[tuple[str, str, list[float], list[float]]]:
    """(modality, probe, untrained, pretrained) of each pair of lists that summary.json holds."""
    found = []
    for modality, entry in summary.items():
        for probe, scores in entry.items() if isinstance(entry, Mapping) else ():
            if isinstance(scores, Mapping):
                pair = [
                    [float(v) for v in scores.get(side) or () if isinstance(v, (int, float))]
                    for side in ("untrained", "pretrained")
                ]
                if all(pair):
                    found.append((modality, probe, *pair))
    return found


def _summary(summary: Mapping[str, Any]) -> str:
    probes = _probes(summary)
    parts = []
    if probes:
        # Accuracies are shares; a scorer that already gives percent is left alone.
        shares = all(0 <= v <= 1 for _, _, *pair in probes for side in pair for v in side)
        factor, unit = (100.0, " %") if shares else (1.0, "")
        probes = [
            (m, p, [factor * v for v in before], [factor * v for v in after])
            for m, p, before, after in probes
        ]

        def cell(values: Sequence[float]) -> str:
            spread = f" <small>± {_spread(values):.1f}</small>" if len(values) > 1 else ""
            return f"{statistics.fmean(values):.1f}{unit}{spread}"

        rows = []
        for modality, probe, before, after in probes:
            gain = statistics.fmean(after) - statistics.fmean(before)
            clear = min(len(before), len(after)) > 1 and gain > _spread(before) + _spread(after)
            score = f"<b>{cell(after)}</b>" if clear else cell(after)
            rows.append(
                [f"{esc(modality)}<small>{esc(probe.replace('_', ' '))}</small>", cell(before),
                 score, signed(gain)]
            )  # fmt: skip
        counts = sorted({len(side) for *_, before, after in probes for side in (before, after)})
        seeds = f"{'-'.join(map(str, counts))} seed{'s' if counts != [1] else ''}"
        bars = [(f"{m} · {p.replace('_', ' ')}", b, a) for m, p, b, a in probes]
        parts.append(
            '<h2>What pretraining has learnt</h2><div class="side"><div>'
            + table(["", "untrained", "pretrained", "gain"], rows, "probes")
            + f"<p>Score of a probe on frozen features: mean ± standard deviation over {seeds}."
            " Bold where it has risen and the two intervals do not overlap.</p></div>"
            f"{dot_plot(bars, unit.strip())}</div>"
        )
    rest = {
        modality: {k: v for k, v in entry.items() if isinstance(v, (int, float))}
        for modality, entry in summary.items()
        if isinstance(entry, Mapping)
    }
    columns = list(dict.fromkeys(name for entry in rest.values() for name in entry))
    if columns:
        rows = [
            [esc(m), *(number(entry[c]) if c in entry else "" for c in columns)]
            for m, entry in rest.items()
        ]
        parts.append("<h2>Numbers of the runs</h2>" + table(["", *map(esc, columns)], rows))
    return "".join(parts)


def _group_charts(runs: Sequence[Run]) -> str:
    """One chart a scalar, one colour a seed."""
    cards = []
    by_name = {name: chart for chart in CHARTS for name in chart.names}
    for name in SEED_CHARTS:
        curves = [
            _curve(run.train, name, run.name, COLOURS[i % len(COLOURS)], True)
            for i, run in enumerate(runs)
            if any(name in line for line in run.train)
        ]
        if curves:
            options = dict(by_name[name].options)
            if name == "pred_std":
                options["alarms"] = (0.01,)  # the alarm of the shared chart is the targets'
            cards.append(line_chart(curves, title=name, **options))
    return f'<div class="cards">{"".join(cards)}</div>' if cards else "<p>No lines yet.</p>"


# --- the page -----------------------------------------------------------------------------------

STYLE = """
*{box-sizing:border-box}
body{margin:0 auto;max-width:84rem;padding:1.5rem clamp(.8rem,3vw,2.5rem) 3rem;background:#fff;
color:#1c2128;font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
h1{font-size:1.7rem;line-height:1.2;margin:0;overflow-wrap:anywhere}
h2{font-size:1.2rem;margin:2.4rem 0 .7rem;padding-top:1.2rem;border-top:1px solid #e4e7eb}
h3{font-size:.98rem;margin:0}.group{font-size:1.1rem;margin:1.6rem 0 -.3rem}
p{margin:.6rem 0;max-width:60rem}small{color:#5b6570;font-size:.82em;font-weight:400}
header p{color:#5b6570;margin:.2rem 0 0}
code{background:#f2f4f7;border-radius:5px;padding:.1rem .4rem;font-size:.85em;
overflow-wrap:anywhere}
.keys{line-height:2}
nav a{display:inline-block;margin:.6rem .5rem 0 0;padding:.15rem .8rem;border:1px solid #cfd5dc;
border-radius:99px;color:#0060a0;text-decoration:none;font-size:.92rem}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(7.5rem,1fr));gap:.6rem;
margin:1.1rem 0}
.tiles div{border:1px solid #e4e7eb;border-radius:10px;padding:.55rem .8rem;color:#5b6570;
font-size:.82rem}
.tiles b{display:block;color:#1c2128;font-size:1.25rem;font-weight:650;
font-variant-numeric:tabular-nums;white-space:nowrap}
.box{border-left:4px solid;border-radius:0 8px 8px 0;padding:.6rem .9rem;max-width:none}
.good{border-color:#1a8754;background:#effaf4}.warn{border-color:#c77700;background:#fff7e8}
.bad{color:#b42318}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,23rem),1fr));gap:1rem;
margin:1rem 0}
figure{margin:0;border:1px solid #e4e7eb;border-radius:10px;padding:.8rem .9rem .5rem;min-width:0}
.side{display:flex;flex-wrap:wrap;gap:1rem 3rem;align-items:flex-start}
.side>div{flex:0 1 26rem;min-width:0}.side>figure{flex:1 1 20rem;max-width:36rem}
.probes th small{display:block;line-height:1.1}
figure p{color:#5b6570;font-size:.82rem;margin:.2rem 0 .3rem}
.legend{display:flex;flex-wrap:wrap;gap:.1rem 1rem;font-size:.82rem;color:#5b6570;
margin:.15rem 0 .35rem}
.legend b{color:#1c2128;font-variant-numeric:tabular-nums}
.legend i{display:inline-block;width:.75em;height:.75em;border-radius:50%;margin-right:.35em}
.legend .ring{border:1.6px solid #666}
svg{display:block;width:100%;height:auto}
svg text{font-size:12px;fill:#5b6570}svg .y{text-anchor:end}svg .x{text-anchor:middle}
svg .row{font-size:13px;fill:#1c2128}svg .gain{font-size:13px;font-weight:650;text-anchor:end;
fill:#1c2128}
svg .grid{stroke:#e9ecef;stroke-width:1}
svg .alarm{stroke:#b42318;stroke-width:1.2;stroke-dasharray:5 4}
svg polyline{fill:none;stroke-width:2;stroke-linejoin:round;stroke-linecap:round}
svg .raw{stroke-width:1;opacity:.35}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-size:.92rem;font-variant-numeric:tabular-nums}
th,td{padding:.32rem .9rem .32rem 0;border-bottom:1px solid #eceff2;text-align:right;
white-space:nowrap}
th:first-child{text-align:left;font-weight:500}thead th{color:#5b6570;font-weight:500;
font-size:.84rem}
.config td{text-align:left;white-space:normal;overflow-wrap:anywhere;
font-family:ui-monospace,monospace;font-size:.84rem}
summary{cursor:pointer;color:#0060a0}
footer{margin-top:2.5rem;color:#5b6570;font-size:.82rem}
@media print{figure,.tiles div{break-inside:avoid}}
"""


def _page(title: str, subtitle: str, body: str) -> str:
    now = datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{esc(title)}</title><style>{STYLE}</style></head>\n<body>"
        f"<header><h1>{esc(title)}</h1><p>{subtitle}</p></header>\n{body}\n"
        f"<footer>data2vec_jax.report, {now}</footer></body></html>\n"
    )


def build(workdir: Path) -> str:
    """The page for a workdir, as HTML.

    Raises UserError if there is nothing in it to show.
    """
    if not workdir.is_dir():
        hint = ""
        if workdir.parent.is_dir():
            folders = [p.name for p in workdir.parent.iterdir() if p.is_dir()]
            hint = nearest(workdir.name, folders) if folders else ""
        raise UserError(f"no folder '{workdir}'{hint}")
    title = f"{workdir.resolve().parent.name}/{workdir.resolve().name}"

    found = [*workdir.glob(f"*/seed*/{FILE}"), *workdir.glob(f"*/{FILE}")]
    summary_path = workdir / "summary.json"
    if summary_path.exists() or (found and not (workdir / FILE).exists()):
        summary = _read_json(summary_path) if summary_path.exists() else {}
        if not isinstance(summary, dict):
            raise UserError(f"{summary_path} does not hold an object")
        groups: dict[str, list[Run]] = {}
        for path in sorted(found, key=_natural):
            run = read_run(path.parent)
            groups.setdefault(path.relative_to(workdir).parts[0], []).append(run)
        body = _summary(summary)
        if groups:
            body += f"<h2>Curves</h2><p>{READING}</p>"
        names = sorted(groups, key=lambda g: (list(summary).index(g) if g in summary else 999, g))
        links = "".join(f'<a href="#{esc(name)}">{esc(name)}</a>' for name in names)
        for name in names:
            body += (
                f'<h3 class="group" id="{esc(name)}">{esc(name)}</h3>{_group_charts(groups[name])}'
            )
        if not body:
            raise UserError(f"'{workdir}' holds no scores and no runs yet")
        runs = sum(map(len, groups.values()))
        return _page(title, f"{runs} runs", f"<nav>{links}</nav>{body}")

    if not (workdir / FILE).exists():
        raise UserError(
            f"nothing to report in '{workdir}': no {FILE} (one run), no summary.json (a demo)"
        )
    run = read_run(workdir)
    if not run.splits:
        raise UserError(f"'{workdir / FILE}' holds no whole line yet")
    lines = sum(map(len, run.splits.values()))
    return _page(title, f"{number(lines)} lines of {FILE}", _run_page(run))


def _natural(path: Path) -> list[Any]:
    """Sorts seed2 before seed10."""
    return [(int(p) if p.isdigit() else 0, p) for p in re.split(r"(\d+)", str(path))]


def main(argv: Sequence[str] | None = None) -> None:
    parser = Arguments(
        prog="python -m data2vec_jax.report",
        description="Writes WORKDIR/report.html: curves and tables of a run or of a demo folder.",
    )
    parser.add_argument("workdir", metavar="WORKDIR", type=Path)
    workdir = parser.parse_args(argv).workdir
    page = build(workdir)
    target = workdir / "report.html"
    temporary = target.with_name("report.html.tmp")  # a browser never sees half a page
    try:
        temporary.write_text(page, encoding="utf-8")
        temporary.replace(target)
    except OSError as error:
        raise UserError(f"cannot write '{target}' ({error})") from None
    print(target)
