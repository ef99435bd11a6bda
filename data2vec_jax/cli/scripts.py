"""The console scripts: each does what `python -m data2vec_jax.NAME` does."""

import functools
import os
import runpy
import sys


def run(name: str) -> None:
    """Runs a command of the package as the main module."""
    # `python -m` searches the current folder for modules, a console script does not. A modality of
    # the user's own may stand there (`config.modality='my_lab.eeg'`).
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    runpy.run_module(f"data2vec_jax.{name}", run_name="__main__", alter_sys=True)


train = functools.partial(run, "train")
evaluate = functools.partial(run, "evaluate")
convert = functools.partial(run, "convert")
plan = functools.partial(run, "plan")
bench = functools.partial(run, "bench")
report = functools.partial(run, "report")
ablate = functools.partial(run, "ablate")
prepare = functools.partial(run, "prepare")
