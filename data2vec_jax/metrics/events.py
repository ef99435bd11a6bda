"""TensorBoard's events."""

import os
import struct
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import google_crc32c

from data2vec_jax.core.appended import AppendedFile


class EventFile(AppendedFile):
    """A file of events.

    The library's own writer has a thread, whose errors nobody catches; that of tensorboardX
    imports torch where it is installed: two seconds of every start.

    Args:
      workdir: the folder; each `EventFile` is a file of its own there.
      purge_step: TensorBoard hides what earlier files say of this step and later ones.
    """

    def __init__(self, workdir: Path, purge_step: int):
        now = time.time_ns()
        super().__init__(
            workdir / f"events.out.tfevents.{now // 10**9}.{os.uname().nodename}.{now}"
        )
        from tensorboard.compat.proto import event_pb2, summary_pb2

        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
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
        sums = [struct.pack("<I", _checksum(part)) for part in (size, data)]
        self.append(size + sums[0] + data + sums[1])


def _checksum(data: bytes) -> int:
    """The masked CRC-32C of TensorFlow's record files."""
    crc = google_crc32c.value(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
