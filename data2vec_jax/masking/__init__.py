"""Masks for pretraining, drawn on the device from (seed, step, example id, clone).

`make` builds the sampler of a config section, `sample` draws the masks of a batch. The proposals of
the papers are in `spans` (speech), `tokens` (text) and `blocks` (vision), what they share in
`sampler`.
"""

from data2vec_jax.masking.blocks import blocks, cells, inverse_blocks, multiblock
from data2vec_jax.masking.kinds import KINDS, make
from data2vec_jax.masking.sampler import (
    BlockSampler,
    Sampler,
    drop,
    equalise,
    kept,
    positions,
    sample,
    weights,
)
from data2vec_jax.masking.spans import block_spans, spans
from data2vec_jax.masking.tokens import KEEP, MASK, REPLACE, bert_roles, independent, token_spans

__all__ = [
    "KEEP",
    "KINDS",
    "MASK",
    "REPLACE",
    "BlockSampler",
    "Sampler",
    "bert_roles",
    "block_spans",
    "blocks",
    "cells",
    "drop",
    "equalise",
    "independent",
    "inverse_blocks",
    "kept",
    "make",
    "multiblock",
    "positions",
    "sample",
    "spans",
    "token_spans",
    "weights",
]
