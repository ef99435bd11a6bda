"""Tables: a column of paths or of the signals themselves, and further columns."""

import copy
import hashlib
import io
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from data2vec_jax.core.errors import ExampleError, UserError, nearest
from data2vec_jax.data import places
from data2vec_jax.data.codecs.base import Codec, Item
from data2vec_jax.data.sources.base import Source
from data2vec_jax.data.sources.columns import ENCODING, Column, taken
from data2vec_jax.data.sources.stored import FilePart, Stored

BLOCK = 2**14  # rows of a column that are hashed at a time
TASKS = 2**10  # of threads, at most: a list of ten million would not fit into memory


class TableSource(Source):
    """Rows of a table, in memory; the files that its column `path` names are read on demand.

    columns: name -> list or `Strings` [N]. `path` (relative to `root`), or the signal itself in
      the column that has the name of the codec's field; the codec's units (`samples`), the lengths;
      `label`; others are handed on.
    parts: where each row's file lies in another one (a tar); its `path` is a mere name then.
    file, lines: the table's own, and the line of each row.
    bad: of rows that are known to be damaged; their values are None.
    """

    def __init__(
        self,
        uri: str,
        split: str,
        codec: Codec,
        columns: Mapping[str, Column],
        *,
        root: str = "",
        parts: Sequence[FilePart] = (),
        label_names: Sequence[str] | None = None,
        file: str = "",
        lines: Sequence[int] = (),
        bad: Mapping[int, ExampleError] | None = None,
    ):
        super().__init__(uri, split, codec, label_names)
        self.bad.update(bad or {})
        self._file, self._lines = file, lines
        columns = dict(columns)
        lengths = columns.pop(codec.units, None) if codec.measure else None
        self._lengths = None if lengths is None else np.asarray(lengths, np.int64)
        self._measured = lengths is not None  # by the table, which may be wrong
        self._columns, self._root, self._parts = columns, root, parts

    def __len__(self) -> int:
        return len(next(iter(self._columns.values())))

    def field(self, index: int, name: str) -> Any:
        return self._columns[name][index] if name in self._columns else None

    def column(self, name: str) -> Sequence[Any] | None:
        return self._columns.get(name)

    def location(self, index: int) -> str:
        if self._lines:
            return f"{self._file}:{self._lines[index]}"
        path = self._columns.get("path")
        return places.join(self._root, path[index]) if path else super().location(index)

    @property
    def rows(self) -> Any:
        rows = self._lines or self._columns.get("path")
        return (self._file or self._root, rows) if rows else None

    def with_columns(
        self, columns: Mapping[str, list], label_names: Sequence[str] | None = None
    ) -> "TableSource":
        """The same rows with further columns, and with the names of the classes in one of them."""
        made = copy.copy(self)
        made._columns = {**self._columns, **columns}
        if label_names is not None:
            made.label_names = tuple(label_names)
        return made

    def _load(self, i: int) -> Item:
        item = {name: column[i] for name, column in self._columns.items()}
        if self.codec.in_tables and self.codec.field in item:
            if self.codec.read_record is not None:
                value = item[self.codec.field]
                item |= self.codec.read_record(value, dict(item), self.location(i))
            return item
        return {**item, **self._checked(i, self.codec.read(*self._file_of(i)))}

    def stored(self) -> Iterator[Stored]:
        texts = self._columns.get(self.codec.field) if self.codec.in_tables else None
        for i in range(len(self)):
            fields = {n: column[i] for n, column in self._columns.items() if column is not texts}
            if i in self.bad:
                yield Stored(self.location(i), fields, self.bad[i])
            elif texts is not None:
                yield Stored(self.location(i), fields, texts[i])
            elif self._parts:
                yield Stored(self.location(i), fields, self._parts[i])
            else:
                path = self.location_of_file(i)
                yield Stored(path, fields, FilePart(path))

    def location_of_file(self, i: int) -> str:
        """The place of the file of row i."""
        return places.join(self._root, self._columns["path"][i])

    def part(self, index: int, start: int, count: int) -> Item:
        codec = self.codec
        if codec.read_part is None or (codec.in_tables and "path" not in self._columns):
            return super().part(index, start, count)
        if index in self.bad:
            raise self.bad[index]
        return self.codec.read_part(*self._file_of(index), start, count)

    def _file_of(self, i: int) -> tuple[str | io.BytesIO, str]:
        """The file of row i for the codec, its path or its bytes; and what messages call it.

        Raises ExampleError: it is no ordinary one, ...
        """
        place = self.location_of_file(i)
        if self._parts:
            return io.BytesIO(self._parts[i].read(place)), place
        if places.is_remote(place):
            return io.BytesIO(places.read(place)), place
        places.check_file(place)
        return place, place

    def _checked(self, i: int, decoded: Item) -> Item:
        """What was decoded, if it is as long as the table says."""
        found = len(decoded[self.codec.field]) if self._measured else 0
        if self._measured and found != self._lengths[i]:
            units, said = self.codec.units, self._lengths[i]
            text = f"has {found} {units}, but {self.uri} says {said}"
            raise ExampleError(self.location_of_file(i), "length", text)
        return decoded

    def lengths(self) -> np.ndarray | None:
        """int64 [N]: the column of lengths if there is one, else from the files' headers, at the
        first call; -1 of those that cannot be measured.
        """

        errors: dict[int, ExampleError] = {}

        def measure(i: int) -> int:
            try:
                return -1 if i in self.bad else self.codec.measure(*self._file_of(i))
            except ExampleError as error:
                errors[i] = error
            except UserError as error:
                errors[i] = ExampleError(self.location(i), "unreadable", str(error))
            return -1

        if self._lengths is None and self.codec.measure:
            self._lengths = in_threads(measure, range(len(self)))
            self.bad.update(sorted(errors.items()))
        self.check_any()
        return self._lengths

    def digest(self) -> str:
        """Of all columns, and of the sizes of the files."""
        found = hashlib.sha256()
        for name, column in sorted(self._columns.items()):
            # That of `repr((name, column))`, which may be larger than memory.
            found.update(f"({name!r}, [".encode(*ENCODING))
            for start in range(0, len(column), BLOCK):
                stop = min(start + BLOCK, len(column))
                text = ", ".join(repr(column[i]) for i in range(start, stop))
                found.update(f"{', ' if start else ''}{text}".encode(*ENCODING))
            found.update(b"])")
        if self._parts:
            found.update(repr(self._parts).encode())
        elif "path" in self._columns:
            found.update(in_threads(self._size, self._columns["path"]))
        return found.hexdigest()[:12]

    def _size(self, path: str | None) -> int:
        found = places.stat(places.join(self._root, path)) if path else None
        return found.size if found else -1


