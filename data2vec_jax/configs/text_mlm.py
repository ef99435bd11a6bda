"""Masked language modelling (BERT, RoBERTa) on text, beside data2vec.

    python -m data2vec_jax.train --config=text_mlm:like --workdir=DIR \
        --config.data.source=folder:/data/books_wiki --config.examples.tokenizer=/data/gpt2_bpe

Variants: like (everything but masks, head, loss and rate is `text_v1:base`; the rate is RoBERTa's
for 256 rows), paper (fairseq's recipe of RoBERTa base), smoke (4 steps on the glosses shipped
inside). Numbers: baselines spec 1.
"""

from ml_collections import ConfigDict

from data2vec_jax.configs import common, text_v1

OF_A_PAPER = False  # of data2vec: tests/test_baselines.py has its numbers


def like(c: ConfigDict) -> None:
    """Makes a config of data2vec 1.0 BERT's: masks, head and loss."""
    common.without_teacher(c, "mlm")
    c.mask = dict(kind="token_spans", prob=0.15, width=1, masked=0.15)  # 76 of 512, theirs 76 or 77
    c.model.update(keep_prob=0.1, replace_prob=0.1)


def get_config(variant: str = "like") -> ConfigDict:
    c = common.beside(text_v1, variant)
    like(c)
    c.schedule.peak = 1e-4

    if variant == "paper":  # their rows cross documents (`complete`), ours do not
        c.total_steps = 125_000
        c.data.batch_size = 2048  # 16 rows x 16 micro-batches x 8 GPUs
        c.schedule = dict(kind="linear", peak=5e-4, warmup=10_000 / 125_000)
        del c.optim["clip"]
    return c
