"""Copies on this machine of remote files whose readers take no others: ArrayRecord and tars.

`CACHE/ID/` holds a file and what lies beside it under their names; ID is made of their places,
sizes and versions, so a changed file gets another. It is there as a whole or not at all, and may be
deleted while no run reads it. CACHE is $DATA2VEC_CACHE, by default ~/.cache/data2vec_jax.
"""

import fcntl
import hashlib
import os
import posixpath
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from data2vec_jax.cli.output import say
from data2vec_jax.core.errors import UserError
from data2vec_jax.data import places

VARIABLE = "DATA2VEC_CACHE"
AT_ONCE = 8  # files
PART = 2**26  # bytes of a file that are asked for, and in memory, at a time


def local_copies(wanted: Sequence[str], beside: Sequence[str] = ()) -> list[str]:
    """The paths of copies of files, which are made if need be; a file of this machine stays.

    beside: ends of the names of files that lie beside some and are copied, too, such as
    '.lengths.npy'. A line says what is copied, and where. Raises UserError: a file is not there, is
    changed while it is copied, the disk is full, ...
    """
    if not any(map(places.is_remote, wanted)):
        return list(wanted)
    cache = Path(os.environ.get(VARIABLE) or "~/.cache/data2vec_jax").expanduser()
    pool = ThreadPoolExecutor(AT_ONCE)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        found = list(pool.map(lambda place: versions(place, beside), wanted))
        folders = [cache / hashlib.sha256(repr(one).encode()).hexdigest()[:16] for one in found]
        missing = {f: one for f, one in zip(folders, found, strict=True) if not f.exists()}
        if size := sum(info.size for one in missing.values() for info in one.values()):
            what = f"{len(missing):,} files ({size / 1e6:,.1f} MB), such as {next(iter(found[0]))}"
            if size > shutil.disk_usage(cache).free:
                raise UserError(f"{cache}: no room for {what}; ${VARIABLE} names another folder")
            say(f"copying {what}, to {cache}, once; ${VARIABLE} names another folder")
        list(pool.map(copy, missing, missing.values()))
    except OSError as error:
        text = f"{cache}: {error.strerror or error}; ${VARIABLE} names another folder for copies"
        raise UserError(text) from None
    finally:
        pool.shutdown(cancel_futures=True)
    return [str(f / posixpath.basename(p)) for f, p in zip(folders, wanted, strict=True)]


def versions(place: str, beside: Sequence[str]) -> dict[str, places.Info]:
    """What is known of a remote file, and of those beside it that are there."""
    found = {one: places.stat(one, fresh=True) for one in (place, *(place + e for e in beside))}
    if found[place] is None or found[place].is_folder:
        raise UserError(f"{place}: no such file")
    return {one: info for one, info in found.items() if info}


def copy(folder: Path, files: Mapping[str, places.Info]) -> None:
    """Makes a folder of copies; of several processes one does, and the others wait for it."""
    with folder.with_name(f"{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the system lets go of it when a process ends
        if folder.exists():
            return
        draft = folder.with_name(f"{folder.name}.partial")
        draft.mkdir(exist_ok=True)  # of one that was killed, maybe
        for place, info in files.items():
            with (draft / posixpath.basename(place)).open("wb") as file:
                for start in range(0, info.size, PART):
                    file.write(places.read(place, start, min(PART, info.size - start)))
                os.fsync(file.fileno())
            if places.stat(place, fresh=True) != info:
                raise UserError(f"{place}: changed while it was copied; give the command again")
        draft.rename(folder)
