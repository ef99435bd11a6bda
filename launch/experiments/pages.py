"""Tables and pictures in pages, written by scripts. A table stands between the marks <!-- NAME -->
and <!-- end of NAME -->."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def fill(page: Path, tables: Mapping[str, str]) -> None:
    """Puts each of `tables`, by its name, in its place in `page`; exits if there is none."""
    text = page.read_text()
    for name, table in tables.items():
        before, _, rest = text.partition(f"<!-- {name} -->\n")
        _, _, after = rest.partition(f"<!-- end of {name} -->\n")
        if not after:
            sys.exit(f"error: {page} has no place for the table '{name}'")
        text = f"{before}<!-- {name} -->\n{table}\n<!-- end of {name} -->\n{after}"
    page.write_text(text)


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; a first cell is left out where it is that of the row above."""
    lines = [head, ["---"] * len(head)]
    for before, row in zip([None, *rows], rows, strict=False):
        lines.append([*([""] if before and before[0] == row[0] else [row[0]]), *row[1:]])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def pyplot() -> Any:
    """matplotlib's pyplot for SVG: the same picture from the same numbers."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "data2vec"
    from matplotlib import pyplot

    return pyplot
