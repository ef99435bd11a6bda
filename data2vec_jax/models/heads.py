"""Heads: modules that make a task's outputs from an encoder's (conversion spec 1.2, 4.2, 4.4, 4.5).

B batch, T frames or tokens, D width, L layers, U labels of a row, C classes, V vocabulary.

A head is a linen module with two methods: `head(features) -> {name: array}`, with Hugging Face's
names of outputs, and `loss(outputs, labels, features) -> scalar`, where `labels` is a dict of
arrays. Negative labels are ignored. The losses are in losses.py, the segmentation head in
segmentation.py.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from data2vec_jax.core.config import (
    DropRate,
    Length,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    Range,
    Size,
    Vocabulary,
    check_section,
    choose,
)
from data2vec_jax.core.errors import UserError
from data2vec_jax.models.encoder import Encoded
from data2vec_jax.models.layers import Array, Conv, Key, LayerNorm, bert_init, dropout, gelu, split
from data2vec_jax.models.losses import Problem, cross_entropy, ctc_losses, problem_loss
from data2vec_jax.models.segmentation import Auxiliary, Segmentation

Arrays = Mapping[str, Array]


class Features(NamedTuple):
    """Inputs of a head."""

    x: Array
    """[B, T, D]: the encoder's output (of speech, after the convolutional adapter)."""
    states: Array | None = None
    """[L + 1, B, T, D]: the first block's input and each block's output."""
    lengths: Array | None = None
    """int [B]: valid frames or tokens of `x`; None without padding."""
    table: Array | None = None
    """[V, D]: token embeddings, which the output of a tied language model shares."""


def all_tokens(encoded: Encoded) -> Array:
    """[B, E + T, D]: class tokens, then all others. Heads take the first token of an image for its
    class token; where the model has none, the mean of the patches stands in for it."""
    first, x = encoded.class_tokens, encoded.x
    if first is None:
        return x
    first = first if first.shape[1] else jnp.mean(x, 1, keepdims=True)
    return jnp.concatenate([first, x], axis=1)


def valid_mask(lengths: Array, size: int) -> Array:
    """bool [B, size]: True at the first `lengths` positions of each row.

    A row without a whole frame counts as full, as in Hugging Face, whose index length - 1 is then
    -1, the last position.
    """
    lengths = jnp.where(lengths > 0, lengths, size + lengths)
    return jnp.arange(size) < lengths[:, None]


def linear(width: int, name: str) -> nn.Dense:
    """A linear layer, N(0, 0.02) with zero bias."""
    return nn.Dense(width, kernel_init=bert_init, name=name)


class WeightedStates(nn.Module):
    """The encoder's output, or a learned average over the states of all layers (`weighted`)."""

    weighted: bool

    @nn.compact
    def __call__(self, features: Features) -> Array:  # [B, T, D]
        if not self.weighted:
            return features.x
        if features.states is None:
            raise UserError("config.head.weighted: the states of all layers are missing")
        count = len(features.states)
        weights = self.param("weights", lambda key: jnp.full(count, 1.0 / count))
        return jnp.tensordot(jax.nn.softmax(weights), features.states, 1)


# Speech -------------------------------------------------------------------------------------------


class ConvAdapter(nn.Module):
    """Strided convolutions, each followed by a gated linear unit, shorten the encoder's output."""

    width: Size
    """O: width of the output. If the encoder's differs, a linear layer and a norm come first."""
    layers: Annotated[int, Range(1, 100)] = 3
    """Number of convolutions."""
    kernel: Size = 3
    """Taps of each, in frames."""
    stride: Size = 2
    """Of each, in frames."""

    def lengths(self, lengths: Array) -> Array:
        """Valid frames of the output, computed for kernels of 1 as Hugging Face does."""
        for _ in range(self.layers):
            lengths = (lengths - 1) // self.stride + 1
        return lengths

    @nn.compact
    def __call__(self, x: Array) -> Array:  # [B, T, D] -> [B, T', O]
        if x.shape[-1] != self.width:
            x = LayerNorm(1e-5, name="norm")(linear(self.width, "projection")(x))
        for i in range(self.layers):
            x = Conv(2 * self.width, self.kernel, self.stride, padding=1, name=f"conv{i}")(x)
            value, gate = jnp.split(x, 2, -1)
            x = value * jax.nn.sigmoid(gate)
        return x


