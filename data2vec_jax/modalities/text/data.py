"""Text examples: documents -> token blocks -> rows padded to a few fixed lengths."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import jax
import numpy as np

from data2vec_jax.core.config import Length, Range, Share, Size
from data2vec_jax.core.errors import UserError
from data2vec_jax.data.sources.base import Corpora
from data2vec_jax.modalities.contract import Labelled
from data2vec_jax.modalities.text import tokenizer as tokenizers
from data2vec_jax.modalities.text.blocks import documents_of, joined, pad_row, token_blocks

SPECIAL = len(tokenizers.SPECIALS)  # they come first (spec 1.3), `<mask>` last
Lengths = Annotated[Sequence[Annotated[int, Range(8, 2**20)]], Length()]
MAX_UNKNOWN_SHARE = 0.05
TERMS = 5_000  # most columns of hand-made features


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockConfig:
    """Config section `examples` of text, in pretraining; a `Layout`."""

    # Of rows in tokens with `<s>`, ascending; blocks are at most as long as the last, and are
    # padded to the shortest that holds them.
    lengths: Lengths = (512,)
    # 'complete_doc': whole lines up to a document's end (spec 1.3); 'none': one stream cut into
    # equal pieces.
    mode: Literal["complete_doc", "none"] = "complete_doc"
    tokenizer: str | None = None  # folder of one; None trains sentencepiece on the source
    vocab_size: Size = 8_000  # pieces of a new tokenizer
    max_unknown_share: Share = MAX_UNKNOWN_SHARE  # see `check_unknown`
    padded: ClassVar[bool] = True

    def __post_init__(self):
        check_lengths(self.lengths)

    @property
    def buckets(self) -> list[int]:
        return list(self.lengths)

    @property
    def shapes(self) -> list[dict[str, jax.ShapeDtypeStruct]]:
        return token_shapes(self.lengths)


def check_lengths(lengths: Sequence[int]) -> None:
    """Raises UserError unless the lengths of rows ascend."""
    if list(lengths) != sorted(set(lengths)):
        raise UserError(f"config.examples.lengths: {tuple(lengths)} is not ascending")


def token_shapes(lengths: Sequence[int]) -> list[dict[str, jax.ShapeDtypeStruct]]:
    """Shapes of rows of each length."""
    return [{"tokens": jax.ShapeDtypeStruct((n,), np.int32)} for n in lengths]


def tokenizer_of(source: Any, config: Any) -> tokenizers.Tokenizer:
    """That of a config's `tokenizer` and `vocab_size`: read from a folder, or trained on the
    source."""
    if config.tokenizer:
        return tokenizers.load(config.tokenizer)
    texts = (item["text"] for _, item in source.items())
    return tokenizers.train_sentencepiece(texts, config.vocab_size)


def check_unknown(
    source: Any, tokens: np.ndarray, tokenizer: tokenizers.Tokenizer, most: float
) -> None:
    """Adds the share of tokens int [N] that are `<unk>`, if any are, to the source's notes.

    Raises UserError: it is above `most`, as where a tokenizer has never seen a script.
    """
    count = int(np.sum(tokens == tokenizer.unk))
    line = f"{source.uri} {source.split}: {count:,} of {len(tokens):,} tokens are <unk>"
    if count > most * len(tokens):
        raise UserError(f"{line}, more than config.examples.max_unknown_share={most:g} allows")
    if count:
        source.notes = [*source.notes, line]


class TextExamples:
    """Blocks of token ids, `<s>` first; none has documents of two corpora of a mixture. With
    `like`, its tokenizer is used."""

    def __init__(self, source: Any, like: "TextExamples | None" = None, **options: Any):
        self.layout = BlockConfig(**options)
        self.tokenizer = like.tokenizer if like else tokenizer_of(source, self.layout)
        ids = self.tokenizer
        cut = functools.partial(
            token_blocks,
            length=self.layout.buckets[-1],
            bos=ids.bos,
            eos=ids.eos,
            mode=self.layout.mode,
        )
        of, shares = source.corpora
        parts = {
            k: cut(documents_of((item for _, item in items), ids))
            for k, items in groupby(source.items(), lambda pair: of[pair[0]])
        }
        self.blocks = joined(list(parts.values()), ids.bos)
        counts = [len(blocks) for blocks in parts.values()]
        self.corpora = Corpora(np.repeat(np.array(list(parts), np.int32), counts), shares)
        check_unknown(source, self.blocks.tokens, ids, self.layout.max_unknown_share)
        self.lengths = self.blocks.lengths()
        self.bucket_of = np.searchsorted(self.layout.buckets, self.lengths)

    def load(self, index: int, bucket: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """{'tokens': int32 [T]} of the bucket's length, right-padded."""
        length = self.layout.buckets[bucket]
        return {"tokens": pad_row(self.blocks[index], length, self.tokenizer.pad)}

    def check(self, model: Any) -> None:
        """The model's table must have the tokenizer's rows, `<mask>` last."""
        ids, rows = self.tokenizer, model.embeddings.vocab_size
        if ids.vocab_size != rows:
            raise UserError(
                f"config.model.vocab_size: {rows} rows for a tokenizer of {ids.vocab_size}"
            )
        if ids.mask != rows - 1:
            raise UserError(f"config.examples.tokenizer: <mask> is row {ids.mask}, not the last")
        if self.layout.buckets[-1] > model.embeddings.max_length:
            raise UserError(
                f"config.examples.lengths: {self.layout.buckets[-1]} is more than "
                f"config.model.max_length {model.embeddings.max_length}"
            )

    def save_assets(self, folder: Path) -> None:
        """The tokenizer."""
        self.tokenizer.save(folder / "tokenizer")


