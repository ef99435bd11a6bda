"""The package as pip installs it, away from the checkout: commands, recipes, samples, templates."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(program, *arguments) -> what it did in an empty folder, where it sees the package alone."""
    source, target, work = (tmp_path_factory.mktemp(n) for n in ("source", "target", "work"))
    # A copy, as building leaves folders behind.
    skip = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "data2vec_jax", source / "data2vec_jax", ignore=skip)
    for name in ("pyproject.toml", "requirements.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    options = ("--no-deps", "--no-build-isolation", "--quiet", "--target", str(target))
    subprocess.run([sys.executable, "-m", "pip", "install", *options, str(source)], check=True)
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "XLA_FLAGS")}
    env |= {"PYTHONPATH": str(target)}

    def run(program, *arguments):
        path = target / "bin" / program if program.startswith("data2vec") else program
        return subprocess.run(
            [str(path), *arguments], cwd=work, env=env, capture_output=True, text=True
        )

    return run


def test_a_run_is_trained_reported_converted_and_loaded(run):
    done = run("data2vec-train", "--config=vision_v2:smoke", "--workdir=w")
    assert done.returncode == 0, done.stderr
    for command in (
        ("data2vec-report", "w"),
        ("data2vec-convert", "w", "exported", "--to=hf"),
        (
            sys.executable,
            "-c",
            "import data2vec_jax, numpy; print(data2vec_jax.__file__); "
            "model = data2vec_jax.load('exported'); "
            "print(model(numpy.zeros((2, 28, 28, 1), numpy.uint8)).last_hidden_state.shape)",
        ),
    ):
        done = run(*command)
        assert done.returncode == 0, done.stderr
    assert "(2, 50, 32)" in done.stdout and str(ROOT) not in done.stdout


def test_help_and_mistakes(run):
    done = run("data2vec-evaluate", "--help")
    assert done.returncode == 0 and "--compare" in done.stdout, done.stderr
    done = run("data2vec-train", "--config=visoin_v2:smoke", "--workdir=x")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "did you mean 'vision_v2'" in done.stderr
