"""`data2vec_jax.load(PATH)`: a checkpoint of any known layout as a callable.

B batch, S samples, T frames or tokens, N patches, D width, L layers, V vocabulary, C classes.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from data2vec_jax.convert import ours, peft
from data2vec_jax.convert.tables import nest
from data2vec_jax.core.errors import UserError
from data2vec_jax.modalities.contract import Tokens
from data2vec_jax.modalities.speech.model import frames
from data2vec_jax.models import adapters, heads
from data2vec_jax.models.heads import Features

Array = jax.Array


class Outputs(NamedTuple):
    """What a checkpoint makes of its inputs, by Hugging Face's names; None for what it has not.

    last_hidden_state: [B, T, D] (vision: class tokens first). hidden_states: L + 1 arrays
    [B, T, D], the first block's input and each block's output. ffn: L arrays, the output of each
    block's feed-forward part, which data2vec averages to targets. The others are of heads.
    features: what the head read, for its `loss`.
    """

    last_hidden_state: Array
    hidden_states: tuple[Array, ...] = ()
    logits: Array | None = None
    pooler_output: Array | None = None
    extract_features: Array | None = None
    start_logits: Array | None = None
    end_logits: Array | None = None
    embeddings: Array | None = None
    ffn: tuple[Array, ...] = ()
    auxiliary_logits: Array | None = None
    features: Features | None = None


# Outputs that some models have.
HEAD_OUTPUTS = (
    "logits", "pooler_output", "extract_features", "start_logits", "end_logits", "embeddings",
)  # fmt: skip

Params = Mapping[str, Any]
Inputs = Mapping[str, Array]


def states_of(encoded: Any) -> Array:
    """[L + 1, B, T, D]: the first block's input and each block's output."""
    return jnp.concatenate([encoded.first[None], encoded.layers])


def with_head(
    config: Mapping[str, Any], params: Params, features: Features, **given: Any
) -> dict[str, Array]:
    """Outputs of the config's head, if it has one."""
    if not config.get("task"):
        return {}
    head = heads.make(config["task"])
    return dict(head.apply({"params": params.get("task", {})}, features, **given))


def speech(config: Mapping[str, Any], params: Params, inputs: Inputs) -> Outputs:
    """audio [B, S], and maybe padding bool [B, S] (True: none), mask bool [B, T]."""
    model, audio = ours.model_of(config), inputs["audio"]
    apply = {"params": params}
    x, extracted = model.apply(apply, audio, method="extract")
    lengths = valid = None
    if inputs.get("padding") is not None:
        samples = jnp.sum(~inputs["padding"], -1)
        lengths = frames(samples, model.frontend.convs)
        valid = heads.first(lengths, x.shape[1])
    elif (config.get("task") or {}).get("name") == "ctc":  # as theirs, the loss stops before what
        lengths = jnp.full(len(x), x.shape[1])  # an adapter adds at the end
    encoded = model.apply(
        apply, Tokens(x, valid), inputs.get("mask"), collect=True, method="encode"
    )
    states, x = states_of(encoded), encoded.x
    if config.get("adapter"):
        adapter = ours.make_adapter(config)
        x = adapter.apply({"params": params["adapter"]}, x)
        lengths = None if lengths is None else adapter.lengths(lengths)
    features = Features(x, states, lengths)
    head = with_head(config, params, features)
    more = dict(extract_features=extracted, ffn=tuple(encoded.ffn), features=features)
    return Outputs(x, tuple(states), **more, **head)


def text(config: Mapping[str, Any], params: Params, inputs: Inputs) -> Outputs:
    """tokens int [B, T] or [B, choices, T], and maybe padding bool (True: none), types int, both as
    tokens.

    Without `padding`, pads are left out if the model was made that way (fairseq's); Hugging Face's
    attend to them.
    """
    model = ours.model_of(config)
    choices = inputs["tokens"].shape[1] if inputs["tokens"].ndim == 3 else 1
    batch = {k: v.reshape(-1, v.shape[-1]) for k, v in inputs.items() if v is not None}
    tokens = model.apply({"params": params}, batch, method="features")
    if "padding" in batch:
        tokens = tokens._replace(valid=~batch["padding"])
    elif model.embeddings.pad_rows:
        tokens = tokens._replace(valid=None)
    encoded = model.apply({"params": params}, tokens, collect=True, method="encode")
    states = states_of(encoded)
    features = Features(encoded.x, states, None, params["embeddings"]["tokens"])
    several = {"choices": choices} if (config.get("task") or {}).get("name") == "choice" else {}
    head = with_head(config, params, features, **several)
    return Outputs(encoded.x, tuple(states), ffn=tuple(encoded.ffn), features=features, **head)


