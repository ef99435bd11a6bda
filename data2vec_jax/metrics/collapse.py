"""The collapse monitor: warns when a pretraining run's scalars show that it learns nothing.

The one module of `metrics` that knows what is trained: a student and a teacher, by the scalars
`target_std`, `pred_std` (`statistics.mean_std`), `target_by_position` and `target_by_example`
(`statistics.explained_shares`), `target_rank` (`statistics.effective_rank`), `feature_std` and
`feature_rank` of the front end, `ema_decay` of the teacher. One that is no number is an alarm, too.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from data2vec_jax.core.config import Inside, NonNegativeFloat, NonNegativeInt, Share
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
    "target_rank": (
        "targets have lost their variety (effective rank {value:.3g} < {limit:.3g}): hidden"
        " collapse, hardly more than one number of each is left to predict; try a lower learning"
        " rate or a longer warm-up"
    ),
    "feature_rank": (
        "the front end's output has lost its variety (effective rank {value:.3g}, once far above"
        " {limit:.3g}): hidden collapse, inputs are made alike until their targets are easy; try a"
        " lower learning rate or, for little speech, model.frontend.kind='mel'"
    ),
    "feature_std": (
        "the front end's output hardly varies any more (feature_std {value:.3g}, once far above"
        " {limit:.3g}): the front end is collapsing, inputs are made alike until their targets are"
        " easy; try a lower learning rate, a longer warm-up or, for little speech,"
        " model.frontend.kind='mel'"
    ),
    "ema_decay": (
        "the teacher is the student (ema_decay {value:g}): its targets are what the student already"
        " says, and both may agree on a constant; set ema.start and ema.end below 1 but near it,"
        " such as 0.999, and name the encoder's parameters in `averaged`"
    ),
}
NO_NUMBER = (
    "{name} is {value}: something in this update is no number or beyond float32; such updates are"
    " not applied, and many in a row end the run (section skip)"
)
# Scalar -> the option that is its smallest healthy share of the highest value so far.
SHARES = {
    "target_rank": "min_rank_share",
    "feature_rank": "min_rank_share",
    "feature_std": "min_spread_share",
}
ACTIONS = ("warn", "stop", "back")


class CollapseError(UserError):
    """The representations have collapsed, and `collapse.action` asks for more than a warning."""


class GoBack(Exception):
    """They have collapsed after `step` updates, and the run is to go on from an earlier state."""

    def __init__(self, step: int, text: str):
        super().__init__(text)
        self.step = step


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

    min_target_std: NonNegativeFloat = 0.1  # warn below; 0 switches the alarm off
    min_pred_std: NonNegativeFloat = 0.01  # warn below; 0 switches the alarm off
    # Warn below, if that is below `min_rank_share`, too (a network may start so); 0 switches the
    # alarm off. Healthy runs of docs/small_scale.md stay above 2.8, collapsing ones fell to 1.05.
    min_target_rank: NonNegativeFloat = 2.0
    max_position_share: Share = 0.9  # warn above; 1 switches the alarm off
    max_example_share: Share = 0.9  # warn above; 1 switches the alarm off
    # Of the highest effective rank so far: warn below; 0 switches the alarm off. Healthy runs of
    # docs/small_scale.md stay above 0.4, collapsing ones fell to 0.1.
    min_rank_share: Share = 0.25
    # Of the highest `feature_std` so far: warn below; 0 switches the alarm off. Healthy runs of
    # docs/small_scale.md stay above 0.39, a collapsing one fell to 0.004.
    min_spread_share: Share = 0.1
    min_decay: Share = 1e-6  # of the teacher's average: warn below; 0 switches the alarm off
    after: NonNegativeInt = 5000  # completed updates before `action` is taken: time to recover
    # 'stop': end the run. 'back': go on from the newest checkpoint that was saved without an alarm
    # of `acts_on`, at a lower rate; after `max_returns` times, end the run.
    action: Literal[*ACTIONS] = "warn"
    # Scalars for whose alarms the action is taken; those of others only warn. fairseq stops for
    # these.
    acts_on: Sequence[Literal[*WARNINGS]] = ("target_std", "pred_std")
    rate_factor: Inside = 0.5  # of the learning rate from each 'back' on
    max_returns: NonNegativeInt = 3
    warn_after: NonNegativeInt = 0  # completed updates before the first warning

    def limits(self, highest: Mapping[str, float]) -> dict[str, Limit]:
        """Scalar -> its limit, of the alarms that are on. highest: of `SHARES`, so far."""
        minima = {
            "target_std": self.min_target_std,
            "pred_std": self.min_pred_std,
            "ema_decay": self.min_decay,
        }
        minima |= {name: getattr(self, option) * highest[name] for name, option in SHARES.items()}
        minima["target_rank"] = min(self.min_target_rank, minima["target_rank"])
        maxima = {
            "target_by_position": self.max_position_share,
            "target_by_example": self.max_example_share,
        }
        return {name: Limit(value, True) for name, value in minima.items() if value > 0} | {
            name: Limit(value, False) for name, value in maxima.items() if value < 1
        }


class CollapseMonitor:
    """Compares the scalars of each logged step, on the host, with the limits of a config.

    Args:
      saved: what `saved` returned for the checkpoint that the run goes on from.
      returns: how often the run has gone back by now, if that is more often than is saved.

    Attributes:
      healthy: the newest step that was saved without an alarm of `acts_on`; 0 for the start.
      returns: how often the run has gone back.
    """

    def __init__(self, config: CollapseConfig, saved: Mapping[str, Any] = {}, *, returns: int = 0):
        self._config = config
        self._highest = dict.fromkeys(SHARES, 0.0) | saved.get("highest", {})
        self._active: set[str] = set(saved.get("active", ()))  # alarms
        self._told: set[str] = set()  # those that the user knows from this process
        self.healthy: int = saved.get("healthy", 0)
        self.returns: int = max(saved.get("returns", 0), returns)

    @property
    def rate(self) -> float:
        """The factor of the learning rate."""
        return self._config.rate_factor**self.returns

    @property
    def spared(self) -> int | None:
        """The checkpoint that must not be removed, since the run may go back to it."""
        return self.healthy if self._config.action == "back" else None

    def saved(self, step: int) -> dict[str, Any]:
        """What the checkpoint of `step` must hold; call it when that is saved."""
        if not self._active & set(self._config.acts_on):
            self.healthy = step
        return {
            "highest": dict(self._highest),
            "active": sorted(self._active),
            "healthy": self.healthy,
            "returns": self.returns,
        }

    def watch(self, scalars: Mapping[str, Any]) -> None:
        """Takes note of an earlier step, without a warning."""
        for name, highest in self._highest.items():
            value = float(scalars.get(name, 0.0))
            if math.isfinite(value):
                self._highest[name] = max(highest, value)

    def check(self, step: int, scalars: Mapping[str, Any]) -> list[str]:
        """New warnings after `step` completed updates, one line each.

        A scalar that is absent is not checked; but a training line without `ema_decay` is one of a
        teacher that averages nothing. Each alarm sounds once, and again only after its scalar has
        recovered.

        Raises:
          CollapseError: one of `acts_on` is beyond its limit after more than `after` updates, and
            `action` is 'stop', or it is 'back' and the run has gone back `max_returns` times.
          GoBack: the same, and `action` is 'back'.
        """
        warnings = []
        self.watch(scalars)
        if {"target_std", "learning_rate"} <= scalars.keys():
            scalars = {"ema_decay": 0.0} | dict(scalars)
        for name, limit in self._config.limits(self._highest).items():
            if name not in scalars or step <= self._config.warn_after:
                continue
            value = float(scalars[name])
            if limit.violated_by(value) or not math.isfinite(value):
                sound = math.isfinite(value)
                text = WARNINGS[name].format(value=value, limit=limit.value)
                text = text if sound else NO_NUMBER.format(name=name, value=value)
                text = f"step {step:,}: {text}"
                if sound and name in self._config.acts_on and step > self._config.after:
                    self._act(step, text)
                if name not in self._told:
                    warnings.append(f"warning: {text}")
                self._active.add(name)
                self._told.add(name)
            elif limit.recovered_at(value):
                self._active.discard(name)
                self._told.discard(name)
        return warnings

    def _act(self, step: int, text: str) -> None:
        config = self._config
        if config.action == "stop":
            raise CollapseError(f"{text} (stopped: config.collapse.action is 'stop')")
        if config.action == "back" and self.returns < config.max_returns:
            rate = config.rate_factor ** (self.returns + 1)
            raise GoBack(
                step,
                f"{text}; going back to step {self.healthy:,}, at {rate:g} of the learning rate "
                f"({self.returns + 1} of {config.max_returns} times)",
            )
        if config.action == "back":
            raise CollapseError(
                f"{text} (stopped: to go back to step {self.healthy:,} {self.returns} times, at "
                f"{self.rate:g} of the learning rate at last, has not helped)"
            )
