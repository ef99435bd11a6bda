"""The benchmark's images."""

import math
from typing import Any

from data2vec_jax.modalities.contract import Bench


def length(config: dict[str, Any]) -> float:
    """Patches."""
    return (config["model"]["image"] // config["model"]["patch"]) ** 2


def scale_length(config: dict[str, Any], share: float) -> dict[str, Any]:
    """`share` of the patches; the sizes of masks follow."""
    model, mask = config["model"], config["mask"]
    side = max(round(model["image"] * math.sqrt(share) / model["patch"]), 2)
    area = (side * model["patch"] / model["image"]) ** 2
    model["image"] = config["examples"]["image"] = side * model["patch"]
    if "count" in mask:
        mask["count"] = round(mask["count"] * area)
        mask["min_patches"] = max(round(mask.get("min_patches", 16) * area), 1)
    return config


BENCH = Bench(length=length, scale_length=scale_length)
