"""Images -> the pixels that a model of Hugging Face's was trained on.

The steps and numbers of its `BeitImageProcessor`, read from and written to its
`preprocessor_config.json` (finetuning_and_conversion 4.7). Resizing is Pillow's.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from data2vec_jax.core.errors import UserError
from data2vec_jax.data.codecs.image import resize

KIND = "BeitImageProcessor"


@dataclass(frozen=True)
class Processor:
    """Resize, centre crop, rescale, normalise, in this order; each can be left out.

    size, crop: (height, width) in pixels, None to leave the step out. resample: number of Pillow's
    filter (3 is bicubic). scale: factor on the pixels, None for none. mean, std: per channel, of
    scaled pixels; empty to leave them as they are. reduce_labels: of segmentation maps, class 0 is
    none (255) and the others count from 0.
    """

    size: tuple[int, int] | None = (224, 224)
    resample: int = 3
    crop: tuple[int, int] | None = None
    scale: float | None = 1 / 255
    mean: Sequence[float] = (0.5, 0.5, 0.5)
    std: Sequence[float] = (0.5, 0.5, 0.5)
    reduce_labels: bool = False

    @classmethod
    def of(cls, theirs: Mapping[str, Any]) -> "Processor":
        """From the object in a `preprocessor_config.json`; what it lacks is as in version 5."""
        kind = theirs.get("image_processor_type") or theirs.get("feature_extractor_type") or KIND
        if not kind.removesuffix("Fast").startswith("Beit"):
            raise UserError(f"preprocessor_config.json: '{kind}' is not '{KIND}'")

        def step(switch, default, value):
            return value if theirs.get(switch, default) else None

        mean, std = (tuple(theirs.get(f"image_{x}") or cls.mean) for x in ("mean", "std"))
        normalised = theirs.get("do_normalize", True)
        reduced = theirs.get("do_reduce_labels", theirs.get("reduce_labels"))
        return cls(
            size=step("do_resize", True, _size(theirs, "size")),
            resample=int(theirs.get("resample", cls.resample)),
            crop=step("do_center_crop", False, _size(theirs, "crop_size")),
            scale=step("do_rescale", True, float(theirs.get("rescale_factor", 1 / 255))),
            mean=mean if normalised else (),
            std=std if normalised else (),
            reduce_labels=bool(reduced),
        )

    def to_json(self) -> dict[str, Any]:
        """Every key, as the versions of the library differ in their defaults."""
        size, crop = self.size or (224, 224), self.crop or self.size or (224, 224)
        return {
            "image_processor_type": KIND,
            "do_resize": self.size is not None,
            "size": {"height": size[0], "width": size[1]},
            "resample": self.resample,
            "do_center_crop": self.crop is not None,
            "crop_size": {"height": crop[0], "width": crop[1]},
            "do_rescale": self.scale is not None,
            "rescale_factor": 1 / 255 if self.scale is None else self.scale,
            "do_normalize": bool(len(self.mean)),
            "image_mean": list(self.mean) or [0.5, 0.5, 0.5],
            "image_std": list(self.std) or [0.5, 0.5, 0.5],
            "do_reduce_labels": self.reduce_labels,
        }

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """uint8 [height, width, C] or [height, width] -> float32 [height', width', C]."""
        x = self._fit(np.atleast_3d(image))
        if self.scale is not None:
            x = (x.astype(np.float64) * self.scale).astype(np.float32)
        x = x.astype(np.float32)
        if len(self.mean):
            x = (x - np.asarray(self.mean, np.float32)) / np.asarray(self.std, np.float32)
        return x

    def labels(self, classes: np.ndarray) -> np.ndarray:
        """A segmentation map, uint8 [height, width] -> int32 [height', width'].

        As in the library, it is resized with the filter of the images, which can invent classes
        between two: give maps of the right size, or resample=0.
        """
        x = classes.astype(np.uint8)
        if self.reduce_labels:
            x = np.where((x == 0) | (x == 255), 255, x - 1).astype(np.uint8)
        return self._fit(x[..., None])[..., 0].astype(np.int32)

    def _fit(self, x):
        if self.size is not None:
            whole = Image.fromarray(x if x.shape[-1] > 1 else x[..., 0])
            x = np.atleast_3d(np.asarray(resize(whole, self.size[::-1], self.resample)))
        return x if self.crop is None else centre(x, self.crop)


def centre(x: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The middle of an image [height, width, C], with zeros around it where it is too small."""
    for axis, (had, wanted) in enumerate(zip(x.shape[:2], size, strict=True)):
        if had < wanted:
            before = -(-(wanted - had) // 2)
            widths = [(0, 0)] * 3
            widths[axis] = (before, wanted - had - before)
            x = np.pad(x, widths)
        else:
            x = np.take(x, np.arange(wanted) + (had - wanted) // 2, axis)
    return x


def _size(theirs, key):
    """(height, width) of a value like {'height': 224, 'width': 224}; older files hold a number."""
    value = theirs.get(key, 224)
    if isinstance(value, Mapping) and {*value} >= {"height", "width"}:
        return int(value["height"]), int(value["width"])
    if isinstance(value, int):
        return value, value
    raise UserError(f"preprocessor_config.json: '{key}' = {value!r} has no height and width")
