"""Compiles the train step for TPUs or GPUs that you do not have, on a machine with CPUs alone.

    python -m data2vec_jax.plan --config=vision_v2:huge --topology=v5e:16x16
        [--slices=2] [--json=FILE]
    python -m data2vec_jax.plan --config=vision_v2:huge --topology=h100:8x4

A topology is a TPU slice, or cards of a machine and machines: a100, h100, h200. Says whether the
step fits, what fills the memory, what is sent between chips, and how long a step should take. The
program is the one that `train` runs; no data is read. The compilers are packages: libtpu, and JAX's
CUDA plugin (`pip install 'jax[cuda13]'`); without them only what arithmetic can tell is said.
"""

import sys
from collections.abc import Sequence

from data2vec_jax.cli.arguments import config_words, parse
from data2vec_jax.cli.output import run_main, write_json
from data2vec_jax.plan.planner import plan
from data2vec_jax.plan.report import report
from data2vec_jax.plan.topology import parse_topology, prepare_environment

OPTIONS = {"topology": "v5e:16x16", "slices": "2", "json": "FILE"}


def main(argv: Sequence[str] = sys.argv) -> None:
    """The command: see the module's docstring."""

    def command():
        prepare_environment()
        config, values = parse(argv, OPTIONS, required=("topology",))
        topology = parse_topology(values["topology"], values["slices"])
        result = {"config": config_words(argv)} | plan(config, topology)
        print(report(result))
        if values["json"]:
            write_json(values["json"], result)

    run_main(command)


if __name__ == "__main__":
    main()
