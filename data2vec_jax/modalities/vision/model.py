"""Vision: image -> patches -> encoder.

B batch, M masks of an example, N patches, V of them visible, E class tokens, D width.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import flax.linen as nn
import jax.numpy as jnp

from data2vec_jax.core.config import DropRate, Length, PositiveFloat, Range, Size
from data2vec_jax.core.errors import UserError
from data2vec_jax.modalities.contract import Batch, Options, build
from data2vec_jax.models.base import ViewBatch
from data2vec_jax.models.decoder import Decoder
from data2vec_jax.models.encoder import Encoder
from data2vec_jax.models.layers import INITS, Array, Mlp, beit_init
from data2vec_jax.models.patches import Patches, PatchModel, check_grid
from data2vec_jax.models.patches import flops as patches_flops
from data2vec_jax.models.positions import Alibi

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
Side = Annotated[int, Range(1, 2**14)]  # pixels


class VisionModel(PatchModel):
    """Image in, patch representations out. Made from a config section by `VisionConfig`."""

    mean: Sequence[float] = IMAGENET_MEAN
    std: Sequence[float] = IMAGENET_STD
    has_views: ClassVar[bool] = True

    def normalised(self, batch: Batch) -> Array:
        """image [B, height, width, C], uint8 -> normalised floats, which stay as they are."""
        image = batch["image"]
        if image.dtype != jnp.uint8:
            return image
        mean, std = jnp.asarray(self.mean), jnp.asarray(self.std)
        return (image.astype(jnp.float32) / 255.0 - mean) / std

    def views(self, batch: Batch) -> list[ViewBatch]:
        """See `base.Model`."""
        large = jnp.stack([batch["image"], batch.get("twin", batch["image"])], 1)
        return [self._views(x) for x in (large, batch.get("local")) if x is not None]

    def _views(self, images):  # [B, V, height, width, C]
        B, V, *size = images.shape
        options = {"grid": self.patches.grid(*size[:2])}
        return ViewBatch(V, {"image": images.reshape(B * V, *size)}, options)

    def view_models(self, shapes: Mapping[str, Any]) -> list[tuple[int, "VisionModel"]]:
        """See `base.Model`."""
        if "local" not in shapes:
            return [(2, self)]
        V, *size = shapes["local"].shape[:3]
        return [(2, self), (V, self.clone(image=tuple(size)))]


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """Config section `model` of vision; nested sections are the options of the parts."""

    width: Size  # D
    encoder: Options  # of `Encoder`
    image: Side | tuple[Side, Side] = 224  # pixels, or (height, width)
    patch: Side | tuple[Side, Side] = 16  # pixels, or (height, width)
    patch_width: Size | None = None  # see `Patches.inner`
    # Statistics of pixels in [0, 1] per channel, for uint8 images.
    mean: Annotated[Sequence[float], Length()] = IMAGENET_MEAN
    std: Annotated[Sequence[PositiveFloat], Length()] = IMAGENET_STD
    class_tokens: Annotated[int, Range(0, 1024)] = 1  # in front of the patches
    shared_relative: bool = True  # one relative position bias for all blocks
    absolute: bool = False  # learned positions, class token included
    sincos: bool = False  # fixed positions of the patches
    alibi: Options | None = None  # of `Alibi`; None for none
    head: Options = dataclasses.field(default_factory=dict)  # of `Mlp`
    # Of `Decoder`. None: the student sees masked patches as a learned vector (1.0); with a decoder
    # it does not see them (2.0).
    decoder: Options | None = None
    mask_embedding: bool = True  # there is a learned vector for masked patches
    final_norm: bool = True  # a norm follows pre-norm blocks
    # How positions fit images of another size: 'grid', or 'huggingface', which is the same for
    # square images, but for others repeats its class's mistakes (see `resize_relative`).
    resampling: Literal["grid", "huggingface"] = "grid"
    # 'beit' (1.0), or 'bert' (2.0) or another of `INITS` with Xavier patches and class tokens
    # N(0, 1).
    initializer: Literal[*INITS] = "beit"
    class_std: PositiveFloat | None = None  # class tokens N(0, class_std^2); None: as above
    dropout: DropRate = 0.0  # of the encoder's input
    dtype: Any = jnp.float32

    def make(self) -> VisionModel:
        """The model. Raises UserError: options that do not go together."""
        size, patch = ((x, x) if isinstance(x, int) else tuple(x) for x in (self.image, self.patch))
        if len(self.mean) != len(self.std):
            raise UserError("config.model: mean and std are of as many channels")
        if self.resampling == "grid" and (size[0] % patch[0] or size[1] % patch[1]):
            raise UserError(f"config.model.image: {size} is not a multiple of patch {patch}")
        grid = size[0] // patch[0], size[1] // patch[1]
        if not all(grid):
            raise UserError(f"config.model.image: {size} is less than one patch of {patch}")
        related = self.shared_relative or self.encoder.get("relative") is not None
        check_grid(grid, self.width, related)
        common = dict(dtype=self.dtype)
        inits = {"initializer": self.initializer}
        options = inits | dict(self.encoder)
        if options.get("relative") is not None:
            options["relative"] = tuple(options["relative"])
        encoder = build(Encoder, "model.encoder", options, width=self.width, **common)
        relative = self.shared_relative or encoder.relative
        if (self.decoder is not None or self.class_tokens != 1) and relative:
            raise UserError(
                "config.model.shared_relative: relative position biases are of the whole grid and "
                "one class token; use shared_relative=False and sincos=True"
            )
        if encoder.relative not in (None, grid):
            raise UserError(
                f"config.model.encoder.relative: {encoder.relative}, but the patches are {grid}"
            )
        class_init = beit_init if self.initializer == "beit" else nn.initializers.normal(1.0)
        if self.class_std:
            class_init = nn.initializers.normal(self.class_std)
        head = inits | dict(self.head)
        return VisionModel(
            width=self.width,
            image=size,
            patches=Patches(self.width, patch, self.initializer, self.patch_width, **common),
            encoder=encoder,
            head=build(Mlp, "model.head", head, out=self.width, **common),
            decoder=build(Decoder, "model.decoder", self.decoder, grid=grid, **common),
            alibi=build(
                Alibi, "model.alibi", self.alibi, layers=encoder.depth, heads=encoder.heads
            ),
            mean=tuple(self.mean),
            std=tuple(self.std),
            class_tokens=self.class_tokens,
            class_init=class_init,
            shared_relative=self.shared_relative,
            absolute=self.absolute,
            sincos=self.sincos,
            mask_embedding_used=self.mask_embedding,
            final_norm=self.final_norm,
            resampling=self.resampling,
            dropout=self.dropout,
            dtype=self.dtype,
        )


def flops(
    model: VisionModel, shapes: Mapping[str, Any], masked: int, seen: int
) -> dict[str, float]:
    """Forward FLOPs of one example: `models.patches.flops`."""
    return patches_flops(model, shapes["image"].shape[-1], masked, seen)
