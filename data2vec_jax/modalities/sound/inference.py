"""Forward pass of a loaded sound model on raw waveforms.

B batch, S samples, F frames, N patches, D width.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from data2vec_jax.core.errors import UserError
from data2vec_jax.modalities.contract import Inference
from data2vec_jax.modalities.sound.model import SoundModel
from data2vec_jax.modalities.sound.spectrogram import FBANK, device_spectrogram, samples_of
from data2vec_jax.models.heads import Features
from data2vec_jax.models.outputs import Inputs, Outputs, Params, check_mask, outputs, states_of


def forward(
    config: Mapping[str, Any], model: SoundModel, params: Params, inputs: Inputs
) -> Outputs:
    """audio [B, S] at 16 kHz, optional padding bool [B, S] (True: padded), optional mask bool
    [B, N]. The spectrogram is made on the device; it is padded or cut to the model's F frames.
    """
    audio = inputs["audio"]
    length = jnp.full(len(audio), audio.shape[1])
    if inputs.get("padding") is not None:
        length = jnp.sum(~inputs["padding"], -1)
    batch = {"spectrogram": device_spectrogram(audio, length, model.image[0])}
    tokens = model.apply({"params": params}, batch, method="features")
    encoded = model.apply(
        {"params": params}, tokens, inputs.get("mask"), collect=True, method="encode"
    )
    x = jnp.concatenate([encoded.class_tokens, encoded.x], 1)
    return outputs(config, params, encoded, Features(x, states_of(encoded)))


def prepare(model: SoundModel, inputs: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
    """Waveforms as they are. Raises UserError: not [B, S], or less than a frame."""
    audio, cells = inputs["audio"], model.grid[0] * model.grid[1]
    if audio.ndim != 2 or audio.shape[1] < FBANK.length:
        raise UserError(
            f"audio of shape {audio.shape}; the model reads [batch, samples], of at least "
            f"{FBANK.length} samples at 16 kHz"
        )
    check_mask(inputs, cells, f"{cells} patches")
    return inputs


def example(model: SoundModel) -> dict[str, jax.ShapeDtypeStruct]:
    """One spectrogram: what the model itself reads."""
    return {"spectrogram": jax.ShapeDtypeStruct((1, *model.image, 1), jnp.float32)}


def random_inputs(
    config: Mapping[str, Any], model: SoundModel, rng: np.random.Generator
) -> dict[str, np.ndarray]:
    """Two waveforms of the model's length."""
    return {"audio": rng.normal(size=(2, samples_of(model.image[0]))).astype(np.float32) * 0.1}


INFERENCE = Inference(
    input="audio", example=example, forward=forward, prepare=prepare, random_inputs=random_inputs
)
