"""`manifest:FILE`: wav2vec manifests, and tables of TSV, CSV or JSONL."""

import csv
import gzip
import json
import os
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

from data2vec_jax.core.errors import UserError, nearest
from data2vec_jax.data.codecs.base import Codec, unreadable
from data2vec_jax.data.sources.base import Address
from data2vec_jax.data.sources.labels import index_labels
from data2vec_jax.data.sources.table import TableSource, select_split


def open_manifest(address: Address) -> TableSource:
    """`manifest:FILE`, *.gz too.

    Either a wav2vec manifest (of signals that are measured): the root folder in the first line,
    then `path<TAB>samples`; or a table, whose first line names its columns: *.csv, *.jsonl (an
    object a line), else separated by tabs. Columns: path (relative to the manifest) or text, and if
    present label, split, samples.
    """
    uri, codec, key = address.uri, address.codec, address.key
    place = address.place.replace("{split}", address.split)
    if not Path(place).is_file():
        raise UserError(f"{uri}: no file '{place}'")
    wanted = codec.field if codec.in_tables else "path"
    try:
        root, names, numbers, cells = read_rows(place, codec, address.columns)
    except (OSError, EOFError, zlib.error, UnicodeDecodeError, csv.Error) as error:
        raise unreadable(place, "table", error) from error
    if key is not None:
        if key not in names:
            raise UserError(f"{place}: no column '{key}'{nearest(key, names)}")
        names = [wanted if name == key else name for name in names]
    if not {wanted, "path"} & set(names):
        or_path = "" if wanted == "path" else " or 'path'"
        first = ", ".join(map(str, names))
        raise UserError(f"{place}: no column '{wanted}'{or_path}; its first line is '{first}'")
    table: dict[str, list] = {name: [row[c] for row in cells] for c, name in enumerate(names)}

    for name in {"path", wanted} & set(names):
        for number, value in zip(numbers, table[name], strict=True):
            if not isinstance(value, str):
                raise UserError(f"{place}:{number}: {name} is {value!r}, not a string")
    label_names = address.label_names
    if "label" in table:
        table["label"], label_names = index_labels(table["label"], label_names, place, numbers)
    if "split" in table:
        table, numbers = select_split(table, numbers, address.split, uri)
    if codec.measure and codec.units in table:
        for number, value in zip(numbers, table[codec.units], strict=True):
            if not str(value).isdecimal():
                raise UserError(f"{place}:{number}: '{value}' is not a number of {codec.units}")
        table[codec.units] = [int(value) for value in table[codec.units]]
    if "path" in table:
        check_paths(root, table["path"], numbers, place)
    return TableSource(
        uri,
        address.split,
        codec,
        table,
        root=root,
        label_names=label_names,
        file=place,
        lines=numbers,
    )


def read_rows(place: str, codec: Codec, columns: Sequence[str] | None) -> tuple:
    """-> (root folder, names of the columns, line number of each row, cells of each row)."""
    root, suffix = str(Path(place).parent), Path(place.removesuffix(".gz")).suffix
    opener: Callable = gzip.open if place.endswith(".gz") else open
    names, numbers, cells = list(columns or ()), [], []
    with opener(place, "rt", encoding="utf-8-sig", newline="\n") as file:
        if suffix == ".jsonl":
            lines = ((n, parse_object(line, f"{place}:{n}")) for n, line in enumerate(file, 1))
        elif suffix == ".csv":
            csv.field_size_limit(2**31 - 1)  # a cell may be a whole document
            reader = csv.reader(file)
            lines = ((reader.line_num, row) for row in reader)
        else:
            stripped = (line.rstrip("\r\n") for line in file)
            lines = ((n, line.split("\t") if line else []) for n, line in enumerate(stripped, 1))
        for number, row in lines:
            if not row:
                continue  # a blank line
            if isinstance(row, dict):
                names = names or list(row)
                missing = [name for name in names if name not in row]
                if missing:
                    raise UserError(f"{place}:{number}: no '{missing[0]}'")
                row = [row[name] for name in names]
            elif not names:
                names = row
                if codec.measure and len(row) == 1 and row != ["path"]:  # a wav2vec manifest
                    root, names = os.path.join(root, row[0]), ["path", codec.units]
                continue
            if len(row) != len(names):
                raise UserError(
                    f"{place}:{number}: {len(row)} columns, not {len(names)} ({', '.join(names)})"
                )
            numbers.append(number)
            cells.append(row)
    if not cells:
        raise UserError(f"{place}: has no rows")
    return root, names, numbers, cells


def parse_object(line: str, where: str) -> dict | None:
    """A line of JSONL, None if it is blank."""
    if not line.strip():
        return None
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where}: not JSON ({error})") from error
    if not isinstance(row, dict):
        raise UserError(f"{where}: not a JSON object")
    return row


def check_paths(root: str, paths: list[str], numbers: list[int], place: str) -> None:
    """Raises UserError naming the first line whose file is missing. Lists each folder once."""
    listed: dict[str, set[str]] = {}
    for number, path in zip(numbers, paths, strict=True):
        folder, name = os.path.split(os.path.join(root, path))
        if folder not in listed:
            listed[folder] = set(os.listdir(folder or ".")) if os.path.isdir(folder) else set()
        if name not in listed[folder]:
            raise UserError(f"{place}:{number}: no file '{os.path.join(folder, name)}'")
