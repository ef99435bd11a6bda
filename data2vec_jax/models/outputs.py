"""Outputs of a loaded model, and the steps that forward passes of all modalities share.

B batch, T frames or tokens, D width, L layers, V vocabulary, C classes.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp

from data2vec_jax.core.errors import UserError
from data2vec_jax.models import heads
from data2vec_jax.models.heads import Features
from data2vec_jax.models.layers import Array

Params = Mapping[str, Any]
Inputs = Mapping[str, Array]

# Fields of `Outputs` that only some models fill.
OPTIONAL_OUTPUTS = (
    "logits",
    "pooler_output",
    "extract_features",
    "start_logits",
    "end_logits",
    "embeddings",
)


def check_mask(inputs: Mapping[str, Any], count: int, said: str) -> None:
    """Raises UserError: there is a mask [B, T], and T is not `count`, in words `said`."""
    if "mask" in inputs and inputs["mask"].shape[1:] != (count,):
        raise UserError(f"a mask of shape {inputs['mask'].shape} for {said}")


class Outputs(NamedTuple):
    """Outputs of a model under Hugging Face's names; None where the model has no such output."""

    last_hidden_state: Array
    """[B, T, D]; vision: class tokens first, then patches."""
    hidden_states: tuple[Array, ...] = ()
    """L + 1 arrays [B, T, D]: the input of the first block, then each block's output."""
    logits: Array | None = None
    """Of a head: [B, C], [B, T, C] or [B, T, V]."""
    pooler_output: Array | None = None
    """[B, D]: one vector per row."""
    extract_features: Array | None = None
    """[B, T, channels]: speech features before the projection to D."""
    start_logits: Array | None = None
    """[B, T]: start of the answer."""
    end_logits: Array | None = None
    """[B, T]: end of the answer."""
    embeddings: Array | None = None
    """[B, X]: speaker vectors."""
    ffn: tuple[Array, ...] = ()
    """L arrays [B, T, D]: outputs of the feed-forward parts, which data2vec averages to targets."""
    auxiliary_logits: Array | None = None
    """[B, C, rows, columns]: the auxiliary segmentation head."""
    features: Features | None = None
    """Inputs of the head, which its loss needs again."""


def head_options(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Section of the head in a converted config: its name and options, empty without a head."""
    return config.get("head") or {}


def head_name(config: Mapping[str, Any]) -> str | None:
    """Name of the head in a converted config, None without a head."""
    return head_options(config).get("name")


def outputs(
    config: Mapping[str, Any],
    params: Params,
    encoded: Any,
    features: Features,
    arguments: Mapping[str, Any] | None = None,
    **others: Any,
) -> Outputs:
    """Collects the outputs of encoder and head.

    Args:
      config: converted config; its head, if any, is applied to `features`.
      encoded: `Encoded`, made with `collect=True`.
      arguments: further arguments of the head's call.
      **others: further fields of `Outputs`.
    """
    head_outputs: Mapping[str, Array] = {}
    if head_options(config):
        head = heads.make(head_options(config))
        variables = {"params": params.get("task", {})}
        head_outputs = head.apply(variables, features, **(arguments or {}))
    return Outputs(
        features.x,
        tuple(features.states),
        ffn=tuple(encoded.ffn),
        features=features,
        **others,
        **head_outputs,
    )


def states_of(encoded: Any) -> Array:
    """[L + 1, B, T, D]: the input of the first block, then each block's output."""
    return jnp.concatenate([encoded.first[None], encoded.layers])


def forward(config: Mapping[str, Any], model: nn.Module, params: Params, inputs: Inputs) -> Outputs:
    """Forward pass of a modality without special inputs: front end, encoder, head.

    inputs: the arrays that `model.features` reads. `mask`, bool [B, T], sets the mask embedding;
    `padding`, bool like the input's first two axes (True: padded), becomes the batch's `length`.
    """
    variables, batch = {"params": params}, dict(inputs)
    mask, padding = batch.pop("mask", None), batch.pop("padding", None)
    if padding is not None:
        batch["length"] = jnp.sum(~padding, 1)
    tokens = model.apply(variables, batch, method="features")
    encoded = model.apply(variables, tokens, mask, collect=True, method="encode")
    x = encoded.x
    if encoded.class_tokens is not None:
        x = jnp.concatenate([encoded.class_tokens, x], 1)
    features = Features(x, states_of(encoded), model.valid_lengths(batch))
    return outputs(config, params, encoded, features)
