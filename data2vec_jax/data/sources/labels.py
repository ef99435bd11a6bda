"""Labels: classes by their index, or numbers."""

import math
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import numpy as np

from data2vec_jax.core.errors import ExampleError, UserError, nearest
from data2vec_jax.data.codecs.base import Item
from data2vec_jax.data.sources.base import Source, Subset

UNKNOWN = "unknown class"  # reason of an example whose class is not among those that are known
FIELDS = "label", "labels"  # that hold a class, or a list of them


def check_field(source: Source, name: str, check: Callable[[Any], Any]) -> None:
    """Calls `check` with a field of each example, or of the first if all would be decoded for it.

    Raises UserError: that of `check`, with the example's file and line.
    """
    column = source.column(name)
    for i, value in enumerate([source.field(0, name)] if column is None else column):
        if i in source.bad:
            continue
        try:
            check(value)
        except UserError as error:
            raise UserError(f"{source.location(i)}: {error}") from error


def class_of(label: Any) -> int:
    """A label that is the index of a class. Raises UserError: it is none, or a number."""
    if label is None:
        raise UserError("no label")
    if not isinstance(label, int | np.integer):
        raise UserError(f"label {label!r} is not a class")
    return int(label)


def check_classes(source: Source) -> None:
    """Raises UserError unless every example of a source has a class."""
    if "label" not in next(source.items())[1]:
        raise UserError(f"{source.uri}: its examples have no labels, so nothing can be probed")
    check_field(source, "label", class_of)


class Renamed(Subset):
    """A source whose `label`, or `labels`, count the classes `names` in place of its own: by name,
    not by order.

    Examples of other classes are bad. The labels of a source without names are None.
    """

    def __init__(self, source: Source, names: Sequence[str]):
        super().__init__(source, np.arange(len(source)))
        if any(isinstance(label, str) for label in source.column("labels") or ()):
            raise UserError(f"{source.uri}: its classes, or their order, are not the known ones")
        self.label_names, self._few = tuple(names), tuple(names)[:50]
        index = {name: i for i, name in enumerate(names)}
        self._old = source.label_names or ()
        self._new = [index.get(x) for x in self._old]
        for i, label in chain(*(enumerate(source.column(name) or ()) for name in FIELDS)):
            if i not in self.bad:
                try:
                    self._renamed(i, label)
                except ExampleError as error:
                    self.bad[i] = error

    def _renamed(self, i: int, label: Any) -> Any:
        if isinstance(label, list):
            return [self._renamed(i, one) for one in label]
        if not self._old:
            return None
        if not isinstance(label, int | np.integer) or not 0 <= label < len(self._new):
            return label  # which `class_of` refuses
        if self._new[label] is None:
            text = f"unknown label '{self._old[label]}'{nearest(self._old[label], self._few)}"
            raise ExampleError(self.location(i), UNKNOWN, text)
        return self._new[label]

    def _load(self, i: int) -> Item:
        item = super()._load(i)
        return item | {name: self._renamed(i, item[name]) for name in FIELDS if name in item}

    def field(self, index: int, name: str) -> Any:
        value = super().field(index, name)
        return self._renamed(index, value) if name in FIELDS else value

    def column(self, name: str) -> Sequence[Any] | None:
        values = super().column(name)
        if name not in FIELDS or values is None:
            return values
        return [None if i in self.bad else self._renamed(i, x) for i, x in enumerate(values)]


def by_name(source: Source, names: Sequence[str] | None) -> Source:
    """A source with the classes `names`, if both have names and they differ."""
    if not names or not source.label_names or tuple(names) == source.label_names:
        return source
    return Renamed(source, names)


def index_labels(
    values: list,
    names: Sequence[str] | None,
    where: str,
    lines: Sequence[int] = (),
    unknown: Callable[[int, str], None] | None = None,
) -> tuple[list[int | float | None], tuple[str, ...] | None]:
    """Labels as found -> their indices and the names of the classes, sorted (integers by value).

    If all are numbers and some are not integers, or the names that were given are none, (), they
    are no classes: floats. Integers are also taken as indices into names that were given, if those
    are not numbers themselves. A missing label (None or "") stays None.
    lines: those of the values in the file `where`. unknown: is called with the index of an unknown
    label, and what is wrong with it; its label is None. Raises UserError: an unknown label, or one
    that should be a number.
    """
    labels = [None if value in (None, "") else str(value) for value in values]
    found = set(labels) - {None}
    if names is None:
        whole = all(is_number(label, int) for label in found)
        if whole or not all(is_number(label, float) for label in found):
            names = sorted(found, key=int if whole else None) or None
    if names:
        index = {str(name): i for i, name in enumerate(names)}
        numeric = any(is_number(name, float) for name in index)
        if not numeric and not found <= set(index) and all(v.isdecimal() for v in found):
            index = {str(i): i for i in range(len(names))}
    else:
        index = {label: float(label) for label in found if is_number(label, float)}
    for i, label in enumerate(labels):
        if label is not None and label not in index:
            place = f"{where}:{lines[i]}" if lines else where
            if not names:
                raise UserError(f"{place}: label '{label}' is not a number")
            hint = nearest(label, index) if len(index) <= 50 else ""
            text = f"unknown label '{label}'{hint}"
            if unknown is None:
                raise UserError(f"{place}: {text}")
            unknown(i, text)
    return [index.get(label) for label in labels], names and tuple(map(str, names))


def is_number(text: str, kind: type) -> bool:
    """Whether `text` is a finite number of the kind `int` or `float`."""
    try:
        return math.isfinite(kind(text))
    except ValueError:
        return False
