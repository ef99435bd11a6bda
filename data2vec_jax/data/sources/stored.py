"""Examples as they are stored, before any decoding: what `prepare` copies into shards."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from data2vec_jax.core.errors import ExampleError
from data2vec_jax.data.codecs.base import check_file, unreadable


class FilePart(NamedTuple):
    """`size` bytes of a file from `start`: a member of a tar; by default, a whole file."""

    path: str
    start: int = 0
    size: int = -1

    def read(self, name: str) -> bytes:
        """Its bytes. Raises ExampleError: no ordinary file, or it ends before."""
        check_file(self.path)
        try:
            with open(self.path, "rb") as file:
                file.seek(self.start)
                data = file.read(self.size)
        except OSError as error:
            raise unreadable(name, "file", error) from error
        if self.size >= 0 and len(data) < self.size:
            text = f"'{self.path}' ends after {len(data):,} of its {self.size:,} bytes"
            raise ExampleError(name, "damaged", text)
        return data


@dataclass(frozen=True)
class Stored:
    """An example of a source.

    where: what errors call it. fields: all but the signal. signal: a text, the file that holds it,
    or what is wrong with it.
    """

    where: str
    fields: Mapping[str, Any]
    signal: str | FilePart | ExampleError
