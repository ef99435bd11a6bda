"""Attention by cuDNN's kernel, on NVIDIA's GPUs: logits and weights are never stored.

B batch, H heads, T tokens, d width of a head.
"""

import jax
import jax.numpy as jnp

Array = jax.Array
WIDEST = 128  # of a head, on cards before Hopper
OLDEST = 8.0  # compute capability: Ampere


def rule() -> str:
    """For whom it is, in words."""
    return "cuDNN's kernel (Ampere and later) in half precision, without a bias or dropout"


def takes(q: Array) -> bool:
    """Whether `attend` takes such arrays.

    It has no bias: cuDNN's has the type of q, so that a slope times a distance of hundreds would be
    wrong by whole numbers. Nor dropout, which JAX's public function has not.
    """
    half, width = q.dtype in (jnp.bfloat16, jnp.float16), q.shape[-1]
    return half and width % 8 == 0 and width <= WIDEST and _new_enough()


def _new_enough() -> bool:
    """Whether this machine's card has the kernel; yes where a plan only describes one."""
    if jax.default_backend() != "gpu":
        return True
    capability = getattr(jax.local_devices()[0], "compute_capability", "")
    try:
        return float(capability) >= OLDEST
    except ValueError:  # of another maker
        return False


def attend(
    q: Array, k: Array, v: Array, valid: Array | None, implementation: str = "cudnn"
) -> Array:
    """See `layers.attention`. implementation: of `jax.nn.dot_product_attention`."""
    B, _, T, _ = q.shape
    # What it takes has an even number of tokens. Padding is a mask of keys, for the kernel a bias;
    # a token that makes the number even is left out by the rows' lengths, which cost nothing.
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))  # [B, T, H, d]
    q, k, v = (jnp.pad(x, ((0, 0), (0, T % 2), (0, 0), (0, 0))) for x in (q, k, v))
    how = {}
    if valid is not None:
        valid = jnp.pad(valid, ((0, 0), (0, T % 2)))
        how["mask"] = jnp.broadcast_to(valid[:, None, None], (B, 1, T + T % 2, T + T % 2))
    elif T % 2:
        lengths = jnp.full(B, T, jnp.int32)
        how |= {"query_seq_lengths": lengths, "key_value_seq_lengths": lengths}
    out = jax.nn.dot_product_attention(q, k, v, implementation=implementation, **how)
    return jnp.swapaxes(out[:, :T], 1, 2)
