"""Text: token ids -> embeddings -> encoder.

B batch, M masks of an example, T tokens, V of them visible, D width.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from data2vec_jax.core import sharding
from data2vec_jax.core.config import (
    DropRate,
    NonNegativeInt,
    PositiveFloat,
    Range,
    Share,
    Size,
    Vocabulary,
)
from data2vec_jax.core.errors import UserError
from data2vec_jax.modalities.contract import Batch, Options, Padding, Tokens, build
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
    count_pads: positions count every token of the row from 0, pads too (BERT).
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
    count_pads: bool = False
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
        if self.count_pads:
            places = jnp.arange(tokens.shape[1])
            positions = self.param("positions", bert_init, (self.max_length, self.width))
        else:
            # Position rows start at pad + 1, so the table has more of them than the longest row.
            places = token_positions(valid, self.pad)
            shape = (self.max_length + self.pad + 1, self.width)
            positions = self.param("positions", init, shape)
        x = sharding.lookup(table, tokens, self.dtype) * (
            math.sqrt(self.width) if self.scale else 1
        )
        if self.types:
            segments = self.param("types", bert_init, (self.types, self.width))
            x = x + segments[jnp.zeros_like(tokens) if types is None else types]
        x = x + positions[places]
        if not self.pad_rows:
            x = jnp.where(valid[..., None], x, 0)  # the tables' rows of padding are never learned
        x = LayerNorm(self.eps, dtype=self.dtype, name="norm")(x)
        x = dropout(x, self.dropout, key)
        return jnp.where(valid[..., None], x, 0) if self.zero_pads else x


class TextModel(base.Model):
    """Token ids in, token representations out. Made by `TextConfig`."""

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
    content: ClassVar[str] = "ids"

    def setup(self):
        if self.encoder.norm == "pre" or self.input_norm:
            self.norm = LayerNorm(self.encoder.eps, dtype=self.dtype)

    def mask_shape(self, shapes: Mapping[str, Any]) -> int:
        """Tokens T of examples of these shapes: the length of a mask."""
        return shapes["tokens"].shape[-1]

    def valid_lengths(self, batch: Batch) -> Array:
        """Tokens of each row that are not padding, int32 [B]."""
        return jnp.sum(batch["tokens"] != self.embeddings.pad, axis=-1)

    def contents(self, batch: Batch) -> Array:
        """Token ids, int32 [B, T]."""
        return batch["tokens"]

    def token_table(self) -> Array:
        """Token embeddings [V, D], not times sqrt(D): so logits start within about 1."""
        return sharding.gather(self.embeddings.variables["params"]["tokens"])

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


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextConfig:
    """Config section `model` of text; nested sections are the options of the parts."""

    width: Size  # D
    encoder: Options  # of `Encoder`
    vocab_size: Vocabulary = 50_265  # rows of the token table, `<mask>` included
    max_length: Size = 512  # longest row in tokens, `<s>` included
    scale: bool = False  # see `Embeddings`
    head: Options = dataclasses.field(default_factory=dict)  # of `Mlp`
    # Of `Decoder`. None: the student sees masked tokens as `<mask>` (1.0); with a decoder it does
    # not see them (2.0).
    decoder: Options | None = None
    alibi: Options | None = None  # of `Alibi`; None for none
    dropout: DropRate = 0.0  # after the embedding norm
    input_norm: bool = False  # before post-norm blocks (2.0, where some blocks are "prenet")
    keep_prob: Share = 0.0  # share of the masked tokens that stay, in place of `<mask>`
    replace_prob: Share = 0.0  # share that become a random token
    # 'all': the whole text, as in the paper; 'targets': its masked tokens, as in the authors' code
    # of 1.0.
    teacher_sees: Literal["all", "targets"] = "all"
    # 'exact': pads are zero in every convolution, and take part in no statistic of the targets.
    # 'reference': zero at the start, and part of all statistics. 'attention': kept out of attention
    # only.
    padding: Padding = "exact"
    pad_rows: bool = False  # see `Embeddings`
    types: Annotated[int, Range(0, 2**20)] = 0  # see `Embeddings`
    pad: NonNegativeInt = PAD  # index of <pad> in the vocabulary and in the position table
    count_pads: bool = False  # see `Embeddings`
    eps: PositiveFloat = 1e-5  # of the embeddings' norm
    dtype: Any = jnp.float32

    def make(self) -> TextModel:
        """The model. Raises UserError: options that do not go together."""
        if self.input_norm and self.encoder.get("norm") == "pre":
            raise UserError("config.model.input_norm: pre-norm blocks have their own")
        if self.keep_prob + self.replace_prob > 1:
            raise UserError(
                f"config.model: keep_prob={self.keep_prob} and replace_prob={self.replace_prob} "
                "add up to more than 1"
            )
        if self.pad >= self.vocab_size:
            raise UserError(f"config.model.pad: {self.pad}, of {self.vocab_size} tokens")
        if self.teacher_sees == "targets" and self.decoder is not None:
            raise UserError("config.model.teacher_sees: 'targets' is of data2vec 1.0; use 'all'")
        common = dict(dtype=self.dtype)
        exact = self.padding == "exact"
        encoder = build(Encoder, "model.encoder", self.encoder, width=self.width, **common)
        if encoder.relative:
            raise UserError("config.model.encoder.relative: text has no relative positions")
        head = {"depth": 2, "hidden": 2 * self.width, "initializer": "bert"} | dict(self.head)
        embeddings = Embeddings(
            width=self.width,
            vocab_size=self.vocab_size,
            max_length=self.max_length,
            scale=self.scale,
            dropout=self.dropout,
            zero_pads=self.padding != "attention",
            pad_rows=self.pad_rows,
            types=self.types,
            pad=self.pad,
            count_pads=self.count_pads,
            eps=self.eps,
            dtype=self.dtype,
        )
        return TextModel(
            width=self.width,
            embeddings=embeddings,
            encoder=encoder,
            head=build(Mlp, "model.head", head, out=self.width, **common),
            decoder=build(Decoder, "model.decoder", self.decoder, exact_padding=exact, **common),
            alibi=build(
                Alibi, "model.alibi", self.alibi, layers=encoder.depth, heads=encoder.heads
            ),
            input_norm=self.input_norm,
            keep_prob=self.keep_prob,
            replace_prob=self.replace_prob,
            teacher_sees=self.teacher_sees,
            padding=self.padding,
            dtype=self.dtype,
        )


def flops(model: TextModel, shapes: Mapping[str, Any], masked: int, seen: int) -> dict[str, float]:
    """Forward FLOPs of one example, see `models.base.flops`. shapes: of the example's arrays."""
    length = shapes["tokens"].shape[0]
    return base.flops(model, frontend=0.0, tokens=length, masked=masked, seen=seen)
