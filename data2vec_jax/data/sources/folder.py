"""`folder:DIR`: all files of a kind below a folder, local or remote."""

import os
import re
from collections.abc import Iterator, Mapping, Sequence

from data2vec_jax.core.errors import ExampleError, UserError, nearest
from data2vec_jax.data import places
from data2vec_jax.data.sources.base import Address
from data2vec_jax.data.sources.labels import UNKNOWN, index_labels
from data2vec_jax.data.sources.table import TableSource

SPLIT_FOLDERS = ("train", "val", "valid", "validation", "dev", "test")
TOLD = 5  # kinds of files that are not read, and are named
NOT_DATA = ("/proc", "/sys", "/dev")  # folders of a system that hold no files, or without end


def open_folder(address: Address, beside: Sequence[str] = ()) -> TableSource:
    """`folder:DIR`. Classes are the subfolders, if all files, or most, are in subfolders.

    beside: suffixes of files that the caller reads.
    """
    uri, split, codec = address.uri, address.split, address.codec
    top = address.place
    if not places.is_folder(top):
        hint = f"; it is a file: did you mean 'manifest:{top}'?" if places.is_file(top) else ""
        raise UserError(f"{uri}: no folder '{top}'{hint}")
    if is_no_data(top):
        raise UserError(f"{uri}: '{top}' is the system's, and holds no data")
    splits = split_folders(top, split)
    if splits and split not in splits:
        hint = nearest(split, splits.values())
        raise UserError(f"{uri}: no split '{split}' in '{top}'{hint}")
    folder = places.join(top, splits[split]) if splits else top
    if list(splits) == [split]:
        others = (name for name in subfolders(top) if name not in splits.values())
        classes = [n for n in others if next(walk(places.join(top, n), codec.suffixes), None)]
        if len(classes) > 1:  # a train may be a vehicle
            raise UserError(
                f"{uri}: is '{splits[split]}' a split, or a class like '{classes[0]}' and "
                f"'{classes[1]}'? Of a class, move all of them into a folder '{split}'; of a "
                "split, move the others elsewhere"
            )

    others: dict[str, tuple[int, str]] = {}
    found = walk(folder, codec.suffixes, others)
    paths = sorted(os.path.relpath(path, folder) for path in found)
    if not paths:
        suffixes = ", ".join(codec.suffixes)
        raise UserError(f"{uri}: no {codec.field} files ({suffixes}) in '{folder}'")
    bad = {}
    for i, path in enumerate(paths):
        if not path.isprintable() and not is_utf8(path):
            where = os.path.join(folder, path).encode(errors="backslashreplace").decode()
            bad[i] = ExampleError(where, "name", "its name is not UTF-8")
    columns: dict[str, list] = {"path": paths}
    label_names = None
    inside = [path for path in paths if os.sep in path]
    if 2 * len(inside) > len(paths):  # the few others have no label
        label_names = address.label_names
        if label_names is None:  # the same order in every split, though one may lack a class
            label_names = sorted({path.split(os.sep, 1)[0] for path in inside})
            for other in (places.join(top, name) for name in splits.values()):
                more = set(subfolders(other)) - set(label_names)
                label_names += [
                    n for n in more if next(walk(places.join(other, n), codec.suffixes), None)
                ]
            label_names = sorted(label_names)
        classes = [path.split(os.sep, 1)[0] if os.sep in path else None for path in paths]

        def unknown(i: int, text: str) -> None:
            bad.setdefault(i, ExampleError(os.path.join(folder, paths[i]), UNKNOWN, text))

        columns["label"], label_names = index_labels(
            classes, label_names, uri, unknown=unknown if address.tolerant else None
        )
    source = TableSource(uri, split, codec, columns, root=folder, label_names=label_names, bad=bad)
    others = {kind: found for kind, found in others.items() if kind not in beside}
    no_splits = sorted(set(subfolders(top)) - set(splits.values())) if splits else []
    source.notes = notes_of(f"{uri} {split}", folder, others, no_splits)
    return source


