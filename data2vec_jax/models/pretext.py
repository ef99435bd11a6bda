"""Parameters that only an objective has, in the subtree `pretext/` of a model's.

B rows, V visible of T tokens, N predicted positions of a row, E class tokens, D encoder's width,
C width of a decoder or channels of a front end, P numbers of a patch, G groups of V code words.

Such a module takes the place of a model's head and decoder. It is called with `Inputs` and returns
its predictions at `places`; `flops(width, tokens, masked)` counts its forward pass on one row:
width D of the encoder, tokens E + T, masked N. `visible_only`: the encoder does not see masked
positions. Fine-tuning and conversion leave its parameters behind.
"""

from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from data2vec_jax.core.config import Depth, PositiveFloat, Size
from data2vec_jax.core.errors import UserError
from data2vec_jax.models import encoder, heads
from data2vec_jax.models.decoder import fill
from data2vec_jax.models.layers import (
    Array,
    Key,
    LayerNorm,
    bert_init,
    dense,
    gather_tokens,
    gelu,
    normalise,
    repeat,
    uniform_fan_in,
    unit_length,
    wide,
)
from data2vec_jax.models.positions import sincos


class Inputs(NamedTuple):
    """What these modules read."""

    encoded: encoder.Encoded
    """The student's: x [B, T, D], or [B, V, D] if it did not see masked positions."""
    mask: Array | None
    """bool [B, T]: masked positions; None for heads of whole examples."""
    places: Array | None
    """int [B, N]: where to predict; None for heads of whole examples."""
    table: Array | None = None
    """[V, D]: the model's token embeddings, as the blocks see them; None if it has none."""
    normed: Array | None = None
    """[B, T, C]: see `base.Local`."""
    temperature: Array | float = 1.0
    """Of the quantiser's softmax."""
    key: Key = None
    """Of the quantiser's noise; None for none."""
    valid: Array | None = None
    """bool of the shape of `places`: those that mean something; None for all."""
    views: int = 1
    """Adjacent rows that are views of one example."""


class Linear(nn.Module):
    """One linear layer D -> `out`, PyTorch's initialisation."""

    out: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, inputs: Inputs) -> Array:  # [B, N, out]
        x = gather_tokens(inputs.encoded.x, inputs.places)
        return dense(self.out, x.shape[-1], "torch", self.dtype, "output")(x)

    def flops(self, *, width: int, tokens: int, masked: int) -> float:
        """See the module's docstring."""
        return 2.0 * masked * width * self.out


class TokenLogits(heads.MaskedLm):
    """The head of masked language models, whose output layer is the table of token embeddings."""

    @nn.compact
    def __call__(self, inputs: Inputs) -> Array:  # [B, N, vocabulary]
        x = gather_tokens(inputs.encoded.x, inputs.places)
        return super().__call__(heads.Features(x, table=inputs.table))["logits"]

    def flops(self, *, width: int, tokens: int, masked: int) -> float:
        """See the module's docstring."""
        return 2.0 * masked * width * (width + self.vocab_size)


class ClassCosines(nn.Module):
    """HuBERT's head (baselines spec 5): cosines of a projection of `size` numbers and the vector of
    each class, divided by `temperature`. Classes are the `reserved` ones, then `clusters`."""

    clusters: int
    reserved: int
    size: int
    temperature: float
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, inputs: Inputs) -> Array:  # [B, N, classes]
        x = gather_tokens(inputs.encoded.x, inputs.places)
        x = dense(self.size, x.shape[-1], "torch", self.dtype, "output")(x)
        shape = (self.reserved + self.clusters, self.size)
        vectors = self.param("classes", nn.initializers.uniform(1.0), shape)
        x, vectors = unit_length(x), unit_length(vectors)
        return jnp.matmul(x, vectors.T, precision="highest") / self.temperature

    def flops(self, *, width: int, tokens: int, masked: int) -> float:
        """See the module's docstring."""
        return 2.0 * masked * self.size * (width + self.reserved + self.clusters)


class Quantised(NamedTuple):
    """Context vectors and targets [B, N, F], numbers of their code words int [B, N, G], and logits
    of all code words [B, N, G, V]; float32."""

    context: Array
    target: Array
    codes: Array
    logits: Array


