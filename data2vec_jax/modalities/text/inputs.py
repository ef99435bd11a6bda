"""Texts and pairs of texts as rows for fine-tuning: `<s> A </s>` or `<s> A </s></s> B </s>`."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import jax
import numpy as np

from data2vec_jax.core.config import Share, Size
from data2vec_jax.core.errors import ExampleError, UserError
from data2vec_jax.data.codecs.text import checked
from data2vec_jax.modalities.contract import with_bad_ones
from data2vec_jax.modalities.text import data
from data2vec_jax.modalities.text.blocks import pad_row
from data2vec_jax.modalities.text.data import Lengths


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowConfig:
    """Config section `examples` of text, in fine-tuning; a `Layout`."""

    # Of rows in tokens, ascending; a text is padded to the shortest that holds it, and cut to the
    # longest.
    lengths: Lengths = (128, 512)
    # Folder of one; None for that of the checkpoint that the run starts from, and without a
    # checkpoint a new one.
    tokenizer: str | None = None
    vocab_size: Size = 8_000  # pieces of a new tokenizer
    max_unknown_share: Share = data.MAX_UNKNOWN_SHARE  # see `data.check_unknown`
    padded: ClassVar[bool] = True

    def __post_init__(self):
        data.check_lengths(self.lengths)

    @property
    def buckets(self) -> list[int]:
        return list(self.lengths)

    @property
    def shapes(self) -> list[dict[str, jax.ShapeDtypeStruct]]:
        return data.token_shapes(self.lengths)


def row_of(first: Sequence[int], second: Sequence[int] | None, ids: Any, size: int) -> list[int]:
    """A row of at most `size` tokens; the longer of the two texts is cut first."""
    second_ = list(second or ())
    first, extra = list(first), 2 if second is None else 4
    while len(first) + len(second_) + extra > size:
        (first if len(first) > len(second_) else second_).pop()
    row = [ids.bos, *first, ids.eos]
    return row if second is None else [*row, ids.eos, *second_, ids.eos]


class Rows:
    """tokens int32 [T] of the items' `text`, and `pair` where there is one.

    like: the training examples. Raises UserError: either has pairs and the other has not.
    """

    def __init__(self, source: Any, like: "Rows | None" = None, **options: Any):
        self.source, self.layout = source, RowConfig(**options)
        self.tokenizer = like.tokenizer if like else data.tokenizer_of(source, self.layout)
        items = self._items(source)
        texts = self.tokenizer.encode_batch((item["text"] for item in items), literal=True)
        pairs: list[Any] = [None] * len(items)
        self.paired = bool(items) and "pair" in items[0]
        if like and items and self.paired != like.paired:
            without = source if like.paired else like.source
            raise UserError(
                f"{without.uri} {without.split}: its examples have no second text (a column "
                "`pair`), but the others have; training and evaluation read the same"
            )
        if self.paired:
            pairs = self.tokenizer.encode_batch((item["pair"] for item in items), literal=True)
        longest = self.layout.buckets[-1]
        self.rows = [
            np.array(row_of(*both, self.tokenizer, longest), np.int32)
            for both in zip(texts, pairs, strict=True)
        ]
        tokens = np.concatenate(self.rows)
        data.check_unknown(source, tokens, self.tokenizer, self.layout.max_unknown_share)
        self.lengths = np.array([len(row) for row in self.rows], np.int64)
        bucket_of = np.searchsorted(self.layout.buckets, self.lengths)
        self.bucket_of = with_bad_ones(bucket_of, source.bad)

    def _items(self, source):
        """All items; of bad ones, among them those whose second text is none, with empty texts."""
        items: list[Any] = [None] * len(source)
        for i, item in source.items():
            try:
                if "pair" in item and not isinstance(item["pair"], str):
                    text = f"pair is {item['pair']!r:.40}, not a string"
                    raise ExampleError(source.location(i), "format", text)
                checked(item.get("pair", ""), source.location(i))
            except ExampleError as error:
                source.bad[i] = error
            items[i] = item
        paired = any(item is not None and "pair" in item for item in items)
        for i, item in enumerate(items):
            if paired and item is not None and "pair" not in item:  # of another corpus of a mixture
                text = "has no second text (a column `pair`), but others have"
                source.bad.setdefault(i, ExampleError(source.location(i), "format", text))
        empty = {"text": "", **({"pair": ""} if paired else {})}
        source.check_any()
        return [empty if i in source.bad else item for i, item in enumerate(items)]

    def load(self, index: int, bucket: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """See `prepare`."""
        return self.prepare(index, self.source[index], bucket, rng)

    def prepare(
        self, index: int, item: Mapping[str, Any], bucket: int, rng: np.random.Generator
    ) -> dict[str, np.ndarray]:
        """{'tokens': int32 [T] of the bucket's length, right-padded}."""
        size = self.layout.buckets[bucket]
        return {"tokens": pad_row(self.rows[index], size, self.tokenizer.pad)}

    def check(self, model: Any) -> None:
        """The model's table must have a row for each token, and positions for the longest row."""
        if self.tokenizer.vocab_size > model.embeddings.vocab_size:
            raise UserError(
                f"config.examples.tokenizer: {self.tokenizer.vocab_size} tokens for a model of "
                f"{model.embeddings.vocab_size}"
            )
        if self.layout.buckets[-1] > model.embeddings.max_length:
            raise UserError(
                f"config.examples.lengths: {self.layout.buckets[-1]} is more than "
                f"config.model.max_length {model.embeddings.max_length}"
            )

    def save_assets(self, folder: Path) -> None:
        """The tokenizer."""
        self.tokenizer.save(folder / "tokenizer")
