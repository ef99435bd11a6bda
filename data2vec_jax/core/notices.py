"""Ctrl-C, SIGTERM and SIGHUP before there is anything to save; imports nothing heavy."""

import os
import signal
import stat

from data2vec_jax.core.errors import STOPPED

NOTICES = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def leave_at_once() -> None:
    """From now on a notice ends this process with a line, as there is nothing to save."""
    for number in NOTICES:
        if not is_ignored(number):
            signal.signal(number, _leave)


def _leave(number: int, frame: object) -> None:
    name = signal.Signals(number).name
    tell(f"stopped by {name}, with no step under way; checkpoints are as they were")
    os._exit(STOPPED)


def is_ignored(number: int) -> bool:
    """Whether it is SIGHUP, and this process was started so as to outlive its terminal (nohup)."""
    return number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN


def tell(text: str) -> None:
    """A line on stderr, from a signal's handler, which may have interrupted another line.

    SIGHUP says that the terminal is gone. Then what is printed from now on goes nowhere, rather
    than ending the run with an error.
    """
    try:
        os.write(2, f"\n{text}\n".encode() if os.isatty(2) else f"{text}\n".encode())
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for number in (1, 2):
            if not stat.S_ISREG(os.fstat(number).st_mode):
                os.dup2(nowhere, number)
        os.close(nowhere)
