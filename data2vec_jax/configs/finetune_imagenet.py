"""Fine-tuning for image classification: ViT-B and ViT-L on ImageNet-1K.

    python -m data2vec_jax.train --config=finetune_imagenet:base --workdir=DIR \
        --init_from=PRETRAINED --config.data.source=imagenet:/data/imagenet

Variants: base, large (data2vec 1.0); base_v2, large_v2, huge_v2 (2.0); demo (a minute on a CPU, on
the digits shipped inside; start from a run of configs/demo.py:vision or :vision,v2), smoke. Linear
probes, the encoder frozen: base_mae, large_mae, demo_mae (batch norm and LARS), base_dino,
large_dino, demo_dino (class token and mean, SGD).
PRETRAINED: a workdir, or what `python -m data2vec_jax.convert ... --to=jax` wrote. Without
--init_from the network is trained from scratch. Numbers: the authors' README commands (1.0) and
mae_imagenet_{base,large,huge}_clean.yaml (2.0); the probes: linear evaluation of MAE and of DINO.
"""

from ml_collections import ConfigDict

from data2vec_jax.configs import common

IMAGES = 1_281_167
HALF = (0.5, 0.5, 0.5)  # 1.0 fine-tunes with these statistics, not with ImageNet's


def get_config(variant: str = "base") -> ConfigDict:
    name, _, version = variant.partition("_")
    epoch = IMAGES // 1024
    c = common.finetuning(
        task="classify",
        modality="vision",
        steps=100 * epoch,
        eval_every=5 * epoch,
    )
    c.model = dict(  # from scratch; --init_from brings its own
        width=768,
        image=224,
        patch=16,
        shared_relative=True,
        mask_embedding=False,
        encoder=dict(
            depth=12,
            heads=12,
            mlp=3072,
            norm="pre",
            eps=1e-6,
            qkv_bias="qv",
            layer_scale=0.1,
            remat="auto",
        ),
    )
    # The head has a norm of its own.
    c.model_overrides = dict(mean=HALF, std=HALF, final_norm=False)
    c.model_overrides.encoder = dict(drop_path=0.2, dropout=0.0, attention_dropout=0.0)
    # Each block's own table of relative positions, as in the released files.
    c.model_overrides.shared_relative = False
    c.model_overrides.encoder.relative = (14, 14)
    c.checkpoint.every = epoch
    c.head = dict(name="image", classes=1000, pooling="mean", start=1e-3)
    c.examples = dict(
        image=224,
        channels=3,
        scale=(0.08, 1.0),
        aspect=(3 / 4, 4 / 3),
        flip=0.5,
        operations=2,
        magnitude=9.0,
        crop=224 / 256,
    )
    c.data.update(
        source="imagenet:/data/imagenet",
        split="train",
        eval_split="val",
        batch_size=1024,
        share=1.0,
        workers=16,
    )
    c.loss = dict(
        smoothing=0.1, mixup=0.8, cutmix=1.0, mix_probability=1.0, switch=0.5, erasing=0.25
    )
    c.scoring = dict(metrics=("accuracy", "top5_accuracy"))
    c.layerwise_lr = dict(decay=0.65, slow_embeddings=True)
    c.schedule = dict(kind="cosine", peak=4e-3, floor=1e-6, inclusive=True, warmup=10 / 100)
    c.optim = dict(
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=0.0,
        no_decay=(r"(/|q_|v_)bias$", r"scale\d?$", "class_token$", "(^|/)positions$"),
    )

    if version == "v2":
        _version2(c, name)
    elif version in ("mae", "dino") and name in ("base", "large", "demo"):
        if name == "demo":
            _small(c, name)
        _probe(c, name, version)
    elif variant == "large":
        c.model.width = 1024
        c.model.encoder.update(depth=24, heads=16, mlp=4096)
        c.model_overrides.encoder.drop_path = 0.25
        c.total_steps = 50 * epoch
        c.optim.weight_decay = 0.05
        c.schedule.update(peak=5e-3, warmup=5 / 50)
    elif variant in ("demo", "smoke"):
        _small(c, variant)
    elif variant != "base":
        _unknown(variant)
    return c


