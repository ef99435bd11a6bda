"""Places of files: paths of this machine, and remote ones by fsspec (`gs://bucket/x`, `s3://...`).

Sources and `prepare` ask, list, read and write through these functions, wherever a place is. fsspec
and the package of a store are imported for a place with `://` only; how a store is reached (keys,
endpoint, ...) is configured as those packages document it. What takes a file on this machine gets a
copy of a remote one, see `data.copies`.
"""

import contextlib
import fnmatch
import glob as local_glob
import os
import posixpath
import shutil
import stat as modes
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from data2vec_jax.core import files
from data2vec_jax.core.errors import ExampleError, UserError, nearest
from data2vec_jax.data.codecs.base import unreadable

WAITS = (0.5, 2.0, 5.0)  # seconds before a request that failed is made again
# What no second request mends; whatever else a store raises may be over in a moment.
LASTING = (FileNotFoundError, NotADirectoryError, PermissionError, IsADirectoryError, ImportError)
LASTING += (ValueError, TypeError, NotImplementedError)
# What stores call the version of a file, the surest first.
VERSIONS = ("ETag", "etag", "md5Hash", "generation", "LastModified", "Last-Modified")
VERSIONS += ("mtime", "created")


class Info(NamedTuple):
    """What is known of a place. size: bytes. version: changes with the content, '' if a store has
    nothing of the kind."""

    size: int
    version: str
    is_folder: bool


def is_remote(place: str) -> bool:
    """Whether a place is a URL, not a path of this machine."""
    return "://" in place


def join(folder: str, name: str) -> str:
    """The place `name` in `folder`, unless it is absolute or remote itself."""
    if is_remote(name) or not is_remote(folder) or os.path.isabs(name):
        return name if is_remote(name) else os.path.join(folder, name)
    protocol, _, path = folder.partition("://")
    return f"{protocol}://{posixpath.normpath(posixpath.join(path, name))}"  # stores know no `..`


def store_of(place: str) -> tuple[Any, str]:
    """fsspec's file system of a remote place, and its path there. Raises UserError: the package is
    missing, or there is none for such places."""
    try:
        import fsspec
        from fsspec.registry import known_implementations as known
    except ImportError:
        raise UserError(f"{place}: remote places need a package: pip install fsspec") from None
    protocol = place.partition("://")[0]
    if protocol not in {*known, *fsspec.registry}:
        raise UserError(f"{place}: no store is called '{protocol}'{nearest(protocol, known)}")
    try:
        return fsspec.core.url_to_fs(place)
    except ImportError:
        package = known[protocol]["class"].partition(".")[0]
        raise UserError(f"{place}: needs a package: pip install {package}") from None
    except Exception as error:  # settings of the store, which are the user's
        raise failure(place, error) from error


def asked(place: str, request: Callable[[Any, str], Any], name: str = "") -> Any:
    """`request(file system, path)` of a remote place, again after a while if that may help.

    name: what messages call it. Raises ExampleError: not there, no rights, no answer, ...
    """
    store, path = store_of(place)
    for wait in (*WAITS, None):
        try:
            return request(store, path)
        except Exception as error:  # each store has exceptions of its own
            if wait is None or isinstance(error, LASTING):
                raise failure(name or place, error) from error
            time.sleep(wait)


def failure(name: str, error: Exception) -> ExampleError:
    """The one line for what a store raised."""
    if isinstance(error, FileNotFoundError):
        return ExampleError(name, "missing", "no such file, or no such bucket")
    if isinstance(error, PermissionError):
        return ExampleError(name, "no rights", "the store permits no access; are its keys set?")
    text = " ".join(str(error).split()) or type(error).__name__
    return ExampleError(name, "unreachable", f"the store gives no answer ({text:.200})")


def check_file(path: str) -> None:
    """Raises ExampleError unless there is an ordinary file: others may never end, or not answer."""
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise ExampleError(path, "missing", "no such file") from None
    except (OSError, ValueError) as error:  # a link to itself; a name with a NUL
        raise unreadable(path, "file", error) from None
    if not modes.S_ISREG(mode):
        kinds = {
            modes.S_IFIFO: "a pipe",
            modes.S_IFDIR: "a folder",
            modes.S_IFSOCK: "a socket",
            modes.S_IFCHR: "a device",
            modes.S_IFBLK: "a device",
        }
        raise ExampleError(path, "not a file", f"is {kinds.get(modes.S_IFMT(mode), 'no file')}")


def stat(place: str, fresh: bool = False) -> Info | None:
    """What is at a place; None if nothing is. fresh: not as an earlier listing has it."""
    if not is_remote(place):
        try:
            found = os.stat(place)
        except (OSError, ValueError):
            return None
        return Info(found.st_size, str(found.st_mtime_ns), modes.S_ISDIR(found.st_mode))

    def request(store: Any, path: str) -> Info | None:
        if fresh:
            store.invalidate_cache(path)
        try:
            return info_of(store.info(path))
        except FileNotFoundError:
            return None

    return asked(place, request)


