"""Grids of numbers cut into patches: images, spectrograms.

B batch, M masks of an example, N patches, V of them visible, E class tokens, D width, C channels.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from data2vec_jax.core.errors import UserError
from data2vec_jax.models import base
from data2vec_jax.models.decoder import Decoder
from data2vec_jax.models.encoder import Encoded, Encoder, TargetSpec, Tokens
from data2vec_jax.models.layers import (
    Array,
    Key,
    LayerNorm,
    Mlp,
    beit_init,
    dense,
    dropout,
    gather_tokens,
    split,
    uniform_fan_in,
)
from data2vec_jax.models.positions import (
    Alibi,
    relative_bias,
    relative_index,
    resize_learned,
    resize_relative,
    sincos,
)


class Patches(nn.Module):
    """Non-overlapping patches -> D by one linear map of each patch's pixels (spec 2.4).

    kernel [*patch, channels, D], as a convolution with stride = kernel size would have.
    initializer: 'beit', or 'bert': as a linear layer of its pixels, Xavier (spec 2.5). inner: of
    two maps, the width between them (2.0); None for one map.
    """

    width: int
    patch: tuple[int, int] = (16, 16)
    initializer: str = "beit"
    inner: int | None = None
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, image: Array) -> Array:  # [B, height, width, C] -> [B, N, D]
        (p, q), C = self.patch, image.shape[-1]
        inits = beit_init, nn.initializers.zeros
        if self.initializer != "beit":
            inits = xavier_of_patches, uniform_fan_in(p * q * C)
        width = self.inner or self.width
        kernel = self.param("kernel", inits[0], (p, q, C, width))
        bias = self.param("bias", inits[1], (width,))
        x = patchify(image.astype(self.dtype), self.patch)
        kernel = kernel.reshape(p * q * C, width).astype(self.dtype)
        x = x @ kernel + bias.astype(self.dtype)
        if self.inner is None:
            return x
        return dense(self.width, width, self.initializer, self.dtype, "projection")(x)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patches in an image; what is left at its end is not seen."""
        return height // self.patch[0], width // self.patch[1]


def patchify(image: Array, patch: tuple[int, int]) -> Array:
    """[B, height, width, C] -> [B, N, P]: numbers of each patch by row, column and channel."""
    (B, height, width, C), (p, q) = image.shape, patch
    rows, columns = height // p, width // q
    x = image[:, : rows * p, : columns * q].reshape(B, rows, p, columns, q, C)
    return jnp.moveaxis(x, 3, 2).reshape(B, rows * columns, p * q * C)


def check_grid(grid: tuple[int, int], width: int, relative: bool) -> None:
    """Raises UserError: no table of positions of so many patches can be made.

    relative: there are biases of all pairs of patches.
    """
    cells = grid[0] * grid[1]
    if cells > (2**12 if relative else 2**16) or cells * width > 2**28:
        raise UserError(
            f"config.model: {grid[0]} x {grid[1]} patches of width {width} have too many positions"
        )


def xavier_of_patches(key, shape, dtype=jnp.float32):
    """Xavier-uniform of a kernel [p, p, C, D] as the matrix [p * p * C, D]."""
    flat = int(np.prod(shape[:-1])), shape[-1]
    return nn.initializers.xavier_uniform()(key, flat, dtype).reshape(shape)


