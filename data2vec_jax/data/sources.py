"""Where examples come from: random access to real files, one small dict per example.

    source = open_source("folder:/data/imagenet", "train", modality="vision")
    source[7]  # {'image': uint8 [H, W, 3], 'label': 0, 'path': 'n01440764/x.JPEG'}

| address                        | is                                                            |
| ------------------------------ | ------------------------------------------------------------- |
| `samples:speech`               | 16 minutes of read Russian with aligned phones (train, test)  |
| `samples:digits`               | 5,000 MNIST digits (train, test)                              |
| `samples:glosses`              | 20,000 WordNet glosses, 45 classes (train, test, extra)       |
| `folder:DIR`                   | every audio file, image or *.txt below DIR                    |
| `manifest:FILE`                | a wav2vec manifest, or a TSV, CSV or JSONL table              |
| `array_record:DIR` or `:GLOB`  | ArrayRecord files made by `write_array_record`                |
| `tfds:NAME[/CONFIG][:VERSION]` | a data set that TFDS has prepared on this machine (not more:  |
| or `tfds:DIR`                  | nothing is fetched)                                           |
| `librispeech:DIR`, `imagenet:` | as their authors ship them: see `data.published`              |
| `glue:`, `squad:`, `ag_news:`  |                                                               |

Items hold, by modality:
    speech: audio, float32 [n] in [-1, 1], one channel (more are averaged); sample_rate, int
    vision: image, uint8 [H, W, 3], RGB (`samples:digits` alone are grey: [28, 28, 1])
    text:   text, str
and, where the data has them: label (an int, index into `source.label_names`; or a float; None in
a row of a table without one), path, and every other column or feature as it stands (transcript,
...).

Nothing is decoded before it is asked for, nothing is ever resampled, and what is wrong with the
data is a `UserError` that names the file. Sources can be pickled and read from many threads.
"""

import abc
import csv
import gzip
import io
import json
import math
import operator
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from glob import glob
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import soundfile
from PIL import Image

from data2vec_jax.core.errors import UserError, nearest

Item = dict[str, Any]

SAMPLES = Path(__file__).parent / "samples"
MODALITY_OF_SAMPLES = {"speech": "speech", "digits": "vision", "glosses": "text"}
SUFFIXES = {
    "speech": (".flac", ".mp3", ".oga", ".ogg", ".opus", ".wav"),
    "vision": (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"),
    "text": (".txt",),
}
SPLIT_FOLDERS = ("train", "val", "valid", "validation", "dev", "test")
FIELDS = {  # where records keep their input, in order of preference
    "speech": ("audio_bytes", "audio", "speech"),
    "vision": ("image_bytes", "image"),
    "text": ("text",),
}


class Source(abc.ABC):
    """Examples of one split, by index.

    label_names: names of the classes, or None; the phone set for `samples:speech`; empty if the
      source was opened for labels that are numbers.
    rows: of tables and folders, where the rows are from, by which two splits can be found to be the
      same; else None.
    """

    rows: Any = None

    def __init__(
        self, uri: str, split: str, modality: str, label_names: Sequence[str] | None = None
    ):
        self.uri, self.split, self.modality = uri, split, modality
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
        """Samples of each example, int64 [N], without decoding; None if not audio or not known."""
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
            f"modality={self.modality!r}, {len(self):,} examples{names})"
        )


class Subset(Source):
    """The examples of `source` with the numbers `indices`."""

    def __init__(self, source: Source, indices: Sequence[int]):
        super().__init__(source.uri, source.split, source.modality, source.label_names)
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


