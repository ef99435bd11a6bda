"""Layers that all modalities share.   B batch, T tokens, D width, H heads, d = D / H, C channels.

Randomness is explicit: a `key` switches dropout on, `key=None` is evaluation (and the teacher).
Parameters are float32; `dtype` is the type of the computation. Norms and softmax are float32.
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from data2vec_jax.core import sharding
from data2vec_jax.core.config import Depth, Range
from data2vec_jax.core.errors import UserError
from data2vec_jax.models import attention_gpu, attention_parts, attention_tpu
from data2vec_jax.models.attention_parts import LinearBias, drop_weights

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
# 0.02 is BERT's for a width of 768. In small networks it leaves attention flat, which then hardly
# learns: 'small' has Xavier's queries, keys and values, which are much like BERT's at 768.
INITS = {
    "bert": bert_init,
    "beit": beit_init,
    "small": bert_init,
    "xavier": nn.initializers.xavier_uniform(),
}


def dropout(x: Array, rate: float | Array, key: Key) -> Array:
    """Inverted dropout. No-op without a key or at rate 0."""
    if key is None or (isinstance(rate, (int, float)) and rate == 0.0):
        return x
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), 0).astype(x.dtype)


def split(key: Key, n: int) -> Sequence[Key]:
    """`n` keys, or `n` times None."""
    return [None] * n if key is None else list(jax.random.split(key, n))


def wide(x: Array) -> Array:
    """`x` in float32, or as it is in float64."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def normalise(x: Array, eps: float, axes: int | tuple[int, ...] = -1) -> Array:
    """Zero mean and unit (biased) variance over `axes`, in float32."""
    x = wide(x)
    centred = x - jnp.mean(x, axes, keepdims=True)
    return centred * lax.rsqrt(jnp.mean(jnp.square(centred), axes, keepdims=True) + eps)


def unit_length(x: Array, least: float = 1e-8) -> Array:
    """Vectors [..., D] divided by their lengths, but at least by `least`, in float32."""
    x = wide(x)
    return x * lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(x), -1, keepdims=True), least**2))


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


MOST_TAPS = 32  # of a grouped kernel whose gradient a TPU computes as one convolution


