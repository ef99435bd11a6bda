"""What data2vec needs to know about one kind of signal.   B batch, T tokens, D width.

A modality is one folder with one record, `MODALITY`. To add EEG, music or video, add a folder and a
config file: nothing else changes.
"""

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import flax.linen as nn
import jax
import numpy as np

from data2vec_jax.errors import UserError, check_section, nearest

Batch = Mapping[str, jax.Array]
Options = Mapping[str, Any]
FROZEN: Options = MappingProxyType({})
NAMES = ("speech", "vision", "text")


class Tokens(NamedTuple):
    """Output of a front end: x [B, T, D] and valid, bool [B, T] or None (no padding)."""

    x: jax.Array
    valid: jax.Array | None = None


class Examples(Protocol):
    """The examples of one split, random access by example id (their index).

    buckets: static lengths, ascending. bucket_of: int array [N], index of each example's bucket or
    -1 (left out). kept, total: units (samples, tokens) that one epoch uses, and that it has.
    """

    buckets: Sequence[int]
    bucket_of: np.ndarray

    def load(self, index: int, bucket: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Arrays of one example, of the bucket's static shapes."""

    def example(self, bucket: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and types of what `load` returns, without any data."""

    def lost(self) -> float:
        """Share of the data that padding, cropping or leaving out costs in an epoch."""


@dataclass(frozen=True)
class Modality:
    """One kind of signal.

    model: the linen module, built from config section `model`; it has the methods
      `features(batch, key) -> Tokens`, `encode(tokens, mask, key, record, collect) -> Encoded`,
      `predict(x) -> x` and `mask_shape(batch) -> T or grid`.
    examples: config section `data.examples` -> Examples of a split.
    corrupt: (batch, mask, key, model) -> what the student sees, where masks change the *input*
      (text); None where they change the features.
    shares_features: the teacher consumes the student's own unmasked features (speech).
    """

    name: str
    model: Callable[..., nn.Module]
    examples: Callable[..., Examples]
    corrupt: Callable[..., Batch] | None = None
    shares_features: bool = False


def get(name: str) -> Modality:
    """The record of the modality `name`."""
    if name not in NAMES:
        raise UserError(f"config.modality: no modality '{name}'{nearest(name, NAMES)}")
    return importlib.import_module(f"data2vec_jax.modalities.{name}.modality").MODALITY


def build(
    module: Callable[..., Any], section: str, options: Mapping[str, Any], **given: Any
) -> Any:
    """`module(**options, **given)` after checking the keys of the config section."""
    check_section(section, options, module, given=given)
    return module(**options, **given)
