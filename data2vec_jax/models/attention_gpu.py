"""Attention by cuDNN's kernel, on NVIDIA's GPUs: logits and weights are never stored.

B batch, H heads, T tokens, d width of a head.
"""

import jax
import jax.numpy as jnp

Array = jax.Array
WIDEST = 128  # of a head, on cards before Hopper


def rule() -> str:
    """For whom it is, in words."""
    return "cuDNN's kernel in half precision, without a bias or dropout"


def takes(q: Array) -> bool:
    """Whether `attend` takes such arrays.

    It has no bias: cuDNN's has the type of q, so that a slope times a distance of hundreds would be
    wrong by whole numbers. Nor dropout, which JAX's public function has not.
    """
    half, width = q.dtype in (jnp.bfloat16, jnp.float16), q.shape[-1]
    return half and width % 8 == 0 and width <= WIDEST


def attend(
    q: Array, k: Array, v: Array, valid: Array | None, implementation: str = "cudnn"
) -> Array:
    """See `layers.attention`. implementation: of `jax.nn.dot_product_attention`."""
    T = q.shape[2]
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))  # [B, T, H, d]
    mask = None
    if valid is not None:  # for the kernel a bias, which has an even number of tokens
        q, k, v = (jnp.pad(x, ((0, 0), (0, T % 2), (0, 0), (0, 0))) for x in (q, k, v))
        valid = jnp.pad(valid, ((0, 0), (0, T % 2)))
        mask = jnp.broadcast_to(valid[:, None, None, :], (len(valid), 1, *[valid.shape[1]] * 2))
    out = jax.nn.dot_product_attention(q, k, v, mask=mask, implementation=implementation)
    return jnp.swapaxes(out[:, :T], 1, 2)