def open_source(
    uri: str,
    split: str = "train",
    *,
    modality: str,
    sample_rate: int = 16_000,
    label_names: Sequence[str] | None = None,
    key: str | None = None,
    columns: Sequence[str] | None = None,
    data_dir: str | None = None,
) -> Source:
    """The examples at an address.

    uri: see the table at the top of this file.
    split: folder: the subfolder of that name, or DIR itself if it has none of train, val, valid,
      validation, dev, test. manifest: rows whose column `split` says so, or all if there is no
      such column; `a+b` joins (samples too). array_record: files of DIR whose names start with
      it. FILE and GLOB may hold `{split}`. tfds: also `train[:10%]` and `a+b`.
    modality: speech, vision or text.
    sample_rate: in Hz; audio of any other rate is refused.
    label_names: order of the classes; by default as found. Give a test set those of the train set
      if it is a file of its own. Empty, (): the labels are numbers, not classes.
    key: column or feature that holds the audio, image (for tables: their path) or text.
    columns: manifest: names of the columns, for tables without a first line of names.
    data_dir: tfds: where NAME was prepared; default $TFDS_DATA_DIR or ~/tensorflow_datasets.
    Raises UserError: the kind, folder, file, split, option or label does not exist, a folder is
      empty, or a line of a manifest is malformed or points to a missing file.
    """
    kind, colon, place = uri.partition(":")
    if kind not in OPENERS or not colon:
        hint = nearest(kind, OPENERS)
        if not colon and Path(uri).expanduser().exists():
            hint = f"; did you mean 'folder:{uri}' or 'manifest:{uri}'?"
        raise UserError(f"data source '{uri}': unknown kind '{kind}'{hint}")
    if modality not in SUFFIXES:
        raise UserError(f"{uri}: no modality '{modality}'{nearest(modality, SUFFIXES)}")
    opener, takes = OPENERS[kind]
    options = {"sample_rate": sample_rate, "label_names": label_names}
    for name, value in (("key", key), ("columns", columns), ("data_dir", data_dir)):
        if name in takes:
            options[name] = value
        elif value is not None:
            raise UserError(f"{uri}: '{name}' is not an option of {kind}:")
    return opener(uri, os.path.expanduser(place), split, modality, **options)


def open_named(
    uri: str, split: str, modality: str, names: Sequence[str] | None, key: str | None = None
) -> Source:
    """`open_source` with classes that are known already, unless the data has its own."""
    own = uri.partition(":")[0] not in ("manifest", "folder")
    return open_source(uri, split, modality=modality, key=key, label_names=None if own else names)


def check_field(source: Source, name: str, check: Callable[[Any], Any]) -> None:
    """Calls `check` with a field of each example, or of the first if all would be decoded for it.

    Raises UserError: that of `check`, with the example's file and line.
    """
    column = source.column(name)
    for i, value in enumerate([source.field(0, name)] if column is None else column):
        try:
            check(value)
        except UserError as error:
            raise UserError(f"{source.location(i)}: {error}") from error


def class_of(label: Any) -> int:
    """A label that is the index of a class. Raises UserError: it is none, or a number."""
    if label is None:
        raise UserError("no label")
    if not isinstance(label, int | np.integer):
        raise UserError(f"label {label!r} is not a class")
    return int(label)


# Decoding. `name` is what error messages call the file.


@contextmanager
def open_audio(file: str | io.BytesIO, name: str, sample_rate: int) -> Iterator[Any]:
    """An audio file, open. Raises UserError: missing, damaged, another sample rate."""
    try:
        with soundfile.SoundFile(file) as sound:
            check_rate(sound.samplerate, name, sample_rate)
            check_whole(sound, name)
            yield sound
    except (soundfile.SoundFileError, OSError) as error:
        if isinstance(file, str) and not os.path.exists(file):
            raise UserError(f"{name}: no such file") from error
        raise unreadable(name, "audio", error) from error


def decode_audio(file: str | io.BytesIO, name: str, sample_rate: int) -> np.ndarray:
    """Audio file -> float32 [n] in [-1, 1], one channel. Raises UserError as `open_audio`."""
    with open_audio(file, name, sample_rate) as sound:
        audio, frames = sound.read(dtype="float32", always_2d=True), sound.frames
    if len(audio) < frames:
        raise UserError(f"{name}: damaged audio, ends after {len(audio)} of {frames} samples")
    return scale_audio(audio.mean(axis=1), name)


def count_samples(file: str | io.BytesIO, name: str, sample_rate: int) -> int:
    """Length of an audio file in samples, from its header. Raises UserError as `open_audio`."""
    with open_audio(file, name, sample_rate) as sound:
        return sound.frames


