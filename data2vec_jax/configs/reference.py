"""The reference runs: small encoders pretrained for an hour or two on two CPU cores.

    python launch/experiments/corpora.py          the data, once
    python launch/reference.py                    pretrains, probes, fine-tunes and exports all

A variant is a corpus and a version: "digits,v1", "digits,v2". Widths, lengths and rates are ours;
docs/small_scale.md has what they were chosen by. `data2vec_jax.load("reference:digits")` opens what
they learned.
"""

from collections.abc import Callable

from ml_collections import ConfigDict

from data2vec_jax.configs import common, demo

OF_A_PAPER = False  # so tests/recipes.json has no rows of it
CORPORA = "runs/corpora"


def digits(c: ConfigDict) -> None:
    """MNIST, 50,000 images: 8 passes."""
    c.model.width = 128
    c.model.encoder.update(depth=6, mlp=256)
    c.objective.top_k = 6
    c.data.update(source=f"array_record:{CORPORA}/mnist", eval_split="dev", batch_size=32)
    common.short_run(c, 12_000)
    if "decoder" in c.model:
        c.model.decoder.width = 64


NAMES: dict[str, tuple[str, Callable[[ConfigDict], None]]] = {"digits": ("vision", digits)}


def get_config(variant: str = "digits,v2") -> ConfigDict:
    name, _, version = variant.partition(",")
    if name not in NAMES or version not in ("v1", "v2"):
        choices = ", ".join(f"{name},v1 and {name},v2" for name in NAMES)
        raise ValueError(f"no variant '{variant}'; choose from {choices}")
    modality, change = NAMES[name]
    c = demo.get_config(f"{modality},{version}")
    change(c)
    c.log_every = c.total_steps // 100
    c.checkpoint = dict(every=c.total_steps // 20, keep=1, keep_every=c.total_steps // 10)
    return c
