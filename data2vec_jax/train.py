"""The training loop.

    python -m data2vec_jax.train --config=speech_v1:base --workdir=DIR

The same command again resumes. `--config.section.key=value` overrides an option.
`--init_from=CHECKPOINT`: a new run begins with parameters and teacher of another workdir, or of a
folder that `python -m data2vec_jax.convert ... --to=jax` wrote. `--changed_corpus`: resume with
examples that are no longer those that the run began with. `config.task` names what is
trained: a module of `data2vec_jax.tasks` (pretraining if it names none).
"""

from data2vec_jax.core import notices

if __name__ == "__main__":  # what is imported below takes seconds
    notices.leave_at_once()

import contextlib
import dataclasses
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

import data2vec_jax
from data2vec_jax.cli.arguments import parse
from data2vec_jax.cli.output import run_main, say
from data2vec_jax.core import distributed, sharding
from data2vec_jax.core.bad_examples import KEY as BAD
from data2vec_jax.core.bad_examples import BadExamples, BadExamplesFile
from data2vec_jax.core.checkpoints import Checkpoints, init_state_from
from data2vec_jax.core.config import differences, with_current_names
from data2vec_jax.core.errors import STOPPED, UserError
from data2vec_jax.core.lock import exclusive
from data2vec_jax.core.run import Run
from data2vec_jax.core.state import TrainState
from data2vec_jax.core.task import Task
from data2vec_jax.metrics.collapse import CollapseConfig, CollapseMonitor, GoBack
from data2vec_jax.metrics.parameters import parameter_table
from data2vec_jax.metrics.skipped import SkippedUpdates
from data2vec_jax.metrics.throughput import (
    Stopwatch,
    Throughput,
    last_moment,
    process_start,
)
from data2vec_jax.metrics.writer import FILE, Writer
from data2vec_jax.models.layers import attention_by
from data2vec_jax.tasks.registry import check_config, task_module

# Sections that may change between a run and its continuation: where and how fast, not what.
CHANGEABLE_ON_RESUME = (
    "mesh",
    "sharding",
    "checkpoint",
    "log_every",
    "eval_every",
    "workers",
    "prefetch",
    "reader_timeout",
    "max_bad_share",
    "collapse",
    "max_in_a_row",
    "remat",
)


