"""The mechanism of conversion tables: rows of (their names, our path, change), read both ways.

Their side is a flat dict of arrays, name -> array. Ours is the tree of parameters, nested dicts
whose path is written 'encoder/blocks/up/kernel'. A name may hold two placeholders:

{l}  a layer: their arrays of all layers are one array of ours, stacked on a leading axis
{i}  a number that stands in both names

L layers, D width, F, A, Z other sizes.
"""

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from data2vec_jax.core.errors import UserError
from data2vec_jax.core.trees import flatten, nest

State = dict[str, np.ndarray]
Tree = dict[str, Any]


class Change(NamedTuple):
    """A lossless change of arrays: (their arrays) -> ours, and ours -> (their arrays)."""

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
    """One parameter in both layouts."""

    theirs: str | tuple[str, ...]
    """Their name, or names if several of their arrays make one of ours."""
    ours: str
    """Our path."""
    change: Change = SAME
    """Between their arrays and ours."""

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
    """Names of all parameters in one layout."""

    rows: Sequence[Row]
    """Parameters, in the order in which they are written."""
    ignored: Mapping[str, str] = field(default_factory=dict)
    """Regular expression of names that are no parameters -> the reason, for the report."""
    aliases: Sequence[tuple[str, str]] = ()
    """(regular expression, replacement): names in older files, replaced before the rows match."""


def inside(table: Table, prefix: str) -> Table:
    """The part of `table` below `prefix`, with their names as seen from there."""
    rows = []
    for row in table.rows:
        if all(name.startswith(prefix) for name in row.names):
            names = tuple(name.removeprefix(prefix) for name in row.names)
            rows.append(Row(names, row.ours, row.change))
    return Table(rows, table.ignored)


def below(table: Table, theirs: str, ours: str = "") -> list[Row]:
    """The rows of `table` with a prefix to their names and one to our paths."""
    return [
        Row(tuple(theirs + name for name in row.names), ours + row.ours, row.change)
        for row in table.rows
    ]


def linear(theirs: str, ours: str, change: Change = LINEAR) -> list[Row]:
    """Rows of a linear layer, or of another one whose weight becomes a kernel by `change`."""
    return [
        Row(f"{theirs}.weight", f"{ours}/kernel", change),
        Row(f"{theirs}.bias", f"{ours}/bias"),
    ]


def norm(theirs: str, ours: str) -> list[Row]:
    """Rows of a layer norm."""
    return [Row(f"{theirs}.weight", f"{ours}/scale"), Row(f"{theirs}.bias", f"{ours}/bias")]


def conv1d(theirs: str, ours: str) -> list[Row]:
    """Rows of a 1-D convolution."""
    return linear(theirs, ours, CONV1D)


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


class Entry(NamedTuple):
    """One tensor of a conversion, computed only when `make` is called."""

    name: str
    """Name at the target."""
    sources: tuple[str, ...]
    """Names of the source's tensors that it is made of."""
    shape: tuple[int, ...]
    dtype: np.dtype
    make: Callable[[], np.ndarray]
    changed: bool
    """Whether more than the name differs from the source."""


def _outline(array: np.ndarray) -> np.ndarray:
    """An array of the same shape and type that takes no memory."""
    return np.broadcast_to(np.zeros((), array.dtype), array.shape)


def _full(dtype: np.dtype) -> np.dtype:
    """Half precision is widened to float32; other types stay."""
    narrow = dtype.itemsize < 4 and dtype.kind in "fV"  # V: bfloat16, of which numpy knows nothing
    return np.dtype(np.float32) if narrow else dtype


class Reading(NamedTuple):
    """Result of `plan_read`."""

    entries: list[Entry]
    """Our tensors."""
    unused: dict[str, str]
    """Their name that no entry reads -> the reason."""


def plan_read(table: Table, state: Mapping[str, np.ndarray]) -> Reading:
    """Their arrays -> entries of ours, in the order of the rows; nothing is computed yet.

    Rows whose names are absent are left out. Raises UserError for names that the table does not
    know, and for layers that are missing.
    """
    names = {name: name for name in state}  # as the table has them -> as they are
    for alias, name in table.aliases:
        names = {re.sub(alias, name, key): there for key, there in names.items()}
    left, entries = dict(names), []

    def take(name):
        if name not in left:
            raise UserError(f"the weights lack '{name}'")
        return left.pop(name)

    for row in table.rows:
        layers: dict[str, list[tuple[str, ...]]] = {}
        for numbers in _numbers(row.names[0], list(left)):
            path = _fill(row.ours, numbers)
            parts = layers.setdefault(path, [])
            if numbers.get("l", 0) != len(parts):
                raise UserError(f"the weights lack '{_fill(row.names[0], {'l': len(parts)})}'")
            parts.append(tuple(take(_fill(name, numbers)) for name in row.names))
        entries += [_entry_of_ours(row, path, parts, state) for path, parts in layers.items()]
    unused = {}
    for key, there in left.items():
        reasons = [reason for p, reason in table.ignored.items() if re.search(p, key)]
        if reasons:
            unused[there] = reasons[0]
    unknown = [there for there in left.values() if there not in unused]
    if unknown:
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        raise UserError(f"the weights have '{unknown[0]}'{more}, which this layout does not know")
    return Reading(entries, unused)


