"""Corpora -> checked ArrayRecord shards with a manifest: `python -m data2vec_jax.prepare`."""
