"""Images, as RGB of 8 bits. Items hold image, uint8 [H, W, 3]."""

import io
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from PIL import Image

from data2vec_jax.core.errors import UserError
from data2vec_jax.data.codecs.base import Codec, Item, unreadable


def codec(kinds: Mapping[str, Callable[..., Any]] | None = None) -> Codec:
    """The codec of images. In records: image_bytes (a file) or image (uint8 [H, W, C], or a file).

    They are not measured: what reads them brings them to one size.
    """
    return Codec(
        field="image",
        suffixes=(".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"),
        read=read_image,
        record_fields=("image_bytes", "image"),
        read_record=read_record,
        kinds=kinds or {},
    )


def read_image(file: str | io.BytesIO, name: str) -> Item:
    """An image file -> {'image'}. Raises UserError: damaged."""
    return {"image": decode_image(file, name)}


def read_record(value: Any, rest: Item, name: str) -> Item:
    """A record's image, a file's bytes or pixels -> {'image'}."""
    if isinstance(value, bytes):
        return read_image(io.BytesIO(value), name)
    return {"image": to_rgb(np.asarray(value), name)}


def decode_image(file: str | io.BytesIO, name: str) -> np.ndarray:
    """Image file -> uint8 [H, W, 3]; transparency is dropped. Raises UserError: damaged."""
    try:
        with Image.open(file) as image:
            if image.mode.startswith("I;16"):  # convert() would clip, not scale
                return to_rgb((np.array(image) >> 8).astype(np.uint8), name)
            if image.mode in ("I", "F"):
                raise UserError(f"{name}: image has 32 bits a pixel, needed 8 or 16")
            return np.array(image.convert("RGB"))
    except UserError:
        raise
    except Exception as error:  # Pillow's decoders raise whatever they stumble over
        raise unreadable(name, "image", error) from error


def to_rgb(image: np.ndarray, name: str) -> np.ndarray:
    """uint8 [H, W], [H, W, 1], [H, W, 3] or [H, W, 4] -> uint8 [H, W, 3]."""
    image = image[..., None] if image.ndim == 2 else image
    if image.ndim != 3 or image.shape[-1] not in (1, 3, 4) or image.dtype != np.uint8:
        shape, dtype = list(image.shape), image.dtype
        raise UserError(f"{name}: image is {dtype} {shape}, needed uint8 [H, W, 1, 3 or 4]")
    return np.repeat(image, 3, axis=-1) if image.shape[-1] == 1 else image[..., :3]
