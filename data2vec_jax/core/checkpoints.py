"""Checkpoints: the train state and the data position, side by side in `DIRECTORY/STEP/`.

A step's folder (`core/step_folder.py`) is written under a temporary name and renamed once complete,
so whatever interrupts a save, a folder named STEP is a finished checkpoint. What is read is
compared with what was saved: a damaged folder is set aside, and the newest sound one is used. A
save that fails ends no training. A directory belongs to one run at a time: a starting run removes
the unfinished saves of its predecessor.
"""

import contextlib
import dataclasses
import difflib
import functools
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp
from etils import epath

from data2vec_jax.core import distributed, step_folder
from data2vec_jax.core.config import NonNegativeInt, PositiveInt, with_current_names
from data2vec_jax.core.errors import UserError, nearest
from data2vec_jax.core.safetensors import SafeTensors
from data2vec_jax.core.step_folder import Damaged
from data2vec_jax.core.trees import flatten, nest

CONVERTED = "model.safetensors"  # in folders that conversion made


@dataclasses.dataclass
class _Spared:
    """An orbax policy: one step is kept whatever comes after it."""

    step: int | None = None

    def should_preserve(self, checkpoints: Any, *, context: Any) -> list[bool]:
        return [saved.step == self.step for saved in checkpoints]


