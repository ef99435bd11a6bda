"""What the train step of each smoke config compiles to, against numbers kept in compiled.json.

A change that makes a step larger shows here without a stopwatch: products, bytes, fusions, messages
between devices, memory. The numbers are those of a CPU with eight simulated devices, and belong to
a minor version of JAX; with another version they may differ by a factor of two and no more. After a
change that is meant, or to add a version:

    python tests/test_compiled.py
"""

import importlib.util
import json
import re
import sys
from pathlib import Path

import conftest  # sets the number of devices, also where this file is a script
import jax
import pytest

from data2vec_jax.bench.measure import peak_bytes
from data2vec_jax.core import sharding
from data2vec_jax.core.run import Run
from data2vec_jax.tasks import pretrain

FILE = Path(__file__).with_name("compiled.json")
CONFIGS = ("speech_v1", "speech_v2", "text_v1", "text_v2", "vision_v1", "vision_v2")
VERSION = ".".join(jax.__version__.split(".")[:2])
# Relative, and for counts this many more. XLA's own counts; it visits the body of a loop once.
TOLERANCE = {"flops": 0.02, "bytes_accessed": 0.05, "peak_bytes": 0.05, "fusions": 0.03}
SPARE = {"fusions": 2}
COLLECTIVES = r" (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("


def compiled(name: str) -> dict[str, float]:
    """The numbers of the smoke variant of configs/NAME.py."""
    path = conftest.ROOT / "configs" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config("smoke").to_dict()
    mesh = sharding.make_mesh(**config["mesh"])
    with jax.set_mesh(mesh):
        task = pretrain.abstract_task(config)
        program = Run(config, task, mesh).program(task.shapes[-1])
    cost, text = program.cost_analysis(), program.as_text()
    found = re.findall(COLLECTIVES, text)
    counts = {kind: found.count(kind) for kind in sorted(set(found))}
    return {
        "flops": cost["flops"], "bytes_accessed": cost["bytes accessed"],
        "peak_bytes": peak_bytes(program), "fusions": len(re.findall(r" fusion\(", text)),
        "collectives": counts,
    }  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_compiled_step_has_not_grown_or_shrunk(name):
    kept = json.loads(FILE.read_text())
    known = VERSION in kept
    expected = kept[VERSION if known else max(kept)][name]
    now = compiled(name)
    for number, tolerance in TOLERANCE.items():
        tolerance = tolerance if known else 1.0
        spare = SPARE.get(number, 0)
        low, high = expected[number] / (1 + tolerance), expected[number] * (1 + tolerance)
        assert low - spare <= now[number] <= high + spare, (
            f"{name}: {number} was {expected[number]:g} and is {now[number]:g}; if that is meant, "
            "run python tests/test_compiled.py"
        )
    if known:
        assert now["collectives"] == expected["collectives"]


def test_this_version_is_among_the_kept_where_tests_are_run_for_every_change():
    assert "0.10" in json.loads(FILE.read_text())


if __name__ == "__main__":
    kept = json.loads(FILE.read_text()) if FILE.exists() else {}
    kept[VERSION] = {name: compiled(name) for name in CONFIGS}
    FILE.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n")
    sys.stdout.write(f"{FILE}: {VERSION}\n")
