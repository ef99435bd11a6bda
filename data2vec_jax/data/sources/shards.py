"""The manifest of a folder of shards: `manifest.json`, which `prepare` writes last.

Its `shards` are {file, split, examples, bytes, mark, sha256} and, where they have such files beside
them, {length, lengths}, the sum of lengths and the mark of `FILE.lengths.npy`, and {columns}, the
mark of `FILE.columns.json`. A mark is compared whenever the folder is opened; sha256, of all bytes,
is for `sha256sum`.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data2vec_jax.core.errors import UserError, nearest
from data2vec_jax.core.files import whole
from data2vec_jax.data import places
from data2vec_jax.data.codecs.base import unreadable

MANIFEST, UNFINISHED = "manifest.json", "unfinished"
VERSION = 1
ENDS = 2**16  # bytes at the start and at the end of a file, of which its mark is
KEYS = {"file", "split", "examples", "bytes", "mark"}
BESIDE = {"lengths": ".lengths.npy", "columns": ".columns.json"}  # ends of the files beside a shard
COLUMNS = "label", "labels", "transcript", "phones"  # which `Source.column` lists


def mark_of(place: str | os.PathLike) -> str:
    """A hash of a file's size and of its first and last `ENDS` bytes, 16 digits: quick for a shard
    of any size, and different for another shard."""
    place = os.fspath(place)
    size = (places.stat(place) or places.Info(0, "", False)).size
    found = hashlib.sha256(str(size).encode())
    end = min(size, ENDS)
    found.update(places.read(place, 0, end) + places.read(place, size - end, end))
    return found.hexdigest()[:16]


def read_manifest(folder: str) -> dict[str, Any] | None:
    """The manifest of a folder of shards; None if it has none.

    Raises UserError: it is damaged, of a later version, or the folder is not finished.
    """
    path = places.join(folder, MANIFEST)
    if not places.is_file(path):
        if places.is_folder(places.join(folder, UNFINISHED)):
            raise UserError(f"{folder}: is not finished; give the same `prepare` command again")
        return None
    manifest = places.read_json(path)
    if manifest.get("version") != VERSION:
        raise UserError(f"{path}: version {manifest.get('version')!r}; this reads {VERSION}")
    shards = manifest.get("shards")
    if not isinstance(shards, list) or not all(
        isinstance(shard, dict) and shard.keys() >= KEYS for shard in shards
    ):
        raise UserError(f"{path}: no list of shards with {', '.join(sorted(KEYS))}")
    return manifest


def shards_of_split(manifest: Mapping[str, Any], split: str, uri: str) -> list[dict[str, Any]]:
    """The entries of a split's shards (of `a+b`, joined), in order."""
    names = {shard["split"] for shard in manifest["shards"]}
    for name in split.split("+"):
        if name not in names:
            raise UserError(f"{uri}: no split '{name}'{nearest(name, names)}")
    return [s for name in split.split("+") for s in manifest["shards"] if s["split"] == name]


def check_shards(folder: str, shards: Sequence[Mapping[str, Any]]) -> None:
    """Raises UserError: a shard, or a file beside it, is not what the manifest means."""
    for shard in shards:
        beside = {end: shard[key] for key, end in BESIDE.items() if key in shard}
        for end, mark in {"": shard["mark"], **beside}.items():
            file = places.join(folder, f"{shard['file']}{end}")
            if not places.is_file(file):
                raise UserError(f"{file}: missing, but {MANIFEST} names it")
            if mark_of(file) != mark:
                raise UserError(f"{file}: another file than {MANIFEST} means, or damaged")


def write_columns(shard: Path, columns: Mapping[str, Sequence[Any]]) -> Path | None:
    """Writes the `COLUMNS` that have values beside a shard; the path, None if there are none."""
    path = shard.with_name(f"{shard.name}{BESIDE['columns']}")
    found = {n: values for n, values in columns.items() if any(v is not None for v in values)}
    if not found:
        path.unlink(missing_ok=True)
        return None
    with whole(path) as draft:
        draft.write_text(json.dumps(found), encoding="utf-8")
    return path


def read_column(shard: str, name: str, count: int) -> list[Any]:
    """A column of a shard; `count` times None if it has no such. Raises UserError: damaged."""
    path = Path(f"{shard}{BESIDE['columns']}")
    try:
        return json.loads(path.read_text(encoding="utf-8")).get(name, [None] * count)
    except FileNotFoundError:
        return [None] * count
    except (OSError, ValueError, AttributeError) as error:
        raise unreadable(str(path), "columns", error) from error
