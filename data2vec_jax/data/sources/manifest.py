"""`manifest:FILE`: wav2vec manifests, and tables of TSV, CSV or JSONL."""

import contextlib
import csv
import gzip
import io
import json
import os
import zlib
from array import array
from collections.abc import Container, Iterator, Sequence
from typing import Any, TextIO

import numpy as np

from data2vec_jax.core.errors import ExampleError, UserError, nearest
from data2vec_jax.data import places
from data2vec_jax.data.codecs.base import Codec, unreadable
from data2vec_jax.data.sources.base import Address
from data2vec_jax.data.sources.columns import Column, Strings, appended
from data2vec_jax.data.sources.labels import UNKNOWN, index_labels
from data2vec_jax.data.sources.table import TableSource, select_split

# A compressed table may become so many bytes, and so many times as large as its file.
LEAST_INFLATED, INFLATED = 2**26, 200
ROWS = 2**20  # whose files are looked for at a time: names of more may not fit into memory


def open_manifest(address: Address) -> TableSource:
    """`manifest:FILE`, *.gz too.

    Either a wav2vec manifest (of signals that are measured): the root folder in the first line,
    then `path<TAB>samples`; or a table, whose first line names its columns: *.csv, *.jsonl (an
    object a line), else separated by tabs. Columns: path (relative to the manifest) or text, and if
    present label, split, samples.
    """
    uri, codec, key = address.uri, address.codec, address.key
    place = address.place.replace("{split}", address.split)
    if not places.is_file(place):
        raise UserError(f"{uri}: no file '{place}'")
    wanted = codec.field if codec.in_tables else "path"
    try:
        root, table, numbers, bad = read_rows(place, codec, address.columns)
    except (OSError, EOFError, zlib.error, UnicodeDecodeError, csv.Error) as error:
        raise unreadable(place, "table", error) from error
    if key is not None:
        if key not in table:
            raise UserError(f"{place}: no column '{key}'{nearest(key, table)}")
        table = {wanted if name == key else name: column for name, column in table.items()}
    if not {wanted, "path"} & set(table):
        or_path = "" if wanted == "path" else " or 'path'"
        first = ", ".join(map(str, table))
        raise UserError(f"{place}: no column '{wanted}'{or_path}; its first line is '{first}'")

    def refuse(i: int, reason: str, text: str) -> None:
        bad.setdefault(i, ExampleError(f"{place}:{numbers[i]}", reason, text))

    for name in {"path", wanted} & set(table):
        for i, value in enumerate(table[name]):
            if not isinstance(value, str):
                refuse(i, "format", f"{name} is {value!r}, not a string")
    label_names = address.label_names
    if "label" in table:
        unknown = (lambda i, text: refuse(i, UNKNOWN, text)) if address.tolerant else None
        table["label"], label_names = index_labels(
            table["label"], label_names, place, numbers, unknown
        )
    if "split" in table:
        table, numbers, bad = select_split(table, numbers, bad, address.split, uri)
    if codec.measure and codec.units in table:
        for i, value in enumerate(table[codec.units]):
            # More than 18 digits are no length that anything has.
            if not (str(value).isdecimal() and len(str(value)) <= 18):
                refuse(i, "format", f"'{value}' is not a number of {codec.units}")
        lengths = (-1 if i in bad else int(value) for i, value in enumerate(table[codec.units]))
        table[codec.units] = np.fromiter(lengths, np.int64, len(numbers))
    if "path" in table:
        for i, path in missing_files(root, table["path"], skip=bad):
            refuse(i, "missing", f"no file '{path}'")
    source = TableSource(
        uri,
        address.split,
        codec,
        table,
        root=root,
        label_names=label_names,
        file=place,
        lines=numbers,
        bad=bad,
    )
    source.check_any()
    return source


