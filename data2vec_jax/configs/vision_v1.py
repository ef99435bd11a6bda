"""data2vec 1.0, vision: pretraining of ViT-B and ViT-L on ImageNet-1K.

    python -m data2vec_jax.train --config=vision_v1:base --workdir=DIR \
        --config.data.source=folder:/data/imagenet

Variants: base (800 epochs), large (stage 1 of 2), smoke (4 steps on the digits shipped inside).
Numbers: README commands of the authors' vision code; the paper where the comment says so.
"""

from ml_collections import ConfigDict, config_dict

from data2vec_jax.configs import common


def get_config(variant: str = "base") -> ConfigDict:
    steps = 500_000  # 800 epochs of 625 steps
    c = common.pretraining(
        modality="vision",
        steps=steps,
        seed=0,
        averaged=("",),  # the teacher owns every parameter
    )
    c.model = dict(
        width=768,
        image=224,
        patch=16,
        shared_relative=True,
        encoder=dict(
            depth=12,
            heads=12,
            mlp=3072,
            norm="pre",
            eps=1e-6,
            qkv_bias="qv",
            layer_scale=1e-4,
            attention_dropout=0.05,
            remat="auto",
            drop_path=0.25,  # paper: 0.2
        ),
    )
    c.mask = dict(kind="blocks", count=120, min_patches=16)
    c.objective = dict(
        name="data2vec1",
        top_k=6,
        target="block",
        layer_norms=("layer",),
        final_norms=("layer",),
        beta=2.0,
        scale="mean",
    )
    c.examples = dict(image=224, jitter=0.4, flip=0.5, scale=(0.08, 1.0), aspect=(3 / 4, 4 / 3))
    c.data.update(source="folder:/data/imagenet", split="train", batch_size=2048, workers=16)
    c.data.update(eval_split=config_dict.placeholder(str), eval_batches=8)  # for eval_every > 0
    c.ema = dict(start=0.9998, end=0.9998, anneal=0.0, lag=1)
    c.schedule = dict(
        kind="cosine",
        peak=2e-3,
        floor=1e-5,
        inclusive=True,
        warmup=10 / 800,  # epochs; paper: 40
    )
    c.optim = dict(
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=0.05,
        clip=3.0,
        # 1-D parameters, biases and the class token do not decay; the mask token does.
        no_decay=(r"(/|q_|v_)bias$", "scale", "class_token", "^positions$"),
    )
    c.collapse = dict(min_target_std=0.0, min_pred_std=0.0)  # no guard in the authors' code

    if variant == "large":
        c.model.width = 1024
        c.model.encoder.update(
            depth=24, heads=16, mlp=4096, layer_scale=1e-5, attention_dropout=0.15, drop_path=0.2
        )
        c.data.batch_size = 4096  # README; paper: 8192
        c.total_steps = 249_600  # 800 epochs of 312 steps
        c.schedule.update(peak=1e-3, warmup=80 / 800)  # stage 2: ema 0.9999, warm-up 40 epochs
    elif variant == "smoke":
        c.update(total_steps=4, log_every=1, dtype="float32")
        c.model.update(width=32, image=28, patch=4, mean=(0.5,), std=(0.5,))
        c.model.encoder.update(depth=2, heads=4, mlp=64)
        c.mask.update(count=30, min_patches=4)
        c.objective.top_k = 2
        c.examples.update(image=28, channels=1, jitter=0.0, flip=0.0, scale=(0.5, 1.0))
        c.data.update(eval_split="test", source="samples:digits", batch_size=8, workers=0)
        c.schedule.warmup = 0.25
    elif variant != "base":
        raise ValueError(f"no variant '{variant}'; choose from base, large, smoke")
    return c
