"""data2vec 1.0, speech: pretraining on LibriSpeech 960 h (base) and Libri-light 60k h (large).

    python -m data2vec_jax.train --config=speech_v1:base --workdir=DIR \
        --config.data.source=manifest:/data/librispeech/train.tsv

Variants: base, large, smoke (4 steps on the speech shipped inside).
Numbers: base_librispeech.yaml of the authors; the paper where the comment says so.
"""

from ml_collections import ConfigDict, config_dict

from data2vec_jax.configs import common


def get_config(variant: str = "base") -> ConfigDict:
    steps = 400_000
    c = common.pretraining(
        modality="speech",
        steps=steps,
        seed=1,
        averaged=("^encoder/", "^norm/"),  # positions and front end are the student's
    )
    c.model = dict(
        width=768,
        dropout=0.1,
        positions=dict(depth=5, width=95, groups=16),
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
    )
    # The authors cut every row to the smallest count of its batch, 44 to 46 % of the frames with 8
    # rows; a fixed share makes the count independent of the batch.
    c.mask = dict(kind="spans", prob=0.65, width=10, masked=0.45)
    c.objective = dict(
        name="data2vec1",
        top_k=8,
        target="ffn",
        layer_norms=("instance",),
        final_norms=(),
        beta=0.0,
        scale="rsqrt_width",
    )
    # The authors crop to the shortest row of a batch; four lengths keep the programs few.
    c.examples = dict(crops=(4.0, 8.0, 12.0, 15.0))
    # 63.3 minutes of audio a batch (3.8 M samples x 16 GPUs): 256 rows of 15 s are 64 minutes.
    c.data.update(
        source="manifest:/data/librispeech/train.tsv",
        split="train",
        batch_size=256,
        rows_multiple_of=64,
        workers=16,
    )
    c.data.update(eval_split=config_dict.placeholder(str), eval_batches=8)  # for eval_every > 0
    c.ema = dict(start=0.999, end=0.9999, anneal=30_000 / steps)
    c.schedule = dict(kind="tri_stage", peak=5e-4, warmup=0.03, hold=0.9, decay=0.07)
    c.optim = dict(betas=(0.9, 0.98), eps=1e-6, eps_on="raw", weight_decay=0.01)
    c.checkpoint = dict(every=5_000, keep=2, keep_every=50_000)
    c.collapse = dict(min_target_std=0.1, min_pred_std=0.01, after=5000, action="stop")

    if variant == "large":  # only the size is published; the rest is the base recipe
        c.model.width = 1024
        c.model.encoder.update(depth=24, heads=16, mlp=4096)
        c.data.source = "manifest:/data/librilight/train.tsv"
    elif variant == "smoke":
        c.update(total_steps=4, log_every=1, dtype="float32")
        c.model.width = 32
        c.model.frontend = dict(
            convs=(
                (16, 10, 5),
                (16, 3, 2),
                (16, 3, 2),
                (16, 3, 2),
                (16, 3, 2),
                (16, 2, 2),
                (16, 2, 2),
            )
        )
        c.model.encoder.update(depth=2, heads=4, mlp=64)
        c.objective.top_k = 2
        c.examples.crops = (2.0,)
        c.data.update(
            eval_split="test", source="samples:speech", batch_size=8, rows_multiple_of=8, workers=0
        )
    elif variant != "base":
        raise ValueError(f"no variant '{variant}'; choose from base, large, smoke")
    return c
