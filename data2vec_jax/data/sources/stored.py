"""Examples as they are stored, before any decoding: what `prepare` copies into shards."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from data2vec_jax.core.errors import ExampleError
from data2vec_jax.data import places


class FilePart(NamedTuple):
    """`size` bytes of a file, local or remote, from `start`: a member of a tar; by default, all."""

    path: str
    start: int = 0
    size: int = -1

    def read(self, name: str) -> bytes:
        """Its bytes. Raises ExampleError as `places.read`."""
        return places.read(self.path, self.start, self.size, name)


@dataclass(frozen=True)
class Stored:
    """An example of a source.

    where: what errors call it. fields: all but the signal. signal: a text, the file that holds it,
    or what is wrong with it.
    """

    where: str
    fields: Mapping[str, Any]
    signal: str | FilePart | ExampleError
