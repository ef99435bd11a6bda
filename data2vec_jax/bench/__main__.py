"""Speed of the train step, and of the same step in PyTorch beside it.

    python -m data2vec_jax.bench --config=speech_v1:base [--peer] [--sweep]
        [--batch=N] [--seconds=N] [--json=FILE]

The program is the one that `train` runs, on random input of the config's longest examples. --batch:
examples of all devices; by default a sixteenth of the config's batch per accelerator (the papers'
batches are of 16), on a CPU what the modality says (its record `bench`). --peer: the step of
`torch_baseline.py` in the same run, block by block in turn. --sweep: what time and memory do as
batch, length, depth, width and clones grow. --seconds: what all but the sweep may take (360); what
there is no time for is left out, and said to be.
"""

import os
import re
import sys
from collections.abc import Sequence

from data2vec_jax.bench.benchmark import bench
from data2vec_jax.bench.report import report
from data2vec_jax.bench.sweep import sweep
from data2vec_jax.cli.arguments import config_words, parse
from data2vec_jax.cli.output import run_main, say, write_json
from data2vec_jax.core.errors import UserError

OPTIONS = {"peer": "", "sweep": "", "batch": "N", "seconds": "N", "json": "FILE"}


def main(argv: Sequence[str] = sys.argv) -> None:
    """The command: see the module's docstring."""

    def command():
        config, values = parse(argv, OPTIONS, required=())
        rows, seconds = values["batch"], values["seconds"]
        for name, value in (("batch", rows), ("seconds", seconds)):
            if value is not None and not re.fullmatch(r"[1-9]\d{0,6}", value):
                raise UserError(f"--{name}={value:.40} is not a number from 1 to 9,999,999")
        if values["peer"]:  # both share a GPU's memory
            os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        options = {"rows": rows and int(rows), "say": say}
        result = {"config": config_words(argv)}
        limit = {"seconds": float(seconds)} if seconds else {}
        result |= bench(config, peer=bool(values["peer"]), **options, **limit)
        if values["sweep"]:
            result["sweep"] = sweep(config, **options)
        print(report(result))
        if values["json"]:
            write_json(values["json"], result)

    run_main(command)


if __name__ == "__main__":
    main()
