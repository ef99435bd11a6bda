"""Fine-tuning for the classes of sounds, as EAT (arXiv 2401.03497): AudioSet, ESC-50, words.

    python -m data2vec_jax.train --config=finetune_sound:as20k --workdir=DIR \
        --init_from=PRETRAINED --config.data.source=audioset:/data/audioset

Variants: as2m, as20k (AudioSet, whole and balanced), esc50 (a run for each fold, by data.split and
data.eval_split), spc2 (Speech Commands 2); demo (a minute on a CPU, on the sounds shipped inside;
start from a run of configs/demo.py:sound,v2), smoke.
PRETRAINED: a workdir, or what `python -m data2vec_jax.convert ... --to=jax` wrote. Without
--init_from the network is trained from scratch. Audio must have 16 kHz.
Numbers: the authors' scripts/finetuning_*.sh (docs/spec/sound.md section 6). They choose the best
checkpoint of ESC-50 by the test fold; here the last one counts. Evaluation leaves out sounds of
less than examples.min_samples, as training does.
"""

from ml_collections import ConfigDict

from data2vec_jax.configs import common

SPC2_STD = 5.565


def get_config(variant: str = "as20k") -> ConfigDict:
    steps = 40_000
    c = common.finetuning(task="classify", modality="sound", steps=steps, eval_every=4_000)
    c.model = dict(  # from scratch; --init_from brings its own
        width=768,
        frames=1024,
        mask_embedding=False,
        encoder=dict(depth=12, heads=12, mlp=3072, norm="post", eps=1e-6, remat="auto"),
    )
    c.model_overrides = dict(frames=1024, mean=-4.268, std=4.569, encoder=dict(drop_path=0.1))
    c.head = dict(
        name="image",
        classes=527,
        pooling="class",
        class_norm=True,
        problem="multi_label_classification",
    )
    c.examples = dict(frames=1024, roll=True, noise=0.0, min_samples=10_000)
    c.data.update(
        source="audioset:/data/audioset",
        split="balanced_train",
        eval_split="eval",
        batch_size=48,
        balanced_draws=0,
        share=1.0,
        workers=16,
    )
    c.loss = dict(
        binary="labels",
        smoothing=0.0,
        mixup=0.8,
        mix_probability=0.9,
        mask_frames=0.2,
        mask_bins=0.2,
    )
    c.scoring = dict(metrics=("mean_average_precision",))
    c.layerwise_lr = dict(decay=0.65, slow_embeddings=False)
    c.schedule = dict(kind="cosine", peak=5e-5, floor=1e-6, start=1e-6, warmup=0.1)
    c.optim = dict(betas=(0.9, 0.95), eps=1e-8, weight_decay=0.05)

    if variant == "as2m":
        c.update(total_steps=300_000, eval_every=25_000)
        c.data.update(
            split="balanced_train+unbalanced_train", batch_size=96, balanced_draws=200_000
        )
    elif variant == "esc50":
        c.update(total_steps=4_000, eval_every=1_000)
        c.model.frames = c.examples.frames = c.model_overrides.frames = 512
        c.model_overrides.update(mean=-6.627, std=5.359)
        c.data.update(
            source="esc50:/data/ESC-50", split="fold2+fold3+fold4+fold5", eval_split="fold1"
        )
        c.head.update(classes=50, problem="single_label_classification")
        c.loss = dict(smoothing=0.1, mixup=0.0, mask_frames=0.4, mask_bins=0.4)
        c.scoring.metrics = ("accuracy",)
    elif variant == "spc2":
        c.model.frames = c.examples.frames = c.model_overrides.frames = 128
        c.model_overrides.update(mean=-6.846, std=SPC2_STD)
        # Up to 0.1, added after the division by 2 std; words may be shorter than other sounds.
        c.examples.update(noise=0.1 * 2 * SPC2_STD, min_samples=400)
        c.data.update(
            source="speech_commands:/data/speech_commands",
            eval_split="validation,test",
            batch_size=256,
        )
        c.data.split = "train"
        c.head.update(classes=35, problem="single_label_classification")
        c.loss.binary = "rows"
        c.schedule.peak = 2e-4
        c.scoring.metrics = ("accuracy",)
    elif variant in ("demo", "smoke"):
        _small(c, variant)
    elif variant != "as20k":
        choices = "as2m, as20k, esc50, spc2, demo, smoke"
        raise ValueError(f"no variant '{variant}'; choose from {choices}")
    return c


def _small(c: ConfigDict, variant: str) -> None:
    """The network of configs/demo.py:sound,v2, on the instruments."""
    c.update(total_steps=200, log_every=10, eval_every=100, dtype="float32")
    c.model = dict(
        width=96,
        frames=192,
        mean=-6.3,
        std=4.5,
        initializer="small",
        mask_embedding=False,
        encoder=dict(depth=4, heads=4, mlp=192, norm="post", eps=1e-6),
    )
    c.model_overrides = dict(encoder=dict(drop_path=0.1))
    c.head.update(classes=8, problem="single_label_classification")
    c.examples.frames = 192
    c.data.update(
        source="samples:sounds", split="train", eval_split="test", batch_size=8, workers=0
    )
    c.loss.binary = "rows"
    c.layerwise_lr.decay = 0.75
    c.schedule.peak = 2e-3
    c.scoring.metrics = ("accuracy",)
    c.checkpoint.every = 100
    if variant == "smoke":
        c.update(total_steps=4, log_every=1, eval_every=0)
        c.model.width = 32
        c.model.encoder.update(depth=2, mlp=64)
        c.data.balanced_draws = 16
        c.examples.noise = 1.0
