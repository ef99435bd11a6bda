"""The folder of one checkpoint, and whether it holds what was saved.

`state/` is a store of arrays that a mesh of any size can read; `position/data.json` is the data
position; `manifest/data.json` says what the two must be: shape, dtype and fingerprint of each array
(`core/fingerprint.py`), a hash of the position, the step, and a hash of all this. The three are
committed together, by the last rename of the folder. Checkpoints from before there were manifests
are read without these checks. Orbax (its v1 API) is imported here and in `core/checkpoints.py`.
"""

import errno
import gc
import hashlib
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp
from etils import epath

from data2vec_jax.core import fingerprint
from data2vec_jax.core.errors import UserError

COMMITTED = "_CHECKPOINT_METADATA"  # orbax writes it last
# Reasons to fail that say nothing about what is on disk.
_ELSEWHERE = (errno.EACCES, errno.EPERM, errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.ETIMEDOUT)
_ELSEWHERE_TEXTS = ("PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED", "UNAVAILABLE")
# A file-size limit (EFBIG) and a quota (EDQUOT) end a save, and are mended, as a full disk is.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

WAITED = "another process has failed, or was too slow"


class Damaged(UserError):
    """Why a folder is not what was saved, without its name."""


def context(alone: bool = False, timeout: int | None = None) -> ocp.Context:
    """Orbax options: JSON files, and a part of a state may be read.

    alone: a process does not wait for the others, who may have failed. timeout: seconds that a save
    may take, on each process and for all of them to meet at its end; orbax's own without.
    """
    registry = ocp.handlers.local_registry()
    for name in ("position", "manifest"):
        registry.add(ocp.handlers.JsonHandler, checkpointable_name=name)
    context = ocp.Context()
    context.checkpointables_options.registry = registry
    context.pytree_options.loading.partial_load = True
    if timeout is not None:
        context.async_options.timeout_secs = timeout
    if alone:
        context.multiprocessing_options.primary_host = jax.process_index()
        context.multiprocessing_options.active_processes = {jax.process_index()}
    return context


def steps(directory: epath.Path) -> dict[int, bool]:
    """Step -> whether its folder is complete (a copy cut short is not), ascending."""
    if not directory.is_dir():
        return {}
    names = [path.name for path in directory.iterdir()]
    numbers = sorted(int(name) for name in names if name.isdecimal() and str(int(name)) == name)
    return {step: _complete(directory / str(step)) for step in numbers}


def _complete(folder: epath.Path) -> bool:
    try:
        time = json.loads((folder / COMMITTED).read_text())["commit_timestamp_nsecs"]
    except PermissionError:
        raise UserError(f"cannot read checkpoint {folder}: Permission denied") from None
    except (OSError, ValueError, LookupError, TypeError):
        return False
    return isinstance(time, int) and 0 < time < 2**63


# What must be in a folder ---------------------------------------------------------------------


def make_manifest(step: int, state: Any, position: Any) -> dict[str, Any]:
    """What `state` and `position` are; every process calls it.

    Raises UserError: an element of the state is not finite.
    """
    shapes = describe(state)
    sums = np.asarray(fingerprint.of_arrays(jax.tree.leaves(state)))
    for path, row in zip(shapes, sums, strict=True):
        if row[2]:
            raise UserError(f"{path} is not finite")
    arrays = {
        path: [shape, fingerprint.text(row)]
        for (path, shape), row in zip(shapes.items(), sums, strict=True)
    }
    manifest = {"step": step, "state": arrays, "position": _digest(position)}
    return manifest | {"sha256": _digest(manifest)}


def read_position(folder: epath.Path, step: int) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """The manifest, None if there was none yet, and the position, both verified.

    Raises Damaged: they are not what was saved, or not of this step.
    """
    manifest = read_manifest(folder)
    position = _read_json(folder / "position" / "data.json")
    if manifest and manifest["position"] != _digest(position):
        raise Damaged("the position differs from what was saved")
    if not isinstance(position, dict) or not isinstance(position.get("batch"), int):
        raise Damaged("position/data.json is not a data position")
    for found in (position["batch"], *([manifest["step"]] if manifest else [])):
        if found != step:
            raise Damaged(f"its files are of step {found}")
    return manifest, position


