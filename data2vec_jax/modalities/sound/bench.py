"""The benchmark's sounds."""

from typing import Any

from data2vec_jax.modalities.contract import Bench


def length(config: dict[str, Any]) -> float:
    """Frames of 10 ms."""
    return config["examples"]["frames"]


def scale_length(config: dict[str, Any], share: float) -> dict[str, Any]:
    """`share` of the frames, in whole patches."""
    frames = max(round(length(config) * share / 16), 1) * 16
    config["model"]["frames"] = config["examples"]["frames"] = frames
    return config


BENCH = Bench(length=length, scale_length=scale_length)
