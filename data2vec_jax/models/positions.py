"""Positions: convolutional (speech), learned (text), on a grid (vision), and ALiBi.

B batch, T tokens, D width, H heads, L layers.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from data2vec_jax.errors import UserError, nearest
from data2vec_jax.models.layers import Array, Conv, LayerNorm, gelu


class ConvPositions(nn.Module):
    """A stack of grouped convolutions, each with a norm without affine and GELU (spec 2.2).

    width: total receptive field; each of `depth` convolutions has kernel max(3, width // depth).
    An even kernel pads one more at the left than its output needs and drops the last frame. norm:
    'layer', or 'weight' (of the kernel: one convolution without layer norm, as in wav2vec 2.0).
    input_norm: a layer norm of the input.
    """

    depth: int = 5
    width: int = 95
    groups: int = 16
    norm: str = "layer"
    input_norm: bool = False
    exact_padding: bool = True
    dtype: Any = jnp.float32

    def __post_init__(self):
        if self.norm not in ("layer", "weight"):
            hint = nearest(self.norm, ("layer", "weight"))
            raise UserError(f"config.model.positions.norm: no '{self.norm}'{hint}")
        if self.norm == "weight" and self.depth != 1:
            raise UserError(
                f"config.model.positions.depth: {self.depth}; with norm='weight' it is 1"
            )
        super().__post_init__()

    @nn.compact
    def __call__(self, x: Array, valid: Array | None = None) -> Array:  # [B, T, D] -> [B, T, D]
        kernel = max(3, self.width // self.depth)
        length, channels = x.shape[1], x.shape[-1]
        if self.input_norm:
            x = LayerNorm(1e-5, dtype=self.dtype, name="norm")(x)
        for i in range(self.depth):
            if valid is not None and (i == 0 or self.exact_padding):
                x = jnp.where(valid[..., None], x, 0)
            conv = Conv(
                channels, kernel, padding=kernel // 2, groups=self.groups, dtype=self.dtype,
                weight_norm=self.norm == "weight",
                name=f"conv{i}" if self.norm == "layer" else "conv",
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


def sincos(grid: tuple[int, int], width: int) -> np.ndarray:
    """Fixed sines and cosines of a grid's columns, then of its rows (MAE's order; spec 2.5).

    [rows * columns, D] float32: D / 4 sines and D / 4 cosines of each coordinate.
    """
    if width % 4:
        raise UserError(f"config.model.width: {width}, but sin-cos positions need a multiple of 4")
    row, column = np.divmod(np.arange(grid[0] * grid[1]), grid[1])
    rates = 10_000.0 ** (-np.arange(width // 4) / (width // 4))
    angles = [np.outer(place, rates) for place in (column, row)]
    parts = [function(a) for a in angles for function in (np.sin, np.cos)]
    return np.concatenate(parts, axis=1).astype(np.float32)


def slopes(heads: int) -> np.ndarray:
    """ALiBi's slopes (spec 2.3): 2^(-8 h / H), h = 1 ... H, if H is a power of two.

    Otherwise those of the power below, then every other one of the power above. float32 [H].
    """
    power = 2 ** int(np.log2(heads))
    below = 2.0 ** (-8.0 * np.arange(1, power + 1) / power)
    above = 2.0 ** (-4.0 * np.arange(1, 2 * power + 1, 2) / power)
    return np.concatenate([below, above])[:heads].astype(np.float32)


DISTANCES = {
    "manhattan": lambda d: jnp.sum(jnp.abs(d), -1),
    "euclidean": lambda d: jnp.sqrt(jnp.sum(jnp.square(d), -1)),
}


class Alibi(nn.Module):
    """Attention falls with distance: head h of layer l adds -slope_h * scale * distance (spec 2.3).

    The parts are kept apart, distances and slopes, so that no bias of all heads is ever stored.

    layers, heads: of the encoder. scale: a number; if `learned`, the start of a parameter that is
    used where it is above 0, with a value `per_head`, `per_layer`, both or neither. distance: on a
    grid, 'manhattan' or 'euclidean'.
    """

    layers: int
    heads: int
    scale: float = 1.0
    learned: bool = True
    per_head: bool = True
    per_layer: bool = False
    distance: str = "manhattan"

    @nn.compact
    def __call__(
        self, places: Array, grid: tuple[int, int] | None = None, extra: int = 0
    ) -> tuple[Array, Array]:
        """(distances [B, E + T, E + T], slopes [L, H], not above 0); the bias is their product.

        places: int [B, T], where each token stands in its row or grid. extra: E leading tokens that
        stand nowhere, at distance 0 from all.
        """
        if self.distance not in DISTANCES:
            hint = nearest(self.distance, DISTANCES)
            raise UserError(f"config.model.alibi.distance: no '{self.distance}'{hint}")
        scale = self.scale
        if self.learned:
            shape = self.layers if self.per_layer else 1, self.heads if self.per_head else 1
            init = nn.initializers.constant(self.scale)
            scale = jnp.maximum(self.param("scale", init, shape), 0.0)
        axes = [places] if grid is None else jnp.divmod(places, grid[1])
        x = jnp.stack(axes, -1).astype(jnp.float32)  # [B, T, 1 or 2]
        apart = DISTANCES[self.distance](x[:, :, None] - x[:, None, :])
        apart = jnp.pad(apart, ((0, 0), (extra, 0), (extra, 0)))
        return apart, jnp.broadcast_to(-slopes(self.heads) * scale, (self.layers, self.heads))


def relative_bias(table: Array, index: np.ndarray) -> Array:
    """table [rows, H], index [T, T] -> bias [H, T, T], to be added to the logits."""
    return jnp.moveaxis(table[index], -1, 0)
