"""Numbers about a run: writing them, timing them, and array statistics that give early alarm.

Generic: nothing here knows what is trained. The loop uses the pieces like this:

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

Shapes: B examples, T positions, D channels, N rows.
"""

import collections
import contextlib
import json
import logging
import math
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import jax
import jax.numpy as jnp
import numpy as np

from data2vec_jax.errors import UserError

Line = dict[str, Any]  # step, split, then scalars

FILE = "metrics.jsonl"
PLAIN_SECONDS = 10.0  # between progress lines when stderr is a file
BAR_SECONDS = 0.1  # between redraws when it is a terminal


# --- metrics.jsonl ------------------------------------------------------------------------------


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


# --- writer -------------------------------------------------------------------------------------


class Writer:
    """Writes scalars to metrics.jsonl, TensorBoard and a progress line, one step late.

    `write` keeps the device arrays of a step and converts them only when a later step has been
    dispatched, so that the host never waits for the step it has just sent off. What was converted
    is returned, on every process, so that all of them can act on it alike.

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
        """Takes the scalars of `step` (completed updates); returns the lines now written.

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
    """The line a human watches."""

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


# --- time ---------------------------------------------------------------------------------------

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


# Dense bfloat16 FLOP/s by `device.device_kind`, or by the words in it that name the model; for TPUs
# of a whole chip. float16 where there is no bfloat16 (V100, T4). NVIDIA's sheets often print the
# doubled number "with sparsity"; these are without, and with float32 accumulation.
PEAK_FLOPS = {
    "TPU v2": 46e12,  # cloud.google.com/tpu/docs/v2; 180 TFLOP/s a board of 4 chips
    "TPU v3": 123e12,  # cloud.google.com/tpu/docs/v3
    "TPU v4": 275e12,  # cloud.google.com/tpu/docs/v4
    "TPU v5 lite": 197e12,  # cloud.google.com/tpu/docs/v5e
    "TPU v5": 459e12,  # cloud.google.com/tpu/docs/v5p; 'TPU v5' is what a v5p calls itself
    "TPU v6 lite": 918e12,  # cloud.google.com/tpu/docs/v6e
    "TPU7x": 2307e12,  # cloud.google.com/tpu/docs/tpu7x
    "GB200": 2500e12,  # NVIDIA GB200 NVL72 specification, 5 PFLOP/s with sparsity
    "B200": 2250e12,  # NVIDIA HGX B200 specification, 4.5 PFLOP/s with sparsity
    "H200 NVL": 835e12,  # NVIDIA H200 datasheet, 1,671 with sparsity
    "H200": 989e12,  # NVIDIA H200 datasheet, 1,979 with sparsity
    "GH200": 989e12,  # NVIDIA GH200 datasheet, 1,979 with sparsity
    "H100 NVL": 835e12,  # NVIDIA H100 datasheet (NVL), 1,671 with sparsity
    "H100 PCIe": 756e12,  # NVIDIA H100 datasheet (PCIe), 1,513 with sparsity
    "H100": 989e12,  # NVIDIA H100 datasheet (SXM), 1,979 with sparsity
    "A100": 312e12,  # NVIDIA A100 datasheet, SXM and PCIe alike
    "A10": 125e12,  # NVIDIA A10 datasheet
    "L40S": 362e12,  # NVIDIA L40S datasheet
    "L4": 121e12,  # NVIDIA L4 datasheet, 242 with sparsity
    "V100-SXM2": 125e12,  # NVIDIA V100 datasheet
    "V100-PCIE": 112e12,  # NVIDIA V100 datasheet
    "T4": 65e12,  # NVIDIA T4 datasheet
    "RTX A6000": 155e12,  # NVIDIA GA102 whitepaper, 309.7 with sparsity
    "RTX 3090": 71e12,  # NVIDIA GA102 whitepaper
    "RTX 4090": 165e12,  # NVIDIA Ada GPU architecture whitepaper
}
# A JAX device is a TensorCore, or two of them fused. v4 can be run either way, v5p always fuses
# its two, TPU7x never does: `device.num_cores` tells (seen with libtpu 0.0.42 topologies).
CORES_PER_CHIP = {"TPU v2": 2, "TPU v3": 2, "TPU v4": 2, "TPU v5": 2, "TPU7x": 2}