def in_threads(function: Callable[[Any], int], values: Sequence[Any]) -> np.ndarray:
    """`function` of each value, int64 [N], by threads: the time is the file system's."""
    found, size = np.empty(len(values), np.int64), max(-(-len(values) // TASKS), 1)

    def fill(start: int) -> None:
        for i in range(start, min(start + size, len(values))):
            found[i] = function(values[i])

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(fill, range(0, len(values), size)))
    return found


def select_split(
    table: dict[str, Column], numbers: array, bad: dict[int, ExampleError], split: str, uri: str
) -> tuple:
    """The rows of `split` (or of `a+b`), their line numbers and those that are bad, without the
    column `split`. A bad row without a split belongs to each.
    """
    splits = table["split"]
    wanted = {i for i in bad if not isinstance(splits[i], str)}
    known = [i for i in range(len(numbers)) if i not in wanted] if wanted else range(len(numbers))
    rows = rows_of_split(taken(splits, known) if wanted else splits, split, uri)
    rows = sorted([*(known[i] for i in rows), *wanted]) if wanted else rows
    table = {n: taken(column, rows) for n, column in table.items() if n != "split"}
    bad = {place: bad[i] for place, i in enumerate(rows) if i in bad}
    return table, array("I", (numbers[i] for i in rows)), bad


def rows_of_split(splits: Sequence[str], split: str, uri: str) -> array:
    """Indices of the rows of `split` (or of `a+b`), given the split of each row."""
    wanted, names = split.split("+"), set(splits)
    for name in wanted:
        if name not in names:
            raise UserError(f"{uri}: no split '{name}'{nearest(name, names)}")
    return array("q", (i for i, name in enumerate(splits) if name in wanted))
