"""`mix:3*ADDRESS;1*ADDRESS`: several corpora as one, each with a share of what is drawn."""

import hashlib
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import numpy as np

from data2vec_jax.core.errors import UserError
from data2vec_jax.data.codecs.base import Codec, Item
from data2vec_jax.data.sources.base import Corpora, Source
from data2vec_jax.data.sources.labels import Renamed, is_number
from data2vec_jax.data.sources.stored import Stored

WANTED = "wanted 'mix:WEIGHT*ADDRESS;WEIGHT*ADDRESS', in quotes"


def parts_of(uri: str, place: str, split: str) -> list[tuple[float, str, str]]:
    """(weight, address, split) of each corpus of `uri`, 'mix:' and `place`, that has the split.

    split: of all, or one for each ('train-clean-100;train'), empty where a corpus has none.
    Raises UserError: fewer than two corpora, one without a weight, another number of splits.
    """
    texts = place.split(";")
    if len(texts) < 2:
        raise UserError(f"{uri}: has one corpus; {WANTED}")
    splits = split.split(";") if ";" in split else [split] * len(texts)
    if len(splits) != len(texts):
        count = f"{len(splits)} splits ('{split}') for {len(texts)} corpora"
        raise UserError(f"{uri}: {count}; name one for all, or one for each")
    found = []
    for text, name in zip(texts, splits, strict=True):
        weight, _, address = map(str.strip, text.partition("*"))
        if not address or not is_number(weight, float) or float(weight) <= 0:
            raise UserError(f"{uri}: '{text}' is no weight above 0 and an address; {WANTED}")
        if name.strip():
            found.append((float(weight), address, name.strip()))
    if not found:
        raise UserError(f"{uri}: no corpus has a split in '{split}'")
    return found


def united(parts: Sequence[Source]) -> tuple[str, ...] | None:
    """The names of the classes of all: where they differ, sorted (whole numbers by value)."""
    named = [part.label_names for part in parts if part.label_names]
    if len(set(named)) < 2:
        return named[0] if named else parts[0].label_names
    found = {name for names in named for name in names}
    return tuple(sorted(found, key=int if all(is_number(n, int) for n in found) else None))


class Mixture(Source):
    """The examples of all `parts`, one corpus after the other.

    Classes are united by name. Beside corpora with names of classes, the labels of one without are
    None, which tasks with classes refuse. weights: of the corpora, above 0.
    """

    def __init__(self, uri: str, split: str, parts: Sequence[Source], weights: Sequence[float]):
        names = united(parts)
        super().__init__(uri, split, parts[0].codec, names)
        alike = (names,) if names else (None, ())
        self._parts = [p if p.label_names in alike else Renamed(p, names) for p in parts]
        sizes = [len(part) for part in parts]
        self._starts = np.cumsum([0, *sizes])
        shares = np.asarray(weights, np.float64) / np.sum(weights)
        self._corpora = Corpora(np.repeat(np.arange(len(parts), dtype=np.int32), sizes), shares)
        self.notes = [
            f"{100 * share:.3g} % of what is drawn is of {part.uri} {part.split}, {size:,} examples"
            for part, share, size in zip(parts, shares, sizes, strict=True)
        ] + [note for part in parts for note in part.notes]
        self._take_bad()

    def _take_bad(self) -> None:
        for part, start in zip(self.parts, self._starts[:-1].tolist(), strict=True):
            self.bad |= {start + i: error for i, error in part.bad.items()}

    def _at(self, index: int) -> tuple[Source, int]:
        """The corpus of an example, and its number there."""
        k = self.corpora.corpus_of[index]
        return self.parts[k], int(index - self._starts[k])

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def parts(self) -> Sequence[Source]:
        return self._parts

    @property
    def corpora(self) -> Corpora:
        return self._corpora

    def _load(self, i: int) -> Item:
        part, j = self._at(i)
        return part[j]

    def part(self, index: int, start: int, count: int) -> Item:
        part, j = self._at(index)
        return part.part(j, start, count)

    def field(self, index: int, name: str) -> Any:
        part, j = self._at(index)
        return part.field(j, name)

    def column(self, name: str) -> Sequence[Any] | None:
        """Of corpora that list none, and whose first example has none, it is None."""
        columns = [part.column(name) for part in self.parts]
        if all(column is None for column in columns):
            return None
        for k, part in enumerate(self.parts):
            if columns[k] is None and part.field(0, name) is None:
                columns[k] = [None] * len(part)
        return None if any(found is None for found in columns) else list(chain(*columns))

    def location(self, index: int) -> str:
        part, j = self._at(index)
        return part.location(j)

    def lengths(self) -> np.ndarray | None:
        lengths = [part.lengths() for part in self.parts]
        self._take_bad()
        return None if any(found is None for found in lengths) else np.concatenate(lengths)

    def digest(self) -> str:
        found = [f"{len(part)} {part.digest()}" for part in self.parts]
        return hashlib.sha256(" ".join(found).encode()).hexdigest()[:12]

    def stored(self) -> Iterator[Stored]:
        raise UserError(f"{self.uri}: prepare each corpus of its own, and mix the shards")

    def with_codec(self, codec: Codec) -> "Mixture":
        made = super().with_codec(codec)
        made._parts = [part.with_codec(codec) for part in self.parts]
        return made
