"""Images for fine-tuning: random crop, mirror, RandAugment; centre crop in evaluation.

Conversion spec 2.1.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data2vec_jax.modalities.contract import Layout
from data2vec_jax.modalities.vision import data
from data2vec_jax.modalities.vision.randaugment import randaugment


def layout(
    *, image: int, channels: int = 3, scale: Sequence[float] = (0.08, 1.0),
    aspect: Sequence[float] = (3 / 4, 4 / 3), flip: float = 0.5, operations: int = 2,
    magnitude: float = 9.0, crop: float = 224 / 256,
) -> Layout:  # fmt: skip
    """Config section `examples` of vision.

    image: side in pixels. scale, aspect, flip: as in pretraining. operations, magnitude: of
    `randaugment`. crop: in evaluation the shorter side becomes `image / crop` pixels before the
    centre crop.
    """
    return data.layout(image=image, channels=channels)


class Images:
    """image uint8 [side, side, channels]. With `like` (evaluation) nothing is random."""

    def __init__(self, source: Any, like: "Images | None" = None, **options: Any):
        self.source, self.fixed, self.layout = source, like is not None, layout(**options)
        self.image, _, self.channels = self.layout.shapes[0]["image"].shape
        defaults = layout.__kwdefaults__ | options
        self.scale, self.aspect, self.flip, self.operations, self.magnitude, self.crop = (
            defaults[name]
            for name in ("scale", "aspect", "flip", "operations", "magnitude", "crop")
        )
        self.lengths = np.ones(len(source), np.int64)
        self.bucket_of = np.zeros(len(source), np.int32)

    def load(self, index: int, bucket: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """See `prepare`."""
        return self.prepare(index, self.source[index], bucket, rng)

    def prepare(
        self, index: int, item: Mapping[str, Any], bucket: int, rng: np.random.Generator
    ) -> dict[str, np.ndarray]:
        """{'image': uint8 [side, side, channels]}."""
        pixels = item["image"]
        picture = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
        if self.channels != len(picture.getbands()):
            picture = picture.convert("RGB" if self.channels == 3 else "L")
        picture = self._centre(picture) if self.fixed else self._augment(picture, rng)
        return {"image": np.asarray(picture, np.uint8).reshape(self.image, self.image, -1)}

    def _augment(self, picture, rng):
        box = data.random_box(*picture.size, self.scale, self.aspect, rng)
        picture = picture.resize((self.image,) * 2, Image.Resampling.BICUBIC, box=box)
        if rng.random() < self.flip:
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        fill = (124, 116, 104)  # the mean colour of ImageNet
        return randaugment(
            picture, rng, operations=self.operations, magnitude=self.magnitude,
            fill=fill if self.channels == 3 else 0,
        )  # fmt: skip

    def _centre(self, picture):
        shorter = int(self.image / self.crop)
        size = [int(shorter * edge / min(picture.size)) for edge in picture.size]
        if tuple(size) != picture.size:
            picture = picture.resize(size, Image.Resampling.BICUBIC)
        left, top = (round((edge - self.image) / 2) for edge in size)
        return picture.crop((left, top, left + self.image, top + self.image))

    def check(self, model: Any) -> None:
        """The sizes of images must agree."""
        data.check_size(model, self.image)

    def save_assets(self, folder: Path) -> None:
        """Nothing beside the config."""
