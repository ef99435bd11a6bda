"""The splits of the corpus that a command names, and blocks of their examples."""

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from data2vec_jax.core.errors import UserError
from data2vec_jax.data import places
from data2vec_jax.data.codecs.base import Codec
from data2vec_jax.data.sources import FOUND, Source, open_source
from data2vec_jax.data.sources.stored import FilePart, Stored


def parse_splits(text: str) -> dict[str, str]:
    """'train,dev=dev-clean+dev-other' -> {name of a split here: its name in the source}."""
    found: dict[str, str] = {}
    for part in text.split(","):
        name, equals, theirs = part.strip().partition("=")
        if not re.fullmatch(r"\w[\w-]*", name) or name in found:
            raise UserError(f"--splits={text}: '{name}' is no name for a split, or is there twice")
        found[name] = theirs if equals else name
    return found


def open_splits(
    uri: str,
    splits: Mapping[str, str],
    codec: Codec,
    key: str | None = None,
    columns: Sequence[str] | None = None,
) -> dict[str, Source]:
    """The source of each split; all number their classes as the first does.

    Raises UserError as `open_source`, if they cannot, or if two splits have the same examples.
    """
    names: Sequence[str] | None = None
    given = uri.partition(":")[0] in FOUND
    found: dict[str, Source] = {}
    for name, theirs in splits.items():
        options = {"key": key, "columns": columns, "label_names": names if given else None}
        source = open_source(uri, theirs, codec=codec, **options)
        if same := next((k for k, x in found.items() if x.rows and x.rows == source.rows), None):
            raise UserError(f"{uri}: {name} has the examples of {same}; name other splits of it")
        found[name] = source
        if len(found) > 1 and found[name].label_names != names:
            raise UserError(f"{uri}: {theirs} has other classes than {next(iter(splits.values()))}")
        names = found[name].label_names
    return found


@dataclass(frozen=True)
class Block:
    """The examples of one shard, in the order of the source; number: from 0 in its split."""

    split: str
    number: int
    examples: Sequence[Stored]

    @property
    def name(self) -> str:
        """The shard's file."""
        return f"{self.split}-{self.number:05}.array_record"

    def digest(self, options: str) -> str:
        """A hash of all that makes the shard: the options, fields, and sizes and dates of files."""
        found = hashlib.sha256(options.encode())
        for one in self.examples:
            facts = facts_of(one.signal.path) if isinstance(one.signal, FilePart) else ()
            text = repr((one.where, sorted(one.fields.items()), one.signal, facts))
            found.update(text.encode("utf-8", "surrogatepass"))
        return found.hexdigest()


def blocks(sources: Mapping[str, Source], shard_bytes: int) -> Iterator[Block]:
    """The corpus in blocks of about `shard_bytes` of what it is stored in, whoever makes them."""
    for split, source in sources.items():
        waiting: list[Stored] = []
        size, number = 0, 0
        for stored in source.stored():
            waiting.append(stored)
            size += size_of(stored)
            if size >= shard_bytes:
                yield Block(split, number, waiting)
                waiting, size, number = [], 0, number + 1
        if waiting:
            yield Block(split, number, waiting)


def size_of(stored: Stored) -> int:
    """About how many bytes an example is stored in."""
    signal = stored.signal
    if isinstance(signal, FilePart):
        return signal.size if signal.size >= 0 else facts_of(signal.path)[0]
    return len(signal) if isinstance(signal, str) else 0


def facts_of(path: str) -> tuple[int, str]:
    """Size and date or version of a file; 0 and '' if it is not there."""
    found = places.stat(path)
    return (found.size, found.version) if found else (0, "")
