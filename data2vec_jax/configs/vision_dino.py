"""DINO on images, beside data2vec.

    python -m data2vec_jax.train --config=vision_dino:like --workdir=DIR \
        --config.data.source=folder:/data/imagenet

Variants: like (everything but views, head, targets and loss is `vision_v2:base`), paper (defaults
of the authors' code for ViT-B/16: 100 epochs, 1,024 images; the arguments of their published
weights are not in it), smoke (4 steps on the digits shipped inside). Numbers: baselines spec 6.
"""

from ml_collections import ConfigDict

from data2vec_jax.configs import common, vision_v2

OF_A_PAPER = False  # of data2vec: tests/test_views.py has its numbers


def like(c: ConfigDict) -> None:
    """Makes a config of data2vec 2.0 DINO's."""
    common.of_views(c, "dino")
    c.averaged = ("^(?!pretext/centre)",)  # all that is learned
    c.examples.scale = (0.4, 1.0)
    # As large, beside the image, as theirs: 96 of 224 pixels.
    c.examples.views.update(local=8, local_image=c.examples.image * 3 // 7)


def get_config(variant: str = "like") -> ConfigDict:
    c = common.beside(vision_v2, variant)
    like(c)
    if variant == "paper":
        epoch = 1_251  # steps of 1,024 images
        steps = c.total_steps = 100 * epoch
        c.model.update(absolute=True, sincos=False, class_std=0.02)
        c.model.encoder.update(norm="pre", drop_path=0.1)
        c.objective.update(frozen_updates=epoch)
        c.data.batch_size = 1024
        c.ema = dict(start=0.996, end=1.0, anneal=1.0, kind="cosine", lag=1)
        # 5e-4 for each 256 rows
        c.schedule = dict(kind="cosine", peak=2e-3, floor=1e-6, warmup=10 * epoch / steps)
        c.schedule.inclusive = True
        c.optim = dict(
            weight_decay=0.04,
            weight_decay_end=0.4,
            no_decay=(r"(^|/)(bias|scale)$", "^pretext/centre"),
            clip=3.0,
            clip_each=True,
        )
    elif variant == "smoke":
        c.objective.update(outputs=64, hidden=32, size=16)
    return c
