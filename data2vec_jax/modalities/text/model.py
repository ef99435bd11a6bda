"""Text: token ids -> embeddings -> encoder.

B batch, M masks of an example, T tokens, V of them visible, D width.
"""

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from data2vec_jax.core.errors import UserError, nearest
from data2vec_jax.modalities.contract import FROZEN, Batch, Options, Tokens, build, check_padding
from data2vec_jax.models import base
from data2vec_jax.models.decoder import Decoder
from data2vec_jax.models.encoder import Encoded, Encoder, TargetSpec
from data2vec_jax.models.layers import Array, Key, LayerNorm, Mlp, bert_init, dropout, gather_tokens
from data2vec_jax.models.positions import Alibi, token_positions

PAD = 1  # index of <pad> in the vocabulary and in the position table (spec 1.3, 2.6)


def without_pad(pad: int):
    """BERT initialisation with a zero row for padding."""
    return lambda key, shape, dtype=jnp.float32: bert_init(key, shape, dtype).at[pad].set(0.0)


def unit_without_pad(pad: int):
    """Rows of unit length on average, and a zero row for padding: for tables times sqrt(D)."""
    return lambda key, shape, dtype=jnp.float32: (
        (jax.random.normal(key, shape, dtype) / math.sqrt(shape[1])).at[pad].set(0.0)
    )


class Embeddings(nn.Module):
    """Token embeddings + learned positions, layer norm, dropout (spec 2.6).

    vocab_size: rows of the token table, `<mask>` included. max_length: longest row, `<s>` included.
    scale: multiply token embeddings by sqrt(D); they start with a standard deviation of 1 / sqrt(D)
    ("Attention is all you need", 3.4) instead of 0.02. zero_pads: pads are zero vectors; otherwise
    what the norm makes of zero vectors, or, with `pad_rows`, of the tables' rows. types: rows of a
    table of segments, 0 for none. pad: index of <pad> in the vocabulary and in the position table.
    """

    width: int
    vocab_size: int = 50_265
    max_length: int = 512
    scale: bool = False
    dropout: float = 0.0
    zero_pads: bool = True
    pad_rows: bool = False
    types: int = 0
    pad: int = PAD
    eps: float = 1e-5
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, tokens: Array, valid: Array, key: Key = None, types: Array | None = None
    ) -> Array:
        """tokens int [B, T], valid bool [B, T], types int [B, T] (None: 0) -> [B, T, D]."""
        init = without_pad(self.pad)
        token_init = unit_without_pad(self.pad) if self.scale else init
        table = self.param("tokens", token_init, (self.vocab_size, self.width))
        # Position rows start at pad + 1, so the table has more of them than the longest row.
        shape = (self.max_length + self.pad + 1, self.width)
        positions = self.param("positions", init, shape)
        x = table[tokens] * (math.sqrt(self.width) if self.scale else 1.0)
        if self.types:
            segments = self.param("types", bert_init, (self.types, self.width))
            x = x + segments[jnp.zeros_like(tokens) if types is None else types]
        x = x + positions[token_positions(valid, self.pad)]
        if not self.pad_rows:
            x = jnp.where(valid[..., None], x, 0)  # the tables' rows of padding are never learned
        x = LayerNorm(self.eps, dtype=self.dtype, name="norm")(x)
        x = dropout(x, self.dropout, key)
        return jnp.where(valid[..., None], x, 0) if self.zero_pads else x