class Ctc(nn.Module):
    """Connectionist temporal classification (Graves 2006): one linear layer per frame."""

    vocab_size: Vocabulary
    """V: labels, the blank among them."""
    blank: NonNegativeInt = 0
    """Index of the blank."""
    reduction: str = "sum"
    """'sum' of the rows' losses, 'mean' of losses per label, or another word for a loss per row."""
    zero_infinity: bool = False
    """Rows shorter than their labels have loss 0, not infinity."""
    dropout: DropRate = 0.0
    """Of the layer's input."""

    @nn.compact
    def __call__(self, features: Features, key: Key = None) -> Arrays:
        """logits [B, T, V]."""
        x = dropout(features.x, self.dropout, key)
        return {"logits": linear(self.vocab_size, "output")(x)}

    def loss(self, outputs: Arrays, labels: Arrays, features: Features) -> Array:
        """labels int [B, U]; see `ctc_losses`."""
        logits, labels = outputs["logits"], labels["labels"]
        lengths = features.lengths
        lengths = jnp.full(len(logits), logits.shape[1]) if lengths is None else lengths
        losses = ctc_losses(logits, lengths, labels, self.blank)
        if self.zero_infinity:
            losses = jnp.where(jnp.isinf(losses), 0.0, losses)
        if self.reduction == "sum":
            return jnp.sum(losses)
        count = jnp.sum((labels >= 0) & (labels != self.blank), 1)
        means = losses / jnp.maximum(count, 1)
        return jnp.mean(means) if self.reduction == "mean" else losses


class SequenceClassifier(nn.Module):
    """One class per utterance or text: projection, mean over valid frames, linear layer."""

    classes: Size
    """C."""
    projection: Size = 256
    """Width of the projection."""
    weighted: bool = False
    """Reads a learned average over all layers."""
    problem: Problem = "single_label_classification"
    """Kind of labels and loss: one of `losses.Problem`."""

    @nn.compact
    def __call__(self, features: Features, key: Key = None) -> Arrays:
        """logits [B, C]."""
        x = WeightedStates(self.weighted, name="layers")(features)
        x = linear(self.projection, "projection_in")(x)
        if features.lengths is None:
            x = jnp.mean(x, 1)
        else:
            valid = valid_mask(features.lengths, x.shape[1])[..., None]
            x = jnp.sum(jnp.where(valid, x, 0), 1) / jnp.sum(valid, 1)
        return {"logits": linear(self.classes, "output")(x)}

    def loss(self, outputs: Arrays, labels: Arrays, features: Features) -> Array:
        """labels int [B]."""
        return problem_loss(self.problem, outputs["logits"], labels["labels"])


class TokenClassifier(nn.Module):
    """One class per frame or token: a linear layer."""

    classes: Size
    """C."""
    weighted: bool = False
    """Reads a learned average over all layers."""
    dropout: DropRate = 0.0
    """Of the layer's input."""

    @nn.compact
    def __call__(self, features: Features, key: Key = None) -> Arrays:
        """logits [B, T, C]."""
        x = WeightedStates(self.weighted, name="layers")(features)
        return {"logits": linear(self.classes, "output")(dropout(x, self.dropout, key))}

    def loss(self, outputs: Arrays, labels: Arrays, features: Features) -> Array:
        """labels int [B, T], or scores [B, T, C], whose largest counts."""
        labels = labels["labels"]
        if labels.ndim == 3:
            labels = jnp.argmax(labels, -1)
        return cross_entropy(outputs["logits"], labels)


