"""`data2vec_jax.load(PATH)`: a checkpoint of any known layout as a callable."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from data2vec_jax.convert import ours, peft
from data2vec_jax.core.errors import UserError
from data2vec_jax.core.trees import nest
from data2vec_jax.models import adapters, heads
from data2vec_jax.models.layers import Array
from data2vec_jax.models.outputs import Inputs, Outputs, Params


def forward(config: Mapping[str, Any], params: Params, inputs: Inputs) -> Outputs:
    """Outputs of the config's model: a pure function of parameters and inputs.

    inputs: see `forward` in the modality's `inference`.
    """
    if sites := peft.sites_of(config):
        params = dict(params)
        params = adapters.merged(params, sites, params.pop("adapters"))
    return ours.inference_of(config).forward(config, ours.model_of(config), params, inputs)


def loss(
    config: Mapping[str, Any], params: Params, outputs: Outputs, labels: Mapping[str, Array]
) -> Array:
    """The head's loss; labels by Hugging Face's names."""
    head = heads.make(config["head"])
    values = {k: v for k, v in outputs._asdict().items() if v is not None}
    labels = {name: jnp.asarray(value) for name, value in labels.items()}
    variables = {"params": params.get("task", {})}
    return head.apply(variables, values, labels, outputs.features, method="loss")


class Loaded:
    """A checkpoint that can be called.

    Attributes:
      config: the converted config (see `data2vec_jax.convert`).
      params: the student's parameters, nested dicts of arrays.
      teacher: the teacher's parameters, empty if the checkpoint has none.
      unused: tensors of the file that the model does not need -> the reason.
    """

    def __init__(self, checkpoint: ours.Checkpoint):
        self.config, self.unused = checkpoint.config, checkpoint.unused
        tree = nest(checkpoint.tree())
        self.teacher = tree.pop("teacher", {})
        self.params = jax.tree.map(jnp.asarray, tree)
        self._forward = jax.jit(lambda params, inputs: forward(self.config, params, inputs))

    def __call__(self, inputs: Any, padding_mask: Any = None, **more: Any) -> Outputs:
        """Outputs for a batch.

        Args:
          inputs: speech: audio [B, S], 16 kHz, normalised as the model was trained. text: token ids
            [B, T]. vision: images [B, H, W, C] or [B, C, H, W], normalised floats or uint8. Others:
            the array that `input` of the modality's `inference` names.
          padding_mask: bool, shaped like `inputs` (speech, text), True at padding. Without it,
            nothing is padding (fairseq's text models: the pads).
          **more: mask, bool [B, T] or [B, N], True where the mask embedding replaces the input;
            types, segment ids of text; further inputs that the modality's forward pass reads.

        Returns:
          `Outputs`: last_hidden_state, hidden_states, and the head's outputs.

        Raises:
          UserError: inputs that the model cannot read: of another shape, empty, too short, or not
            finite.
        """
        inference = ours.inference_of(self.config)
        batch = {inference.input: array_of(inference.input, inputs)}
        if padding_mask is not None:
            batch["padding"] = padding = array_of("padding_mask", padding_mask) != 0
            if padding.shape != (shape := batch[inference.input].shape):
                raise UserError(f"padding_mask of shape {padding.shape} for inputs of {shape}")
        batch |= {name: np.asarray(value) for name, value in more.items() if value is not None}
        batch = dict(inference.prepare(ours.model_of(self.config), batch))
        return self._forward(self.params, batch)


def array_of(name: str, values: Any) -> np.ndarray:
    """An array of the values. Raises UserError: it has none, or they are not finite numbers."""
    try:
        array = np.asarray(values)
    except ValueError:
        raise UserError(f"{name}: rows of several lengths; pad them") from None
    if not any(jnp.issubdtype(array.dtype, kind) for kind in (bool, jnp.integer, jnp.floating)):
        raise UserError(f"{name}: {array.dtype} in place of real numbers")
    if not array.size:
        raise UserError(f"{name} of shape {array.shape}: nothing is in it")
    if not np.isfinite(array).all():
        raise UserError(f"{name}: some numbers are NaN or infinite")
    return array


def load(path: Any, base: Any = None) -> Loaded:
    """Opens a checkpoint. Its format is detected from its content: a folder or workdir of ours, a
    Hugging Face folder, fairseq's .pt, BEiT's .pth, an adapter of PEFT's, or "reference:NAME", a
    small encoder that comes with the package (docs/results.md).

    Args:
      path: of the checkpoint.
      base: of an adapter, the folder of its base model, if it is not where the adapter says.

    Raises:
      UserError: an unknown format, or a damaged or incomplete checkpoint.
    """
    checkpoint = ours.open_checkpoint(path, base)
    ours.demand_whole(checkpoint)
    return Loaded(checkpoint)