class Checkpoints:
    """The checkpoints of one run; every process of the run makes the same calls in the same order.

    The arguments after `directory` are the config section `checkpoint`.

    Args:
      directory: where the step folders go (local or `gs://`); made if it is missing.
      every: save each so many steps; 0 saves only when forced.
      keep: how many of the latest checkpoints to keep (while one is written, it comes on top).
      keep_every: keep all checkpoints at multiples of so many steps as well.
      timeout: seconds that a save may take, else it has failed. As long, the processes wait for one
        whose own writes have failed, at the next save.

    Attributes:
      tell: what lines for the user are passed to, on process 0; prints on stderr by default.

    Raises:
      UserError: an option out of range, a directory that cannot be written, or no folder in it
        that is complete.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        *,
        every: NonNegativeInt,
        keep: PositiveInt = 2,
        keep_every: PositiveInt | None = None,
        timeout: PositiveInt = 1200,
    ):
        step_folder.hush()
        self.tell: Callable[[str], None] = functools.partial(print, file=sys.stderr, flush=True)
        self._directory = _absolute(directory)
        self._saving: int | None = None  # the step whose save was begun and not yet awaited
        self._response: Any = None  # of that save
        self._problem = ""  # why the last save failed
        self._aside: dict[int, tuple[str, str]] = {}  # step -> why it was set aside, its new name
        when, which = ocp.training.save_decision_policies, ocp.training.preservation_policies
        interval = [when.FixedIntervalPolicy(every)] if every else []
        self._spared = _Spared()
        kept = [which.LatestN(keep), self._spared]
        kept += [which.EveryNSteps(keep_every)] if keep_every else []
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            distributed.on_first(self._set_incomplete_aside)
            self._orbax = ocp.training.Checkpointer(
                self._directory,
                context=step_folder.context(timeout=timeout),
                save_decision_policy=when.AnySavePolicy(interval),
                preservation_policy=which.AnyPreservationPolicy(kept),
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

    def _set_incomplete_aside(self) -> None:
        """Orbax would stumble over folders that a copy left half done."""
        found = step_folder.steps(self._directory)
        missing = [step for step, complete in found.items() if not complete]
        if missing and len(missing) == len(found):
            raise self._nothing_sound(dict.fromkeys(missing, "it is incomplete"))
        for step in missing:
            name = step_folder.set_aside(self._directory / str(step))
            self._aside[step] = "it is incomplete", name

    def latest(self) -> int | None:
        """The step of the newest checkpoint on disk, None without one; awaits a save under way."""
        self.wait()
        return self._held()[-1] if self._held() else None

    def _held(self) -> list[int]:
        return [saved.step for saved in self._orbax.checkpoints]

    def should_save(self, step: int) -> bool:
        """Whether it is the turn of `step`, the same on every process."""
        if self._saving is not None and jax.process_count() == 1 and self._has_ended():
            self.wait()  # tells of a failure as soon as there is one
        return self._orbax.should_save(step)

    def _has_ended(self) -> bool:
        try:
            self._response.result(timeout=0)
        except TimeoutError:
            return False
        except Exception:
            return True
        return True

    def save(
        self,
        step: int,
        state: Any,
        position: dict[str, Any],
        *,
        force: bool = False,
        spared: int | None = None,
    ) -> bool:
        """Begins to save `state` and `position`, if `should_save(step)` or `force`.

        Returns once the state has left the devices, so it may be donated to the next step at once;
        writing goes on in the background, one save at a time. Metrics up to `step` must be on disk
        before the call, for they may not be fewer than a checkpoint claims. If a save fails, for
        whatever reason, or a leaf of the state is not finite, `tell` gets a line, and what is on
        disk stays as it is.

        Args:
          step: the number of completed updates; `state.step`.
          state: a pytree of `jax.Array`, typed PRNG keys included.
          position: a small JSON object, whose 'batch' is `step`, the number of the next unseen
            batch; that of process 0 is written.
          force: save outside the interval (the last step).
          spared: a step that is not removed, however old it is.

        Returns:
          Whether a save was begun; False also if `step` is there already.
        """
        if not force and not self.should_save(step):
            return False
        self.wait()  # a failure of the save before belongs to that save's step
        if step in self._held():
            return False
        self._saving, self._spared.step = step, spared
        # The copy to the host is wanted, also where the loop forbids accidental transfers.
        with jax.transfer_guard("allow"):
            begun = self._try(lambda: self._begin(step, state, position))
        if not begun:
            self._failed()
        return begun

    def _begin(self, step: int, state: Any, position: dict[str, Any]) -> None:
        manifest = step_folder.make_manifest(step, state, position)
        if not self._try(self._touch):
            raise UserError(self._problem)
        saved = {"state": state, "position": position, "manifest": manifest}
        self._response = self._orbax.save_checkpointables_async(step, saved, force=True)

    def _touch(self) -> None:
        """Fails if nothing can be written, before the processes wait for each other's writes."""
        if not self._directory.is_dir():
            self._directory.mkdir(parents=True, exist_ok=True)
            self._tell(f"{self._directory} was gone; it is made anew")
        probe = self._directory / f".probe-{jax.process_index()}"
        probe.write_text("0" * 4096)
        probe.unlink()

    def _try(self, function: Callable[[], None]) -> bool:
        """Whether `function` succeeded on all processes; why not is then `_problem` on all."""
        problem = ""
        try:
            function()
        except Exception as error:
            problem = step_folder.reason(error)
        problem = distributed.first_problem(problem, consequence=step_folder.WAITED)
        self._problem = problem or self._problem
        return not problem

    def restore(self, abstract_state: Any, step: int | None = None) -> tuple[Any, dict[str, Any]]:
        """Reads a checkpoint onto the devices, and compares it with what was saved.

        Damaged folders that are newer than the newest sound one are renamed, and `tell` gets a line
        that says what is lost.

        Args:
          abstract_state: the state as `jax.ShapeDtypeStruct` with shardings on today's mesh, which
            need not be the mesh that wrote the checkpoint.
          step: which checkpoint, and no other; the newest sound one by default.

        Returns:
          The state, laid out as `abstract_state`, and the position, whose 'batch' is the step.

        Raises:
          UserError: no such checkpoint, none that is sound, or one of another config.
        """
        self.wait()
        steps = self._held()
        if not steps:
            raise UserError(f"no checkpoint in {self._directory}")
        if step is not None and step not in steps:
            held = ", ".join(map(str, steps))
            raise UserError(f"no checkpoint of step {step} in {self._directory}; it holds {held}")
        damaged: dict[int, str] = {}
        for candidate in reversed(steps) if step is None else [step]:
            try:
                found = self._load(candidate, abstract_state)
            except Damaged as error:
                damaged[candidate] = str(error)
                continue
            self._set_aside(damaged, candidate)
            return found
        if step is not None:
            raise UserError(f"checkpoint {self._directory / str(step)} is damaged: {damaged[step]}")
        raise self._nothing_sound(damaged)

    def _load(self, step: int, abstract_state: Any) -> tuple[Any, dict[str, Any]]:
        """A checkpoint, verified. Raises Damaged, on all processes alike."""
        folder, problem = self._directory / str(step), ""
        try:
            manifest, position = step_folder.read_position(folder, step)
            stored = step_folder.read_shapes(folder, manifest)
            _fits(folder, stored, abstract_state)
            state = step_folder.read(folder, ocp.load, abstract_state, checkpointable_name="state")
        except Damaged as error:
            problem = str(error)
        if problem := distributed.first_problem(problem):
            raise Damaged(problem)
        step_folder.verify(manifest, state)
        if (count := int(getattr(state, "step", step))) != step:
            raise Damaged(f"its state is of step {count}")
        return state, position

    def _set_aside(self, damaged: dict[int, str], step: int) -> None:
        """Renames the folders of `damaged` (step -> why); tells what is lost by `step`."""

        def rename():
            for other, why in damaged.items():
                self._aside[other] = why, step_folder.set_aside(self._directory / str(other))

        if damaged:
            distributed.on_first(rename)
            self._orbax.reload()
        if self._aside:
            lost = max(max(self._aside) - step, 0)
            names = ", ".join(name for _, name in self._aside.values())
            self._tell(
                f"{_listed({s: why for s, (why, _) in self._aside.items()})}: set aside as {names} "
                f"in {self._directory}; going on from step {step}, {lost:,} steps are lost"
            )
            self._aside = {}

    def set_aside_after(self, step: int) -> list[str]:
        """Renames the checkpoints after `step`, 0 for all; returns their new names."""
        self.wait()
        names: list[str] = []

        def rename():
            for later in (s for s in self._held() if s > step):
                names.append(step_folder.set_aside(self._directory / str(later), "collapsed"))

        distributed.on_first(rename)
        self._orbax.reload()
        return names

    def _nothing_sound(self, damaged: dict[int, str]) -> UserError:
        return UserError(
            f"no sound checkpoint is left in {self._directory}: {_listed(damaged)}; "
            "to begin anew, remove them or choose another --workdir"
        )

    def wait(self) -> None:
        """Blocks until a save under way has ended; `tell` gets a line if it has failed."""
        if self._saving is not None:
            if self._try(self._orbax.wait):
                self._saving, self._response = None, None
            else:
                self._failed()

    def _failed(self) -> None:
        """Tidies up after a failed save, and tells of it."""
        step, self._saving, self._response = self._saving, None, None

        def remove():  # it may be what fills the disk
            for _ in range(20):  # other arrays of it may still be being written
                left = list(self._directory.glob("*.orbax-checkpoint-tmp*"))
                if not left:
                    return
                for path in left:
                    shutil.rmtree(path, ignore_errors=True)
                time.sleep(0.1)

        distributed.on_first(remove)
        problem = self._problem
        self._try(self._orbax.reload)  # orbax has written off what this save was to replace
        self._problem = problem
        held = self._held()
        if step in held:  # what failed is the removal of older ones
            self._tell(f"older checkpoints than {step} are not removed: {problem}")
            return
        newest = f"the newest on disk is of step {held[-1]}" if held else "there is none on disk"
        self._tell(f"CHECKPOINT {step} IS NOT SAVED: {problem}; {newest}; training goes on")

    def finish(self, step: int, state: Any, position: dict[str, Any]) -> None:
        """Waits until `step` is on disk; saves it once more if that has failed.

        Raises UserError: it is not on disk.
        """
        self.wait()
        self._orbax.reload()  # what others did to the folder meanwhile
        if step in self._held():
            return
        self.save(step, state, position, force=True)
        self.wait()
        held = self._held()
        if step not in held:
            then = f"goes on from step {held[-1]}" if held else "begins anew"
            raise UserError(
                f"the state of step {step} is not on disk in {self._directory} ({self._problem}); "
                f"once that is mended, the same command {then}"
            )

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

    def _tell(self, text: str) -> None:
        if distributed.is_main_process():
            self.tell(text)