class XVector(nn.Module):
    """Speaker embeddings (x-vectors, Snyder 2018): dilated convolutions, statistics over time."""

    classes: Size
    """C: speakers."""
    channels: Annotated[Sequence[Size], Length(1, 100)] = (512, 512, 512, 512, 1500)
    """Output channels of each convolution."""
    kernels: Annotated[Sequence[Size], Length(1, 100)] = (5, 3, 3, 1, 1)
    """Taps of each convolution."""
    dilations: Annotated[Sequence[Size], Length(1, 100)] = (1, 2, 3, 1, 1)
    """Frames between taps of each convolution."""
    width: Size = 512
    """X: width of the embedding."""
    weighted: bool = False
    """Reads a learned average over all layers."""

    def __post_init__(self):
        if not len(self.channels) == len(self.kernels) == len(self.dilations):
            raise UserError("config.head: channels, kernels and dilations are of as many layers")
        super().__post_init__()

    @nn.compact
    def __call__(self, features: Features, key: Key = None) -> Arrays:
        """embeddings [B, X], logits [B, X] (before the cosines)."""
        x = WeightedStates(self.weighted, name="layers")(features)
        x = linear(self.channels[0], "projection_in")(x)
        lengths = features.lengths
        sizes = zip(self.channels, self.kernels, self.dilations, strict=True)
        for i, (channels, kernel, dilation) in enumerate(sizes):
            shape = (kernel, x.shape[-1], channels)
            taps = self.param(f"conv{i}_kernel", nn.initializers.lecun_normal(), shape)
            bias = self.param(f"conv{i}_bias", nn.initializers.zeros, (channels,))
            layout = ("NWC", "WIO", "NWC")
            x = lax.conv_general_dilated(
                x, taps, (1,), "VALID", rhs_dilation=(dilation,), dimension_numbers=layout
            )
            x = jax.nn.relu(x + bias)
            lengths = None if lengths is None else lengths - kernel + 1  # without dilation, as HF
        vector = linear(self.width, "embedding")(statistics(x, lengths))
        size = (self.width, self.classes)
        self.param("objective", nn.initializers.normal(1.0), size)  # of the loss, each column
        return {"embeddings": vector, "logits": linear(self.width, "output")(vector)}

    def loss(self, outputs: Arrays, labels: Arrays, features: Features) -> Array:
        """Additive-margin softmax (Wang 2018): 30 * (cosine - 0.4 at the label). labels int [B]."""
        unit = dict(axis=-1, keepdims=True)
        x, columns = outputs["logits"], self.get_variable("params", "objective")
        x = x / jnp.maximum(jnp.linalg.norm(x, **unit), 1e-12)
        columns = columns / jnp.maximum(jnp.linalg.norm(columns, axis=0), 1e-12)
        labels = labels["labels"].reshape(-1)
        margin = 0.4 * jax.nn.one_hot(labels, self.classes)
        return cross_entropy(30.0 * (x @ columns - margin), labels)


def statistics(x: Array, lengths: Array | None) -> Array:
    """Mean and unbiased standard deviation over valid frames: [B, T, D] -> [B, 2 D].

    A negative length counts from the end of the row.
    """
    if lengths is None:
        lengths = jnp.full(len(x), x.shape[1])
    lengths = jnp.where(lengths < 0, x.shape[1] + lengths, lengths)
    valid = (jnp.arange(x.shape[1]) < lengths[:, None])[..., None]
    count = jnp.sum(valid, 1)
    mean = jnp.sum(jnp.where(valid, x, 0), 1) / count
    squares = jnp.square(jnp.where(valid, x - mean[:, None], 0))
    return jnp.concatenate([mean, jnp.sqrt(jnp.sum(squares, 1) / (count - 1))], -1)


# Text ---------------------------------------------------------------------------------------------


class Pooler(nn.Module):
    """One vector per row: the first token, linear layer, tanh."""

    @nn.compact
    def __call__(self, features: Features, key: Key = None) -> Arrays:
        """pooler_output [B, D]."""
        x = features.x
        return {"pooler_output": jnp.tanh(linear(x.shape[-1], "pooler")(x[:, 0]))}


class MaskedLm(nn.Module):
    """Masked language model: linear layer, GELU, layer norm, product with the token embeddings."""

    vocab_size: Vocabulary
    """V."""
    eps: PositiveFloat = 1e-5
    """Of the layer norm."""
    tied: bool = True
    """The output layer shares the token embeddings; otherwise it has a kernel of its own."""

    @nn.compact
    def __call__(self, features: Features, key: Key = None) -> Arrays:
        """logits [B, T, V]."""
        x = features.x
        x = gelu(linear(x.shape[-1], "dense")(x))
        x = LayerNorm(self.eps, name="norm")(x)
        if self.tied:
            table = features.table.T
        else:
            table = self.param("kernel", bert_init, (x.shape[-1], self.vocab_size))
        bias = self.param("bias", nn.initializers.zeros, (self.vocab_size,))
        return {"logits": x @ table + bias}

    def loss(self, outputs: Arrays, labels: Arrays, features: Features) -> Array:
        """labels int [B, T]."""
        return cross_entropy(outputs["logits"], labels["labels"])


