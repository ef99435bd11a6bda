"""Writes the scalars of a run to metrics.jsonl, TensorBoard and a progress line, one step late.

The training loop uses the modules of this folder so:

    watch = Stopwatch()                                              # then watch.load(...)
    speed = Throughput(watch, batch_size=..., flops_per_step=..., devices=..., start_step=k)
    with Writer(workdir, total_steps=n, resume_step=k, rates=speed.read) as writer:
        for step in range(k + 1, n + 1):
            with watch.measure("data"):
                batch = next(batches)
            with watch.measure("train"):
                state, scalars = train_step(state, batch)            # returns at once
                log = step % log_every == 0
                lines = writer.write(step, "train", scalars) if log else writer.advance(step)
            for line in lines:                                       # of an earlier step
                for text in monitor.check(line["step"], line):
                    writer.note(text)
            if time_to_save_or_evaluate:
                with watch.measure("train"):
                    writer.flush()                                   # waits for this step
                ...
"""

import contextlib
import hashlib
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

import jax
import numpy as np

from data2vec_jax.core.appended import AppendedFile
from data2vec_jax.core.errors import UserError
from data2vec_jax.metrics.events import EventFile

Line = dict[str, Any]  # step, split, then scalars

FILE = "metrics.jsonl"

PLAIN_SECONDS = 10.0  # between progress lines if stderr is a file
BAR_SECONDS = 0.1  # between redraws if stderr is a terminal


def _encode(value: float | int) -> float | int | str:
    """JSON has no NaN; readers in other languages choke on Python's bare `NaN`."""
    return value if math.isfinite(value) else str(value)


def _parse(raw: bytes) -> Line | None:
    """One line of the file, or None if a crash cut it short."""
    try:
        line = json.loads(raw)
    except ValueError:  # also covers a multi-byte character cut in half
        return None
    whole = isinstance(line, dict) and isinstance(line.get("step"), int) and "split" in line
    return line if whole else None


def read_lines(path: str | os.PathLike) -> list[Line]:
    """The whole lines of a metrics.jsonl; 'nan', 'inf' and '-inf' become floats again."""
    lines = [_parse(raw) for raw in Path(path).read_bytes().splitlines()]
    return [
        {
            k: float(v) if isinstance(v, str) and v in ("nan", "inf", "-inf") else v
            for k, v in line.items()
        }
        for line in lines
        if line is not None
    ]


def _rewind(
    path: Path, step: int, expected: Mapping[str, Any] | None
) -> tuple[bytes, set[str], str]:
    """Drops torn lines and those beyond `step`.

    expected: the `Writer.digest` of when `step` was saved, if it is known. A file that does not
      begin so is kept as well, under another name.

    Returns:
      What the file holds now, the splits already written at `step`, and a line for the user if the
      file is not what it was.
    """
    before = path.read_bytes() if path.exists() else b""
    problem = ""
    saved = before[: expected["bytes"]] if expected else b""
    if expected and hashlib.sha256(saved).hexdigest() != expected["sha256"]:
        problem = f"{FILE} is gone; its lines up to step {step:,} are lost"
        if before:
            copy = path.with_name(f"{FILE}.damaged-{step}-{time.time_ns()}")
            copy.write_bytes(before)
            problem = f"{FILE} differs from what it was at step {step:,}; it is kept as {copy.name}"
    kept, splits = [], set()
    for raw in before.splitlines():
        line = _parse(raw)
        if step and line and line["step"] <= step:  # a run from step 0 keeps nothing
            kept.append(raw + b"\n")
            if line["step"] == step:
                splits.add(line["split"])
    after = b"".join(kept)
    if after != before:
        # Replaced in one move: a crash here leaves the old file or the new one, never half of it.
        temporary = path.with_name(path.name + ".tmp")
        with temporary.open("wb") as file:
            file.write(after)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    if problem and before:
        problem += f", and {len(kept):,} of its {expected['lines']:,} lines are readable"
    return after, splits, problem


