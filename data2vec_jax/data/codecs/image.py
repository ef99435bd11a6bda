"""Images, as RGB of 8 bits. Items hold image, uint8 [H, W, 3]."""

import functools
import io
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import numpy as np
from PIL import Image, ImageOps

from data2vec_jax.core.config import Range
from data2vec_jax.core.errors import ExampleError, UserError
from data2vec_jax.data.codecs.base import Codec, Item, Measure, unreadable

MAX_PIXELS = 50_000_000
WHITE = (255, 255, 255)
ORIENTATION = 0x0112  # the EXIF tag of how to turn a photo
DEFLATE = 1032  # bytes that one byte of a PNG can become, at most
MEASURES = (
    Measure("width", "pixels", 32, below="small"),
    Measure("height", "pixels", 32, below="small"),
    Measure("ratio", "of the longer side to the shorter", most=4, above="elongated"),
    Measure("contrast", "standard deviation, of 255", 2, below="of one colour"),
)


@dataclass(frozen=True, kw_only=True)
class ImageConversion:
    """How `prepare` changes images; by default not at all."""

    short_side: Annotated[int, Range(0, 2**14)] = field(
        default=0, metadata={"help": "larger ones shrink to this shorter side"}
    )
    encode: Literal["", "jpeg", "png"] = field(
        default="", metadata={"help": "all files, to this format"}
    )
    quality: Annotated[int, Range(1, 100)] = field(
        default=90, metadata={"help": "of JPEG; by default 90"}
    )

    def __post_init__(self):
        if self.quality != 90 and (self.encode == "png" or not (self.encode or self.short_side)):
            raise UserError(f"--quality={self.quality}: no JPEG is written; add --encode=jpeg")


def codec(
    kinds: Mapping[str, Callable[..., Any]] | None = None,
    background: Sequence[int] = WHITE,
    max_pixels: int = MAX_PIXELS,
) -> Codec:
    """The codec of images. In records: image_bytes (a file) or image (uint8 [H, W, C], or a file).

    background: red, green and blue, 0 to 255, of what lies behind transparent pixels. max_pixels:
    larger images are refused before they are decoded. Images are turned as their EXIF tag says.
    They are not measured: what reads them brings them to one size.
    """
    options = {"background": tuple(background), "max_pixels": max_pixels}
    return Codec(
        field="image",
        suffixes=(".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"),
        read=functools.partial(read_image, **options),
        record_fields=("image_bytes", "image"),
        read_record=functools.partial(read_record, **options),
        conversion=ImageConversion,
        convert=functools.partial(convert, **options),
        examine=examine,
        measures=MEASURES,
        kinds=kinds or {},
    )


def read_image(file: str | io.BytesIO, name: str, **options: Any) -> Item:
    """An image file -> {'image'}. Raises ExampleError: damaged, too large."""
    return {"image": decode_image(file, name, **options)}


def read_record(value: Any, rest: Item, name: str, **options: Any) -> Item:
    """A record's image, a file's bytes or pixels -> {'image'}."""
    if isinstance(value, bytes):
        return read_image(io.BytesIO(value), name, **options)
    pixels, most = np.asarray(value), options.get("max_pixels", MAX_PIXELS)
    if pixels.ndim > 1 and math.prod(pixels.shape[:2]) > most:
        height, width = pixels.shape[:2]
        raise too_large(name, width, height, most)
    return {"image": to_rgb(pixels, name, options.get("background", WHITE))}


