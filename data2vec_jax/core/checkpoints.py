"""Checkpoints: the train state and the data position, side by side in `DIRECTORY/STEP/`.

The only file that imports orbax (its v1 API). `state/` is a store of arrays that a mesh of any
size can read, whatever mesh wrote it; `position/data.json` is the data position as JSON. A step's
folder is written under a temporary name and renamed once complete, so whatever interrupts a save,
a folder named STEP is a finished checkpoint. A directory belongs to one run at a time: a starting
run removes the unfinished saves of its predecessor.
"""

import contextlib
import dataclasses
import errno
import gc
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp
from etils import epath

from data2vec_jax.core.config import with_current_names
from data2vec_jax.core.errors import UserError, nearest
from data2vec_jax.core.safetensors import SafeTensors
from data2vec_jax.core.trees import flatten, nest

CONVERTED = "model.safetensors"  # in folders that conversion made
# A file-size limit (EFBIG) and a quota (EDQUOT) end a save, and are mended, as a full disk is.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Checkpoints:
    """The checkpoints of one run; every process of the run makes the same calls in the same order.

    The arguments after `directory` are the config section `checkpoint`.

    Args:
      directory: where the step folders go (local or `gs://`); made if it is missing.
      every: save each so many steps; 0 saves only when forced.
      keep: how many of the latest checkpoints to keep (while one is written, it comes on top).
      keep_every: keep all checkpoints at multiples of so many steps as well.

    Raises:
      UserError: an option out of range, or a directory that cannot be written.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        *,
        every: int,
        keep: int = 2,
        keep_every: int | None = None,
    ):
        options = ("every", every, 0), ("keep", keep, 1), ("keep_every", keep_every or 1, 1)
        for name, value, least in options:
            if value < least:
                raise UserError(f"config.checkpoint.{name}: {value} is less than {least}")
        _hush()
        self._directory = _absolute(directory)
        _steps(self._directory)  # orbax would stumble over an incomplete one at its first save
        self._saving = None  # the step whose save was begun last
        when, which = ocp.training.save_decision_policies, ocp.training.preservation_policies
        interval = [when.FixedIntervalPolicy(every)] if every else []
        spared = [which.EveryNSteps(keep_every)] if keep_every else []
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            self._orbax = ocp.training.Checkpointer(
                self._directory,
                context=_context(),
                save_decision_policy=when.AnySavePolicy(interval),
                preservation_policy=which.AnyPreservationPolicy([which.LatestN(keep), *spared]),
                # Process 0 lists the folder for all: on a network disk another process may still
                # see yesterday's listing, and would resume elsewhere.
                step_name_format=ocp.path.step.standard_name_format(
                    single_host_load_and_broadcast=True
                ),
                # An interrupted save is as large as a finished one, and nobody will finish it.
                cleanup_tmp_directories=True,
            )
        except OSError as error:
            reason = error.strerror or error
            raise UserError(f"cannot write checkpoints to {directory}: {reason}") from None

    def latest(self) -> int | None:
        """The step of the newest checkpoint on disk, None without one; awaits a save under way."""
        self.wait()
        return self._held()[-1] if self._held() else None

    def _held(self) -> list[int]:
        return [saved.step for saved in self._orbax.checkpoints]

    def should_save(self, step: int) -> bool:
        """Whether it is the turn of `step`, the same on every process."""
        return self._orbax.should_save(step)

    def save(self, step: int, state: Any, position: dict[str, Any], *, force: bool = False) -> bool:
        """Begins to save `state` and `position`, if `should_save(step)` or `force`.

        Returns once the state has left the devices, so it may be donated to the next step at once;
        writing goes on in the background, one save at a time. Metrics up to `step` must be on disk
        before the call, for they may not be fewer than a checkpoint claims.

        Args:
          step: the number of completed updates.
          state: a pytree of `jax.Array`, typed PRNG keys included.
          position: a small JSON object, the same on every process.
          force: save outside the interval (the last step).

        Returns:
          Whether a save was begun; False also if `step` is there already.

        Raises:
          UserError: no space is left, for this save or for the one before it.
        """
        if not force and not self.should_save(step):
            return False
        self.wait()  # a failure of the save before belongs to that save's step
        if step in self._held():
            return False
        self._saving = step
        # The copy to the host is wanted, also where the loop forbids accidental transfers.
        with self._out_of_space(), jax.transfer_guard("allow"):
            self._orbax.save_checkpointables_async(
                step, {"state": state, "position": position}, force=True
            )
        return True

    def restore(self, abstract_state: Any, step: int | None = None) -> tuple[Any, dict[str, Any]]:
        """Reads a checkpoint onto the devices.

        Args:
          abstract_state: the state as `jax.ShapeDtypeStruct` with shardings on today's mesh, which
            need not be the mesh that wrote the checkpoint.
          step: which checkpoint; the newest by default.

        Returns:
          The state, laid out as `abstract_state`, and the position.

        Raises:
          UserError: no such checkpoint, a damaged one, or one of another config.
        """
        self.wait()
        steps = self._held()
        if not steps:
            raise UserError(f"no checkpoint in {self._directory}")
        step = steps[-1] if step is None else step
        if step not in steps:
            held = ", ".join(map(str, steps))
            raise UserError(f"no checkpoint of step {step} in {self._directory}; it holds {held}")
        folder = self._directory / str(step)
        _compare(folder, _stored(folder), abstract_state)
        wanted = {"state": abstract_state, "position": None}
        loaded = _read(folder, ocp.load_checkpointables, wanted)
        return loaded["state"], loaded["position"]

    def wait(self) -> None:
        """Blocks until a save under way is on disk; raises what went wrong with it, if anything."""
        with self._out_of_space():
            self._orbax.wait()

    def close(self) -> None:
        """Waits, as `wait`, and ends the background threads."""
        try:
            self.wait()
        finally:
            self._orbax.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        # After a failure the other processes are elsewhere, and to meet them would take forever.
        if kind is None or jax.process_count() == 1:
            self.close()

    @contextlib.contextmanager
    def _out_of_space(self) -> Iterator[None]:
        """Turns the many shapes of a full disk into one line."""
        try:
            yield
        except Exception as error:
            if not _is_full(error):
                raise
            if jax.process_count() == 1:  # orbax has already written off what this save replaces
                self._orbax.reload()
            steps = _steps(self._directory)
            then = f"resumes from step {steps[-1]}" if steps else "begins anew"
            raise UserError(
                f"no space left for checkpoint {self._saving} in {self._directory}; "
                f"free some space and run the same command again, it {then}"
            ) from None


def load_params(
    path: str | os.PathLike, abstract_params: Any = None, *, subtree: str = "params"
) -> dict[str, Any]:
    """Reads one subtree of a checkpoint's state, and not a byte of the optimiser's.

    For fine-tuning, evaluation and conversion. Every process of a job calls it.

    Args:
      path: a step's folder, or a workdir or its `checkpoints/`, which mean their newest step; or a
        folder that `python -m data2vec_jax.convert ... --to=jax` wrote.
      abstract_params: nested dicts of `jax.ShapeDtypeStruct` to read instead of all there is; a
        leaf with a sharding becomes a `jax.Array`, one without a numpy array, of the given dtype.
      subtree: 'params' or 'teacher'.

    Returns:
      Nested dicts of arrays; numpy, as stored, without `abstract_params`.

    Raises:
      UserError: no checkpoint there, a damaged one, no such subtree, other shapes.
    """
    _hush()
    if (_absolute(path) / CONVERTED).exists():
        return _load_converted(Path(_absolute(path)), abstract_params, subtree)
    folder = _newest(_absolute(path))
    stored = _stored(folder).get(subtree)
    if not stored:
        raise UserError(f"checkpoint {folder} has no {subtree}")
    if abstract_params is None:
        wanted = jax.tree.map(lambda _: np.ndarray, stored)
    else:
        _compare(folder, {subtree: stored}, {subtree: abstract_params}, partial=True)
        # To orbax, a numpy array (this one takes no memory) means "numpy, of this dtype", and a
        # shape without a sharding means the devices of the machine that wrote the checkpoint.
        wanted = jax.tree.map(
            lambda x: x if x.sharding else np.broadcast_to(np.zeros((), x.dtype), x.shape),
            abstract_params,
        )
    state = _read(folder, ocp.load, {subtree: wanted}, checkpointable_name="state")
    return state[subtree]


def load_config(path: str | os.PathLike) -> dict[str, Any]:
    """The config.json of a checkpoint: of its folder, or of the workdir that it is in.

    Raises UserError: there is none, or a damaged one.
    """
    path = _absolute(path)
    for folder in (path, *list(path.parents)[:2]):
        if (folder / "config.json").exists():
            try:
                config = json.loads((folder / "config.json").read_text())
            except ValueError as error:
                raise UserError(f"{folder}/config.json is damaged ({error})") from None
            if not isinstance(config, dict) or not {"modality", "model"} <= config.keys():
                raise UserError(
                    f"{folder}/config.json is not ours; python -m data2vec_jax.convert {folder} "
                    "TARGET --to=jax makes a folder for --init_from"
                )
            return with_current_names(config) | {"folder": str(folder)}
    raise UserError(f"no checkpoint at {path}")


def _load_converted(folder: Path, abstract: Any, subtree: str) -> dict[str, Any]:
    """`load_params` of a converted folder: paths are names, the teacher's start with 'teacher/'."""
    tensors = SafeTensors(folder / CONVERTED)
    names = _names(tensors, subtree)
    if not names:
        raise UserError(f"checkpoint {folder} has no {subtree}")
    stored = {path: tensors[name] for path, name in names.items()}
    if abstract is None:
        return nest({path: np.array(array) for path, array in stored.items()})
    _compare(folder, {subtree: nest(stored)}, {subtree: abstract}, partial=True)

    def place(path, wanted):
        array = stored[path]
        if wanted.sharding is None:
            return np.array(array, wanted.dtype)
        read = lambda index: np.array(array[index], wanted.dtype)  # noqa: E731
        return jax.make_array_from_callback(wanted.shape, wanted.sharding, read)

    return nest({path: place(path, wanted) for path, wanted in flatten(abstract).items()})


