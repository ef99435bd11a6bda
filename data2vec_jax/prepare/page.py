"""The page of a check, by the templates of the report."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data2vec_jax.cli.output import as_json
from data2vec_jax.core.errors import UserError
from data2vec_jax.prepare.check import QUANTILES
from data2vec_jax.report import charts, page
from data2vec_jax.report.cards import Card
from data2vec_jax.report.charts import number

SHOWN = 40  # rows of a table


def write_page(folder: Path, result: Mapping[str, Any]) -> Path:
    """Writes check.json and check.html; the path of the latter. Raises UserError: it cannot."""
    cards, rows, tables = [], [], []
    for split, found in result["splits"].items():
        bad = sum(found["bad"].values())
        rows.append([split, number(found["examples"]), number(bad), number(found["repeated"])])
        for name, one in found["measures"].items():
            cells = [number(one[key]) for key in ("sum", *QUANTILES)]
            tables.append([f"{split}: {name} {one['unit']}", *cells])
            figure = charts.histogram_figure(**one["histogram"])
            svg = charts.to_svg(figure, label=f"{name} of {split}", key=f"h{len(cards)}-")
            cards.append(Card(f"{name}, {split}", svg, (), one["unit"], 0))
    counts = [
        (f"{kind} of {split}", [[name, number(n)] for name, n in list(found[kind].items())[:SHOWN]])
        for split, found in result["splits"].items()
        for kind in ("classes", "scripts", "characters")
        if found[kind]
    ]
    context = {"kind": "check", "fit": result["fit"], "faults": result["faults"], "rows": rows}
    context |= {"head": ["", "sum", *QUANTILES], "tables": tables, "cards": cards, "counts": counts}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "check.json").write_text(as_json(result), encoding="utf-8")
        html = page.render(folder, f"check of {result['source']}", context)
        (folder / "check.html").write_text(html, encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror or error}") from None
    return folder / "check.html"
