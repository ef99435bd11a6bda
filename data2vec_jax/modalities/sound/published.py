"""Published data sets of sounds, in the folders and files that their authors ship, and scores.

| address               | DIR holds                                     | splits                  |
| --------------------- | --------------------------------------------- | ----------------------- |
| `audioset:DIR`        | class_labels_indices.csv, *_segments.csv and  | balanced_train,         |
|                       | clips                                         | unbalanced_train, eval  |
| `esc50:DIR`           | meta/esc50.csv, audio/*.wav                   | fold1, ..., fold5       |
| `speech_commands:DIR` | version 2: a folder of each word, *_list.txt  | train, validation, test |

`a+b` joins splits. Items hold what `data.sources` says; those of AudioSet have labels, a list of
classes, in place of label. All audio must have 16 kHz: ESC-50 is published at 44.1 kHz, convert it
first.
"""

import csv
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data2vec_jax.core.errors import UserError, nearest
from data2vec_jax.data.codecs.text import read_lines
from data2vec_jax.data.sources import Address, TableSource, published, rows_of_split, subfolders

# Scores of EAT by width of the model, in per cent (docs/spec/sound.md section 7): Base after 10
# epochs of pretraining, Large after 20.
SCORES = {
    768: {"AS-20K": 40.2, "AS-2M": 48.6, "ESC-50": 95.9, "SPC-2": 98.3},
    1024: {"AS-20K": 42.0, "AS-2M": 49.5},
}


def read_csv(path: Path, uri: str) -> list[list[str]]:
    """Rows of a CSV file without its lines that start with '#'. Raises UserError: no such file."""
    lines = [line for line in read_lines(path, uri) if line.strip() and line[0] != "#"]
    return list(csv.reader(lines, skipinitialspace=True))


@published
def open_audioset(address: Address) -> TableSource:
    """`{SPLIT}_segments.csv` and the clips that are there, in a folder named like the split.

    The folder: `{SPLIT}_segments` or SPLIT, in DIR or DIR/audio. A clip is called ID, with 'Y' in
    front of it or not, and with its first second behind it or not: `YID.wav`, `ID_30.000.flac`.
    Videos vanish, so those that are missing are counted in a warning.
    """
    uri, place, suffixes = address.uri, Path(address.place), address.codec.suffixes
    classes = read_csv(place / "class_labels_indices.csv", uri)[1:]  # index, mid, display_name
    number = {row[1]: int(row[0]) for row in classes}
    splits = sorted(path.name[: -len("_segments.csv")] for path in place.glob("*_segments.csv"))
    columns: dict[str, list] = {"path": [], "labels": [], "id": []}
    for split in address.split.split("+"):
        table = place / f"{split}_segments.csv"
        if split not in splits:
            raise UserError(f"{uri}: no file '{table}'{nearest(split, splits)}")
        tops = [
            place / top / name for top in ("", "audio") for name in (f"{split}_segments", split)
        ]
        folder = next((top for top in tops if top.is_dir()), None)
        if folder is None:
            raise UserError(f"{uri}: no folder '{split}_segments' with the clips in '{place}'")
        clips = {
            name.rpartition(".")[0]: os.path.join(os.path.relpath(parent, place), name)
            for parent, _, names in os.walk(folder, followlinks=True)
            for name in names
            if name.lower().endswith(suffixes)
        }
        rows, missing = read_csv(table, uri), 0
        for clip, start, _, mids in rows:
            path = clip_path(clips, clip, start)
            if path is None:
                missing += 1
                continue
            unknown = [mid for mid in mids.split(",") if mid not in number]
            if unknown:
                raise UserError(f"{table}: {clip} has the unknown class '{unknown[0]}'")
            columns["path"].append(path)
            columns["labels"].append([number[mid] for mid in mids.split(",")])
            columns["id"].append(clip)
        if missing == len(rows):
            raise UserError(f"{uri}: none of the {missing} clips of {split} is in '{folder}'")
        if missing:
            warnings.warn(
                f"{uri}: {missing} of the {len(rows)} clips of {split} are missing", stacklevel=2
            )
    names = [row[2] for row in sorted(classes, key=lambda row: int(row[0]))]
    codec = address.codec
    return TableSource(uri, address.split, codec, columns, root=str(place), label_names=names)


