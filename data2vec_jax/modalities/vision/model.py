"""Vision: image -> patches -> encoder.

B batch, M masks of an example, N patches, V of them visible, E class tokens, D width.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from data2vec_jax.errors import UserError
from data2vec_jax.modalities.contract import FROZEN, Batch, Options, Tokens, build
from data2vec_jax.models.decoder import Decoder
from data2vec_jax.models.decoder import flops as decoded_flops
from data2vec_jax.models.encoder import Encoded, Encoder, Record
from data2vec_jax.models.encoder import flops as encoder_flops
from data2vec_jax.models.layers import (
    Array,
    Key,
    LayerNorm,
    Mlp,
    beit_init,
    dropout,
    split,
    take,
    uniform_fan_in,
)  # fmt: skip
from data2vec_jax.models.positions import Alibi, relative_bias, relative_index, sincos

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Patches(nn.Module):
    """Non-overlapping patches -> D by one linear map of each patch's pixels (spec 2.4).

    kernel [patch, patch, channels, D], as a convolution with stride = kernel size would have.
    initializer: 'beit', or 'bert': as a linear layer of its pixels, Xavier (spec 2.5).
    """

    width: int
    patch: int = 16
    initializer: str = "beit"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, image: Array) -> Array:  # [B, rows * p, columns * p, C] -> [B, N, D]
        B, height, width, C = image.shape
        p, rows, columns = self.patch, height // self.patch, width // self.patch
        inits = beit_init, nn.initializers.zeros
        if self.initializer != "beit":
            inits = xavier_of_patches, uniform_fan_in(p * p * C)
        kernel = self.param("kernel", inits[0], (p, p, C, self.width))
        bias = self.param("bias", inits[1], (self.width,))
        x = image.astype(self.dtype).reshape(B, rows, p, columns, p, C)
        x = jnp.moveaxis(x, 3, 2).reshape(B, rows * columns, p * p * C)
        kernel = kernel.reshape(p * p * C, self.width).astype(self.dtype)
        return x @ kernel + bias.astype(self.dtype)


def xavier_of_patches(key, shape, dtype=jnp.float32):
    """Xavier-uniform of a kernel [p, p, C, D] as the matrix [p * p * C, D]."""
    flat = int(np.prod(shape[:-1])), shape[-1]
    return nn.initializers.xavier_uniform()(key, flat, dtype).reshape(shape)


class VisionModel(nn.Module):
    """Image in, patch representations out. Made from a config section by `make_model`."""

    width: int
    image: tuple[int, int]
    patches: Patches
    encoder: Encoder
    head: Mlp
    decoder: Decoder | None = None
    alibi: Alibi | None = None
    mean: Sequence[float] = IMAGENET_MEAN
    std: Sequence[float] = IMAGENET_STD
    class_tokens: int = 1
    class_init: Any = beit_init
    shared_relative: bool = True
    absolute: bool = False
    sincos: bool = False
    dropout: float = 0.0
    dtype: Any = jnp.float32
    padding: ClassVar[str] = "exact"  # images have none

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.image[0] // self.patches.patch, self.image[1] // self.patches.patch

    def setup(self):
        E, cells = self.class_tokens, self.grid[0] * self.grid[1]
        if E:
            shape = (self.width,) if E == 1 else (E, self.width)
            self.class_token = self.param("class_token", self.class_init, shape)
        if self.decoder is None:
            self.mask_embedding = self.param("mask_embedding", beit_init, (self.width,))
        if self.absolute:
            self.positions = self.param("positions", beit_init, (E + cells, self.width))
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
        record: Record | None = None, collect: bool = False, keep: Array | None = None,
    ) -> Encoded:  # fmt: skip
        """mask bool [B, N]: patches replaced by the learned vector (not with a decoder).

        keep: int [B * M, V], the patches that the blocks see, None for all. Returns x [B * M, V, D]
        and extra [B * M, E, D] (class tokens).
        """
        x, E = tokens.x, self.class_tokens
        if mask is not None and self.decoder is None:
            x = jnp.where(mask[..., None], self.mask_embedding.astype(x.dtype), x)
        first = [self.class_token.reshape(E, self.width).astype(x.dtype)] if E else []
        if self.absolute:
            positions = self.positions.astype(x.dtype)
            x, first = x + positions[E:], [token + positions[:E] for token in first]
        if self.sincos:
            x = x + sincos(self.grid, self.width).astype(x.dtype)
        places = jnp.arange(x.shape[1])[None] if keep is None else keep
        alibi = None if self.alibi is None else self.alibi(places, self.grid, E)
        x = take(x, keep)
        first = [jnp.broadcast_to(token, (x.shape[0], *token.shape)) for token in first]
        x = jnp.concatenate([*first, x], axis=1)
        bias = relative_bias(self.relative_bias, self.index) if self.shared_relative else None
        post = self.encoder.norm == "post"
        x = self.norm(x) if post else x
        keys = split(key, 2)
        x = dropout(x, self.dropout, keys[0])
        record = record and record._replace(skip=E)
        out = self.encoder(x, bias=bias, alibi=alibi, key=keys[1], record=record, collect=collect)
        x = out.x if post else self.norm(out.x)
        return out._replace(x=x[:, E:], extra=x[:, :E])

    def decode(
        self, x: Array, mask: Array, noise: Array, valid: Array | None = None, key: Key = None
    ) -> Array:
        """What the student saw [B, V, D] -> features of the whole grid; see `Decoder`."""
        return self.decoder(x, mask, noise, valid, key)

    def predict(self, x: Array) -> Array:  # [..., C] -> [..., D]
        return self.head(x)

    def __call__(self, batch: Batch) -> Array:
        """Touches every parameter: for initialisation."""
        tokens = self.features(batch)
        mask = jnp.zeros(tokens.x.shape[:2], bool)
        x = self.encode(tokens, mask).x
        return self.predict(x if self.decoder is None else self.decode(x, mask, x))


def make_model(
    *, width: int, encoder: Options, image: int | Sequence[int] = 224, patch: int = 16,
    mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD,
    class_tokens: int = 1, shared_relative: bool = True, absolute: bool = False,
    sincos: bool = False, alibi: Options | None = None, head: Options = FROZEN,
    decoder: Options | None = None, initializer: str = "beit", dropout: float = 0.0,
    dtype: Any = jnp.float32,
) -> VisionModel:  # fmt: skip
    """Config section `model` of vision; nested sections are the options of the parts.

    width: D. image, patch: pixels; image may be (height, width). mean, std: statistics of pixels in
    [0, 1] per channel, for uint8 images. class_tokens: in front of the patches. shared_relative:
    one relative position bias for all blocks. absolute: learned positions, class token included.
    sincos: fixed positions of the patches. alibi: None for none. decoder: None if the student sees
    masked patches as a learned vector (1.0) and not only the others (2.0). initializer: 'beit'
    (1.0), or 'bert' with Xavier patches and class tokens N(0, 1) (2.0).
    """
    size = (image, image) if isinstance(image, int) else tuple(image)
    if size[0] % patch or size[1] % patch:
        raise UserError(f"config.model.image: {size} is not a multiple of patch {patch}")
    common = dict(dtype=dtype)
    inits = {"initializer": initializer}
    encoder = build(Encoder, "model.encoder", inits | dict(encoder), width=width, **common)
    if (decoder is not None or class_tokens != 1) and (shared_relative or encoder.relative):
        raise UserError(
            "config.model.shared_relative: relative position biases are of the whole grid and one "
            "class token; use shared_relative=False and sincos=True"
        )
    grid = size[0] // patch, size[1] // patch
    return VisionModel(
        width,
        size,
        Patches(width, patch, initializer, **common),
        encoder,
        build(Mlp, "model.head", inits | dict(head), out=width, **common),
        build(Decoder, "model.decoder", decoder, grid=grid, **common),
        build(Alibi, "model.alibi", alibi, layers=encoder.depth, heads=encoder.heads),
        tuple(mean),
        tuple(std),
        class_tokens,
        beit_init if initializer == "beit" else nn.initializers.normal(1.0),
        shared_relative,
        absolute,
        sincos,
        dropout,
        dtype,
    )


def flops(
    model: VisionModel, shapes: Mapping[str, Any], masked: int, seen: int
) -> dict[str, float]:
    """Forward FLOPs of one example, by part: 2 per multiply-add, matrix products only.

    shapes: shapes of one example (`Examples.example`). masked: positions through the head. seen:
    positions through the student's blocks.
    """
    D, patches = model.width, model.grid[0] * model.grid[1]
    pixels = model.patches.patch**2 * shapes["image"].shape[-1]
    e, E = model.encoder, model.class_tokens
    whole, part = (
        encoder_flops(depth=e.depth, width=D, mlp=e.mlp, tokens=E + n) for n in (patches, seen)
    )
    head = decoded_flops(model.decoder, model.head, width=D, tokens=patches, masked=masked)
    return {"frontend": 2.0 * patches * pixels * D, "encoder": whole, "student": part + head}