def peak_of_kind(kind: str) -> float | None:
    """The entry of `PEAK_FLOPS` for a `device_kind`; None if there is none."""
    kind = {"TPU v5e": "TPU v5 lite", "TPU v5p": "TPU v5", "TPU v6e": "TPU v6 lite"}.get(kind, kind)
    for name in sorted(PEAK_FLOPS, key=len, reverse=True):  # 'H100 PCIe' before 'H100'
        if re.search(rf"(?<!\w){re.escape(name)}(?!\w)", kind):
            return PEAK_FLOPS[name]
    return None


def peak_flops(devices: Sequence[Any]) -> float:
    """FLOP/s that all `devices` together could do; positive and finite for any of them."""
    device = devices[0]
    if device.platform == "cpu":
        # The devices of one process are threads on the same cores: they count once.
        return measured_flops(1024, jnp.float32) * len({d.process_index for d in devices})
    peak = peak_of_kind(device.device_kind)
    if peak is None:
        return measured_flops(8192, jnp.bfloat16) * len(devices)
    if device.platform == "tpu":
        cores = CORES_PER_CHIP.get(device.device_kind, 1)
        peak *= min(getattr(device, "num_cores", cores), cores) / cores
    return peak * len(devices)


def measured_flops(size: int, dtype: Any) -> float:
    """FLOP/s of a [size, size] matrix product on this process's first device: best of five."""
    device, best = jax.local_devices()[0], math.inf
    with jax.set_mesh(jax.make_mesh((1,), ("one",), devices=[device])):  # not the run's mesh
        a = jax.device_put(np.ones((size, size), dtype), device)
        product = jax.jit(lambda a: a @ a)
        product(a).block_until_ready()
        for _ in range(5):
            start = time.perf_counter()
            product(a).block_until_ready()
            best = min(best, time.perf_counter() - start)
    return 2.0 * size**3 / best


# --- statistics of arrays -----------------------------------------------------------------------
# Sums over all leading axes, never a reshape of them: under a sharded batch each is one local sum
# and one all-reduce, and the result does not depend on the number of devices.

ROUNDING = 1e-12  # a variance below this part of the mean square is float32 rounding, so none


