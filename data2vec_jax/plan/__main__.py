"""Compiles the train step for a TPU slice that you do not have, on a machine with nothing but CPUs.

    python -m data2vec_jax.plan --config=configs/vision_v2.py:huge --topology=v5e:16x16 \
        [--slices=2] [--json=FILE]

Says whether the step fits, what fills the memory, what is sent between chips, and how long a step
should take. The program is the one that `train` runs; no data is read. libtpu, which compiles it,
is a package (`pip install libtpu`); without it only what arithmetic can tell is said.
"""

from data2vec_jax.plan.planner import main

if __name__ == "__main__":
    main()