class Writer:
    """Writes scalars to metrics.jsonl, TensorBoard and a progress line, one step late.

    `write` keeps the device arrays of a step and converts them only when a later step has been
    dispatched, so that the host never waits for the step it has just dispatched. It returns the
    converted lines on every process, so that all of them can act alike.

    Args:
      workdir: local folder; made if missing.
      total_steps: of the whole run, for the progress line.
      resume_step: completed updates of the restored state. Lines beyond it are dropped, so that
        each step stands in the file once; 0 starts the file anew.
      resume_digest: what `digest` returned at that step, to notice a file that was damaged since.
      progress: show a progress line on stderr (in place on a terminal, else at most one line
        each ten seconds, and the first and last).
      tensorboard: also write TensorBoard events (tag 'split/name').
      enabled: False on all processes but the first. Such a writer converts and returns the same
        lines, which also keeps its process from running ahead, but touches nothing outside.
      rates: called with the step as soon as a 'train' line's arrays have arrived; its scalars
        (speed, MFU) join that line. Only at that moment is it known when the step ended.
      stream: where progress goes; stderr by default.
    """

    def __init__(
        self,
        workdir: str | os.PathLike,
        *,
        total_steps: int,
        resume_step: int = 0,
        resume_digest: Mapping[str, Any] | None = None,
        progress: bool = True,
        tensorboard: bool = True,
        enabled: bool = True,
        rates: Callable[[int], Mapping[str, float]] | None = None,
        stream: TextIO | None = None,
    ):
        self._pending: list[tuple[int, str, Mapping[str, Any]]] = []
        self._last_step = resume_step
        self._resume_step = resume_step
        self._rates = rates
        self._file = self._events = self._progress = None
        self._repeated: set[str] = set()
        self._sha, self._size, self._lines = hashlib.sha256(), 0, 0  # of all lines up to now
        self._problem = ""  # of the disk, as it was told last
        if not enabled:
            return
        workdir = Path(workdir)
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            path = workdir / FILE
            lines, self._repeated, damage = _rewind(path, resume_step, resume_digest)
            self._file = AppendedFile(path)
            if tensorboard:
                self._events = EventFile(workdir, resume_step + 1)
        except OSError as error:
            raise UserError(f"workdir '{workdir}': cannot write {FILE} ({error})") from None
        self._count(lines)
        if progress:
            self._progress = _Progress(total_steps, stream or sys.stderr)
        if damage:
            self.note(damage)

    def _count(self, lines: bytes) -> None:
        self._sha.update(lines)
        self._size += len(lines)
        self._lines += lines.count(b"\n")

    def digest(self) -> dict[str, Any]:
        """A hash of all lines up to now, to be saved with a checkpoint."""
        return {"lines": self._lines, "bytes": self._size, "sha256": self._sha.hexdigest()}

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind, error, trace) -> None:
        if error is None:
            self.close()
            return
        # The last step may itself be what failed; its arrays must not hide the first error.
        with contextlib.suppress(Exception):
            self.flush()
        self._pending = []
        self.close()

    def write(self, step: int, split: str, scalars: Mapping[str, Any]) -> list[Line]:
        """Takes the scalars of `step` (completed updates); returns the lines written by now.

        Args:
          step: never below that of an earlier call. Several splits may share a step.
          split: 'train', or the name of an eval.
          scalars: Python numbers, or arrays of shape [] that may still be being computed.
        """
        if step < self._last_step:
            raise ValueError(f"step {step} comes after step {self._last_step}")
        for name, value in scalars.items():
            if name in ("step", "split"):
                raise ValueError(f"a metric cannot be called '{name}'")
            if getattr(value, "shape", ()) != ():
                raise ValueError(f"metric '{name}' has shape {value.shape}, not []")
        lines = self.advance(step)
        # An eval done before the checkpoint was saved may be done again after the restore.
        if step != self._resume_step or split not in self._repeated:
            self._pending.append((step, split, dict(scalars)))
        return lines

    def advance(self, step: int) -> list[Line]:
        """Writes the lines of steps before `step`. For steps that are dispatched but not logged."""
        self._last_step = step
        return self._drain() if self._pending and self._pending[0][0] < step else []

    def flush(self) -> list[Line]:
        """Waits for all scalars and puts them on disk: call it before an eval or a checkpoint.

        What a full disk does not take stays in memory until it does; a note says so.
        """
        lines = self._drain()
        for file in filter(None, (self._file, self._events)):
            file.sync()
        self._tell_of_disk()
        return lines

    def close(self) -> list[Line]:
        """Flushes and closes the files."""
        lines = self.flush()
        if self._progress:
            self._progress.close()
        if self._events:
            self._events.close()
        if self._file:
            self._file.close()
        self._file = self._events = self._progress = None
        return lines

    def note(self, text: str) -> None:
        """Prints a line on the progress stream without breaking the bar."""
        if self._progress:
            self._progress.note(text)

    def _drain(self) -> list[Line]:
        pending, self._pending = self._pending, []
        lines = []
        for step, split, scalars in pending:
            # One explicit transfer (the loop's transfer guard forbids implicit ones).
            arrays = jax.device_get(list(scalars.values()))  # a list: a dict would come back sorted
            values = {n: np.asarray(v).item() for n, v in zip(scalars, arrays, strict=True)}
            if split == "train" and self._rates:
                values.update(self._rates(step))
            line = {"step": step, "split": split, **values}
            lines.append(line)
            if self._file:
                encoded = {k: v if k == "split" else _encode(v) for k, v in line.items()}
                raw = json.dumps(encoded).encode() + b"\n"
                self._count(raw)
                self._file.append(raw)
            if self._events:
                self._events.add(step, {f"{split}/{name}": x for name, x in values.items()})
            if self._progress:
                self._progress.show(line)
        self._tell_of_disk()
        return lines

    def _tell_of_disk(self) -> None:
        """Notes that lines cannot be written, once, and that they can again."""
        if not self._file:
            return
        if self._file.problem and not self._problem:
            self.note(f"CANNOT WRITE {FILE}: {self._file.problem}; its lines wait in memory")
        if self._problem and not self._file.problem:
            self.note(f"{FILE} is written again; no line is missing")
        self._problem = self._file.problem
        if self._file.lost:
            self.note(f"{FILE} WAS REMOVED: its lines until now are lost, it is made anew")
            self._file.lost = 0
            self._sha, self._size, self._lines = hashlib.sha256(), 0, 0
            self._count(self._file.path.read_bytes())


