"""data2vec 2.0, text: pretraining on books and Wikipedia with GPT-2's byte-level BPE.

    python -m data2vec_jax.train --config=text_v2:base --workdir=DIR \
        --config.data.source=folder:/data/books_wiki --config.examples.tokenizer=/data/gpt2_bpe

Variants: base, large, smoke (4 steps on the glosses shipped inside).
Numbers: config/v2/{base,large}_text_only_task.yaml of the authors. Their other large recipe
(large_text_only_task_pgrp_1M.yaml) has beta=4.0 and 1,000,000 updates.
"""

from ml_collections import ConfigDict, config_dict

from data2vec_jax.configs import common


def get_config(variant: str = "base") -> ConfigDict:
    steps = 1_000_000
    c = common.pretraining(
        modality="text",
        steps=steps,
        seed=1,
        averaged=("^encoder/",),  # embeddings are the student's, with its dropout
    )
    c.model = common.roberta_base() | dict(
        decoder=dict(layers=5, width=768, kernel=9, groups=1, residual=False, dropout=0.1),
        head=dict(depth=2, hidden=1536, initializer="bert"),
    )
    c.mask = dict(kind="independent", ratio=0.48)  # paper: 0.42
    c.objective = dict(
        name="data2vec2",
        clones=8,
        top_k=12,
        target="ffn",
        layer_norms=("instance",),
        final_norms=(),  # paper: final_norms=("layer",)
        beta=0.0,
        scale=1.0,
        noise_std=0.01,
    )
    c.examples = dict(
        lengths=(512,), mode="none", tokenizer=config_dict.placeholder(str), vocab_size=50_265
    )
    # 4 rows of 512 tokens x 16 GPUs.
    c.data.update(source="folder:/data/books_wiki", split="train", batch_size=64, workers=8)
    c.ema = dict(start=0.9999, end=0.99999, anneal=100_000 / steps)
    c.schedule = dict(kind="cosine", peak=2e-4, warmup=4_000 / steps)
    # Everything decays: the yaml's exception for biases and norms has no effect in the code.
    c.optim = dict(betas=(0.9, 0.98), eps=1e-6, eps_on="raw", weight_decay=0.01, clip=1.0)
    c.collapse = dict(min_target_std=0.1, min_pred_std=0.01, after=5000, action="stop")

    if variant == "large":
        steps = c.total_steps = 600_000
        c.model.width = 1024
        c.model.encoder.update(depth=24, heads=16, mlp=4096)
        c.mask.ratio = 0.5
        c.objective.update(top_k=24, layer_norms=("layer",), final_norms=("instance",))
        # The batch is base's: 2 rows x 32 GPUs.
        c.ema.anneal = 100_000 / steps
        c.schedule.update(peak=1e-4, warmup=4_000 / steps)
    elif variant == "smoke":
        c.update(total_steps=4, log_every=1, dtype="float32")
        c.model.update(width=32, vocab_size=1_000, max_length=64)
        c.model.encoder.update(depth=2, heads=4, mlp=64)
        c.model.decoder.update(layers=2, width=32)
        c.model.head.hidden = 64
        c.objective.update(clones=2, top_k=2)
        c.examples.update(lengths=(64,), vocab_size=1_000)
        c.data.update(source="samples:glosses", batch_size=8, workers=0)
        c.collapse = dict(warn_after=100)  # the head starts near zero, and so do predictions
    elif variant != "base":
        raise ValueError(f"no variant '{variant}'; choose from base, large, smoke")
    return c
