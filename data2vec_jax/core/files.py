"""JSON files, and targets that are complete or absent."""

import contextlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data2vec_jax.core.errors import UserError

JSON_BYTES = 16 * 2**20  # of a file; settings have a thousandth


def read_json(path: Path, kind: type = dict) -> Any:
    """The object in a JSON file, or the list if that is the `kind`."""
    try:
        with path.open("rb") as file:  # `read` takes the memory that it is asked for
            data = file.read(min(path.stat().st_size, JSON_BYTES) + 1)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or 'not JSON'}") from None
    return parse_json(data, path, kind)


def parse_json(data: bytes, name: str | Path, kind: type = dict) -> Any:
    """As `read_json`, of the bytes of a file, or of its first `JSON_BYTES` and one more."""
    if len(data) > JSON_BYTES:
        raise UserError(f"{name}: more than {JSON_BYTES:,} bytes of JSON; at most these are read")
    try:
        found = json.loads(data.decode())  # of bytes, it would take UTF-16, too
    except (ValueError, RecursionError):
        raise UserError(f"{name}: not JSON") from None
    if not isinstance(found, kind):
        raise UserError(f"{name}: not a JSON {'object' if kind is dict else 'list'}")
    return found


def write_json(path: Path, value: Any) -> None:
    """Readable JSON; dicts in the given order."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A path beside `path` to write a file to, which takes its place if all goes well, whoever else
    writes it at the same time; nothing is left behind otherwise."""
    draft = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
    try:
        yield draft
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


@contextlib.contextmanager
def new_target(target: str | os.PathLike) -> Iterator[Path]:
    """A path beside `target` to write a file or folder to, renamed to `target` if all goes well.

    Raises UserError if `target` exists, or cannot be written; nothing is left behind then.
    """
    target = Path(target)
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise UserError(f"{target} exists; remove it, or choose another target")
    draft = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield draft
        if target.is_dir():
            target.rmdir()
        os.replace(draft, target)
    except OSError as error:
        raise UserError(f"cannot write {target}: {error.strerror or error}") from None
    finally:
        if draft.is_dir():
            shutil.rmtree(draft, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                draft.unlink()
