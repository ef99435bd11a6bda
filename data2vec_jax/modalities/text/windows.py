"""Questions about texts: `<s> question </s></s> part of the text </s>` (conversion spec 3.3).

A text that does not fit is cut into overlapping windows, each a row of its own.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from data2vec_jax.core.errors import UserError
from data2vec_jax.data.sources import Subset
from data2vec_jax.modalities.contract import Layout
from data2vec_jax.modalities.text import data
from data2vec_jax.modalities.text.blocks import pad_row
from data2vec_jax.modalities.text.inputs import Rows


def layout(
    *, length: int = 384, stride: int = 128, question: int = 64, tokenizer: str | None = None,
    vocab_size: int = 8_000,
) -> Layout:  # fmt: skip
    """Config section `examples` of questions.

    length: of rows in tokens. stride: how far a window starts after the one before. question:
    longest, in tokens; what is longer is cut. tokenizer, vocab_size: as of texts.
    """
    if not 1 <= stride <= length - question - 4:
        raise UserError(
            f"config.examples.stride: {stride}; between two windows of {length} tokens with "
            f"questions of {question} it is 1 to {length - question - 4}"
        )
    place = jax.ShapeDtypeStruct((), np.int32)
    tokens = jax.ShapeDtypeStruct((length,), np.int32)
    return Layout([length], [{"tokens": tokens, "start": place, "end": place}], padded=True)


class Windows:
    """tokens int32 [T]; start, end: first and last token of the answer, 0 if it is elsewhere.

    source: the items of a source, each as often as it has windows. owner: int [N], the number of
    each window's question. spans: of the tokens of each window, int [T', 2] in code points of the
    text; (-1, -1) of those that are not of it.
    """

    def __init__(self, source: Any, like: "Windows | None" = None, **options: Any):
        defaults = layout.__kwdefaults__ | options
        self.layout = layout(**options)
        self.tokenizer = like.tokenizer if like else data.tokenizer_of(source, **defaults)
        self.rows, self.spans, self.places, owner = [], [], [], []
        for number in range(len(source)):
            item = source[number]
            for row, spans in windows(item, self.tokenizer, **sizes(defaults)):
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


def sizes(options: Mapping[str, Any]) -> dict[str, int]:
    """Those of the options that say how a text is cut."""
    return {name: options[name] for name in ("length", "stride", "question")}


def windows(
    item: Mapping[str, Any], ids: Any, *, length: int, stride: int, question: int
) -> list[tuple[list[int], np.ndarray]]:
    """Rows of a question, with the spans of their tokens; the last window reaches the end."""
    asked = ids.encode(item["question"], literal=True)[:question]
    head = [ids.bos, *asked, ids.eos, ids.eos]
    tokens, spans = ids.encode_with_offsets(item["text"])
    room, found, start = length - len(head) - 1, [], 0
    while True:
        part = tokens[start : start + room]
        row = [*head, *part, ids.eos]
        where = np.full((len(row), 2), -1, np.int64)
        where[len(head) : len(head) + len(part)] = np.reshape(spans[start : start + room], (-1, 2))
        found.append((row, where))
        if start + room >= len(tokens):
            return found
        start += stride


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
