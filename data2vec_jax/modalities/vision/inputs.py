"""Images for fine-tuning: random crop, mirror, RandAugment; centre crop in evaluation.

Conversion spec 2.1.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import jax
import numpy as np
from PIL import Image

from data2vec_jax.core.config import PositiveInt, Range, Share
from data2vec_jax.data.codecs.image import MAX_PIXELS, WHITE, resize
from data2vec_jax.modalities.contract import Inputs
from data2vec_jax.modalities.vision import data
from data2vec_jax.modalities.vision.crops import AreaShare, Aspect, random_box
from data2vec_jax.modalities.vision.data import Level
from data2vec_jax.modalities.vision.randaugment import randaugment


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageInputConfig:
    """Config section `examples` of vision, in fine-tuning; a `Layout`."""

    image: Annotated[int, Range(1, 2**14)]  # side in pixels
    channels: Literal[1, 3] = 3
    scale: tuple[AreaShare, AreaShare] = (0.08, 1.0)  # share of the area that a random crop covers
    aspect: tuple[Aspect, Aspect] = (3 / 4, 4 / 3)  # its width / height, log-uniform
    flip: Share = 0.5  # probability of a mirror image
    operations: Annotated[int, Range(0, 100)] = 2  # of `randaugment`, one after the other
    magnitude: Annotated[float, Range(0, 10)] = 9.0  # of `randaugment`
    # In evaluation the shorter side becomes `image / crop` pixels before the centre crop.
    crop: Annotated[float, Range(0.1, 1)] = 224 / 256
    max_pixels: PositiveInt = MAX_PIXELS  # see `data.ImageConfig`
    background: tuple[Level, Level, Level] = WHITE  # see `data.ImageConfig`
    buckets: ClassVar[Sequence[int]] = (1,)
    padded: ClassVar[bool] = False

    def __post_init__(self):
        data.check_crop(self)

    @property
    def enough(self) -> float:
        """See `data.ImageConfig`."""
        return self.image / min(data.smallest_crop(self.scale, self.aspect), self.crop)

    @property
    def shapes(self) -> list[dict[str, jax.ShapeDtypeStruct]]:
        return data.image_shapes(self.image, self.channels)


class Images(Inputs):
    """image uint8 [side, side, channels]. With `like` (evaluation) nothing is random."""

    def __init__(self, source: Any, like: "Images | None" = None, **options: Any):
        self.fixed = like is not None
        self.layout = self.config = ImageInputConfig(**options)
        self.source = data.configured(source, self.config)
        self.lengths = np.ones(len(source), np.int64)
        self.bucket_of = np.zeros(len(source), np.int32)

    def load(self, index: int, bucket: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """See `prepare`."""
        return self.prepare(index, self.source[index], bucket, rng)

    def prepare(
        self, index: int, item: Mapping[str, Any], bucket: int, rng: np.random.Generator
    ) -> dict[str, np.ndarray]:
        """{'image': uint8 [side, side, channels]}."""
        picture = data.picture_of(item["image"], self.source, index)
        channels, side = self.config.channels, self.config.image
        if channels != len(picture.getbands()):
            picture = picture.convert("RGB" if channels == 3 else "L")
        picture = self._centre(picture) if self.fixed else self._augment(picture, rng)
        return {"image": np.asarray(picture, np.uint8).reshape(side, side, -1)}

    def _augment(self, picture, rng):
        config = self.config
        box = random_box(*picture.size, config.scale, config.aspect, rng)
        picture = resize(picture, (config.image,) * 2, box=box)
        if rng.random() < config.flip:
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        fill = (124, 116, 104)  # the mean colour of ImageNet
        return randaugment(
            picture,
            rng,
            operations=config.operations,
            magnitude=config.magnitude,
            fill=fill if config.channels == 3 else 0,
        )

    def _centre(self, picture):
        side = self.config.image
        shorter = int(side / self.config.crop)
        size = [int(shorter * edge / min(picture.size)) for edge in picture.size]
        if tuple(size) != picture.size:
            picture = resize(picture, tuple(size))
        left, top = (round((edge - side) / 2) for edge in size)
        return picture.crop((left, top, left + side, top + side))

    def check(self, model: Any) -> None:
        """The sizes of images must agree."""
        data.check_size(model, self.config)
