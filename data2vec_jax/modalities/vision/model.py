"""Vision: image -> patches -> encoder.   B batch, N patches, T = 1 + N tokens, D width."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp

from data2vec_jax.errors import UserError
from data2vec_jax.modalities.contract import FROZEN, Batch, Options, Tokens, build
from data2vec_jax.models.encoder import Encoded, Encoder, Record
from data2vec_jax.models.encoder import flops as encoder_flops
from data2vec_jax.models.layers import (
    INITS,
    Array,
    Key,
    LayerNorm,
    Mlp,
    beit_init,
    dropout,
    head_flops,
    split,
)  # fmt: skip
from data2vec_jax.models.positions import relative_bias, relative_index

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Patches(nn.Module):
    """Non-overlapping patches -> D by one linear map of each patch's pixels (spec 2.4).

    kernel [patch, patch, channels, D], as a convolution with stride = kernel size would have.
    """

    width: int
    patch: int = 16
    initializer: str = "beit"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, image: Array) -> Array:  # [B, rows * p, columns * p, C] -> [B, N, D]
        B, height, width, C = image.shape
        p, rows, columns = self.patch, height // self.patch, width // self.patch
        kernel = self.param("kernel", INITS[self.initializer], (p, p, C, self.width))
        bias = self.param("bias", nn.initializers.zeros, (self.width,))
        x = image.astype(self.dtype).reshape(B, rows, p, columns, p, C)
        x = jnp.moveaxis(x, 3, 2).reshape(B, rows * columns, p * p * C)
        kernel = kernel.reshape(p * p * C, self.width).astype(self.dtype)
        return x @ kernel + bias.astype(self.dtype)


class VisionModel(nn.Module):
    """Image in, patch representations out. Made from a config section by `make_model`."""

    width: int
    image: tuple[int, int]
    patches: Patches
    encoder: Encoder
    head: Mlp
    mean: Sequence[float] = IMAGENET_MEAN
    std: Sequence[float] = IMAGENET_STD
    shared_relative: bool = True
    absolute: bool = False
    dropout: float = 0.0
    dtype: Any = jnp.float32
    padding: ClassVar[str] = "exact"  # images have none

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.image[0] // self.patches.patch, self.image[1] // self.patches.patch

    def setup(self):
        self.class_token = self.param("class_token", beit_init, (self.width,))
        self.mask_embedding = self.param("mask_embedding", beit_init, (self.width,))
        cells = self.grid[0] * self.grid[1] + 1
        if self.absolute:
            self.positions = self.param("positions", beit_init, (cells, self.width))
        if self.shared_relative:
            self.index = relative_index(self.grid)
            shape = (int(self.index.max()) + 1, self.encoder.heads)
            self.relative_bias = self.param("relative_bias", nn.initializers.zeros, shape)
        self.norm = LayerNorm(self.encoder.eps, dtype=self.dtype)

    def mask_shape(self, shapes: Mapping[str, Any]) -> tuple[int, int]:
        """The grid of patches that a mask covers."""
        return self.grid

    def valid_lengths(self, batch: Batch) -> None:
        """Images have no padding."""

    def features(self, batch: Batch, key: Key = None) -> Tokens:
        """image [B, height, width, C], uint8 or already normalised floats -> x [B, N, D]."""
        image = batch["image"]
        if image.dtype == jnp.uint8:
            mean, std = jnp.asarray(self.mean), jnp.asarray(self.std)
            image = (image.astype(jnp.float32) / 255.0 - mean) / std
        return Tokens(self.patches(image))

    def encode(
        self, tokens: Tokens, mask: Array | None = None, key: Key = None,
        record: Record | None = None, collect: bool = False,
    ) -> Encoded:  # fmt: skip
        """mask bool [B, N]: patches replaced by the learned vector.

        x [B, N, D] and extra [B, 1, D] (the class token) after the final norm.
        """
        x = tokens.x
        if mask is not None:
            x = jnp.where(mask[..., None], self.mask_embedding.astype(x.dtype), x)
        first = jnp.broadcast_to(self.class_token.astype(x.dtype), (x.shape[0], 1, self.width))
        x = jnp.concatenate([first, x], axis=1)
        if self.absolute:
            x = x + self.positions.astype(x.dtype)
        bias = relative_bias(self.relative_bias, self.index) if self.shared_relative else None
        keys = split(key, 2)
        x = dropout(x, self.dropout, keys[0])
        record = record and record._replace(skip=1)
        out = self.encoder(x, bias=bias, key=keys[1], record=record, collect=collect)
        x = self.norm(out.x)
        return out._replace(x=x[:, 1:], extra=x[:, :1])

    def predict(self, x: Array) -> Array:  # [..., D] -> [..., D]
        return self.head(x)

    def __call__(self, batch: Batch) -> Array:
        """Touches every parameter: for initialisation."""
        tokens = self.features(batch)
        mask = jnp.zeros(tokens.x.shape[:2], bool)
        return self.predict(self.encode(tokens, mask).x)


def make_model(
    *, width: int, encoder: Options, image: int | Sequence[int] = 224, patch: int = 16,
    mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD,
    shared_relative: bool = True, absolute: bool = False, head: Options = FROZEN,
    initializer: str = "beit", dropout: float = 0.0, dtype: Any = jnp.float32,
) -> VisionModel:  # fmt: skip
    """Config section `model` of vision; nested sections are the options of the parts.

    width: D. image, patch: pixels; image may be (height, width). mean, std: statistics of pixels in
    [0, 1] per channel, for uint8 images. shared_relative: one relative position bias for all
    blocks. absolute: learned positions, class token included. initializer: 'beit' or 'bert'.
    """
    size = (image, image) if isinstance(image, int) else tuple(image)
    if size[0] % patch or size[1] % patch:
        raise UserError(f"config.model.image: {size} is not a multiple of patch {patch}")
    common = dict(dtype=dtype)
    return VisionModel(
        width,
        size,
        Patches(width, patch, initializer, **common),
        build(
            Encoder,
            "model.encoder",
            {"initializer": initializer} | dict(encoder),
            width=width,
            **common,
        ),
        build(Mlp, "model.head", {"initializer": initializer} | dict(head), out=width, **common),
        tuple(mean),
        tuple(std),
        shared_relative,
        absolute,
        dropout,
        dtype,
    )


def flops(model: VisionModel, shapes: Mapping[str, Any], masked: int) -> dict[str, float]:
    """Forward FLOPs of one example, by part: 2 per multiply-add, matrix products only.

    shapes: shapes of one example (`Examples.example`). masked: positions through the head.
    """
    D, patches = model.width, model.grid[0] * model.grid[1]
    pixels = model.patches.patch**2 * shapes["image"].shape[-1]
    e = model.encoder
    return {
        "frontend": 2.0 * patches * pixels * D,
        "encoder": encoder_flops(depth=e.depth, width=D, mlp=e.mlp, tokens=patches + 1),
        "head": masked * head_flops(model.head, D),
    }