def identity(folder: epath.Path) -> str | None:
    """What tells a checkpoint from all others: its manifest's hash, or when it was committed if it
    is of before manifests. None if there is no checkpoint."""
    try:
        if (folder / "manifest" / "data.json").exists():
            return str(_read_json(folder / "manifest" / "data.json")["sha256"])
        return str(json.loads((folder / COMMITTED).read_text())["commit_timestamp_nsecs"])
    except (OSError, ValueError, LookupError, TypeError, Damaged):
        return None


def identities(workdir: str | os.PathLike) -> dict[str, str | None]:
    """Name of each complete checkpoint of a run -> its `identity`."""
    directory = epath.Path(workdir) / "checkpoints"
    complete = [str(step) for step, whole in steps(directory).items() if whole]
    return {name: identity(directory / name) for name in complete}


def read_manifest(folder: epath.Path) -> dict[str, Any] | None:
    """What the folder must hold; None if it is of before manifests. Raises Damaged."""
    path = folder / "manifest" / "data.json"
    if not path.exists():
        if '"manifest"' in (folder / COMMITTED).read_text():
            raise Damaged("its manifest is missing")
        return None
    manifest = _read_json(path)
    rest = {k: v for k, v in manifest.items() if k != "sha256"} if isinstance(manifest, dict) else 0
    if not rest or manifest.get("sha256") != _digest(rest):
        raise Damaged("its manifest differs from what was saved")
    return manifest


def read_shapes(folder: epath.Path, manifest: Mapping[str, Any] | None) -> dict[str, Any]:
    """The tree of what the state holds: shapes and dtypes, no values. Raises Damaged."""
    tree = read(folder, ocp.metadata, checkpointable_name="state").metadata
    if not tree:  # orbax logs the reason, and returns None
        raise Damaged("its list of arrays is unreadable")
    if manifest:
        have, want = describe(tree), {p: shape for p, (shape, _) in manifest["state"].items()}
        for path in {**want, **have}:
            if have.get(path) != want.get(path):
                raise Damaged(f"{path} differs from what was saved")
    return tree


def verify(manifest: Mapping[str, Any] | None, tree: Any) -> None:
    """Compares arrays with what was saved; every process calls it.

    tree: all of a state or a part of it, `jax.Array` or numpy, with the dtypes that were saved.
    Raises Damaged: the first array that differs.
    """
    if not manifest:
        return
    leaves = dict(zip(describe(tree), jax.tree.leaves(tree), strict=True))
    device = {path: leaf for path, leaf in leaves.items() if isinstance(leaf, jax.Array)}
    sums = {p: fingerprint.of_array(leaf) for p, leaf in leaves.items() if p not in device}
    if device:
        rows = np.asarray(fingerprint.of_arrays(list(device.values())))
        sums |= dict(zip(device, rows, strict=True))
    for path in leaves:
        if fingerprint.text(sums[path]) != manifest["state"][path][1]:
            raise Damaged(f"{path} differs from what was saved")


def describe(tree: Any) -> dict[str, str]:
    """Path -> 'float32[16, 24]' of each leaf, typed PRNG keys as the integers that are stored."""
    leaves = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.eval_shape(jax.random.key_data, leaf)
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        leaves[name] = f"{np.dtype(leaf.dtype).name}{list(leaf.shape)}"
    return leaves


def compare(stored: Any, wanted: Any, partial: bool = False) -> None:
    """Raises a `UserError` at the first path where a checkpoint differs from what is wanted.

    `partial`: what is stored besides is no matter, and dtypes are converted.
    """
    have, want = describe(stored), describe(wanted)
    for path in want if partial else {**want, **have}:
        old, new = have.get(path), want.get(path)
        if old != new and not (partial and old and old[old.index("[") :] == new[new.index("[") :]):
            raise UserError(
                f"does not fit the config: {path} is {old or 'nothing'} in the checkpoint, "
                f"{new or 'nothing'} by the config"
            )


