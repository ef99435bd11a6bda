"""The package stays readable: sizes of files and functions, and lengths of parameter lists."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "data2vec_jax"
LINES_OF_A_FILE, LINES_OF_A_FUNCTION, PARAMETERS = 600, 120, 10
FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_sizes(path):
    text = path.read_text()
    assert len(text.splitlines()) <= LINES_OF_A_FILE
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            names = [
                a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
            ]
            names = [name for name in names if name not in ("self", "cls")]
            assert len(names) <= PARAMETERS, f"{node.name}: {names}"
            length = node.end_lineno - node.lineno + 1
            assert length <= LINES_OF_A_FUNCTION, f"{node.name}: {length} lines"


def test_formatting_is_switched_off_in_few_places():
    root = PACKAGE.parent
    files = [
        p for folder in ("data2vec_jax", "launch", "tests") for p in (root / folder).rglob("*.py")
    ]
    marks = sum(path.read_text().count("# fmt: " + "skip") for path in files)
    assert marks <= 20, marks