def check_rate(found: int, name: str, needed: int) -> None:
    """Raises UserError unless the two rates, in Hz, are the same."""
    if found != needed:
        raise UserError(
            f"{name}: sample rate is {found} Hz, needed {needed} Hz; convert it first "
            f"(ffmpeg -ar {needed}): nothing is resampled silently"
        )


def check_whole(sound: Any, name: str) -> None:
    """Raises UserError if a WAV file is shorter than its header says.

    libsndfile corrects `sound.frames` then, and says so in its notes. A stream's header announces
    2 or 4 GiB, for want of the length.
    """
    cut = re.search(r"^data : (\d+) \(should be (\d+)\)", sound.extra_info, re.MULTILINE)
    if cut and int(cut[1]) < 0x7FFF0000:
        raise UserError(f"{name}: damaged audio, ends after {cut[2]} of {cut[1]} bytes")


def scale_audio(samples: np.ndarray, name: str) -> np.ndarray:
    """Raw samples [n], int16 or float -> float32 [n] in [-1, 1]."""
    if samples.ndim != 1 or samples.dtype.kind not in "fi" or samples.dtype.itemsize < 2:
        shape, dtype = list(samples.shape), samples.dtype
        raise UserError(f"{name}: audio is {dtype} {shape}, needed int16 or float [n]")
    if samples.dtype.kind == "i":
        samples = samples / np.float32(-np.iinfo(samples.dtype).min)
    if not np.isfinite(samples).all():
        raise UserError(f"{name}: damaged audio, has samples that are not finite")
    return np.clip(samples.astype(np.float32), -1, 1)


def decode_image(file: str | io.BytesIO, name: str) -> np.ndarray:
    """Image file -> uint8 [H, W, 3]; transparency is dropped. Raises UserError: damaged."""
    try:
        with Image.open(file) as image:
            if image.mode.startswith("I;16"):  # convert() would clip, not scale
                return to_rgb((np.array(image) >> 8).astype(np.uint8), name)
            if image.mode in ("I", "F"):
                raise UserError(f"{name}: image has 32 bits a pixel, needed 8 or 16")
            return np.array(image.convert("RGB"))
    except UserError:
        raise
    except Exception as error:  # Pillow's decoders raise whatever they stumble over
        raise unreadable(name, "image", error) from error


def to_rgb(image: np.ndarray, name: str) -> np.ndarray:
    """uint8 [H, W], [H, W, 1], [H, W, 3] or [H, W, 4] -> uint8 [H, W, 3]."""
    image = image[..., None] if image.ndim == 2 else image
    if image.ndim != 3 or image.shape[-1] not in (1, 3, 4) or image.dtype != np.uint8:
        shape, dtype = list(image.shape), image.dtype
        raise UserError(f"{name}: image is {dtype} {shape}, needed uint8 [H, W, 1, 3 or 4]")
    return np.repeat(image, 3, axis=-1) if image.shape[-1] == 1 else image[..., :3]


