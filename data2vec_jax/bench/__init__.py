"""Speed of the train step: `python -m data2vec_jax.bench`."""
