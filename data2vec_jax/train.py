"""The training loop.

    python -m data2vec_jax.train --config=configs/speech_v1.py:base --workdir=DIR

The same command again resumes. `--config.section.key=value` overrides an option.
`--start=CHECKPOINT`: a new run begins with parameters and teacher of another workdir, or of a
folder that `python -m data2vec_jax.convert ... --to=jax` wrote. `config.task` names what is
trained: a module of `data2vec_jax.tasks` (pretraining if it names none).
"""

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from ml_collections import config_flags

import data2vec_jax
from data2vec_jax import metrics, optim, parallel, processes
from data2vec_jax.checkpoints import Checkpoints, begin_from
from data2vec_jax.errors import STOPPED, UserError, check_section, differences, nearest, run_main
from data2vec_jax.state import TrainState, ema_decay
from data2vec_jax.tasks.task import Task, init_state, make_train_step, module_of

# Sections that may change between a run and its continuation: where and how fast, not what.
FREE = (
    "mesh", "sharding", "checkpoint", "log_every", "eval_every", "workers", "prefetch", "collapse",
)  # fmt: skip
OPTIONS = {"workdir": "DIR", "start": "CHECKPOINT"}  # of the command line, beside --config


def check_config(config: Mapping[str, Any]) -> None:
    """Refuses unknown or missing options before anything is read or compiled."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            continue
        if key in ("total_steps", "accumulate") and (not isinstance(value, int) or value < 1):
            raise UserError(f"config.{key}: {value} is not a positive integer")
    module = module_of(config)
    try:
        check_section("", config, module.settings)
    except UserError as error:
        raise UserError(
            str(error).replace("config..", "config.").replace("config.:", "config:")
        ) from None
    check_section("mesh", config["mesh"], parallel.make_mesh, given=("devices",))
    check_section("sharding", config.get("sharding", {}), parallel.shardings, ("tree", "mesh"))
    check_section("optim", config["optim"], optim.make_optimizer, given=("schedule",))
    schedule = dict(config["schedule"])
    kind = optim.SCHEDULES.get(schedule.pop("kind", None), optim.make_schedule)
    if kind is not optim.make_schedule:
        check_section("schedule", schedule, kind, given=("total_steps",))
    check_section("checkpoint", config["checkpoint"], Checkpoints, given=("directory",))
    if "ema" in config:
        check_section("ema", config["ema"], ema_decay, given=("total_steps",))
    check_section("collapse", config.get("collapse", {}), metrics.CollapseMonitor)


class Run:
    """A task, its optimiser and its programs on a mesh: what train, demo and tests share.

    One program is compiled per shape of batch, ahead of time, so a second compilation of the same
    shape cannot happen. `programs` are those of a run that differs in nothing but its seed.
    """

    def __init__(
        self, config: Mapping[str, Any], task: Task, mesh: jax.sharding.Mesh,
        programs: dict[Any, Callable] | None = None,
    ):  # fmt: skip
        self.config, self.task, self.mesh = config, task, mesh
        self.programs = {} if programs is None else programs
        steps = config["total_steps"]
        schedule = optim.make_schedule(steps, **config["schedule"])
        self.tx = optim.make_optimizer(schedule, **config["optim"])
        decay = ema_decay(steps, **config["ema"]) if task.averaged else None
        self.train_step = make_train_step(
            task, self.tx, decay, schedule, config["accumulate"], mesh.size
        )
        self.abstract = jax.eval_shape(lambda seed: self._init(jax.random.key(seed)), 0)
        places = parallel.shardings(self.abstract, mesh, **config.get("sharding", {}))
        self.abstract = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), self.abstract, places
        )
        self._jit_init = jax.jit(self._init, out_shardings=places)
        self._jit_step = jax.jit(self.train_step, donate_argnums=0, out_shardings=(places, None))

    def _init(self, key):
        return init_state(self.task, self.tx, key)

    def init(self, seed: int) -> TrainState:
        """The first state of a seed, sharded over the mesh."""
        with jax.set_mesh(self.mesh):
            return self._jit_init(jax.random.key(seed))

    def program(self, batch: Mapping[str, Any]) -> Callable:
        """The compiled train step for batches of this shape."""
        shape = tuple(sorted((k, v.shape, str(v.dtype)) for k, v in batch.items()))
        if shape not in self.programs:
            sharding = jax.sharding.NamedSharding(self.mesh, parallel.BATCH)
            abstract = {
                k: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=sharding)
                for k, v in batch.items()
            }
            with jax.set_mesh(self.mesh):
                self.programs[shape] = self._jit_step.lower(self.abstract, abstract).compile()
            processes.meet()  # one found it in its cache, another compiles for minutes
        return self.programs[shape]


def claim_workdir(workdir: Path, config: Mapping[str, Any]) -> None:
    """Writes config.json, or refuses a workdir that another config made."""
    path = workdir / "config.json"
    new = json.loads(json.dumps(config, sort_keys=True))
    if path.exists():
        try:
            old = json.loads(path.read_text())
        except ValueError:
            raise UserError(f"{path} is damaged; remove it, or choose another --workdir") from None
        different = [key for key in differences(old, new) if not set(key.split(".")) & set(FREE)]
        if different:
            raise UserError(
                f"{workdir} holds a run of another config (config.{different[0]} differs); "
                "choose another --workdir"
            )
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(new, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"cannot write to --workdir {workdir}: {error.strerror}") from None


def train(
    config: Mapping[str, Any], workdir: str | os.PathLike, *,
    programs: dict[Any, Callable] | None = None, verbose: bool = True, begin: str | None = None,
) -> TrainState:  # fmt: skip
    """Runs, or resumes, the run of `config` in `workdir`; returns the last state.

    programs: see `Run`. verbose: print the parameter table and notes on the data. begin: a new
    run's parameters and teacher are those of this checkpoint.

    Order of the loop: next batch, step, evals, log, save. So checkpoint k holds the state after k
    updates, and its position k is the number of the next unseen batch.
    """
    check_config(config)
    module, workdir = module_of(config), Path(workdir)
    config = module.complete(config, begin)
    total, log_every, eval_every = (
        config[key] for key in ("total_steps", "log_every", "eval_every")
    )
    mesh = parallel.make_mesh(**config["mesh"])
    with jax.set_mesh(mesh):
        task = module.make(config)
        run = Run(config, task, mesh, programs)
    processes.check_agreement({"order of the examples": task.order})
    first = processes.first()

    def claim():
        claim_workdir(workdir, config)
        task.save_assets(workdir)

    processes.on_first(claim)

    watch = metrics.Stopwatch()
    monitor = metrics.CollapseMonitor(**config.get("collapse", {}))
    with (
        jax.set_mesh(mesh),
        Checkpoints(workdir.resolve() / "checkpoints", **config["checkpoint"]) as checkpoints,
        processes.Interrupt() as interrupt,
    ):
        start = checkpoints.latest() or 0
        if start:
            state, position = checkpoints.restore(run.abstract)
            watch.load(position["stopwatch"])
        else:
            state = run.init(config["seed"])
            if begin:
                state, new = begin_from(begin, state, run.abstract)
                state = state.replace(params=task.adopt(state.params, new, begin))
                if first and verbose:
                    say(f"begins from {begin}; {len(new)} new parameters {new[:3] or ''}")
        if first and verbose:
            say(metrics.parameter_table(run.abstract.params))
            for note in task.notes:
                say(note)
            say(f"{mesh.size} devices, mesh {dict(mesh.shape)}; step {start:,} of {total:,}")

        mean = lambda values: float(np.dot(task.shares, values))  # noqa: E731
        throughput = metrics.Throughput(
            watch,
            batch_size=mean([s["example_id"].shape[0] for s in task.shapes]),
            flops_per_step=mean([task.flops(s) for s in task.shapes]),
            devices=mesh.devices.ravel(),
            start_step=start,
        )
        writer = metrics.Writer(
            workdir, total_steps=total, resume_step=start, enabled=first, rates=throughput.read
        )
        with writer:
            batches = task.data(start) if start < total else iter(())
            done, scalars = start, {}
            for done in range(start + 1, total + 1):
                with watch.measure("data"):
                    batch = next(batches)
                known = len(run.programs)
                with watch.measure("compile"):
                    program = run.program(batch)
                if first and len(run.programs) > known:
                    writer.note(f"compiled program {len(run.programs)} of {len(task.shapes)}")
                stop = interrupt.stops(done)
                save = checkpoints.should_save(done) or done == total or stop
                evaluate = done == total or (eval_every and done % eval_every == 0)
                evaluate = evaluate and bool(task.evals)
                with watch.measure("train"):
                    with jax.transfer_guard("disallow"):
                        state, scalars = program(state, batch)
                    written = writer.advance(done)
                    if log_every and (done % log_every == 0 or done in (1, total)):
                        written += writer.write(done, "train", scalars)
                    if save or evaluate:
                        written += writer.flush()
                if evaluate:
                    with watch.measure("eval"):
                        for name, evaluation in task.evals.items():
                            written += writer.write(done, name, evaluation(state))
                        written += writer.flush()
                for line in written:
                    for warning in monitor.check(line["step"], line):
                        writer.note(warning)
                if save:  # metrics up to step k are on disk before checkpoint k
                    with watch.measure("save"):
                        position = {"batch": done, "stopwatch": watch.state_dict()}
                        checkpoints.save(done, state, position, force=True)
                if stop:
                    break
        checkpoints.wait()
    processes.meet()  # the end of one process would be the end of all
    if done < total:
        if first:
            say(f"stopped after step {done:,} of {total:,}; the same command resumes")
        sys.exit(STOPPED)
    if first:
        say(f"done: {total:,} steps, {len(run.programs)} programs compiled, workdir {workdir}")
    return state


def say(text: str) -> None:
    """A line for the user; metrics go to files, and the progress bar to the same stream."""
    print(text, file=sys.stderr, flush=True)


def parse(
    argv: Sequence[str],
    options: Mapping[str, str] = OPTIONS,
    required: Sequence[str] = ("workdir",),
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(config, values of the other `options`) from the command line.

    options: name -> what it is, '' for a switch without a value. --help prints the command's
    docstring and ends it. Raises UserError for what absl would crash on.
    """
    if {"-h", "--help"} & set(argv):
        print((sys.modules["__main__"].__doc__ or __doc__).strip())
        sys.exit(0)
    values = flags.FlagValues()
    config_flags.DEFINE_config_file(
        "config", None, "config file, path.py:variant", flag_values=values
    )
    for name, meaning in options.items():
        define = flags.DEFINE_string if meaning else flags.DEFINE_bool
        define(name, None, meaning, flag_values=values)
    for option in argv:
        if option.startswith("--config="):
            check_config_file(Path(option.removeprefix("--config=").split(":")[0]))
    try:
        rest = values(list(argv))
        config = values.config
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        text = one_line(error)
        # ml_collections gives the name, at times quoted and with a hint, and no more.
        if text[0] in "\"'" or isinstance(error, KeyError):
            text = text.replace("\\n", "; ").replace("\\'", "").strip("\"'")
            text = f"the config has no option {text}"
        raise UserError(text) from None
    if len(rest) > 1:
        names = ", ".join(f"--{name}" for name in ("config", *options))
        raise UserError(f"unknown argument '{rest[1]}'; options are {names}")
    if config is None:
        raise UserError("--config=configs/NAME.py:VARIANT is missing")
    for name in required:
        if not values[name].value:
            raise UserError(f"--{name}={options[name]} is missing")
    return config.to_dict(), {name: values[name].value for name in options}