class PatchModel(base.Model):
    """A grid of numbers in, patch representations out: what images and spectrograms have in common.

    A modality's model adds `normalised(batch)`: inputs [B, rows, columns, C]. width: D. image:
    rows and columns of an input, before it is cut into patches. mean, std: of each channel.
    class_init: initializer of class tokens. For the others see a modality's config.
    """

    width: int
    image: tuple[int, int]
    patches: Patches
    encoder: Encoder
    head: Mlp
    decoder: Decoder | None = None
    alibi: Alibi | None = None
    mean: Sequence[float] = (0.0,)
    std: Sequence[float] = (1.0,)
    class_tokens: int = 1
    class_init: Any = beit_init
    shared_relative: bool = True
    absolute: bool = False
    sincos: bool = False
    mask_embedding_used: bool = True
    final_norm: bool = True
    resampling: str = "grid"
    dropout: float = 0.0
    dtype: Any = jnp.float32
    frontend_params: ClassVar[str] = "patches"
    content: ClassVar[str] = "numbers"

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.patches.grid(*self.image)

    @property
    def channels(self) -> int:
        """Channels of an input."""
        return len(self.mean)

    def setup(self):
        E, cells = self.class_tokens, self.grid[0] * self.grid[1]
        if E:
            shape = (self.width,) if E == 1 else (E, self.width)
            self.class_token = self.param("class_token", self.class_init, shape)
        if self.decoder is None and self.mask_embedding_used:
            self.mask_embedding = self.param("mask_embedding", beit_init, (self.width,))
        if self.absolute:
            self.positions = self.param("positions", beit_init, (E + cells, self.width))
        if self.shared_relative:
            shape = (int(relative_index(self.grid).max()) + 1, self.encoder.heads)
            self.relative_bias = self.param("relative_bias", nn.initializers.zeros, shape)
        self.norm = LayerNorm(self.encoder.eps, dtype=self.dtype)

    def mask_shape(self, shapes: Mapping[str, Any]) -> tuple[int, int]:
        """The grid of patches that a mask covers."""
        return self.grid

    def features(self, batch: Mapping[str, Array], key: Key = None) -> Tokens:
        """What `normalised` reads, or `pixels` -> x [B, N, D]."""
        return Tokens(self.patches(self.pixels(batch)))

    def pixels(self, batch: Mapping[str, Array]) -> Array:
        """Normalised inputs [B, rows, columns, C]: `pixels` of a batch that has them already."""
        return batch["pixels"] if "pixels" in batch else self.normalised(batch)

    def contents(self, batch: Mapping[str, Array]) -> Array:
        """Normalised numbers of each patch, [B, N, P]."""
        return patchify(self.pixels(batch), self.patches.patch)

    def encode(
        self,
        tokens: Tokens,
        mask: Array | None = None,
        key: Key = None,
        record: TargetSpec | None = None,
        collect: bool = False,
        keep: Array | None = None,
        grid: tuple[int, int] | None = None,
    ) -> Encoded:
        """mask bool [B, N]: patches replaced by the learned vector (not with a decoder).

        keep: int [B * M, V], the patches that the blocks see, None for all. grid: rows and columns
        of patches of inputs of another size than the model's (`patches.grid`); positions are
        resampled. Returns x [B * M, V, D] and extra [B * M, E, D] (class tokens).
        """
        x, E, grid = tokens.x, self.class_tokens, grid or self.grid
        if x.shape[1] != grid[0] * grid[1]:
            raise UserError(f"{x.shape[1]} patches are not a grid of {grid[0]} x {grid[1]}")
        if mask is not None and self.decoder is None:
            if not self.mask_embedding_used:
                raise UserError("config.model.mask_embedding: this model has none, so no masks")
            x = jnp.where(mask[..., None], self.mask_embedding.astype(x.dtype), x)
        first = [self.class_token.reshape(E, self.width).astype(x.dtype)] if E else []
        if self.absolute:
            positions = self._learned(grid).astype(x.dtype)
            x, first = x + positions[E:], [token + positions[:E] for token in first]
        if self.sincos:
            x = x + sincos(grid, self.width).astype(x.dtype)
        places = jnp.arange(x.shape[1])[None] if keep is None else keep
        alibi = None if self.alibi is None else self.alibi(places, grid, E)
        x = gather_tokens(x, keep)
        first = [jnp.broadcast_to(token, (x.shape[0], *token.shape)) for token in first]
        x = jnp.concatenate([*first, x], axis=1)
        to_bias = functools.partial(self._relative, grid)
        bias = to_bias(self.relative_bias) if self.shared_relative else None
        post = self.encoder.norm == "post"
        x = self.norm(x) if post else x
        keys = split(key, 2)
        x = dropout(x, self.dropout, keys[0])
        record = record and record._replace(skip=E)
        out = self.encoder(
            x, bias=bias, alibi=alibi, key=keys[1], record=record, collect=collect, to_bias=to_bias
        )
        x = self.norm(out.x) if self.final_norm and not post else out.x
        return out._replace(x=x[:, E:], class_tokens=x[:, :E])

    def _relative(self, grid, table):
        """Table of relative positions of the model's grid -> bias [H, 1 + N, 1 + N] of `grid`."""
        transposed = self.resampling == "huggingface" and self.grid[0] != self.grid[1]
        if transposed or grid != self.grid:
            table = resize_relative(table, self.grid, grid, transposed)
        return relative_bias(table, relative_index(grid))

    def _learned(self, grid):
        """Learned positions [E + N, D] of `grid`."""
        ours, side = self.grid, math.isqrt(self.grid[0] * self.grid[1])
        if self.resampling == "huggingface" and side * side == ours[0] * ours[1]:
            ours = (side, side) if self.patches.patch[0] == self.patches.patch[1] else ours
        return self.positions if grid == ours else resize_learned(self.positions, ours, grid)


def flops(model: PatchModel, channels: int, masked: int, seen: int) -> dict[str, float]:
    """Forward FLOPs of one example, see `models.base.flops`. channels: of an input."""
    D, patches = model.width, model.grid[0] * model.grid[1]
    pixels = math.prod(model.patches.patch) * channels
    inner = model.patches.inner
    weights = pixels * D if inner is None else (pixels + D) * inner
    return base.flops(
        model,
        frontend=2.0 * patches * weights,
        tokens=patches,
        masked=masked,
        seen=seen,
        class_tokens=model.class_tokens,
    )
