"""I-JEPA on images, beside data2vec.

    python -m data2vec_jax.train --config=vision_ijepa:like --workdir=DIR \
        --config.data.source=folder:/data/imagenet

Variants: like (everything but masks, predictor, targets and loss is `vision_v2:base`, and an image
has one mask), paper (the authors' recipe of ViT-H/14, 300 epochs), smoke (4 steps on the digits
shipped inside). Numbers: baselines spec 7.
"""

from ml_collections import ConfigDict

from data2vec_jax.configs import common, vision_v2

OF_A_PAPER = False  # of data2vec: tests/test_views.py has its numbers


def like(c: ConfigDict) -> None:
    """Makes a config of data2vec 2.0 I-JEPA's, with a predictor for ViT-B."""
    c.averaged = ("^(?!pretext/)",)  # all but the predictor
    c.objective = dict(name="ijepa", beta=1.0)
    c.objective.predictor = dict(width=384, depth=6, heads=12, mlp=1536)
    c.mask = dict(kind="multiblock", kept=0.4, targets=4)
    del c.model["decoder"], c.model["head"]
    c.model.mask_embedding = False  # masked patches are not seen


def get_config(variant: str = "like") -> ConfigDict:
    c = common.beside(vision_v2, variant, "huge14" if variant == "paper" else "base")
    like(c)
    if variant == "paper":
        c.total_steps = 187_500  # 300 epochs of 625 steps
        c.objective.predictor.update(depth=12, heads=16)
        c.mask.update(scale=(0.15, 0.2), aspect=(0.75, 1.5), context=(0.85, 1.0), corners="authors")
        c.model.class_tokens = 0
        c.model.encoder.norm = "pre"
        c.examples.update(scale=(0.3, 1.0), flip=0.0)
        c.data.batch_size = 2048
        c.ema = dict(start=0.996, end=1.0, anneal=1.0, lag=1)
        c.schedule = dict(kind="cosine", peak=1e-3, start=2e-4, floor=1e-6, warmup=40 / 300)
        c.optim = dict(weight_decay=0.04, weight_decay_end=0.4, no_decay=(r"(^|/)(bias|scale)$",))
    elif variant == "smoke":
        c.objective.predictor = dict(width=16, depth=1, heads=2, mlp=32)
    return c