class TextModel(base.Model):
    """Token ids in, token representations out. Made from a config section by `make_model`."""

    width: int
    embeddings: Embeddings
    encoder: Encoder
    head: Mlp
    decoder: Decoder | None = None
    alibi: Alibi | None = None
    input_norm: bool = False
    keep_prob: float = 0.0
    replace_prob: float = 0.0
    teacher_sees: str = "all"
    padding: str = "exact"
    dtype: Any = jnp.float32
    frontend_params: ClassVar[str] = "embeddings"

    def setup(self):
        if self.encoder.norm == "pre" or self.input_norm:
            self.norm = LayerNorm(self.encoder.eps, dtype=self.dtype)

    def mask_shape(self, shapes: Mapping[str, Any]) -> int:
        """Tokens T of examples of these shapes: the length of a mask."""
        return shapes["tokens"].shape[-1]

    def valid_lengths(self, batch: Batch) -> Array:
        """Tokens of each row that are not padding, int32 [B]."""
        return jnp.sum(batch["tokens"] != self.embeddings.pad, axis=-1)

    def features(self, batch: Batch, key: Key = None) -> Tokens:
        """tokens int32 [B, T] with pads at an end, maybe types int32 [B, T] -> x [B, T, D], valid
        [B, T]."""
        valid = batch["tokens"] != self.embeddings.pad
        return Tokens(self.embeddings(batch["tokens"], valid, key, batch.get("types")), valid)

    def encode(
        self,
        tokens: Tokens,
        mask: Array | None = None,
        key: Key = None,
        record: TargetSpec | None = None,
        collect: bool = False,
        keep: Array | None = None,
    ) -> Encoded:
        """keep: int [B * M, V], the tokens that the blocks see, None for all.

        Text is masked by leaving tokens out, or in its token ids (`modality.corrupt`), so `mask` is
        not used here.
        """
        del mask
        places = jnp.arange(tokens.x.shape[1])[None] if keep is None else keep
        alibi = None if self.alibi is None else self.alibi(places)
        x, valid = gather_tokens(tokens.x, keep), gather_tokens(tokens.valid, keep)
        x = self.norm(x) if self.input_norm else x
        out = self.encoder(x, alibi=alibi, valid=valid, key=key, record=record, collect=collect)
        return out if self.encoder.norm == "post" else out._replace(x=self.norm(out.x))


def make_model(
    *,
    width: int,
    encoder: Options,
    vocab_size: int = 50_265,
    max_length: int = 512,
    scale: bool = False,
    head: Options = FROZEN,
    decoder: Options | None = None,
    alibi: Options | None = None,
    dropout: float = 0.0,
    input_norm: bool = False,
    keep_prob: float = 0.0,
    replace_prob: float = 0.0,
    teacher_sees: str = "all",
    padding: str = "exact",
    pad_rows: bool = False,
    types: int = 0,
    pad: int = PAD,
    eps: float = 1e-5,
    dtype: Any = jnp.float32,
) -> TextModel:
    """Config section `model` of text; nested sections are the options of the parts.

    width: D. dropout: after the embedding norm. decoder: None if the student sees masked tokens as
    `<mask>` (1.0) and not only the others (2.0). alibi: None for none. input_norm: a norm before
    post-norm blocks (2.0, where some blocks are "prenet"). keep_prob, replace_prob: shares of the
    masked tokens that stay, or become a random token, in place of `<mask>`. teacher_sees: 'all'
    (the whole text, as in the paper) or 'targets' (its masked tokens, as in the authors' code of
    1.0).
    padding: 'exact' (pads are zero in every convolution and take part in no statistic of the
    targets), 'reference' (they are zero at the start, and part of all statistics) or 'attention'
    (kept out of attention only). eps: of the embeddings' norm. For the rest see `Embeddings`,
    `Encoder`.
    """
    if input_norm and encoder.get("norm") == "pre":
        raise UserError("config.model.input_norm: pre-norm blocks have their own")
    if teacher_sees not in ("all", "targets"):
        hint = nearest(teacher_sees, ("all", "targets"))
        raise UserError(f"config.model.teacher_sees: no '{teacher_sees}'{hint}")
    if teacher_sees == "targets" and decoder is not None:
        raise UserError("config.model.teacher_sees: 'targets' is of data2vec 1.0; use 'all'")
    common = dict(dtype=dtype)
    exact = check_padding(padding) == "exact"
    encoder = build(Encoder, "model.encoder", encoder, width=width, **common)
    head = {"depth": 2, "hidden": 2 * width, "initializer": "bert"} | dict(head)
    return TextModel(
        width,
        Embeddings(
            width,
            vocab_size,
            max_length,
            scale,
            dropout,
            padding != "attention",
            pad_rows,
            types,
            pad,
            eps,
            **common,
        ),
        encoder,
        build(Mlp, "model.head", head, out=width, **common),
        build(Decoder, "model.decoder", decoder, exact_padding=exact, **common),
        build(Alibi, "model.alibi", alibi, layers=encoder.depth, heads=encoder.heads),
        input_norm,
        keep_prob,
        replace_prob,
        teacher_sees,
        padding,
        dtype,
    )


def flops(model: TextModel, shapes: Mapping[str, Any], masked: int, seen: int) -> dict[str, float]:
    """Forward FLOPs of one example, see `models.base.flops`. shapes: of the example's arrays."""
    length = shapes["tokens"].shape[0]
    return base.flops(model, frontend=0.0, tokens=length, masked=masked, seen=seen)
