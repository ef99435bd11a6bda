"""SimMIM on images, beside data2vec.

    python -m data2vec_jax.train --config=vision_simmim:like --workdir=DIR \
        --config.data.source=folder:/data/imagenet

Variants: like (everything but head, targets and loss is `vision_v1:base`, whose masks have SimMIM's
number of patches), paper (the authors' recipe of ViT-B, 800 epochs), smoke (4 steps on the digits
shipped inside). Numbers: baselines spec 3.
"""

from ml_collections import ConfigDict

from data2vec_jax.configs import common, vision_v1

OF_A_PAPER = False  # of data2vec: tests/test_baselines.py has its numbers


def like(c: ConfigDict) -> None:
    """Makes a config of data2vec 1.0 SimMIM's."""
    common.without_teacher(c, "simmim")


def get_config(variant: str = "like") -> ConfigDict:
    c = common.beside(vision_v1, variant)
    like(c)

    if variant == "paper":
        c.mask = dict(kind="cells", ratio=0.6, side=2)  # squares of 32 x 32 pixels
        c.model.encoder.update(layer_scale=0.1, drop_path=0.1, attention_dropout=0.0)
        c.examples.update(scale=(0.67, 1.0), jitter=0.0)
        # 1e-4 for each 512 rows, from 5e-7, and a tenth from epoch 700 of 800 on. Their batch of
        # ViT-B is not known; 2,048 is that of their command for Swin.
        c.schedule = dict(
            kind="tri_stage",
            peak=4e-4,
            start_scale=0.005,
            warmup=10 / 800,
            hold=690 / 800,
            decay=1 / c.total_steps,
            end_scale=0.1,
        )
        c.optim.clip = 5.0
    return c
