"""Examples that were not learned from: `bad_examples.jsonl` of a workdir.

A line is {"step": n, "example_id": i, "path": p, "reason": r}: in update n the example could not be
read, or the whole update was not applied (r: `UPDATE`).
"""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

FILE = "bad_examples.jsonl"
UPDATE = "update not applied"  # reason of examples that may be sound themselves


def append_lines(workdir: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Appends lines to the file, and waits until they are on disk."""
    with (workdir / FILE).open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
        file.flush()
        os.fsync(file.fileno())
