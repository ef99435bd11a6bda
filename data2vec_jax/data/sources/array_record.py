"""`array_record:DIR`: ArrayRecord files of records that are msgpack dicts, with arrays as
flax.serialization writes them.
"""

import bisect
import contextlib
import copy
import hashlib
import os
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgpack
import numpy as np

from data2vec_jax.core.errors import ExampleError, UserError, nearest
from data2vec_jax.core.files import whole
from data2vec_jax.data import places
from data2vec_jax.data.codecs.base import Codec, Item, unreadable
from data2vec_jax.data.copies import local_copies
from data2vec_jax.data.sources import shards
from data2vec_jax.data.sources.base import Address, Source

AHEAD, AHEAD_BYTES = 63, 2**24  # records, and their bytes, that are asked for at a time
BESIDE = (".npy", ".json", ".partial")  # ends of the names of what lies beside shards


def encode_example(example: Item) -> bytes:
    """A dict of str, bytes, numbers, arrays and lists or dicts of them, as one record.

    The codec decides which fields are read back as the signal (`Codec.record_fields`): audio_bytes
    (an audio file), audio (int16 or float [n]), image_bytes (an image file), image (uint8
    [H, W, C]), text (str). Besides label, and sample_rate of audio.
    """

    def pack(value: Any) -> Any:
        if isinstance(value, np.generic):
            return value.item()
        if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
            value = value.astype(value.dtype.newbyteorder("="))
            array = (value.shape, value.dtype.name, value.tobytes())
            return msgpack.ExtType(1, msgpack.packb(array))
        raise TypeError(f"{type(value).__name__} cannot be stored in a record")

    return msgpack.packb(example, default=pack)


def decode_example(record: bytes) -> Item:
    """The dict that `encode_example` or `flax.serialization.msgpack_serialize` packed."""

    def unpack(code: int, data: bytes) -> np.ndarray:
        shape, dtype, values = msgpack.unpackb(data)
        return np.frombuffer(values, np.dtype(dtype)).reshape(shape).copy()

    example = msgpack.unpackb(record, ext_hook=unpack, strict_map_key=False)
    if not isinstance(example, dict):
        raise ValueError(f"a {type(example).__name__}, not a dict")
    return example


def write_array_record(
    path: str | os.PathLike, examples: Iterable[Item], *, codec: Codec | None = None
) -> int:
    """Writes one ArrayRecord file, and `PATH.lengths.npy` if its examples are signals of `codec`.

    The latter, int64 [N] in the codec's units, lets a reader plan its batches without touching the
    records; without it, the first reader makes it. A file appears under its name only when it is
    complete. Returns the number of examples. Raises UserError: an example's signal cannot be
    measured (damaged audio, another sample rate), or some have none.
    """
    from array_record.python.array_record_module import ArrayRecordWriter

    path, lengths, count = os.fspath(path), [], 0
    with whole(Path(path)) as draft:
        writer = ArrayRecordWriter(str(draft), "group_size:1")
        try:
            for example in examples:
                writer.write(encode_example(example))
                if codec and codec.measure and codec.is_in(example):
                    lengths.append(codec.length_of_record(example, f"{path}[{count}]"))
                else:
                    lengths.append(None)
                count += 1
        finally:
            if writer.is_open():
                writer.close()
        if all(length is None for length in lengths):
            Path(lengths_file(path)).unlink(missing_ok=True)  # of what stood here before
        elif None in lengths:
            raise UserError(f"{path}[{lengths.index(None)}]: has no {codec.field}, but others have")
        else:
            save_lengths(path, lengths)
    return count


def lengths_file(path: str) -> str:
    """The file with the lengths of the records of `path`."""
    return f"{path}.lengths.npy"


def save_lengths(path: str, lengths: Sequence[int]) -> None:
    """Writes `PATH.lengths.npy`, whole or not at all, whoever else does so at the same time."""
    with whole(Path(lengths_file(path))) as draft, draft.open("wb") as file:
        np.save(file, np.array(lengths, np.int64))


