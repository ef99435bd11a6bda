"""data2vec 1.0 and 2.0 in JAX."""

__version__ = "0.1.0"
