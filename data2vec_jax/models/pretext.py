"""Parameters that only an objective has, in the subtree `pretext/` of a model's.

B rows, V visible of T tokens, N predicted positions of a row, E class tokens, D encoder's width,
C width of a decoder, P numbers of a patch.

Such a module takes the place of a model's head and decoder. It is called with `Inputs` and returns
its predictions at `places`; `flops(width, tokens, masked)` counts its forward pass on one row:
width D of the encoder, tokens E + T, masked N. Fine-tuning and conversion leave its parameters
behind.
"""

from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax.numpy as jnp

from data2vec_jax.core.config import Depth, PositiveFloat, Size
from data2vec_jax.models import encoder, heads
from data2vec_jax.models.decoder import fill
from data2vec_jax.models.layers import Array, LayerNorm, bert_init, dense, gather_tokens
from data2vec_jax.models.positions import sincos


class Inputs(NamedTuple):
    """What these modules read."""

    encoded: encoder.Encoded
    """The student's: x [B, T, D], or [B, V, D] if it did not see masked positions."""
    mask: Array
    """bool [B, T]: masked positions."""
    places: Array
    """int [B, N]: where to predict."""
    table: Array | None = None
    """[V, D]: the model's token embeddings, as the blocks see them; None if it has none."""


class Linear(nn.Module):
    """One linear layer D -> `out`, PyTorch's initialisation."""

    out: int
    dtype: Any = jnp.float32
    visible_only: ClassVar[bool] = False

    @nn.compact
    def __call__(self, inputs: Inputs) -> Array:  # [B, N, out]
        x = gather_tokens(inputs.encoded.x, inputs.places)
        return dense(self.out, x.shape[-1], "torch", self.dtype, "output")(x)

    def flops(self, *, width: int, tokens: int, masked: int) -> float:
        """See the module's docstring."""
        return 2.0 * masked * width * self.out


class TokenLogits(heads.MaskedLm):
    """The head of masked language models, whose output layer is the table of token embeddings."""

    visible_only: ClassVar[bool] = False

    @nn.compact
    def __call__(self, inputs: Inputs) -> Array:  # [B, N, vocabulary]
        x = gather_tokens(inputs.encoded.x, inputs.places)
        return super().__call__(heads.Features(x, table=inputs.table))["logits"]

    def flops(self, *, width: int, tokens: int, masked: int) -> float:
        """See the module's docstring."""
        return 2.0 * masked * width * (width + self.vocab_size)


class PatchDecoder(nn.Module):
    """MAE's decoder (arXiv 2111.06377, baselines spec 2): pre-norm blocks of width C see the class
    tokens, what the encoder made of visible patches, and one learned vector at all others, with
    fixed positions.
    """

    out: int
    grid: tuple[int, int]
    width: Size = 512  # C
    depth: Depth = 8
    heads: Size = 16
    mlp: Size = 2048
    eps: PositiveFloat = 1e-6
    dtype: Any = jnp.float32
    visible_only: ClassVar[bool] = True

    def _blocks(self):
        sizes = dict(depth=self.depth, width=self.width, heads=self.heads, mlp=self.mlp)
        options = dict(norm="pre", eps=self.eps, initializer="xavier", dtype=self.dtype)
        return encoder.Encoder(**sizes, **options, name="encoder")

    @nn.compact
    def __call__(self, inputs: Inputs) -> Array:  # [B, N, out]
        seen, first = inputs.encoded.x, inputs.encoded.class_tokens
        embed = dense(self.width, seen.shape[-1], "xavier", self.dtype, "embed")
        hidden = self.param("mask_token", bert_init, (self.width,))
        hidden = jnp.broadcast_to(hidden, (*inputs.mask.shape, self.width))
        x = fill(embed(seen), inputs.mask, hidden)
        x = x + sincos(self.grid, self.width).astype(x.dtype)  # class tokens have none
        x = jnp.concatenate([embed(first), x], axis=1)
        x = self._blocks()(x).x[:, first.shape[1] :]
        x = gather_tokens(x, inputs.places)  # the rest works on each position alone
        x = LayerNorm(self.eps, dtype=self.dtype, name="norm")(x)
        return dense(self.out, self.width, "xavier", self.dtype, "output")(x)

    def flops(self, *, width: int, tokens: int, masked: int) -> float:
        """See the module's docstring."""
        sizes = dict(depth=self.depth, width=self.width, mlp=self.mlp)
        ends = 2.0 * self.width * ((tokens - masked) * width + masked * self.out)
        return ends + encoder.flops(**sizes, tokens=tokens)
