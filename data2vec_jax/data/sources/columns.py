"""Columns of texts that stay small: those of a manifest of ten million files fit into memory."""

from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

ENCODING = "utf-8", "surrogatepass"  # JSON can spell half a character


class Strings(Sequence):
    """A list of `str | None` that takes the UTF-8 of each text and 4 bytes (8 above 4 GiB); a list
    of str takes 60 bytes more. Equal ones compare equal. They can be pickled, without a copy by
    protocol 5."""

    def __init__(self, values: Iterable[str | None] = ()):
        self._data, self._ends = bytearray(), array("I")
        self._none: set[int] = set()
        for value in values:
            self.append(value)

    def append(self, value: str | None) -> None:
        """Adds a text at the end."""
        if value is None:
            self._none.add(len(self._ends))
        else:
            self._data += value.encode(*ENCODING)
        if len(self._data) >= 2**32 and self._ends.typecode == "I":
            self._ends = array("q", self._ends)
        self._ends.append(len(self._data))

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> str | None:
        i = range(len(self._ends))[index]
        start = self._ends[i - 1] if i else 0
        return None if i in self._none else str(self._data[start : self._ends[i]], *ENCODING)

    def __iter__(self) -> Iterator[str | None]:
        return map(self.__getitem__, range(len(self)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Strings):
            return NotImplemented
        ours, theirs = ((memoryview(x._ends), memoryview(x._data), x._none) for x in (self, other))
        return ours == theirs

    def __getstate__(self) -> tuple:
        return np.frombuffer(self._data, np.uint8), np.asarray(self._ends), self._none

    def __setstate__(self, state: tuple) -> None:
        self._data, self._ends, self._none = state


Column = Strings | list


def appended(column: Column, value: Any) -> Column:
    """The column with one more value: a list from the first on that is no text."""
    if isinstance(column, Strings) and not (value is None or isinstance(value, str)):
        column = list(column)
    column.append(value)
    return column


def taken(column: Column, rows: Iterable[int]) -> Column:
    """These rows of a column."""
    return type(column)(column[i] for i in rows)