def open_array_file(path: str) -> Any:
    """Random access to the records of one file."""
    from array_record.python.array_record_data_source import ArrayRecordDataSource

    try:
        return ArrayRecordDataSource([path])
    except Exception as error:  # the C++ reader has no exception of its own
        raise unreadable(path, "ArrayRecord file", error) from error


def read_record(file: Any, i: int, path: str) -> Item:
    """Record `i` of an open file as a dict."""
    try:
        return decode_example(file[i])
    except Exception as error:
        raise unreadable(f"{path}[{i}]", "record", error) from error


class ArrayRecordSource(Source):
    """Records of many files, in the order of the files' names."""

    def __init__(
        self,
        uri: str,
        split: str,
        codec: Codec,
        paths: Sequence[str],
        label_names: Sequence[str] | None = None,
        key: str | None = None,
        has_columns: bool = False,
    ):
        super().__init__(uri, split, codec, label_names)
        self._paths, self._key, self._has_columns = list(paths), key, has_columns
        self._files = [open_array_file(path) for path in paths]
        self.counts = [len(file) for file in self._files]
        self._ends = np.cumsum(self.counts)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def _load(self, i: int) -> Item:
        f, i = self._place(i)
        file, path = self._files[f], self._paths[f]
        return self.codec.decode_record(read_record(file, i, path), f"{path}[{i}]", self._key)

    def results(self, rows: Sequence[int]) -> Iterator[Item | ExampleError]:
        # Of short records, each request takes longer than all else.
        size = sum(map(os.path.getsize, self._paths))
        step = 1 + min(AHEAD, AHEAD_BYTES * len(self) // size)
        for some in (rows[first : first + step] for first in range(0, len(rows), step)):
            wanted = [self._place(i) for i in some]
            ahead = copy.copy(self)
            ahead._files = {f: self._files[f] for f, _ in wanted}
            for f in ahead._files:
                numbers = [number for g, number in wanted if g == f]
                with contextlib.suppress(Exception):  # if one is damaged, all are read singly
                    records = self._files[f].__getitems__(numbers)
                    ahead._files[f] = dict(zip(numbers, records, strict=True))
            yield from Source.results(ahead, some)

    def _place(self, i: int) -> tuple[int, int]:
        """Number of the file, and of the record in it, of example i."""
        f = bisect.bisect_right(self._ends, i)
        return f, i - int(self._ends[f]) + self.counts[f]

    def field(self, index: int, name: str) -> Any:
        f, i = self._place(range(len(self))[index])
        record = read_record(self._files[f], i, self._paths[f])
        plain = isinstance(record.get(name), str | int | float | list)
        if plain and name != self.codec.field:
            return record[name]  # without decoding the signal beside it
        return super().field(index, name)

    def column(self, name: str) -> list[Any] | None:
        if not self._has_columns or name not in shards.COLUMNS:
            return None
        pairs = zip(self._paths, self.counts, strict=True)
        found = [value for path, n in pairs for value in shards.read_column(path, name, n)]
        return found if any(value is not None for value in found) else None

    def location(self, index: int) -> str:
        file, i = self._place(index)
        return f"{self._paths[file]}[{i}]"

    def lengths(self) -> np.ndarray | None:
        """int64 [N] from the `*.lengths.npy` files; what is missing is measured once and kept.

        -1 of records that cannot be measured. Raises UserError: one of these files is damaged or
        stale.
        """
        if self.codec.measure is None:
            return None
        pairs = zip(self._paths, self._files, strict=True)
        lengths = np.concatenate([self._lengths_of(path, file) for path, file in pairs])
        for i in np.flatnonzero(lengths < 0).tolist():
            if i not in self.bad:  # measured by an earlier run
                where = self.location(i)
                self.bad[i] = ExampleError(where, "unreadable", "has no length that can be read")
        self.check_any()
        return lengths

    def digest(self) -> str:
        found = hashlib.sha256(self._ends.tobytes())
        for path in self._paths:
            found.update(f"{os.path.basename(path)} {os.path.getsize(path)}".encode())
        return found.hexdigest()[:12]

    def _lengths_of(self, path: str, file: Any) -> np.ndarray:
        stored = lengths_file(path)
        try:
            lengths = np.load(stored, mmap_mode="r")  # checks the header against the file's size
        except FileNotFoundError:
            return self._measure(path, file)
        except (OSError, ValueError, EOFError) as error:
            raise unreadable(stored, "array", error) from error
        again = "delete it, and it is made again"
        if lengths.ndim != 1 or lengths.dtype.kind not in "iu":
            shape, dtype = list(lengths.shape), lengths.dtype
            raise UserError(f"{stored}: {dtype} {shape}, not whole numbers [N]; {again}")
        if len(lengths) != len(file):
            raise UserError(f"{stored}: {len(lengths)} lengths for {len(file)} records; {again}")
        return np.array(lengths, np.int64)

    def _measure(self, path: str, file: Any) -> np.ndarray:
        """The lengths of all records of a file, kept beside it if its folder can be written."""
        lengths, first = [], int(self._ends[self._paths.index(path)]) - len(file)
        for i in range(len(file)):
            where = f"{path}[{i}]"
            try:
                record = read_record(file, i, path)
                lengths.append(self.codec.length_of_record(record, where, self._key))
            except UserError as error:
                self.bad[first + i] = ExampleError.of(error, where)
                lengths.append(-1)
        try:
            save_lengths(path, lengths)
            kept = f"they are kept in {lengths_file(path)}"
        except OSError:
            kept = "not kept, as its folder cannot be written"
        measured = f"{path}: no lengths beside it, measured its {len(file)} records once"
        warnings.warn(f"{measured}; {kept}", stacklevel=4)
        return np.array(lengths, np.int64)


def open_array_record(address: Address) -> ArrayRecordSource:
    """`array_record:DIR` (the manifest's shards, or files called SPLIT*.array_record) or
    `array_record:GLOB`. Remote ones are copied once, as the reader takes files of this machine."""
    uri, place, split, names = address.uri, address.place, address.split, address.label_names
    in_folder = places.is_folder(place)
    manifest = shards.read_manifest(place) if in_folder else None
    counts: list[int] | None = None
    if manifest:
        found = shards.shards_of_split(manifest, split, uri)
        paths = [places.join(place, shard["file"]) for shard in found]
        counts = [shard["examples"] for shard in found]
        own = manifest.get("label_names")
        if own is not None and names and list(map(str, names)) != list(map(str, own)):
            raise UserError(f"{uri}: its classes are {len(own)} of its own, not those given")
        names = own if own is not None else names
    elif in_folder:
        paths = shards_by_name(uri, place, split)
    else:
        pattern = place.replace("{split}", split)
        paths = [p for p in places.glob(pattern) if not p.endswith(BESIDE)]
        if not paths:
            raise UserError(f"{uri}: no file or folder '{pattern}'")
    paths = local_copies(paths, beside=tuple(shards.BESIDE.values()))
    for path, shard in zip(paths, found if manifest else (), strict=False):
        shards.check_shards(os.path.dirname(path), [shard])
    has_columns = manifest is not None and any("columns" in shard for shard in found)
    source = ArrayRecordSource(uri, split, address.codec, paths, names, address.key, has_columns)
    if counts is not None and counts != source.counts:
        raise UserError(f"{uri}: {source.counts} records, but {shards.MANIFEST} says {counts}")
    return source


def shards_by_name(uri: str, place: str, split: str) -> list[str]:
    """The shards of a split in a folder without a manifest: SPLIT*.array_record."""
    there = (name for name in places.names_in(place) if ".array_record" in name)
    found = sorted(name for name in there if not name.endswith(BESIDE))
    if not found:
        raise UserError(f"{uri}: no *.array_record files in '{place}'")
    names = [n for n in found if re.split(r"[-._]", n)[0] == split]
    if not names:
        splits = {re.split(r"[-._]", n)[0] for n in found}
        raise UserError(f"{uri}: no split '{split}'{nearest(split, splits)}")
    return [places.join(place, name) for name in names]
