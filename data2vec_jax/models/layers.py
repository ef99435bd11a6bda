"""Layers that all modalities share.   B batch, T tokens, D width, H heads, d = D / H, C channels.

Randomness is explicit: a `key` switches dropout on, `key=None` is evaluation (and the teacher).
Parameters are float32; `dtype` is the type of the computation. Norms and softmax are float32.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array
Key = jax.Array | None


def uniform_fan_in(fan_in: int) -> Callable:
    """U(-1/sqrt(fan_in), 1/sqrt(fan_in)): PyTorch's default of linear and convolution layers."""
    bound = 1.0 / math.sqrt(fan_in)
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(
        key, shape, dtype, -bound, bound
    )


bert_init = nn.initializers.normal(0.02)
# Vision 1.0 truncates at one standard deviation, not two (spec 2.4).
beit_init = nn.initializers.truncated_normal(0.02, lower=-1.0, upper=1.0)
INITS = {"bert": bert_init, "beit": beit_init}


def dropout(x: Array, rate: float | Array, key: Key) -> Array:
    """Inverted dropout. No-op without a key or at rate 0."""
    if key is None or (isinstance(rate, (int, float)) and rate == 0.0):
        return x
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), 0).astype(x.dtype)


def split(key: Key, n: int) -> Sequence[Key]:
    """`n` keys, or `n` times None."""
    return [None] * n if key is None else list(jax.random.split(key, n))


def normalise(x: Array, eps: float, axes: int | tuple[int, ...] = -1) -> Array:
    """Zero mean and unit (biased) variance over `axes`, in float32."""
    x = x.astype(jnp.float32)
    centred = x - jnp.mean(x, axes, keepdims=True)
    return centred * lax.rsqrt(jnp.mean(jnp.square(centred), axes, keepdims=True) + eps)


class LayerNorm(nn.Module):
    """Layer norm over the last axis, computed in float32, returned in `dtype`."""

    eps: float = 1e-5
    affine: bool = True
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:  # [..., D] -> [..., D]
        y = normalise(x, self.eps)
        if self.affine:
            width = x.shape[-1:]
            y = y * self.param("scale", nn.initializers.ones, width)
            y = y + self.param("bias", nn.initializers.zeros, width)
        return y.astype(self.dtype)


