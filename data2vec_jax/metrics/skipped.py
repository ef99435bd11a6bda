"""Updates that were not applied: counted, told, their examples written down; too many end the run.

The train step decides, on the devices, and says so in the scalar `skipped`. Here those scalars are
read some steps later, so that the host does not wait for the step that it has just dispatched.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from data2vec_jax.core.bad_examples import FILE, UPDATE, BadExamplesFile
from data2vec_jax.core.errors import UserError
from data2vec_jax.core.train_step import SkipConfig

READ_EVERY = 10  # steps that are dispatched before the scalars of all but the last are read
NEEDED = ("skipped", "loss", "grad_norm")


class SkippedError(UserError):
    """More updates in a row than `skip.max_in_a_row` were not applied."""


class SkippedUpdates:
    """The count of a run's updates that were not applied, the same on every process.

    Args:
      file: of bad examples, gets those of such an update; None on all processes but the first.
      saved: the `state_dict` of the checkpoint that the run resumes from; {} if it has none.
    """

    def __init__(self, file: BadExamplesFile | None, config: SkipConfig, saved: Mapping[str, int]):
        self._file, self._config = file, config
        self._pending: list[tuple[int, Mapping[str, Any], Any]] = []
        self.tell: Callable[[str], None] = lambda text: None  # takes lines for the user
        self.count, self.in_a_row = saved.get("count", 0), saved.get("in_a_row", 0)

    def state_dict(self) -> dict[str, int]:
        """The counts after all steps that were read."""
        return {"count": self.count, "in_a_row": self.in_a_row}

    def take(self, step: int, scalars: Mapping[str, Any], example_ids: jax.Array) -> None:
        """Keeps what the train step returned for update `step`. example_ids: [B], of its batch."""
        self._pending.append((step, {name: scalars[name] for name in NEEDED}, example_ids))
        if len(self._pending) > READ_EVERY:
            self.read(step - 1)

    def read(self, step: int) -> dict[str, int]:
        """Reads the scalars of all updates up to `step`, and waits for them.

        Returns:
          {'skipped_updates': how many of the run were not applied so far}.

        Raises:
          SkippedError: too many in a row.
        """
        due = [entry for entry in self._pending if entry[0] <= step]
        self._pending = self._pending[len(due) :]
        for (number, _, ids), scalars in zip(due, jax.device_get([e[1] for e in due]), strict=True):
            if scalars["skipped"]:
                self._skip(number, scalars, ids)
            else:
                self.in_a_row = 0
        return {"skipped_updates": self.count}

    def _skip(self, step: int, scalars: Mapping[str, Any], example_ids: jax.Array) -> None:
        self.count += 1
        self.in_a_row += 1
        ids = _whole(example_ids)
        if self._file:
            line = {"path": "", "reason": UPDATE}
            self._file.append({"step": step, "example_id": i} | line for i in ids)
        why = _reason(float(scalars["loss"]), float(scalars["grad_norm"]))
        self.tell(
            f"warning: step {step:,}: update not applied, {why} ({self.count:,} so far); its "
            f"examples are in {FILE}"
        )
        if self.in_a_row > self._config.max_in_a_row:
            place = self._file.path if self._file else FILE
            raise SkippedError(
                f"step {step:,}: {why}, and {self.in_a_row} updates in a row were not applied "
                "(more than config.skip.max_in_a_row); checkpoints are of before them. "
                "Try a lower config.schedule.peak, a longer warm-up, config.optim.clip, "
                f"config.dtype=float32, or look at the examples in {place}"
            )


def _reason(loss: float, norm: float) -> str:
    if not math.isfinite(loss):
        return f"the loss is {loss}"
    if not math.isfinite(norm):
        return f"the gradient norm is {norm}"
    return f"the gradient norm {norm:.3g} is a spike, or the loss sets what is not finite"


def _whole(rows: jax.Array) -> list[int]:
    """All rows of an array that is split over processes, on every one of them."""
    if jax.process_count() > 1:
        return multihost_utils.process_allgather(rows, tiled=True).tolist()
    return np.asarray(rows).tolist()
