"""Files that grow, on disks that fill up: metrics.jsonl, and TensorBoard's events."""

import os
import struct
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


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


class EventFile(AppendedFile):
    """TensorBoard's events.

    The library's own writer has a thread, whose errors nobody catches.

    Args:
      workdir: the folder; each `EventFile` is a file of its own there.
      purge_step: TensorBoard hides what earlier files say of this step and later ones.
    """

    def __init__(self, workdir: Path, purge_step: int):
        now = time.time_ns()
        super().__init__(
            workdir / f"events.out.tfevents.{now // 10**9}.{os.uname().nodename}.{now}"
        )
        from tensorboardX.proto import event_pb2, summary_pb2
        from tensorboardX.record_writer import masked_crc32c

        self._event, self._summary, self._crc = event_pb2.Event, summary_pb2.Summary, masked_crc32c
        self._add(file_version="brain.Event:2")
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._add(step=purge_step, session_log=start)

    def add(self, step: int, scalars: Mapping[str, float]) -> None:
        """Appends one event with scalars by tag."""
        values = [self._summary.Value(tag=k, simple_value=v) for k, v in scalars.items()]
        self._add(step=step, summary=self._summary(value=values))

    def _add(self, **fields: Any) -> None:
        data = self._event(wall_time=time.time(), **fields).SerializeToString()
        size = struct.pack("<Q", len(data))
        sums = [struct.pack("<I", self._crc(part)) for part in (size, data)]
        self.append(size + sums[0] + data + sums[1])
