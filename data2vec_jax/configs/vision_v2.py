"""data2vec 2.0, vision: pretraining of ViT-B, ViT-L and ViT-H on ImageNet-1K.

    python -m data2vec_jax.train --config=vision_v2:base --workdir=DIR \
        --config.data.source=folder:/data/imagenet

Variants: base, large, huge (patches of 16), huge14 (patches of 14), smoke (4 steps on the digits
shipped inside).
Numbers: config/v2/{base,large,huge,huge14}_images_only_task.yaml of the authors. The batches of
base and large there are too small for the paper's epochs (150 of ViT-L would be batches of 512,
here they are 37.5); only huge14 agrees with the paper. We keep the yaml.
"""

from ml_collections import ConfigDict

from data2vec_jax.configs import common


def get_config(variant: str = "base") -> ConfigDict:
    steps = 375_300  # 75 epochs of 256 images
    c = common.pretraining(
        modality="vision",
        steps=steps,
        seed=1,
        averaged=("^(?!decoder/|head/)",),  # the teacher owns all that it uses
    )
    c.model = dict(
        width=768,
        image=224,
        patch=16,
        sincos=True,
        shared_relative=False,
        initializer="bert",
        # Post-norm, with one norm before the first block and none after the last; no dropout.
        encoder=dict(depth=12, heads=12, mlp=3072, norm="post", eps=1e-6, remat="auto"),
        decoder=dict(layers=6, width=768, kernel=3, groups=16, residual=True),
        head=dict(initializer="torch"),
    )
    c.mask = dict(kind="inverse_blocks", ratio=0.8, adjust=0.07, width=3)
    c.objective = dict(
        name="data2vec2",
        clones=16,
        top_k=10,  # the lowest 2 of the 12 blocks are the authors' "prenet", and never targets
        target="ffn",
        layer_norms=("instance",),
        final_norms=("layer",),
        beta=0.0,
        scale="rsqrt_width",
        noise_std=0.01,
        # The yaml's cls_loss 0.01 multiplies a sum over the rows of one GPU, which is then divided
        # like the regression: 0.01 x (16 images x 16 masks) rows x the mean over rows.
        class_weight=2.56,
    )
    c.examples = dict(image=224, jitter=0.0, flip=0.5, scale=(0.2, 1.0), aspect=(3 / 4, 4 / 3))
    # 16 images x 16 GPUs.
    c.data.update(source="folder:/data/imagenet", split="train", batch_size=256, workers=16)
    c.ema = dict(start=0.9998, end=0.99999, anneal=100_000 / steps)
    c.schedule = dict(kind="cosine", peak=1e-3, warmup=50_040 / steps)
    # Everything decays: the yaml's exception for biases and norms has no effect in the code.
    c.optim = dict(betas=(0.9, 0.95), eps=1e-8, eps_on="raw", weight_decay=0.05, clip=4.0)
    c.collapse = dict(min_target_std=0.0, min_pred_std=0.0)  # the yaml switches the guard off

    if variant in ("large", "huge", "huge14"):
        c.mask.update(ratio=0.75, adjust=0.1)
        c.schedule.peak = 4e-4
        c.data.batch_size = 128  # 8 images x 16 GPUs
        c.objective.class_weight = 1.28  # 0.01 x (8 images x 16 masks)
        c.model.decoder.update(layers=3, width=1024, kernel=5)
    if variant == "large":
        c.model.width = 1024
        c.model.encoder.update(depth=24, heads=16, mlp=4096)
        c.objective.top_k = 18
        c.ema.anneal = 150_000 / steps  # the paper's table: up to 1.0 over 500,000 updates
    elif variant in ("huge", "huge14"):
        c.model.width = 1280
        c.model.encoder.update(depth=32, heads=16, mlp=5120)
        c.objective.top_k = 24  # paper: 32
        c.ema.update(end=0.99995, anneal=150_000 / steps)
        if variant == "huge14":
            steps = c.total_steps = 500_000  # 100 epochs
            c.model.patch = 14
            c.data.batch_size = 256  # 8 images x 32 GPUs
            c.ema.update(end=1.0, anneal=300_000 / steps)  # then the teacher is frozen
            c.schedule.warmup = 50_040 / steps
    elif variant == "smoke":
        c.update(total_steps=4, log_every=1, dtype="float32")
        c.model.update(width=32, image=28, patch=4, mean=(0.5,), std=(0.5,))
        c.model.encoder.update(depth=3, heads=4, mlp=64)
        c.model.decoder.update(layers=2, width=32)
        c.objective.update(clones=2, top_k=2)
        c.examples.update(image=28, channels=1, flip=0.0, scale=(0.5, 1.0))
        c.data.update(source="samples:digits", batch_size=8, workers=0)
    elif variant not in ("base", "large"):
        choices = "base, large, huge, huge14, smoke"
        raise ValueError(f"no variant '{variant}'; choose from {choices}")
    return c