def _valid(x: jax.Array, weights: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """`x` in float32, 0 in invalid rows (where it may be NaN), and the weights as [..., 1]."""
    x = x.astype(jnp.float32)
    if weights is None:
        return x, jnp.ones((*x.shape[:-1], 1), jnp.float32)
    w = weights.astype(jnp.float32)[..., None]
    return jnp.where(w > 0, x, 0.0), w


def mean_std(y: jax.Array, weights: jax.Array | None = None) -> jax.Array:
    """Mean over channels of sqrt(variance over rows + 1e-6), variance with n - 1.

    What fairseq calls target_var and pred_var (spec 8.2), though it is a standard deviation. The
    variance is taken in two passes: the usual difference of sums loses all digits in float32 when
    the mean is large, and a collapsed model is just that case.

    Args:
      y: [..., D], all leading axes are rows.
      weights: [...] 0/1 validity of rows.

    Returns:
      float32 []. 1e-3 if fewer than two rows are valid.
    """
    return channel_std(y, weights).mean()


def channel_std(y: jax.Array, weights: jax.Array | None = None) -> jax.Array:
    """sqrt(variance over rows + 1e-6) of each channel, as in `mean_std`: [..., D] -> [D]."""
    y, w = _valid(y, weights)
    rows = tuple(range(y.ndim - 1))
    n = w.sum()
    mean = y.sum(rows) / jnp.maximum(n, 1.0)  # [D]
    variance = (w * (y - mean) ** 2).sum(rows) / jnp.maximum(n - 1.0, 1.0)  # [D]
    return jnp.sqrt(variance + 1e-6)


def explained_shares(y: jax.Array, weights: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
    """Shares of the variance of targets that position alone, and example alone, explain.

    A model whose targets depend on position only (the same in every example) has a healthy
    `mean_std` and a falling loss, and learns nothing: this is the number that shows it.

    Each share is one minus the variance around the group means over the variance around the grand
    mean, both without bias (adjusted R squared; Kelley's epsilon squared of a one-way analysis of
    variance). A raw share would be about 1/B by position and 1/T by example for pure noise, which
    is large in a small batch; this one is 0 there on average, and still 1 if the group explains
    everything. Negative values are clipped to 0. A share that cannot be told apart from chance
    (by position with one example, by example with one position, or no variance at all) is 0.

    Args:
      y: [B, T, D].
      weights: [B, T] 0/1 validity, for instance the masked positions.

    Returns:
      (by_position, by_example), float32 [] each, from 0 to 1.
    """
    y, w = _valid(y, weights)
    n, raw = w.sum(), (y**2).sum()
    y = (y - y.sum((0, 1)) / jnp.maximum(n, 1.0)) * w  # deviations from the grand mean
    total = (y**2).sum()
    varies = total > ROUNDING * raw

    def share(axis: int) -> jax.Array:
        count = w.sum(axis)  # rows in each group
        between = (y.sum(axis) ** 2 / jnp.maximum(count, 1.0)).sum()
        groups = (count > 0).sum()
        inside = (total - between) / jnp.maximum(n - groups, 1.0)
        around = total / jnp.maximum(n - 1.0, 1.0)
        adjusted = 1.0 - inside / jnp.maximum(around, 1e-30)
        return jnp.where(varies & (n > groups), jnp.clip(adjusted, 0.0, 1.0), 0.0)

    return share(0), share(1)


def effective_rank(x: jax.Array, weights: jax.Array | None = None) -> jax.Array:
    """Participation ratio of the covariance: (sum of eigenvalues)^2 / sum of their squares.

    k if the rows fill k directions evenly, near 1 if one direction dominates. Both sums are
    traces, of C and of C C, so no eigenvalue is computed. At most min(D, n - 1); read it beside
    the number of rows.

    Args:
      x: [..., D], all leading axes are rows.
      weights: [...] 0/1 validity of rows.

    Returns:
      float32 []. 0 if all rows are equal.
    """
    x, w = _valid(x, weights)
    rows = tuple(range(x.ndim - 1))
    raw = (x**2).sum()
    x = (x - x.sum(rows) / jnp.maximum(w.sum(), 1.0)) * w
    trace = (x**2).sum()
    x = x * jax.lax.rsqrt(jnp.maximum(trace, 1e-30))  # trace 1: no overflow below
    # TPUs multiply float32 in bfloat16 unless told otherwise.
    c = jnp.tensordot(x, x, (rows, rows), precision=jax.lax.Precision.HIGHEST)  # [D, D]
    return jnp.where(trace > ROUNDING * raw, 1.0 / jnp.maximum((c**2).sum(), 1e-30), 0.0)


# --- alarms -------------------------------------------------------------------------------------


class CollapseError(UserError):
    """The representations have collapsed and the run was told to stop when they do."""


class CollapseMonitor:
    """Looks at the scalars of a step, on the host, for the ways in which a student fools itself.

    Reads `target_std` and `pred_std` (`mean_std`), `target_by_position` and `target_by_example`
    (`explained_shares`), whichever are there. The limits on the two deviations, and stopping
    after more than `after` updates, are fairseq's (spec 8.2); a limit of 0 (deviations) or 1
    (shares) switches an alarm off. Shares only warn.

    Args:
      min_target_std, min_pred_std: alarm below.
      max_position_share, max_example_share: alarm above.
      after: completed updates that a run has to recover before `abort` acts.
      abort: raise `CollapseError` instead of warning on, if a deviation is below its limit.
      warn_after: completed updates before the first warning.
    """

    def __init__(
        self,
        *,
        min_target_std: float = 0.1,
        min_pred_std: float = 0.01,
        max_position_share: float = 0.9,
        max_example_share: float = 0.9,
        after: int = 5000,
        abort: bool = False,
        warn_after: int = 0,
    ):
        self._low = {"target_std": min_target_std, "pred_std": min_pred_std}
        self._high = {
            "target_by_position": max_position_share,
            "target_by_example": max_example_share,
        }
        self._after, self._abort, self._warn_after = after, abort, warn_after
        self._active: set[str] = set()

    def check(self, step: int, scalars: Mapping[str, Any]) -> list[str]:
        """New warnings, a line each: once per kind, and again only after it has recovered."""
        lines = []
        for name, limit in (self._low | self._high).items():
            if name not in scalars or step <= self._warn_after:
                continue
            value = float(scalars[name])
            low = name in self._low
            if value < limit if low else value > limit:
                text = f"step {step:,}: {_COLLAPSE[name].format(value=value, limit=limit)}"
                if low and self._abort and step > self._after:
                    raise CollapseError(f"{text} (stopped: collapse.abort is on)")
                if name not in self._active:
                    lines.append(f"warning: {text}")
                self._active.add(name)
            # A margin, or a value that trembles around its limit would warn at every other step.
            elif value > 1.1 * limit if low else value < 0.95 * limit:
                self._active.discard(name)
        return lines


_COLLAPSE = {
    "target_std": (
        "targets hardly vary (target_std {value:.3g} < {limit:g}): the teacher is collapsing to a"
        " constant; try a lower learning rate, a longer warm-up, a higher EMA decay, or"
        " normalising targets over time"
    ),
    "pred_std": (
        "predictions hardly vary (pred_std {value:.3g} < {limit:g}): the student answers with a"
        " constant; try a lower learning rate, a longer warm-up, or another EMA decay"
        " (higher if target_std falls too, lower if the targets merely stand still)"
    ),
    "target_by_position": (
        "position alone explains {value:.0%} of the targets' variance (> {limit:.0%}): hidden"
        " collapse, the loss falls but nothing is learnt about the input; try a lower learning"
        " rate, a longer warm-up, or another EMA decay (lower for short runs, higher for long)"
    ),
    "target_by_example": (
        "the example alone explains {value:.0%} of the targets' variance (> {limit:.0%}): one"
        " answer fits all its positions; try normalising targets over time (instance norm), a"
        " lower learning rate, a longer warm-up, or another EMA decay"
    ),
}


# --- parameters ---------------------------------------------------------------------------------


def parameter_table(params: Mapping[str, Any]) -> str:
    """Names, shapes and counts of a parameter tree, grouped by the first two levels of modules.

    Works for arrays and for `jax.ShapeDtypeStruct` alike. clu's overview prints the full path in
    each row and has no subtotals, so only its flattening is used.
    """
    from clu import parameter_overview

    groups: dict[str, list[tuple[str, str, str, int]]] = {}
    for path, leaf in sorted(parameter_overview.flatten_dict(dict(params)).items()):
        *modules, name = path.split("/")
        group = "/".join(modules[:2])
        row = "/".join((*modules[2:], name))
        shape = ", ".join(map(str, leaf.shape))
        groups.setdefault(group, []).append(
            (row, f"[{shape}]", str(leaf.dtype), math.prod(leaf.shape))
        )
    total = sum(row[3] for rows in groups.values() for row in rows)

    table = [("module", "shape", "dtype", "parameters", "share")]
    for group, rows in groups.items():
        count = sum(row[3] for row in rows)
        table.append((group or "(top)", "", "", f"{count:,}", f"{count / max(total, 1):.1%}"))
        table += [(f"  {name}", shape, dtype, f"{n:,}", "") for name, shape, dtype, n in rows]
    table.append(("total", "", "", f"{total:,}", ""))

    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = []
    for row in table:
        cells = [
            cell.rjust(width) if i > 2 else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    rule = "-" * max(map(len, lines))
    return "\n".join((lines[0], rule, *lines[1:-1], rule, lines[-1]))
