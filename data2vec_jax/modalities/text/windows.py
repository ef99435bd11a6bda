"""Questions about texts: `<s> question </s></s> part of the text </s>` (conversion spec 3.3).

A text that does not fit is cut into overlapping windows, each a row of its own.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import jax
import numpy as np

from data2vec_jax.core.config import Size
from data2vec_jax.core.errors import UserError
from data2vec_jax.data.sources import Subset
from data2vec_jax.modalities.text import data
from data2vec_jax.modalities.text.blocks import pad_row
from data2vec_jax.modalities.text.inputs import Rows


@dataclasses.dataclass(frozen=True, kw_only=True)
class WindowConfig:
    """Config section `examples` of questions; a `Layout`."""

    length: Size = 384  # of rows in tokens
    stride: Size = 128  # how far a window starts after the one before, in tokens
    question: Size = 64  # longest, in tokens; what is longer is cut
    tokenizer: str | None = None  # as of texts
    vocab_size: Size = 8_000  # as of texts
    padded: ClassVar[bool] = True

    def __post_init__(self):
        longest = self.length - self.question - 4
        if not 1 <= self.stride <= longest:
            raise UserError(
                f"config.examples.stride: {self.stride}; between two windows of {self.length} "
                f"tokens with questions of {self.question} it is 1 to {longest}"
            )

    @property
    def buckets(self) -> list[int]:
        return [self.length]

    @property
    def shapes(self) -> list[dict[str, jax.ShapeDtypeStruct]]:
        place = jax.ShapeDtypeStruct((), np.int32)
        tokens = jax.ShapeDtypeStruct((self.length,), np.int32)
        return [{"tokens": tokens, "start": place, "end": place}]


layout = WindowConfig  # of a `FinetuneSpec.inputs`


class Windows:
    """tokens int32 [T]; start, end: first and last token of the answer, 0 if it is elsewhere.

    source: the items of a source, each as often as it has windows. owner: int [N], the number of
    each window's question. spans: of the tokens of each window, int [T', 2] in code points of the
    text; (-1, -1) of those that are not of it.
    """

    def __init__(self, source: Any, like: "Windows | None" = None, **options: Any):
        self.layout = WindowConfig(**options)
        self.tokenizer = like.tokenizer if like else data.tokenizer_of(source, self.layout)
        self.rows, self.spans, self.places, owner = [], [], [], []
        for number, item in source.items():
            for row, spans in windows(item, self.tokenizer, self.layout):
                self.rows.append(row)
                self.spans.append(spans)
                self.places.append(place_of(item, spans))
                owner.append(number)
        self.questions, self.owner = source, np.array(owner)
        self.source = Subset(source, self.owner)
        self.lengths = np.array([len(row) for row in self.rows], np.int64)
        self.bucket_of = np.zeros(len(self.rows), np.int32)

    def load(self, index: int, bucket: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """See `prepare`."""
        return self.prepare(index, {}, bucket, rng)

    def prepare(
        self, index: int, item: Mapping[str, Any], bucket: int, rng: np.random.Generator
    ) -> dict[str, np.ndarray]:
        """{'tokens': int32 [T], 'start': int32, 'end': int32}."""
        start, end = self.places[index]
        tokens = pad_row(self.rows[index], self.layout.buckets[0], self.tokenizer.pad)
        return {"tokens": tokens, "start": np.int32(start), "end": np.int32(end)}

    check = Rows.check

    def save_assets(self, folder: Path) -> None:
        """The tokenizer."""
        self.tokenizer.save(folder / "tokenizer")


def windows(
    item: Mapping[str, Any], ids: Any, config: WindowConfig
) -> list[tuple[list[int], np.ndarray]]:
    """Rows of a question, with the spans of their tokens; the last window reaches the end."""
    asked = ids.encode(item["question"], literal=True)[: config.question]
    head = [ids.bos, *asked, ids.eos, ids.eos]
    tokens, spans = ids.encode_with_offsets(item["text"])
    room, found, start = config.length - len(head) - 1, [], 0
    while True:
        part = tokens[start : start + room]
        row = [*head, *part, ids.eos]
        where = np.full((len(row), 2), -1, np.int64)
        where[len(head) : len(head) + len(part)] = np.reshape(spans[start : start + room], (-1, 2))
        found.append((row, where))
        if start + room >= len(tokens):
            return found
        start += config.stride


def place_of(item: Mapping[str, Any], spans: np.ndarray) -> tuple[int, int]:
    """First and last token of the first answer, if all of it is in this window; else (0, 0)."""
    starts: Sequence[int] = item.get("starts") or ()
    if not starts:
        return 0, 0
    first, last = starts[0], starts[0] + len(item["answers"][0])
    inside = spans[:, 0] >= 0
    if not inside.any() or first < spans[inside][0, 0] or last > spans[inside][-1, 1]:
        return 0, 0
    touched = np.flatnonzero(inside & (spans[:, 1] > first) & (spans[:, 0] < last))
    return (int(touched[0]), int(touched[-1])) if len(touched) else (0, 0)
