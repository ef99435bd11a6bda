"""The benchmark's utterances."""

from typing import Any

from data2vec_jax.modalities.contract import Bench

CPU_SECONDS = 10.0


def one_length(examples: dict[str, Any], cpu: bool) -> dict[str, Any]:
    """The longest crop, on a CPU no more than `CPU_SECONDS`."""
    longest = examples["crops"][-1]
    return examples | {"crops": [min(longest, CPU_SECONDS) if cpu else longest]}


def length(config: dict[str, Any]) -> float:
    """Seconds."""
    return config["examples"]["crops"][-1]


def scale_length(config: dict[str, Any], share: float) -> dict[str, Any]:
    """`share` of the seconds."""
    config["examples"]["crops"] = [length(config) * share]
    return config


BENCH = Bench(
    one_length=one_length,
    integers=lambda model: (0, 2),  # labels, of which there are two clusters at least
    length=length,
    scale_length=scale_length,
)
