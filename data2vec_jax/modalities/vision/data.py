"""Image examples: colour jitter, flip, random resized crop. Pixels stay uint8 until the device."""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import jax
import numpy as np
from PIL import Image

from data2vec_jax.core.config import PositiveInt, Range, Share, check_section
from data2vec_jax.core.errors import ExampleError, UserError
from data2vec_jax.data.codecs.image import MAX_PIXELS, WHITE, read_image, resize
from data2vec_jax.modalities.contract import Examples, check_varies
from data2vec_jax.modalities.vision.crops import (
    AreaShare,
    Aspect,
    jittered,
    random_box,
    random_jitter,
)
from data2vec_jax.modalities.vision.views import Views

Level = Annotated[int, Range(0, 255)]  # of a colour
CELLS = 32  # a side, of hand-made features
THINNED = 64  # rows and columns at least, of those that tell the mean of an image


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageConfig:
    """Config section `examples` of vision, in pretraining; a `Layout`.

    Crops are resized with bicubic interpolation (spec 1.2).
    """

    image: Annotated[int, Range(1, 2**14)]  # side in pixels
    channels: Literal[1, 3] = 3
    # Strength of brightness, contrast and saturation, each a factor uniform in
    # [1 - jitter, 1 + jitter], in random order, before the crop.
    jitter: Annotated[float, Range(0, 10)] = 0.4
    flip: Share = 0.5  # probability of a mirror image
    scale: tuple[AreaShare, AreaShare] = (0.08, 1.0)  # share of the area that a crop covers
    aspect: tuple[Aspect, Aspect] = (3 / 4, 4 / 3)  # its width / height, log-uniform
    max_pixels: PositiveInt = MAX_PIXELS  # larger images are left out, without decoding them
    background: tuple[Level, Level, Level] = WHITE  # red, green and blue behind transparent pixels
    # Of `Views`, for objectives that compare several of an image; `jitter` is then not used.
    views: Mapping[str, Any] | None = None
    buckets: ClassVar[Sequence[int]] = (1,)
    padded: ClassVar[bool] = False

    def __post_init__(self):
        check_crop(self)
        if self.views is not None:
            check_section("examples.views", self.views, Views)

    @property
    def drawn(self) -> Views | None:
        """The section `views`."""
        return None if self.views is None else Views(**self.views)

    @property
    def enough(self) -> float:
        """Pixels of an image's shorter side, of which no crop need be enlarged."""
        views = self.drawn
        large = self.image / smallest_crop(self.scale, self.aspect)
        if views is None or not views.local:
            return large
        return max(large, views.local_image / smallest_crop(views.local_scale, self.aspect))

    @property
    def shapes(self) -> list[dict[str, jax.ShapeDtypeStruct]]:
        (one,) = image_shapes(self.image, self.channels)
        return [one if self.views is None else one | self.drawn.shapes(one["image"])]


def check_crop(config: Any) -> None:
    """Raises UserError unless the ranges of random crops go from less to more."""
    for name, (low, high) in (("scale", config.scale), ("aspect", config.aspect)):
        if low > high:
            raise UserError(f"config.examples.{name}: {low} is more than {high}")


def smallest_crop(scale: Sequence[float], aspect: Sequence[float]) -> float:
    """The shorter side of the smallest random crop, of the image's shorter side."""
    low, high = aspect
    # The last two are of the centre crop, where all aspects are on one side of 1.
    return min(math.sqrt(scale[0] * min(low, 1 / high, 1)), high, 1 / low)


def image_shapes(side: int, channels: int) -> list[dict[str, jax.ShapeDtypeStruct]]:
    """Shapes of examples: there is one size of images."""
    return [{"image": jax.ShapeDtypeStruct((side, side, channels), np.uint8)}]


def configured(source: Any, config: Any) -> Any:
    """A source whose images are read as `config` says; one of another codec as it is."""
    options = {
        "background": tuple(config.background),
        "max_pixels": config.max_pixels,
        "enough": config.enough,
    }
    codec = getattr(source, "codec", None)
    if codec is None or getattr(codec.read, "func", None) is not read_image:
        return source
    return source.with_codec(
        dataclasses.replace(
            codec,
            read=functools.partial(codec.read, **options),
            read_record=functools.partial(codec.read_record, **options),
        )
    )


