"""Charts of a report, drawn by matplotlib as SVG.

Functions return a `Figure`; `to_svg` turns it into text for the page, where the colours are CSS
variables so that they follow light and dark mode, or for a file of its own. matplotlib is
imported inside the functions: the rest of the package does not need it.
"""

import dataclasses
import io
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from data2vec_jax.report.runs import ProbeScores

# CSS variable -> colours in light and in dark mode. The series are Okabe and Ito's palette, in an
# order whose first colours also differ in brightness.
SERIES = {
    "series-0": ("#0072b2", "#56a8e8"),
    "series-1": ("#d55e00", "#ff9a52"),
    "series-2": ("#009e73", "#3fcf9f"),
    "series-3": ("#cc79a7", "#e79cc5"),
    "series-4": ("#b8860b", "#e3b53f"),
    "series-5": ("#56b4e9", "#9bd6ff"),
    "series-6": ("#6a3d9a", "#b897e6"),
    "series-7": ("#444444", "#c0c4c9"),
    "series-8": ("#8c4a1f", "#c98a5e"),
}
COLOURS = {
    "background": ("#ffffff", "#14181d"),
    "panel": ("#f4f6f8", "#1c2229"),
    "ink": ("#1c2128", "#e6e9ed"),
    "muted": ("#5b6570", "#9aa5b1"),
    "grid": ("#e9ecef", "#2a3139"),
    "alarm": ("#b42318", "#ff7b6e"),
    **SERIES,
}
LIGHT = {name: light for name, (light, _) in COLOURS.items()}

WIDTH, HEIGHT = 440, 220  # of a chart, in units of about one CSS pixel
MARGINS = (50, 18, 10, 26)  # left, right, top, bottom of its plot area
ROW = 44  # height of a probe in its chart
POINTS = 180  # on a curve; longer ones show medians, with a band from least to greatest

TOOLTIP = "tooltip:"  # a gid with this prefix becomes a <title>

# The same numbers give the same picture, and text stays text: the page's font, and selectable.
RC = {"svg.hashsalt": "data2vec_jax", "svg.fonttype": "none", "font.size": 12}


def colour(index: int) -> str:
    """The name of the colour of the series `index`."""
    return f"series-{index % len(SERIES)}"


# --- numbers as text ----------------------------------------------------------------------------


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


# --- curves over steps --------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Curve:
    """y [N] over steps x [N], y finite or not; its name, and the name of its colour.

    `smooth` draws a noisy curve's points faintly and a moving mean boldly.
    """

    label: str
    x: np.ndarray
    y: np.ndarray
    colour: str
    smooth: bool = True


@dataclasses.dataclass(frozen=True)
class Level:
    """A dashed horizontal line: its name, its height, and the name of its colour."""

    label: str
    value: float
    colour: str


@dataclasses.dataclass(frozen=True)
class _Drawn:
    """The finite part of a curve, in at most `POINTS` points; [n] each."""

    x: np.ndarray
    median: np.ndarray
    least: np.ndarray
    greatest: np.ndarray
    line: np.ndarray  # the median, or its moving mean


def line_figure(
    curves: Sequence[Curve],
    *,
    limits: Sequence[float] = (),
    include: Sequence[float] = (),
    log: bool = False,
    levels: Sequence[Level] = (),
    unit: str = "",
) -> "Figure | None":
    """Curves over steps; None if no value is finite.

    Args:
      curves: drawn in this order.
      limits: of the collapse monitor, dashed horizontal lines.
      include: values that the vertical axis must show; it ends there if no value lies beyond.
      log: asks for a logarithmic axis, granted if all values are positive and cover more than a
        factor of 20.
      levels: what the curves are compared with, whole within the axis.
      unit: of the vertical axis.
    """
    from matplotlib.ticker import FixedLocator, MaxNLocator

    drawn = [_points(curve) for curve in curves]
    if not any(len(d.x) for d in drawn):
        return None
    low, high = _value_range(drawn, [*include, *(level.value for level in levels)])
    log = log and min(d.least.min() for d in drawn if len(d.x)) > 0 and high > 20 * low
    if log:
        limits = [limit for limit in limits if low <= limit <= high]
    else:
        # A limit far outside would flatten the curves.
        limits = [limit for limit in limits if low - (high - low) <= limit <= 2 * high - low]
        low, high = _padded(min([low, *limits]), max([high, *limits]), include)

    figure, axes = _figure(WIDTH, HEIGHT, MARGINS)
    axes.set_yscale("log" if log else "linear")
    axes.set_ylim(low, high)
    axes.set_xlim(*_step_range(curves))
    ticks = FixedLocator(log_ticks(low, high)) if log else MaxNLocator(5, steps=[1, 2, 5, 10])
    axes.yaxis.set_major_locator(ticks)
    axes.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10], integer=True))
    _style(axes, grid="y", unit=unit)
    for limit in limits:
        axes.axhline(limit, color=LIGHT["alarm"], linewidth=1.2, dashes=(4, 3), gid="limit")
    for level in levels:
        title = f"{TOOLTIP}{level.label}: {number(level.value)}{unit}"
        axes.axhline(level.value, color=LIGHT[level.colour], dashes=(4, 3), gid=title)
    for curve, points in zip(curves, drawn, strict=True):
        if len(points.x):
            _draw(axes, curve, points)
    return figure


