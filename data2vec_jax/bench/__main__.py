"""Speed of the train step, and of the same step in PyTorch beside it.

    python -m data2vec_jax.bench --config=configs/speech_v1.py:base [--peer] [--sweep] \
        [--batch=N] [--json=FILE]

The program is the one that `train` runs, on random input of the config's longest examples. --batch:
examples of all devices; by default a sixteenth of the config's batch per accelerator (the papers'
batches are of 16), on a CPU 2 examples (4 of text) and no more than 10 seconds of speech. --peer:
the step of `peer.py` in the same run, block by block in turn. --sweep: what time and memory do as
batch, length, depth, width and clones grow.
"""

from data2vec_jax.bench.benchmark import main

if __name__ == "__main__":
    main()