def check_config_file(path: Path) -> None:
    """Refuses a config file that is not there, and names the nearest that is."""
    if not path.is_file():
        beside = [str(p) for p in path.parent.glob("*.py")]
        raise UserError(f"no config file {path}{nearest(str(path), beside) if beside else ''}")


def config_words(argv: Sequence[str]) -> str:
    """The config of a command line, for the record: file, variant and what overrides it."""
    given = [option.removeprefix("--") for option in argv if option.startswith("--config")]
    return " ".join(given).removeprefix("config=")


def write_json(path: str, result: Mapping[str, Any]) -> None:
    """What --json=FILE asks for. Raises UserError: it cannot be written."""
    try:
        Path(path).write_text(json.dumps(result, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"--json={path}: {error.strerror}") from None


def one_line(error: Exception) -> str:
    """The first line of an error's message that says something; of a traceback in it, the last."""
    text = str(error.args[0] if isinstance(error, KeyError) and error.args else error)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if any(line.startswith("Traceback (most recent call last)") for line in lines):
        return lines[-1].removeprefix("ValueError: ")
    return lines[0] if lines else type(error).__name__


def main(argv: Sequence[str] = sys.argv) -> None:
    """The command: see the module's docstring."""

    def command():
        config, values = parse(argv)
        processes.start()
        versions = {"jax": jax.__version__, "data2vec_jax": data2vec_jax.__version__}
        processes.check_agreement({"config": config, **values, "version": versions})
        train(config, values["workdir"], begin=values["start"])

    with processes.failing_together():
        run_main(command)


if __name__ == "__main__":
    main()