def picture_of(pixels: np.ndarray, source: Any, index: int) -> Image.Image:
    """An example's pixels. Raises ExampleError: they are none."""
    if not pixels.size:
        raise ExampleError(source.location(index), "empty", "image has no pixels")
    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)


def check_size(model: Any, config: Any) -> None:
    """Raises UserError unless the model reads images of the examples' side and channels."""
    side = config.image
    if model.image != (side, side):
        raise UserError(f"config.model.image is {model.image}, config.examples.image {side}")
    if model.channels != config.channels:
        raise UserError(
            f"config.examples.channels is {config.channels}, but config.model.mean and std are of "
            f"{model.channels}"
        )


class VisionExamples(Examples):
    """One augmented image, seen by student and teacher alike (spec 1.2), or several views of it.

    With `like` (evaluation) one image: resized so that the shorter side fits, centre crop, nothing
    random.
    """

    def __init__(self, source: Any, like: "VisionExamples | None" = None, **options: Any):
        self.fixed = like is not None
        self.layout = self.config = ImageConfig(**options)
        self.views = self.config.drawn
        self.source = configured(source, self.config)
        self.lengths = np.ones(len(source), np.int64)
        self.bucket_of = np.zeros(len(source), np.int32)

    def load(self, index: int, bucket: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """{'image': uint8 [side, side, channels]}, and with `views` what `Views.draw` returns."""
        pixels, mode = self.source[index]["image"], "RGB" if self.config.channels == 3 else "L"
        check_varies(pixels, self.source, index)
        if self.views and not self.fixed:
            picture = picture_of(pixels, self.source, index).convert(mode)
            return self.views.draw(picture, self.config, rng)
        if self.fixed:
            picture = self._fit(picture_of(pixels, self.source, index))
        else:
            picture = self._augment(pixels, index, rng)
        picture = picture.convert(mode)
        return {"image": np.asarray(picture, np.uint8).reshape(*(self.config.image,) * 2, -1)}

    def _augment(self, pixels, index, rng):
        """Jitter, flip and resized crop, of no more pixels than the crop is made of."""
        config, (height, width) = self.config, pixels.shape[:2]
        jitter = random_jitter(config.jitter, rng) if config.jitter else {}
        mirrored = rng.random() < config.flip
        box = np.array(random_box(width, height, config.scale, config.aspect, rng))
        reach = 2 * np.maximum((box[2:] - box[:2]) / config.image, 1)  # of the bicubic filter
        left, top = np.maximum(np.floor(box[:2] - reach), 0).astype(int)
        right, bottom = np.minimum(np.ceil(box[2:] + reach), (width, height)).astype(int)
        columns = slice(width - right, width - left) if mirrored else slice(left, right)
        part = pixels[top:bottom, columns]
        picture = picture_of(part[:, ::-1] if mirrored else part, self.source, index)
        if jitter:
            every = max(min(height, width) // THINNED, 1)
            picture = jittered(picture, pixels[::every, ::every], jitter)
        return resize(picture, (config.image,) * 2, box=tuple(box - [left, top, left, top]))

    def _fit(self, picture):
        side = min(picture.size)
        left, top = ((edge - side) / 2 for edge in picture.size)
        box = (left, top, left + side, top + side)
        return resize(picture, (self.config.image,) * 2, box=box)

    def check(self, model: Any) -> None:
        """The sizes of images must agree, and a view must have a patch."""
        check_size(model, self.config)
        if self.views and self.views.local:
            side = self.views.local_image
            if not all(model.patches.grid(side, side)):
                raise UserError(
                    f"config.examples.views.local_image: {side} pixels are less than one patch of "
                    f"{model.patches.patch}"
                )


def pixels(train: Mapping[str, np.ndarray], inputs: Mapping[str, np.ndarray]) -> np.ndarray:
    """Hand-made features: images uint8 [N, side, side, C] -> their pixels, float32 [N, F].

    Of images above `CELLS` pixels, means of squares that make at most so many a side.
    """
    del train
    images = inputs["image"]
    N, side, _, C = images.shape
    cell = -(-side // CELLS)
    count = side // cell
    images = images[:, : count * cell, : count * cell].reshape(N, count, cell, count, cell, C)
    return images.mean((2, 4), dtype=np.float32).reshape(N, -1) / 255
