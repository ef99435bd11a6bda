"""One run at a time in a workdir."""

import contextlib
import errno
import time
from collections.abc import Iterator
from pathlib import Path

from data2vec_jax.core.errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

FILE = ".lock"
PATIENCE = 5.0  # seconds for the process before this one to end
HELD = (errno.EWOULDBLOCK, errno.EACCES)


@contextlib.contextmanager
def exclusive(workdir: Path) -> Iterator[None]:
    """Inside, no other process can be inside with the same folder, which must be there.

    The system lets go when the process ends, however it ends. Where a disk or a system knows no
    locks, there is none. Raises UserError: another process is inside.
    """
    if fcntl is None:
        yield
        return
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            file = stack.enter_context((workdir / FILE).open("a"))
            _lock(file, workdir)
        yield


def _lock(file, workdir: Path) -> None:
    until = time.monotonic() + PATIENCE
    while True:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in HELD:
                raise
        if time.monotonic() > until:
            raise UserError(
                f"another process is at work in {workdir}; wait for it, end it, or choose another "
                "--workdir"
            )
        time.sleep(0.1)
