"""The mechanism of conversion tables: rows of (their names, our path, change), read both ways.

Their side is a flat dict of arrays, name -> array. Ours is the tree of parameters, nested dicts
whose path is written 'encoder/blocks/up/kernel'. A name may hold two placeholders:

{l}  a layer: their arrays of all layers are one array of ours, stacked on a leading axis
{i}  a number that stands in both names

L layers, D width, F, A, Z other sizes.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from data2vec_jax.errors import UserError

State = dict[str, np.ndarray]
Tree = dict[str, Any]


class Change(NamedTuple):
    """How arrays differ: (their arrays) -> ours, and ours -> (their arrays). Loses nothing."""

    to_ours: Callable[[Sequence[np.ndarray]], np.ndarray]
    to_theirs: Callable[[np.ndarray], Sequence[np.ndarray]]


def _axes(*order: int) -> Change:
    """A permutation of axes, given from theirs to ours."""
    back = np.argsort(order)
    return Change(lambda x: x[0].transpose(order), lambda x: [x.transpose(back)])


def _lead(count: int) -> Change:
    """Theirs has `count` leading axes of size 1."""
    return Change(lambda x: x[0][(0,) * count], lambda x: [x[(None,) * count]])


SAME = Change(lambda x: x[0], lambda x: [x])
LINEAR = _axes(1, 0)  # [out, in] -> [in, out]
CONV1D = _axes(2, 1, 0)  # [out, in / groups, taps] -> [taps, in / groups, out]
CONV2D = _axes(2, 3, 1, 0)  # [out, in, rows, columns] -> [rows, columns, in, out]
LEAD1, LEAD2 = _lead(1), _lead(2)  # [1, A, D] -> [A, D]; [1, 1, D] -> [D]
# Queries, keys and values: three arrays of theirs are thirds of the last axis of ours.
FUSED_LINEAR = Change(
    lambda x: np.concatenate([a.T for a in x], axis=1),
    lambda x: [a.T for a in np.split(x, 3, axis=1)],
)
FUSED_BIAS = Change(np.concatenate, lambda x: np.split(x, 3))


@dataclass(frozen=True)
class Row:
    """Their name (or names, if several arrays make one of ours), our path, and the change."""

    theirs: str | tuple[str, ...]
    ours: str
    change: Change = SAME

    @property
    def names(self) -> tuple[str, ...]:
        """Their names, always as a tuple."""
        return (self.theirs,) if isinstance(self.theirs, str) else self.theirs

    @property
    def stacked(self) -> bool:
        """Whether ours has a leading axis of layers."""
        return "{l}" in self.names[0]


@dataclass(frozen=True)
class Table:
    """Rows, and what happens on reading to names that are in none.

    ignored: regular expressions of names that hold nothing of a model (index tables, versions).
    aliases: (regular expression, replacement), names of older files; applied before the rows.
    """

    rows: Sequence[Row]
    ignored: Sequence[str] = ()
    aliases: Sequence[tuple[str, str]] = ()


def inside(table: Table, prefix: str) -> Table:
    """The part of `table` below `prefix`, with their names as seen from there."""
    rows = []
    for row in table.rows:
        if all(name.startswith(prefix) for name in row.names):
            names = tuple(name.removeprefix(prefix) for name in row.names)
            rows.append(Row(names, row.ours, row.change))
    return Table(rows, table.ignored)


def linear(theirs: str, ours: str) -> list[Row]:
    """Rows of a linear layer."""
    return [
        Row(f"{theirs}.weight", f"{ours}/kernel", LINEAR),
        Row(f"{theirs}.bias", f"{ours}/bias"),
    ]


def norm(theirs: str, ours: str) -> list[Row]:
    """Rows of a layer norm."""
    return [Row(f"{theirs}.weight", f"{ours}/scale"), Row(f"{theirs}.bias", f"{ours}/bias")]


def conv1d(theirs: str, ours: str) -> list[Row]:
    """Rows of a 1-D convolution."""
    return [
        Row(f"{theirs}.weight", f"{ours}/kernel", CONV1D),
        Row(f"{theirs}.bias", f"{ours}/bias"),
    ]


def head(theirs: str, ours: str, depth: int = 8) -> list[Row]:
    """Rows of linear layers in a sequence with activations between them: numbers 0, 2, 4, ..."""
    return [row for i in range(depth) for row in linear(f"{theirs}.{2 * i}", f"{ours}/linear{i}")]


def _pattern(name: str) -> re.Pattern:
    """Matches `name` with numbers for its placeholders, as groups 'l' and 'i'."""
    parts = re.split(r"(\{[li]\})", name)
    return re.compile(
        "".join(f"(?P<{p[1]}>[0-9]+)" if p in ("{l}", "{i}") else re.escape(p) for p in parts)
    )


def _fill(name: str, numbers: Mapping[str, int]) -> str:
    for placeholder, number in numbers.items():
        name = name.replace("{" + placeholder + "}", str(number))
    return name


def _numbers(name: str, candidates: Sequence[str]) -> list[dict[str, int]]:
    """The numbers that stand for the placeholders of `name` among `candidates`, ascending."""
    pattern = _pattern(name)
    found = [m.groupdict() for c in candidates if (m := pattern.fullmatch(c))]
    found = [{k: int(v) for k, v in groups.items()} for groups in found]
    return sorted(found, key=lambda n: (n.get("i", 0), n.get("l", 0)))


def read(table: Table, state: Mapping[str, np.ndarray]) -> Tree:
    """Their arrays -> our tree. Rows whose names are absent are left out.

    Raises UserError for names that the table does not know, and for layers that are missing.
    """
    for alias, name in table.aliases:
        state = {re.sub(alias, name, key): array for key, array in state.items()}
    left, tree = dict(state), {}

    def take(name):
        if name not in left:
            raise UserError(f"the weights lack '{name}'")
        return left.pop(name)

    for row in table.rows:
        layers: dict[str, list[np.ndarray]] = {}
        for numbers in _numbers(row.names[0], list(left)):
            path = _fill(row.ours, numbers)
            parts = layers.setdefault(path, [])
            if numbers.get("l", 0) != len(parts):
                raise UserError(f"the weights lack '{_fill(row.names[0], {'l': len(parts)})}'")
            parts.append(row.change.to_ours([take(_fill(name, numbers)) for name in row.names]))
        for path, parts in layers.items():
            array = np.stack(parts) if row.stacked else np.ascontiguousarray(parts[0])
            *folders, leaf = path.split("/")
            node = tree
            for folder in folders:
                node = node.setdefault(folder, {})
            node[leaf] = array
    unknown = [key for key in left if not any(re.search(p, key) for p in table.ignored)]
    if unknown:
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        raise UserError(f"the weights have '{unknown[0]}'{more}, which this layout does not know")
    return tree


def flatten(tree: Mapping[str, Any], prefix: str = "") -> State:
    """{'a': {'b': x}} -> {'a/b': x}."""
    flat = {}
    for name, value in tree.items():
        path = f"{prefix}{name}"
        flat |= flatten(value, f"{path}/") if isinstance(value, Mapping) else {path: value}
    return flat


def write(table: Table, tree: Mapping[str, Any]) -> State:
    """Our tree -> their arrays, in the order of the rows: the inverse of `read`.

    Raises UserError for parameters that the layout cannot hold.
    """
    left, state = {path: np.asarray(array) for path, array in flatten(tree).items()}, {}
    for row in table.rows:
        for numbers in _numbers(row.ours, list(left)):
            array = left.pop(_fill(row.ours, numbers))
            layers = enumerate(array) if row.stacked else [(0, array)]
            for layer, part in layers:
                theirs = row.change.to_theirs(part)
                for name, value in zip(row.names, theirs, strict=True):
                    state[_fill(name, numbers | {"l": layer})] = np.ascontiguousarray(value)
    if left:
        raise UserError(f"this layout has no place for '{next(iter(left))}'")
    return state
