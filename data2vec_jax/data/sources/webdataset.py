"""`webdataset:TARS`: samples of uncompressed tars, read from their places in them.

A sample is the files of one folder and stem in a tar (`a/7.flac`, `a/7.txt`, `a/7.json`): the
signal, by the codec's suffixes; `.cls`, its label, a class or a number; `.txt`, its transcript (or
the signal, if it is text); `.json`, an object of further fields, which those files outdo.
"""

import copy
import json
import os
import posixpath
import re
import tarfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from data2vec_jax.core.errors import ExampleError, UserError
from data2vec_jax.data import places
from data2vec_jax.data.codecs.base import Codec, unreadable
from data2vec_jax.data.copies import local_copies
from data2vec_jax.data.sources.base import Address
from data2vec_jax.data.sources.folder import notes_of
from data2vec_jax.data.sources.labels import UNKNOWN, index_labels
from data2vec_jax.data.sources.stored import FilePart, Stored
from data2vec_jax.data.sources.table import TableSource

TEXTS = ".json", ".txt", ".cls"  # the later outdo the earlier
MOST_TEXT = 2**20  # bytes of one
MOST_TARS = 1_000_000  # that a pattern may name
BLOCK = 512  # bytes, of which a tar is made
COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd", b"\x04\x22\x4d\x18")

Files = dict[str, list[tuple[str, FilePart]]]  # of a sample: suffix -> names and places


class TarSource(TableSource):
    """Rows whose files lie in tars, of which there may be copies."""

    def digest(self) -> str:
        """Of all columns, and of the places in the tars, wherever those are."""
        made = copy.copy(self)
        made._parts = [part._replace(path="") for part in self._parts]
        return TableSource.digest(made)


def open_webdataset(address: Address) -> TarSource:
    """The samples of all tars, in the order of the tars' names and of their files in them.

    A sample without a signal, with two, or with a damaged text is bad. Raises UserError: a tar is
    compressed or damaged, ...
    """
    uri, codec = address.uri, address.codec
    tars = tars_of(address.place.replace("{split}", address.split), uri)
    grouped: dict[str, Files] = {}
    others: dict[str, tuple[int, str]] = {}
    with ThreadPoolExecutor(16) as pool:
        for tar, members in zip(tars, pool.map(members_of, tars, local_copies(tars)), strict=True):
            for name, part in members:
                stem, dot, suffix = posixpath.basename(name).partition(".")
                kind, path = (dot + suffix).lower(), f"{tar}/{name}"
                if stem and kind in (*codec.suffixes, *TEXTS):
                    files = grouped.setdefault(path.removesuffix(dot + suffix), {})
                    files.setdefault(kind, []).append((path, part))
                else:
                    count, first = others.get(kind, (0, path))
                    others[kind] = count + 1, first
        samples = list(pool.map(lambda pair: sample_of(*pair, codec), grouped.items()))
    bad = {i: s.signal for i, s in enumerate(samples) if isinstance(s.signal, ExampleError)}
    if len(bad) == len(samples):
        first = f", such as {bad[0]}" if bad else ""
        raise UserError(f"{uri}: none of {len(samples):,} samples can be used{first}")
    names = sorted({name for one in samples for name in one.fields})
    columns = {name: [one.fields.get(name) for one in samples] for name in names}
    root = os.path.dirname(tars[0])
    root = root if all(os.path.dirname(tar) == root for tar in tars) else ""
    columns["path"] = [one.where[len(root) + 1 if root else 0 :] for one in samples]
    label_names = address.label_names
    if "label" in columns:

        def unknown(i: int, text: str) -> None:
            bad.setdefault(i, ExampleError(samples[i].where, UNKNOWN, text))

        columns["label"], label_names = index_labels(
            columns["label"], label_names, uri, unknown=unknown if address.tolerant else None
        )
    parts = [FilePart("") if i in bad else one.signal for i, one in enumerate(samples)]
    options = {"root": root, "parts": parts, "label_names": label_names, "bad": bad}
    source = TarSource(uri, address.split, codec, columns, **options)
    source.notes = notes_of(f"{uri} {address.split}", root or "/", others, ())
    return source


