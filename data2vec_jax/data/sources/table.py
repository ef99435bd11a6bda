"""Tables: a column of paths or of the signals themselves, and further columns."""

import copy
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from data2vec_jax.core.errors import UserError, nearest
from data2vec_jax.data.codecs.base import Codec, Item
from data2vec_jax.data.sources.base import Source


class TableSource(Source):
    """Rows of a table, in memory; the files that its column `path` names are read on demand.

    columns: name -> list [N]. `path` (relative to `root`), or the signal itself in the column that
      has the name of the codec's field; the codec's units (`samples`), the lengths; `label`; others
      are handed on.
    file, lines: the table's own, and the line of each row.
    """

    def __init__(
        self,
        uri: str,
        split: str,
        codec: Codec,
        columns: Mapping[str, list],
        *,
        root: str = "",
        label_names: Sequence[str] | None = None,
        file: str = "",
        lines: Sequence[int] = (),
    ):
        super().__init__(uri, split, codec, label_names)
        self._file, self._lines = file, lines
        columns = dict(columns)
        lengths = columns.pop(codec.units, None) if codec.measure else None
        self._lengths = None if lengths is None else np.array(lengths, np.int64)
        self._columns, self._root = columns, root

    def __len__(self) -> int:
        return len(next(iter(self._columns.values())))

    def field(self, index: int, name: str) -> Any:
        return self._columns[name][index] if name in self._columns else None

    def column(self, name: str) -> Sequence[Any] | None:
        return self._columns.get(name)

    def location(self, index: int) -> str:
        return f"{self._file}:{self._lines[index]}" if self._lines else super().location(index)

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
        name, units = self.codec.field, self.codec.units
        if self.codec.in_tables and name in item:
            return item
        path = os.path.join(self._root, item["path"])
        decoded = self.codec.read(path, path)
        if self._lengths is not None and len(decoded[name]) != self._lengths[i]:
            raise UserError(
                f"{path}: has {len(decoded[name])} {units}, but {self.uri} says {self._lengths[i]}"
            )
        return {**item, **decoded}

    def lengths(self) -> np.ndarray | None:
        """int64 [N]: the column of lengths if there is one, else from the files' headers, at the
        first call.
        """
        if self._lengths is None and self.codec.measure:
            paths = [os.path.join(self._root, path) for path in self._columns["path"]]
            with ThreadPoolExecutor(16) as pool:  # the time is the file system's
                counts = pool.map(lambda path: self.codec.measure(path, path), paths)
                self._lengths = np.fromiter(counts, np.int64, len(paths))
        return self._lengths


def select_split(table: dict[str, list], numbers: list[int], split: str, uri: str) -> tuple:
    """The rows of `split` (or of `a+b`) and their line numbers, without the column `split`."""
    rows = rows_of_split(table["split"], split, uri)
    table = {n: [column[i] for i in rows] for n, column in table.items() if n != "split"}
    return table, [numbers[i] for i in rows]


def rows_of_split(splits: Sequence[str], split: str, uri: str) -> list[int]:
    """Indices of the rows of `split` (or of `a+b`), given the split of each row."""
    wanted, names = split.split("+"), set(splits)
    for name in wanted:
        if name not in names:
            raise UserError(f"{uri}: no split '{name}'{nearest(name, names)}")
    return [i for i, name in enumerate(splits) if name in wanted]
