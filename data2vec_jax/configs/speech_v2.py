"""data2vec 2.0, speech: pretraining on LibriSpeech 960 h (base) and Libri-light 60k h (large).

    python -m data2vec_jax.train --config=speech_v2:base --workdir=DIR \
        --config.data.source=manifest:/data/librispeech/train.tsv

Variants: base, large, smoke (4 steps on the speech shipped inside).
Numbers: config/v2/{base,large}_audio_only_task.yaml of the authors.
"""

from ml_collections import ConfigDict

from data2vec_jax.configs import common


def get_config(variant: str = "base") -> ConfigDict:
    steps = 400_000
    c = common.pretraining(
        modality="speech",
        steps=steps,
        seed=1,
        averaged=("^positions/", "^alibi/", "^norm/", "^encoder/"),
    )
    c.model = dict(
        width=768,
        dropout=0.1,
        positions=dict(depth=5, width=95, groups=16),
        alibi=dict(scale=1.0, learned=True, per_head=True, per_layer=False),
        encoder=dict(
            depth=12,
            heads=12,
            mlp=3072,
            norm="post",
            dropout=0.1,
            attention_dropout=0.1,
            layerdrop=0.05,
            remat="auto",
        ),
        decoder=dict(layers=4, width=384, kernel=7, groups=16, residual=True, dropout=0.1),
    )
    # Spans are masked, as in the yaml; the paper's general text speaks of spans that are kept.
    c.mask = dict(kind="block_spans", ratio=0.5, adjust=0.05, width=5)
    c.objective = dict(
        name="data2vec2",
        clones=8,
        top_k=8,
        target="ffn",
        layer_norms=("instance",),
        final_norms=(),
        beta=0.0,
        scale="rsqrt_width",
        noise_std=0.01,
    )
    # The authors crop to the shortest row of a batch; four lengths keep the programs few.
    c.examples = dict(crops=(4.0, 8.0, 12.0, 15.0))
    # 8.3 minutes of audio a batch (1.0 M samples x 8 GPUs): 32 rows of 15 s are 8 minutes.
    c.data.update(
        source="manifest:/data/librispeech/train.tsv",
        split="train",
        batch_size=32,
        rows_multiple_of=8,
        workers=16,
    )
    c.ema = dict(start=0.999, end=0.99999, anneal=75_000 / steps)
    c.schedule = dict(kind="cosine", peak=7.5e-4, warmup=8_000 / steps)
    c.optim = dict(betas=(0.9, 0.98), eps=1e-6, eps_on="raw", weight_decay=0.01)  # no clipping
    c.checkpoint = dict(every=5_000, keep=2, keep_every=50_000)
    c.collapse = dict(min_target_std=0.1, min_pred_std=0.01, after=5000, action="stop")

    if variant == "large":
        steps = c.total_steps = 600_000
        c.model.width = 1024
        c.model.encoder.update(depth=24, heads=16, mlp=4096, layerdrop=0.0)
        c.model.decoder.width = 768
        c.mask.update(ratio=0.55, adjust=0.1)
        # The lowest 8 of the 24 blocks are the authors' "prenet", and never targets.
        c.objective.update(clones=12, top_k=16)
        # 16 minutes (0.32 M samples x 48 GPUs): 64 rows of 15 s.
        c.data.update(source="manifest:/data/librilight/train.tsv", batch_size=64)
        c.ema = dict(start=0.9997, end=1.0, anneal=300_000 / steps)  # then the teacher is frozen
        c.schedule.update(peak=4e-4, warmup=10_000 / steps)
        c.optim.clip = 1.0
    elif variant == "smoke":
        c.update(total_steps=4, log_every=1, dtype="float32")
        c.model.width = 32
        c.model.frontend = dict(convs=((16, 10, 5),) + ((16, 3, 2),) * 4 + ((16, 2, 2),) * 2)
        c.model.encoder.update(depth=2, heads=4, mlp=64)
        c.model.decoder.update(layers=2, width=32)
        c.objective.update(clones=2, top_k=2)
        c.examples.crops = (2.0,)
        c.data.update(source="samples:speech", batch_size=8, rows_multiple_of=8, workers=0)
    elif variant != "base":
        raise ValueError(f"no variant '{variant}'; choose from base, large, smoke")
    return c
