"""The manifest of a folder of shards: `manifest.json`, which `prepare` writes last.

Its `shards` are {file, split, examples, bytes, mark, sha256} and, of signals that are measured,
{length, lengths}: their sum, and the mark of the file that holds them. A mark is compared whenever
the folder is opened; sha256, of all bytes, is for `sha256sum`.
"""

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data2vec_jax.core.errors import UserError, nearest
from data2vec_jax.core.files import read_json

MANIFEST, UNFINISHED = "manifest.json", "unfinished"
VERSION = 1
ENDS = 2**16  # bytes at the start and at the end of a file, of which its mark is
KEYS = {"file", "split", "examples", "bytes", "mark"}


def mark_of(path: str | os.PathLike) -> str:
    """A hash of a file's size and of its first and last `ENDS` bytes, 16 digits: quick for a shard
    of any size, and different for another shard."""
    size = os.path.getsize(path)
    found = hashlib.sha256(str(size).encode())
    with open(path, "rb") as file:
        found.update(file.read(ENDS))
        file.seek(max(size - ENDS, 0))
        found.update(file.read(ENDS))
    return found.hexdigest()[:16]


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a folder of shards; None if it has none.

    Raises UserError: it is damaged, of a later version, or the folder is not finished.
    """
    path = folder / MANIFEST
    if not path.exists():
        if (folder / UNFINISHED).exists():
            raise UserError(f"{folder}: is not finished; give the same `prepare` command again")
        return None
    manifest = read_json(path)
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


def check_shards(folder: Path, shards: Sequence[Mapping[str, Any]]) -> None:
    """Raises UserError: a shard, or the file of its lengths, is not what the manifest means."""
    for shard in shards:
        path = folder / shard["file"]
        marks = {path: shard["mark"]}
        if "lengths" in shard:
            marks[path.with_name(f"{path.name}.lengths.npy")] = shard["lengths"]
        for file, mark in marks.items():
            if not file.is_file():
                raise UserError(f"{file}: missing, but {MANIFEST} names it")
            if mark_of(file) != mark:
                raise UserError(f"{file}: another file than {MANIFEST} means, or damaged")