def vision(config: Mapping[str, Any], params: Params, inputs: Inputs) -> Outputs:
    """image [B, H, W, C] of any size, and maybe mask bool [B, N].

    Positions are resampled to the image's size whenever it is not the model's, so `interpolate`,
    which asks Hugging Face for that, changes nothing.
    """
    model, image = ours.model_of(config), inputs["image"]
    grid = model.patches.grid(*image.shape[1:3])
    tokens = model.apply({"params": params}, {"image": image}, method="features")
    encoded = model.apply(
        {"params": params}, tokens, inputs.get("mask"), collect=True, grid=grid, method="encode"
    )
    x, states = jnp.concatenate([encoded.class_tokens, encoded.x], 1), states_of(encoded)
    features = Features(x, states)
    mapped = {"grid": grid} if (config.get("task") or {}).get("name") == "segmentation" else {}
    head = with_head(config, params, features, **mapped)
    return Outputs(x, tuple(states), ffn=tuple(encoded.ffn), features=features, **head)


FORWARD: dict[str, Callable[..., Outputs]] = {"speech": speech, "text": text, "vision": vision}
INPUT = {"speech": "audio", "text": "tokens", "vision": "image"}


def forward(config: Mapping[str, Any], params: Params, inputs: Inputs) -> Outputs:
    """A pure function of (parameters, inputs); see the modality's function for the inputs."""
    if sites := peft.sites_of(config):
        params = dict(params)
        params = adapters.merged(params, sites, params.pop("adapters"))
    return FORWARD[config["modality"]](config, params, inputs)


def loss(
    config: Mapping[str, Any], params: Params, outputs: Outputs, labels: Mapping[str, Array]
) -> Array:
    """The head's loss; labels by Hugging Face's names."""
    head = heads.make(config["task"])
    values = {k: v for k, v in outputs._asdict().items() if v is not None}
    labels = {name: jnp.asarray(value) for name, value in labels.items()}
    variables = {"params": params.get("task", {})}
    return head.apply(variables, values, labels, outputs.features, method="loss")


class Loaded:
    """A checkpoint that can be called.

    config: ours. params: nested dicts of arrays (the teacher's are in `teacher`). unused: tensors
    of the file that it does not need.
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
            [B, T]. vision: images [B, H, W, C] or [B, C, H, W], normalised floats or uint8.
          padding_mask: bool, as `inputs` (speech, text), True where there is nothing. Without it,
            nothing is padding (fairseq's text models: the pads).
          **more: mask, bool [B, T] or [B, N], True where the mask embedding stands; types, segment
            ids of text.

        Returns:
          `Outputs`: last_hidden_state, hidden_states, and what the head adds.
        """
        batch = {INPUT[self.config["modality"]]: np.asarray(inputs)}
        if padding_mask is not None:
            batch["padding"] = np.asarray(padding_mask) != 0
        batch |= {name: np.asarray(value) for name, value in more.items() if value is not None}
        if "image" in batch:
            batch["image"] = channels_last(batch["image"], ours.model_of(self.config).channels)
        check_inputs(self.config, batch)
        return self._forward(self.params, batch)


def check_inputs(config: Mapping[str, Any], batch: Mapping[str, np.ndarray]) -> None:
    """Refuses inputs that the config's model cannot read."""
    if "image" in batch:
        _check_image(config, batch)
    if "tokens" not in batch:
        return
    tokens, model = batch["tokens"], config["model"]
    if tokens.shape[-1] > model.get("max_length", 512):
        raise UserError(
            f"{tokens.shape[-1]} tokens in a row; the model has positions for "
            f"{model.get('max_length', 512)}"
        )
    size = model.get("vocab_size", 50_265)
    if tokens.size and not 0 <= tokens.min() <= tokens.max() < size:
        raise UserError(
            f"token ids from {tokens.min()} to {tokens.max()}; the vocabulary is {size}"
        )


def channels_last(image: np.ndarray, channels: int) -> np.ndarray:
    """[B, C, H, W] -> [B, H, W, C], which may have been given as well."""
    first = image.ndim == 4 and image.shape[-1] != channels and image.shape[1] == channels
    return np.moveaxis(image, 1, -1) if first else image


def _check_image(config, batch):
    """Channels last, an image at least of the size of a patch, a mask of its patches."""
    model, image = ours.model_of(config), batch["image"]
    if image.ndim != 4 or image.shape[-1] != model.channels:
        raise UserError(
            f"images of shape {image.shape}; the model reads [batch, height, width, "
            f"{model.channels}]"
        )
    grid = model.patches.grid(*image.shape[1:3])
    if 0 in grid:
        raise UserError(f"images of {image.shape[1:3]} pixels; a patch has {model.patches.patch}")
    if "mask" in batch and batch["mask"].shape[1:] != (grid[0] * grid[1],):
        raise UserError(f"a mask of shape {batch['mask'].shape} for {grid[0]} x {grid[1]} patches")


def load(path: Any, base: Any = None) -> Loaded:
    """Opens a checkpoint: ours, a Hugging Face folder, fairseq's .pt, BEiT's .pth, or an adapter of
    PEFT's, by its content.

    Args:
      path: of the checkpoint.
      base: of an adapter, the folder of its base model, if it is not where the adapter says.

    Raises:
      UserError: not a checkpoint that we know, a damaged or an incomplete one.
    """
    checkpoint = ours.open_checkpoint(path, base)
    ours.demand_whole(checkpoint)
    return Loaded(checkpoint)
