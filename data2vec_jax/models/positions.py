"""Positions: convolutional (speech), learned (text), on a grid (vision), and ALiBi.

B batch, T tokens, D width, H heads, L layers.
"""

import math
from typing import Annotated, Any, Literal

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from data2vec_jax.core.config import Range, Size
from data2vec_jax.core.errors import UserError
from data2vec_jax.models.attention_parts import DISTANCES, LinearBias
from data2vec_jax.models.layers import (
    ACTIVATIONS,
    Activation,
    Array,
    Conv,
    LayerNorm,
    normalise,
    scan_layers,
)


class ConvPositions(nn.Module):
    """A stack of grouped convolutions, each with a norm without affine and GELU (spec 2.2).

    width: total receptive field; each of `depth` convolutions has kernel max(3, width // depth),
    or `kernel`, if that is given. An even kernel pads one more at the left than its output needs
    and drops the last frame. norm: 'layer', or 'weight' (of the kernel: one convolution without
    layer norm, as in wav2vec 2.0). input_norm: a layer norm of the input. activation: a name of
    `ACTIVATIONS`. initializer: 'torch' (its default), or wav2vec 2.0's: N(0, 4 / (kernel D)), and
    biases of 0.
    """

    depth: Annotated[int, Range(0, 100)] = 5
    width: Annotated[int, Range(0, 100_000)] = 95
    groups: Size = 16
    norm: Literal["layer", "weight"] = "layer"
    input_norm: bool = False
    kernel: Annotated[int, Range(1, 100_000)] | None = None
    activation: Activation = "gelu"
    initializer: Literal["torch", "wav2vec2"] = "torch"
    exact_padding: bool = True
    dtype: Any = jnp.float32

    @property
    def taps(self) -> int:
        """Kernel size of each convolution."""
        return self.kernel or max(3, self.width // max(self.depth, 1))

    def __post_init__(self):
        if self.norm == "weight" and self.depth != 1:
            raise UserError(
                f"config.model.positions.depth: {self.depth}; with norm='weight' it is 1"
            )
        super().__post_init__()

    @nn.compact
    def __call__(self, x: Array, valid: Array | None = None) -> Array:  # [B, T, D] -> [B, T, D]
        length, channels = x.shape[1], x.shape[-1]
        if self.input_norm:
            x = LayerNorm(1e-5, dtype=self.dtype, name="norm")(x)
        if valid is not None:
            x = jnp.where(valid[..., None], x, 0)
        inits = {}
        if self.initializer == "wav2vec2":
            std = 2.0 / math.sqrt(self.taps * channels)
            inits = dict(kernel_init=nn.initializers.normal(std), bias_init=nn.initializers.zeros)
        convs = [
            Conv(
                channels,
                self.taps,
                padding=self.taps // 2,
                groups=self.groups,
                dtype=self.dtype,
                weight_norm=self.norm == "weight",
                name=f"conv{i}" if self.norm == "layer" else "conv",
                **inits,
            )
            for i in range(self.depth)
        ]

        def step(conv, x):
            if valid is not None and self.exact_padding:
                x = jnp.where(valid[..., None], x, 0)
            x = conv(x)[:, :length]
            if self.norm == "layer":
                x = normalise(x, 1e-5).astype(self.dtype)
            return ACTIVATIONS[self.activation](x)

        return scan_layers(convs, x, step)


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


class Alibi(nn.Module):
    """Attention falls with distance: head h of layer l adds -slope_h * scale * distance (spec 2.3).

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
    distance: Literal[*DISTANCES] = "manhattan"

    @nn.compact
    def __call__(
        self, places: Array, grid: tuple[int, int] | None = None, extra: int = 0
    ) -> LinearBias:
        """The bias of all layers, of E + T tokens.

        places: int [B, T], where each token stands in its row or grid. extra: E leading tokens that
        stand nowhere, at distance 0 from all.
        """
        scale = self.scale
        if self.learned:
            shape = self.layers if self.per_layer else 1, self.heads if self.per_head else 1
            init = nn.initializers.constant(self.scale)
            scale = jnp.maximum(self.param("scale", init, shape), 0.0)
        axes = [places] if grid is None else jnp.divmod(places, grid[1])
        x = jnp.stack(axes, -1).astype(jnp.float32)  # [B, T, 1 or 2]
        x = jnp.pad(x, ((0, 0), (extra, 0), (0, 0)))
        steep = jnp.broadcast_to(-slopes(self.heads) * scale, (self.layers, self.heads))
        return LinearBias(x, steep, self.distance, extra)


def resize_matrix(old: int, new: int, kind: str) -> np.ndarray:
    """The linear map of one axis of an image to another size, as PyTorch's `interpolate` without
    antialiasing and with `align_corners=False`; kind: 'bilinear' or 'bicubic' (a = -0.75).

    float32 [new, old]. (jax.image.resize has a = -0.5 and averages where it shrinks.)
    """
    place = (np.arange(new) + 0.5) * old / new - 0.5
    place = np.maximum(place, 0.0) if kind == "bilinear" else place
    first = np.floor(place).astype(int)
    t = place - first
    if kind == "bilinear":
        taps = {0: 1 - t, 1: t}
    else:
        a = -0.75
        near = lambda d: ((a + 2) * d - (a + 3)) * d * d + 1  # noqa: E731
        far = lambda d: ((a * d - 5 * a) * d + 8 * a) * d - 4 * a  # noqa: E731
        taps = {-1: far(t + 1), 0: near(t), 1: near(1 - t), 2: far(2 - t)}
    matrix = np.zeros((new, old))
    for tap, weight in taps.items():
        np.add.at(matrix, (np.arange(new), np.clip(first + tap, 0, old - 1)), weight)
    return matrix.astype(np.float32)


def resize(x: Array, size: tuple[int, int], kind: str = "bilinear") -> Array:
    """[..., rows, columns, C] -> [..., *size, C]; see `resize_matrix`."""
    old = x.shape[-3:-1]
    if old == tuple(size):
        return x
    rows, columns = (resize_matrix(*pair, kind) for pair in zip(old, size, strict=True))
    rows, columns = rows.astype(x.dtype), columns.astype(x.dtype)
    return jnp.einsum("ia,jb,...abc->...ijc", rows, columns, x, precision="highest")


def resize_relative(
    table: Array, old: tuple[int, int], new: tuple[int, int], transposed: bool = False
) -> Array:
    """A relative position table of the grid `old`, [rows, H], for the grid `new`.

    Patch pairs are resampled bilinearly, the last three rows stay. transposed: the table of a grid
    that is not square is read with its axes exchanged, as in Hugging Face's class (which resamples
    it even for its own grid, and so computes other biases; finetuning_and_conversion 4.5).
    """
    rows, columns = 2 * old[0] - 1, 2 * old[1] - 1
    pairs = table[:-3].reshape(*((columns, rows) if transposed else (rows, columns)), -1)
    pairs = resize(pairs, (2 * new[0] - 1, 2 * new[1] - 1))
    return jnp.concatenate([pairs.reshape(-1, table.shape[-1]), table[-3:]])


def resize_learned(table: Array, old: tuple[int, int], new: tuple[int, int]) -> Array:
    """Learned positions [E + cells, D] of the grid `old` -> of the grid `new`, bicubically.

    The E leading rows (class tokens) stay.
    """
    E = table.shape[0] - old[0] * old[1]
    cells = resize(table[E:].reshape(*old, -1), new, "bicubic")
    return jnp.concatenate([table[:E], cells.reshape(new[0] * new[1], -1)])


def relative_bias(table: Array, index: np.ndarray) -> Array:
    """table [rows, H], index [T, T] -> bias [H, T, T], to be added to the logits."""
    return jnp.moveaxis(table[index], -1, 0)