def labelled(source: Any, like: TextExamples, **options: Any) -> Labelled:
    """Every text as one row, cut to the longest length, with its class."""
    ids, length = like.tokenizer, BlockConfig(**options).buckets[-1]
    items = [item for _, item in source.items()]
    rows = [[ids.bos, *ids.encode(item["text"])[: length - 2], ids.eos] for item in items]
    names = source.label_names or ()
    tokens = np.stack([pad_row(row, length, ids.pad) for row in rows])
    return Labelled({"tokens": tokens}, np.array([item["label"] for item in items]), names)


def words(examples: TextExamples, inputs: Mapping[str, np.ndarray]) -> list[str]:
    """tokens int [T] -> the text of each, with the blank before a word; '' for the ends of the row
    and padding."""
    ids = examples.tokenizer
    found = {}
    for i in map(int, np.unique(inputs["tokens"])):
        # The second of two: a text's first token loses its blank.
        found[i] = ids.decode([i, i])[len(ids.decode([i])) :]
    return [
        "" if i in (ids.bos, ids.eos, ids.pad) else found[i] for i in map(int, inputs["tokens"])
    ]


def tf_idf(train: Mapping[str, np.ndarray], inputs: Mapping[str, np.ndarray]) -> np.ndarray:
    """Hand-made features: tokens int [N, T] -> TF-IDF, float32 [N, F], rows of norm 1 (or 0).

    Counts of a text's tokens times ln((1 + n) / (1 + df)) + 1, where df of the n training texts
    have the token. Special tokens do not count. F: the tokens of the training texts, or the
    `TERMS` that are in most of them.
    """
    df = np.bincount(_pairs(train["tokens"])[1])
    terms = np.argsort(-df, kind="stable")[:TERMS]
    terms = np.sort(terms[df[terms] > 0])
    row, token, count = _pairs(inputs["tokens"])
    column = np.searchsorted(terms, token)
    known = terms[np.minimum(column, len(terms) - 1)] == token
    x = np.zeros((len(inputs["tokens"]), len(terms)))
    x[row[known], column[known]] = count[known]
    x *= np.log((1 + len(train["tokens"])) / (1 + df[terms])) + 1
    return (x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)).astype(np.float32)


def _pairs(tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Row, token and how often the row has it, of all pairs in tokens [N, T] but special ones."""
    row, _ = np.nonzero(tokens >= SPECIAL)
    size = int(tokens.max()) + 1
    pairs, count = np.unique(row * size + tokens[tokens >= SPECIAL], return_counts=True)
    return pairs // size, pairs % size, count
