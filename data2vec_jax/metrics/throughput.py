"""Wall time of a run by category, and its speed: examples per second, MFU, goodput."""

import collections
import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from data2vec_jax.metrics.hardware import peak_flops

WINDOW_SECONDS = 1.0  # speed is measured over at least this time

CATEGORIES = ("train", "compile", "eval", "save", "data", "other", "lost")


class Stopwatch:
    """Wall time of a run by category, across restarts.

    Each second belongs to one category: that of the innermost `measure`, else 'other' (start,
    restore, the loop itself). 'lost' is the time from the writing of a restored checkpoint to the
    restart: updates that are done again, and the time before the restart.
    """

    def __init__(self):
        self._seconds = dict.fromkeys(CATEGORIES, 0.0)
        self._stack = ["other"]
        self._mark = time.monotonic()

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
        now = time.monotonic()
        self._seconds[self._stack[-1]] += now - self._mark
        self._mark = now
        return dict(self._seconds)

    @property
    def goodput(self) -> float:
        """Share of the wall time since the start of the run that was spent in train steps."""
        seconds = self.seconds()
        return seconds["train"] / max(sum(seconds.values()), 1e-9)

    def state_dict(self) -> dict[str, Any]:
        """JSON-able; saved beside the data position."""
        return {"seconds": self.seconds(), "saved_at": time.time()}

    def load(self, state: Mapping[str, Any]) -> None:
        """Adds the seconds of the resumed run; call it before making a `Throughput`."""
        here = sum(self.seconds().values())  # the gap ended when this process started counting
        for category in CATEGORIES:
            self._seconds[category] += state["seconds"].get(category, 0.0)
        self._seconds["lost"] += max(0.0, time.time() - state["saved_at"] - here)


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
        return sum(v for k, v in seconds.items() if k not in ("compile", "eval", "save", "lost"))

    def read(self, step: int) -> dict[str, float]:
        """Finite examples_per_second, mfu (0 to 1) and goodput (0 to 1) after `step` updates.

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
        }
