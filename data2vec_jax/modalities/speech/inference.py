"""Forward pass of a loaded speech model on raw waveforms.

B batch, S samples, T frames, D width.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from data2vec_jax.core.errors import UserError
from data2vec_jax.modalities.contract import Inference, Tokens
from data2vec_jax.modalities.speech.model import SpeechModel
from data2vec_jax.models import heads
from data2vec_jax.models.heads import Features
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
    config: Mapping[str, Any], model: SpeechModel, params: Params, inputs: Inputs
) -> Outputs:
    """audio [B, S], optional padding bool [B, S] (True: padded), optional mask bool [B, T]."""
    variables, audio = {"params": params}, inputs["audio"]
    lengths = valid = None
    if inputs.get("padding") is not None:
        lengths = model.frontend.frames(jnp.sum(~inputs["padding"], -1))
        valid = heads.valid_mask(lengths, model.frontend.frames(audio.shape[-1]))
    x, extracted, _ = model.apply(variables, audio, valid, method="extract")
    if valid is None and head_name(config) == "ctc":
        # As in Hugging Face, the loss covers the encoder's frames only: the adapter's padding adds
        # some at the end.
        lengths = jnp.full(len(x), x.shape[1])
    encoded = model.apply(
        variables, Tokens(x, valid), inputs.get("mask"), collect=True, method="encode"
    )
    x = encoded.x
    if config.get("conv_adapter"):
        adapter = heads.make_adapter(config["conv_adapter"])
        x = adapter.apply({"params": params["adapter"]}, x)
        lengths = None if lengths is None else adapter.lengths(lengths)
    features = Features(x, states_of(encoded), lengths)
    return outputs(config, params, encoded, features, extract_features=extracted)


def prepare(model: SpeechModel, inputs: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
    """Waveforms as they are. Raises UserError: not [B, S], less than a frame, or a mask that has
    other frames.
    """
    audio = inputs["audio"]
    if audio.ndim != 2 or (frames := model.frontend.frames(audio.shape[1])) < 1:
        raise UserError(
            f"audio of shape {audio.shape}; the model reads [batch, samples], of at least "
            f"{model.frontend.reach} samples at 16 kHz"
        )
    check_mask(inputs, frames, f"{frames} frames")
    return inputs


def example(model: SpeechModel) -> dict[str, jax.ShapeDtypeStruct]:
    """One waveform of at least 8 frames."""
    samples = model.frontend.reach + 7 * model.frontend.hop
    return {"audio": jax.ShapeDtypeStruct((1, samples), jnp.float32)}


def random_inputs(
    config: Mapping[str, Any], model: SpeechModel, rng: np.random.Generator
) -> dict[str, np.ndarray]:
    """Two waveforms of three times the smallest length."""
    samples = example(model)["audio"].shape[1]
    return {"audio": rng.normal(size=(2, 3 * samples)).astype(np.float32)}


INFERENCE = Inference(
    input="audio", example=example, forward=forward, prepare=prepare, random_inputs=random_inputs
)
