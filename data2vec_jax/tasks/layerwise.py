"""Layer-wise rates for fine-tuning: the deeper a block is below the head, the slower it learns.

L blocks. Layer ids (conversion spec 2.1): 0 before the blocks, i + 1 for block i, L + 1 for
what comes after them or is shared by them. The factor of a layer's rate is decay^(L + 1 - id).
"""

from collections.abc import Iterable, Sequence
from typing import Annotated, Any, NamedTuple

import jax

from data2vec_jax.core.config import Range
from data2vec_jax.core.errors import UserError
from data2vec_jax.core.state import matches, path_name
from data2vec_jax.modalities.contract import EMBEDDING_PARAMS

BLOCKS = r"(^|/)blocks/"  # stacked: the first axis of each array is the block
# 1-D parameters, biases, positions and the class token; the mask token and tables of biases decay.
NO_DECAY = (r"(/|q_|v_)bias$", r"scale\d?$", r"(^|/)class_token$", r"(^|/)positions$")

Rates = list[tuple[str, float | tuple[float, ...]]]


class Row(NamedTuple):
    """One parameter of one layer. block: its index in the stack, None outside of the blocks."""

    path: str
    block: int | None
    layer: int
    factor: float
    decays: bool


def layer_rates(
    depth: int,
    decay: Annotated[float, Range(above=0, most=1)],
    slow_embeddings: bool = True,
    embeddings: str = EMBEDDING_PARAMS,
) -> Rates:
    """(path pattern, factor) pairs, the first match counts, 1 where none does: for `optim.rates`.

    The factor of stacked blocks is a tuple, one number a block. slow_embeddings: the parameters
    `embeddings` (path pattern: patches and positions) are layer 0, as in 1.0 (BEiT); data2vec 2.0
    lets them learn at the full rate (conversion spec 2.2).
    """
    rates: Rates = [(BLOCKS, tuple(decay ** (depth - i) for i in range(depth)))]
    return rates + ([(embeddings, decay ** (depth + 1))] if slow_embeddings else [])


def table(
    params: Any,
    depth: int,
    decay: float,
    *,
    slow_embeddings: bool = True,
    no_decay: Sequence[str] = NO_DECAY,
    embeddings: str = EMBEDDING_PARAMS,
) -> list[Row]:
    """Layer, factor of the rate and weight decay of every parameter (arrays or their shapes).

    no_decay: path patterns of parameters without weight decay. The others: see `layer_rates`.
    Raises UserError: the blocks are not `depth`.
    """
    rates = layer_rates(depth, decay, slow_embeddings, embeddings)
    rows = []
    for key_path, array in jax.tree_util.tree_leaves_with_path(params):
        path = path_name(key_path)
        decays = not matches(no_decay, path)
        factor = next((f for pattern, f in rates if matches((pattern,), path)), 1.0)
        if isinstance(factor, tuple):
            if array.shape[0] != depth:
                raise UserError(f"{path}: {array.shape[0]} blocks, not {depth}")
            rows += [Row(path, i, i + 1, f, decays) for i, f in enumerate(factor)]
        else:
            first = slow_embeddings and matches((embeddings,), path)
            rows.append(Row(path, None, 0 if first else depth + 1, factor, decays))
    return rows


def notes(rows: Iterable[Row]) -> list[str]:
    """The table as lines of text, all blocks of a stacked parameter in one."""
    by_path: dict[str, list[Row]] = {}
    for row in rows:
        by_path.setdefault(row.path, []).append(row)
    lines = [f"{'parameter':<40} {'layer':>7} {'rate x':>21}  decay"]
    for path, parts in by_path.items():
        ends = parts[:1] if len(parts) == 1 else [parts[0], parts[-1]]
        layers = "-".join(str(row.layer) for row in ends)
        factors = " ... ".join(f"{row.factor:.4g}" for row in ends)
        lines.append(f"{path:<40} {layers:>7} {factors:>21}  {'yes' if parts[0].decays else 'no'}")
    return lines
