"""Samplers by the name that a config gives them."""

import inspect
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from data2vec_jax.core.config import check_section, choose
from data2vec_jax.masking.blocks import blocks, cells, inverse_blocks, multiblock
from data2vec_jax.masking.sampler import Sampler, require
from data2vec_jax.masking.spans import block_spans, spans
from data2vec_jax.masking.tokens import independent, token_spans

KINDS: dict[str, Callable[..., Sampler]] = {
    "spans": spans,
    "token_spans": token_spans,
    "independent": independent,
    "block_spans": block_spans,
    "inverse_blocks": inverse_blocks,
    "blocks": blocks,
    "cells": cells,
    "multiblock": multiblock,
}


def make(kind: str, size: int | tuple[int, int], /, **options: Any) -> Sampler:
    """The sampler of a config section mask = dict(kind=..., ...) for T positions or a grid.

    A kind for rows takes a grid as one row of T = rows * columns. Raises `UserError` for an
    unknown kind or option, a missing or impossible value, or a kind that needs a grid.
    """
    choose("mask", {"kind": kind}, "kind", KINDS)
    factory = KINDS[kind]
    given = next(iter(inspect.signature(factory).parameters))
    check_section("mask", options, factory, given=(given,))
    is_grid = not isinstance(size, int | np.integer)
    if given == "grid":
        require(is_grid, "kind", f"'{kind}'", "for rows: it needs a grid of patches")
        return factory(tuple(int(n) for n in size), **options)
    return factory(math.prod(size) if is_grid else int(size), **options)
