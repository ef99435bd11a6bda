"""Where the time of a run goes, and its speed: seconds by category, examples/s, MFU."""

import collections
import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from data2vec_jax.metrics.hardware import peak_flops

WINDOW_SECONDS = 1.0  # over which speed is measured, if a step is shorter

CATEGORIES = ("train", "compile", "eval", "save", "data", "other", "lost")


class Stopwatch:
    """Where the wall time of a run went, across restarts.

    Each second belongs to one category: what the innermost `measure` says, else 'other' (start,
    restore, the loop itself). 'lost' is the time between the moment a restored checkpoint was
    written and the restart: updates done twice, and the time the run stood still.
    """

    def __init__(self):
        self._seconds = dict.fromkeys(CATEGORIES, 0.0)
        self._stack = ["other"]
        self._mark = time.monotonic()

    @contextlib.contextmanager
    def measure(self, category: str) -> Iterator[None]:
        """Counts the time inside the block for `category`; the block around it pauses."""
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
        """Adds the seconds of the run that is resumed; before a `Throughput` reads the clock."""
        here = sum(self.seconds().values())  # the gap ended when this process started counting
        for category in CATEGORIES:
            self._seconds[category] += state["seconds"].get(category, 0.0)
        self._seconds["lost"] += max(0.0, time.time() - state["saved_at"] - here)


class Throughput:
    """Examples per second and MFU of the last steps, without compile, eval and save time.

    MFU is the FLOPs that the model needs (counted by hand, `flops_per_step`: the whole global step)
    over what the devices could have done in that time: their bfloat16 peak, whatever dtype is
    used. For CPUs and accelerators without an entry in `PEAK_FLOPS` the peak is measured when the
    object is made (0.2 s on a CPU), while nothing else runs yet.
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
        """examples_per_second, mfu (0 to 1) and goodput; all finite.

        Since the last reading that is at least `WINDOW_SECONDS` old: `Writer.flush` reads two
        steps in quick succession, and the second would seem to have taken no time.
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