def _listed(damaged: dict[int, str]) -> str:
    """'checkpoint 40 is damaged (why)', for several steps."""
    return ", ".join(f"checkpoint {step} is damaged ({why})" for step, why in damaged.items())


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
    step_folder.hush()
    if (_absolute(path) / CONVERTED).exists():
        return _load_converted(Path(_absolute(path)), abstract_params, subtree)
    folder = newest(path)
    with _named(folder):
        manifest = step_folder.read_manifest(folder)
        stored = step_folder.read_shapes(folder, manifest).get(subtree)
        if not stored:
            raise UserError(f"checkpoint {folder} has no {subtree}")
        if abstract_params is None:
            wanted = jax.tree.map(lambda _: np.ndarray, stored)
            return _load_verified(folder, manifest, {subtree: wanted})[subtree]
        _fits(folder, {subtree: stored}, {subtree: abstract_params}, partial=True)
        # To orbax, a numpy array (this one takes no memory) means "numpy, of this dtype", and a
        # shape without a sharding means the devices of the machine that wrote the checkpoint.
        flat = flatten(stored)
        wanted = {
            path: jax.ShapeDtypeStruct(x.shape, flat[path].dtype, sharding=x.sharding)
            if x.sharding
            else np.broadcast_to(np.zeros((), flat[path].dtype), x.shape)
            for path, x in flatten(abstract_params).items()
        }
        loaded = _load_verified(folder, manifest, {subtree: nest(wanted)})[subtree]
    return jax.tree.map(lambda x, like: x.astype(like.dtype), loaded, abstract_params)