def read_text(path: str) -> str:
    """A UTF-8 file as it stands, blank lines and all; line ends become \\n."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise unreadable(path, "text", error) from error


def unreadable(name: str, what: str, error: Exception) -> UserError:
    """The one line that names a file which its decoder refused."""
    reason = " ".join(str(getattr(error, "error_string", error)).split())
    return UserError(f"{name}: unreadable {what} ({reason or type(error).__name__})")


# Tables: a column of paths or texts, and further columns. Folders, manifests and most samples.


class TableSource(Source):
    """Rows of a table, in memory; the files that its column `path` names are read on demand.

    columns: name -> list [N]. `path` (relative to `root`) or `text`; `samples`, the length of the
      audio; `label`; others are handed on.
    file, lines: the table's own, and the line of each row.
    """

    def __init__(
        self,
        uri: str,
        split: str,
        modality: str,
        columns: Mapping[str, list],
        root: str = "",
        sample_rate: int = 16_000,
        label_names: Sequence[str] | None = None,
        file: str = "",
        lines: Sequence[int] = (),
    ):
        super().__init__(uri, split, modality, label_names)
        self._file, self._lines = file, lines
        columns = dict(columns)
        samples = columns.pop("samples", None) if modality == "speech" else None
        self._lengths = None if samples is None else np.array(samples, np.int64)
        self._columns, self._root, self._sample_rate = columns, root, sample_rate

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

    def _load(self, i: int) -> Item:
        item = {name: column[i] for name, column in self._columns.items()}
        path = os.path.join(self._root, item["path"]) if "path" in item else ""
        if self.modality == "speech":
            audio = decode_audio(path, path, self._sample_rate)
            if self._lengths is not None and len(audio) != self._lengths[i]:
                raise UserError(
                    f"{path}: has {len(audio)} samples, but {self.uri} says {self._lengths[i]}"
                )
            return {"audio": audio, "sample_rate": self._sample_rate, **item}
        if self.modality == "vision":
            return {"image": decode_image(path, path), **item}
        return item if "text" in item else {"text": read_text(path), **item}

    def lengths(self) -> np.ndarray | None:
        """int64 [N]: column `samples` if there is one, else from the headers, at the first call."""
        if self._lengths is None and self.modality == "speech":
            paths = [os.path.join(self._root, path) for path in self._columns["path"]]
            with ThreadPoolExecutor(16) as pool:  # the time is the file system's
                counts = pool.map(lambda p: count_samples(p, p, self._sample_rate), paths)
                self._lengths = np.fromiter(counts, np.int64, len(paths))
        return self._lengths


def open_folder(
    uri: str,
    place: str,
    split: str,
    modality: str,
    *,
    sample_rate: int,
    label_names: Sequence[str] | None,
) -> TableSource:
    """`folder:DIR`. Classes are the subfolders, if all files are in subfolders."""
    top = Path(place)
    if not top.is_dir():
        hint = f"; it is a file: did you mean 'manifest:{place}'?" if top.is_file() else ""
        raise UserError(f"{uri}: no folder '{place}'{hint}")
    splits = [name for name in subfolders(top) if name in (*SPLIT_FOLDERS, split)]
    if splits and split not in splits:
        raise UserError(f"{uri}: no split '{split}' in '{place}'{nearest(split, splits)}")
    folder = top / split if splits else top

    paths = []
    for parent, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found = [n for n in files if n.lower().endswith(SUFFIXES[modality]) and n[0] != "."]
        paths += [os.path.relpath(os.path.join(parent, name), folder) for name in found]
    if not paths:
        suffixes = ", ".join(SUFFIXES[modality])
        raise UserError(f"{uri}: no {modality} files ({suffixes}) in '{folder}'")
    paths.sort()
    columns: dict[str, list] = {"path": paths}
    if all(os.sep in path for path in paths):
        if label_names is None:  # the same order in every split, though one may lack a class
            tops = [top / name for name in splits] or [top]
            label_names = sorted({name for folder in tops for name in subfolders(folder)})
        classes = [path.split(os.sep, 1)[0] for path in paths]
        columns["label"], label_names = index_labels(classes, label_names, uri)
    else:
        label_names = None
    return TableSource(uri, split, modality, columns, str(folder), sample_rate, label_names)


def subfolders(folder: Path) -> list[str]:
    """Names of the folders in `folder` that are not hidden, sorted."""
    with os.scandir(folder) as entries:
        return sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))


def open_manifest(
    uri: str,
    place: str,
    split: str,
    modality: str,
    *,
    sample_rate: int,
    label_names: Sequence[str] | None,
    key: str | None = None,
    columns: Sequence[str] | None = None,
) -> TableSource:
    """`manifest:FILE`, *.gz too.

    Either a wav2vec manifest: the root folder in the first line, then `path<TAB>samples`; or a
    table, whose first line names its columns: *.csv, *.jsonl (an object a line), else separated by
    tabs. Columns: path (relative to the manifest) or text, and if present label, split, samples.
    """
    place = place.replace("{split}", split)
    if not Path(place).is_file():
        raise UserError(f"{uri}: no file '{place}'")
    wanted = "text" if modality == "text" else "path"
    try:
        root, names, numbers, cells = read_rows(place, modality == "speech", columns)
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

    for name in {"path", "text"} & set(names):
        for number, value in zip(numbers, table[name], strict=True):
            if not isinstance(value, str):
                raise UserError(f"{place}:{number}: {name} is {value!r}, not a string")
    if "label" in table:
        table["label"], label_names = index_labels(table["label"], label_names, place, numbers)
    if "split" in table:
        table, numbers = select_split(table, numbers, split, uri)
    if modality == "speech" and "samples" in table:
        for number, value in zip(numbers, table["samples"], strict=True):
            if not str(value).isdecimal():
                raise UserError(f"{place}:{number}: '{value}' is not a number of samples")
        table["samples"] = [int(value) for value in table["samples"]]
    if "path" in table:
        check_paths(root, table["path"], numbers, place)
    return TableSource(uri, split, modality, table, root, sample_rate, label_names, place, numbers)


def read_rows(place: str, audio: bool, columns: Sequence[str] | None) -> tuple:
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
                if audio and len(row) == 1 and row != ["path"]:  # a wav2vec manifest
                    root, names = os.path.join(root, row[0]), ["path", "samples"]
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


def index_labels(
    values: list, names: Sequence[str] | None, where: str, lines: Sequence[int] = ()
) -> tuple[list[int | float | None], tuple[str, ...] | None]:
    """Labels as found -> their indices and the names of the classes, sorted (integers by value).

    If all are numbers and some are not integers, or the names that were given are none, (), they
    are no classes: floats. Integers are also taken as indices into names that were given, if those
    are not numbers themselves. A missing label (None or "") stays None.
    lines: those of the values in the file `where`. Raises UserError: an unknown label, or one that
    should be a number.
    """
    labels = [None if value in (None, "") else str(value) for value in values]
    found = set(labels) - {None}
    if names is None:
        whole = all(is_number(label, int) for label in found)
        if whole or not all(is_number(label, float) for label in found):
            names = sorted(found, key=int if whole else None) or None
    if names:
        index = {str(name): i for i, name in enumerate(names)}
        numeric = any(is_number(name, float) for name in index)
        if not numeric and not found <= set(index) and all(v.isdecimal() for v in found):
            index = {str(i): i for i in range(len(names))}
    else:
        index = {label: float(label) for label in found if is_number(label, float)}
    for i, label in enumerate(labels):
        if label is not None and label not in index:
            place = f"{where}:{lines[i]}" if lines else where
            if not names:
                raise UserError(f"{place}: label '{label}' is not a number")
            hint = nearest(label, index) if len(index) <= 50 else ""
            raise UserError(f"{place}: unknown label '{label}'{hint}")
    return [index.get(label) for label in labels], names and tuple(map(str, names))


def is_number(text: str, kind: type) -> bool:
    """Whether `text` is a finite number of the kind `int` or `float`."""
    try:
        return math.isfinite(kind(text))
    except ValueError:
        return False


# The samples shipped inside the package.


class DigitsSource(Source):
    """`samples:digits`: MNIST, grey: image, uint8 [28, 28, 1]; label, int."""

    def __init__(self, uri: str, split: str, images: np.ndarray, labels: np.ndarray):
        super().__init__(uri, split, "vision", [str(digit) for digit in range(10)])
        self._images, self._labels = images, labels

    def __len__(self) -> int:
        return len(self._labels)

    def _load(self, i: int) -> Item:
        return {"image": self._images[i][..., None].copy(), "label": int(self._labels[i])}


def open_samples(
    uri: str,
    place: str,
    split: str,
    modality: str,
    *,
    sample_rate: int,
    label_names: Sequence[str] | None,
) -> Source:
    """`samples:NAME`. Speech adds phones: a list of (start second, end second, name)."""
    if place not in MODALITY_OF_SAMPLES:
        raise UserError(f"{uri}: no samples '{place}'{nearest(place, MODALITY_OF_SAMPLES)}")
    if modality != MODALITY_OF_SAMPLES[place]:
        raise UserError(f"{uri}: these are {MODALITY_OF_SAMPLES[place]}, not {modality}")
    if place == "digits":
        with np.load(SAMPLES / "digits" / "digits.npz") as arrays:
            images, labels, splits = (arrays[name] for name in ("images", "labels", "split"))
        rows = rows_of_split(splits.tolist(), split, uri)
        return DigitsSource(uri, split, images[rows], labels[rows])
    table = "manifest.tsv" if place == "speech" else "glosses.tsv.gz"
    source = open_manifest(
        uri,
        str(SAMPLES / place / table),
        split,
        modality,
        sample_rate=sample_rate,
        label_names=label_names,
    )
    if place == "speech":
        alignment = {}
        lines = (SAMPLES / place / "phones.tsv").read_text(encoding="utf-8").splitlines()
        for path, ends, phones in (line.split("\t") for line in lines[1:]):
            times = [0.0, *map(float, ends.split())]
            alignment[path] = list(zip(times, times[1:], phones.split(), strict=False))
        paths = source._columns["path"]
        source._columns["phones"] = [alignment[path] for path in paths]
        source.label_names = tuple(sorted({p for rows in alignment.values() for _, _, p in rows}))
    return source


# ArrayRecord: records are msgpack dicts, with arrays as flax.serialization writes them.


def encode_example(example: Item) -> bytes:
    """A dict of str, bytes, numbers, arrays and lists or dicts of them, as one record.

    The fields that are read back as the input: audio_bytes (an audio file), audio (int16 or float
    [n]), image_bytes (an image file), image (uint8 [H, W, C]), text (str); and label, sample_rate.
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
    path: str | os.PathLike, examples: Iterable[Item], *, sample_rate: int = 16_000
) -> int:
    """Writes one ArrayRecord file, and `PATH.lengths.npy` if its examples are audio.

    The latter, int64 [N], lets a reader plan its batches without touching the records. A file
    appears under its name only when it is complete. Returns the number of examples.
    Raises UserError: an example's audio is damaged or has another sample rate.
    """
    from array_record.python.array_record_module import ArrayRecordWriter

    path, lengths, count = os.fspath(path), [], 0
    partial = f"{path}.partial"
    writer = ArrayRecordWriter(partial, "group_size:1")
    try:
        for example in examples:
            writer.write(encode_example(example))
            lengths.append(record_samples(example, f"{path}[{count}]", sample_rate))
            count += 1
        writer.close()
        save_lengths(path, lengths)
        os.replace(partial, path)
    finally:
        if writer.is_open():
            writer.close()
        Path(partial).unlink(missing_ok=True)
    return count


