"""Compiles the train step for TPUs that are not there: `python -m data2vec_jax.plan`."""