class Quantiser(nn.Module):
    """wav2vec 2.0's product quantiser (arXiv 2006.11477, baselines spec 4), and the projection of
    what the encoder makes of masked positions to its size.

    In each of G groups a code word is chosen, the one with the largest logit plus Gumbel noise. The
    gradient is that of the softmax at the temperature.
    """

    channels: int  # C
    codes: Size = 320  # V
    groups: Size = 2  # G
    code_size: Size = 256  # of a code word of all groups together
    size: Size = 256  # F
    dtype: Any = jnp.float32

    def __post_init__(self):
        if self.code_size % self.groups:
            raise UserError(
                f"config.objective.quantiser.code_size: {self.code_size} is no multiple of "
                f"groups={self.groups}"
            )
        super().__post_init__()

    @nn.compact
    def __call__(self, inputs: Inputs) -> Quantised:
        x = gather_tokens(inputs.encoded.x, inputs.places)
        context = dense(self.size, x.shape[-1], "torch", self.dtype, "output")(x)
        z = gather_tokens(inputs.normed, inputs.places)
        shape = (self.groups, self.codes)
        init = nn.initializers.normal(1.0)
        logits = nn.Dense(self.groups * self.codes, kernel_init=init, name="logits")(wide(z))
        logits = logits.reshape(*z.shape[:-1], *shape)  # [B, N, G, V]
        noise = 0.0 if inputs.key is None else jax.random.gumbel(inputs.key, logits.shape)
        noisy = logits + noise
        soft = nn.softmax(noisy / inputs.temperature)
        codes = jnp.argmax(noisy, -1)
        hard = nn.one_hot(codes, self.codes)
        chosen = hard + (soft - jax.lax.stop_gradient(soft))  # exactly `hard`, with a gradient
        part = self.code_size // self.groups
        words = self.param("codes", nn.initializers.uniform(1.0), (*shape, part))
        q = jnp.einsum("bngv,gvp->bngp", chosen, words).reshape(*z.shape[:-1], -1)
        q = dense(self.size, self.code_size, "torch", self.dtype, "target")(q.astype(self.dtype))
        return Quantised(wide(context), wide(q), codes, logits)

    def flops(self, *, width: int, tokens: int, masked: int) -> float:
        """See the module's docstring; with the cosines of all pairs of masked positions."""
        quantise = self.codes * (self.groups * self.channels + self.code_size)
        return 2.0 * masked * (quantise + self.size * (width + self.code_size + masked))


class PatchDecoder(nn.Module):
    """MAE's decoder (arXiv 2111.06377, baselines spec 2): pre-norm blocks of width C see the class
    tokens, what the encoder made of visible patches, and one learned vector at all others, with
    fixed positions.
    """

    out: int
    grid: tuple[int, int]
    width: Size = 512  # C
    depth: Depth = 8
    heads: Size = 16
    mlp: Size = 2048
    eps: PositiveFloat = 1e-6
    dtype: Any = jnp.float32
    visible_only: ClassVar[bool] = True
    initializer: ClassVar[str] = "xavier"

    def _blocks(self):
        sizes = dict(depth=self.depth, width=self.width, heads=self.heads, mlp=self.mlp)
        options = dict(norm="pre", eps=self.eps, initializer=self.initializer, dtype=self.dtype)
        return encoder.Encoder(**sizes, **options, name="encoder")

    @nn.compact
    def __call__(self, inputs: Inputs) -> Array:  # [B, N, out]
        seen, first = inputs.encoded.x, inputs.encoded.class_tokens
        embed = dense(self.width, seen.shape[-1], self.initializer, self.dtype, "embed")
        hidden = self.param("mask_token", bert_init, (self.width,))
        hidden = jnp.broadcast_to(hidden, (*inputs.mask.shape, self.width))
        x = fill(embed(seen), inputs.mask, hidden)
        x = x + sincos(self.grid, self.width).astype(x.dtype)  # class tokens have none
        x = jnp.concatenate([embed(first), x], axis=1)
        x = self._blocks()(x).x[:, first.shape[1] :]
        # The rest works on each position alone.
        return self._output(gather_tokens(x, inputs.places))

    def _output(self, x):
        x = LayerNorm(self.eps, dtype=self.dtype, name="norm")(x)
        return dense(self.out, self.width, self.initializer, self.dtype, "output")(x)

    def flops(self, *, width: int, tokens: int, masked: int) -> float:
        """See the module's docstring."""
        sizes = dict(depth=self.depth, width=self.width, mlp=self.mlp)
        ends = 2.0 * self.width * ((tokens - masked) * width + masked * self.out)
        return ends + encoder.flops(**sizes, tokens=tokens)


