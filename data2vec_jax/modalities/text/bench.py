"""The benchmark's rows of tokens."""

from typing import Any

from data2vec_jax.modalities.contract import Bench
from data2vec_jax.modalities.text.tokenizer import SPECIALS

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


BENCH = Bench(one_length, CPU_ROWS, integers, length, scale_length)