def read_rows(place: str, codec: Codec, columns: Sequence[str] | None) -> tuple:
    """-> (root folder, name -> column, line number of each row, bad rows: index -> error). The
    cells of a bad row are None.
    """
    root, suffix = os.path.dirname(place) or ".", os.path.splitext(place.removesuffix(".gz"))[1]
    names, numbers = list(columns or ()), array("I")
    found: list[Column] = []
    bad: dict[int, ExampleError] = {}
    with open_table(place) as file:
        if suffix == ".jsonl":
            lines = ((n, parse_object(line, f"{place}:{n}")) for n, line in enumerate(file, 1))
        elif suffix == ".csv":
            csv.field_size_limit(2**31 - 1)  # a cell may be a whole document
            lines = csv_rows(file, place)
        else:
            stripped = (line.rstrip("\r\n") for line in file)
            lines = ((n, line.split("\t") if line else []) for n, line in enumerate(stripped, 1))
        for number, row in lines:
            if row is None or row == []:
                continue  # a blank line
            if isinstance(row, dict):
                names = names or list(row)
                missing = [name for name in names if name not in row]
                if missing:
                    row = ExampleError(f"{place}:{number}", "format", f"no '{missing[0]}'")
                else:
                    row = [row[name] for name in names]
            elif isinstance(row, list) and not names:
                names = row
                if suffix == ".csv" and len(row) == 1 and ";" in row[0]:
                    raise UserError(f"{place}: one column, '{row[0]}'; columns end with a comma")
                if codec.measure and len(row) == 1 and row != ["path"]:  # a wav2vec manifest
                    root, names = places.join(root, row[0]), ["path", codec.units]
                if twice := [name for name in names if names.count(name) > 1]:
                    raise UserError(f"{place}: two columns have the name '{twice[0]}'")
                continue
            elif isinstance(row, list) and len(row) != len(names):
                text = f"{len(row)} columns, not {len(names)} ({', '.join(names)})"
                row = ExampleError(f"{place}:{number}", "format", text)
            if isinstance(row, ExampleError):
                bad[len(numbers)] = row
                row = [None] * len(names)
            if not found:  # the first rows may be bad, and without names
                found = [Strings([None] * len(numbers)) for _ in names]
            found = [appended(column, cell) for column, cell in zip(found, row, strict=True)]
            numbers.append(number)
    if not numbers:
        raise UserError(f"{place}: has no rows")
    if not names:
        raise bad[0]
    return root, dict(zip(names, found, strict=True)), numbers, bad


def csv_rows(file: TextIO, place: str) -> Iterator[tuple[int, list[str]]]:
    """(number of its last line, cells) of each row. Raises UserError: a quote stays open to the
    end, so that all the rows after it are one cell.
    """
    lines: list[str] = []  # of the row

    def noted() -> Iterator[str]:
        for line in file:
            lines.append(line)
            yield line

    reader = csv.reader(noted())
    for row in reader:
        if len(lines) > 1 and len(list(csv.reader([*lines, "next"]))) == 1:
            first = reader.line_num - len(lines) + 1
            raise UserError(f"{place}:{first}: a quote in it or below is not closed")
        lines.clear()
        yield reader.line_num, row


@contextlib.contextmanager
def open_table(place: str) -> Iterator[TextIO]:
    """A table's lines. Raises UserError: a compressed one becomes absurdly large."""
    remote = places.is_remote(place)
    with io.BytesIO(places.read(place)) if remote else open(place, "rb") as stored:
        file: Any = stored
        if place.endswith(".gz"):
            limit = LEAST_INFLATED + INFLATED * stored.seek(0, os.SEEK_END)
            stored.seek(0)
            file = io.BufferedReader(Limited(gzip.GzipFile(fileobj=stored), limit, place))
        yield io.TextIOWrapper(file, encoding="utf-8-sig", newline="\n")


class Limited(io.RawIOBase):
    """A binary file of at most `limit` bytes. Raises UserError: it has more."""

    def __init__(self, file: Any, limit: int, name: str):
        self._file, self._left, self._limit, self._name = file, limit, limit, name

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self._file.readinto(buffer)
        self._left -= count
        if self._left < 0:
            raise UserError(f"{self._name}: inflates to more than {self._limit:,} bytes")
        return count


def parse_object(line: str, where: str) -> dict | ExampleError | None:
    """A line of JSONL, None if it is blank."""
    if not line.strip():
        return None
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        return ExampleError(where, "format", f"not JSON ({error})")
    return row if isinstance(row, dict) else ExampleError(where, "format", "not a JSON object")


def missing_files(
    root: str, paths: Sequence[str | None], skip: Container[int]
) -> Iterator[tuple[int, str]]:
    """(index, path) of the files that are not there. Lists each folder once for `ROWS` of them."""
    for start in range(0, len(paths), ROWS):
        folders: dict[str, list[int]] = {}
        for i in range(start, min(start + ROWS, len(paths))):
            if i not in skip and paths[i] is not None:
                folder = os.path.dirname(places.join(root, paths[i]))
                folders.setdefault(folder, []).append(i)
        for folder, rows in folders.items():
            there = places.names_in(folder)
            for i in rows:
                name = os.path.basename(paths[i])
                if name not in there:
                    yield i, os.path.join(folder, name)