def write_lengths(path: str | os.PathLike, *, sample_rate: int = 16_000) -> None:
    """Writes `PATH.lengths.npy` for an ArrayRecord file that has none, by reading all of it."""
    path = os.fspath(path)
    file = open_array_file(path)
    records = (read_record(file, i, path) for i in range(len(file)))
    save_lengths(
        path, [record_samples(r, f"{path}[{i}]", sample_rate) for i, r in enumerate(records)]
    )


def save_lengths(path: str, lengths: list[int | None]) -> None:
    """`PATH.lengths.npy`, unless no example is audio."""
    if all(length is None for length in lengths):
        Path(f"{path}.lengths.npy").unlink(missing_ok=True)
        return
    if None in lengths:
        raise UserError(f"{path}[{lengths.index(None)}]: has no audio, but others have")
    with open(f"{path}.lengths.npy.partial", "wb") as file:
        np.save(file, np.array(lengths, np.int64))
    os.replace(file.name, f"{path}.lengths.npy")


def record_samples(example: Item, name: str, sample_rate: int) -> int | None:
    """Number of audio samples in a record, None if it has no audio."""
    check_rate(example.get("sample_rate", sample_rate), name, sample_rate)
    for field in FIELDS["speech"]:
        if isinstance(example.get(field), bytes):
            return count_samples(io.BytesIO(example[field]), name, sample_rate)
        if field in example:
            return len(example[field])
    return None


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
        modality: str,
        paths: Sequence[str],
        sample_rate: int = 16_000,
        label_names: Sequence[str] | None = None,
        key: str | None = None,
    ):
        super().__init__(uri, split, modality, label_names)
        self._paths, self._sample_rate, self._key = list(paths), sample_rate, key
        self._files = [open_array_file(path) for path in paths]
        self._ends = np.cumsum([len(file) for file in self._files])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def _load(self, i: int) -> Item:
        f = int(np.searchsorted(self._ends, i, side="right"))
        file, path = self._files[f], self._paths[f]
        i -= int(self._ends[f]) - len(file)
        item = read_record(file, i, path)
        return decode_item(item, f"{path}[{i}]", self.modality, self._sample_rate, self._key)

    def lengths(self) -> np.ndarray | None:
        """int64 [N] from the `*.lengths.npy` files. Raises UserError: one is missing or stale."""
        if self.modality != "speech":
            return None
        parts = []
        for path, file in zip(self._paths, self._files, strict=True):
            try:
                part = np.load(f"{path}.lengths.npy")
            except FileNotFoundError as error:
                raise UserError(
                    f"{path}: no lengths beside it; call data.sources.write_lengths('{path}') once"
                ) from error
            except (OSError, ValueError) as error:
                raise unreadable(f"{path}.lengths.npy", "array", error) from error
            if len(part) != len(file):
                raise UserError(
                    f"{path}.lengths.npy: {len(part)} lengths for {len(file)} records; "
                    "delete it and call data.sources.write_lengths again"
                )
            parts.append(part)
        return np.concatenate(parts)


