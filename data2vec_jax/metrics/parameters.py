"""A table of the parameters of a model."""

import math
from collections.abc import Mapping
from typing import Any


def parameter_table(params: Mapping[str, Any]) -> str:
    """Names, shapes and counts of a parameter tree, grouped by the first two levels of modules.

    Works for arrays and for `jax.ShapeDtypeStruct` alike. clu's overview prints the full path in
    each row and has no subtotals, so only its flattening is used.
    """
    from clu import parameter_overview

    groups: dict[str, list[tuple[str, str, str, int]]] = {}
    for path, leaf in sorted(parameter_overview.flatten_dict(dict(params)).items()):
        *modules, name = path.split("/")
        group = "/".join(modules[:2])
        row = "/".join((*modules[2:], name))
        shape = ", ".join(map(str, leaf.shape))
        groups.setdefault(group, []).append(
            (row, f"[{shape}]", str(leaf.dtype), math.prod(leaf.shape))
        )
    total = sum(row[3] for rows in groups.values() for row in rows)

    table = [("module", "shape", "dtype", "parameters", "share")]
    for group, rows in groups.items():
        count = sum(row[3] for row in rows)
        table.append((group or "(top)", "", "", f"{count:,}", f"{count / max(total, 1):.1%}"))
        table += [(f"  {name}", shape, dtype, f"{n:,}", "") for name, shape, dtype, n in rows]
    table.append(("total", "", "", f"{total:,}", ""))

    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = []
    for row in table:
        cells = [
            cell.rjust(width) if i > 2 else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    rule = "-" * max(map(len, lines))
    return "\n".join((lines[0], rule, *lines[1:-1], rule, lines[-1]))
