"""Random crops of an image, and random colours."""

import math
from collections.abc import Mapping, Sequence
from typing import Annotated

import numpy as np
from PIL import Image, ImageEnhance

from data2vec_jax.core.config import Range

AreaShare = Annotated[float, Range(above=0, most=1)]
Aspect = Annotated[float, Range(0.01, 100)]
TRIES = 10  # of a random crop, before the fallback to a centre crop
LUMA = (0.299, 0.587, 0.114)  # of red, green and blue (ITU-R 601)


def random_box(
    width: int,
    height: int,
    scale: Sequence[float],
    aspect: Sequence[float],
    rng: np.random.Generator,
) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of a random resized crop; a centre crop after `TRIES` misfits."""
    for _ in range(TRIES):
        area = width * height * rng.uniform(*scale)
        ratio = math.exp(rng.uniform(math.log(aspect[0]), math.log(aspect[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            return left, top, left + w, top + h
    w, h = width, height
    if width / height < aspect[0]:
        h = max(round(width / aspect[0]), 1)
    elif width / height > aspect[1]:
        w = max(round(height * aspect[1]), 1)
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def random_jitter(strength: float, rng: np.random.Generator) -> dict[str, float]:
    """Factors of brightness, contrast and saturation, in random order."""
    names = ("brightness", "contrast", "saturation")
    low, high = max(0.0, 1 - strength), 1 + strength
    return {names[i]: rng.uniform(low, high) for i in rng.permutation(len(names))}


def jittered(picture: Image.Image, whole: np.ndarray, factors: Mapping[str, float]) -> Image.Image:
    """Changes the colours of a picture as Pillow's `ImageEnhance` changes the image it is part of.

    whole: pixels of that image, uint8 [height, width, C], perhaps not all: contrast is around their
    mean luma, which saturation leaves as it is.
    """
    bands = len(picture.getbands())
    luma = np.array(LUMA if bands == 3 else (1.0,))
    for name, factor in factors.items():
        if name == "saturation":
            picture = ImageEnhance.Color(picture).enhance(factor)
            continue
        around = int(whole.mean((0, 1)) @ luma + 0.5) if name == "contrast" else 0
        values = Image.frombytes("L", (256, 1), bytes(range(256)))
        table = np.asarray(Image.blend(Image.new("L", values.size, around), values, factor))[0]
        picture, whole = picture.point(table.tolist() * bands), table[whole]
    return picture
