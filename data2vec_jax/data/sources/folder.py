"""`folder:DIR`: all files of a kind below a folder."""

import os
from pathlib import Path

from data2vec_jax.core.errors import UserError, nearest
from data2vec_jax.data.sources.base import Address
from data2vec_jax.data.sources.labels import index_labels
from data2vec_jax.data.sources.table import TableSource

SPLIT_FOLDERS = ("train", "val", "valid", "validation", "dev", "test")


def open_folder(address: Address) -> TableSource:
    """`folder:DIR`. Classes are the subfolders, if all files are in subfolders."""
    uri, split, codec = address.uri, address.split, address.codec
    top = Path(address.place)
    if not top.is_dir():
        hint = f"; it is a file: did you mean 'manifest:{address.place}'?" if top.is_file() else ""
        raise UserError(f"{uri}: no folder '{address.place}'{hint}")
    splits = [name for name in subfolders(top) if name in (*SPLIT_FOLDERS, split)]
    if splits and split not in splits:
        raise UserError(f"{uri}: no split '{split}' in '{address.place}'{nearest(split, splits)}")
    folder = top / split if splits else top

    paths = []
    for parent, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found = [n for n in files if n.lower().endswith(codec.suffixes) and n[0] != "."]
        paths += [os.path.relpath(os.path.join(parent, name), folder) for name in found]
    if not paths:
        suffixes = ", ".join(codec.suffixes)
        raise UserError(f"{uri}: no {codec.field} files ({suffixes}) in '{folder}'")
    paths.sort()
    columns: dict[str, list] = {"path": paths}
    label_names = None
    if all(os.sep in path for path in paths):
        label_names = address.label_names
        if label_names is None:  # the same order in every split, though one may lack a class
            tops = [top / name for name in splits] or [top]
            label_names = sorted({name for folder in tops for name in subfolders(folder)})
        classes = [path.split(os.sep, 1)[0] for path in paths]
        columns["label"], label_names = index_labels(classes, label_names, uri)
    return TableSource(uri, split, codec, columns, root=str(folder), label_names=label_names)


def subfolders(folder: Path) -> list[str]:
    """Names of the folders in `folder` that are not hidden, sorted."""
    with os.scandir(folder) as entries:
        return sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))
