"""data2vec 1.0, text: pretraining on books and Wikipedia with GPT-2's byte-level BPE.

    python -m data2vec_jax.train --config=text_v1:base --workdir=DIR \
        --config.data.source=folder:/data/books_wiki --config.examples.tokenizer=/data/gpt2_bpe

Variants: base, large, smoke (4 steps on the glosses shipped inside).
Numbers: config/text/pretraining/base.yaml of the authors (4-token spans, the paper's "+ wav2vec
2.0 masking" row); the paper where the comment says so.
"""

from ml_collections import ConfigDict, config_dict

from data2vec_jax.configs import common


def get_config(variant: str = "base") -> ConfigDict:
    steps = 1_000_000
    c = common.pretraining(
        modality="text",
        steps=steps,
        seed=1,
        averaged=("^encoder/",),  # embeddings are the student's
    )
    c.model = common.roberta_base() | dict(
        keep_prob=0.0,
        replace_prob=0.0,  # paper's main recipe: BERT masks, 15 %, 0.1 and 0.1
        teacher_sees="all",  # as in the paper; in the authors' code "targets"
    )
    # 0.307 is the mean share that the authors' sampler masks at 512 tokens.
    c.mask = dict(kind="token_spans", prob=0.35, width=4, masked=0.307)
    c.objective = dict(
        name="data2vec1",
        top_k=10,
        target="ffn",
        layer_norms=("layer",),
        final_norms=(),
        beta=4.0,
        scale=1.0,
    )
    c.examples = dict(
        lengths=(512,),
        mode="complete_doc",
        tokenizer=config_dict.placeholder(str),
        vocab_size=50_265,
    )
    # 8,192 tokens x 16 GPUs: 256 rows of 512 tokens.
    c.data.update(source="folder:/data/books_wiki", split="train", batch_size=256, workers=8)
    c.data.update(eval_split=config_dict.placeholder(str), eval_batches=8)  # for eval_every > 0
    c.ema = dict(start=0.999, end=0.9999, anneal=300_000 / steps)  # paper: 100,000 updates
    c.schedule = dict(kind="cosine", peak=2e-4, warmup=10_000 / steps)
    c.optim = dict(betas=(0.9, 0.98), eps=1e-6, eps_on="raw", weight_decay=0.01, clip=5.0)
    c.collapse = dict(min_target_std=0.0, min_pred_std=0.0)  # no guard in the authors' code

    if variant == "large":  # not published; size only, the rest is the base recipe
        c.model.width = 1024
        c.model.encoder.update(depth=24, heads=16, mlp=4096)
        c.objective.top_k = 20
    elif variant == "smoke":
        c.update(total_steps=4, log_every=1, dtype="float32")
        c.model.update(width=32, vocab_size=1_000, max_length=64)
        c.model.encoder.update(depth=2, heads=4, mlp=64)
        c.objective.top_k = 2
        c.examples.update(lengths=(32, 64), vocab_size=1_000)
        c.data.update(eval_split="test", source="samples:glosses", batch_size=8, workers=0)
    elif variant != "base":
        raise ValueError(f"no variant '{variant}'; choose from base, large, smoke")
    return c