def _draw(axes: "Axes", curve: Curve, points: _Drawn) -> None:
    """Draws one curve; only its main line has a label."""
    ink = LIGHT[curve.colour]
    if len(points.x) < len(curve.y) and (points.greatest > points.least).any():
        axes.fill_between(points.x, points.least, points.greatest, color=ink, alpha=0.16, lw=0)
    elif points.line is not points.median:
        axes.plot(points.x, points.median, color=ink, linewidth=1, alpha=0.35)
    axes.plot(
        points.x, points.line, color=ink, linewidth=2, label=curve.label, solid_capstyle="round"
    )
    end = f"{curve.label}: {number(float(points.median[-1]))} at step {number(float(points.x[-1]))}"
    _dot(axes, points.x[-1], points.line[-1], end, 6, color=ink, markeredgewidth=0)


def _points(curve: Curve) -> _Drawn:
    finite = np.isfinite(curve.y)
    x, y = curve.x[finite], curve.y[finite]
    if not len(x):
        return _Drawn(x, y, y, y, y)
    count = min(POINTS, len(x))
    parts = np.array_split(y, count)
    median, least, greatest = np.array([(np.median(p), p.min(), p.max()) for p in parts]).T
    noisy = curve.smooth and count >= 20
    return _Drawn(
        x=np.array([part[-1] for part in np.array_split(x, count)]),
        median=median,
        least=least,
        greatest=greatest,
        line=moving_mean(median, count // 12) if noisy else median,
    )


def moving_mean(y: np.ndarray, window: int) -> np.ndarray:
    """Centred mean over up to `window` points, fewer at the ends. [n] -> [n]"""
    sums = np.concatenate([[0.0], np.cumsum(y)])
    index, half = np.arange(len(y)), window // 2
    half = np.minimum(half, np.minimum(index, len(y) - 1 - index))  # symmetric: no lag
    return (sums[index + half + 1] - sums[index - half]) / (2 * half + 1)


def _value_range(drawn: Sequence[_Drawn], include: Sequence[float]) -> tuple[float, float]:
    """Range of the vertical axis: all smooth curves and `include`, without the extreme 1 %.

    A single spike must not flatten the rest.
    """
    least = np.concatenate([d.least for d in drawn])
    greatest = np.concatenate([d.greatest for d in drawn])
    lines = np.concatenate([d.line for d in drawn])
    return (
        min(lines.min(), np.quantile(least, 0.01), *include),
        max(lines.max(), np.quantile(greatest, 0.99), *include),
    )


def _padded(low: float, high: float, include: Sequence[float]) -> tuple[float, float]:
    """A linear axis with some room above and below, but none below a value of `include`."""
    varies = high - low > 1e-6 * abs(high)  # else the axis would show rounding errors
    pad = 0.04 * (high - low) if varies else 0.1 * abs(high) or 1.0
    return low if low in include else low - pad, high + pad


def _step_range(curves: Sequence[Curve]) -> tuple[float, float]:
    first = min(curve.x[0] for curve in curves if len(curve.x))
    last = max(curve.x[-1] for curve in curves if len(curve.x))
    return 0 if first < 0.1 * last else first, last if last > first else first + 1


def log_ticks(low: float, high: float) -> list[float]:
    """At most about eight powers of ten within [low, high], with 2s and 5s between if few."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    every = max(1, len(powers) // 6)
    steps = (1, 2, 5) if len(powers) <= 3 else (1,)
    values = [m * 10.0**p for p in powers if p % every == 0 for m in steps]
    return [v for v in values if low * 0.999 <= v <= high * 1.001]


# --- probes before and after --------------------------------------------------------------------


def probe_figure(probes: Sequence["ProbeScores"], unit: str = "") -> "Figure":
    """A row for each probe: a dot for each seed before and after, a bar between the means.

    A diamond is the score of hand-made features.
    """
    from matplotlib.ticker import MaxNLocator

    values = [v for p in probes for v in (*p.untrained, *p.pretrained)]
    values += [p.hand_made for p in probes if p.hand_made is not None]
    low, high = min(values), max(values)
    pad = 0.08 * (high - low) or 1.0
    low, high = max(low - pad, 0.0) if low >= 0 else low - pad, high + pad
    left, right, bottom = 12, 14, MARGINS[3]
    inner = WIDTH - left - right
    figure, axes = _figure(WIDTH, ROW * len(probes) + bottom, (left, right, 0, bottom))
    axes.set_xlim(low, high)
    axes.set_ylim(ROW * len(probes), 0)  # downwards, one unit a pixel
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_locator(MaxNLocator(1))
    _style(axes, grid="x", unit=unit)
    axes.tick_params(left=False, labelleft=False)
    text = {"transform": axes.get_yaxis_transform(), "fontsize": 13, "color": LIGHT["ink"]}
    for row, probe in enumerate(probes):
        y = row * ROW + 30
        before, after = statistics.fmean(probe.untrained), statistics.fmean(probe.pretrained)
        ink = LIGHT["series-0" if after >= before else "series-1"]
        name = f"{probe.label} · {probe.block}" if probe.block else probe.label
        axes.text(-left / inner, y - 14, name, ha="left", **text)
        axes.text(
            1 + right / inner, y - 14, signed(after - before), ha="right", fontweight="bold", **text
        )
        bar = {"linewidth": 6, "alpha": 0.25, "solid_capstyle": "butt"}
        axes.plot([before, after], [y, y], color=ink, label=probe.label, **bar)
        for value in probe.untrained:
            title = f"untrained: {number(value)}{unit}"
            ring = {"markerfacecolor": LIGHT["background"], "markeredgecolor": LIGHT["muted"]}
            _dot(axes, value, y, title, 9, markeredgewidth=1.6, **ring)
        for value in probe.pretrained:
            title = f"pretrained: {number(value)}{unit}"
            _dot(axes, value, y, title, 9, color=ink, markeredgewidth=1.6)
        if probe.hand_made is not None:
            title = f"{probe.reference}: {number(probe.hand_made)}{unit}"
            _dot(axes, probe.hand_made, y, title, 8, color=LIGHT["ink"], marker="D")
    return figure


def block_figure(probe: "ProbeScores", unit: str = "") -> "Figure":
    """Scores on the dev split over the features that a probe was tried on, with `probe.dev`.

    Untrained (if it is there) in grey, pretrained in colour; class tokens dotted, at the place of
    their block.
    """
    from matplotlib.ticker import MaxNLocator

    token = ", class token"
    names = list(dict.fromkeys(n.removesuffix(token) for n in probe.dev["pretrained"]))
    values = [v for found in probe.dev.values() for v in found.values()]
    figure, axes = _figure(WIDTH, HEIGHT, MARGINS)
    axes.set_xlim(-0.4, len(names) - 0.6)
    axes.set_ylim(*_padded(min(values), max(values), ()))
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    _style(axes, grid="y", unit=unit)
    labels = [n.removeprefix("block ").removesuffix(" of blocks").split(" ")[0] for n in names]
    axes.set_xticks(range(len(names)), labels)
    for side in probe.dev:
        ink = LIGHT["muted" if side == "untrained" else "series-0"]
        for suffix, style in (("", "solid"), (token, "dotted")):
            found = {n: v for n, v in probe.dev[side].items() if n.endswith(token) == bool(suffix)}
            found = {names.index(n.removesuffix(token)): (n, v) for n, v in found.items()}
            # A line joins what follows one another in depth: not the mean, nor what is after it.
            deep = {x: v for x, (n, v) in found.items() if n.startswith(("front", "block"))}
            axes.plot(
                list(deep),
                list(deep.values()),
                color=ink,
                linewidth=2,
                linestyle=style,
                label=side + suffix,
            )
            for x, (name, value) in found.items():
                title = f"{side}, {name}: {number(value)}{unit}"
                _dot(axes, x, value, title, 6, color=ink, markeredgewidth=0)
    return figure


def score_figure(
    curves: Mapping[str, tuple[str, Mapping[Any, Sequence[float]]]],
    unit: str = "",
    names: Mapping[Any, str] | None = None,
    levels: Sequence[Level] = (),
    joined: bool = True,
) -> "Figure":
    """Scores over named places, which are equally far apart, or over FLOPs, on a logarithmic axis.

    curves: name -> (name of its colour, {place: scores by seed}), a dot for each seed and a line
    through the means, if they are `joined`. names: of the places, in order; None for FLOPs.
    """
    from matplotlib.ticker import LogLocator, MaxNLocator

    places = list(names or sorted({x for _, found in curves.values() for x in found}))
    values = [v for _, found in curves.values() for scores in found.values() for v in scores]
    values += [level.value for level in levels]
    slanted = bool(names) and sum(map(len, names.values())) > 50  # WIDTH has place for 50 letters
    *margins, bottom = MARGINS
    figure, axes = _figure(WIDTH, HEIGHT, (*margins, 72 if slanted else bottom))
    axes.set_ylim(*_padded(min(values), max(values), ()))
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    axes.set_xscale("linear" if names else "log")
    _style(axes, grid="y", unit=unit)
    if names:
        axes.set_xlim(-0.3, len(places) - 0.7)
        style = {"rotation": 35, "ha": "right", "fontsize": 9} if slanted else {}
        axes.set_xticks(range(len(places)), list(names.values()), **style)
    else:
        spare = 1.1 if places[-1] > 1.5 * places[0] else 2  # so that a tick is among them
        axes.set_xlim(places[0] / spare, spare * places[-1])
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=6))
    for level in levels:
        title = f"{TOOLTIP}{level.label}: {number(level.value)}{unit}"
        axes.axhline(level.value, color=LIGHT[level.colour], dashes=(4, 3), gid=title)
    for name, (ink, found) in curves.items():
        ordered = sorted(found, key=places.index)
        at = {place: places.index(place) if names else place for place in ordered}
        means = [statistics.fmean(found[place]) for place in at]
        style = {"color": LIGHT[ink], "linewidth": 2, "label": name}
        style |= {} if joined else {"linestyle": "", "marker": "_", "markersize": 24}
        axes.plot(list(at.values()), means, **style)
        for place, x in at.items():
            for value in found[place]:
                where = names[place] if names else f"{number(place)} FLOPs"
                title = f"{name}, {where}: {number(value)}{unit}"
                _dot(axes, x, value, title, 6, color=LIGHT[ink], markeredgewidth=0)
    return figure


def histogram_figure(counts: Sequence[int], edges: Sequence[float]) -> "Figure":
    """How often values lie between consecutive edges [N + 1]: a bar for each of N counts."""
    from matplotlib.ticker import MaxNLocator

    figure, axes = _figure(WIDTH, HEIGHT, MARGINS)
    axes.stairs(counts, edges, fill=True, color=LIGHT[colour(0)])
    axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10], integer=True))
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    _style(axes, grid="y")
    return figure


# --- matplotlib ---------------------------------------------------------------------------------


def _figure(
    width: float, height: float, margins: tuple[float, float, float, float]
) -> "tuple[Figure, Axes]":
    """A transparent figure of this size in SVG units, and its axes within the margins."""
    from matplotlib.figure import Figure

    left, right, top, bottom = margins
    figure = Figure(figsize=(width / 72, height / 72), facecolor="none")
    axes = figure.add_axes(
        (
            left / width,
            bottom / height,
            (width - left - right) / width,
            (height - top - bottom) / height,
        ),
        facecolor="none",
    )
    return figure, axes


def _style(axes: "Axes", *, grid: str, unit: str = "") -> None:
    from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

    axes.spines[:].set_visible(False)
    axes.grid(True, axis=grid, color=LIGHT["grid"], linewidth=1)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, pad=6, labelsize=12, labelcolor=LIGHT["muted"])
    for axis, end in ((axes.xaxis, unit * (grid == "x")), (axes.yaxis, unit * (grid == "y"))):
        axis.set_major_formatter(FuncFormatter(lambda value, _, end=end: f"{short(value)}{end}"))
        axis.set_minor_locator(NullLocator())
        axis.set_minor_formatter(NullFormatter())


def _dot(axes: "Axes", x: float, y: float, title: str, size: float, **style: Any) -> None:
    """A dot with a tooltip, which `to_svg` takes from its gid."""
    style = {"marker": "o", "linestyle": "", "clip_on": False, "zorder": 3} | style
    axes.plot([x], [y], markersize=size, gid=TOOLTIP + title, **style)


def to_svg(figure: "Figure", *, label: str, key: str = "", file: bool = False) -> str:
    """The figure as an SVG element.

    Args:
      label: says what the picture shows to those who cannot see it.
      key: prefix of the ids in it; each chart of a page needs another.
      file: an SVG file of its own, in the colours of light mode and on their background, instead
        of an element of a page that defines `COLOURS` as CSS variables.
    """
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    buffer = io.BytesIO()
    with matplotlib.rc_context(RC):
        FigureCanvasSVG(figure).print_svg(buffer, metadata=dict.fromkeys(_METADATA))
    root = ElementTree.fromstring(buffer.getvalue())
    _tidy(root, key)
    root.attrib = {
        "viewBox": root.attrib["viewBox"],
        "role": "img",
        "aria-label": label,
        "stroke-linejoin": "round",
    }
    if file:
        root.attrib |= {"xmlns": "http://www.w3.org/2000/svg", "font-family": "sans-serif"}
        root.insert(0, ElementTree.Element("rect", _widened(root), fill=LIGHT["background"]))
    else:
        for element in root.iter():
            if "style" in element.attrib:
                element.set("style", _with_variables(element.attrib["style"]))
    return ElementTree.tostring(root, encoding="unicode") + ("\n" if file else "")


_METADATA = ("Creator", "Date", "Format", "Type")  # left out: the same numbers, the same picture


def _tidy(root: ElementTree.Element, key: str) -> None:
    """Makes matplotlib's SVG fit to stand inside a page: short, no ids but those referred to."""
    referred = set()
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.endswith("}style"):  # its rule would hold for the whole page
                parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        element.text = element.text and element.text.strip()
        element.tail = None
        attributes = {name.rpartition("}")[2]: v for name, v in element.attrib.items()}
        if "d" in attributes:
            attributes["d"] = _rounded(" ".join(attributes["d"].split()))
        if "transform" in attributes:  # of texts, each with a rotation by nothing
            attributes["transform"] = re.sub(r"rotate\(-?0 [^)]*\)", "", attributes["transform"])
        if "style" in attributes:  # the page's font
            attributes["style"] = re.sub(r" ?font-family:[^;]*;", "", attributes["style"])
        for name in ("href", "clip-path"):
            if found := re.search(r"#(\w+)", attributes.get(name, "")):
                referred.add(found[1])
                attributes[name] = attributes[name].replace("#", f"#{key}")
        element.attrib = {name: value for name, value in attributes.items() if value}
    for element in list(root.iter()):
        name = element.attrib.pop("id", "")
        if name in referred:
            element.set("id", key + name)
        if name.startswith(TOOLTIP):
            title = ElementTree.Element("title")
            title.text = name.removeprefix(TOOLTIP)
            element.insert(0, title)


def _widened(root: ElementTree.Element, margin: float = 10) -> dict[str, str]:
    """Adds a margin to the view box; returns the box as a rectangle's attributes."""
    x, y, width, height = map(float, root.attrib["viewBox"].split())
    box = (x - margin, y - margin, width + 2 * margin, height + 2 * margin)
    texts = [f"{value:g}" for value in box]
    root.set("viewBox", " ".join(texts))
    return dict(zip(("x", "y", "width", "height"), texts, strict=True))


def _rounded(path: str) -> str:
    """Coordinates with two decimals: a hundredth of a pixel."""

    def short_of(found: re.Match[str]) -> str:
        return f"{float(found[0]):.2f}".rstrip("0").rstrip(".")

    return re.sub(r"-?\d+\.\d+", short_of, path)


def _with_variables(style: str) -> str:
    for name, value in LIGHT.items():
        style = style.replace(value, f"var(--{name})")
    return style
