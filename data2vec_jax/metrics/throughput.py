"""Wall time of a run by category, and its speed: examples per second, MFU, goodput."""

import collections
import contextlib
import itertools
import json
import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from data2vec_jax.metrics.hardware import peak_bytes, peak_flops

WINDOW_SECONDS = 1.0  # speed is measured over at least this time

FILE = "clock.json"  # in the workdir: what the last process had counted, at its last moment

CATEGORIES = (
    "train",
    "data",  # steps wait for their batch
    "eval",
    "save",
    "restore",
    "compile",
    "start-up",  # from the start of the process to the first step
    "other",
    "lost",  # done after the checkpoint from which the run went on, so done again
    "idle",  # no process ran
)
REDONE = ("train", "data", "eval", "other")  # what is lost when a run goes back to a checkpoint
NO_STEPS = ("compile", "eval", "save", "restore", "lost", "idle")
_KEPT_SECONDS = 1.0  # between two notes of the last moment


class Stopwatch:
    """Wall time of a run by category, across restarts: all of it since its first start.

    Each second belongs to one category: that of the innermost `measure`, else 'start-up'.

    started: Unix time at which the process began; by default it begins now.
    """

    def __init__(self, started: float | None = None):
        self._lock = threading.Lock()  # a thread reads it, see `kept`
        self._seconds = dict.fromkeys(CATEGORIES, 0.0)
        self._stack = ["start-up"]
        self._mark = time.monotonic()
        if started is not None:
            self._seconds["start-up"] += max(0.0, time.time() - started)

    @contextlib.contextmanager
    def measure(self, category: str) -> Iterator[None]:
        """Adds the time inside the block to `category`; an enclosing block pauses meanwhile."""
        if category not in CATEGORIES:
            raise ValueError(f"category '{category}' is none of {CATEGORIES}")
        self.seconds()
        self._stack.append(category)
        try:
            yield
        finally:
            self.seconds()
            self._stack.pop()

    def seconds(self) -> dict[str, float]:
        """Seconds by category, up to now."""
        with self._lock:
            now = time.monotonic()
            self._seconds[self._stack[-1]] += now - self._mark
            self._mark = now
            return dict(self._seconds)

    @property
    def goodput(self) -> float:
        """Share of the wall time since the start of the run that was spent in train steps."""
        seconds = self.seconds()
        return seconds["train"] / max(sum(seconds.values()), 1e-9)

    def account(self) -> str:
        """One line: 'goodput 83 % of 57 s: train 47 s, save 1 s, compile 9 s'."""
        seconds = self.seconds()
        # Rounded sums, so that the parts add up to the whole.
        ends = [round(end) for end in itertools.accumulate(seconds.values())]
        whole = {
            name: end - start for name, start, end in zip(seconds, [0, *ends], ends, strict=False)
        }
        parts = [f"{name} {value:,} s" for name, value in whole.items() if value]
        return f"goodput {100 * self.goodput:.0f} % of {ends[-1]:,} s: {', '.join(parts)}"

    def state_dict(self) -> dict[str, Any]:
        """JSON-able; saved beside the data position."""
        return {"seconds": self.seconds(), "saved_at": time.time()}

    def load(self, state: Mapping[str, Any], last: Mapping[str, Any] | None = None) -> None:
        """Adds what the run took so far; call it before making a `Throughput`.

        state: of the checkpoint; {} for a run that goes on from none. last: the state at the last
        known moment of the process before this one. Steps between the two are lost, and the time
        from there to the start of this process was idle. Without `last` all of it is lost.
        """
        began = time.time() - sum(self.seconds().values())
        then = state.get("seconds", {})
        end = state.get("saved_at", began)
        if last and (not state or last["saved_at"] >= end):
            now, end, gap = last["seconds"], last["saved_at"], "idle"
        else:
            now, gap = then, "lost"
        with self._lock:
            for category in CATEGORIES:
                before, after = (float(s.get(category, 0.0)) for s in (then, now))
                redone = max(0.0, after - before) if category in REDONE else 0.0
                self._seconds[category] += after - redone
                self._seconds["lost"] += redone
            self._seconds[gap] += max(0.0, began - end)

    @contextlib.contextmanager
    def kept(self, folder: Path, enabled: bool = True) -> Iterator[None]:
        """Notes the time in `folder` each second, and at the end, for the next process.

        enabled: False on all processes but the first.
        """
        if not enabled:
            yield
            return
        over = threading.Event()

        def note():
            while not over.wait(_KEPT_SECONDS):
                self._note(folder / FILE)

        thread = threading.Thread(target=note, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
            self._note(folder / FILE)

    def _note(self, path: Path) -> None:
        temporary = path.with_name(path.name + ".tmp")
        with contextlib.suppress(OSError):  # a full disk ends no run
            temporary.write_text(json.dumps(self.state_dict()))
            temporary.replace(path)  # in one move: a kill leaves the note of a second ago


def last_moment(folder: Path) -> dict[str, Any] | None:
    """What `Stopwatch.kept` noted last in `folder`; None if nothing, or nothing of ours."""
    try:
        state = json.loads((folder / FILE).read_text())
        return {
            "seconds": {k: float(v) for k, v in state["seconds"].items()},
            "saved_at": float(state["saved_at"]),
        }
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None


def process_start() -> float:
    """Unix time at which this process began; now where the system does not tell (no /proc)."""
    try:
        ticks = Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]
        since_boot = int(ticks) / os.sysconf("SC_CLK_TCK")
        return time.time() - (time.clock_gettime(time.CLOCK_BOOTTIME) - since_boot)
    except (OSError, ValueError, LookupError, AttributeError):
        return time.time()


class Throughput:
    """Examples per second and MFU of the last steps, without compile, eval and save time.

    MFU is the FLOPs that the model needs over those that the devices could have done in that time:
    their bfloat16 peak, whatever dtype is used. For CPUs and accelerators without an entry in
    `hardware.PEAK_FLOPS` the peak is measured when the object is made (0.2 s on a CPU), while
    nothing else runs yet.

    Args:
      stopwatch: of the training loop.
      batch_size: examples of a global step.
      flops_per_step: FLOPs of a global step, counted by hand.
      devices: all that compute the step.
      start_step: completed updates when the loop starts.
    """

    def __init__(
        self,
        stopwatch: Stopwatch,
        *,
        batch_size: int,
        flops_per_step: float,
        devices: Sequence[Any],
        start_step: int = 0,
    ):
        self._watch = stopwatch
        self._batch_size = batch_size
        self._flops = flops_per_step
        self._peak = peak_flops(devices)
        self._readings = collections.deque([(start_step, self._active())])

    def _active(self) -> float:
        seconds = self._watch.seconds()
        return sum(v for category, v in seconds.items() if category not in NO_STEPS)

    def read(self, step: int) -> dict[str, float]:
        """Finite examples_per_second, mfu (0 to 1) and goodput (0 to 1) after `step` updates, and
        peak_bytes (see `hardware`).

        Measured since the last reading that is at least `WINDOW_SECONDS` old: `Writer.flush` reads
        two steps in quick succession, and the second would seem to have taken no time.
        """
        seconds = self._active()
        while len(self._readings) > 1 and seconds - self._readings[1][1] >= WINDOW_SECONDS:
            self._readings.popleft()
        first_step, start = self._readings[0]
        rate = (step - first_step) / max(seconds - start, 1e-9)  # steps per second
        self._readings.append((step, seconds))
        return {
            "examples_per_second": rate * self._batch_size,
            "mfu": rate * self._flops / self._peak,
            "goodput": self._watch.goodput,
            "peak_bytes": peak_bytes(),
        }
