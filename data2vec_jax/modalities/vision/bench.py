"""The benchmark's images."""

import functools
import math
from collections.abc import Sequence
from typing import Any

from PIL import Image

from data2vec_jax.core.errors import UserError
from data2vec_jax.modalities.contract import Bench

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet


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


def peer(examples: Any, files: Sequence[Any]) -> Any:
    """As BEiT and MAE read: PIL and torchvision."""
    from torchvision import transforms

    c, cubic = examples.config, transforms.InterpolationMode.BICUBIC
    if c.views is not None:
        raise UserError("config.examples.views: --peer reads one view of an image")
    steps = [
        *([transforms.ColorJitter(c.jitter, c.jitter, c.jitter)] if c.jitter else []),
        transforms.RandomResizedCrop(c.image, c.scale, c.aspect, cubic),
        transforms.RandomHorizontalFlip(c.flip),
        transforms.ToTensor(),
        transforms.Normalize(MEAN[: c.channels], STD[: c.channels]),
    ]
    augment, mode = transforms.Compose(steps), "RGB" if c.channels == 3 else "L"
    return functools.partial(read_augmented, files=files, mode=mode, augment=augment)


def read_augmented(
    index: int, bucket: int, *, files: Sequence[Any], mode: str, augment: Any
) -> Any:
    """{'image': float32 tensor [C, side, side]}."""
    with Image.open(files[index].path) as image:
        return {"image": augment(image.convert(mode))}


BENCH = Bench(length=length, scale_length=scale_length, peer=peer)
