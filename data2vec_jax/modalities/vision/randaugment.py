"""RandAugment (Cubuk 2020, arXiv 1909.13719), with operations that grow stronger with magnitude.

What timm calls `rand-m9-mstd0.5-inc1` (conversion spec 2.1): two operations an image, each done
with probability 0.5, with a strength from N(9, 0.5) within [0, 10].
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

Fill = int | tuple[int, ...]
Operation = Callable[[Image.Image, float, Fill, np.random.Generator], Image.Image]


def sign(rng: np.random.Generator) -> float:
    """-1 or 1."""
    return 1.0 if rng.random() < 0.5 else -1.0


def affine(picture: Image.Image, matrix: Sequence[float], fill: Fill, rng: Any) -> Image.Image:
    """Output pixel (x, y) is input pixel (a x + b y + c, d x + e y + f)."""
    filters = Image.Resampling.BILINEAR, Image.Resampling.BICUBIC
    return picture.transform(
        picture.size, Image.Transform.AFFINE, matrix, filters[int(rng.integers(2))], fillcolor=fill
    )


def rotate(x, strength, fill, rng):
    """By up to 30 degrees."""
    filters = Image.Resampling.BILINEAR, Image.Resampling.BICUBIC
    return x.rotate(30 * strength * sign(rng), filters[int(rng.integers(2))], fillcolor=fill)


def shear_x(x, strength, fill, rng):
    """By up to 0.3."""
    return affine(x, (1, 0.3 * strength * sign(rng), 0, 0, 1, 0), fill, rng)


def shear_y(x, strength, fill, rng):
    return affine(x, (1, 0, 0, 0.3 * strength * sign(rng), 1, 0), fill, rng)


def translate_x(x, strength, fill, rng):
    """By up to 0.45 of the side."""
    return affine(x, (1, 0, 0.45 * strength * sign(rng) * x.width, 0, 1, 0), fill, rng)


def translate_y(x, strength, fill, rng):
    return affine(x, (1, 0, 0, 0, 1, 0.45 * strength * sign(rng) * x.height), fill, rng)


def posterise(x, strength, fill, rng):
    """Keeps 4 bits at strength 0, none at strength 1."""
    return _posterise(x, 4 - int(4 * strength))


def _posterise(x, bits):
    mask = 256 - 2 ** (8 - bits)
    return x.point([value & mask for value in range(256)] * len(x.getbands()))


def solarise(x, strength, fill, rng):
    """Inverts pixels at or above a threshold: 256 at strength 0, 0 at strength 1."""
    return ImageOps.solarize(x, 256 - min(256, int(256 * strength)))


def solarise_add(x, strength, fill, rng):
    """Adds up to 110 to the darker half."""
    added = min(128, int(110 * strength))
    table = [min(255, value + added) if value < 128 else value for value in range(256)]
    return x.point(table * len(x.getbands()))


def enhance(kind: Callable[[Image.Image], Any]) -> Operation:
    """Less or more of something, by up to 0.9."""
    return lambda x, strength, fill, rng: kind(x).enhance(max(0.1, 1 + 0.9 * strength * sign(rng)))


OPERATIONS: dict[str, Operation] = {
    "auto_contrast": lambda x, *_: ImageOps.autocontrast(x),
    "equalise": lambda x, *_: ImageOps.equalize(x),
    "invert": lambda x, *_: ImageOps.invert(x),
    "rotate": rotate,
    "posterise": posterise,
    "solarise": solarise,
    "solarise_add": solarise_add,
    "colour": enhance(ImageEnhance.Color),
    "contrast": enhance(ImageEnhance.Contrast),
    "brightness": enhance(ImageEnhance.Brightness),
    "sharpness": enhance(ImageEnhance.Sharpness),
    "shear_x": shear_x,
    "shear_y": shear_y,
    "translate_x": translate_x,
    "translate_y": translate_y,
}


def randaugment(
    picture: Image.Image,
    rng: np.random.Generator,
    *,
    operations: int = 2,
    magnitude: float = 9.0,
    deviation: float = 0.5,
    fill: Fill = 0,
) -> Image.Image:
    """`operations` random ones; mode L or RGB. fill: colour of what comes from outside."""
    names = list(OPERATIONS)
    for name in rng.choice(names, operations):
        if rng.random() < 0.5:
            strength = float(np.clip(rng.normal(magnitude, deviation), 0, 10)) / 10
            picture = OPERATIONS[name](picture, strength, fill, rng)
    return picture
