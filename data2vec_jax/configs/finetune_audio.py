"""Fine-tuning for the class of a sound: any folder with a folder of sounds for each class.

    python -m data2vec_jax.train --config=finetune_audio:base --workdir=DIR \
        --init_from=PRETRAINED --config.data.source=folder:/data/sounds --config.head.classes=N

Variants: base; demo (a minute on a CPU; a network as configs/demo.py:speech has, for a folder of
your own). PRETRAINED: a workdir, or what `python -m data2vec_jax.convert ... --to=jax` wrote.
Sounds of several classes each: a manifest with a column `labels` (numbers, '0,17'),
head.problem=multi_label_classification and scoring.metrics=('mean_average_precision',).
Numbers: the authors' audio classification, whose mixing of sounds and pooling are not here.
"""

from ml_collections import ConfigDict

from data2vec_jax.configs import common


def get_config(variant: str = "base") -> ConfigDict:
    if variant not in ("base", "demo"):
        raise ValueError(f"no variant '{variant}'; choose from base, demo")
    steps = 30_000
    c = common.finetuning(
        task="classify",
        modality="speech",
        steps=steps,
        eval_every=steps // 10,
    )
    c.model = dict(  # from scratch; --init_from brings its own
        width=768,
        dropout=0.1,
        positions=dict(depth=5, width=95, groups=16),
        encoder=dict(depth=12, heads=12, mlp=3072, norm="post", remat="auto"),
    )
    c.model_overrides = dict(dropout=0.1, frontend=dict(gradient=0.0))
    c.model_overrides.encoder = dict(
        dropout=0.1, attention_dropout=0.2, activation_dropout=0.1, layerdrop=0.1
    )
    c.head = dict(name="utterance", classes=10, projection=256)
    c.head.problem = "single_label_classification"
    c.examples = dict(seconds=(2.5, 5.0, 10.0), cut=True)
    c.data.update(
        source="folder:/data/sounds",
        split="train",
        eval_split="test",
        batch_size=128,
        rows_multiple_of=8,
        share=1.0,
        workers=8,
    )
    c.loss = dict(time_prob=0.6, time_width=5)
    c.scoring = dict(metrics=("accuracy", "macro_f1"))
    c.schedule = dict(kind="cosine", peak=6e-5, warmup=5_000 / steps)
    c.optim = dict(betas=(0.9, 0.98), eps=1e-8, eps_on="raw", weight_decay=0.0)
    c.optim.frozen = (r"^frontend/(conv\d+/|norm\d+/|time_norm/)",)
    if variant == "demo":
        c.update(total_steps=300, log_every=10, eval_every=100, dtype="float32")
        common.demo_speech(c)
        c.model.dropout = 0.0
        c.model_overrides = dict(encoder=dict(dropout=0.1))
        c.head.projection = 96
        c.examples.seconds = (2.0,)
        c.data.update(batch_size=16, workers=0)
        c.loss.time_prob = 0.0
        c.schedule.update(peak=1e-3, warmup=0.1)
        c.optim.frozen = ()
        c.checkpoint.every = 100
    return c
