"""The collapse monitor: warns when a pretraining run's scalars show that it learns nothing.

The one module of `metrics` that knows what is trained: a student and a teacher, by the scalars
`target_std`, `pred_std` (`statistics.mean_std`), `target_by_position` and `target_by_example`
(`statistics.explained_shares`), `feature_rank` (`statistics.effective_rank`) of the front end.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from data2vec_jax.core.errors import UserError

# Scalar -> the warning when it is beyond its limit.
WARNINGS = {
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
    "feature_rank": (
        "the front end's output has lost its variety (effective rank {value:.3g}, once far above"
        " {limit:.3g}): hidden collapse, inputs are made alike until their targets are easy; try a"
        " lower learning rate or, for little speech, model.frontend.kind='mel'"
    ),
}


class CollapseError(UserError):
    """The representations have collapsed, and `collapse.abort` asks to stop the run."""


@dataclasses.dataclass(frozen=True)
class Limit:
    """The smallest (`minimum`) or the largest healthy value of a scalar."""

    value: float
    minimum: bool

    def violated_by(self, value: float) -> bool:
        return value < self.value if self.minimum else value > self.value

    def recovered_at(self, value: float) -> bool:
        """Whether `value` is back by a margin: one that trembles around its limit is not."""
        return value > 1.1 * self.value if self.minimum else value < 0.95 * self.value


@dataclasses.dataclass(frozen=True)
class CollapseConfig:
    """Section `collapse` of a config.

    The defaults of the two minima and of `after` are fairseq's (spec 8.2).
    """

    min_target_std: float = 0.1  # warn below; 0 switches the alarm off
    min_pred_std: float = 0.01  # warn below; 0 switches the alarm off
    max_position_share: float = 0.9  # warn above; 1 switches the alarm off
    max_example_share: float = 0.9  # warn above; 1 switches the alarm off
    # Of the highest effective rank so far: warn below; 0 switches the alarm off. Healthy runs of
    # docs/small_scale.md stay above 0.4, collapsing ones fell to 0.1.
    min_rank_share: float = 0.25
    after: int = 5000  # completed updates before `abort` acts: time to recover
    abort: bool = False  # stop the run if a standard deviation is below its minimum
    warn_after: int = 0  # completed updates before the first warning

    def limits(self, highest_rank: float = 0.0) -> dict[str, Limit]:
        """Scalar -> its limit, of the alarms that are on. highest_rank: `feature_rank` so far."""
        minima = {
            "target_std": self.min_target_std,
            "pred_std": self.min_pred_std,
            "feature_rank": self.min_rank_share * highest_rank,
        }
        maxima = {
            "target_by_position": self.max_position_share,
            "target_by_example": self.max_example_share,
        }
        return {name: Limit(value, True) for name, value in minima.items() if value > 0} | {
            name: Limit(value, False) for name, value in maxima.items() if value < 1
        }


class CollapseMonitor:
    """Compares the scalars of each logged step, on the host, with the limits of a config."""

    def __init__(self, config: CollapseConfig):
        self._config = config
        self._highest_rank = 0.0
        self._active: set[str] = set()

    def watch(self, scalars: Mapping[str, Any]) -> None:
        """Takes note of an earlier step, without a warning."""
        self._highest_rank = max(self._highest_rank, float(scalars.get("feature_rank", 0.0)))

    def check(self, step: int, scalars: Mapping[str, Any]) -> list[str]:
        """New warnings after `step` completed updates, one line each.

        A scalar that is absent is not checked. Each alarm sounds once, and again only after its
        scalar has recovered.

        Raises:
          CollapseError: a standard deviation is below its minimum after more than `after` updates
            and `abort` is on.
        """
        warnings = []
        self.watch(scalars)
        for name, limit in self._config.limits(self._highest_rank).items():
            if name not in scalars or step <= self._config.warn_after:
                continue
            value = float(scalars[name])
            if limit.violated_by(value):
                text = f"step {step:,}: {WARNINGS[name].format(value=value, limit=limit.value)}"
                stops = name in ("target_std", "pred_std") and self._config.abort
                if stops and step > self._config.after:
                    raise CollapseError(f"{text} (stopped: collapse.abort is on)")
                if name not in self._active:
                    warnings.append(f"warning: {text}")
                self._active.add(name)
            elif limit.recovered_at(value):
                self._active.discard(name)
        return warnings
