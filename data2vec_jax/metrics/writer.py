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
import json
import logging
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

from data2vec_jax.core.errors import UserError

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


def _rewind(path: Path, step: int) -> set[str]:
    """Drops torn lines and those beyond `step`. Returns the splits already written at `step`."""
    before = path.read_bytes() if path.exists() else b""
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
    return splits


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
        if not enabled:
            return
        workdir = Path(workdir)
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            self._repeated = _rewind(workdir / FILE, resume_step)
            self._file = (workdir / FILE).open("a", encoding="utf-8")
        except OSError as error:
            raise UserError(f"workdir '{workdir}': cannot write {FILE} ({error})") from None
        if tensorboard:
            from tensorboardX import SummaryWriter

            # It logs a line without a name for each NaN; the scalars themselves are kept.
            logging.getLogger("tensorboardX.x2num").setLevel(logging.ERROR)
            # The library names files by the second, and a second writer would overwrite the first.
            self._events = SummaryWriter(
                str(workdir),
                purge_step=resume_step + 1,
                filename_suffix=f".{time.time_ns()}",
            )
        if progress:
            self._progress = _Progress(total_steps, stream or sys.stderr)

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
        """Waits for all scalars and puts them on disk: call it before an eval or a checkpoint."""
        lines = self._drain()
        if self._file:
            os.fsync(self._file.fileno())
        if self._events:
            self._events.flush()
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
                self._file.write(json.dumps(encoded) + "\n")
                self._file.flush()
            if self._events:
                for name, value in values.items():
                    self._events.add_scalar(f"{split}/{name}", value, step)
            if self._progress:
                self._progress.show(line)
        return lines


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
            self.stream.write(f"\r\x1b[K{text}\n")
            self._draw()  # the bar moves one line down
        else:
            self.stream.write(f"{text}\n")
        self.stream.flush()

    def close(self) -> None:
        if not self.shown:
            self._draw()
        if self.terminal and self.text:
            self.stream.write("\n")
            self.stream.flush()

    def _draw(self) -> None:
        self.shown = True
        if self.terminal:
            width = shutil.get_terminal_size().columns - 1  # a wrapped line cannot be redrawn
            self.stream.write(f"\r{self.text[:width]}\x1b[K")
        else:
            self.stream.write(f"{self.text}\n")
        self.stream.flush()


def _clock(seconds: float) -> str:
    """'2:03:04', with days in front if there are any."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    return (f"{days} d " if days else "") + f"{h}:{m:02d}:{s:02d}"
