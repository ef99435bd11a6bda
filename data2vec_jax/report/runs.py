"""Reads workdirs: a run's scalars and config, a demo's probe scores, what the monitor says."""

import dataclasses
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data2vec_jax.core.config import check_section, with_current_names
from data2vec_jax.core.errors import UserError
from data2vec_jax.core.trees import flatten
from data2vec_jax.metrics.collapse import SHARES, CollapseConfig, CollapseMonitor, Limit
from data2vec_jax.metrics.writer import FILE, Line, read_lines

SUMMARY = "summary.json"  # of a demo's folder


@dataclasses.dataclass(frozen=True)
class RunRecord:
    """One run: its folder's name, the lines of metrics.jsonl by split, its config and limits."""

    name: str
    splits: Mapping[str, Sequence[Line]]
    config: Mapping[str, Any]
    collapse: CollapseConfig

    @property
    def train(self) -> Sequence[Line]:
        return self.splits.get("train", ())

    @property
    def limits(self) -> Mapping[str, Limit]:
        """Scalar -> the limit beyond which this run's collapse monitor warns."""
        highest = {
            name: max((line[name] for line in self.train if name in line), default=0.0)
            for name in SHARES
        }
        return self.collapse.limits(highest)

    def scalars(self, split: str) -> list[str]:
        """Names of a split's scalars, in order of appearance."""
        found = dict.fromkeys(name for line in self.splits.get(split, ()) for name in line)
        return [name for name in found if name not in ("step", "split")]

    def options(self) -> dict[str, Any]:
        """The config with dotted names."""
        return flatten(self.config, separator=".", keep_empty=True)

    def warnings(self) -> list[str]:
        """What is wrong in the last training line: non-finite scalars, the monitor's alarms."""
        if not self.train:
            return []
        last = self.train[-1]
        found = []
        broken = [name for name, value in last.items() if not math.isfinite(value)]
        if broken:
            found.append(f"step {last['step']:,}: not finite: {', '.join(broken)}")
        monitor = CollapseMonitor(dataclasses.replace(self.collapse, action="warn"))
        for line in self.train[:-1]:
            monitor.watch(line)
        alarms = monitor.check(last["step"], last)
        return found + [alarm.removeprefix("warning: ") for alarm in alarms]


@dataclasses.dataclass(frozen=True)
class ProbeScores:
    """Scores of one probe by seed, before and after pretraining, as the demo wrote them.

    hand_made: score of hand-made features, `reference` their name. block: which features of the
    pretrained network it is of, by the first seed. verdict: in words. dev: {'untrained': {features:
    score}, 'pretrained': ...} on the dev split. Demos of old have none of these.
    """

    recipe: str
    probe: str
    untrained: Sequence[float]
    pretrained: Sequence[float]
    hand_made: float | None = None
    reference: str = "hand-made"
    block: str = ""
    verdict: str = ""
    dev: Mapping[str, Mapping[str, float]] = dataclasses.field(default_factory=dict)

    @property
    def label(self) -> str:
        return f"{self.recipe} · {self.probe.replace('_', ' ')}"

    def scaled(self, factor: float) -> "ProbeScores":
        """All scores times a factor."""
        return dataclasses.replace(
            self,
            untrained=[factor * v for v in self.untrained],
            pretrained=[factor * v for v in self.pretrained],
            hand_made=None if self.hand_made is None else factor * self.hand_made,
            dev={
                side: {k: factor * v for k, v in found.items()} for side, found in self.dev.items()
            },
        )


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises UserError: there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error})") from None
    except OSError as error:
        raise UserError(f"cannot read '{path}': {error.strerror}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} does not hold an object")
    return content


def read_run(folder: Path) -> RunRecord:
    """Reads metrics.jsonl and config.json, whichever are there.

    Lines cut short by a crash are left out. Raises UserError: a file cannot be read, or the
    config's section `collapse` is wrong.
    """
    splits: dict[str, list[Line]] = {}
    if (folder / FILE).exists():
        try:
            lines = read_lines(folder / FILE)
        except OSError as error:
            raise UserError(f"cannot read '{folder / FILE}': {error.strerror}") from None
        for line in lines:
            numbers = {k: v for k, v in line.items() if isinstance(v, (int, float))}
            splits.setdefault(str(line["split"]), []).append(numbers)
    for lines in splits.values():
        lines.sort(key=lambda line: line["step"])
    config = read_json(folder / "config.json") if (folder / "config.json").exists() else {}
    config = with_current_names(config)
    section = config.get("collapse", {})
    check_section("collapse", section, CollapseConfig)
    return RunRecord(folder.name, splits, config, CollapseConfig(**section))


def read_groups(workdir: Path) -> dict[str, list[RunRecord]]:
    """The runs in `GROUP/seed*/` and `GROUP/` below a demo's folder, by group."""
    groups: dict[str, list[RunRecord]] = {}
    found = [*workdir.glob(f"*/seed*/{FILE}"), *workdir.glob(f"*/{FILE}")]
    for path in sorted(found, key=_natural):
        run = read_run(path.parent)
        groups.setdefault(path.relative_to(workdir).parts[0], []).append(run)
    return groups


def probe_scores(summary: Mapping[str, Any]) -> list[ProbeScores]:
    """The probes in a demo's summary.json that have scores both before and after pretraining."""
    found = []
    for recipe, entry in summary.items():
        for probe, scores in entry.items() if isinstance(entry, Mapping) else ():
            if not isinstance(scores, Mapping):
                continue
            before, after = (
                [float(v) for v in scores.get(side) or () if isinstance(v, (int, float))]
                for side in ("untrained", "pretrained")
            )
            if before and after:
                details = _details(entry, probe, scores)
                found.append(ProbeScores(recipe, probe, before, after, **details))
    return found


def _details(entry: Mapping[str, Any], probe: str, scores: Mapping[str, Any]) -> dict[str, Any]:
    """The optional fields of `ProbeScores`, of a demo's entry for a recipe."""

    def part(name: str) -> Mapping[str, Any]:
        found = entry.get(name)
        found = found.get(probe) if isinstance(found, Mapping) else None
        return found if isinstance(found, Mapping) else {}

    found: dict[str, Any] = {}
    if isinstance(scores.get("hand_made"), (int, float)):
        found["hand_made"] = float(scores["hand_made"])
    if isinstance(entry.get("hand_made"), str):
        found["reference"] = entry["hand_made"]
    if part("blocks").get("pretrained"):
        found["block"] = str(part("blocks")["pretrained"][0])
    if isinstance(entry.get("verdict"), Mapping):
        found["verdict"] = str(entry["verdict"].get(probe, ""))
    sides = {side: part("dev").get(side) for side in ("untrained", "pretrained")}
    if all(isinstance(side, Mapping) and side for side in sides.values()):
        found["dev"] = sides
    return found


def _natural(path: Path) -> list[Any]:
    """Sorts seed2 before seed10."""
    return [(int(p) if p.isdigit() else 0, p) for p in re.split(r"(\d+)", str(path))]
