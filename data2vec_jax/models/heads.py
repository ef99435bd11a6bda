"""Heads: what is put on an encoder for a task (conversion spec 1.2, 4.2, 4.4, 4.5).

B batch, T frames or tokens, D width, L layers, U labels of a row, C classes, V vocabulary.

A head is a linen module: `head(features) -> {name: array}`, with Hugging Face's names of outputs,
and `loss(outputs, labels, features) -> scalar`, where `labels` is a dict of arrays as well. Labels
below 0 are none. The losses are in losses.py, and a large head in segmentation.py.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from data2vec_jax.core.config import check_section
from data2vec_jax.core.errors import UserError, nearest
from data2vec_jax.models.layers import Array, Conv, Key, LayerNorm, bert_init, dropout, gelu, split
from data2vec_jax.models.losses import PROBLEMS, cross_entropy, ctc_losses, problem_loss
from data2vec_jax.models.segmentation import Segmentation

Arrays = Mapping[str, Array]


class Features(NamedTuple):
    """What a head reads.

    x: [B, T, D], the encoder's last output (speech: after the adapter). states: [L + 1, B, T, D],
    the first block's input and each block's output, for heads that weight the layers. lengths: int
    [B], valid frames or tokens of `x`, None without padding. table: [V, D], token embeddings, for
    the tied output of a language model.
    """

    x: Array
    states: Array | None = None
    lengths: Array | None = None
    table: Array | None = None


def first(lengths: Array, size: int) -> Array:
    """bool [B, size]: the first `lengths` of each row.

    Hugging Face marks position length - 1 and all before it, and -1 is the last one: so a row
    without a whole frame counts as full, and we follow.
    """
    lengths = jnp.where(lengths > 0, lengths, size + lengths)
    return jnp.arange(size) < lengths[:, None]


def linear(width: int, name: str) -> nn.Dense:
    """A linear layer, N(0, 0.02) with zero bias."""
    return nn.Dense(width, kernel_init=bert_init, name=name)


class WeightedStates(nn.Module):
    """The last output, or a learned average over the states of all layers."""

    weighted: bool

    @nn.compact
    def __call__(self, features: Features) -> Array:  # [B, T, D]
        if not self.weighted:
            return features.x
        if features.states is None:
            raise UserError("a head that weights the layers needs the states of all of them")
        count = len(features.states)
        weights = self.param("weights", lambda key: jnp.full(count, 1.0 / count))
        return jnp.tensordot(jax.nn.softmax(weights), features.states, 1)


# Speech -------------------------------------------------------------------------------------------


class ConvAdapter(nn.Module):
    """Strided convolutions that shorten the encoder's output, each followed by a gated linear unit.

    width: O of the output. If the encoder has another width, a linear layer and a norm come first.
    layers: number of convolutions. kernel, stride: of each, in frames.
    """

    width: int
    layers: int = 3
    kernel: int = 3
    stride: int = 2

    def lengths(self, lengths: Array) -> Array:
        """Valid frames of the output (that of a kernel of 1, as in Hugging Face)."""
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
    """Characters of an utterance: a linear layer per frame.

    blank: index of the blank. reduction: 'sum' over the batch, or 'mean' of losses per label.
    zero_infinity: rows that no alignment fits count as 0.
    """

    vocab_size: int
    blank: int = 0
    reduction: str = "sum"
    zero_infinity: bool = False
    dropout: float = 0.0

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
    """A class of an utterance: projection to P, mean over valid frames, linear layer.

    projection: P. classes: C. weighted: of all layers.
    """

    classes: int
    projection: int = 256
    weighted: bool = False
    problem: str | None = "single_label_classification"

    @nn.compact
    def __call__(self, features: Features, key: Key = None) -> Arrays:
        """logits [B, C]."""
        x = WeightedStates(self.weighted, name="layers")(features)
        x = linear(self.projection, "projection_in")(x)
        if features.lengths is None:
            x = jnp.mean(x, 1)
        else:
            valid = first(features.lengths, x.shape[1])[..., None]
            x = jnp.sum(jnp.where(valid, x, 0), 1) / jnp.sum(valid, 1)
        return {"logits": linear(self.classes, "output")(x)}

    def loss(self, outputs: Arrays, labels: Arrays, features: Features) -> Array:
        """labels int [B]."""
        return problem_loss(self.problem, outputs["logits"], labels["labels"])


class TokenClassifier(nn.Module):
    """A class of each frame or token."""

    classes: int
    weighted: bool = False
    dropout: float = 0.0

    @nn.compact
    def __call__(self, features: Features, key: Key = None) -> Arrays:
        """logits [B, T, C]."""
        x = WeightedStates(self.weighted, name="layers")(features)
        return {"logits": linear(self.classes, "output")(dropout(x, self.dropout, key))}

    def loss(self, outputs: Arrays, labels: Arrays, features: Features) -> Array:
        """labels int [B, T], or [B, T, C] of which the largest counts."""
        labels = labels["labels"]
        if labels.ndim == 3:
            labels = jnp.argmax(labels, -1)
        return cross_entropy(outputs["logits"], labels)


class XVector(nn.Module):
    """A speaker's vector (Snyder 2018): dilated convolutions, mean and deviation over time.

    channels, kernels, dilations: of the convolutions. width: X of the vector. classes: C speakers.
    """

    classes: int
    channels: Sequence[int] = (512, 512, 512, 512, 1500)
    kernels: Sequence[int] = (5, 3, 3, 1, 1)
    dilations: Sequence[int] = (1, 2, 3, 1, 1)
    width: int = 512
    weighted: bool = False

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
    """Mean and unbiased deviation of valid frames: [B, T, D] -> [B, 2 D].

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
    """The first token through a linear layer and tanh."""

    @nn.compact
    def __call__(self, features: Features, key: Key = None) -> Arrays:
        """pooler_output [B, D]."""
        x = features.x
        return {"pooler_output": jnp.tanh(linear(x.shape[-1], "pooler")(x[:, 0]))}


