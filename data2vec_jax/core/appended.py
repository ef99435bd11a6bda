"""Files that grow, on disks that fill up."""

import os
from collections.abc import Callable
from pathlib import Path


class AppendedFile:
    """A file that whole records are appended to, in this thread.

    What cannot be written waits in memory and is tried again with what comes next, so that no error
    of a disk ends the run, and a record stands in the file once and whole. A file that somebody
    removed is made anew, with what comes next.

    Attributes:
      problem: why the last attempt failed, '' if it did not.
      lost: bytes that were in the file when it was removed, 0 without such an accident.
    """

    def __init__(self, path: Path):
        self.path = path
        self.problem, self.lost = "", 0
        self._waiting = b""
        self._file = path.open("ab", buffering=0)
        self._size = os.fstat(self._file.fileno()).st_size  # of whole records

    def append(self, data: bytes) -> None:
        """Appends records, and those that wait."""
        self._waiting += data
        self._attempt(self._write)

    def sync(self) -> None:
        """Puts all on disk, as far as the disk takes it."""
        self._attempt(self._write)
        if not self.problem:
            self._attempt(lambda: os.fsync(self._file.fileno()))

    def close(self) -> None:
        """Syncs, and closes the file; what the disk has not taken is lost."""
        self.sync()
        self._file.close()

    def _attempt(self, function: Callable[[], None]) -> None:
        try:
            function()
            self.problem = ""
        except OSError as error:
            self.problem = error.strerror or str(error)

    def _write(self) -> None:
        if not self._waiting:
            return
        if not self._is_there():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            file = self.path.open("ab", buffering=0)
            self._file.close()
            self._file, self.lost, self._size = file, self.lost + self._size, 0
        os.ftruncate(self._file.fileno(), self._size)  # a record may have been cut short
        rest = memoryview(self._waiting)
        while rest:
            rest = rest[self._file.write(rest) :]
        self._size += len(self._waiting)
        self._waiting = b""

    def _is_there(self) -> bool:
        try:
            found = os.stat(self.path)
        except FileNotFoundError:
            return False
        return os.path.samestat(found, os.fstat(self._file.fileno()))