def notes_of(
    name: str, folder: str, others: Mapping[str, tuple[int, str]], no_splits: Sequence[str]
) -> list[str]:
    """What lies in a folder and is not read, in a line; none if there is nothing.

    others: see `walk`. no_splits: folders beside those of the splits.
    """
    parts = [
        f"{kind} {count:,} ({os.path.relpath(first, folder)}{', ...' if count > 1 else ''})"
        for kind, (count, first) in sorted(others.items(), key=lambda pair: -pair[1][0])
    ]
    parts += [f"the folder {other}, which is no split" for other in no_splits]
    more = f", and {len(parts) - TOLD} more kinds" if len(parts) > TOLD else ""
    return [f"{name}: not read: {', '.join(parts[:TOLD])}{more}"] if parts else []


def split_folders(top: str, split: str) -> dict[str, str]:
    """Split -> its subfolder; none if the folder has no splits.

    Subfolders of other spellings (Train, testing, Custom_train) are splits where all are, or where
    there are several. Raises UserError: two of them are the same split.
    """
    names = subfolders(top)
    exact = {name: name for name in names if name in (*SPLIT_FOLDERS, split)}
    if exact:
        return exact
    spelled: dict[str, list[str]] = {}
    for name in names:
        words = {{"training": "train", "testing": "test"}.get(w, w) for w in words_of(name)}
        for word in words & set(SPLIT_FOLDERS):
            spelled.setdefault(word, []).append(name)
    if len(spelled) < 2 and sum(map(len, spelled.values())) < len(names):
        return {}
    for word, several in spelled.items():
        if len(several) > 1:
            raise UserError(f"'{top}': {' and '.join(several)} could both be the split '{word}'")
    return {word: name for word, (name,) in spelled.items()}


def words_of(name: str) -> list[str]:
    """The words of a name, in lower case."""
    return re.findall(r"[a-z]+", name.lower())


def walk(
    folder: str, suffixes: Sequence[str], others: dict[str, tuple[int, str]] | None = None
) -> Iterator[str]:
    """Files below a folder that end in one of `suffixes`; hidden ones are left out.

    Links to folders are followed, but no folder is read twice, so none is that holds the link. A
    folder that ends so, too, and holds no file of the kind, stands for one that was to be there.
    others: is filled with what is passed over: its kind -> how many, and the first.
    """
    seen, links = set(), [folder]

    def passed(kind: str, path: str) -> None:
        if others is not None:
            count, first = others.get(kind, (0, path))
            others[kind] = count + 1, first

    while links:
        for parent, folders, files in places.walk(links.pop(0)):
            if is_no_data(parent) or not first_visit(parent, seen):
                passed("links to folders that are read already, or hold no data", parent)
                folders.clear()
                continue
            found = [name for name in sorted(folders) if name[0] != "."]
            linked = {name for name in found if os.path.islink(os.path.join(parent, name))}
            links += [os.path.join(parent, name) for name in sorted(linked)]
            folders[:] = [name for name in found if name not in linked]
            for name in (*files, *found):
                path = os.path.join(parent, name)
                if not name.lower().endswith(tuple(suffixes)) or name[0] == ".":
                    if name[0] != "." and name not in found:
                        passed(os.path.splitext(name)[1].lower() or "no suffix", path)
                    continue
                if name not in found or next(walk(path, suffixes), None) is None:
                    yield path


def first_visit(folder: str, seen: set[tuple[int, int]]) -> bool:
    """Notes a folder in `seen`; whether it was not there, under whatever name."""
    if places.is_remote(folder):  # stores have no links
        return True
    try:
        status = os.stat(folder)
    except OSError:
        return False
    key = status.st_dev, status.st_ino
    if key in seen:
        return False
    seen.add(key)
    return True


def is_no_data(folder: str) -> bool:
    """Whether a folder is one of `NOT_DATA`, or in it."""
    real = os.path.realpath(folder)
    return any(real == name or real.startswith(name + os.sep) for name in NOT_DATA)


def is_utf8(name: str) -> bool:
    """Whether a file's name is text."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def subfolders(folder: str | os.PathLike) -> list[str]:
    """Names of the folders in `folder` that are not hidden, sorted."""
    if places.is_remote(folder := os.fspath(folder)):
        found = [name for name, info in places.listing(folder).items() if info.is_folder]
    else:
        with os.scandir(folder) as entries:
            found = [entry.name for entry in entries if is_folder(entry)]
    return sorted(name for name in found if not name.startswith("."))


def is_folder(entry: os.DirEntry) -> bool:
    """Whether an entry is a folder, or a link to one; a link to itself is none."""
    try:
        return entry.is_dir()
    except OSError:
        return False
