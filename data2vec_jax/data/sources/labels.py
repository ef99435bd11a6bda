"""Labels: classes by their index, or numbers."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from data2vec_jax.core.errors import UserError, nearest
from data2vec_jax.data.sources.base import Source


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


def index_labels(
    values: list, names: Sequence[str] | None, where: str, lines: Sequence[int] = ()
) -> tuple[list[int | float | None], tuple[str, ...] | None]:
    """Labels as found -> their indices and the names of the classes, sorted (integers by value).

    If all are numbers and some are not integers, or the names that were given are none, (), they
    are no classes: floats. Integers are also taken as indices into names that were given, if those
    are not numbers themselves. A missing label (None or "") stays None.
    lines: those of the values in the file `where`. Raises UserError: an unknown label, or one that
    should be a number.
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
            raise UserError(f"{place}: unknown label '{label}'{hint}")
    return [index.get(label) for label in labels], names and tuple(map(str, names))


def is_number(text: str, kind: type) -> bool:
    """Whether `text` is a finite number of the kind `int` or `float`."""
    try:
        return math.isfinite(kind(text))
    except ValueError:
        return False
