"""MAE on images, beside data2vec.

    python -m data2vec_jax.train --config=vision_mae:like --workdir=DIR \
        --config.data.source=folder:/data/imagenet

Variants: like (everything but masks, decoder, targets and loss is `vision_v2:base`, and an image
has one mask), paper (the authors' recipe of ViT-B, 800 epochs), smoke (4 steps on the digits
shipped inside). Numbers: baselines spec 2.
"""

from ml_collections import ConfigDict

from data2vec_jax.configs import common, vision_v2

OF_A_PAPER = False  # of data2vec: tests/test_baselines.py has its numbers


def like(c: ConfigDict) -> None:
    """Makes a config of data2vec 2.0 MAE's, with the decoder of its authors."""
    common.without_teacher(c, "mae", normalise=True)
    c.objective.decoder = dict(width=512, depth=8, heads=16, mlp=2048)
    c.mask = dict(kind="independent", ratio=0.75)
    del c.model["decoder"], c.model["head"]
    c.model.mask_embedding = False  # masked patches are not seen


def get_config(variant: str = "like") -> ConfigDict:
    c = common.beside(vision_v2, variant)
    like(c)
    if variant == "paper":
        steps = c.total_steps = 249_600  # 800 epochs of 312 steps
        c.model.update(initializer="xavier", class_std=0.02)
        c.model.encoder.norm = "pre"
        c.data.batch_size = 4096
        # 1.5e-4 for each 256 rows
        c.schedule = dict(kind="cosine", peak=2.4e-3, warmup=40 * 312 / steps)
        c.optim = dict(
            betas=(0.9, 0.95), eps=1e-8, weight_decay=0.05, no_decay=(r"(^|/)(bias|scale)$",)
        )
    elif variant == "smoke":
        c.objective.decoder = dict(width=16, depth=1, heads=2, mlp=32)
    return c