class BlockPredictor(PatchDecoder):
    """I-JEPA's predictor (arXiv 2301.08243, baselines spec 7): pre-norm blocks of width C see what
    the encoder made of visible patches, and one learned vector at each place of one target, with
    fixed positions. The K targets of an example are adjacent rows of `places`.
    """

    width: Size = 384  # C
    depth: Depth = 6
    heads: Size = 12
    mlp: Size = 1536
    initializer: ClassVar[str] = "bert"

    @nn.compact
    def __call__(self, inputs: Inputs) -> Array:  # [B * K, N, out]
        seen, rows = inputs.encoded.x, len(inputs.places)
        V, positions = seen.shape[1], jnp.asarray(sincos(self.grid, self.width), self.dtype)
        embed = dense(self.width, seen.shape[-1], self.initializer, self.dtype, "embed")
        hidden = self.param("mask_token", bert_init, (self.width,)).astype(self.dtype)
        places = jnp.argsort(inputs.mask, axis=-1, stable=True)[:, :V]  # of visible patches
        x = repeat(embed(seen) + positions[places], rows)
        x = jnp.concatenate([x, hidden + positions[inputs.places]], axis=1)
        valid = inputs.valid
        if valid is not None:
            valid = jnp.concatenate([jnp.ones((rows, V), bool), valid], axis=1)
        return self._output(self._blocks()(x, valid=valid).x[:, V:])

    def flops(self, *, width: int, tokens: int, masked: int, targets: int = 1) -> float:
        """Of K = `targets` of `masked` positions each; tokens: visible ones."""
        sizes = dict(depth=self.depth, width=self.width, mlp=self.mlp)
        one = 2.0 * self.width * masked * self.out + encoder.flops(**sizes, tokens=tokens + masked)
        return 2.0 * self.width * tokens * width + targets * one


class Prototypes(nn.Module):
    """DINO's head (arXiv 2104.14294, baselines spec 6): three linear layers on the class token (or
    the mean of the patches), unit length, and the cosines with `outputs` learned vectors.

    `centre` is of the teacher's cosines; the objective assigns it.
    """

    outputs: Size = 65_536
    hidden: Size = 2_048
    size: Size = 256
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, inputs: Inputs) -> Array:  # [B, outputs]
        x = heads.all_tokens(inputs.encoded)[:, 0]
        for name in ("first", "second"):
            x = gelu(dense(self.hidden, x.shape[-1], "bert", self.dtype, name)(x))
        x = unit_length(dense(self.size, self.hidden, "bert", self.dtype, "third")(x))
        shape = self.outputs, self.size
        vectors = unit_length(self.param("vectors", uniform_fan_in(self.size), shape))
        self.param("centre", nn.initializers.zeros, (self.outputs,))
        # In float32: the teacher's are divided by 0.04.
        return jnp.matmul(x, vectors.T, precision="highest")

    def flops(self, *, width: int, tokens: int, masked: int) -> float:
        """See the module's docstring."""
        inner = self.hidden * (width + self.hidden + self.size)
        return 2.0 * (inner + self.size * self.outputs)


class ProjectorPredictor(nn.Module):
    """BYOL's two networks (arXiv 2006.07733, baselines spec 6), on the class token or the mean of
    the patches: linear layer, batch norm (eps 1e-5), ReLU, linear layer without bias. The norm's
    statistics are of all examples of a batch, of each view alone, and there are no others.

    Returns the projection and what the predictor makes of it.
    """

    hidden: Size = 4_096
    size: Size = 256
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, inputs: Inputs) -> Array:  # [B * views, 2, size]
        def network(x, name):
            x = dense(self.hidden, x.shape[-1], "torch", self.dtype, f"{name}_up")(x)
            rows = x.reshape(-1, inputs.views, self.hidden)
            x = normalise(rows, 1e-5, (0,)).reshape(x.shape)
            x = x * self.param(f"{name}_scale", nn.initializers.ones, (self.hidden,))
            x = jax.nn.relu(x + self.param(f"{name}_bias", nn.initializers.zeros, (self.hidden,)))
            down = dense(self.size, self.hidden, "torch", self.dtype, f"{name}_down", bias=False)
            return wide(down(x.astype(self.dtype)))

        projection = network(heads.all_tokens(inputs.encoded)[:, 0], "project")
        prediction = network(projection.astype(self.dtype), "predict")
        return jnp.stack([projection, prediction], 1)

    def flops(self, *, width: int, tokens: int, masked: int) -> float:
        """See the module's docstring."""
        return 2.0 * self.hidden * (width + 3 * self.size)