def _entry_of_ours(row: Row, path: str, parts: list[tuple[str, ...]], state: Any) -> Entry:
    def one(names, read):
        try:
            return row.change.to_ours([read(state[name]) for name in names])
        except (ValueError, IndexError):
            shapes = [list(state[name].shape) for name in names]
            raise UserError(f"'{names[0]}' has a shape that does not fit: {shapes}") from None

    outlines = {tuple(state[name].shape for name in names): names for names in parts}
    outlines = [one(names, _outline) for names in outlines.values()]
    if len({outline.shape for outline in outlines}) > 1:
        raise UserError(f"the layers of '{parts[0][0]}' have different shapes")
    shape, dtype = outlines[0].shape, _full(outlines[0].dtype)

    def make():
        if not row.stacked:
            return np.asarray(one(parts[0], np.asarray), dtype, order="C")
        whole = np.empty((len(parts), *shape), dtype)
        for layer, names in enumerate(parts):
            whole[layer] = one(names, np.asarray)
        return whole

    whole = (len(parts), *shape) if row.stacked else shape
    sources = tuple(name for names in parts for name in names)
    changed = row.stacked or row.change is not SAME or dtype != outlines[0].dtype
    return Entry(path, sources, whole, dtype, make, changed)


def read(table: Table, state: Mapping[str, np.ndarray]) -> Tree:
    """Their arrays -> our tree; errors as of `plan_read`."""
    return nest({entry.name: entry.make() for entry in plan_read(table, state).entries})


def entries_of(state: Mapping[str, np.ndarray]) -> list[Entry]:
    """Arrays as entries, each looked up when it is made, half precision widened."""

    def entry(name, array):
        dtype = _full(array.dtype)
        make = lambda: np.asarray(state[name], dtype)  # noqa: E731
        return Entry(name, (name,), array.shape, dtype, make, False)

    return [entry(name, array) for name, array in state.items()]


def plan_write(table: Table, ours: Sequence[Entry]) -> list[Entry]:
    """Entries of ours -> entries of theirs, in the order of the rows; nothing is computed yet.

    Made in this order, no more than one of ours is in memory. Raises UserError for parameters that
    the layout cannot hold.
    """
    left, entries = {entry.name: entry for entry in ours}, []
    made = functools.lru_cache(maxsize=1)(lambda path: sources[path].make())
    sources = dict(left)
    for row in table.rows:
        for numbers in _numbers(row.ours, list(left)):
            entry = left.pop(_fill(row.ours, numbers))
            entries += _entries_of_theirs(row, entry, numbers, made)
    if left:
        raise UserError(f"this layout has no place for '{next(iter(left))}'")
    return entries


def _entries_of_theirs(
    row: Row, ours: Entry, numbers: dict[str, int], made: Callable[[str], np.ndarray]
) -> list[Entry]:
    shape = ours.shape[1:] if row.stacked else ours.shape
    outline = np.broadcast_to(np.zeros((), ours.dtype), shape)
    parts = [(part.shape, part.dtype) for part in row.change.to_theirs(outline)]
    changed = row.stacked or row.change is not SAME
    entries = []
    for layer in range(ours.shape[0] if row.stacked else 1):
        for which, (name, (shape, dtype)) in enumerate(zip(row.names, parts, strict=True)):

            def make(layer=layer, which=which):
                part = made(ours.name)[layer] if row.stacked else made(ours.name)
                return np.asarray(row.change.to_theirs(part)[which], order="C")

            name = _fill(name, numbers | {"l": layer})
            source = f"{ours.name}[{layer}]" if row.stacked else ours.name
            entries.append(Entry(name, (source,), shape, dtype, make, changed))
    return entries


def write(table: Table, tree: Mapping[str, Any]) -> State:
    """Our tree -> their arrays, in the order of the rows: the inverse of `read`."""
    flat = {path: np.asarray(array) for path, array in flatten(tree).items()}
    return {entry.name: entry.make() for entry in plan_write(table, entries_of(flat))}
