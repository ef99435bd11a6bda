"""Tables in pages, written by scripts: between the marks <!-- NAME --> and <!-- end of NAME -->."""

import sys
from collections.abc import Mapping
from pathlib import Path


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