def _version2(c: ConfigDict, name: str) -> None:
    sizes = {"base": (768, 12, 12), "large": (1024, 24, 16), "huge": (1280, 32, 16)}
    if name not in sizes:
        _unknown(f"{name}_v2")
    base, huge = name == "base", name == "huge"
    width, depth, heads = sizes[name]
    c.total_steps = 250_200 if base else 125_200  # 100 and 50 epochs of 2,502 and 2,504 steps
    c.model = dict(
        width=width,
        image=224,
        patch=14 if huge else 16,
        shared_relative=False,
        sincos=True,
        initializer="bert",
        mask_embedding=False,
        encoder=dict(depth=depth, heads=heads, mlp=4 * width, norm="post", eps=1e-6, remat="auto"),
    )
    c.model_overrides = dict(encoder=dict(drop_path=0.1 if base else 0.2, dropout=0.0))
    c.head.start = 1.0
    c.data.batch_size = 512
    c.loss.update(mixup=0.7, mix_probability=0.9)
    c.layerwise_lr = dict(decay=0.65 if base else 0.75, slow_embeddings=False)
    peak, floor = (1e-3, 1e-6) if base else (5e-4, 1e-20 if huge else 1e-7)
    c.schedule = dict(
        kind="cosine", peak=peak, floor=floor, start=floor, warmup=16_000 / c.total_steps
    )
    c.optim.update(betas=(0.9, 0.95), weight_decay=0.05)
    if not base:
        c.optim.clip = 4.0


def _small(c: ConfigDict, variant: str) -> None:
    """The network of configs/demo.py:vision, on the digits."""
    c.update(total_steps=600, log_every=10, eval_every=200, dtype="float32")
    c.model = common.DEMO_VISION | dict(mask_embedding=False)
    c.model_overrides = dict(encoder=dict(drop_path=0.1))
    c.head.update(classes=10, start=1.0)
    c.examples.update(image=28, channels=1, scale=(0.6, 1.0), flip=0.0, operations=0, crop=1.0)
    c.data.update(source="samples:digits", eval_split="test", batch_size=32, workers=0)
    c.loss = dict(smoothing=0.1, erasing=0.25)
    c.layerwise_lr.decay = 0.75
    c.schedule.update(peak=2e-3, inclusive=False, warmup=0.1)
    c.optim.weight_decay = 0.05
    c.checkpoint.every = 100
    if variant == "smoke":
        c.update(total_steps=4, log_every=1, eval_every=0)
        c.model.width = 32
        c.model.encoder.update(depth=2, mlp=64)
        c.data.update(batch_size=8, share=0.1)
        c.loss.update(mixup=0.8, cutmix=1.0)
        c.examples.operations = 2


def _probe(c: ConfigDict, name: str, protocol: str) -> None:
    c.model_overrides = ConfigDict()  # the encoder, and its pixels, are as in pretraining
    c.head = dict(name="linear_probe", classes=c.head.classes)
    c.examples.operations = 0
    c.loss = ConfigDict()
    del c.layerwise_lr
    c.optim = dict(frozen=(r"^(?!task/output/)",), momentum=0.9, weight_decay=0.0)
    mae, demo = protocol == "mae", name == "demo"
    c.head.update(pooling="mean" if mae else "class+mean", batch_norm=mae)
    c.optim.kind = "lars" if mae else "sgd"
    batch, rate, warmup = (16_384, 0.1, 10) if mae else (1_024, 0.001, 0)
    epochs = (50 if name == "large" else 90) if mae else 100
    peak = rate * batch / 256
    if demo:  # sizes of ours
        batch, epochs, warmup, peak = 128, 20, warmup / 4, 6.4 if mae else 0.1
    epoch = (4_000 if demo else IMAGES) // batch
    c.total_steps, c.eval_every, c.data.batch_size = epochs * epoch, epochs // 4 * epoch, batch
    c.schedule = dict(kind="cosine", peak=peak, warmup=warmup / epochs)


def _unknown(variant: str) -> None:
    raise ValueError(
        f"no variant '{variant}'; choose from base, large, base_v2, large_v2, "
        "huge_v2, {base,large,demo}_{mae,dino}, demo, smoke"
    )
