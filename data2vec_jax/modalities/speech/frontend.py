"""Front ends of speech: what makes frames of a waveform.

B batch, S samples, T frames, D encoder's width, C channels of what is projected. Both have a frame
every `hop` samples, made of `reach` samples, and at 320 and 400 of them the same number of frames:
masks, labels of frames and CTC are the same for both.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from data2vec_jax.core import sharding
from data2vec_jax.core.config import Length, NonNegativeFloat, PositiveFloat, Range, Size, choose
from data2vec_jax.core.errors import UserError
from data2vec_jax.data.fbank import Fbank, device_log_mel
from data2vec_jax.modalities.contract import build
from data2vec_jax.models.layers import (
    ACTIVATIONS,
    Activation,
    Array,
    Conv,
    LayerNorm,
    dense,
    normalise,
)

Taps = Annotated[int, Range(1, 10_000)]
# (channels, kernel, stride): 320 samples a frame, 400 samples of context (spec 2.1).
CONVS = ((512, 10, 5),) + ((512, 3, 2),) * 4 + ((512, 2, 2),) * 2


def frames(samples: Any, convs: Sequence[Sequence[int]] = CONVS) -> Any:
    """Number of frames of a waveform: floor((n - kernel) / stride) + 1 through the convolutions."""
    for _, kernel, stride in convs:
        samples = (samples - kernel) // stride + 1
    return samples


def hop(convs: Sequence[Sequence[int]] = CONVS) -> int:
    """Samples from one frame to the next."""
    return math.prod(stride for _, _, stride in convs)


def reach(convs: Sequence[Sequence[int]] = CONVS) -> int:
    """Samples that a frame is made of."""
    samples = 1
    for _, kernel, stride in reversed(convs):
        samples = (samples - 1) * stride + kernel
    return samples


class TimeNorm(nn.Module):
    """Each channel of a row over all its frames (a group norm with one channel per group)."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:  # [B, T, C] -> [B, T, C]
        channels = x.shape[-1:]
        scale = self.param("scale", nn.initializers.ones, channels)
        bias = self.param("bias", nn.initializers.zeros, channels)
        return (normalise(x, 1e-5, 1) * scale + bias).astype(self.dtype)


class ActivatedNorm(nn.Module):
    """Layer norm and activation of what a convolution gives.

    recompute: the backward pass makes both again from x, and both passes read x in its own dtype: a
    compiler would write it in the norm's float32.
    """

    activation: Activation
    recompute: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:  # [..., C] -> [..., C]
        channels = x.shape[-1:]
        scale = self.param("scale", nn.initializers.ones, channels)
        bias = self.param("bias", nn.initializers.zeros, channels)

        def activated(x, scale, bias):
            y = normalise(x, 1e-5) * scale + bias
            return ACTIVATIONS[self.activation](y.astype(self.dtype))

        if self.recompute:
            x, activated = jax.lax.optimization_barrier(x), jax.checkpoint(activated)
        return activated(x, scale, bias)


class ConvFrontend(nn.Module):
    """Convolutions over the raw waveform, and the projection to the encoder's width (spec 2.1).

    norm: 'layer' (every layer) or 'group' (one channel-wise norm over time after the first).
    gradient: factor on the gradient that reaches the convolutions. activation: a name of
    `ACTIVATIONS`. eps: of the norm before the projection.
    """

    width: int
    convs: Annotated[Sequence[tuple[Size, Taps, Taps]], Length(1, 100)] = CONVS
    norm: Literal["layer", "group"] = "layer"
    bias: bool = False
    gradient: NonNegativeFloat = 1.0
    activation: Activation = "gelu"
    eps: PositiveFloat = 1e-5
    dtype: Any = jnp.float32

    @property
    def pads_statistics(self) -> bool:
        """Whether padding takes part in its statistics, and so changes what is not padding."""
        return self.norm == "group"

    @property
    def channels(self) -> int:
        """C."""
        return self.convs[-1][0]

    @property
    def hop(self) -> int:
        return hop(self.convs)

    @property
    def reach(self) -> int:
        return reach(self.convs)

    def frames(self, samples: Any) -> Any:
        """Frames of a waveform of `samples` samples, an int or an array of them."""
        return frames(samples, self.convs)

    def flops(self, samples: int) -> float:
        """Forward FLOPs of one waveform."""
        length, channels, total = samples, 1, 0.0
        for out, kernel, stride in self.convs:
            length = (length - kernel) // stride + 1
            total += 2.0 * length * out * kernel * channels
            channels = out
        return total + 2.0 * length * channels * self.width

    @nn.compact
    def __call__(self, audio: Array, valid: Array | None = None) -> tuple[Array, Array, Array]:
        """[B, S] -> the projection [B, T, D], what it projects [B, T, C], and that before its norm,
        behind the factor on the gradient."""
        del valid  # a frame knows nothing of others, but for 'group', which takes all of a row
        x = audio[..., None].astype(self.dtype)
        # What the backward pass needs of norms and activations, at thousands of frames a second,
        # takes an accelerator longer to write and read than to compute.
        recompute = sharding.platform() != "cpu"
        for i, (channels, kernel, stride) in enumerate(self.convs):
            x = Conv(
                channels,
                kernel,
                stride,
                bias=self.bias,
                dtype=self.dtype,
                name=f"conv{i}",
                kernel_init=nn.initializers.he_normal(),
            )(x)
            if self.norm == "layer":
                x = ActivatedNorm(self.activation, recompute, self.dtype, name=f"norm{i}")(x)
            else:
                if i == 0:
                    x = TimeNorm(dtype=self.dtype, name="time_norm")(x)
                x = ACTIVATIONS[self.activation](x)
        if self.gradient != 1.0:
            x = self.gradient * x + jax.lax.stop_gradient((1.0 - self.gradient) * x)
        normed = LayerNorm(self.eps, dtype=self.dtype, name="norm")(x)
        project = dense(self.width, x.shape[-1], "torch", self.dtype, "projection")
        return project(normed), normed, x