def _conv_by_matmul(x: Array, kernel: Array, stride: int, groups: int) -> Array:
    """The convolution as one matrix product over stacked slices: 4 to 8 times XLA's own on CPU."""
    width, per_group, channels = kernel.shape
    frames = (x.shape[1] - width) // stride + 1
    stop = (frames - 1) * stride + 1
    taps = [lax.slice_in_dim(x, t, t + stop, stride, axis=1) for t in range(width)]
    if groups == 1:
        columns = jnp.concatenate(taps, axis=-1)  # [B, T', width * C]
        return columns @ kernel.reshape(width * per_group, channels)
    columns = jnp.stack(taps, axis=2)  # [B, T', width, C]
    columns = columns.reshape(*columns.shape[:3], groups, per_group)
    kernel = kernel.reshape(width, per_group, groups, channels // groups)
    out = jnp.einsum("btkgi,kigo->gbto", columns, kernel)
    return jnp.moveaxis(out, 0, 2).reshape(*x.shape[:1], frames, channels)


def conv1d(x: Array, kernel: Array, *, stride: int = 1, padding: int = 0, groups: int = 1) -> Array:
    """1-D convolution. x [B, T, C], kernel [width, C / groups, C'] -> [B, T', C'].

    The one place that knows about back ends: XLA's convolution on accelerators, a matrix product
    on CPU.
    """
    if padding:
        x = jnp.pad(x, ((0, 0), (padding, padding), (0, 0)))

    def native(x, kernel):
        return lax.conv_general_dilated(
            x, kernel, (stride,), "VALID", dimension_numbers=("NWC", "WIO", "NWC"),
            feature_group_count=groups,
        )  # fmt: skip

    def matmul(x, kernel):
        return _conv_by_matmul(x, kernel, stride, groups)

    return lax.platform_dependent(x, kernel, cpu=matmul, default=native)


class Conv1d(nn.Module):
    """A 1-D convolution with parameters kernel [width, C / groups, channels] and maybe bias.

    weight_norm: the kernel is gain * kernel / |kernel|, one gain and length per tap.
    """

    channels: int
    width: int
    stride: int = 1
    padding: int = 0
    groups: int = 1
    bias: bool = True
    kernel_init: Callable | None = None  # None: PyTorch's default
    weight_norm: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:  # [B, T, C] -> [B, T', channels]
        per_group = x.shape[-1] // self.groups
        default = uniform_fan_in(per_group * self.width)
        shape = (self.width, per_group, self.channels)
        kernel = self.param("kernel", self.kernel_init or default, shape)
        if self.weight_norm:
            size = jnp.sqrt(jnp.sum(jnp.square(kernel), (1, 2), keepdims=True))
            kernel = kernel * (self.param("gain", lambda key: size) / size)
        y = conv1d(
            x.astype(self.dtype), kernel.astype(self.dtype),
            stride=self.stride, padding=self.padding, groups=self.groups,
        )  # fmt: skip
        if self.bias:
            y = y + self.param("bias", default, (self.channels,)).astype(self.dtype)
        return y


def gelu(x: Array) -> Array:
    """The exact (erf) GELU; the tanh approximation moves predictions by 1e-3."""
    return jax.nn.gelu(x, approximate=False)


def attention(
    q: Array, k: Array, v: Array, *, bias: Array | None = None, valid: Array | None = None,
    dropout_rate: float = 0.0, key: Key = None,
) -> Array:  # fmt: skip
    """Softmax attention. q, k, v [B, H, T, d], bias [H, T, T] or [B, H, T, T] -> [B, H, T, d].

    `valid` bool [B, T]: keys that are not padding. Logits, bias and softmax are float32. The one
    place for attention kernels.
    """
    logits = jnp.einsum("bhqd,bhkd->bhqk", q, k, preferred_element_type=jnp.float32)
    logits = logits * (q.shape[-1] ** -0.5)
    if bias is not None:
        logits = logits + bias.astype(jnp.float32)
    if valid is not None:
        logits = jnp.where(valid[:, None, None, :], logits, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    weights = dropout(weights, dropout_rate, key)
    return jnp.einsum("bhqk,bhkd->bhqd", weights, v)


class Mlp(nn.Module):
    """Linear layers with GELU between them: prediction heads.

    depth 1 is D -> out; depth 2 is D -> hidden, GELU, hidden -> out; each further layer keeps the
    hidden width (spec 7.1, 7.2). `initializer`: a name of `INITS`, or 'torch' for PyTorch's default.
    """

    out: int
    depth: int = 1
    hidden: int = 0
    initializer: str = "torch"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:  # [..., D] -> [..., out]
        for i in range(self.depth):
            last = i == self.depth - 1
            width = self.out if last else self.hidden
            x = dense(width, x.shape[-1], self.initializer, self.dtype, f"linear{i}")(x)
            x = x if last else gelu(x)
        return x


def dense(
    features: int, fan_in: int, init: str, dtype: Any, name: str, bias: bool = True
) -> nn.Dense:
    """A linear layer. init: 'torch' (its default), or 'bert' or 'beit' with zero biases."""
    torch = uniform_fan_in(fan_in)
    return nn.Dense(
        features, use_bias=bias, dtype=dtype, name=name,
        kernel_init=torch if init == "torch" else INITS[init],
        bias_init=torch if init == "torch" else nn.initializers.zeros,
    )  # fmt: skip


def head_flops(head: Mlp, width: int) -> float:
    """Forward FLOPs of a prediction head at one position."""
    sizes = [width, *[head.hidden] * (head.depth - 1), head.out]
    return sum(2.0 * a * b for a, b in itertools.pairwise(sizes))
