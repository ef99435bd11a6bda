"""Speech: raw waveform -> frames -> encoder.

B batch, S samples, T frames, D width, C channels.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from data2vec_jax.errors import UserError
from data2vec_jax.modalities.contract import (
    FROZEN,
    Batch,
    Options,
    Tokens,
    build,
    check_padding,
)  # fmt: skip
from data2vec_jax.models.encoder import Encoded, Encoder, Record
from data2vec_jax.models.encoder import flops as encoder_flops
from data2vec_jax.models.layers import (
    Array,
    Conv1d,
    Key,
    LayerNorm,
    Mlp,
    dense,
    dropout,
    gelu,
    head_flops,
    normalise,
    split,
)  # fmt: skip
from data2vec_jax.models.positions import ConvPositions

# (channels, kernel, stride): 320 samples a frame, 400 samples of context (spec 2.1).
CONVS = ((512, 10, 5),) + ((512, 3, 2),) * 4 + ((512, 2, 2),) * 2


def frames(samples: Any, convs: Sequence[Sequence[int]] = CONVS) -> Any:
    """Number of frames of a waveform: floor((n - kernel) / stride) + 1 through the convolutions."""
    for _, kernel, stride in convs:
        samples = (samples - kernel) // stride + 1
    return samples


class SpeechFeatures(nn.Module):
    """The convolutional front end and the projection to the encoder's width (spec 2.1).

    norm: 'layer' (every layer) or 'group' (one channel-wise norm over time after the first).
    gradient: factor on the gradient that reaches the convolutions.
    """

    width: int
    convs: Sequence[Sequence[int]] = CONVS
    norm: str = "layer"
    bias: bool = False
    gradient: float = 1.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, audio: Array) -> Array:  # [B, S] -> [B, T, D]
        x = audio[..., None].astype(self.dtype)
        for i, (channels, kernel, stride) in enumerate(self.convs):
            x = Conv1d(
                channels, kernel, stride, bias=self.bias, dtype=self.dtype, name=f"conv{i}",
                kernel_init=nn.initializers.he_normal(),
            )(x)  # fmt: skip
            if self.norm == "layer":
                x = LayerNorm(1e-5, dtype=self.dtype, name=f"norm{i}")(x)
            elif i == 0:
                x = self._over_time(x, channels)
            x = gelu(x)
        if self.gradient != 1.0:
            x = self.gradient * x + jax.lax.stop_gradient((1.0 - self.gradient) * x)
        x = LayerNorm(1e-5, dtype=self.dtype, name="norm")(x)
        return dense(self.width, x.shape[-1], "torch", self.dtype, "projection")(x)

    def _over_time(self, x, channels):
        scale = self.param("norm0_scale", nn.initializers.ones, (channels,))
        bias = self.param("norm0_bias", nn.initializers.zeros, (channels,))
        return (normalise(x, 1e-5, 1) * scale + bias).astype(self.dtype)


class SpeechModel(nn.Module):
    """Waveform in, frame representations out. Made from a config section by `make_model`."""

    width: int
    frontend: SpeechFeatures
    positions: ConvPositions
    encoder: Encoder
    head: Mlp
    dropout: float = 0.0
    padding: str = "exact"
    dtype: Any = jnp.float32

    def setup(self):
        init = nn.initializers.uniform(1.0)  # U(0, 1), mean 0.5: spec 11, trap 21
        self.mask_embedding = self.param("mask_embedding", init, (self.width,))
        self.norm = LayerNorm(1e-5, dtype=self.dtype)

    def mask_shape(self, shapes: Mapping[str, Any]) -> int:
        """Frames T of examples of these shapes: the length of a mask."""
        return frames(shapes["audio"].shape[-1], self.frontend.convs)

    def valid_lengths(self, batch: Batch) -> Array | None:
        """Valid frames of each row, int32 [B], or None without padding."""
        return frames(batch["length"], self.frontend.convs) if "length" in batch else None

    def features(self, batch: Batch, key: Key = None) -> Tokens:
        """audio [B, S] (normalised), maybe length [B] in samples -> x [B, T, D], valid [B, T]."""
        x = self.frontend(batch["audio"])
        if "length" not in batch:
            return Tokens(x)
        if self.frontend.norm == "group" and self.padding == "exact":
            raise UserError(
                "config.model.frontend.norm: 'group' takes statistics over whole rows, and these "
                "have padding: use norm='layer', rows of one length, or model.padding='reference'"
            )
        valid = jnp.arange(x.shape[1]) < frames(batch["length"], self.frontend.convs)[:, None]
        return Tokens(x, valid)

    def encode(
        self, tokens: Tokens, mask: Array | None = None, key: Key = None,
        record: Record | None = None, collect: bool = False,
    ) -> Encoded:  # fmt: skip
        """mask bool [B, T]: frames replaced by the learned vector."""
        x, valid = tokens
        if mask is not None:
            x = jnp.where(mask[..., None], self.mask_embedding.astype(x.dtype), x)
        if valid is not None:
            x = jnp.where(valid[..., None], x, 0)
        x = x + self.positions(x, valid)
        post = self.encoder.norm == "post"
        x = self.norm(x) if post else x
        keys = split(key, 2)
        x = dropout(x, self.dropout, keys[0])
        out = self.encoder(x, valid=valid, key=keys[1], record=record, collect=collect)
        return out if post else out._replace(x=self.norm(out.x))

    def predict(self, x: Array) -> Array:  # [..., D] -> [..., D]
        return self.head(x)

    def __call__(self, batch: Batch) -> Array:
        """Touches every parameter: for initialisation."""
        tokens = self.features(batch)
        mask = jnp.zeros(tokens.x.shape[:2], bool)
        return self.predict(self.encode(tokens, mask).x)


def make_model(
    *, width: int, encoder: Options, frontend: Options = FROZEN, positions: Options = FROZEN,
    head: Options = FROZEN, dropout: float = 0.0, padding: str = "exact", dtype: Any = jnp.float32,
) -> SpeechModel:  # fmt: skip
    """Config section `model` of speech; nested sections are the options of the parts.

    width: D. dropout: after positions and norm, before the blocks. padding: 'exact' (padded frames
    are zeroed before every positional convolution and take part in no statistic) or 'reference'
    (as in the authors' code: zeroed before the first only, and part of all statistics).
    """
    common = dict(dtype=dtype)
    exact = check_padding(padding) == "exact"
    return SpeechModel(
        width,
        build(SpeechFeatures, "model.frontend", frontend, width=width, **common),
        build(ConvPositions, "model.positions", positions, exact_padding=exact, **common),
        build(Encoder, "model.encoder", encoder, width=width, **common),
        build(Mlp, "model.head", head, out=width, **common),
        dropout,
        padding,
        dtype,
    )


def flops(model: SpeechModel, shapes: Mapping[str, Any], masked: int) -> dict[str, float]:
    """Forward FLOPs of one example, by part: 2 per multiply-add, matrix products only.

    shapes: shapes of one example (`Examples.example`). masked: positions through the head.
    """
    length, channels, front, D = shapes["audio"].shape[0], 1, 0.0, model.width
    for out, kernel, stride in model.frontend.convs:
        length = (length - kernel) // stride + 1
        front += 2.0 * length * out * kernel * channels
        channels = out
    front += 2.0 * length * channels * D
    p, e = model.positions, model.encoder
    conv = p.depth * 2.0 * length * D * (D // p.groups) * max(3, p.width // p.depth)
    blocks = encoder_flops(depth=e.depth, width=D, mlp=e.mlp, tokens=length)
    return {
        "frontend": front,
        "encoder": conv + blocks,
        "head": masked * head_flops(model.head, D),
    }