class _Progress:
    """The progress line: redrawn in place on a terminal, else a new line now and then."""

    def __init__(self, total_steps: int, stream: TextIO):
        self.total, self.stream = total_steps, stream
        self.terminal = stream.isatty()
        self.first: tuple[int, float] | None = None  # step and time of the first line
        self.shown_at = -math.inf
        self.text = ""  # last line, and whether it is on the screen
        self.shown = True

    def show(self, line: Line) -> None:
        if line["split"] != "train":
            scalars = (f"{k} {v:.4g}" for k, v in line.items() if k not in ("step", "split"))
            self.note("  ".join((f"step {line['step']:,}", line["split"], *scalars)))
            return
        now, step = time.monotonic(), line["step"]
        parts = [f"step {step:,}/{self.total:,}"]
        if "loss" in line:
            parts.append(f"loss {line['loss']:.4g}")
        if "examples_per_second" in line:
            parts.append(f"{line['examples_per_second']:,.4g} examples/s")
        if self.first is None:  # the first line has paid for the compilation: no ETA from it
            self.first = (step, now)
        elif step > self.first[0] and step < self.total:
            rest = (self.total - step) * (now - self.first[1]) / (step - self.first[0])
            parts.append(f"ETA {_clock(rest)}")
        self.text, self.shown = "  ".join(parts), False
        wait = BAR_SECONDS if self.terminal else PLAIN_SECONDS
        if now - self.shown_at >= wait or step >= self.total:
            self.shown_at = now
            self._draw()

    def note(self, text: str) -> None:
        if self.terminal:
            self._print(f"\r\x1b[K{text}\n")
            self._draw()  # the bar moves one line down
        else:
            self._print(f"{text}\n")

    def close(self) -> None:
        if not self.shown:
            self._draw()
        if self.terminal and self.text:
            self._print("\n")

    def _draw(self) -> None:
        self.shown = True
        if self.terminal:
            width = shutil.get_terminal_size().columns - 1  # a wrapped line cannot be redrawn
            self._print(f"\r{self.text[:width]}\x1b[K")
        else:
            self._print(f"{self.text}\n")

    def _print(self, text: str) -> None:
        with contextlib.suppress(OSError):  # a log on a full disk, a terminal that was closed
            self.stream.write(text)
            self.stream.flush()


def _clock(seconds: float) -> str:
    """'2:03:04', with days in front if there are any."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    return (f"{days} d " if days else "") + f"{h}:{m:02d}:{s:02d}"
