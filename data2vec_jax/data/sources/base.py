"""What every source is, and the address that it was opened by."""

import abc
import functools
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data2vec_jax.core.errors import UserError
from data2vec_jax.data.codecs.base import Codec, Item


@dataclass(frozen=True)
class Address:
    """The arguments of `open_source`, as an opener gets them."""

    # KIND:PLACE, as the user wrote it.
    uri: str
    # What stands after the colon, `~` replaced.
    place: str
    split: str
    codec: Codec
    label_names: Sequence[str] | None = None
    key: str | None = None
    columns: Sequence[str] | None = None
    data_dir: str | None = None


class Source(abc.ABC):
    """Examples of one split, by index.

    label_names: names of the classes (of whole examples, or of their parts, such as phones), or
      None; empty if the source was opened for labels that are numbers.
    rows: of tables and folders, the file or folder and the rows of it, so that two splits can be
      recognised as the same; else None.
    """

    rows: Any = None

    def __init__(
        self, uri: str, split: str, codec: Codec, label_names: Sequence[str] | None = None
    ):
        self.uri, self.split, self.codec = uri, split, codec
        self.label_names = None if label_names is None else tuple(label_names)

    @abc.abstractmethod
    def __len__(self) -> int:
        """Number of examples."""

    def __getitem__(self, index: int) -> Item:
        """The decoded example; `UserError` names the file if it is damaged."""
        i = operator.index(index)
        i += len(self) if i < 0 else 0
        if not 0 <= i < len(self):
            raise IndexError(f"{self!r}: no example {index}")
        return self._load(i)

    @abc.abstractmethod
    def _load(self, i: int) -> Item:
        """Example i, 0 <= i < len(self)."""

    def lengths(self) -> np.ndarray | None:
        """Length of each example in the codec's units, int64 [N], without decoding.

        None if the codec measures nothing, or the lengths are not known.
        """
        return None

    def field(self, index: int, name: str) -> Any:
        """`self[index].get(name)`, without decoding the example where that can be."""
        return self[index].get(name)

    def column(self, name: str) -> Sequence[Any] | None:
        """`field` of each example; None if there is none, or it would mean decoding them all."""
        return None

    def location(self, index: int) -> str:
        """What errors call an example: its file and line, or its number."""
        return f"{self.uri} {self.split}[{index}]"

    def __repr__(self) -> str:
        names = f", {len(self.label_names)} label names" if self.label_names else ""
        return (
            f"{type(self).__name__}({self.uri!r}, split={self.split!r}, "
            f"{self.codec.field}, {len(self):,} examples{names})"
        )


class Subset(Source):
    """The examples of `source` with the numbers `indices`."""

    def __init__(self, source: Source, indices: Sequence[int]):
        super().__init__(source.uri, source.split, source.codec, source.label_names)
        self._source, self._indices = source, np.asarray(indices)

    def __len__(self) -> int:
        return len(self._indices)

    def _load(self, i: int) -> Item:
        return self._source[int(self._indices[i])]

    @property
    def rows(self) -> Any:
        return self._source.rows

    def field(self, index: int, name: str) -> Any:
        return self._source.field(int(self._indices[index]), name)

    def column(self, name: str) -> Sequence[Any] | None:
        values = self._source.column(name)
        return None if values is None else [values[i] for i in self._indices]

    def location(self, index: int) -> str:
        return self._source.location(int(self._indices[index]))

    def lengths(self) -> np.ndarray | None:
        lengths = self._source.lengths()
        return None if lengths is None else lengths[self._indices]


def published(opener: Callable[[Address], Source]) -> Callable[[Address], Source]:
    """Marks the opener of a data set that its authors ship in a folder, with classes of its own.

    Raises UserError: `label_names` are given, or neither the folder nor the one above is there.
    """

    @functools.wraps(opener)
    def checked(address: Address) -> Source:
        if address.label_names is not None:
            raise UserError(f"{address.uri}: has classes of its own, 'label_names' cannot be given")
        place = address.place
        if not Path(place).exists() and not Path(place).parent.is_dir():
            raise UserError(f"{address.uri}: no folder '{place}'")
        return opener(address)

    return checked