def open_array_record(
    uri: str,
    place: str,
    split: str,
    modality: str,
    *,
    sample_rate: int,
    label_names: Sequence[str] | None,
    key: str | None,
) -> ArrayRecordSource:
    """`array_record:DIR` (files called SPLIT*.array_record) or `array_record:GLOB`."""
    if os.path.isdir(place):
        found = sorted(path.name for path in Path(place).glob("*.array_record*"))
        found = [n for n in found if not n.endswith((".npy", ".partial"))]
        if not found:
            raise UserError(f"{uri}: no *.array_record files in '{place}'")
        names = [n for n in found if re.split(r"[-._]", n)[0] == split]
        if not names:
            splits = {re.split(r"[-._]", n)[0] for n in found}
            raise UserError(f"{uri}: no split '{split}'{nearest(split, splits)}")
        paths = [os.path.join(place, name) for name in names]
    else:
        pattern = place.replace("{split}", split)
        paths = sorted(p for p in glob(pattern) if not p.endswith((".npy", ".partial")))
        if not paths:
            raise UserError(f"{uri}: no file or folder '{pattern}'")
    return ArrayRecordSource(uri, split, modality, paths, sample_rate, label_names, key)


def decode_item(item: Item, name: str, modality: str, sample_rate: int, key: str | None) -> Item:
    """A record of ArrayRecord or TFDS -> an item, as the top of this file describes it."""
    fields = FIELDS[modality] if key is None else (key,)
    field = next((f for f in fields if f in item), None)
    if field is None:
        wanted = " or ".join(f"'{f}'" for f in fields)
        raise UserError(f"{name}: no {wanted} (option key){nearest(fields[-1], item)}")
    value = item.pop(field)
    item = {n: v.decode("utf-8", "replace") if isinstance(v, bytes) else v for n, v in item.items()}
    if modality == "text":
        return {"text": value.decode() if isinstance(value, bytes) else str(value), **item}
    if modality == "vision":
        if isinstance(value, bytes):
            return {"image": decode_image(io.BytesIO(value), name), **item}
        return {"image": to_rgb(np.asarray(value), name), **item}
    check_rate(int(item.pop("sample_rate", sample_rate)), name, sample_rate)
    if isinstance(value, bytes):
        audio = decode_audio(io.BytesIO(value), name, sample_rate)
    else:
        audio = scale_audio(np.asarray(value), name)
    return {"audio": audio, "sample_rate": sample_rate, **item}


