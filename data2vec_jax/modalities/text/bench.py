"""The benchmark's rows of tokens."""

import functools
from collections.abc import Sequence
from typing import Any

from data2vec_jax.modalities.contract import Bench
from data2vec_jax.modalities.text.export import fast_tokenizer
from data2vec_jax.modalities.text.tokenizer import SPECIALS, SentencePiece, Tokenizer

CPU_ROWS = 4


def one_length(examples: dict[str, Any], cpu: bool) -> dict[str, Any]:
    """The longest rows."""
    return examples | {"lengths": [examples["lengths"][-1]]}


def integers(model: dict[str, Any]) -> tuple[int, int]:
    """Tokens that are not special."""
    return len(SPECIALS), model["vocab_size"] - 1


def length(config: dict[str, Any]) -> float:
    """Tokens."""
    return config["examples"]["lengths"][-1]


def scale_length(config: dict[str, Any], share: float) -> dict[str, Any]:
    """`share` of the tokens, at least 8."""
    config["examples"]["lengths"] = [max(round(length(config) * share), 8)]
    return config


def peer(examples: Any, texts: Sequence[Any]) -> Any:
    """A text at a time, by the library `tokenizers`, cut to the row and padded; files are read
    beforehand, as ours are."""
    ids = examples.tokenizer
    texts = [x if isinstance(x, str) else x.read(x.path).decode() for x in texts]
    engine = fast_tokenizer(ids) if isinstance(ids, SentencePiece) else ids._engine
    return functools.partial(encode, texts=texts, engine=engine, lengths=examples.layout.buckets)


def encode(index: int, bucket: int, *, texts: Sequence[str], engine: Any, lengths: Any) -> Any:
    """{'tokens': int64 tensor [T]}."""
    import torch

    text, length = texts[index % len(texts)], lengths[bucket]
    found = engine.encode(text, add_special_tokens=False).ids[: length - 2]
    row = torch.full((length,), Tokenizer.pad)
    row[: len(found) + 2] = torch.tensor([Tokenizer.bos, *found, Tokenizer.eos])
    return {"tokens": row}


BENCH = Bench(one_length, CPU_ROWS, integers, length, scale_length, peer)
