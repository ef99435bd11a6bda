"""Positions: convolutional (speech), learned (text), relative on a grid (vision 1.0).

B batch, T tokens, D width, H heads.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from data2vec_jax.models.layers import Array, Conv1d, LayerNorm, gelu


class ConvPositions(nn.Module):
    """A stack of grouped convolutions, each with a norm without affine and GELU (spec 2.2).

    width: total receptive field; each of `depth` convolutions has kernel max(3, width // depth).
    An even kernel pads one more at the left than its output needs and drops the last frame. norm:
    'layer', or 'weight' (of the kernel; wav2vec 2.0 has one such convolution and no layer norm).
    """

    depth: int = 5
    width: int = 95
    groups: int = 16
    norm: str = "layer"
    exact_padding: bool = True
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, valid: Array | None = None) -> Array:  # [B, T, D] -> [B, T, D]
        kernel = max(3, self.width // self.depth)
        length, channels = x.shape[1], x.shape[-1]
        for i in range(self.depth):
            if valid is not None and (i == 0 or self.exact_padding):
                x = jnp.where(valid[..., None], x, 0)
            conv = Conv1d(
                channels, kernel, padding=kernel // 2, groups=self.groups, dtype=self.dtype,
                weight_norm=self.norm == "weight", name=f"conv{i}",
            )  # fmt: skip
            x = conv(x)[:, :length]
            if self.norm == "layer":
                x = LayerNorm(1e-5, affine=False, dtype=self.dtype)(x)
            x = gelu(x)
        return x


def token_positions(valid: Array, pad: int = 1) -> Array:
    """Position ids of text (spec 2.6): non-pad tokens count pad+1, pad+2, ...; pads are `pad`.

    valid bool [B, T] -> int32 [B, T].
    """
    valid = valid.astype(jnp.int32)
    return jnp.cumsum(valid, axis=-1) * valid + pad


def relative_index(grid: tuple[int, int]) -> np.ndarray:
    """Rows of BEiT's relative position table for a grid with a class token first (spec 2.4).

    [1 + N, 1 + N] integers: patch pairs by offset, then class -> patch, patch -> class,
    class -> class in the last three rows of the (2 rows - 1)(2 columns - 1) + 3.
    """
    rows, columns = grid
    y, x = np.divmod(np.arange(rows * columns), columns)
    dy = y[:, None] - y[None, :] + rows - 1
    dx = x[:, None] - x[None, :] + columns - 1
    offsets = (2 * rows - 1) * (2 * columns - 1)
    index = np.zeros((1 + rows * columns,) * 2, np.int32)
    index[1:, 1:] = dy * (2 * columns - 1) + dx
    index[0, :] = offsets
    index[:, 0] = offsets + 1
    index[0, 0] = offsets + 2
    return index


def relative_bias(table: Array, index: np.ndarray) -> Array:
    """table [rows, H], index [T, T] -> bias [H, T, T], to be added to the logits."""
    return jnp.moveaxis(table[index], -1, 0)
