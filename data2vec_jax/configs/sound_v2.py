"""data2vec 2.0, sound: pretraining of EAT (arXiv 2401.03497) on AudioSet.

    python -m data2vec_jax.train --config=sound_v2:base --workdir=DIR \
        --config.data.source=audioset:/data/audioset

Variants: base, large, smoke (4 steps on the sounds shipped inside).
Numbers: the authors' config/pretraining_AS2M.yaml, and for large what docs/spec/sound.md sections 3
and 5 say. Audio must have 16 kHz. The clips' spectrograms are padded or cut to 1,024 frames
(10.24 s). For shorter sounds lower model.frames and examples.frames; below 3 s mask.width, too.
"""

from ml_collections import ConfigDict

from data2vec_jax.configs import common


def get_config(variant: str = "base") -> ConfigDict:
    steps = 400_000  # 10 epochs of 1.9 M clips
    c = common.pretraining(
        modality="sound",
        steps=steps,
        seed=1,
        averaged=("^(?!decoder/|head/)",),  # the teacher owns all that it uses
    )
    c.model = dict(
        width=768,
        frames=1024,
        mean=-4.268,  # of AudioSet
        std=4.569,
        # Post-norm, with one norm before the first block and none after the last; no dropout.
        encoder=dict(depth=12, heads=12, mlp=3072, norm="post", eps=1e-6, remat="auto"),
        decoder=dict(layers=6, width=768, kernel=3, groups=16, residual=True),
        head=dict(initializer="torch"),
    )
    c.mask = dict(kind="inverse_blocks", ratio=0.8, adjust=0.07, width=5)
    c.objective = dict(
        name="data2vec2",
        clones=16,
        top_k=12,
        target="ffn",
        layer_norms=("instance",),
        final_norms=("layer",),
        beta=0.0,
        scale="rsqrt_width",
        noise_std=0.01,
        # The yaml's cls_loss 1 multiplies a sum over the rows of one GPU, which is then divided
        # like the regression: (12 clips x 16 masks) rows x the mean over rows.
        class_weight=192.0,
    )
    c.examples = dict(frames=1024, min_samples=10_000)  # shorter clips are left out
    # 12 clips x 4 GPUs.
    c.data.update(
        source="audioset:/data/audioset",
        split="balanced_train+unbalanced_train",
        batch_size=48,
        workers=16,
    )
    c.ema = dict(start=0.9998, end=0.99999, anneal=100_000 / steps)
    c.schedule = dict(kind="cosine", peak=5e-4, warmup=53_333 / steps)
    # Everything decays: the yaml's exception for biases and norms has no effect in the code.
    c.optim = dict(betas=(0.9, 0.95), eps=1e-8, eps_on="raw", weight_decay=0.05, clip=4.0)
    c.collapse = dict(min_target_std=0.0, min_pred_std=0.0)  # the yaml switches the guard off

    if variant == "large":
        c.model.width = 1024
        c.model.encoder.update(depth=24, heads=16, mlp=4096)
        c.model.decoder.update(layers=3, width=1024, kernel=5)
        c.mask.update(ratio=0.75, adjust=0.1)
        c.objective.top_k = 24
        c.ema.anneal = 150_000 / steps
        c.schedule.peak = 4e-4
    elif variant == "smoke":
        c.update(total_steps=4, log_every=1, dtype="float32")
        c.model.update(width=32, frames=192)
        c.model.encoder.update(depth=3, heads=4, mlp=64)
        c.model.decoder.update(layers=2, width=32)
        c.mask.width = 3
        c.objective.update(clones=2, top_k=3)
        c.examples.frames = 192
        c.data.update(source="samples:sounds", split="train", batch_size=8, workers=0)
    elif variant != "base":
        raise ValueError(f"no variant '{variant}'; choose from base, large, smoke")
    return c