def init_state_from(path: str | os.PathLike, state: Any, abstract: Any) -> tuple[Any, list[str]]:
    """The first state of a run, with parameters and teacher of another checkpoint.

    What the checkpoint does not have stays as it is in `state`: a new head. A teacher's leaf that
    it does not have, because its teacher shared it or because it has no teacher, is its student's.

    Args:
      path: as of `load_params`.
      state: a state with `params` and `teacher`, nested dicts.
      abstract: its shapes and shardings.

    Returns:
      The state, and the paths of parameters that are new.

    Raises:
      UserError: as `load_params`; or nothing in the checkpoint is of this model.
    """
    have = held_paths(path, "params")
    wanted = flatten(abstract.params)
    new = sorted(wanted.keys() - have)
    if len(new) == len(wanted):
        raise UserError(f"--init_from={path}: no parameter of this model is in it")
    student = {p: x for p, x in wanted.items() if p in have}
    averaged = held_paths(path, "teacher")
    teacher = flatten(abstract.teacher)
    own = {p: x for p, x in teacher.items() if p in averaged}
    shared = {p: x for p, x in teacher.items() if p in have and p not in own}
    found = [
        flatten(load_params(path, nest(part), subtree=subtree)) if part else {}
        for subtree, part in (("params", student), ("teacher", own), ("params", shared))
    ]
    state = dataclasses.replace(
        state,
        params=nest(flatten(state.params) | found[0]),
        teacher=nest(flatten(state.teacher) | found[1] | found[2]),
    )
    return state, new