# TFDS: data sets prepared as ArrayRecord. TensorFlow is not needed, and never imported here.


class TfdsSource(Source):
    """A split of a prepared TFDS data set. Raw audio carries no rate: `sample_rate` is believed."""

    def __init__(
        self,
        uri: str,
        split: str,
        modality: str,
        data: Any,
        sample_rate: int = 16_000,
        label_names: Sequence[str] | None = None,
        key: str | None = None,
    ):
        super().__init__(uri, split, modality, label_names)
        self._data, self._sample_rate, self._key = data, sample_rate, key

    def __len__(self) -> int:
        return len(self._data)

    def _load(self, i: int) -> Item:
        name = f"{self.uri} {self.split}[{i}]"
        try:
            item = dict(self._data[i])
        except Exception as error:  # whatever TFDS's decoders stumble over
            raise unreadable(name, "example", error) from error
        item = {
            n: v.item() if np.ndim(v) == 0 and hasattr(v, "item") else v for n, v in item.items()
        }
        return decode_item(item, name, self.modality, self._sample_rate, self._key)


def open_tfds(
    uri: str,
    place: str,
    split: str,
    modality: str,
    *,
    sample_rate: int,
    label_names: Sequence[str] | None,
    key: str | None,
    data_dir: str | None,
) -> TfdsSource:
    """`tfds:NAME` below `data_dir`, or `tfds:DIR`."""
    import tensorflow_datasets as tfds

    if os.path.isabs(place) or place.startswith("."):
        folder = Path(place)
    else:
        default = os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")
        parent = Path(data_dir or default).expanduser()
        folder = parent / place.replace(":", "/")
        if not folder.is_dir():
            prepared = subfolders(parent) if parent.is_dir() else []
            hint = nearest(place, prepared) if prepared else ""
            raise UserError(
                f"{uri}: no data set '{place}' is prepared in '{parent}', and none is fetched{hint}"
            )
    builder = tfds.builder_from_directory(prepared_folder(folder, uri))
    try:
        data = builder.as_data_source(split)
    except RuntimeError as error:  # not implemented for this format
        form = builder.info.file_format
        raise UserError(
            f"{uri}: is stored as {form and form.value}, which has no random access; "
            "prepare it with file_format='array_record'"
        ) from error
    except (ValueError, KeyError) as error:
        raise UserError(
            f"{uri}: no split '{split}'{nearest(split, builder.info.splits)}"
        ) from error
    if label_names is None:
        features = builder.info.features
        label_names = getattr(features["label"], "names", None) if "label" in features else None
    return TfdsSource(uri, split, modality, data, sample_rate, label_names, key)


