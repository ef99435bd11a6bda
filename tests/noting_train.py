"""The trainer, which also notes the examples of each step.

    python tests/noting_train.py FILE PAUSE OPTIONS...

Process p appends to FILE.p, for each step, [step, [[first row, example ids], ...]] of the rows that
its devices hold. It pauses PAUSE seconds before a step, so that a test has time to interrupt.
"""

import json
import sys
import time

import jax

from data2vec_jax import train
from data2vec_jax.core.run import Run


def noting(program, path, pause):
    """`Run.program`, whose programs note what they are given before they run."""

    def wrapped(run, batch):
        compiled = program(run, batch)

        def step(state, batch):
            shards = batch["example_id"].addressable_shards
            rows = [[s.index[0].start or 0, jax.device_get(s.data).tolist()] for s in shards]
            with open(f"{path}.{jax.process_index()}", "a") as file:
                file.write(json.dumps([int(jax.device_get(state.step)) + 1, rows]) + "\n")
            time.sleep(pause)
            return compiled(state, batch)

        return step

    return wrapped


if __name__ == "__main__":
    Run.program = noting(Run.program, sys.argv[1], float(sys.argv[2]))
    train.main(["train", *sys.argv[3:]])
