"""What a command says, and how it ends: in one line if the user can mend what went wrong."""

import contextlib
import errno
import json
import math
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from data2vec_jax.core.errors import STOPPED, UserError

# What a path, a disk or a user's rights refuse, wherever a command meets it.
NOT_FAULTS = (
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENAMETOOLONG,
    errno.ELOOP,
    errno.ENOSPC,
    errno.EDQUOT,
)


def run_main(main: Callable[[], Any]) -> None:
    """Runs a command; a `UserError` becomes one line on stderr and exit code 2, Ctrl-C is 130."""
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(STOPPED)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.errno not in NOT_FAULTS or not error.filename:
            raise
        print(f"error: {error.filename!s:.200}: {error.strerror}", file=sys.stderr)
        sys.exit(2)


def say(text: str) -> None:
    """A line for the user; metrics go to files, and the progress bar to the same stream."""
    with contextlib.suppress(OSError):  # a log on a full disk, a terminal that was closed
        print(text, file=sys.stderr, flush=True)


def as_json(result: Any) -> str:
    """JSON that any program can read: numbers that are not finite are the texts 'nan' and 'inf', as
    in `metrics.jsonl`, since JSON has no NaN."""

    def encoded(value):
        if isinstance(value, Mapping):
            return {str(key): encoded(each) for key, each in value.items()}
        if isinstance(value, list | tuple):
            return [encoded(each) for each in value]
        return str(value) if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(encoded(result), indent=1, allow_nan=False) + "\n"


def write_json(path: str, result: Mapping[str, Any]) -> None:
    """What --json=FILE asks for. Raises UserError: it cannot be written."""
    try:
        Path(path).write_text(as_json(result))
    except OSError as error:
        raise UserError(f"--json={path}: {error.strerror}") from None


def one_line(error: Exception) -> str:
    """The first line of an error's message that says something; of a traceback in it, the last."""
    text = str(error.args[0] if isinstance(error, KeyError) and error.args else error)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if any(line.startswith("Traceback (most recent call last)") for line in lines):
        return lines[-1].removeprefix("ValueError: ")
    return lines[0] if lines else type(error).__name__
