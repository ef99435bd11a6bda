"""UPerNet (Xiao 2018): semantic segmentation from four layers of a vision encoder.

A plain Transformer has one resolution. Its four layers are resampled to 4, 2, 1 and 1/2 times the
patch grid, the coarsest is pooled at several sizes, and features are added from coarse to fine
(conversion spec 4.5). Batch norms use their stored statistics, in training too.

B batch, rows and columns of a feature map, D width, C classes, A width of the auxiliary head.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from data2vec_jax.core.config import Length, NonNegativeFloat, NonNegativeInt, Range, Size
from data2vec_jax.core.errors import UserError
from data2vec_jax.models.layers import Array, Conv, Key, gelu
from data2vec_jax.models.losses import cross_entropy
from data2vec_jax.models.positions import resize


class BatchNorm(nn.Module):
    """Batch norm with stored statistics: scale, bias, mean, var [D], and the number of batches
    that they were taken over (which plays no part)."""

    @nn.compact
    def __call__(self, x: Array) -> Array:  # [B, rows, columns, D]
        zeros, ones, D = nn.initializers.zeros, nn.initializers.ones, x.shape[-1:]
        scale, bias = self.param("scale", ones, D), self.param("bias", zeros, D)
        mean, var = self.param("mean", zeros, D), self.param("var", ones, D)
        self.param("batches", lambda key: jnp.zeros((), jnp.int32))
        return (x - mean) * (scale * jax.lax.rsqrt(var + 1e-5)) + bias


class ConvNormRelu(nn.Module):
    """A convolution without bias, batch norm, ReLU. kernel: 1 or 3; the size stays."""

    width: int
    kernel: int = 3

    @nn.compact
    def __call__(self, x: Array) -> Array:  # [B, rows, columns, C] -> [B, rows, columns, width]
        x = Conv(
            self.width, self.kernel, padding=self.kernel // 2, bias=False, axes=2, name="conv"
        )(x)
        return jax.nn.relu(BatchNorm(name="norm")(x))


class Double(nn.Module):
    """A transposed convolution that doubles the size: each place becomes 2 x 2."""

    @nn.compact
    def __call__(self, x: Array) -> Array:  # [B, rows, columns, D] -> [B, 2 rows, 2 columns, D]
        B, rows, columns, D = x.shape
        kernel = self.param("kernel", nn.initializers.normal(0.02), (2, 2, D, D))
        bias = self.param("bias", nn.initializers.zeros, (D,))
        x = jnp.einsum("bijc,ykco->biyjko", x, kernel)
        return x.reshape(B, 2 * rows, 2 * columns, D) + bias


def pool(x: Array, size: int) -> Array:
    """Means over size x size bins, which overlap where the size does not divide: bin i of n places
    is [floor(i n / size), ceil((i + 1) n / size)). [B, rows, columns, D] -> [B, size, size, D]."""

    def bins(n):
        first = np.arange(size) * n // size
        last = -(-np.arange(1, size + 1) * n // size)
        inside = (np.arange(n) >= first[:, None]) & (np.arange(n) < last[:, None])
        return (inside / inside.sum(1, keepdims=True)).astype(np.float32)

    rows, columns = bins(x.shape[1]), bins(x.shape[2])
    return jnp.einsum("ia,jc,bacd->bijd", rows, columns, x, precision="highest")


def halve(x: Array) -> Array:
    """The largest of each 2 x 2 places; an odd one at the end is dropped."""
    B, rows, columns, D = x.shape
    x = x[:, : rows // 2 * 2, : columns // 2 * 2]
    return jnp.max(x.reshape(B, rows // 2, 2, columns // 2, 2, D), (2, 4))


class Auxiliary(nn.Module):
    """A small head on one level that adds a loss in training."""

    classes: int
    """C."""
    width: Size
    """A: channels of its convolutions."""
    convs: Annotated[int, Range(0, 100)] = 1
    """Number of convolutions."""
    joined: bool = False
    """A last convolution reads the level's features beside the others."""

    @nn.compact
    def __call__(self, level: Array) -> Array:  # [B, rows, columns, D] -> [B, rows, columns, C]
        x = level
        for i in range(self.convs):
            x = ConvNormRelu(self.width, name=f"conv{i}")(x)
        if self.joined:
            x = jnp.concatenate([level, x], -1)
            x = ConvNormRelu(self.width, name="joined")(x)
        return Conv(self.classes, 1, axes=2, name="output")(x)


