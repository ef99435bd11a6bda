"""Forward pass of a loaded text model on token ids.

B batch, T tokens.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from data2vec_jax.core.errors import UserError
from data2vec_jax.modalities.contract import Inference
from data2vec_jax.modalities.text.model import TextModel
from data2vec_jax.models.heads import Features
from data2vec_jax.models.outputs import Inputs, Outputs, Params, head_name, outputs, states_of


def forward(config: Mapping[str, Any], model: TextModel, params: Params, inputs: Inputs) -> Outputs:
    """tokens int [B, T] or [B, choices, T]; optional padding bool (True: padded) and types int
    (segment ids), shaped like tokens.

    Without `padding`, a model of fairseq's leaves pads out of attention; Hugging Face's attends to
    them.
    """
    choices = inputs["tokens"].shape[1] if inputs["tokens"].ndim == 3 else 1
    batch = {k: v.reshape(-1, v.shape[-1]) for k, v in inputs.items() if v is not None}
    tokens = model.apply({"params": params}, batch, method="features")
    if "padding" in batch:
        tokens = tokens._replace(valid=~batch["padding"])
    elif model.embeddings.pad_rows:
        tokens = tokens._replace(valid=None)
    encoded = model.apply({"params": params}, tokens, collect=True, method="encode")
    table = params["embeddings"]["tokens"]
    features = Features(encoded.x, states_of(encoded), None, table)
    several = {"choices": choices} if head_name(config) == "choice" else {}
    return outputs(config, params, encoded, features, several)


def prepare(model: TextModel, inputs: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
    """Raises UserError for rows that are too long and ids outside the vocabulary."""
    tokens, embeddings = inputs["tokens"], model.embeddings
    if not np.issubdtype(tokens.dtype, np.integer):
        raise UserError(f"tokens are {tokens.dtype}, not integers")
    if tokens.shape[-1] > embeddings.max_length:
        raise UserError(
            f"{tokens.shape[-1]} tokens in a row; the model has positions for "
            f"{embeddings.max_length}"
        )
    if tokens.size and not 0 <= tokens.min() <= tokens.max() < embeddings.vocab_size:
        raise UserError(
            f"token ids from {tokens.min()} to {tokens.max()}; the vocabulary is "
            f"{embeddings.vocab_size}"
        )
    return inputs


def example(model: TextModel) -> dict[str, jax.ShapeDtypeStruct]:
    """One row of four tokens."""
    return {"tokens": jax.ShapeDtypeStruct((1, 4), jnp.int32)}


def random_inputs(
    config: Mapping[str, Any], model: TextModel, rng: np.random.Generator
) -> dict[str, np.ndarray]:
    """Two rows of ordinary tokens; of multiple choice, two examples with three choices each."""
    embeddings = model.embeddings
    length = min(12, embeddings.max_length)
    size = (2, 3, length) if head_name(config) == "choice" else (2, length)
    special = max(4, embeddings.pad + 1)
    return {"tokens": rng.integers(special, embeddings.vocab_size, size, np.int32)}


INFERENCE = Inference(
    input="tokens",
    example=example,
    forward=forward,
    prepare=prepare,
    examples=lambda model, folder: {"tokenizer": folder},
    random_inputs=random_inputs,
)
