"""The demo: small models on the real samples shipped inside, on a laptop's CPU.

    bash launch/local.sh                     # pretrains, probes and reports all three
    python -m data2vec_jax.train --config=configs/demo.py:speech --workdir=DIR

Variants: speech, vision, text. Sizes and schedules are ours, scaled to about a minute: a teacher
must follow a short run fast, so its decay starts at 0.99 rather than 0.999.
"""

import importlib.util
from pathlib import Path

from ml_collections import ConfigDict


def _smoke(name: str) -> ConfigDict:
    path = Path(__file__).with_name(f"{name}_v1.py")
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config("smoke")


def get_config(variant: str = "vision") -> ConfigDict:
    if variant not in ("speech", "vision", "text"):
        raise ValueError(f"no variant '{variant}'; choose from speech, vision, text")
    c = _smoke(variant)
    c.update(log_every=10, total_steps=600)
    c.model.width = 96
    c.model.encoder.update(depth=4, heads=4, mlp=192)
    c.objective.update(top_k=4)
    c.checkpoint = dict(every=200, keep=1)
    c.collapse = dict(warn_after=100)
    return c