def held_paths(path: str | os.PathLike, subtree: str) -> set[str]:
    """Paths of the arrays that a checkpoint holds of a subtree: 'encoder/blocks/up/kernel'."""
    _hush()
    if (_absolute(path) / CONVERTED).exists():
        return set(_names(SafeTensors(Path(_absolute(path)) / CONVERTED), subtree))
    return set(flatten(_stored(_newest(_absolute(path))).get(subtree) or {}))


def _names(tensors: SafeTensors, subtree: str) -> dict[str, str]:
    """Path in the subtree -> name in a converted folder's file."""
    return {
        name.removeprefix("teacher/"): name
        for name in tensors
        if name.startswith("teacher/") == (subtree == "teacher")
    }


def located(path: str | os.PathLike) -> str | os.PathLike:
    """The folder of `reference:NAME`, weights that come with the package; other paths as they are.

    Raises UserError: there are no weights of that name.
    """
    scheme, _, name = os.fspath(path).partition(":")
    if scheme != "reference":
        return path
    folder = Path(__file__).parents[1] / "reference"
    names = sorted(found.parent.name for found in folder.glob(f"*/{CONVERTED}"))
    if name not in names:
        raise UserError(f"{path}: no reference weights '{name}'{nearest(name, names)}")
    return folder / name


def _absolute(path: str | os.PathLike) -> epath.Path:
    path = epath.Path(located(path))
    return path if "://" in str(path) else path.expanduser().resolve()


def _context() -> ocp.Context:
    """Orbax options: positions are JSON files, and a part of a state may be read alone."""
    registry = ocp.handlers.local_registry()
    registry.add(ocp.handlers.JsonHandler, checkpointable_name="position")
    context = ocp.Context()
    context.checkpointables_options.registry = registry
    context.pytree_options.loading.partial_load = True
    return context


def _found(directory: epath.Path) -> dict[int, bool]:
    """Step -> whether its folder was committed (a copy cut short was not), ascending."""
    if not directory.is_dir():
        return {}
    names = ocp.path.step.standard_name_format()
    found = {f.step: f.commit_timestamp_nsecs is not None for f in names.find_all(directory)}
    return dict(sorted(found.items()))


