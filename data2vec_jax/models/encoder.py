"""The Transformer encoder: one block, scanned.   B batch, T tokens, D width, H heads, L layers.

Parameters of all layers are stacked: `blocks/...` leaves have a leading axis [L]. The scan carries
the running mean of the normalised targets, so the teacher never stores the activations of K layers.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from data2vec_jax.core import sharding
from data2vec_jax.core.config import Depth, DropRate, PositiveFloat, Share, Size
from data2vec_jax.core.errors import UserError
from data2vec_jax.models.attention_parts import LinearBias
from data2vec_jax.models.layers import (
    ACTIVATIONS,
    INITS,
    Activation,
    Array,
    Key,
    LayerNorm,
    attention,
    dense,
    dropout,
    split,
    wide,
)
from data2vec_jax.models.positions import relative_bias, relative_index


class Tokens(NamedTuple):
    """Output of a front end: x [B, T, D] and valid, bool [B, T] or None (no padding)."""

    x: Array
    valid: Array | None = None


# A part of a block, or the block's output.
Source = Literal["attention", "ffn", "residual", "block"]


class TargetSpec(NamedTuple):
    """What the teacher's layers leave behind.

    top_k: the uppermost K layers are averaged, or the layers with these numbers (from 0). source:
    'block' (output of the block), or a part of it, see `Block`. normalise: applied to each layer's
    [B, T, D] before the average. skip: leading tokens (class token) left out.
    """

    top_k: int | tuple[int, ...]
    source: Source
    normalise: Callable[[Array], Array]
    skip: int = 0

    def layers(self, depth: int) -> tuple[int, ...]:
        """Numbers of the averaged layers of `depth`, ascending."""
        if isinstance(self.top_k, int):
            return tuple(range(depth - self.top_k, depth))
        return tuple(sorted(self.top_k))


class Encoded(NamedTuple):
    """What an encoder returns.

    x: [B, T, D]. targets: mean over the K recorded layers [B, T, D], float32. layers, ffn: outputs
    of each block and of its feed-forward part, or of the part that is recorded [L, B, T, D].
    class_tokens: leading tokens [B, E, D]. first: the input of the first block [B, T, D], with
    `layers`.
    """

    x: Array
    targets: Array | None = None
    layers: Array | None = None
    ffn: Array | None = None
    class_tokens: Array | None = None
    first: Array | None = None


class Block(nn.Module):
    """One Transformer block, post-norm or pre-norm (spec 3.1).

    post: a = Attn(x); u = LN1(x + DP(a)); t = FFN(u); y = LN2(u + DP(t))
    pre:  a = g1 * Attn(LN1 x); u = x + DP(a); t = g2 * FFN(LN2 u); y = u + DP(t)

    Its parts, which a teacher may record: 'attention' a, 'ffn' t, 'residual' u + t.
    """

    width: int
    heads: int
    mlp: int
    norm: str = "post"
    eps: float = 1e-5
    qkv_bias: str = "qkv"  # which projections have one: vision 1.0 'qv'; 'none'
    layer_scale: float | None = None
    relative: tuple[int, int] | None = None  # grid of a relative position bias of this block's own
    dropout: float = 0.0
    attention_dropout: float = 0.0
    activation_dropout: float = 0.0
    initializer: str = "bert"
    activation: str = "gelu"
    dtype: Any = jnp.float32

    def _attend(self, x, bias, linear, valid, keys, to_bias):
        B, T, D = x.shape
        init = "xavier" if self.initializer == "small" else self.initializer
        y = dense(3 * D, D, init, self.dtype, "qkv", self.qkv_bias == "qkv")(x)
        if self.qkv_bias == "qv":
            zeros = nn.initializers.zeros
            q_bias, v_bias = self.param("q_bias", zeros, (D,)), self.param("v_bias", zeros, (D,))
            y = y + jnp.concatenate([q_bias, jnp.zeros_like(q_bias), v_bias]).astype(y.dtype)
        if self.relative is not None:
            index = relative_index(self.relative)
            table = self.param(
                "relative_bias", nn.initializers.zeros, (int(index.max()) + 1, self.heads)
            )
            own = to_bias(table) if to_bias else relative_bias(table, index)
            bias = own if bias is None else bias + own
        # Heads lead, so that each head's product is one contiguous matrix multiplication.
        q, k, v = jnp.moveaxis(y.reshape(B, T, 3, self.heads, D // self.heads), (2, 3), (0, 2))
        y = attention(
            *(q, k, v),
            bias=bias,
            linear=linear,
            valid=valid,
            dropout_rate=self.attention_dropout,
            key=keys[0],
        )  # [B, H, T, d]
        y = checkpoint_name(y, "attention")
        y = dense(D, D, self.initializer, self.dtype, "out")(jnp.moveaxis(y, 1, 2).reshape(B, T, D))
        return dropout(y, self.dropout, keys[1])

    def _feed_forward(self, x, key):
        D = x.shape[-1]
        y = dense(self.mlp, D, self.initializer, self.dtype, "up")(x)
        y = ACTIVATIONS[self.activation](y)
        y = dropout(y, self.activation_dropout, key)
        return dense(D, self.mlp, self.initializer, self.dtype, "down")(y)

    @nn.compact
    def __call__(
        self,
        x: Array,
        bias: Array | None,
        linear: LinearBias | None,
        valid: Array | None,
        drop_path: Array | None,
        key: Key,
        to_bias: Callable[[Array], Array] | None = None,
        part: str = "ffn",
    ) -> tuple[Array, Array]:
        """x [B, T, D], bias [H, T, T], valid [B, T], drop_path scalar rate or None.

        to_bias: table of relative positions -> bias [H, T, T], for another grid than the block's.
        Returns the block's output y and a `part` of it, both [B, T, D].
        """
        keys = split(key, 6)
        norm1 = LayerNorm(self.eps, dtype=self.dtype, name="norm1")
        norm2 = LayerNorm(self.eps, dtype=self.dtype, name="norm2")

        def wanted(a, u, t):
            return a if part == "attention" else u + t if part == "residual" else t

        if self.norm == "post":
            a = self._attend(x, bias, linear, valid, keys, to_bias)
            u = norm1(x + drop_rows(a, drop_path, keys[4]))
            t = self._feed_forward(u, keys[2])
            y = drop_rows(dropout(t, self.dropout, keys[3]), drop_path, keys[5])
            return norm2(u + y), wanted(a, u, t)

        def scaled(y, name):
            if self.layer_scale is None:
                return y
            init = nn.initializers.constant(self.layer_scale)
            return y * self.param(name, init, (self.width,)).astype(y.dtype)

        a = scaled(self._attend(norm1(x), bias, linear, valid, keys, to_bias), "layer_scale1")
        u = x + drop_rows(a, drop_path, keys[4])
        t = scaled(self._feed_forward(norm2(u), keys[2]), "layer_scale2")
        y = drop_rows(dropout(t, self.dropout, keys[3]), drop_path, keys[5])
        return u + y, wanted(a, u, t)


def drop_rows(y: Array, rate: Array | None, key: Key) -> Array:
    """Stochastic depth: drops whole rows of [B, T, D], kept ones are divided by 1 - rate."""
    if key is None or rate is None:
        return y
    keep = jax.random.bernoulli(key, 1.0 - rate, (y.shape[0], 1, 1))
    return jnp.where(keep, y / (1.0 - rate), 0).astype(y.dtype)


REMAT = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names("attention"),
    ),
}


class Encoder(nn.Module):
    """`depth` blocks applied by one `lax.scan`. All other fields are the block's (see `Block`).

    layerdrop: share of blocks skipped per update, one draw for the whole batch (spec 3.3).
    drop_path: stochastic depth of the last block; block i has drop_path * i / (depth - 1).
    activation: a name of `ACTIVATIONS`.
    remat: what is kept for the gradients: 'none' keeps all, 'dots' the products with weights and
      what attention returns, 'full' nothing but the inputs of blocks. 'auto': 'dots' on GPUs and
      TPUs, where reading what is kept takes longer than computing it again; on CPUs 'none'. Where
      weights are gathered (fsdp), 'none' is 'dots', too: all gathered weights would be kept.
    """

    depth: Depth
    width: Size
    heads: Size
    mlp: Size
    norm: Literal["post", "pre"] = "post"
    eps: PositiveFloat = 1e-5
    qkv_bias: Literal["qkv", "qv", "none"] = "qkv"
    layer_scale: float | None = None
    relative: tuple[Size, Size] | None = None
    dropout: DropRate = 0.0
    attention_dropout: DropRate = 0.0
    activation_dropout: DropRate = 0.0
    layerdrop: Share = 0.0
    drop_path: DropRate = 0.0
    initializer: Literal[*INITS] = "bert"
    activation: Activation = "gelu"
    remat: Literal["auto", *REMAT] = "auto"
    dtype: Any = jnp.float32

    def setup(self):
        if self.width % self.heads:
            raise UserError(
                f"config.model.encoder.heads: {self.heads} does not divide the width {self.width}"
            )
        self.block = Block(
            self.width,
            self.heads,
            self.mlp,
            self.norm,
            self.eps,
            self.qkv_bias,
            self.layer_scale,
            self.relative,
            self.dropout,
            self.attention_dropout,
            self.activation_dropout,
            self.initializer,
            self.activation,
            self.dtype,
            parent=None,
        )
        self.blocks = self.param("blocks", self._init_blocks)

    def _init_blocks(self, key):
        cells = 2 if self.relative is None else self.relative[0] * self.relative[1] + 1
        x = jnp.zeros((1, cells, self.width), self.dtype)

        def one(key):
            return self.block.init(key, x, None, None, None, jnp.float32(0), None)["params"]

        params = jax.vmap(one)(jax.random.split(key, self.depth))
        if (
            self.initializer == "beit"
        ):  # block i (from 1): output projections are divided by sqrt(2 i)
            scale = jnp.sqrt(2.0 * jnp.arange(1, self.depth + 1))[:, None, None]
            for name in ("out", "down"):
                params[name]["kernel"] = params[name]["kernel"] / scale
        return params

    def _remat(self) -> str:
        """The option `remat`, on the devices of the mesh."""
        # With 'none', the backward pass would keep every gathered weight.
        if self.remat in ("auto", "none") and sharding.axis_size("fsdp") > 1:
            return "dots"
        if self.remat == "auto":
            return "none" if sharding.platform() == "cpu" else "dots"
        return self.remat

    def __call__(
        self,
        x: Array,
        *,
        bias: Array | None = None,
        alibi: LinearBias | None = None,
        valid: Array | None = None,
        key: Key = None,
        record: TargetSpec | None = None,
        collect: bool = False,
        to_bias: Callable[[Array], Array] | None = None,
    ) -> Encoded:
        """x [B, T, D] -> Encoded. `collect` adds every layer's outputs (tests, `load`, report).

        bias: [H, T, T], of all blocks. alibi: with the slopes of all blocks, see `Alibi`.
        to_bias: see `Block`.
        """
        slopes = alibi.slopes if alibi else None
        part = record.source if record else "ffn"
        rates = None
        if self.drop_path:
            rates = self.drop_path * jnp.arange(self.depth) / max(self.depth - 1, 1)
        keys = jnp.arange(self.depth) if key is None else jax.random.split(key, self.depth)

        def layer(x, params, rate, slope, key_i):
            key_i = None if key is None else key_i
            block_key, drop_key = split(key_i, 2)
            y, t = self.block.apply(
                {"params": sharding.gather(params)},
                x,
                bias,
                alibi._replace(slopes=slope) if alibi else None,
                valid,
                rate,
                block_key,
                to_bias,
                part,
            )
            if key is not None and self.layerdrop:
                y = jnp.where(jax.random.bernoulli(drop_key, self.layerdrop), x, y)
            return sharding.split_rows(y), t

        if (policy := REMAT[self._remat()]) is not None:
            layer = jax.checkpoint(layer, policy=policy, prevent_cse=False)

        def recorded(y, t):
            t = (y if part == "block" else t)[:, record.skip :]
            return record.normalise(wide(t))

        def plain(x, xs):
            y, t = layer(x, *xs)
            return y, (y, t) if collect else None

        def averaging(carry, xs):
            x, mean = carry
            *xs, weight = xs
            y, t = layer(x, *xs)
            mean = mean + weight * recorded(y, t)
            return (y, mean), (y, t) if collect else None

        layers, first = (self.blocks, rates, slopes, keys), x if collect else None
        if record is None:
            x, outs = lax.scan(plain, x, layers)
            return Encoded(x, None, *(outs or (None, None)), first=first)
        averaged = record.layers(self.depth)
        below = averaged[0]
        weights = np.isin(np.arange(self.depth), averaged) / len(averaged)
        lower = jax.tree.map(lambda a: a[:below], layers)
        upper = jax.tree.map(lambda a: a[below:], (*layers, weights))
        x, low = lax.scan(plain, x, lower) if below else (x, None)
        zero = wide(jnp.zeros_like(x[:, record.skip :]))
        (x, mean), high = lax.scan(averaging, (x, zero), upper)
        if not collect:
            return Encoded(x, mean)
        parts = [p for p in (low, high) if p is not None]
        layers, ffn = (jnp.concatenate(p) for p in zip(*parts, strict=True))
        return Encoded(x, mean, layers, ffn, first=first)


def flops(*, depth: int, width: int, mlp: int, tokens: int) -> float:
    """Forward FLOPs of one row of `tokens`: 2 per multiply-add, matrix products only.

    Per layer: qkv 6 T D^2, scores and values 4 T^2 D, output 2 T D^2, feed-forward 4 T D F.
    """
    return float(depth) * tokens * (8 * width**2 + 4 * tokens * width + 4 * width * mlp)
