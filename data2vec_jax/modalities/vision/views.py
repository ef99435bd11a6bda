"""Random views of one image, for objectives that compare them (DINO, BYOL; baselines spec 6)."""

import dataclasses
from typing import Annotated, Any

import jax
import numpy as np
from PIL import Image, ImageFilter, ImageOps

from data2vec_jax.core.config import NonNegativeFloat, Range, Share
from data2vec_jax.core.errors import UserError
from data2vec_jax.data.codecs.image import resize
from data2vec_jax.modalities.vision.crops import AreaShare, jittered, random_box

# Of the first view, of the second, and of small ones.
Probabilities = tuple[Share, Share, Share]
Hue = Annotated[float, Range(0, 0.5)]
COLOURS = ("brightness", "contrast", "saturation", "hue")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Views:
    """Config section `examples.views`; the colours are DINO's.

    Two views have the size, area, aspect and mirror images of the section `examples`, whose
    `jitter` is not used. The steps, in this order: crop, mirror image, jitter of colours, grey,
    blur, solarise.
    """

    local: Annotated[int, Range(0, 64)] = 0  # small views; DINO has 8
    local_image: Annotated[int, Range(1, 2**14)] = 96  # their side in pixels
    local_scale: tuple[AreaShare, AreaShare] = (0.05, 0.4)  # share of the area that they cover
    # Strengths s of brightness, contrast and saturation, each a factor uniform in [1 - s, 1 + s];
    # and of the hue, which moves by up to this share of its circle. In random order.
    jitter: tuple[NonNegativeFloat, NonNegativeFloat, NonNegativeFloat, Hue] = (
        0.4,
        0.4,
        0.2,
        0.1,
    )
    jitter_prob: Share = 0.8
    grey: Share = 0.2
    blur: Probabilities = (1.0, 0.1, 0.5)
    radius: tuple[NonNegativeFloat, NonNegativeFloat] = (0.1, 2.0)  # of a blur, in pixels, uniform
    solarise: Probabilities = (0.0, 0.2, 0.0)  # pixels from 128 on are inverted

    def __post_init__(self):
        for name in ("local_scale", "radius"):
            low, high = getattr(self, name)
            if low > high:
                raise UserError(f"config.examples.views.{name}: {low} is more than {high}")

    def shapes(self, image: jax.ShapeDtypeStruct) -> dict[str, jax.ShapeDtypeStruct]:
        """Arrays of an example beside `image`, the first view."""
        side, channels = self.local_image, image.shape[-1]
        small = jax.ShapeDtypeStruct((self.local, side, side, channels), image.dtype)
        return {"twin": image} | ({"local": small} if self.local else {})

    def draw(
        self, picture: Image.Image, config: Any, rng: np.random.Generator
    ) -> dict[str, np.ndarray]:
        """image and twin, uint8 [side, side, C], and local [local, local_image, local_image, C], if
        there are small views. config: the section `examples`."""

        def view(kind, side, scale):
            box = random_box(*picture.size, scale, config.aspect, rng)
            x = resize(picture, (side, side), box=box)
            if rng.random() < config.flip:
                x = x.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            return np.asarray(self._changed(x, kind, rng), np.uint8).reshape(side, side, -1)

        first, second = (view(kind, config.image, config.scale) for kind in (0, 1))
        small = [view(2, self.local_image, self.local_scale) for _ in range(self.local)]
        return {"image": first, "twin": second} | ({"local": np.stack(small)} if small else {})

    def _changed(self, x, kind, rng):
        """Other colours. kind: which of `Probabilities`."""
        if rng.random() < self.jitter_prob:
            for i in rng.permutation(len(COLOURS)):
                strength = self.jitter[i]
                if COLOURS[i] == "hue":
                    x = with_hue(x, rng.uniform(-strength, strength))
                else:
                    factor = rng.uniform(max(0.0, 1 - strength), 1 + strength)
                    x = jittered(x, np.atleast_3d(np.asarray(x)), {COLOURS[i]: factor})
        if rng.random() < self.grey:
            x = x.convert("L").convert(x.mode)
        if rng.random() < self.blur[kind]:
            x = x.filter(ImageFilter.GaussianBlur(rng.uniform(*self.radius)))
        return ImageOps.solarize(x, 128) if rng.random() < self.solarise[kind] else x


def with_hue(picture: Image.Image, share: float) -> Image.Image:
    """The hue moved by a share of its circle; grey pictures have none."""
    if picture.mode != "RGB":
        return picture
    hue, *others = picture.convert("HSV").split()
    moved = (np.asarray(hue, np.int32) + round(256 * share)) % 256
    return Image.merge("HSV", (Image.fromarray(moved.astype(np.uint8)), *others)).convert("RGB")
