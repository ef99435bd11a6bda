"""The tokenizer that `prepare text --train-tokenizer` makes beside the shards."""

import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from data2vec_jax.core.config import Size
from data2vec_jax.core.errors import UserError
from data2vec_jax.data.sources.base import Source
from data2vec_jax.modalities.contract import Learned
from data2vec_jax.modalities.text.tokenizer import train_bpe, train_sentencepiece

TRAINERS = {"bpe": train_bpe, "sentencepiece": train_sentencepiece}
TEXTS, CHARACTERS = 1_000_000, 100_000_000  # of the sample, at most
ROWS = 8_000


@dataclass(frozen=True, kw_only=True)
class TokenizerOptions:
    """What `prepare` trains; by default nothing."""

    train_tokenizer: Literal["", "bpe", "sentencepiece"] = field(
        default="", metadata={"help": "a tokenizer in FOLDER/tokenizer; bpe: GPT-2's, of bytes"}
    )
    vocab_size: Size = field(
        default=ROWS, metadata={"help": f"of that tokenizer; by default {ROWS:,}"}
    )

    def __post_init__(self):
        if not self.train_tokenizer and self.vocab_size != ROWS:
            raise UserError(f"--vocab_size={self.vocab_size}: needs --train-tokenizer")


def sample(source: Source, counts: Counter) -> Iterator[str]:
    """Random texts of a source, the same each time; the last is cut where `CHARACTERS` end.

    counts: gets the numbers of `texts` and `characters`.
    """
    numbers = range(len(source))
    rows = random.Random(0).sample(numbers, min(len(numbers), TEXTS))
    for _, item in source.items(rows):
        text = item["text"][: CHARACTERS - counts["characters"]]
        counts.update(texts=1, characters=len(text))
        yield text
        if counts["characters"] == CHARACTERS:
            return


def train_tokenizer(options: TokenizerOptions, source: Source, folder: Path) -> dict[str, Any]:
    """Writes what `tokenizer.load(folder)` reads; the kind and size of it, and of its sample.

    Raises UserError: `vocab_size` is too large or too small for the corpus.
    """
    counts: Counter = Counter()
    train = TRAINERS[options.train_tokenizer]
    train(sample(source, counts), options.vocab_size).save(folder)
    return {"kind": options.train_tokenizer, "vocab_size": options.vocab_size, **counts}


LEARNED = Learned("tokenizer", TokenizerOptions, train_tokenizer)