class ClsClassifier(nn.Module):
    """One class or number per row: the first token, linear layer, tanh, linear layer."""

    classes: Size
    """C; 1 for a number."""
    problem: Problem = None
    """Kind of labels and loss: one of `losses.Problem`; None to choose by the labels."""
    dropout: DropRate = 0.0
    """Of the input of both layers."""

    @nn.compact
    def __call__(self, features: Features, key: Key = None) -> Arrays:
        """logits [B, C]."""
        keys = split(key, 2)
        x = dropout(features.x[:, 0], self.dropout, keys[0])
        x = jnp.tanh(linear(x.shape[-1], "dense")(x))
        return {"logits": linear(self.classes, "output")(dropout(x, self.dropout, keys[1]))}

    def loss(self, outputs: Arrays, labels: Arrays, features: Features) -> Array:
        """labels as `problem_loss` says."""
        return problem_loss(self.problem, outputs["logits"], labels["labels"])


class QuestionAnswering(nn.Module):
    """Start and end of an answer: two logits per token."""

    @nn.compact
    def __call__(self, features: Features, key: Key = None) -> Arrays:
        """start_logits, end_logits [B, T]."""
        start, end = jnp.moveaxis(linear(2, "output")(features.x), -1, 0)
        return {"start_logits": start, "end_logits": end}

    def loss(self, outputs: Arrays, labels: Arrays, features: Features) -> Array:
        """start_positions, end_positions int [B]; positions outside the row are ignored."""
        ends = ("start", "end")
        losses = [
            cross_entropy(
                outputs[f"{end}_logits"], jnp.maximum(labels[f"{end}_positions"].reshape(-1), 0)
            )
            for end in ends
        ]
        return sum(losses) / 2


class MultipleChoice(nn.Module):
    """The best of several rows: a pooled first token and one logit per row."""

    @nn.compact
    def __call__(self, features: Features, key: Key = None, choices: int = 1) -> Arrays:
        """x [B * choices, T, D], the rows of one example adjacent -> logits [B, choices]."""
        x = features.x
        pooled = jnp.tanh(linear(x.shape[-1], "pooler")(x[:, 0]))
        return {"logits": linear(1, "output")(pooled).reshape(-1, choices)}

    def loss(self, outputs: Arrays, labels: Arrays, features: Features) -> Array:
        """labels int [B]."""
        return cross_entropy(outputs["logits"], labels["labels"])


# Vision -------------------------------------------------------------------------------------------


class ImagePooler(nn.Module):
    """One vector per image."""

    pooling: Literal["class", "mean"] = "class"
    """'class': the class token. 'mean': layer norm of the mean over patches."""
    eps: PositiveFloat = 1e-6
    """Of that norm."""
    class_norm: bool = False
    """Normalises the class token, too."""

    def setup(self):
        self.norm = LayerNorm(self.eps)

    def __call__(self, features: Features, key: Key = None) -> Arrays:
        """pooler_output [B, D]; the class token stands first in `features.x`."""
        pooled = features.x[:, 0] if self.pooling == "class" else jnp.mean(features.x[:, 1:], 1)
        normed = self.class_norm or self.pooling == "mean"
        return {"pooler_output": self.norm(pooled) if normed else pooled}


class ImageClassifier(ImagePooler):
    """One class or number per image: one vector, linear layer."""

    classes: Size = 1000
    """C; 1 for a number."""
    problem: Problem = None
    """Kind of labels and loss: one of `losses.Problem`; None to choose by the labels."""
    start: float = 1.0
    """Factor on the initial weights; BEiT's is 0.001."""

    def setup(self):
        super().setup()
        scaled = nn.initializers.normal(0.02 * self.start)
        self.output = nn.Dense(self.classes, kernel_init=scaled)

    def __call__(self, features: Features, key: Key = None) -> Arrays:
        """logits [B, C] and pooler_output [B, D]."""
        pooled = super().__call__(features)
        return pooled | {"logits": self.output(pooled["pooler_output"])}

    def loss(self, outputs: Arrays, labels: Arrays, features: Features) -> Array:
        """labels as `problem_loss` says."""
        return problem_loss(self.problem, outputs["logits"], labels["labels"])


