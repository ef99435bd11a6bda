"""Labels of frames in a folder, by example id: what `python -m data2vec_jax.cluster` writes.

    SPLIT.labels.npy     int16 [F]: labels of all frames of all examples, end to end
    SPLIT.offsets.npy    int64 [N + 1]: those of example i are from offsets[i] to offsets[i + 1]
    centroids.npy        float32 [C, D]
    labels.json          rate (labels a second), clusters C; for each split its order, a hash of the
                         source's examples; the split and order that centroids were fitted to; and
                         whatever else made the labels

Frame t of a crop that begins at second s has the label of number round(s rate) + floor(t h rate), h
the seconds from frame to frame. The last label stands in where there are no more.
"""

import re
from pathlib import Path

import numpy as np

from data2vec_jax.core.errors import ExampleError, UserError, nearest
from data2vec_jax.core.files import read_json
from data2vec_jax.data.sources.base import Source

ABOUT = "labels.json"


def files_of(folder: Path, split: str) -> tuple[Path, Path]:
    """Where the labels and offsets of a split are."""
    name = re.sub(r"[^\w.+-]", "_", split)
    return folder / f"{name}.labels.npy", folder / f"{name}.offsets.npy"


class FrameLabels:
    """Labels of the examples of a source. Raises UserError: they are of others, or damaged."""

    def __init__(self, folder: Path, source: Source):
        if not (folder / ABOUT).is_file():
            raise UserError(f"{folder}: no labels; `python -m data2vec_jax.cluster` writes them")
        self.source, about = source, read_json(folder / ABOUT)
        try:
            self.rate, self.clusters = int(about["rate"]), int(about["clusters"])
            orders = {split: of["order"] for split, of in about["splits"].items()}
        except (KeyError, TypeError, ValueError, AttributeError):
            raise UserError(f"{folder / ABOUT}: not written by data2vec_jax.cluster") from None
        if source.split not in orders:
            hint = nearest(source.split, orders)
            raise UserError(f"{folder}: no labels of the split '{source.split}'{hint}")
        if orders[source.split] != order_of(source):
            raise UserError(
                f"{folder}: the labels of '{source.split}' are of other examples than those of "
                f"{source.uri}, or in another order; run data2vec_jax.cluster again"
            )
        self.file, offsets = files_of(folder, source.split)
        try:
            self.offsets = np.load(offsets)
            held = len(self._all())
        except (OSError, ValueError) as error:
            raise UserError(f"{folder}: unreadable labels ({error})") from None
        if len(self.offsets) != len(source) + 1 or self.offsets[-1] != held:
            raise UserError(f"{folder}: {held} labels of '{source.split}' are not all")

    def _all(self) -> np.ndarray:
        return np.load(self.file, mmap_mode="r")

    def crop(self, index: int, start: float, frames: int, hop: float) -> np.ndarray:
        """int32 [frames] of an example, from second `start`, a frame every `hop` seconds."""
        first, end = self.offsets[index : index + 2]
        if first == end:
            raise ExampleError(self.source.location(index), "no labels", "has no labels")
        # Whole numbers, so that nothing is rounded down by a floating point's last digit.
        places = np.arange(frames) * round(hop * self.rate * 1000) // 1000
        return self._all()[np.minimum(first + round(start * self.rate) + places, end - 1)].astype(
            np.int32
        )


def order_of(source: Source) -> str:
    """A hash of a source's examples and their order."""
    return f"{len(source)} {source.digest()}"
