"""BYOL on images, beside data2vec.

    python -m data2vec_jax.train --config=vision_byol:like --workdir=DIR \
        --config.data.source=folder:/data/imagenet

Variants: like (everything but views, head, targets and loss is `vision_v2:base`), paper (the
authors' heads, views, optimiser and schedules of 1,000 epochs; but with ViT-B, as there is no
ResNet here), smoke (4 steps on the digits shipped inside). Numbers: baselines spec 6.
At first the class tokens of all images are nearly alike, and batch norms enlarge the rounding of
bfloat16: in small networks use --config.dtype=float32.
"""

from ml_collections import ConfigDict

from data2vec_jax.configs import common, vision_v2

OF_A_PAPER = False  # of data2vec: tests/test_views.py has its numbers


def like(c: ConfigDict) -> None:
    """Makes a config of data2vec 2.0 BYOL's."""
    common.of_views(c, "byol")
    c.averaged = ("",)  # projector, too
    c.examples.scale = (0.08, 1.0)


def get_config(variant: str = "like") -> ConfigDict:
    c = common.beside(vision_v2, variant)
    like(c)
    if variant == "paper":
        c.total_steps = 312_000  # 1,000 epochs of 312 steps
        c.model.encoder.norm = "pre"
        c.data.batch_size = 4096
        c.ema = dict(start=0.996, end=1.0, anneal=1.0, kind="cosine", lag=1)
        # 0.2 for each 256 rows
        c.schedule = dict(kind="cosine", peak=3.2, warmup=10 / 1_000)
        c.optim = dict(kind="lars", weight_decay=1.5e-6, no_decay=(r"(^|[/_])(bias|scale)$",))
    elif variant == "smoke":
        c.objective.update(hidden=32, size=16)
    return c
