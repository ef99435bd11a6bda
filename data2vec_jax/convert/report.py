"""The report of a conversion: one line for each tensor."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from data2vec_jax.convert.ours import Checkpoint
from data2vec_jax.convert.tables import Entry

Shapes = Mapping[str, Sequence[int]]


def report(
    checkpoint: Checkpoint,
    written: Sequence[Entry],
    dropped: Mapping[str, str],
    missing: Iterable[str],
) -> list[str]:
    """Lines: matched, transformed, unused and missing tensors with their shapes, and a summary.

    First how the source is read, then, if it is not our own layout, how the target is written.
    written: the target's tensors. dropped: our paths that are not written -> why. missing: our
    paths that the source lacks.
    """
    ours = {entry.name: entry for entry in checkpoint.entries}
    lines, counts = ["read:"], Counter(matched=0, transformed=0, unused=0, missing=0)

    def add(kind, text):
        counts[kind] += 1
        lines.append(f"  {kind:<12} {text}")

    for entry in checkpoint.entries:
        add(kind_of(entry), f"{sources(entry, checkpoint.shapes)} -> {named(entry)}")
    for name, reason in checkpoint.unused.items():
        shape = f" {list(checkpoint.shapes[name])}" if name in checkpoint.shapes else ""
        add("unused", f"{name}{shape}: {reason}")
    for path in missing:
        add("missing", f"{path}, as --missing allows")
    if written is not checkpoint.entries:
        lines.append("written:")
        for entry in written:
            if entry.sources == (entry.name,):
                lines.append(f"  added        {named(entry)}: a constant of that layout")
            else:
                lines.append(f"  {kind_of(entry):<12} {entry.sources[0]} -> {named(entry)}")
        for path, reason in dropped.items():
            add("unused", f"{named(ours[path])}: {reason}")
    lines.append(", ".join(f"{count} {kind}" for kind, count in counts.items()))
    return lines


def kind_of(entry: Entry) -> str:
    """Whether more than the name is new."""
    return "transformed" if entry.changed else "matched"


def named(entry: Entry) -> str:
    """'name [shape]'."""
    return f"{entry.name} {list(entry.shape)}"


def sources(entry: Entry, shapes: Shapes) -> str:
    """The names that a tensor is made of, first and last, with their shape."""
    names = entry.sources
    between = f" ... {names[-1]} ({len(names)} of them)" if len(names) > 1 else ""
    shape = f" {list(shapes[names[0]])}" if names[0] in shapes else ""
    return f"{names[0]}{between}{shape}"
