"""Vision: image -> patches -> encoder.

B batch, M masks of an example, N patches, V of them visible, E class tokens, D width.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from data2vec_jax.core.errors import UserError, nearest
from data2vec_jax.modalities.contract import FROZEN, Batch, Options, Tokens, build
from data2vec_jax.models.decoder import Decoder
from data2vec_jax.models.encoder import Encoder
from data2vec_jax.models.layers import Array, Key, Mlp, beit_init
from data2vec_jax.models.patches import Patches, PatchModel
from data2vec_jax.models.patches import flops as patches_flops
from data2vec_jax.models.positions import Alibi

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
RESAMPLINGS = ("grid", "huggingface")


class VisionModel(PatchModel):
    """Image in, patch representations out. Made from a config section by `make_model`."""

    mean: Sequence[float] = IMAGENET_MEAN
    std: Sequence[float] = IMAGENET_STD

    def features(self, batch: Batch, key: Key = None) -> Tokens:
        """image [B, height, width, C], uint8 or already normalised floats -> x [B, N, D]."""
        return Tokens(self.patches(self.pixels(batch["image"])))

    def pixels(self, image: Array) -> Array:
        """uint8 [B, height, width, C] -> normalised floats, which stay as they are."""
        if image.dtype != jnp.uint8:
            return image
        mean, std = jnp.asarray(self.mean), jnp.asarray(self.std)
        return (image.astype(jnp.float32) / 255.0 - mean) / std


def make_model(
    *, width: int, encoder: Options, image: int | Sequence[int] = 224,
    patch: int | Sequence[int] = 16, patch_width: int | None = None,
    mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD,
    class_tokens: int = 1, shared_relative: bool = True, absolute: bool = False,
    sincos: bool = False, alibi: Options | None = None, head: Options = FROZEN,
    decoder: Options | None = None, mask_embedding: bool = True, final_norm: bool = True,
    resampling: str = "grid", initializer: str = "beit", dropout: float = 0.0,
    dtype: Any = jnp.float32,
) -> VisionModel:  # fmt: skip
    """Config section `model` of vision; nested sections are the options of the parts.

    width: D. image, patch: pixels; both may be (height, width). patch_width: see `Patches.inner`.
    mean, std: statistics of pixels in [0, 1] per channel, for uint8 images. class_tokens: in front
    of the patches. shared_relative: one relative position bias for all blocks. absolute: learned
    positions, class token included. sincos: fixed positions of the patches. alibi: None for none.
    decoder: None if the student sees masked patches as a learned vector (1.0) and not only the
    others (2.0). mask_embedding: there is such a vector. final_norm: a norm follows pre-norm
    blocks. resampling: how positions fit images of another size: 'grid', or 'huggingface', which is
    the same for square images but for others repeats its class's mistakes (see `resize_relative`).
    initializer: 'beit' (1.0), or 'bert' (2.0) or another of `INITS` with Xavier patches and class
    tokens N(0, 1).
    """
    size, patch = ((x, x) if isinstance(x, int) else tuple(x) for x in (image, patch))
    if resampling not in RESAMPLINGS:
        hint = nearest(resampling, RESAMPLINGS)
        raise UserError(f"config.model.resampling: no '{resampling}'{hint}")
    if resampling == "grid" and (size[0] % patch[0] or size[1] % patch[1]):
        raise UserError(f"config.model.image: {size} is not a multiple of patch {patch}")
    common = dict(dtype=dtype)
    inits = {"initializer": initializer}
    encoder = inits | dict(encoder)
    if encoder.get("relative") is not None:
        encoder["relative"] = tuple(encoder["relative"])
    encoder = build(Encoder, "model.encoder", encoder, width=width, **common)
    if (decoder is not None or class_tokens != 1) and (shared_relative or encoder.relative):
        raise UserError(
            "config.model.shared_relative: relative position biases are of the whole grid and one "
            "class token; use shared_relative=False and sincos=True"
        )
    grid = size[0] // patch[0], size[1] // patch[1]
    return VisionModel(
        width,
        size,
        Patches(width, patch, initializer, patch_width, **common),
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
        mask_embedding,
        final_norm,
        resampling,
        dropout,
        dtype,
    )


def flops(
    model: VisionModel, shapes: Mapping[str, Any], masked: int, seen: int
) -> dict[str, float]:
    """Forward FLOPs of one example: `models.patches.flops`."""
    return patches_flops(model, shapes["image"].shape[-1], masked, seen)