class MelFrontend(nn.Module):
    """Log-mel frames without their mean over time, and the projection to the encoder's width.

    For speech by the hour: the convolutions need far more to learn what a filterbank knows. It is
    Kaldi's (`data.fbank`), in float32 whatever `dtype` is. The mean of a bin over a row's frames is
    what the room and the microphone add to all of them (spec 2.1). bins: C, on the mel scale. eps:
    of the norm before the projection. gradient: as of the convolutions, which it does not have, so
    that it has no effect and a recipe of fine-tuning fits both.
    """

    width: int
    bins: Annotated[int, Range(1, 1024)] = 80
    gradient: NonNegativeFloat = 1.0
    eps: PositiveFloat = 1e-5
    dtype: Any = jnp.float32

    pads_statistics = False
    hop = 320
    reach = 400

    @property
    def channels(self) -> int:
        """C."""
        return self.bins

    @property
    def fbank(self) -> Fbank:
        return Fbank(bins=self.bins, length=self.reach, shift=self.hop)

    def frames(self, samples: Any) -> Any:
        """Frames of a waveform of `samples` samples, an int or an array of them."""
        return (samples - self.reach) // self.hop + 1

    def flops(self, samples: int) -> float:
        """Forward FLOPs of the projection of one waveform.

        The spectrogram is the input, as in other modalities: it has no gradients, of which a train
        step's count has two for each forward pass.
        """
        return 2.0 * self.frames(samples) * self.bins * self.width

    @nn.compact
    def __call__(self, audio: Array, valid: Array | None = None) -> tuple[Array, Array, None]:
        """[B, S] -> the projection [B, T, D], what it projects [B, T, C], and None: before the norm
        nothing is learned.

        valid: bool [B, T], the frames whose mean is removed; None for all.
        """
        x = device_log_mel(audio, self.fbank)
        counted = jnp.ones(x.shape[:2], bool) if valid is None else valid
        counted = counted[..., None]  # [B, T, 1]
        count = jnp.maximum(jnp.sum(counted, 1, keepdims=True), 1)  # a row may have no valid frame
        x = x - jnp.sum(jnp.where(counted, x, 0.0), 1, keepdims=True) / count
        x = LayerNorm(self.eps, dtype=self.dtype, name="norm")(x)
        return dense(self.width, self.bins, "torch", self.dtype, "projection")(x), x, None


KINDS = {"waveform": ConvFrontend, "mel": MelFrontend}


def make_frontend(
    options: Mapping[str, Any], width: int, dtype: Any = jnp.float32
) -> ConvFrontend | MelFrontend:
    """The front end of config section `model.frontend`: that of `kind`, 'waveform' without one.

    Raises UserError: an option that it does not have, or an impossible value.
    """
    kind = choose("model.frontend", {"kind": "waveform", **options}, "kind", KINDS)
    options = {key: value for key, value in options.items() if key != "kind"}
    for key in options:
        kinds = [name for name, front in KINDS.items() if key in front.__dataclass_fields__]
        if kinds and kind not in kinds:
            raise UserError(
                f"config.model.frontend.{key}: an option of kind='{kinds[0]}', and this is '{kind}'"
            )
    return build(KINDS[kind], "model.frontend", options, width=width, dtype=dtype)
