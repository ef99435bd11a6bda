"""Cases recorded from the authors' code, and comparison with them at the README's tolerances."""

import dataclasses
import functools
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

FOLDER = Path(os.environ.get("DATA2VEC_GOLDENS", Path(__file__).parent / "goldens/pretraining"))
NAMES = sorted(path.stem for path in FOLDER.glob("*.json"))

# Checkpoints of other code bases; each folder in it is a case.
CHECKPOINTS = Path(
    os.environ.get("DATA2VEC_CHECKPOINT_GOLDENS", Path(__file__).parent / "goldens/checkpoints")
)
CHECKPOINT_CASES = sorted(path.name for path in CHECKPOINTS.iterdir() if path.is_dir())
SEGMENTATION = 5e-4  # absolute, of the outputs of a model for segmentation; of others 1e-4

# The README's tolerances: largest difference over largest value, unless the comment says otherwise.
ACTIVATION, LOSS, NORM, GRADIENT, TRACE, SCHEDULE = 3e-5, 1e-5, 2e-5, 2e-4, 2e-4, 1e-6
ELEMENT, LENGTH = 1e-3, 3e-4  # final student: single elements, and relative L2 of a tensor

# Each program runs a few times on tiny arrays: compile it in a third of the time.
quick_jit = functools.partial(
    jax.jit,
    compiler_options={
        "xla_backend_optimization_level": 0,
        "xla_llvm_disable_expensive_passes": True,
    },
)


@dataclasses.dataclass(frozen=True)
class Case:
    """One recorded case: its json and its arrays."""

    name: str
    info: Mapping[str, Any] = dataclasses.field(repr=False)
    arrays: Mapping[str, np.ndarray] = dataclasses.field(repr=False)

    def part(self, prefix: str) -> dict[str, np.ndarray]:
        """Arrays whose name starts with `prefix`, under the rest of their name."""
        return {k[len(prefix) :]: v for k, v in self.arrays.items() if k.startswith(prefix)}


@functools.cache
def load(name: str) -> Case:
    """The case whose files have this base name."""
    with np.load(FOLDER / f"{name}.npz") as arrays:
        info = json.loads((FOLDER / f"{name}.json").read_text())
        return Case(name, info, {key: arrays[key] for key in arrays.files})


class Comparison:
    """Compares arrays of a case, each once, and keeps the worst relative error of each stage.

    slack: factor on what is allowed.
    """

    def __init__(self, case: Case, slack: float = 1.0):
        self.case, self.left, self.slack = case, set(case.arrays), slack
        self.worst: dict[str, float] = {}
        self.wrong: list[str] = []

    def skip(self, *prefixes: str) -> None:
        """Arrays that are inputs."""
        self.left = {name for name in self.left if not name.startswith(prefixes)}

    def theirs(self, name: str) -> np.ndarray:
        self.left.discard(name)
        return self.case.arrays[name]

    def note(self, stage: str, name: str, error: float, allowed: float) -> None:
        """Records an error that was measured elsewhere."""
        self.worst[stage], allowed = max(self.worst.get(stage, 0.0), error), allowed * self.slack
        if not error <= allowed:
            self.wrong.append(f"{name}: {error:.2g} > {allowed:.2g}")

    def check(self, stage: str, name: str, ours, allowed: float) -> None:
        """Largest difference over largest value."""
        theirs, ours = self.theirs(name), np.asarray(ours)
        if ours.shape != theirs.shape:
            self.wrong.append(f"{name}: shape {ours.shape}, recorded {theirs.shape}")
            return
        difference = np.abs(ours.astype(np.float64) - theirs)
        error = difference.max(initial=0.0) / (np.abs(theirs).max(initial=0.0) or 1.0)
        self.note(stage, name, float(error), allowed)

    def finish(self) -> dict[str, float]:
        """Worst error of each stage; fails if anything was wrong, or was not compared."""
        if self.left:
            self.wrong.append(f"arrays that no test knows: {sorted(self.left)[:5]}")
        assert not self.wrong, "; ".join(self.wrong[:10]) + f"\n{line(self.worst)}"
        return self.worst


def line(worst: Mapping[str, float]) -> str:
    """'features 1.2e-07  layers ...'."""
    return "  ".join(f"{stage} {error:.1e}" for stage, error in worst.items())
