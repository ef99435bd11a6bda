"""The notebook, executed as a student would: what it prints must be what it promises."""

import json
import os
import re
import sys
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")
pytest.importorskip("transformers")

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "launch/colab/pretrain_and_convert.ipynb"


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def printed(cell):
    return "".join(out.get("text", "") for out in cell.outputs if out.output_type == "stream")


def kernel_of_this_python(folder, monkeypatch):
    """Name of a kernel that runs this interpreter, whatever kernels the machine has."""
    place = folder / "jupyter/kernels/this"
    place.mkdir(parents=True)
    argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    described = {"argv": argv, "display_name": "this", "language": "python"}
    (place / "kernel.json").write_text(json.dumps(described))
    monkeypatch.setenv("JUPYTER_PATH", str(folder / "jupyter"))
    return "this"


def test_the_notebook_runs_and_keeps_its_promises(tmp_path, monkeypatch):
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    name = kernel_of_this_python(tmp_path, monkeypatch)
    work = tmp_path / "work"
    work.mkdir()
    client = nbclient.NotebookClient(
        notebook, kernel_name=name, timeout=1800, resources={"metadata": {"path": str(work)}}
    )
    one_device = {"XLA_FLAGS": "", "PYTHONPATH": str(ROOT)}  # as on a student's machine
    client.execute(env=os.environ | one_device)
    text = [printed(cell) for cell in code_cells(notebook)]
    whole = "\n".join(text).replace("\r", "")  # what commands print comes through a terminal

    assert not (work / "checkout").exists()  # it was importable, so nothing was fetched
    accuracy = {
        name: float(value)
        for name, value in re.findall(r"^(\w+) +linear probe ([\d.]+)%", whole, re.M)
    }
    assert accuracy.keys() == {"untrained", "pretrained"}
    assert accuracy["pretrained"] > accuracy["untrained"] + 1
    layers = [float(x) for x in re.findall(r"^layer \d+ +worst difference (\S+)", whole, re.M)]
    verified = [float(x) for x in re.findall(r"^difference .* (\S+)$", whole, re.M)]
    assert len(layers) == 5 and len(verified) >= 6
    assert max(layers) < 1e-5 and max(verified) < 1e-4
    (back,) = re.findall(r"jax -> torch -> jax: worst difference (\S+)", whole)
    assert float(back) < 1e-5


def test_it_is_short_and_stored_without_outputs():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    cells = code_cells(notebook)
    assert 0 < len(cells) <= 10
    assert not any(cell.outputs or cell.execution_count for cell in cells)
    address = "launch/colab/pretrain_and_convert.ipynb)"
    assert f"[![Open in Colab]({BADGE})](" in (ROOT / "README.md").read_text("utf-8")
    assert address in (ROOT / "README.md").read_text("utf-8")


BADGE = "https://colab.research.google.com/assets/colab-badge.svg"
