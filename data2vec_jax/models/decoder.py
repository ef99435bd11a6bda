"""The decoder of data2vec 2.0: convolutions that fill in what the student did not see (spec 7.4).

B rows, V visible of T tokens, D encoder's width, C decoder's width.
"""

from typing import Annotated, Any

import flax.linen as nn
import jax.numpy as jnp

from data2vec_jax.core.config import DropRate, Range, Size
from data2vec_jax.core.errors import UserError
from data2vec_jax.models.layers import (
    Array,
    Conv,
    Key,
    Mlp,
    dropout,
    gelu,
    head_flops,
    normalise,
    scan_layers,
)


def fill(x: Array, mask: Array, noise: Array) -> Array:
    """The whole sequence: what the encoder made of visible tokens, and noise where none was.

    x [B, V, D] in the order of the sequence, mask bool [B, T], noise [B, T, D] -> [B, T, D].
    """
    place = jnp.cumsum(~mask, axis=1) - 1  # of each visible token in x
    place = jnp.clip(place, 0, x.shape[1] - 1)[..., None]
    return jnp.where(mask[..., None], noise.astype(x.dtype), jnp.take_along_axis(x, place, axis=1))


class Decoder(nn.Module):
    """Convolutions at full length, each with a norm without affine and GELU. No positions.

    grid: (rows, columns) for convolutions over both, None for sequences. residual: each adds its
    input to its output where they are equally wide. dropout: of the encoder's output. An even
    kernel pads one more in front than its output needs and drops the last, as `ConvPositions` does.
    exact_padding: padded positions are zeroed before every convolution.
    """

    layers: Annotated[int, Range(1, 100)]
    width: Size
    kernel: Annotated[int, Range(1, 1000)]
    groups: Size = 16
    residual: bool = True
    dropout: DropRate = 0.0
    grid: tuple[int, int] | None = None
    exact_padding: bool = True
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Array, mask: Array, noise: Array, valid: Array | None = None, key: Key = None
    ) -> Array:  # [B, V, D] -> [B, T, C]
        """`mask` and `noise` as in `fill`. valid: bool [B, T], positions that are not padding."""
        x = fill(dropout(x, self.dropout, key), mask, noise)
        B, T = mask.shape
        sizes = (T,) if self.grid is None else self.grid
        x = x.reshape(B, *sizes, -1)
        if x.shape[-1] % self.groups or self.width % self.groups:
            raise UserError(
                f"config.model.decoder.groups: {self.groups} does not divide the widths "
                f"{x.shape[-1]} and {self.width}"
            )
        convs = [
            Conv(
                self.width,
                self.kernel,
                padding=self.kernel // 2,
                groups=self.groups,
                axes=len(sizes),
                dtype=self.dtype,
                name=f"conv{i}",
            )
            for i in range(self.layers)
        ]

        def step(conv, x):
            if valid is not None and self.exact_padding:
                x = jnp.where(valid.reshape(B, *sizes, 1), x, 0)
            y = conv(x)[:, *(slice(n) for n in sizes)]
            y = gelu(normalise(y, 1e-5).astype(self.dtype))
            return x + y if self.residual and x.shape == y.shape else y

        alike = 0 if x.shape[-1] == self.width else 1  # from there on
        x = scan_layers(convs[alike:], scan_layers(convs[:alike], x, step), step)
        return x.reshape(B, T, -1)


def flops(decoder: Decoder | None, head: Mlp, *, width: int, tokens: int, masked: int) -> float:
    """Forward FLOPs from an encoder's output of `width` to predictions at `masked` positions."""
    if decoder is None:
        return masked * head_flops(head, width)
    taps = decoder.kernel ** (1 if decoder.grid is None else 2)
    widths = [width] + [decoder.width] * (decoder.layers - 1)
    convolutions = 2.0 * tokens * taps * decoder.width * sum(widths) / decoder.groups
    return convolutions + masked * head_flops(head, decoder.width)