def decode_image(
    file: str | io.BytesIO,
    name: str,
    *,
    background: Sequence[int] = WHITE,
    max_pixels: int = MAX_PIXELS,
    enough: float = math.inf,
) -> np.ndarray:
    """Image file -> uint8 [H, W, 3], on `background`, as its EXIF tag turns it.

    enough: pixels that are needed of the shorter side; a JPEG with at least two, four or eight
    times as many is decoded at that part of its size, for a part of the time and the memory.

    Raises ExampleError: damaged, or more pixels than `max_pixels`.
    """
    try:
        with Image.open(file) as image:
            check_size(image, file, name, max_pixels)
            if image.mode in ("I", "F"):
                text = "image has 32 bits a pixel, needed 8 or 16"
                raise ExampleError(name, "format", text)
            if parts := [k for k in (8, 4, 2) if min(image.size) >= k * enough]:
                image.draft(image.mode, tuple(n // parts[0] for n in image.size))
            image.load()
            image = upright(image)
            if image.mode.startswith("I;16"):  # convert() would clip, not scale
                return to_rgb((np.array(image) >> 8).astype(np.uint8), name)
            if image.has_transparency_data:
                image = on_background(image, background)
            return np.array(image if image.mode == "RGB" else image.convert("RGB"))
    except ExampleError:
        raise
    except Image.DecompressionBombError as error:
        raise ExampleError(name, "too large", f"image is too large ({error})") from error
    except Exception as error:  # Pillow's decoders raise whatever they stumble over
        if isinstance(file, str) and not os.path.exists(file):
            raise ExampleError(name, "missing", "no such file") from error
        raise unreadable(name, "image", error) from error


def check_size(image: Image.Image, file: str | io.BytesIO, name: str, max_pixels: int) -> None:
    """Raises ExampleError: an image, not decoded yet, is too large, or larger than its file."""
    width, height = image.size
    if width * height > max_pixels:
        raise too_large(name, width, height, max_pixels)
    if image.format == "PNG":
        size = os.path.getsize(file) if isinstance(file, str) else file.getbuffer().nbytes
        if width * height / 8 > DEFLATE * size:  # of one bit each
            text = f"damaged image, {size:,} bytes cannot hold {width:,} x {height:,} pixels"
            raise ExampleError(name, "damaged", text)


def too_large(name: str, width: int, height: int, max_pixels: int) -> ExampleError:
    """The error that names an image of more than `max_pixels`."""
    text = f"image of {width:,} x {height:,} pixels, more than max_pixels={max_pixels:,}"
    return ExampleError(name, "too large", text)


def upright(image: Image.Image) -> Image.Image:
    """A photo as its EXIF tag turns it, or as it is."""
    try:
        turned = image.getexif().get(ORIENTATION, 1) != 1
        return ImageOps.exif_transpose(image) if turned else image
    except Exception:  # tags are damaged, but the pixels are there
        return image


def on_background(image: Image.Image, background: Sequence[int]) -> Image.Image:
    """An image with transparent pixels on a ground of one colour, RGB."""
    image = image.convert("RGBA")
    ground = Image.new("RGBA", image.size, (*background, 255))
    return Image.alpha_composite(ground, image).convert("RGB")


def to_rgb(image: np.ndarray, name: str, background: Sequence[int] = WHITE) -> np.ndarray:
    """uint8 [H, W], [H, W, 1], [H, W, 3] or [H, W, 4] (with alpha) -> uint8 [H, W, 3]."""
    image = image[..., None] if image.ndim == 2 else image
    if image.ndim != 3 or image.shape[-1] not in (1, 3, 4) or image.dtype != np.uint8:
        shape, dtype = list(image.shape), image.dtype
        text = f"image is {dtype} {shape}, needed uint8 [H, W, 1, 3 or 4]"
        raise ExampleError(name, "format", text)
    if not image.size:
        raise ExampleError(name, "empty", "image has no pixels")
    if image.shape[-1] == 4:
        return np.array(on_background(Image.fromarray(np.ascontiguousarray(image)), background))
    return np.repeat(image, 3, axis=-1) if image.shape[-1] == 1 else image


def resize(
    image: Image.Image,
    size: tuple[int, int],
    resample: int = Image.Resampling.BICUBIC,
    box: tuple[float, float, float, float] | None = None,
) -> Image.Image:
    """`image.resize` to (width, height), with the pixels of Pillow 13 whatever version is there.

    Pillow filters along one axis, rounds, then along the other. Since version 13 the vertical pass
    comes first where it removes more than twice as much; earlier ones begin with the horizontal
    pass always, so that their pixels differ.
    """
    (width, height), box = size, box or (0, 0, *image.size)
    if image.height - height > max(0, 2 * (image.width - width)):
        rows = (0, box[1], image.width, box[3])
        image = image.resize((image.width, height), resample, box=rows)
        box = (box[0], 0, box[2], height)
    return image.resize(size, resample, box=box)


def convert(options: ImageConversion, data: bytes, name: str, **decoding: Any) -> bytes:
    """A file's bytes -> those of a JPEG or PNG of the size asked for; an image that needs no change
    keeps its bytes. One that is made smaller, and no format asked for, becomes a JPEG.

    Raises ExampleError as `decode_image`.
    """
    pixels = decode_image(io.BytesIO(data), name, **decoding)
    short, wanted = min(pixels.shape[:2]), options.short_side
    shrinks = 0 < wanted < short
    if not shrinks and not options.encode:
        return data
    image = Image.fromarray(pixels)
    if shrinks:
        size = [max(round(side * wanted / short), wanted) for side in image.size]
        image = resize(image, (size[0], size[1]))
    file = io.BytesIO()
    encode = options.encode or "jpeg"
    image.save(file, encode, **({"quality": options.quality} if encode == "jpeg" else {}))
    return file.getvalue()


def examine(item: Item) -> tuple[float, ...]:
    """The `MEASURES` of a decoded image."""
    height, width = item["image"].shape[:2]
    ratio = max(width, height) / max(min(width, height), 1)
    return width, height, ratio, float(item["image"].std()) if item["image"].size else 0.0
