"""Alarms: the ways in which a student fools itself, seen in the scalars of a step."""

from collections.abc import Mapping
from typing import Any

from data2vec_jax.core.errors import UserError


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
