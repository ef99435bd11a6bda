"""Errors that are the user's to mend: one clear line, exit code 2, never a traceback."""

import difflib
from collections.abc import Iterable

STOPPED = 130  # exit code of a run that was interrupted: 128 + SIGINT, as a shell reports it


class UserError(Exception):
    """What is wrong, where, and the nearest right value, in one line."""


class ExampleError(UserError):
    """One example that cannot be learned from, which a run can do without.

    where: its file, or what else finds it. reason: the kind of fault in a word or two, by which bad
    examples are counted. text: the fault itself; the message is `where: text`.
    """

    def __init__(self, where: str, reason: str, text: str):
        super().__init__(f"{where}: {text}")
        self.where, self.reason, self.text = where, reason, text

    @classmethod
    def of(cls, error: UserError, where: str) -> "ExampleError":
        """The error itself if it is one, else the same of a codec that knows no kinds of faults."""
        if isinstance(error, cls):
            return error
        return cls(where, "unreadable", str(error).removeprefix(f"{where}: "))

    def __reduce__(self):  # processes that read hand it on
        return type(self), (self.where, self.reason, self.text)


def nearest(name: str, choices: Iterable[str]) -> str:
    """A hint such as "; did you mean 'width'?" for `name`, or the list of choices."""
    choices = [str(c) for c in choices]
    close = difflib.get_close_matches(name, choices, n=1, cutoff=0.5)
    return (
        f"; did you mean '{close[0]}'?" if close else f"; choose from {', '.join(sorted(choices))}"
    )
