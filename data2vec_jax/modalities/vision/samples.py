"""`samples:digits`: 5,000 MNIST digits (splits train, test)."""

from pathlib import Path

import numpy as np

from data2vec_jax.core.errors import UserError, nearest
from data2vec_jax.data.codecs.base import Codec, Item
from data2vec_jax.data.sources import Address, Source, rows_of_split

SAMPLES = Path(__file__).parent / "sample_data"


class DigitsSource(Source):
    """Items hold image, uint8 [28, 28, 1], grey as no other source's; and label, an int."""

    def __init__(self, uri: str, split: str, codec: Codec, images: np.ndarray, labels: np.ndarray):
        super().__init__(uri, split, codec, [str(digit) for digit in range(10)])
        self._images, self._labels = images, labels

    def __len__(self) -> int:
        return len(self._labels)

    def _load(self, i: int) -> Item:
        return {"image": self._images[i][..., None].copy(), "label": int(self._labels[i])}


def open_samples(address: Address) -> DigitsSource:
    """`samples:digits`."""
    if address.place != "digits":
        hint = nearest(address.place, ["digits"])
        raise UserError(f"{address.uri}: no samples '{address.place}'{hint}")
    with np.load(SAMPLES / "digits" / "digits.npz") as arrays:
        images, labels, splits = (arrays[name] for name in ("images", "labels", "split"))
    rows = rows_of_split(splits.tolist(), address.split, address.uri)
    return DigitsSource(address.uri, address.split, address.codec, images[rows], labels[rows])