def _conv_by_matmul(x: Array, kernel: Array, stride: int, groups: int) -> Array:
    """The convolution as a matrix product over stacked slices, one product for each group.

    On CPU 4 to 8 times as fast as XLA's own with strides, 10 to 30 times with groups, and with
    neither a fourth slower, but XLA's own gradients inside of loops are slow beyond measure.
    """
    *widths, per_group, channels = kernel.shape
    x = jnp.moveaxis(x.reshape(*x.shape[:-1], groups, per_group), -2, 0)  # [groups, B, ..., C']
    sizes = [(n - k) // stride + 1 for n, k in zip(x.shape[2:-1], widths, strict=True)]

    def tap(start):
        ends = (a + (n - 1) * stride + 1 for a, n in zip(start, sizes, strict=True))
        return x[:, :, *(slice(a, b, stride) for a, b in zip(start, ends, strict=True))]

    taps = [tap(start) for start in itertools.product(*map(range, widths))]
    columns = jnp.concatenate(taps, axis=-1).reshape(groups, -1, len(taps) * per_group)
    kernel = kernel.reshape(-1, per_group, groups, channels // groups)
    kernel = jnp.moveaxis(kernel, 2, 0).reshape(groups, -1, channels // groups)
    y = jnp.matmul(columns, kernel).reshape(groups, x.shape[1], *sizes, channels // groups)
    return jnp.moveaxis(y, 0, -2).reshape(x.shape[1], *sizes, channels)


def convolve(
    x: Array, kernel: Array, *, stride: int = 1, padding: int = 0, groups: int = 1
) -> Array:
    """Convolution over one axis or two. x [B, ..., C], kernel [taps, ..., C / groups, C'].

    The one place that knows about back ends: XLA's convolution on accelerators, matrix products
    on CPU.
    """
    axes = kernel.ndim - 2
    x = jnp.pad(x, ((0, 0), *[(padding, padding)] * axes, (0, 0)))
    return _convolve(x, kernel, stride, groups)


def _conv_natively(x: Array, kernel: Array, stride: int, groups: int) -> Array:
    """By XLA, each device its own rows: on GPUs XLA gathers all rows for a grouped convolution."""

    def convolved(kernel, x):
        return _conv_of_rows(x, kernel, stride, groups)

    return sharding.per_device(convolved, x.shape[0])(kernel, x)


def _conv_natively_backward(
    x: Array, kernel: Array, gradient: Array, stride: int, groups: int, by_taps: bool = False
) -> tuple[Array, Array]:
    """Gradients of `_conv_natively`; the kernel's is a sum of one part for each device.

    by_taps: the kernel's by `_kernel_gradient_by_taps`.
    """

    def gradients(kernel, x, gradient):
        backward = jax.vjp(lambda x, kernel: _conv_of_rows(x, kernel, stride, groups), x, kernel)[1]
        of_x, of_kernel = backward(gradient)
        if by_taps:
            of_kernel = _kernel_gradient_by_taps(x, kernel, gradient, groups)
        return of_x, of_kernel[None]

    of_x, parts = sharding.per_device(gradients, x.shape[0])(kernel, x, gradient)
    return of_x, jnp.sum(parts, 0)


def _kernel_gradient_by_taps(x: Array, kernel: Array, gradient: Array, groups: int) -> Array:
    """The kernel's gradient of a convolution over one axis with stride 1, a loop over its taps."""
    x, gradient = (y.reshape(*y.shape[:2], groups, -1) for y in (x, gradient))

    def of_tap(tap):
        seen = lax.dynamic_slice_in_dim(x, tap, gradient.shape[1], axis=1)
        sums = jnp.promote_types(x.dtype, jnp.float32)
        return jnp.einsum("btgi,btgo->igo", seen, gradient, preferred_element_type=sums)

    taps = lax.map(of_tap, jnp.arange(len(kernel)))  # [taps, C / groups, groups, C' / groups]
    return taps.reshape(kernel.shape).astype(kernel.dtype)


def _conv_of_rows(x: Array, kernel: Array, stride: int, groups: int) -> Array:
    axes = kernel.ndim - 2
    layout = ("NWC", "WIO", "NWC") if axes == 1 else ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(
        x,
        kernel,
        (stride,) * axes,
        "VALID",
        dimension_numbers=layout,
        feature_group_count=groups,
    )


# Without a rule of its own for gradients, which platform it is would be a value that the forward
# pass hands to the backward pass, and in a loop the choice would stay in the compiled program with
# sums over devices in its branches. XLA's CPU runtime starts such a sum in no certain order beside
# those outside of the branch: two processes then add up different arrays, or abort.
@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _convolve(x: Array, kernel: Array, stride: int, groups: int) -> Array:
    by = functools.partial
    return lax.platform_dependent(
        x,
        kernel,
        cpu=by(_conv_by_matmul, stride=stride, groups=groups),
        default=by(_conv_natively, stride=stride, groups=groups),
    )


def _convolve_forward(x, kernel, stride, groups):
    return _convolve(x, kernel, stride, groups), (x, kernel)


def _convolve_backward(stride, groups, saved, gradient):
    def by_matmul(x, kernel, gradient):
        def convolved(x, kernel):
            return _conv_by_matmul(x, kernel, stride, groups)

        return jax.vjp(convolved, x, kernel)[1](gradient)

    natively = functools.partial(_conv_natively_backward, stride=stride, groups=groups)
    # wav2vec 2.0's 128 taps of 16 groups: a TPU's compiler takes 3 s for the loop, and more than
    # ten minutes for the gradient as one convolution.
    by_taps = groups > 1 and stride == 1 and saved[1].ndim == 3 and len(saved[1]) > MOST_TAPS
    on_tpu = functools.partial(natively, by_taps=by_taps)
    return lax.platform_dependent(*saved, gradient, cpu=by_matmul, tpu=on_tpu, default=natively)


_convolve.defvjp(_convolve_forward, _convolve_backward)


class Conv(nn.Module):
    """A convolution over `axes` axes: kernel [width, ..., C / groups, channels] and maybe bias.

    weight_norm: the kernel is gain * kernel / |kernel|, one gain and length per tap.
    """

    channels: int
    width: int
    stride: int = 1
    padding: int = 0
    groups: int = 1
    bias: bool = True
    kernel_init: Callable | None = None  # None: PyTorch's default
    bias_init: Callable | None = None  # None: PyTorch's default
    axes: int = 1
    weight_norm: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:  # [B, ..., C] -> [B, ..., channels]
        per_group = x.shape[-1] // self.groups
        default = uniform_fan_in(per_group * self.width**self.axes)
        shape = (*(self.width,) * self.axes, per_group, self.channels)
        kernel = self.param("kernel", self.kernel_init or default, shape)
        if self.weight_norm:
            size = jnp.sqrt(jnp.sum(jnp.square(kernel), (1, 2), keepdims=True))
            kernel = kernel * (self.param("gain", lambda key: size) / size)
        y = convolve(
            x.astype(self.dtype),
            kernel.astype(self.dtype),
            stride=self.stride,
            padding=self.padding,
            groups=self.groups,
        )
        if self.bias:
            bias = self.param("bias", self.bias_init or default, (self.channels,))
            y = y + bias.astype(self.dtype)
        return y


def scan_layers(convs: Sequence[Conv], x: Array, step: Callable) -> Array:
    """x = step(conv, x) for each of `convs`, which are alike, each the child of a module in use.

    They become one loop, which is compiled once: a TPU's compiler takes minutes for the gradients
    of one grouped convolution. step: (function x -> y of one convolution, x) -> the next x.
    """
    if len(convs) < 2 or convs[0].is_initializing():
        for conv in convs:
            x = step(conv, x)
        return x
    stacked = jax.tree.map(
        lambda *arrays: jnp.stack(arrays), *(c.variables["params"] for c in convs)
    )
    one = convs[0].clone(parent=None, name=None)

    def body(x, params):
        return step(lambda y: one.apply({"params": params}, y), x), None

    return lax.scan(body, x, stacked)[0]


def gather_tokens(x: Array | None, places: Array | None) -> Array | None:
    """x [B, T, ...] at places int [B * M, N] -> [B * M, N, ...]; without `places` all of it.

    Several rows of `places` may be of one row of `x`; they are adjacent.
    """
    if x is None or places is None:
        return x
    index = places.reshape(x.shape[0], -1)  # [B, M * N]: a row of x is read, not repeated
    found = jnp.take_along_axis(x, index.reshape(*index.shape, *(1,) * (x.ndim - 2)), axis=1)
    return found.reshape(*places.shape, *x.shape[2:])


def repeat(x: Array | None, rows: int) -> Array | None:
    """Every row of `x` [B, ...] as often as it takes to make `rows` = B * M rows, adjacent."""
    return x if x is None or x.shape[0] == rows else jnp.repeat(x, rows // x.shape[0], axis=0)


def gelu(x: Array) -> Array:
    """The exact (erf) GELU; the tanh approximation moves predictions by 1e-3."""
    return jax.nn.gelu(x, approximate=False)


def _gelu_tanh(x):
    return jax.nn.gelu(x, approximate=True)


# By the names of configs, ours and Hugging Face's.
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": gelu,
    "gelu_10": lambda x: jnp.clip(gelu(x), -10, 10),
    "gelu_accurate": _gelu_tanh,
    "gelu_fast": _gelu_tanh,
    "gelu_new": _gelu_tanh,
    "gelu_python": gelu,
    "gelu_python_tanh": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "hardswish": jax.nn.hard_swish,
    "laplace": lambda x: 0.5 * (1 + lax.erf((x - 0.707107) / (0.282095 * math.sqrt(2.0)))),
    "leaky_relu": jax.nn.leaky_relu,
    "linear": lambda x: x,
    "mish": jax.nn.mish,
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
    "relu6": jax.nn.relu6,
    "sigmoid": jax.nn.sigmoid,
    "silu": jax.nn.silu,
    "sqrtsoftplus": lambda x: jnp.sqrt(jax.nn.softplus(x)),
    "swish": jax.nn.silu,
    "tanh": jnp.tanh,
}

Activation = Literal[*ACTIVATIONS]


def attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    bias: Array | None = None,
    linear: LinearBias | None = None,
    valid: Array | None = None,
    dropout_rate: float = 0.0,
    key: Key = None,
) -> Array:
    """Softmax attention. q, k, v [B, H, T, d], bias [H, T, T] -> [B, H, T, d].

    linear: a bias of distances, added to the other. `valid` bool [B, T]: keys that are not padding.
    Logits, biases and softmax are float32. The one place that knows of kernels: devices, shapes and
    biases choose.
    """
    B, H, T, d = q.shape
    seeds = attention_parts.seeds(key, B, H) if key is not None and dropout_rate else None
    platform = sharding.platform()
    if platform == "tpu" and attention_tpu.takes(B, T, d, bias is not None):
        return attention_tpu.attend(q, k, v, bias, linear, valid, dropout_rate, seeds)
    plain = bias is None and linear is None and seeds is None
    if platform == "gpu" and plain and attention_gpu.takes(q):
        return attention_gpu.attend(q, k, v, valid)
    return attend(q, k, v, bias, linear, valid, dropout_rate, seeds)


def attention_by() -> str:
    """What computes attention on the devices of the mesh, in words."""
    kernels = {"tpu": attention_tpu, "gpu": attention_gpu}
    found = kernels.get(sharding.platform())
    return ("" if found is None else f"{found.rule()}, else by ") + "products and softmax"


def attend(
    q: Array,
    k: Array,
    v: Array,
    bias: Array | None,
    linear: LinearBias | None,
    valid: Array | None,
    dropout_rate: float,
    seeds: Array | None,
) -> Array:
    """`attention`, step by step, with arrays [B, H, T, T]. seeds: int32 [B, H, 2], or None."""
    accumulator = jnp.promote_types(q.dtype, jnp.float32)
    logits = jnp.einsum("bhqd,bhkd->bhqk", q, k, preferred_element_type=accumulator)
    logits = logits * (q.shape[-1] ** -0.5)
    if bias is not None:
        logits = logits + wide(bias)
    if linear is not None:
        logits = logits + linear.slopes[:, None, None] * linear.distances()[:, None]
    if valid is not None:
        logits = jnp.where(valid[:, None, None, :], logits, jnp.finfo(accumulator).min)
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    if seeds is not None:
        places = jnp.arange(q.shape[2], dtype=jnp.int32)
        seed = seeds[:, :, 0, None, None], seeds[:, :, 1, None, None]
        weights = drop_weights(weights, dropout_rate, seed, places[:, None], places)
    return jnp.einsum("bhqk,bhkd->bhqd", weights, v)


class Mlp(nn.Module):
    """Linear layers with GELU between them: prediction heads.

    depth 1 is D -> out; depth 2 is D -> hidden, GELU, hidden -> out; each further layer keeps the
    hidden width (spec 7.1, 7.2). `initializer`: a name of `INITS`, or 'torch' for its default.
    """

    out: int
    depth: Depth = 1
    hidden: Annotated[int, Range(0, 2**20)] = 0
    initializer: Literal["torch", *INITS] = "torch"
    dtype: Any = jnp.float32

    def __post_init__(self):
        if self.depth > 1 and not self.hidden:
            raise UserError(f"config.model.head.hidden: 0, but with depth={self.depth} it has one")
        super().__post_init__()

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
    """A linear layer. init: 'torch' (its default), or one of `INITS` with zero biases."""
    torch = uniform_fan_in(fan_in)
    return nn.Dense(
        features,
        use_bias=bias,
        dtype=dtype,
        name=name,
        kernel_init=torch if init == "torch" else INITS[init],
        bias_init=torch if init == "torch" else nn.initializers.zeros,
    )


def head_flops(head: Mlp, width: int) -> float:
    """Forward FLOPs of a prediction head at one position."""
    sizes = [width, *[head.hidden] * (head.depth - 1), head.out]
    return sum(2.0 * a * b for a, b in itertools.pairwise(sizes))