class MaskedLm(nn.Module):
    """A token at each position: linear layer, GELU, norm, product with the token embeddings.

    tied: the output has the token embeddings, else weights of its own.
    """

    vocab_size: int
    eps: float = 1e-5
    tied: bool = True

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
    """A class, or a number, of a row: the first token, linear layer, tanh, linear layer."""

    classes: int
    problem: str | None = None
    dropout: float = 0.0

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


class Answer(nn.Module):
    """Where an answer starts and ends: two numbers per token."""

    @nn.compact
    def __call__(self, features: Features, key: Key = None) -> Arrays:
        """start_logits, end_logits [B, T]."""
        start, end = jnp.moveaxis(linear(2, "output")(features.x), -1, 0)
        return {"start_logits": start, "end_logits": end}

    def loss(self, outputs: Arrays, labels: Arrays, features: Features) -> Array:
        """start_positions, end_positions int [B]; those outside the row are left out."""
        ends = ("start", "end")
        losses = [
            cross_entropy(
                outputs[f"{end}_logits"], jnp.maximum(labels[f"{end}_positions"].reshape(-1), 0)
            )
            for end in ends
        ]
        return sum(losses) / 2


class Choice(nn.Module):
    """The best of several rows: the first token's pooled vector, one number each.

    choices: rows of an example; they are adjacent.
    """

    @nn.compact
    def __call__(self, features: Features, key: Key = None, choices: int = 1) -> Arrays:
        """x [B * choices, T, D] -> logits [B, choices]."""
        x = features.x
        pooled = jnp.tanh(linear(x.shape[-1], "pooler")(x[:, 0]))
        return {"logits": linear(1, "output")(pooled).reshape(-1, choices)}

    def loss(self, outputs: Arrays, labels: Arrays, features: Features) -> Array:
        """labels int [B]."""
        return cross_entropy(outputs["logits"], labels["labels"])


