"""Speed of the train step or of the data, and of the same in PyTorch beside it.

    python -m data2vec_jax.bench --config=speech_v1:base [--peer] [--sweep]
        [--batch=N] [--seconds=N] [--json=FILE]
    python -m data2vec_jax.bench --config=speech_v1:base --data-only --config.data.source=SOURCE
        [--peer] [--step_ms=N | --plan=FILE] [--batch=N] [--seconds=N] [--json=FILE]

The program is the one that `train` runs, on random input of the config's longest examples. --batch:
examples of all devices; by default a sixteenth of the config's batch per accelerator (the papers'
batches are of 16), on a CPU what the modality says (its record `bench`). --peer: the step of
`torch_baseline.py` in the same run, block by block in turn. --sweep: what time and memory do as
batch, length, depth, width and clones grow. --seconds: what all but the sweep may take (360); what
there is no time for is left out, and said to be.

--data-only: no step; how fast the config's own examples become batches on the device, on one core
and on all. --peer: PyTorch's DataLoader with the same files, in turn. --step_ms: of a step on a
batch of one device, or --plan, what `plan --json` wrote: how many cores feed that device.
"""

import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data2vec_jax.bench.benchmark import bench
from data2vec_jax.bench.loader import bench_loader, feeding, report_loader
from data2vec_jax.bench.report import report
from data2vec_jax.bench.subject import default_rows
from data2vec_jax.bench.sweep import sweep
from data2vec_jax.cli.arguments import config_words, parse
from data2vec_jax.cli.output import run_main, say, write_json
from data2vec_jax.core.errors import UserError
from data2vec_jax.core.files import read_json

OPTIONS = {"peer": "", "sweep": "", "batch": "N", "seconds": "N", "json": "FILE"}
DATA_OPTIONS = {"data-only": "", "step_ms": "N", "plan": "FILE"}


def main(argv: Sequence[str] = sys.argv) -> None:
    """The command: see the module's docstring."""

    def command():
        config, values = parse(argv, OPTIONS | DATA_OPTIONS, required=())
        rows, seconds = values["batch"], values["seconds"]
        for name in ("batch", "seconds", "step_ms"):
            value = values[name]
            if value is not None and not re.fullmatch(r"[1-9]\d{0,6}", value):
                raise UserError(f"--{name}={value:.40} is not a number from 1 to 9,999,999")
        given = [name for name in DATA_OPTIONS if values[name]]
        if given not in ([], ["data-only"], ["data-only", "step_ms"], ["data-only", "plan"]):
            raise UserError(f"--{given[-1]}: with --data-only, and one of --step_ms and --plan")
        if values["data-only"] and values["sweep"]:
            raise UserError("--sweep: of steps, so not with --data-only")
        step = step_of(values) if given[1:] else None
        if values["peer"]:  # both share a GPU's memory
            os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        options = {"rows": rows and int(rows), "say": say}
        result = {"config": config_words(argv)}
        limit = {"seconds": float(seconds)} if seconds else {}
        limit["peer"] = bool(values["peer"])
        if values["data-only"]:
            rows = options.pop("rows") or default_rows(config)
            config["data"] |= {"batch_size": rows, "rows_multiple_of": None}
            result |= bench_loader(config, **limit, say=say)
            if step:
                result["feeds"] = feeding(result, step[0], step[1] or rows)
            print(report_loader(result))
        else:
            result |= bench(config, **options, **limit)
            if values["sweep"]:
                result["sweep"] = sweep(config, **options)
            print(report(result))
        if values["json"]:
            write_json(values["json"], result)

    run_main(command)


def step_of(values: Mapping[str, Any]) -> tuple[float, float | None]:
    """Seconds of a step and rows of a device, as --step_ms or --plan say; None for those of the
    benchmark. Raises UserError: the plan has no time of a step."""
    if values["step_ms"]:
        return int(values["step_ms"]) / 1e3, None
    plan = read_json(Path(values["plan"]))
    try:
        return float(plan["step_seconds_estimate"]), plan["batch_size"] / plan["devices"]
    except (KeyError, TypeError, ValueError):
        text = "has no time of a step; write it by `plan --json` of what fits"
        raise UserError(f"--plan={values['plan']}: {text}") from None


if __name__ == "__main__":
    main()