class Segmentation(nn.Module):
    """One class per pixel."""

    classes: Size
    """C."""
    states: Sequence[NonNegativeInt]
    """Indices of four states of the encoder, ascending; 0 is the first block's input."""
    pools: Annotated[Sequence[Annotated[int, Range(1, 256)]], Length(1, 100)] = (1, 2, 3, 6)
    """Sizes of the pooled maps."""
    auxiliary: Mapping | None = None
    """Options of the auxiliary head; None for none."""
    auxiliary_weight: NonNegativeFloat = 0.4
    """Factor on the auxiliary head's loss."""
    ignore: int = 255
    """Label of pixels without a class."""

    @nn.compact
    def __call__(
        self, features: Any, key: Key = None, grid: tuple[int, int] = (2, 2)
    ) -> Mapping[str, Array]:
        """logits [B, C, 4 rows, 4 columns], and `auxiliary_logits` [B, C, rows, columns].

        features: see heads.py; states [L + 1, B, 1 + N, D]. grid: rows and columns of N patches.
        """
        maps, D = self._maps(features.states, grid), features.states.shape[-1]
        x = Double(name="up4_first")(maps[0])
        x = Double(name="up4_second")(gelu(BatchNorm(name="up4_norm")(x)))
        levels = [x, Double(name="up2")(maps[1]), maps[2], halve(maps[3])]
        logits = self._decode(levels, D)
        found = {"logits": jnp.moveaxis(logits, -1, 1)}
        if self.auxiliary is not None:
            head = Auxiliary(self.classes, **self.auxiliary, name="auxiliary")
            found["auxiliary_logits"] = jnp.moveaxis(head(levels[2]), -1, 1)
        return found

    def _maps(self, states, grid):
        """Four maps [B, rows, columns, D]."""
        last = len(states) - 1
        if len(self.states) != 4 or max(self.states) > last:
            raise UserError(f"config.head.states: {self.states}; four of 0 to {last} are needed")
        tokens = states[np.asarray(self.states), :, -grid[0] * grid[1] :]  # without class tokens
        return tokens.reshape(*tokens.shape[:2], *grid, -1)

    def _decode(self, levels, D):
        top = levels[-1]
        size = top.shape[1:3]
        pooled = [
            resize(ConvNormRelu(D, 1, name=f"pool{i}")(pool(top, scale)), size)
            for i, scale in enumerate(self.pools)
        ]
        top = ConvNormRelu(D, name="context")(jnp.concatenate([top, *pooled], -1))
        sides = [ConvNormRelu(D, 1, name=f"side{i}")(x) for i, x in enumerate(levels[:-1])]
        sides.append(top)
        for i in (2, 1, 0):  # from coarse to fine
            sides[i] = sides[i] + resize(sides[i + 1], sides[i].shape[1:3])
        outs = [ConvNormRelu(D, name=f"smooth{i}")(x) for i, x in enumerate(sides[:-1])] + [top]
        x = jnp.concatenate([resize(out, outs[0].shape[1:3]) for out in outs], -1)
        return Conv(self.classes, 1, axes=2, name="output")(ConvNormRelu(D, name="fuse")(x))

    def loss(self, outputs: Mapping, labels: Mapping, features: Any) -> Array:
        """labels int [B, height, width]: mean cross-entropy of the pixels that have a class."""
        labels = labels["labels"]

        def of(logits):
            logits = resize(jnp.moveaxis(logits, 1, -1), labels.shape[1:])
            return cross_entropy(logits, jnp.where(labels == self.ignore, -1, labels))

        loss = of(outputs["logits"])
        if self.auxiliary is not None:
            loss = loss + self.auxiliary_weight * of(outputs["auxiliary_logits"])
        return loss