def _steps(directory: epath.Path) -> list[int]:
    """The steps of the checkpoints in a folder, ascending; a `UserError` if one is incomplete."""
    found = _found(directory)
    for step, committed in found.items():
        if not committed:
            raise _damaged(directory / str(step), "it is incomplete")
    return list(found)


def _newest(path: epath.Path) -> epath.Path:
    """The folder of the newest step in a workdir or its checkpoints; a step's folder as it is."""
    if (path / "state").exists():
        return path
    for root in (path / "checkpoints", path):
        if steps := _steps(root):
            return root / str(steps[-1])
    raise UserError(f"no checkpoint at {path}")


def _stored(folder: epath.Path) -> dict[str, Any]:
    """The tree of what a checkpoint's state holds: shapes and dtypes, no values."""
    tree = _read(folder, ocp.metadata, checkpointable_name="state").metadata
    if not tree:  # orbax logs the reason, and returns None
        raise _damaged(folder, "its list of arrays is unreadable")
    return tree


def _read(folder: epath.Path, function: Callable, *args: Any, **kwargs: Any) -> Any:
    """`function(folder, ...)`, with a failure as one line that names the folder."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "coroutine .* was never awaited")
        try:
            with _context():
                return function(folder, *args, **kwargs)
        except Exception as error:
            while error.__cause__ or error.__context__:  # orbax wraps the reason in generalities
                error = error.__cause__ or error.__context__
            reason = (str(error).splitlines() or [type(error).__name__])[0]
        gc.collect()  # the reads beside the failed one end here, while nobody listens
    raise _damaged(folder, reason)


def _damaged(folder: epath.Path, reason: str) -> UserError:
    reason = reason.split(" [tensorstore")[0]  # a page of settings follows
    others = [s for s, whole in _found(folder.parent).items() if whole and str(s) != folder.name]
    hint = f"; if it is damaged, remove it to go on from step {others[-1]}" if others else ""
    return UserError(f"checkpoint {folder} cannot be read ({reason}){hint}")


def _compare(folder: epath.Path, stored: Any, wanted: Any, partial: bool = False) -> None:
    """Raises a `UserError` at the first path where a checkpoint differs from what is wanted.

    `partial`: what is stored besides is no matter, and dtypes are converted.
    """
    have, want = _describe(stored), _describe(wanted)
    for path in want if partial else {**want, **have}:
        old, new = have.get(path), want.get(path)
        if old != new and not (partial and old and old[0] == new[0]):
            shapes = [f"{leaf[1]}{list(leaf[0])}" if leaf else "nothing" for leaf in (old, new)]
            raise UserError(
                f"checkpoint {folder} does not fit the config: "
                f"{path} is {shapes[0]} in the checkpoint, {shapes[1]} by the config"
            )


def _describe(tree: Any) -> dict[str, tuple[tuple[int, ...], str]]:
    """Path -> (shape, dtype) of each leaf, typed PRNG keys as the integers that are stored."""
    leaves = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.eval_shape(jax.random.key_data, leaf)
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        leaves[name] = (tuple(leaf.shape), np.dtype(leaf.dtype).name)
    return leaves


def _is_full(error: BaseException | None) -> bool:
    """Whether a write failed for lack of space; tensorstore says so only in its message."""
    while error is not None:
        text = str(error)
        if getattr(error, "errno", None) in _FULL or any(os.strerror(n) in text for n in _FULL):
            return True
        error = error.__cause__ or error.__context__
    return False


def _hush() -> None:
    """Keeps orbax's reports and tracebacks off stderr; whatever fails is raised as well.

    Among them are those of reads that a failed read leaves behind, which end, in tensorstore's
    threads or in the garbage collector, when nobody awaits them any more.
    """
    for name in ("absl", "asyncio", None):  # to add the same filter again changes nothing
        logging.getLogger(name).addFilter(_not_orbax)
    previous = sys.unraisablehook
    if getattr(previous, "__name__", "") == "hush":
        return

    def hush(unraisable: Any) -> None:
        straggler = "_read_array_index" in repr(unraisable.object)
        if not straggler and "Event loop is closed" not in str(unraisable.exc_value):
            previous(unraisable)

    sys.unraisablehook = hush


def _not_orbax(record: logging.LogRecord) -> bool:
    orbax = f"orbax{os.sep}checkpoint" in record.pathname or "tensorstore" in str(record.msg)
    return not orbax or logging.getLogger("absl").isEnabledFor(logging.DEBUG)
