"""Who may import whom: DESIGN's arrows point down only, and flax.linen stays inside its fence."""

import ast
import fnmatch
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from data2vec_jax.modalities import contract

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
    "cluster": 4,
    "evaluate": 4,
    "ablate": 4,
    "plan": 4,
    "bench": 4,
    "report": 4,
    "prepare": 4,
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
    inside = "models" in path.parts or path.name in ("model.py", "frontend.py", "contract.py")
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


# Files outside modalities/ that may name a modality, or the array that it reads, and why.
MAY_NAME = {
    "cluster.py": "labels of frames of speech",
    "configs/*": "a recipe is of a modality",
    "convert/beit.py": "layout of others: BEiT's vision checkpoints",
    "convert/eat.py": "layout of others: EAT's checkpoints of sound, which call it an image",
    "convert/fairseq.py": "layout of others: fairseq has a class for each",
    "convert/fairseq_v2.py": "layout of others: fairseq has one model of the papers' modalities",
    "convert/hf.py": "layout of others: Hugging Face has a class for each",
    "convert/hf_v2.py": "layout of others: our PyTorch file has a branch for each",
    "convert/hf_vision.py": "layout of others: Hugging Face has a class for each",
    "convert/modeling_data2vec2.py": "the PyTorch file itself, which cannot import this package",
    "data/codecs/*": "a library of codecs, of which modalities pick; its fields have these names",
    "bench/torch_baseline.py": "a class of Hugging Face's for each",
    "models/heads.py": "the names of heads, which configs hold: 'image'",
    "tasks/answer.py": "questions about texts",
    "tasks/transcribe.py": "transcripts of speech",
}


def modality_names() -> set[str]:
    """Names of the shipped modalities and of the arrays that they read."""
    records = [contract.get(name) for name in contract.names()]
    arrays = {r.inference.input for r in records if r.inference}
    return {r.name for r in records} | {r.codec.field for r in records} | arrays


def naming(text: str, names: set[str]) -> list[str]:
    """Lines of a file that hold a string equal to one of `names`, or import a modality's module."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in names:
            found.append(f"line {node.lineno}: '{node.value}'")
    places = re.finditer(
        r"^ *(?:from|import) data2vec_jax\.modalities\.(?!contract)\w+", text, re.M
    )
    return found + [match[0].strip() for match in places]


def allowed(path: Path) -> str | None:
    """The pattern of `MAY_NAME` that a file of the package matches."""
    name = path.relative_to(PACKAGE).as_posix()
    return next((pattern for pattern in MAY_NAME if fnmatch.fnmatch(name, pattern)), None)


def test_no_file_outside_of_modalities_names_one():
    names = modality_names()
    assert {"speech", "text", "vision", "audio", "image", "tokens"} <= names
    used = set()
    for path in FILES:
        if "modalities" in path.relative_to(PACKAGE).parts and path.name != "contract.py":
            continue
        if found := naming(path.read_text(), names):
            used.add(allowed(path))
            assert allowed(path), f"{path.relative_to(ROOT)} names a modality: {found}"
    assert used == set(MAY_NAME), "an exception that nothing needs"


@pytest.mark.parametrize(
    "text",
    [
        "if config['modality'] == 'speech': pass",
        "x = batch['image']",
        "FORWARD = {'text': 1}",
        "from data2vec_jax.modalities.vision import model",
        "    from data2vec_jax.modalities.speech.frontend import frames",
    ],
)
def test_a_name_is_found(text):
    assert naming(textwrap.dedent(text), modality_names())
    assert not naming("from data2vec_jax.modalities import contract\ntexts = 'a text'", {"text"})


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