def _load_verified(folder: epath.Path, manifest: Any, wanted: Any) -> Any:
    """A part of a state with the dtypes that it was saved with. Raises Damaged."""
    state = step_folder.read(folder, ocp.load, wanted, checkpointable_name="state")
    step_folder.verify(manifest, state)
    return state


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
    _fits(folder, {subtree: nest(stored)}, {subtree: abstract}, partial=True)

    def place(path, wanted):
        array = stored[path]
        if wanted.sharding is None:
            return np.array(array, wanted.dtype)
        read = lambda index: np.array(array[index], wanted.dtype)  # noqa: E731
        return jax.make_array_from_callback(wanted.shape, wanted.sharding, read)

    return nest({path: place(path, wanted) for path, wanted in flatten(abstract).items()})


def init_state_from(
    path: str | os.PathLike, state: Any, abstract: Any, renewed: Collection[str] = ()
) -> tuple[Any, list[str]]:
    """The first state of a run, with parameters and teacher of another checkpoint.

    What the checkpoint does not have stays as it is in `state`: a new head. A teacher's leaf that
    it does not have, because its teacher shared it or because it has no teacher, is its student's.

    Args:
      path: as of `load_params`.
      state: a state with `params` and `teacher`, nested dicts.
      abstract: its shapes and shardings.
      renewed: parts ('task') that stay as they are in `state`, too.

    Returns:
      The state, and the paths of parameters that are new.

    Raises:
      UserError: as `load_params`; or nothing in the checkpoint is of this model.
    """
    have = {x for x in held_paths(path, "params") if x.partition("/")[0] not in renewed}
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
    step_folder.hush()
    if (_absolute(path) / CONVERTED).exists():
        return set(_names(SafeTensors(Path(_absolute(path)) / CONVERTED), subtree))
    folder = newest(path)
    with _named(folder):
        stored = step_folder.read_shapes(folder, step_folder.read_manifest(folder))
    return set(flatten(stored.get(subtree) or {}))


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
    scheme, colon, name = str(path).partition(":")
    if scheme != "reference" or not colon:  # a folder may be called 'reference'
        misspelt = difflib.get_close_matches(scheme.lower(), ["reference"], cutoff=0.8)
        if colon and misspelt and not os.path.exists(path):
            raise UserError(f"{path} does not exist; did you mean 'reference:{name}'?")
        return path
    folder = Path(__file__).parents[1] / "reference"
    names = sorted(found.parent.name for found in folder.glob(f"*/{CONVERTED}"))
    if name not in names:
        raise UserError(f"{path}: no reference weights '{name}'{nearest(name, names)}")
    return folder / name


def _absolute(path: str | os.PathLike) -> epath.Path:
    path = epath.Path(located(path))
    return path if "://" in str(path) else path.expanduser().resolve()


def newest(path: str | os.PathLike) -> epath.Path:
    """The folder of the newest step in a workdir or its checkpoints; a step's folder as it is.

    Raises UserError: there is none, or it is incomplete.
    """
    path = _absolute(path)
    if (path / "state").exists():
        return path
    for root in (path / "checkpoints", path):
        if steps := step_folder.steps(root):
            folder = root / str(max(steps))
            with _named(folder):
                if not steps[max(steps)]:
                    raise Damaged("it is incomplete")
            return folder
    raise UserError(f"no checkpoint at {path}")


@contextlib.contextmanager
def _named(folder: epath.Path) -> Iterator[None]:
    """Says which folder is damaged, and which one to read instead; nothing is renamed."""
    try:
        yield
    except Damaged as error:
        problem = str(error)
    else:
        return
    others = [s for s, whole in step_folder.steps(folder.parent).items() if whole]
    before = [step for step in others if folder.name.isdecimal() and step < int(folder.name)]
    hint = f"; the one before it is {folder.parent / str(before[-1])}" if before else ""
    raise UserError(f"checkpoint {folder} is damaged ({problem}){hint}")


def _fits(folder: epath.Path, stored: Any, wanted: Any, partial: bool = False) -> None:
    """`step_folder.compare`, whose `UserError` names the folder."""
    try:
        step_folder.compare(stored, wanted, partial)
    except UserError as error:
        raise UserError(f"checkpoint {folder} {error}") from None