# Reading and writing --------------------------------------------------------------------------


def read(folder: epath.Path, function: Callable, *args: Any, **kwargs: Any) -> Any:
    """`function(folder, ...)` of orbax; every process for itself.

    Raises Damaged, or a `UserError` if the reason is not what is on disk: no permission, no memory.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "coroutine .* was never awaited")
        try:
            with context(alone=True):
                return function(folder, *args, **kwargs)
        except Exception as error:
            kind = UserError if _elsewhere(error) else Damaged
            problem = reason(error)
        gc.collect()  # the reads beside the failed one end here, while nobody listens
    raise kind(problem)


def _read_json(path: epath.Path) -> Any:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise Damaged(f"{path.parent.name}/{path.name} is missing") from None
    except (ValueError, RecursionError):
        raise Damaged(f"{path.parent.name}/{path.name} is not JSON") from None
    except OSError as error:
        kind = UserError if _elsewhere(error) else Damaged
        raise kind(f"{path.parent.name}/{path.name}: {error.strerror}") from None


def set_aside(folder: epath.Path, why: str = "damaged") -> str:
    """Renames a folder to 'damaged-STEP', or to what `why` says, and returns its new name."""
    place = folder.parent / f"{why}-{folder.name}"
    number = 1
    while place.exists():
        number += 1
        place = folder.parent / f"{why}-{folder.name}-{number}"
    try:
        folder.rename(place)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(
            f"checkpoint {folder} is {why}, and cannot be set aside: {reason}"
        ) from None
    return place.name


def reason(error: BaseException) -> str:
    """Why a read or a save failed, in one line; a full disk has many shapes."""
    for cause in _causes(error):  # orbax wraps the reason in generalities
        number = getattr(cause, "errno", None)
        if number in _FULL or any(os.strerror(n) in str(cause) for n in _FULL):
            return "no space left"
        if "Barrier timed out" in str(cause):
            return WAITED
    lines = str(cause).split(" [tensorstore")[0].splitlines()  # a page of settings follows
    return lines[0] if lines and lines[0] else type(cause).__name__


def _causes(error: BaseException | None) -> list[BaseException]:
    """The error and what it came from, the root last."""
    causes: list[BaseException] = []
    while error is not None and error not in causes:
        causes.append(error)
        error = error.__cause__ or error.__context__
    return causes


def _elsewhere(error: BaseException) -> bool:
    """Whether a read failed for want of something else than a sound file."""
    return any(
        isinstance(cause, MemoryError)
        or getattr(cause, "errno", None) in _ELSEWHERE
        or any(text in str(cause) for text in _ELSEWHERE_TEXTS)
        for cause in _causes(error)
    )


def _digest(value: Any) -> str:
    """SHA-256 of JSON, however it is written."""
    text = json.dumps(json.loads(json.dumps(value)), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


# Silence --------------------------------------------------------------------------------------


def hush() -> None:
    """Keeps orbax's reports and tracebacks off stderr; whatever fails is raised as well.

    Among them are those of reads that a failed read leaves behind, which end, in tensorstore's
    threads or in the garbage collector, when nobody awaits them any more.
    """
    for name in ("absl", "asyncio", None):  # to add the same filter again changes nothing
        logging.getLogger(name).addFilter(_not_orbax)
    previous = sys.unraisablehook
    if getattr(previous, "__name__", "") == "hushed":
        return

    def hushed(unraisable: Any) -> None:
        straggler = "_read_array_index" in repr(unraisable.object)
        if not straggler and "Event loop is closed" not in str(unraisable.exc_value):
            previous(unraisable)

    sys.unraisablehook = hushed


def _not_orbax(record: logging.LogRecord) -> bool:
    # A task that nobody awaits is told by asyncio, with the place of its code in the message.
    said = f"{record.pathname} {record.msg}".lower()
    orbax = f"orbax{os.sep}checkpoint" in said or "tensorstore" in said
    return not orbax or logging.getLogger("absl").isEnabledFor(logging.DEBUG)
