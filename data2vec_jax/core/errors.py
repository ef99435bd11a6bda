"""Errors that are the user's to mend: one clear line, exit code 2, never a traceback."""

import difflib
from collections.abc import Iterable

STOPPED = 130  # exit code of a run that was interrupted: 128 + SIGINT, as a shell reports it


class UserError(Exception):
    """What is wrong, where, and the nearest right value, in one line."""


def nearest(name: str, choices: Iterable[str]) -> str:
    """A hint such as "; did you mean 'width'?" for `name`, or the list of choices."""
    choices = [str(c) for c in choices]
    close = difflib.get_close_matches(name, choices, n=1, cutoff=0.5)
    return (
        f"; did you mean '{close[0]}'?" if close else f"; choose from {', '.join(sorted(choices))}"
    )
