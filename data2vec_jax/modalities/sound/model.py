"""Sound: log-mel spectrogram -> patches of 16 x 16 -> encoder (EAT; docs/spec/sound.md section 3).

B batch, F frames of 10 ms, N patches, D width.
"""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import flax.linen as nn
import jax.numpy as jnp

from data2vec_jax.core.config import DropRate, PositiveFloat, Range, Size
from data2vec_jax.core.errors import UserError
from data2vec_jax.modalities.contract import Batch, Options, build
from data2vec_jax.modalities.sound.spectrogram import AUDIOSET, BINS, check_frames
from data2vec_jax.models.decoder import Decoder
from data2vec_jax.models.encoder import Encoder
from data2vec_jax.models.layers import INITS, Array, Mlp
from data2vec_jax.models.patches import Patches, PatchModel, check_grid
from data2vec_jax.models.patches import flops as patches_flops

PATCH = 16  # frames, and mel bins


class SoundModel(PatchModel):
    """Spectrogram in, patch representations out, time-major: row by row of 8 patches."""

    def normalised(self, batch: Batch) -> Array:
        """spectrogram [B, F, 128, 1], log-mel -> (x - mean) / (2 std).

        The 2 is AST's (arXiv 2104.01778), and the authors' weights expect it.
        """
        spectrogram = batch["spectrogram"].astype(jnp.float32)
        return (spectrogram - jnp.asarray(self.mean)) / (2 * jnp.asarray(self.std))


@dataclasses.dataclass(frozen=True, kw_only=True)
class SoundConfig:
    """Config section `model` of sound; nested sections are the options of the parts.

    Positions are a fixed 2-D sin-cos table, and a prefix of that of longer sounds; there are no
    others.
    """

    width: Size  # D
    encoder: Options  # of `Encoder`
    frames: Size = 1024  # F, a multiple of 16
    # Of log-mel spectrograms of the corpus, before they are divided by 2.
    mean: float = AUDIOSET[0]
    std: PositiveFloat = AUDIOSET[1]
    class_tokens: Annotated[int, Range(0, 1024)] = 1  # in front of the patches
    head: Options = dataclasses.field(default_factory=dict)  # of `Mlp`
    # Of `Decoder`. None: the student sees masked patches as a learned vector (1.0); with a decoder
    # it does not see them (2.0).
    decoder: Options | None = None
    mask_embedding: bool = True  # there is a learned vector for masked patches
    initializer: Literal[*INITS] = "bert"  # one of `INITS`
    dropout: DropRate = 0.0  # of the encoder's input
    dtype: Any = jnp.float32

    def make(self) -> SoundModel:
        """The model. Raises UserError: impossible options."""
        check_frames(self.frames, "model")
        inits, common = {"initializer": self.initializer}, {"dtype": self.dtype}
        encoder = build(
            Encoder, "model.encoder", inits | dict(self.encoder), width=self.width, **common
        )
        if encoder.relative:
            raise UserError("config.model.encoder.relative: sound has no relative positions")
        head = inits | dict(self.head)
        grid = self.frames // PATCH, BINS // PATCH
        check_grid(grid, self.width, relative=False)
        return SoundModel(
            width=self.width,
            image=(self.frames, BINS),
            patches=Patches(self.width, (PATCH, PATCH), self.initializer, **common),
            encoder=encoder,
            head=build(Mlp, "model.head", head, out=self.width, **common),
            decoder=build(Decoder, "model.decoder", self.decoder, grid=grid, **common),
            mean=(self.mean,),
            std=(self.std,),
            class_tokens=self.class_tokens,
            class_init=nn.initializers.normal(1.0),
            shared_relative=False,
            sincos=True,
            mask_embedding_used=self.mask_embedding,
            dropout=self.dropout,
            dtype=self.dtype,
        )


def flops(model: SoundModel, shapes: Mapping[str, Any], masked: int, seen: int) -> dict[str, float]:
    """Forward FLOPs of one example: `models.patches.flops`."""
    return patches_flops(model, shapes["spectrogram"].shape[-1], masked, seen)
