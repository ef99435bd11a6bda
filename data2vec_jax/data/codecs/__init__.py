"""How signals are read from files and records: one module for each kind, with its `codec()`."""

from data2vec_jax.data.codecs.base import Codec, unreadable

__all__ = ["Codec", "unreadable"]
