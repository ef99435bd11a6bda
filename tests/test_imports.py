"""Who may import whom: DESIGN's arrows point down only, and flax.linen stays inside its fence."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "data2vec_jax"
FILES = sorted(PACKAGE.rglob("*.py"))

# Lower numbers know nothing of higher ones. Infrastructure is 0, commands are the last.
LAYERS = {
    "core": 0,
    "data": 0,
    "masking": 0,
    "metrics": 0,
    "cli": 0,
    "models": 1,
    "objectives": 2,
    "modalities": 2,
    "tasks": 3,
    "train": 4,
    "train_ngram": 4,
    "evaluate": 4,
    "plan": 4,
    "bench": 4,
    "report": 4,
    "convert": 4,
    "configs": 4,
}


def imports(path: Path) -> list[str]:
    """Dotted names that a file imports, wherever in the file."""
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def part(dotted: str) -> str:
    return dotted.split(".")[1]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_arrows_point_down(path):
    own = path.relative_to(ROOT).with_suffix("").parts[1]
    if own == "__init__":
        return
    for name in imports(path):
        if not name.startswith("data2vec_jax.") or part(name) == own:
            continue
        assert LAYERS[part(name)] <= LAYERS[own], f"{own} imports {name}"
        assert part(name) != "convert", f"only load and tests import convert, not {own}"
        if {own, part(name)} == {"objectives", "modalities"}:
            pytest.fail(f"{own} imports {name}: objectives receive models, and never name them")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_linen_stays_inside_the_fence(path):
    inside = "models" in path.parts or path.name == "model.py" or path.name == "contract.py"
    uses = [name for name in imports(path) if name.startswith("flax.linen")]
    assert inside or not uses
    forbidden = ("nn.scan", "nn.remat", "nn.vmap", "nn.jit", "with_logical_partitioning", ".sow(")
    assert not [word for word in forbidden if word in path.read_text()]


def test_modalities_do_not_know_each_other():
    for path in (PACKAGE / "modalities").rglob("*.py"):
        own = path.parent.name
        for name in imports(path):
            parts = name.split(".")
            if parts[:2] == ["data2vec_jax", "modalities"] and own != "modalities":
                assert parts[2] in (own, "contract"), f"{path} imports {name}"


def test_no_module_is_called_utils():
    assert not [p for p in FILES if "util" in p.stem or "helper" in p.stem]


def test_import_is_light_and_without_side_effects():
    code = (
        "import sys, data2vec_jax; heavy = {'jax', 'flax', 'torch', 'tensorflow', 'numpy'};"
        "print(sorted(heavy & set(sys.modules)))"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert out.stdout.strip() == "[]"


def test_core_never_imports_other_frameworks():
    code = (
        "import sys, data2vec_jax.train; print(sorted({m.split('.')[0] for m in sys.modules}"
        " & {'torch', 'tensorflow', 'transformers', 'matplotlib', 'jinja2'}))"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert out.stdout.strip() == "[]"