def as_json(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config as it is read back from a file."""
    return json.loads(json.dumps(config, sort_keys=True))


def check_same_run(workdir: Path, old: Any, config: Mapping[str, Any]) -> None:
    """Refuses to go on with another config than `old`, which a file of the run holds.

    Raises ValueError: `old` is no config at all.
    """
    if not isinstance(old, Mapping):
        raise ValueError("not a JSON object")
    different = [
        key
        for key in differences(with_current_names(old), as_json(config))
        if not set(key.split(".")) & set(CHANGEABLE_ON_RESUME)
    ]
    if different:
        raise UserError(
            f"{workdir} holds a run of another config (config.{different[0]} differs); "
            "choose another --workdir"
        )


def make_workdir(workdir: Path) -> None:
    """Makes the folder if it is missing. Refuses names that the library of checkpoints, orbax,
    cannot write to: it wants text, and finds its own files by a pattern that begins with the path.
    """
    try:
        path = str(workdir.resolve())
        path.encode()
        if special := re.search(r"[*?[]", path):
            raise UserError(
                f"cannot write to --workdir {workdir}: '{special[0]}' in {path} would stand for "
                "other names in a pattern, and no checkpoint could be read again; choose another"
            )
        workdir.mkdir(parents=True, exist_ok=True)
    except UnicodeEncodeError:
        shown = str(workdir).encode(errors="backslashreplace").decode()
        raise UserError(f"cannot write to --workdir {shown}: its name is not UTF-8") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in it
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot write to --workdir {workdir}: {reason}") from None


def claim_workdir(workdir: Path, config: Mapping[str, Any]) -> None:
    """Writes config.json, or refuses a workdir that another config made."""
    path = workdir / "config.json"
    text = json.dumps(as_json(config), indent=1) + "\n"
    try:
        if path.exists():
            before = path.read_text()
            check_same_run(workdir, json.loads(before), config)
            if before == text:
                return
        # Replaced in one move: a kill, or a full disk, leaves the old file or the new one.
        temporary = path.with_name(f"{path.name}.tmp")
        temporary.write_text(text)
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"cannot write to --workdir {workdir}: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise UserError(f"{path} is damaged; remove it, or choose another --workdir") from None


def resumed(
    run: Run, checkpoints: Checkpoints, watch: Stopwatch, workdir: Path, changed_corpus: bool
) -> tuple[TrainState, dict[str, Any]]:
    """The state and the position of the newest sound checkpoint.

    Raises UserError: there is none, or it is of another config, or of other examples.
    """
    state, position = checkpoints.restore(run.abstract)
    check_same_run(workdir, position.get("config", as_json(run.config)), run.config)
    before, now = position.get("order", run.task.order), run.task.order
    if before != now and not changed_corpus:
        raise UserError(
            f"{workdir}: the corpus has changed since step {position['batch']}: it was {before}; "
            f"now {now}; restore it, or go on with the new one: --changed_corpus"
        )
    try:
        watch.load(position["stopwatch"], last_moment(workdir))
    except (LookupError, TypeError, AttributeError):
        step = position["batch"]
        raise UserError(f"{workdir}: the position of checkpoint {step} is not ours") from None
    return state, position


def begun(run: Run, init_from: str | None, verbose: bool) -> TrainState:
    """The state of a new run, which may begin with the parameters of a checkpoint."""
    state = run.init(run.config["seed"])
    if init_from:
        renewed = run.task.renewed(init_from)
        state, new = init_state_from(init_from, state, run.abstract, renewed)
        state = state.replace(params=run.task.init_from(state.params, new, init_from))
        if verbose:
            say(f"initialised from {init_from}; {len(new)} new parameters {new[:3] or ''}")
            for part, why in renewed.items():
                say(f"{part} begins anew: {why}")
    return state


def back_to(step: int, problem: GoBack, workdir: Path, checkpoints: Checkpoints) -> None:
    """Puts what came after `step` under other names: checkpoints and lines of metrics."""
    names = checkpoints.set_aside_after(step)

    def keep_lines():
        try:
            copy = workdir / f"{FILE}.collapsed-{problem.step}"
            shutil.copy(workdir / FILE, copy)
        except OSError as error:
            raise UserError(f"{workdir / FILE}: {error.strerror}") from None
        kept = ", ".join([copy.name, *(f"checkpoints/{name}" for name in names)])
        say(f"warning: {problem}; what came after step {step:,} is kept as {kept}")

    distributed.on_first(keep_lines)


def end(run: Run, workdir: Path, done: int, notes: Sequence[str]) -> None:
    """Says `notes`, and how the run ended, after step `done`; exits if that is not its last."""
    distributed.barrier()  # the end of one process would be the end of all
    first, total = distributed.is_main_process(), run.config["total_steps"]
    for note in notes if first else ():
        say(note)
    if done < total:
        if first:
            nothing = f"stopped before the first of {total:,} steps; nothing was saved"
            some = f"stopped after step {done:,} of {total:,}; the same command resumes"
            say(some if done else nothing)
        sys.exit(STOPPED)
    if first:
        say(f"done: {total:,} steps, {len(run.programs)} programs compiled, workdir {workdir}")


def throughput_of(task: Task, mesh: jax.sharding.Mesh, watch: Stopwatch, start: int) -> Throughput:
    """The speed of a run that begins after update `start`."""
    return Throughput(
        watch,
        batch_size=task.mean([s["example_id"].shape[0] for s in task.shapes]),
        flops_per_step=task.mean([task.flops(s) for s in task.shapes]),
        devices=mesh.devices.ravel(),
        start_step=start,
    )


@dataclasses.dataclass(frozen=True)
class Instruments:
    """What measures, tells and writes down how a run goes."""

    watch: Stopwatch
    writer: Writer
    monitor: CollapseMonitor
    skipped: SkippedUpdates
    bad_examples: BadExamples

    def position(self, run: Run, step: int) -> dict[str, Any]:
        """What a checkpoint of `step` holds beside the state; metrics up to it are on disk."""
        position = {"batch": step, "stopwatch": self.watch.state_dict()}
        position |= {"metrics": self.writer.digest(), "config": as_json(run.config)}
        position |= {"order": run.task.order, "skipped": self.skipped.state_dict()}
        return position | {"collapse": self.monitor.saved(step)}


def take_steps(
    run: Run,
    state: TrainState,
    start: int,
    checkpoints: Checkpoints,
    instruments: Instruments,
    interrupt: distributed.Interrupt,
) -> tuple[TrainState, int, BaseException | None]:
    """The loop: updates after `start`, until the last one or a notice.

    Its order: next batch, step, evals, log, save. So checkpoint k holds the state after k updates,
    and its position k is the number of the next unseen batch.

    Returns the state, the number of completed updates, which is that of a checkpoint, and what
    ended the wait for the next batch: `Stopped`, or a `UserError`.

    Raises GoBack: the state has collapsed, see `CollapseMonitor.check`.
    """
    config, task = run.config, run.task
    watch, writer, monitor = instruments.watch, instruments.writer, instruments.monitor
    skipped, bad_examples = instruments.skipped, instruments.bad_examples
    total, log_every, eval_every = (
        config[key] for key in ("total_steps", "log_every", "eval_every")
    )

    def save(step):  # metrics up to step k are on disk before checkpoint k
        with watch.measure("save"):
            position = instruments.position(run, step)
            checkpoints.save(step, state, position, force=True, spared=monitor.spared)

    done, saved, problem = start, start, None
    batches = task.data(start) if start < total else iter(())
    for step in range(start + 1, total + 1):
        known = len(run.programs)
        try:
            with watch.measure("data"):
                batch = interrupt.wait(lambda: next(batches))
                bad_examples.add(batch.pop(BAD, ()))
            with watch.measure("compile"):
                program = interrupt.wait(lambda batch=batch: run.program(batch))
        except (distributed.Stopped, UserError) as error:
            problem = error
            break
        done = step
        if len(run.programs) > known:
            writer.note(f"compiled program {len(run.programs)} of {len(task.shapes)}")
        stop = interrupt.stops(done) or bad_examples.too_many
        due = checkpoints.should_save(done) or done == total or stop
        evaluate = done == total or (eval_every and done % eval_every == 0)
        evaluate = evaluate and bool(task.evals)
        with watch.measure("train"):
            with jax.transfer_guard("disallow"):
                state, scalars = program(state, batch)
            skipped.take(done, scalars, batch["example_id"])
            written = writer.advance(done)
            if log_every and (done % log_every == 0 or done in (1, total)):
                written += writer.write(done, "train", scalars)
            if due or evaluate:
                written += writer.flush()
                skipped.read(done)
        if evaluate:
            with watch.measure("eval"):
                for name, evaluation in task.evals.items():
                    written += writer.write(done, name, evaluation(state))
                written += writer.flush()
        for line in written:
            for warning in monitor.check(line["step"], line):
                writer.note(warning)
        if due:
            save(done)
            saved = done
            bad_examples.meet()
        if stop or bad_examples.too_many:
            break
    if isinstance(problem, UserError) and jax.process_count() > 1:
        raise problem  # the others are in the next step
    if problem and saved < done:
        writer.flush()
        skipped.read(done)
        save(done)
    if done > start:
        with watch.measure("save"):
            checkpoints.finish(done, state, instruments.position(run, done))
    return state, done, problem


def attempt(
    run: Run,
    state: TrainState,
    position: Mapping[str, Any],
    checkpoints: Checkpoints,
    monitor: CollapseMonitor,
    watch: Stopwatch,
    workdir: Path,
) -> TrainState:
    """From a checkpoint to the end of the run, or to a notice; raises what `take_steps` does."""
    task, start, first = run.task, position["batch"], distributed.is_main_process()
    throughput = throughput_of(task, run.mesh, watch, start)
    bad_file = BadExamplesFile(workdir, start) if first else None
    skipped = SkippedUpdates(bad_file, run.skip, position.get("skipped", {}))
    writer = Writer(
        workdir,
        total_steps=run.config["total_steps"],
        resume_step=start,
        resume_digest=position.get("metrics"),
        enabled=first,
        rates=lambda step: throughput.read(step) | skipped.read(step),
    )
    bad_examples = BadExamples(bad_file, task.size, task.max_bad_share, writer.note)
    instruments = Instruments(watch, writer, monitor, skipped, bad_examples)
    # Until here `notices` has answered: there was nothing to save.
    with (
        writer,
        distributed.Interrupt() as interrupt,
        watch.kept(workdir, first),
        watch.measure("other"),
    ):
        checkpoints.tell = skipped.tell = writer.note
        bad_examples.begin(task.bad)
        state, done, problem = take_steps(run, state, start, checkpoints, instruments, interrupt)
    bad_examples.check()  # after the save, so that nothing is lost
    if isinstance(problem, UserError):
        saved = f"; step {done:,} is saved, and the same command goes on from there"
        raise UserError(f"{problem}{saved if done else ''}")
    end(run, workdir, done, [*filter(None, [bad_examples.summary]), watch.account()])
    return state


def train(
    config: Mapping[str, Any],
    workdir: str | os.PathLike,
    *,
    programs: dict[Any, Callable] | None = None,
    verbose: bool = True,
    init_from: str | None = None,
    changed_corpus: bool = False,
    started: float | None = None,
) -> TrainState:
    """Runs, or resumes, the run of `config` in `workdir`; returns the last state.

    programs: see `Run`. verbose: print the parameter table and notes on the data. init_from: a new
    run's parameters and teacher are those of this checkpoint. changed_corpus: resume although the
    examples, or their order, are no longer those that the run began with. started: see `Stopwatch`.
    """
    check_config(config)
    module, workdir = task_module(config), Path(workdir)
    config = module.resolve_config(config, init_from)
    mesh = sharding.make_mesh(**config["mesh"])
    with jax.set_mesh(mesh):
        run = Run(config, module.make(config), mesh, programs)
    task = run.task
    distributed.check_agreement({"order of the examples": task.order})
    first = distributed.is_main_process()

    collapse, returns = CollapseConfig(**config.get("collapse", {})), 0
    alone = contextlib.ExitStack()  # until the end of the run

    def claim():
        make_workdir(workdir)
        alone.enter_context(exclusive(workdir))
        try:
            claim_workdir(workdir, config)
            task.save_assets(workdir)
        except BaseException:
            alone.close()
            raise

    distributed.on_first(claim)

    if first and verbose:
        for line in (parameter_table(run.abstract.params), *task.notes):
            say(line)
    with (
        alone,
        jax.set_mesh(mesh),
        Checkpoints(workdir.resolve() / "checkpoints", **config["checkpoint"]) as checkpoints,
    ):
        while True:  # again only where it goes back
            watch, started = Stopwatch(started), None
            if checkpoints.latest():
                with watch.measure("restore"):
                    state, position = resumed(run, checkpoints, watch, workdir, changed_corpus)
            else:
                state, position = begun(run, init_from, first and verbose), {"batch": 0}
                watch.load({}, last_moment(workdir))
            step, total = position["batch"], config["total_steps"]
            if first and verbose:
                where = f"{mesh.size} devices, mesh {dict(mesh.shape)}"
                say(f"{where}; attention by {attention_by()}; step {step:,} of {total:,}")
            monitor = CollapseMonitor(
                collapse, position.get("collapse", {"healthy": step}), returns=returns
            )
            run = run.at_rate(monitor.rate)
            try:
                return attempt(run, state, position, checkpoints, monitor, watch, workdir)
            except GoBack as problem:
                returns = monitor.returns + 1
                back_to(monitor.healthy, problem, workdir, checkpoints)


def main(argv: Sequence[str] = sys.argv) -> None:
    """The command: see the module's docstring."""

    def command():
        config, values = parse(argv)
        distributed.start()
        versions = {"jax": jax.__version__, "data2vec_jax": data2vec_jax.__version__}
        distributed.check_agreement({"config": config, **values, "version": versions})
        train(
            config,
            values["workdir"],
            init_from=values["init_from"],
            changed_corpus=bool(values["changed_corpus"]),
            started=process_start(),
        )

    with distributed.failing_together():
        run_main(command)


if __name__ == "__main__":
    main()
