"""Nested dicts as flat ones, whose keys are paths: 'encoder/blocks/up/kernel'."""

from collections.abc import Mapping
from typing import Any


def flatten(
    tree: Mapping[str, Any], prefix: str = "", separator: str = "/", keep_empty: bool = False
) -> dict[str, Any]:
    """{'a': {'b': x}} -> {'a/b': x}.

    prefix: stands in front of every path. keep_empty: an empty dict is a leaf, else it vanishes.
    """
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        path = f"{prefix}{name}"
        if isinstance(value, Mapping) and (value or not keep_empty):
            flat |= flatten(value, f"{path}{separator}", separator, keep_empty)
        else:
            flat[path] = value
    return flat


def nest(flat: Mapping[str, Any], separator: str = "/") -> dict[str, Any]:
    """{'a/b': x} -> {'a': {'b': x}}: the inverse of `flatten`."""
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *folders, leaf = path.split(separator)
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[leaf] = value
    return tree