def clip_path(clips: Mapping[str, str], clip: str, start: str) -> str | None:
    """The file of a clip of AudioSet under one of the names that downloaders give it."""
    second = float(start)
    starts = (f"{second:.3f}", f"{second:g}", f"{second * 1000:.0f}")
    stems = [clip, *(f"{clip}_{begin}" for begin in starts)]
    return next((clips[name] for s in stems for name in (s, f"Y{s}") if name in clips), None)


@published
def open_esc50(address: Address) -> TableSource:
    """`meta/esc50.csv` and `audio/`; the splits are the corpus's folds."""
    uri, place = address.uri, Path(address.place)
    table = place / "meta" / "esc50.csv"
    header, *rows = read_csv(table, uri)
    found = [dict(zip(header, row, strict=True)) for row in rows]
    for name in ("filename", "fold", "target", "category"):
        if name not in header:
            raise UserError(f"{table}: no column '{name}'{nearest(name, header)}")
    chosen = [
        found[i] for i in rows_of_split([f"fold{r['fold']}" for r in found], address.split, uri)
    ]
    for row in chosen:
        if not (place / "audio" / row["filename"]).is_file():
            raise UserError(f"{table}: no file '{place / 'audio' / row['filename']}'")
    names = dict(sorted((int(row["target"]), row["category"]) for row in found))
    if list(names) != list(range(len(names))):
        raise UserError(f"{table}: the classes are not numbered from 0")
    columns = {
        "path": [f"audio/{row['filename']}" for row in chosen],
        "label": [int(row["target"]) for row in chosen],
        "fold": [int(row["fold"]) for row in chosen],
    }
    codec = address.codec
    return TableSource(
        uri, address.split, codec, columns, root=str(place), label_names=list(names.values())
    )


@published
def open_speech_commands(address: Address) -> TableSource:
    """A folder of each word, without `_background_noise_`; training clips are in neither list."""
    uri, place = address.uri, Path(address.place)
    if not place.is_dir():
        raise UserError(f"{uri}: no folder '{place}'")
    lists = {"validation": "validation_list.txt", "test": "testing_list.txt"}
    held_out = {
        line.strip(): split
        for split, name in lists.items()
        for line in read_lines(place / name, uri)
        if line.strip()
    }
    words = [name for name in subfolders(place) if name[0] != "_"]
    paths = [
        f"{word}/{name}"
        for word in words
        for name in sorted(os.listdir(place / word))
        if name.lower().endswith(address.codec.suffixes)
    ]
    lost = held_out.keys() - set(paths)
    if lost:
        raise UserError(f"{uri}: no file '{place / min(lost)}', which a list names")
    splits = [held_out.get(path, "train") for path in paths]
    chosen = [paths[i] for i in rows_of_split(splits, address.split, uri)]
    columns = {"path": chosen, "label": [words.index(path.split("/")[0]) for path in chosen]}
    codec = address.codec
    return TableSource(uri, address.split, codec, columns, root=str(place), label_names=words)


def published_scores(config: Mapping[str, Any], split: str, metric: str) -> float | None:
    """The paper's score of a fine-tuning config's task in per cent, None if it has none."""
    data, scores = config["data"], SCORES.get(config["model"]["width"], {})
    kind = data["source"].partition(":")[0]
    if (kind, split, metric) == ("audioset", "eval", "mean_average_precision"):
        sets = {"balanced_train": "AS-20K", "balanced_train+unbalanced_train": "AS-2M"}
        return scores.get(sets.get(data["split"], ""))
    if metric == "accuracy" and kind == "esc50":
        return scores.get("ESC-50")
    if (kind, split, metric) == ("speech_commands", "test", "accuracy"):
        return scores.get("SPC-2")
    return None
