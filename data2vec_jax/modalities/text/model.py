"""Text: token ids -> embeddings -> encoder.   B batch, T tokens, D width, V vocabulary."""

import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from data2vec_jax.modalities.contract import (
    FROZEN,
    Batch,
    Options,
    Tokens,
    build,
    check_padding,
)  # fmt: skip
from data2vec_jax.models.encoder import Encoded, Encoder, Record
from data2vec_jax.models.encoder import flops as encoder_flops
from data2vec_jax.models.layers import Array, Key, LayerNorm, Mlp, bert_init, dropout, head_flops
from data2vec_jax.models.positions import token_positions

PAD = 1  # index of <pad> in the vocabulary and in the position table (spec 1.3, 2.6)


def without_pad(key, shape, dtype=jnp.float32):
    """BERT initialisation with a zero row for padding."""
    return bert_init(key, shape, dtype).at[PAD].set(0.0)


class Embeddings(nn.Module):
    """Token embeddings + learned positions, layer norm, dropout (spec 2.6).

    vocab_size: rows of the token table, `<mask>` included. max_length: longest row, `<s>` included.
    scale: multiply token embeddings by sqrt(D).
    """

    width: int
    vocab_size: int = 50_265
    max_length: int = 512
    scale: bool = False
    dropout: float = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, tokens: Array, valid: Array, key: Key = None) -> Array:
        """tokens int [B, T], valid bool [B, T] -> [B, T, D]; pads are zero vectors."""
        table = self.param("tokens", without_pad, (self.vocab_size, self.width))
        # Position rows start at PAD + 1, so the table has two more than the longest row.
        shape = (self.max_length + PAD + 1, self.width)
        positions = self.param("positions", without_pad, shape)
        x = table[tokens] * (math.sqrt(self.width) if self.scale else 1.0)
        x = x + positions[token_positions(valid, PAD)]
        x = LayerNorm(1e-5, dtype=self.dtype, name="norm")(x)
        return jnp.where(valid[..., None], dropout(x, self.dropout, key), 0)


class TextModel(nn.Module):
    """Token ids in, token representations out. Made from a config section by `make_model`."""

    width: int
    embeddings: Embeddings
    encoder: Encoder
    head: Mlp
    leave: float = 0.0
    random: float = 0.0
    padding: str = "exact"
    dtype: Any = jnp.float32

    def setup(self):
        if self.encoder.norm == "pre":
            self.norm = LayerNorm(1e-5, dtype=self.dtype)

    def mask_shape(self, shapes: Mapping[str, Any]) -> int:
        """Tokens T of examples of these shapes: the length of a mask."""
        return shapes["tokens"].shape[-1]

    def valid_lengths(self, batch: Batch) -> Array:
        """Tokens of each row that are not padding, int32 [B]."""
        return jnp.sum(batch["tokens"] != PAD, axis=-1)

    def features(self, batch: Batch, key: Key = None) -> Tokens:
        """tokens int32 [B, T], right-padded with PAD -> x [B, T, D], valid [B, T]."""
        valid = batch["tokens"] != PAD
        return Tokens(self.embeddings(batch["tokens"], valid, key), valid)

    def encode(
        self, tokens: Tokens, mask: Array | None = None, key: Key = None,
        record: Record | None = None, collect: bool = False,
    ) -> Encoded:  # fmt: skip
        """Text is masked in its token ids (`modality.corrupt`), so `mask` is not used here."""
        del mask
        out = self.encoder(tokens.x, valid=tokens.valid, key=key, record=record, collect=collect)
        return out if self.encoder.norm == "post" else out._replace(x=self.norm(out.x))

    def predict(self, x: Array) -> Array:  # [..., D] -> [..., D]
        return self.head(x)

    def __call__(self, batch: Batch) -> Array:
        """Touches every parameter: for initialisation."""
        return self.predict(self.encode(self.features(batch)).x)


def make_model(
    *, width: int, encoder: Options, vocab_size: int = 50_265, max_length: int = 512,
    scale: bool = False, head: Options = FROZEN, dropout: float = 0.0, leave: float = 0.0,
    random: float = 0.0, padding: str = "exact", dtype: Any = jnp.float32,
) -> TextModel:  # fmt: skip
    """Config section `model` of text; nested sections are the options of the parts.

    width: D. dropout: after the embedding norm. leave, random: shares of the masked tokens that
    stay, or become a random token, in place of `<mask>`. padding: 'exact' (pads take part in no
    statistic of the targets) or 'reference' (as in the authors' code: they do). For the rest see
    `Embeddings`, `Encoder`.
    """
    common = dict(dtype=dtype)
    head = {"depth": 2, "hidden": 2 * width, "initializer": "bert"} | dict(head)
    return TextModel(
        width,
        Embeddings(width, vocab_size, max_length, scale, dropout, **common),
        build(Encoder, "model.encoder", encoder, width=width, **common),
        build(Mlp, "model.head", head, out=width, **common),
        leave,
        random,
        check_padding(padding),
        dtype,
    )


def flops(model: TextModel, shapes: Mapping[str, Any], masked: int) -> dict[str, float]:
    """Forward FLOPs of one example, by part: 2 per multiply-add, matrix products only.

    shapes: shapes of one example (`Examples.example`). masked: positions through the head.
    """
    D, e = model.width, model.encoder
    length = shapes["tokens"].shape[0]
    return {
        "frontend": 0.0,
        "encoder": encoder_flops(depth=e.depth, width=D, mlp=e.mlp, tokens=length),
        "head": masked * head_flops(model.head, D),
    }
