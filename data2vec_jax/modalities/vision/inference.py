"""Forward pass of a loaded vision model on images.

B batch, H height, W width, C channels, N patches.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from data2vec_jax.core.errors import UserError
from data2vec_jax.modalities.contract import Inference
from data2vec_jax.modalities.vision.model import VisionModel
from data2vec_jax.models.heads import Features, all_tokens
from data2vec_jax.models.outputs import (
    Inputs,
    Outputs,
    Params,
    check_mask,
    head_name,
    outputs,
    states_of,
)


def forward(
    config: Mapping[str, Any], model: VisionModel, params: Params, inputs: Inputs
) -> Outputs:
    """image [B, H, W, C] of any size, optional mask bool [B, N].

    Positions are resampled whenever the image's size is not the model's. Hugging Face's option
    `interpolate_pos_encoding` therefore has no counterpart.
    """
    image = inputs["image"]
    grid = model.patches.grid(*image.shape[1:3])
    tokens = model.apply({"params": params}, {"image": image}, method="features")
    encoded = model.apply(
        {"params": params}, tokens, inputs.get("mask"), collect=True, grid=grid, method="encode"
    )
    features = Features(all_tokens(encoded), states_of(encoded))
    mapped = {"grid": grid} if head_name(config) == "segmentation" else {}
    return outputs(config, params, encoded, features, mapped)


def prepare(model: VisionModel, inputs: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
    """Images with channels last.

    Raises UserError: another number of channels, an image smaller than a patch, or a mask with
    another number of patches.
    """
    image = channels_last(inputs["image"], model.channels)
    if image.ndim != 4 or image.shape[-1] != model.channels:
        raise UserError(
            f"images of shape {image.shape}; the model reads [batch, height, width, "
            f"{model.channels}]"
        )
    grid = model.patches.grid(*image.shape[1:3])
    if 0 in grid:
        raise UserError(f"images of {image.shape[1:3]} pixels; a patch has {model.patches.patch}")
    check_mask(inputs, grid[0] * grid[1], f"{grid[0]} x {grid[1]} patches")
    return {**inputs, "image": image}


def channels_last(image: np.ndarray, channels: int) -> np.ndarray:
    """[B, C, H, W] -> [B, H, W, C]; an image with channels last stays."""
    first = image.ndim == 4 and image.shape[-1] != channels and image.shape[1] == channels
    return np.moveaxis(image, 1, -1) if first else image


def example(model: VisionModel) -> dict[str, jax.ShapeDtypeStruct]:
    """One image of the model's size."""
    return {"image": jax.ShapeDtypeStruct((1, *model.image, model.channels), jnp.float32)}


INFERENCE = Inference(
    input="image",
    example=example,
    forward=forward,
    prepare=prepare,
    examples=lambda model, folder: {"image": model.image[0], "channels": model.channels},
)