class LinearProbe(nn.Module):
    """Linear classifier on a frozen encoder: MAE's and DINO's protocols (conversion spec 2.3)."""

    classes: Size = 1000
    """C."""
    pooling: Literal["class", "mean", "class+mean", "mean+class"] = "mean"
    """'class' token, 'mean' over patches, or 'class+mean', both concatenated."""
    batch_norm: bool = False
    """Normalises features by the batch's statistics, without learned weights; held-out rows by
    running averages (momentum 0.1, unbiased variance), as PyTorch's BatchNorm1d does."""
    eps: PositiveFloat = 1e-6
    """Of the batch norm."""
    deviation: NonNegativeFloat = 0.01
    """Standard deviation of the initial weights."""
    problem: Problem = "single_label_classification"
    """Kind of labels and loss: one of `losses.Problem`."""
    freezes = True  # no gradient reaches the encoder, and it runs without dropout

    @nn.compact
    def __call__(self, features: Features, key: Key = None) -> Arrays:
        """logits [B, C]. With a key (training), the batch's statistics normalise, and the updated
        running averages are in `assigned`."""
        x = features.x
        parts = {"class": x[:, 0], "mean": jnp.mean(x[:, 1:], 1)}
        wanted = self.pooling.split("+")
        x, assigned = jnp.concatenate([parts[name] for name in wanted], -1), {}
        if self.batch_norm:
            shape = (x.shape[-1],)
            mean = self.param("running_mean", nn.initializers.zeros, shape)
            variance = self.param("running_variance", nn.initializers.ones, shape)
            if key is not None:
                known, (mean, variance) = (mean, variance), (jnp.mean(x, 0), jnp.var(x, 0))
                unbiased = variance * len(x) / max(len(x) - 1, 1)
                assigned["assigned"] = {
                    "running_mean": 0.9 * known[0] + 0.1 * mean,
                    "running_variance": 0.9 * known[1] + 0.1 * unbiased,
                }
            x = (x - mean) * jax.lax.rsqrt(variance + self.eps)
        start = nn.initializers.normal(self.deviation)
        return {"logits": nn.Dense(self.classes, kernel_init=start, name="output")(x)} | assigned

    def loss(self, outputs: Arrays, labels: Arrays, features: Features) -> Array:
        """labels int [B]."""
        return problem_loss(self.problem, outputs["logits"], labels["labels"])


# Names in users' configs -> modules.
HEADS: dict[str, Any] = {
    "image": ImageClassifier,
    "linear_probe": LinearProbe,
    "image_pooler": ImagePooler,
    "segmentation": Segmentation,
    "ctc": Ctc,
    "utterance": SequenceClassifier,
    "frames": TokenClassifier,
    "xvector": XVector,
    "pooler": Pooler,
    "masked_lm": MaskedLm,
    "sequence": ClsClassifier,
    "answer": QuestionAnswering,
    "choice": MultipleChoice,
}


def make(options: Mapping[str, Any], section: str = "head") -> nn.Module:
    """The head of a config section: its `name` and its options."""
    name = choose(section, options, "name", HEADS)
    options = {key: value for key, value in options.items() if key != "name"}
    check_section(section, options, HEADS[name])
    if options.get("auxiliary"):
        check_section(f"{section}.auxiliary", options["auxiliary"], Auxiliary, given=("classes",))
    return HEADS[name](**{k: tuple(v) if isinstance(v, list) else v for k, v in options.items()})


def make_adapter(options: Mapping[str, Any], section: str = "conv_adapter") -> ConvAdapter:
    """The convolutional adapter of a config section."""
    check_section(section, options, ConvAdapter)
    return ConvAdapter(**options)


def parameters(head: nn.Module, features: Features, **given: Any) -> dict[str, Any]:
    """Parameters of a head as arrays of zeros that take no memory. features: arrays or shapes."""
    shapes = jax.eval_shape(lambda f: head.init(jax.random.key(0), f, **given), features)
    return jax.tree.map(lambda x: np.broadcast_to(np.zeros((), x.dtype), x.shape), shapes["params"])
