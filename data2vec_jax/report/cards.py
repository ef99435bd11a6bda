"""Cards of a report's page: a chart with its title, legend and sentences."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from data2vec_jax.metrics.collapse import Limit
from data2vec_jax.metrics.writer import Line
from data2vec_jax.report import charts
from data2vec_jax.report.charts import Curve, number
from data2vec_jax.report.runs import ProbeScores


@dataclasses.dataclass(frozen=True)
class Chart:
    """What to draw: a title, names of scalars, a sentence, and how (`charts.line_figure`)."""

    title: str
    names: tuple[str, ...]
    note: str = ""
    smooth: bool = True
    include: tuple[float, ...] = ()
    log: bool = False


@dataclasses.dataclass(frozen=True)
class Card:
    """A chart with its title, a legend of (name, colour, last value), and sentences."""

    title: str
    svg: str
    legend: Sequence[tuple[str, str, str]]
    note: str
    nonfinite: int  # values that are not drawn


class Cards:
    """Makes the cards of one page, each with ids of its own."""

    def __init__(self):
        self._count = 0

    def draw(
        self, chart: Chart, curves: Sequence[Curve], limits: Mapping[str, Limit] | None = None
    ) -> Card | None:
        """The card of a chart; None if there is no finite value to draw.

        limits: scalar -> limit of the collapse monitor, of the scalars in this chart.
        """
        limits = limits or {}
        figure = charts.line_figure(
            curves,
            limits=[limit.value for limit in limits.values()],
            include=chart.include,
            log=chart.log,
        )
        if figure is None:
            return None
        self._count += 1
        sentences = [chart.note] if chart.note else []
        if limits:
            beyond = (
                f"{name} {'below' if limit.minimum else 'above'} {limit.value:g}"
                for name, limit in limits.items()
            )
            sentences.append(f"Dashed: alarm ({', '.join(beyond)}).")
        if figure.axes[0].get_yscale() == "log":
            sentences.append("Logarithmic axis.")
        return Card(
            title=chart.title,
            svg=charts.to_svg(figure, label=f"{chart.title} over steps", key=f"c{self._count}-"),
            legend=[(c.label, c.colour, number(float(c.y[-1]))) for c in curves if len(c.y)],
            note=" ".join(sentences),
            nonfinite=sum(int((~np.isfinite(c.y)).sum()) for c in curves),
        )

    def draw_probes(self, probes: Sequence[ProbeScores], unit: str) -> str:
        self._count += 1
        figure = charts.probe_figure(probes, unit)
        return charts.to_svg(
            figure, label="probe scores before and after pretraining", key=f"c{self._count}-"
        )

    def draw_scores(
        self, title: str, curves: Sequence[Curve], levels: Sequence[charts.Level], unit: str
    ) -> Card | None:
        """The card of scores over updates, and of what they are compared with."""
        figure = charts.line_figure(curves, levels=levels, unit=unit)
        if figure is None:
            return None
        self._count += 1
        legend = [(c.label, c.colour, number(float(c.y[-1]))) for c in curves]
        legend += [(level.label, level.colour, number(level.value)) for level in levels]
        note = f"Dashed: {' and '.join(level.label for level in levels)}." if levels else ""
        svg = charts.to_svg(figure, label=f"{title} over updates", key=f"c{self._count}-")
        return Card(title, svg, legend, note, 0)

    def draw_scores_over(
        self,
        title: str,
        what: str,
        curves: Mapping[str, tuple[str, Mapping[Any, Sequence[float]]]],
        unit: str,
        names: Mapping[Any, str] | None = None,
        levels: Sequence[charts.Level] = (),
        joined: bool = True,
    ) -> Card:
        """The card of scores over `what`, see `charts.score_figure`; the number is the last."""
        self._count += 1
        svg = charts.to_svg(
            charts.score_figure(curves, unit, names, levels, joined),
            label=f"{title} over {what}",
            key=f"c{self._count}-",
        )
        place = list(names).index if names else float
        lasts = [number(float(np.mean(f[max(f, key=place)]))) for _, f in curves.values()]
        legend = [
            (name, ink, value if joined else "")
            for (name, (ink, _)), value in zip(curves.items(), lasts, strict=True)
        ]
        legend += [(level.label, level.colour, number(level.value)) for level in levels]
        return Card(title, svg, legend, "", 0)

    def draw_blocks(self, probe: ProbeScores, unit: str) -> Card:
        """The card of a probe's scores over the blocks."""
        self._count += 1
        svg = charts.to_svg(
            charts.block_figure(probe, unit),
            label=f"{probe.label} over blocks",
            key=f"c{self._count}-",
        )
        inks = {"untrained": "muted", "pretrained": charts.colour(0)}
        legend = [(s, inks[s], number(max(found.values()))) for s, found in probe.dev.items()]
        return Card(probe.label, svg, legend, "", 0)


def curve_of(lines: Sequence[Line], name: str, **style: Any) -> Curve:
    """A scalar of these lines over steps; `style`: the other fields of `Curve`."""
    points = [(line["step"], line[name]) for line in lines if name in line]
    x, y = np.array(points, float).reshape(-1, 2).T
    return Curve(x=x, y=y, **style)
