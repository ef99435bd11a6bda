"""Speech: waveform -> frames -> encoder.

B batch, M masks of an example, S samples, T frames, V of them visible, D width, C channels.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp

from data2vec_jax.core.config import DropRate, Size
from data2vec_jax.core.errors import UserError
from data2vec_jax.modalities.contract import Batch, Options, Padding, Tokens, build
from data2vec_jax.modalities.speech.frontend import ConvFrontend, MelFrontend, make_frontend
from data2vec_jax.models import base
from data2vec_jax.models.decoder import Decoder
from data2vec_jax.models.encoder import Encoded, Encoder, TargetSpec
from data2vec_jax.models.layers import (
    Array,
    Key,
    LayerNorm,
    Mlp,
    dropout,
    gather_tokens,
    repeat,
    split,
)
from data2vec_jax.models.positions import Alibi, ConvPositions


class SpeechModel(base.Model):
    """Waveform in, frame representations out. Made by `SpeechConfig`."""

    width: int
    frontend: ConvFrontend | MelFrontend
    positions: ConvPositions
    encoder: Encoder
    head: Mlp
    decoder: Decoder | None = None
    alibi: Alibi | None = None
    dropout: float = 0.0
    feature_dropout: float = 0.0
    padding: str = "exact"
    mask_embedding_used: bool = True
    dtype: Any = jnp.float32
    frontend_params: ClassVar[str] = "frontend"

    def setup(self):
        if self.decoder is None and self.mask_embedding_used:
            init = nn.initializers.uniform(1.0)  # U(0, 1), mean 0.5: spec 11, trap 21
            self.mask_embedding = self.param("mask_embedding", init, (self.width,))
        self.norm = LayerNorm(self.encoder.eps, dtype=self.dtype)

    def mask_shape(self, shapes: Mapping[str, Any]) -> int:
        """Frames T of examples of these shapes: the length of a mask."""
        return self.frontend.frames(shapes["audio"].shape[-1])

    def extract(
        self, audio: Array, valid: Array | None = None
    ) -> tuple[Array, Array, Array | None]:
        """[B, S] -> features [B, T, D], what they are a projection of [B, T, C], and that before
        its norm, if it is learned.

        valid: bool [B, T], frames that are not padding; None for all.
        """
        return self.frontend(audio, valid if self.padding == "exact" else None)

    def valid_lengths(self, batch: Batch) -> Array | None:
        """Valid frames of each row, int32 [B], or None without padding."""
        return self.frontend.frames(batch["length"]) if "length" in batch else None

    def features(self, batch: Batch, key: Key = None) -> Tokens:
        """audio [B, S] (normalised), maybe length [B] in samples -> x [B, T, D], valid [B, T]."""
        return self.local(batch, key).tokens

    def local(self, batch: Batch, key: Key = None) -> base.Local:
        """`features`, and what they are made of."""
        valid = self._valid(batch)
        x, normed, raw = self.extract(batch["audio"], valid)
        keys = split(key if self.feature_dropout else None, 2)
        x, normed = (
            dropout(y, self.feature_dropout, k) for y, k in zip((x, normed), keys, strict=True)
        )
        return base.Local(Tokens(x, valid), normed, raw)

    def _valid(self, batch):
        if "length" not in batch:
            return None
        if self.frontend.pads_statistics and self.padding == "exact":
            raise UserError(
                "config.model.frontend.norm: 'group' takes statistics over whole rows, and these "
                "have padding: use norm='layer', rows of one length, or model.padding='reference'"
            )
        count = self.frontend.frames(batch["audio"].shape[-1])
        return jnp.arange(count) < self.valid_lengths(batch)[:, None]

    def encode(
        self,
        tokens: Tokens,
        mask: Array | None = None,
        key: Key = None,
        record: TargetSpec | None = None,
        collect: bool = False,
        keep: Array | None = None,
    ) -> Encoded:
        """mask bool [B * M, T]: frames replaced by the learned vector, or by 0 with a decoder.

        keep: int [B * M, V], the frames that the blocks see, None for all. The positional
        convolutions see all of them (spec 11, trap 14).
        """
        x, valid = tokens
        if mask is not None:
            x, valid = repeat(x, mask.shape[0]), repeat(valid, mask.shape[0])
            if self.decoder is None and not self.mask_embedding_used:
                raise UserError("config.model.mask_embedding: this model has none, so no masks")
            fill = self.mask_embedding.astype(x.dtype) if self.decoder is None else 0
            x = jnp.where(mask[..., None], fill, x)
        padded = None if self.padding == "attention" else valid
        if padded is not None:
            x = jnp.where(padded[..., None], x, 0)
        x = x + self.positions(x, padded)
        places = jnp.arange(x.shape[1])[None] if keep is None else keep
        alibi = None if self.alibi is None else self.alibi(places)
        x, valid = gather_tokens(x, keep), gather_tokens(valid, keep)
        post = self.encoder.norm == "post"
        x = self.norm(x) if post else x
        keys = split(key, 2)
        x = dropout(x, self.dropout, keys[0])
        out = self.encoder(x, alibi=alibi, valid=valid, key=keys[1], record=record, collect=collect)
        return out if post else out._replace(x=self.norm(out.x))


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpeechConfig:
    """Config section `model` of speech; nested sections are the options of the parts."""

    width: Size  # D
    encoder: Options  # of `Encoder`
    # Of `ConvFrontend`, or with kind='mel' of `MelFrontend`; without a kind it is 'waveform'.
    frontend: Options = dataclasses.field(default_factory=dict)
    positions: Options = dataclasses.field(default_factory=dict)  # of `ConvPositions`
    head: Options = dataclasses.field(default_factory=dict)  # of `Mlp`
    # Of `Decoder`. None: the student sees masked frames as a learned vector (1.0); with a decoder
    # it does not see them (2.0).
    decoder: Options | None = None
    alibi: Options | None = None  # of `Alibi`; None for none
    dropout: DropRate = 0.0  # after positions and norm, before the blocks
    # Of the front end's output, and apart from it of the features that wav2vec 2.0 quantises.
    feature_dropout: DropRate = 0.0
    # 'exact': padded frames are zeroed before every convolution over frames, and take part in no
    # statistic. 'reference': zeroed before the first only, and part of all statistics.
    # 'attention': kept out of attention only.
    padding: Padding = "exact"
    mask_embedding: bool = True  # there is a learned vector for masked frames
    dtype: Any = jnp.float32

    def make(self) -> SpeechModel:
        """The model. Raises UserError: an option that a part does not have."""
        common = dict(dtype=self.dtype)
        exact = self.padding == "exact"
        encoder = build(Encoder, "model.encoder", self.encoder, width=self.width, **common)
        if encoder.relative:
            raise UserError("config.model.encoder.relative: speech has no relative positions")
        positions = build(
            ConvPositions, "model.positions", self.positions, exact_padding=exact, **common
        )
        if self.width % positions.groups:
            raise UserError(
                f"config.model.positions.groups: {positions.groups} does not divide the width "
                f"{self.width}"
            )
        return SpeechModel(
            width=self.width,
            frontend=make_frontend(self.frontend, self.width, self.dtype),
            positions=positions,
            encoder=encoder,
            head=build(Mlp, "model.head", self.head, out=self.width, **common),
            decoder=build(Decoder, "model.decoder", self.decoder, exact_padding=exact, **common),
            alibi=build(
                Alibi, "model.alibi", self.alibi, layers=encoder.depth, heads=encoder.heads
            ),
            dropout=self.dropout,
            feature_dropout=self.feature_dropout,
            padding=self.padding,
            mask_embedding_used=self.mask_embedding,
            dtype=self.dtype,
        )


def flops(
    model: SpeechModel, shapes: Mapping[str, Any], masked: int, seen: int
) -> dict[str, float]:
    """Forward FLOPs of one example, see `models.base.flops`. shapes: of the example's arrays."""
    samples, D = shapes["audio"].shape[0], model.width
    length, front = model.frontend.frames(samples), model.frontend.flops(samples)
    parts = base.flops(model, frontend=front, tokens=length, masked=masked, seen=seen)
    p = model.positions
    conv = p.depth * 2.0 * length * D * (D // p.groups) * p.taps
    return parts | {name: conv + parts[name] for name in ("encoder", "student")}
