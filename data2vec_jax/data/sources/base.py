"""What every source is, and the address that it was opened by."""

import abc
import copy
import functools
import hashlib
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data2vec_jax.core.errors import ExampleError, UserError
from data2vec_jax.data.codecs.base import Codec, Item
from data2vec_jax.data.sources.stored import Stored


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
    # Whether an example of a class that is not in `label_names` is bad, rather than an error.
    tolerant: bool = False


class Corpora(NamedTuple):
    """Which corpus each example is of, int [N], and the shares of K corpora in what is drawn, float
    [K], together 1."""

    corpus_of: np.ndarray
    shares: Sequence[float]


class Source(abc.ABC):
    """Examples of one split, by index.

    label_names: names of the classes (of whole examples, or of their parts, such as phones), or
      None; empty if the source was opened for labels that are numbers.
    rows: of tables and folders, the file or folder and the rows of it, so that two splits can be
      recognised as the same; else None.
    bad: index -> the error of each example that is known to be unreadable. It keeps its index.
    notes: lines for the user on what lies there and is not read.
    """

    rows: Any = None
    notes: Sequence[str] = ()

    def __init__(
        self, uri: str, split: str, codec: Codec, label_names: Sequence[str] | None = None
    ):
        self.uri, self.split, self.codec = uri, split, codec
        self.label_names = None if label_names is None else tuple(label_names)
        self.bad: dict[int, ExampleError] = {}

    @abc.abstractmethod
    def __len__(self) -> int:
        """Number of examples."""

    @property
    def parts(self) -> Sequence["Source"]:
        """The corpora that it is of: itself, or those of a mixture."""
        return [self]

    @property
    def corpora(self) -> Corpora:
        """Which of them each example is of, and their shares."""
        return Corpora(np.zeros(len(self), np.int32), (1.0,))

    def __getitem__(self, index: int) -> Item:
        """The decoded example. Raises ExampleError: it is damaged, missing, ..."""
        i = operator.index(index)
        i += len(self) if i < 0 else 0
        if not 0 <= i < len(self):
            raise IndexError(f"{self!r}: no example {index}")
        if i in self.bad:
            raise self.bad[i]
        try:
            return self._load(i)
        except ExampleError:
            raise
        except UserError as error:
            raise ExampleError.of(error, self.location(i)) from error

    @abc.abstractmethod
    def _load(self, i: int) -> Item:
        """Example i, 0 <= i < len(self)."""

    def stored(self) -> Iterator[Stored]:
        """All examples as they are stored, in order. Raises UserError: they are no files or
        texts."""
        raise UserError(f"{self.uri}: its examples are neither files nor texts")

    def lengths(self) -> np.ndarray | None:
        """Length of each example in the codec's units, int64 [N], without decoding.

        -1 of an example that cannot be measured, which is `bad` then. None if the codec measures
        nothing, or the lengths are not known.
        """
        return None

    def part(self, index: int, start: int, count: int) -> Item:
        """As `self[index]`, of `count` units of the signal from `start`; it may lack other fields.

        Where the container can be searched, no more is decoded. Raises ExampleError: it has fewer.
        """
        item, field = self[index], self.codec.field
        if len(item[field]) < start + count:
            text = f"has {len(item[field])} {self.codec.units}, not {start + count}"
            raise ExampleError(self.location(index), "length", text)
        return {**item, field: item[field][start : start + count]}

    def items(self, rows: Sequence[int] | None = None) -> Iterator[tuple[int, Item]]:
        """(index, decoded example) of all, or of these rows, that can be read; the others are `bad`
        afterwards.

        Raises UserError: none of all can.
        """
        wanted = range(len(self)) if rows is None else rows
        for i, item in zip(wanted, self.results(wanted), strict=True):
            if isinstance(item, ExampleError):
                self.bad[i] = item
            else:
                yield i, item
        if rows is None:
            self.check_any()

    def results(self, rows: Sequence[int]) -> Iterator[Item | ExampleError]:
        """`self[i]` of each row, or the error of one that cannot be read."""
        for i in rows:
            try:
                item = self[i]
            except ExampleError as error:
                item = error
            yield item

    def check_any(self) -> None:
        """Raises UserError if every example is bad."""
        if self.bad and len(self.bad) == len(self):
            first = self.bad[min(self.bad)]
            raise UserError(
                f"{first} (and the other {len(self) - 1} cannot be read either)"
                if len(self) > 1
                else str(first)
            )

    def digest(self) -> str:
        """A hash of the names and sizes of all examples, without reading them."""
        return hashlib.sha256(f"{self.uri} {self.split} {len(self)}".encode()).hexdigest()[:12]

    def field(self, index: int, name: str) -> Any:
        """`self[index].get(name)`, without decoding the example where that can be."""
        return self[index].get(name)

    def column(self, name: str) -> Sequence[Any] | None:
        """`field` of each example; None if there is none, or it would mean decoding them all."""
        return None

    def location(self, index: int) -> str:
        """What errors call an example: its file and line, or its number."""
        return f"{self.uri} {self.split}[{index}]"

    def with_codec(self, codec: Codec) -> "Source":
        """The same examples, decoded in another way."""
        made = copy.copy(self)
        made.codec = codec
        return made

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
        self.notes = source.notes
        self._source, self._indices = source, np.asarray(indices)
        self.bad = {i: source.bad[j] for i, j in enumerate(indices) if j in source.bad}

    def __len__(self) -> int:
        return len(self._indices)

    def _load(self, i: int) -> Item:
        return self._source[int(self._indices[i])]

    def part(self, index: int, start: int, count: int) -> Item:
        return self._source.part(int(self._indices[index]), start, count)

    @property
    def rows(self) -> Any:
        return self._source.rows

    @property
    def parts(self) -> Sequence[Source]:
        return self._source.parts

    @property
    def corpora(self) -> Corpora:
        corpora = self._source.corpora
        return corpora._replace(corpus_of=corpora.corpus_of[self._indices])

    def field(self, index: int, name: str) -> Any:
        return self._source.field(int(self._indices[index]), name)

    def column(self, name: str) -> Sequence[Any] | None:
        values = self._source.column(name)
        return None if values is None else [values[i] for i in self._indices]

    def location(self, index: int) -> str:
        return self._source.location(int(self._indices[index]))

    def lengths(self) -> np.ndarray | None:
        lengths = self._source.lengths()
        bad = self._source.bad
        self.bad |= {i: bad[j] for i, j in enumerate(self._indices.tolist()) if j in bad}
        return None if lengths is None else lengths[self._indices]

    def digest(self) -> str:
        own = hashlib.sha256(self._indices.tobytes()).hexdigest()[:12]
        return f"{self._source.digest()} {own}"

    def with_codec(self, codec: Codec) -> "Subset":
        made = super().with_codec(codec)
        made._source = self._source.with_codec(codec)
        return made


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
