"""What every way to compute attention shares: the bias of distances, and dropout of weights.

B batch, T tokens, H heads.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array


class LinearBias(NamedTuple):
    """The bias slope * distance, kept apart, so that none of all heads is ever stored (spec 2.3).

    places: [B or 1, T, axes] float32, where tokens stand. slopes: [H], not above 0; of all layers
    [L, H]. distance: 'manhattan' or 'euclidean'. extra: leading tokens that stand nowhere, at
    distance 0 from all.
    """

    places: Array
    slopes: Array
    distance: str
    extra: int = 0

    def distances(self) -> Array:
        """[B or 1, T, T] float32."""
        apart = distances(self.distance, self.places, jnp.swapaxes(self.places, -1, -2))
        place = jnp.arange(apart.shape[-1]) >= self.extra
        return jnp.where(place[:, None] & place, apart, 0.0) if self.extra else apart


def distances(kind: str, query: Array, key: Array) -> Array:
    """query [..., T, axes], key [..., axes, T] -> how far they are apart, [..., T, T]."""
    parts = [query[..., a : a + 1] - key[..., a : a + 1, :] for a in range(query.shape[-1])]
    if kind == "manhattan":
        return sum(jnp.abs(x) for x in parts)
    return jnp.sqrt(sum(jnp.square(x) for x in parts))


DISTANCES = "manhattan", "euclidean"


def seeds(key: Array, rows: int, heads: int) -> Array:
    """What `drop_weights` draws from: int32 [B, H, 2]."""
    return lax.bitcast_convert_type(jax.random.bits(key, (rows, heads, 2)), jnp.int32)


def drop_weights(
    x: Array, rate: float, seed: tuple[Array, Array], query: Array, key: Array
) -> Array:
    """Inverted dropout of attention weights, or of their gradients.

    Whether the weight of a query and a key is kept is a hash of their places (int32, below 2^16,
    that broadcast to the shape of x) and two numbers of the row and the head: any program finds the
    same ones, wherever it is in the array. The hash is one multiplication and two shifts, three
    times, as in MurmurHash3's last step: each of its bits depends on all that are given.
    """
    bits = ((query << 16) + key) ^ seed[0]
    for factor in (0x7FEB352D, 0x846CA68B - 2**32):
        bits = (bits ^ lax.shift_right_logical(bits, 16)) * jnp.int32(factor)
        bits = bits ^ lax.shift_right_logical(bits, 15)
    bits = (bits ^ seed[1]) * jnp.int32(0x9E3779B1 - 2**32)
    least = min(round(rate * 2**32), 2**32 - 1) - 2**31  # bits are uniform from -2^31
    return jnp.where(bits >= jnp.int32(least), x / (1.0 - rate), 0).astype(x.dtype)