def tars_of(pattern: str, uri: str) -> list[str]:
    """The tars that a place, a glob or `x-{000..099}.tar` names, sorted. Raises UserError: none."""
    if places.is_folder(pattern):
        raise UserError(f"{uri}: is a folder; did you mean 'webdataset:{pattern}/*.tar'?")
    found = set()
    for place in braces(pattern, uri):
        found |= set(places.glob(place)) if re.search(r"[*?\[]", place) else {place}
    missing = [one for one in sorted(found) if not (places.is_remote(one) or places.is_file(one))]
    if missing or not found:  # remote ones are missed when they are copied
        raise UserError(f"{uri}: no file '{missing[0] if missing else pattern}'")
    return sorted(found)


def braces(pattern: str, uri: str) -> list[str]:
    """`{a,b}` and `{08..11}` written out, as a shell does. Raises UserError: of too many."""
    group = re.search(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}", pattern)
    if not group:
        return [pattern]
    first, last, words = group.groups()
    parts = range(int(first), int(last) + 1) if first else words.split(",")
    rest = braces(pattern[group.end() :], uri)
    if (int(last) - int(first) if first else len(parts)) * len(rest) > MOST_TARS:
        raise UserError(f"{uri}: names more than {MOST_TARS:,} tars")
    width = len(first or "")
    return [f"{pattern[: group.start()]}{part:0>{width}}{end}" for part in parts for end in rest]


def members_of(tar: str, path: str) -> list[tuple[str, FilePart]]:
    """(name, place) of each file of a tar that is, or has a copy, at `path`.

    Raises UserError: it is compressed, no tar, or ends before its end.
    """
    found = []
    try:
        with open(path, "rb") as file:
            if file.read(8).startswith(COMPRESSED):
                raise UserError(f"{tar}: is compressed, so nothing in it can be found; unpack it")
            size = file.seek(0, os.SEEK_END)
            file.seek(0)
            members = tarfile.TarFile(fileobj=file)
            while (one := members.next()) is not None:
                if one.size < 0 or one.offset_data + one.size > size:
                    raise UserError(f"{tar}: damaged, '{one.name}' is said to end beyond it")
                if one.isreg() and not one.issparse():
                    found.append((one.name, FilePart(path, one.offset_data, one.size)))
                members.members.clear()  # which it keeps
            file.seek(members.offset)
            if file.read(BLOCK) != bytes(BLOCK):
                raise UserError(f"{tar}: damaged, has no end after {members.offset:,} bytes")
    except (tarfile.TarError, OSError, ValueError, OverflowError) as error:
        raise unreadable(tar, "tar", error) from error
    return found


def sample_of(stem: str, files: Files, codec: Codec) -> Stored:
    """A sample with its fields, or with what is wrong with it as its signal."""
    signals = [pair for suffix in codec.suffixes for pair in files.get(suffix, ())]
    where, signal = signals[0] if signals else (stem, None)
    kinds = [kind for kind in TEXTS if kind in files and kind not in codec.suffixes]
    try:
        if signal is None:
            raise ExampleError(where, "missing", f"has no {' or '.join(codec.suffixes)}")
        if len(signals) > 1 or any(len(files[kind]) > 1 for kind in kinds):
            names = ", ".join(posixpath.basename(name) for own in files.values() for name, _ in own)
            raise ExampleError(where, "several", f"is not one file of each kind ({names:.200})")
        fields: dict[str, Any] = {}
        for kind in kinds:
            fields |= fields_of(kind, files[kind][0][1], where, {"path", codec.field, codec.units})
    except ExampleError as error:
        return Stored(where, {}, error)
    return Stored(where, fields, signal)


def fields_of(kind: str, part: FilePart, where: str, reserved: set[str]) -> Mapping[str, Any]:
    """What a .cls, .txt or .json says. Raises ExampleError: it is damaged, or too large."""
    if part.size > MOST_TEXT:
        raise ExampleError(where, "too large", f"its {kind} has {part.size:,} bytes")
    try:
        text = part.read(where).decode("utf-8-sig").strip()
        if kind != ".json":
            return {"label" if kind == ".cls" else "transcript": text}
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ExampleError(where, "format", f"its {kind} is damaged ({error!s:.100})") from None
    if not isinstance(found, dict):
        raise ExampleError(where, "format", "its .json is not an object")
    return {name: value for name, value in found.items() if name not in reserved}