def info_of(entry: dict[str, Any]) -> Info:
    """fsspec's description of a file or folder, as ours."""
    version = next((str(entry[name]) for name in VERSIONS if entry.get(name)), "")
    return Info(int(entry.get("size") or 0), version, entry.get("type") == "directory")


def is_file(place: str) -> bool:
    """Whether there is an ordinary file."""
    if not is_remote(place):
        return os.path.isfile(place)
    found = stat(place)
    return found is not None and not found.is_folder


def is_folder(place: str) -> bool:
    """Whether there is a folder; in a bucket, whether there are names that begin with it."""
    found = stat(place)
    return found is not None and found.is_folder


def listing(folder: str) -> dict[str, Info]:
    """Name -> what is known of it, of all in a remote folder, as it is now; {} if there is none."""

    def request(store: Any, path: str) -> dict[str, Info]:
        store.invalidate_cache(path)
        try:
            entries = store.ls(path, detail=True)
        except (FileNotFoundError, NotADirectoryError):
            return {}
        found = {posixpath.basename(e["name"].rstrip("/")): info_of(e) for e in entries}
        found.pop("", None)  # a bucket may hold a name for the folder itself
        return found

    return asked(folder, request)


def names_in(folder: str) -> set[str]:
    """All names in a folder; none if it is not there."""
    if is_remote(folder):
        return set(listing(folder))
    try:
        return set(os.listdir(folder or "."))
    except (OSError, ValueError):  # it is not there, or has a NUL in its name
        return set()


def walk(top: str) -> Iterator[tuple[str, list[str], list[str]]]:
    """As `os.walk`: folders that the caller takes out of a list are passed over."""
    if not is_remote(top):
        yield from os.walk(top)
        return
    there = listing(top)
    folders = sorted(name for name, info in there.items() if info.is_folder)
    yield top, folders, sorted(there.keys() - {*folders})
    for name in folders:
        yield from walk(join(top, name))


def glob(pattern: str) -> list[str]:
    """The places that a pattern names, sorted; a remote one may be so only after the last `/`.
    A file of that very name comes first: 'part[1].tar' is also a pattern, which it does not fit."""
    if is_file(pattern):
        return [pattern]
    if not is_remote(pattern):
        return sorted(local_glob.glob(pattern))
    folder, name = posixpath.split(pattern)
    return [join(folder, found) for found in sorted(fnmatch.filter(names_in(folder), name))]


def read(place: str, start: int = 0, size: int = -1, name: str = "") -> bytes:
    """`size` bytes of a file from `start`, or all: of an example, or of a table.

    name: what messages call it. Raises ExampleError: no ordinary file, or it ends before.
    """
    name = name or place
    if size == 0:
        return b""  # which is no range to a store
    if is_remote(place):
        part = {} if size < 0 else {"start": start, "end": start + size}
        data = asked(place, lambda store, path: store.cat_file(path, **part), name)
    else:
        check_file(place)
        try:
            with open(place, "rb") as file:
                file.seek(start)
                data = file.read(size)
        except OSError as error:
            raise unreadable(name, "file", error) from error
    if size >= 0 and len(data) < size:
        text = f"'{place}' ends after {len(data):,} of its {size:,} bytes"
        raise ExampleError(name, "damaged", text)
    return data


def read_json(place: str) -> Any:
    """As `core.files.read_json`, of any place."""
    if not is_remote(place):
        return files.read_json(Path(place))
    info = stat(place)
    size = min(info.size, files.JSON_BYTES + 1) if info else -1
    return files.parse_json(read(place, size=size), place)


@contextlib.contextmanager
def written(folder: str) -> Iterator[Path]:
    """A folder of this machine whose files are in `folder` at the end: `folder` itself, or, of a
    remote one, a temporary folder, which is sent there unless there was an error."""
    if not is_remote(folder):
        Path(folder).mkdir(parents=True, exist_ok=True)
        yield Path(folder)
        return
    with tempfile.TemporaryDirectory() as local:
        yield Path(local)
        for path in sorted(Path(local).iterdir()):
            place = join(folder, path.name)
            asked(place, lambda store, name, path=path: store.put_file(str(path), name))


def remove(place: str) -> None:
    """Removes a file, or a folder and what is in it; nothing if there is none."""
    info = stat(place, fresh=True)
    if is_remote(place) and info:
        asked(place, lambda store, path: store.rm(path, recursive=info.is_folder))
    elif info and info.is_folder:
        shutil.rmtree(place)
    elif info:
        os.unlink(place)