# Vision -------------------------------------------------------------------------------------------


class ImagePooler(nn.Module):
    """One vector of an image: 'class', its class token, or 'mean', a norm of its patches' mean.

    class_norm: a norm of the class token, too.
    """

    pooling: str = "class"
    eps: float = 1e-6
    class_norm: bool = False

    def setup(self):
        if self.pooling not in ("class", "mean"):
            hint = nearest(self.pooling, ("class", "mean"))
            raise UserError(f"config.head.pooling: no '{self.pooling}'{hint}")
        self.norm = LayerNorm(self.eps)

    def __call__(self, features: Features, key: Key = None) -> Arrays:
        """pooler_output [B, D]; the class token stands first in `features.x`."""
        pooled = features.x[:, 0] if self.pooling == "class" else jnp.mean(features.x[:, 1:], 1)
        normed = self.class_norm or self.pooling == "mean"
        return {"pooler_output": self.norm(pooled) if normed else pooled}


class Image(ImagePooler):
    """A class, or a number, of an image: one vector, linear layer."""

    classes: int = 1000
    problem: str | None = None
    start: float = 1.0  # factor on the first weights: BEiT's 0.001

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
    """A linear classifier on a frozen encoder: MAE's and DINO's protocols (conversion spec 2.3).

    pooling: 'class' token, 'mean' of the patches, or both joined, 'class+mean'. batch_norm: the
    features of a batch are normalised, without weights; those of a held-out image by running
    averages (momentum 0.1, unbiased variance), as by PyTorch's BatchNorm1d. deviation: of the
    first weights.
    """

    classes: int = 1000
    pooling: str = "mean"
    batch_norm: bool = False
    eps: float = 1e-6
    deviation: float = 0.01
    problem: str | None = "single_label_classification"
    freezes = True  # the encoder gets no gradient and drops nothing

    @nn.compact
    def __call__(self, features: Features, key: Key = None) -> Arrays:
        """logits [B, C]; with a key the batch's statistics count, and go to `assigned`."""
        x = features.x
        parts = {"class": x[:, 0], "mean": jnp.mean(x[:, 1:], 1)}
        wanted = self.pooling.split("+")
        if not set(wanted) <= set(parts):
            hint = nearest(self.pooling, ("class", "mean", "class+mean"))
            raise UserError(f"config.head.pooling: no '{self.pooling}'{hint}")
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


HEADS: dict[str, Any] = {
    "image": Image,
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
    "answer": Answer,
    "choice": Choice,
}


def make(options: Mapping[str, Any], section: str = "head") -> nn.Module:
    """The head of a config section: its `name` and its options."""
    options = dict(options)
    name = options.pop("name", None)
    if name not in HEADS:
        raise UserError(f"config.{section}.name: no head '{name}'{nearest(str(name), HEADS)}")
    check_section(section, options, HEADS[name])
    if options.get("problem") not in PROBLEMS:
        hint = nearest(options["problem"], [p for p in PROBLEMS if p])
        raise UserError(f"config.{section}.problem: no '{options['problem']}'{hint}")
    return HEADS[name](**{k: tuple(v) if isinstance(v, list) else v for k, v in options.items()})


def make_adapter(options: Mapping[str, Any], section: str = "conv_adapter") -> ConvAdapter:
    """The convolutional adapter of a config section."""
    check_section(section, options, ConvAdapter)
    return ConvAdapter(**options)


def parameters(head: nn.Module, features: Features, **given: Any) -> dict[str, Any]:
    """Shapes of a head's parameters; features may be shapes themselves."""
    shapes = jax.eval_shape(lambda f: head.init(jax.random.key(0), f, **given), features)
    return jax.tree.map(lambda x: np.broadcast_to(np.zeros((), x.dtype), x.shape), shapes["params"])