def prepared_folder(folder: Path, uri: str) -> Path:
    """The folder with dataset_info.json in or below `folder`: the only config, newest version."""
    if not folder.is_dir():
        raise UserError(f"{uri}: no folder '{folder}'")
    if (folder / "dataset_info.json").is_file():
        return folder
    versions = [path.parent for path in folder.glob("*/dataset_info.json")]
    if versions:
        return max(versions, key=lambda path: [int(n) for n in re.findall(r"\d+", path.name)])
    configs = sorted({path.parent.parent for path in folder.glob("*/*/dataset_info.json")})
    if len(configs) > 1:
        names = ", ".join(path.name for path in configs)
        raise UserError(f"{uri}: '{folder}' has several configs, name one of {names}")
    if not configs:
        raise UserError(f"{uri}: no prepared data set (dataset_info.json) in '{folder}'")
    return prepared_folder(configs[0], uri)


def open_published(
    uri: str,
    place: str,
    split: str,
    modality: str,
    *,
    sample_rate: int,
    label_names: Sequence[str] | None,
) -> Source:
    """Data sets as their authors ship them; see `data.published`."""
    from data2vec_jax.data import published  # it is made of this module's parts

    return published.open_published(
        uri, place, split, modality, sample_rate=sample_rate, label_names=label_names
    )


OPENERS: dict[str, tuple[Callable[..., Source], tuple[str, ...]]] = {
    "samples": (open_samples, ()),
    "folder": (open_folder, ()),
    "manifest": (open_manifest, ("key", "columns")),
    "array_record": (open_array_record, ("key",)),
    "tfds": (open_tfds, ("key", "data_dir")),
    **dict.fromkeys(("librispeech", "imagenet", "glue", "squad", "ag_news"), (open_published, ())),
}
