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
SHARDS = f"array_record:{CORPORA}/shards"


def network(c: ConfigDict) -> None:
    """Six blocks of width 128, and all of them in the targets."""
    c.model.width = 128
    c.model.encoder.update(depth=6, mlp=256)
    c.objective.top_k = 6


def digits(c: ConfigDict) -> None:
    """MNIST, 50,000 images: 8 passes."""
    network(c)
    c.data.update(source=f"{SHARDS}/mnist", eval_split="dev", batch_size=32)
    common.short_run(c, 12_000)


def pictures(c: ConfigDict) -> None:
    """1,400 drawings of 64 pixels: 68 passes."""
    network(c)
    c.model.update(image=64, patch=8, mean=(0.5,) * 3, std=(0.5,) * 3)
    # Half of a drawing at least: there are few, and they are large enough to be cut.
    c.examples.update(image=64, channels=3, flip=0.5, scale=(0.5, 1.0), aspect=(3 / 4, 4 / 3))
    c.data.update(source=f"{SHARDS}/emoji", eval_split="dev", batch_size=32)
    common.short_run(c, 3_000)


def speech(c: ConfigDict) -> None:
    """83 minutes of one reader, 520 sentences: 80 passes."""
    network(c)
    c.data.update(source=f"manifest:{CORPORA}/phones.tsv", eval_split="dev")
    common.short_run(c, 30_000)
    c.schedule.peak = 4e-3  # half of the rule's: sounds collapse at it, and this run is long


def sounds(c: ConfigDict) -> None:
    """1,160 notes of 112 instruments, 1.28 s of each: 80 passes."""
    network(c)
    c.model.update(mean=-5.4, std=5.2)
    c.data.update(source=f"{SHARDS}/instruments", eval_split="dev", batch_size=16)
    common.short_run(c, 6_000)
    c.schedule.peak = 2e-3  # the front end collapses at the rule's, and this run is long


def texts(c: ConfigDict) -> None:
    """77 MB of descriptions, glosses, a dictionary, manuals and essays: less than one pass."""
    c.model.update(width=128, vocab_size=8_000, max_length=64)
    c.model.encoder.update(depth=2, mlp=256)
    c.objective.top_k = 2
    c.examples.update(lengths=(64,), mode="none", vocab_size=8_000)
    c.data.update(source=f"{SHARDS}/texts", split="train", batch_size=32)
    common.short_run(c, 8_000)
    c.schedule.peak = 2e-3  # texts collapse at twice the rule's, and this run is long
    if "decoder" in c.model:
        c.objective.clones = 2  # there is more text than time for masks of it


NAMES: dict[str, tuple[str, Callable[[ConfigDict], None]]] = {
    "digits": ("vision", digits),
    "pictures": ("vision", pictures),
    "speech": ("speech", speech),
    "sounds": ("sound", sounds),
    "texts": ("text", texts),
}


def get_config(variant: str = "digits,v2") -> ConfigDict:
    name, _, version = variant.partition(",")
    if name not in NAMES or version not in ("v1", "v2"):
        choices = ", ".join(f"{name},v1 and {name},v2" for name in NAMES)
        raise ValueError(f"no variant '{variant}'; choose from {choices}")
    modality, change = NAMES[name]
    c = demo.get_config(f"{modality},{version}")
    change(c)
    if "decoder" in c.model:  # 2.0
        c.model.decoder.width = 64
    else:  # 1.0 on digits collapses at the rule's rate, at update 1,200 of 12,000
        c.schedule.peak = 2e-3
    c.log_every = c.total_steps // 100
    c.checkpoint = dict(every=c.total_steps // 20, keep=1, keep_every=c.total_steps // 10)
    return c
