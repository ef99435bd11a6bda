"""data2vec 1.0 and 2.0 in JAX."""

from typing import Any

__version__ = "0.1.0"


def load(path: Any) -> Any:
    """Opens a checkpoint as a callable; see `data2vec_jax.convert.loaded.load`."""
    from data2vec_jax.convert import loaded  # it is heavy, and most users train

    return loaded.load(path)
