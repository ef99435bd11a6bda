"""Augmentations of whole batches of images, on the device: random erasing, mixup, cutmix.

B batch, H x W pixels, C channels, K classes. Conversion spec 2.1; erasing: arXiv 1708.04896,
mixup: Zhang 2017 (arXiv 1710.09412), cutmix: Yun 2019 (arXiv 1905.04899).
"""

import math

import jax
import jax.numpy as jnp

Array = jax.Array
TRIES = 10  # of a box to erase


def erase(image: Array, key: Array, probability: float) -> Array:
    """Noise N(0, 1) in a box of some rows of [B, H, W, C] normalised pixels. key: one of each row.

    The box: 2 to 33 % of the area, a ratio of sides between 0.3 and 1 / 0.3, log-uniform; the first
    of ten tries that fits.
    """
    H, W = image.shape[1:3]

    def one(image, key):
        keys = jax.random.split(key, 6)
        area = H * W * jax.random.uniform(keys[0], (TRIES,), minval=0.02, maxval=1 / 3)
        bound = math.log(1 / 0.3)
        ratio = jnp.exp(jax.random.uniform(keys[1], (TRIES,), minval=-bound, maxval=bound))
        high, wide = jnp.round(jnp.sqrt(area * ratio)), jnp.round(jnp.sqrt(area / ratio))
        fits = (high < H) & (wide < W)
        first = jnp.argmax(fits)
        high, wide = high[first], wide[first]
        top, left = (
            jnp.floor(jax.random.uniform(k) * (side - edge + 1))
            for k, side, edge in ((keys[2], H, high), (keys[3], W, wide))
        )
        chosen = (jax.random.uniform(keys[4]) < probability) & fits[first]
        inside = box(H, W, top, left, top + high, left + wide) & chosen
        noise = jax.random.normal(keys[5], image.shape, image.dtype)
        return jnp.where(inside[..., None], noise, image)

    return jax.vmap(one)(image, key)


def box(H: int, W: int, top: Array, left: Array, bottom: Array, right: Array) -> Array:
    """bool [H, W]: True from (top, left) up to, not including, (bottom, right)."""
    rows, columns = jnp.arange(H)[:, None], jnp.arange(W)
    return (rows >= top) & (rows < bottom) & (columns >= left) & (columns < right)


def mix(
    image: Array,
    targets: Array,
    key: Array,
    *,
    mixup: float,
    cutmix: float,
    probability: float = 1.0,
    switch: float = 0.5,
) -> tuple[Array, Array]:
    """Each row with the row as far from the other end: [B, H, W, C], targets [B, K].

    One share for the batch, from Beta(a, a) with a = `mixup` or `cutmix` (0: never; of both, cutmix
    with probability `switch`), and nothing is mixed with probability 1 - `probability`.
    """
    H, W = image.shape[1:3]
    keys = jax.random.split(key, 6)
    cut = jnp.asarray(cutmix > 0)
    if mixup and cutmix:
        cut = jax.random.uniform(keys[0]) < switch
    shares = [
        jax.random.beta(k, a or 1.0, a or 1.0) for k, a in ((keys[1], mixup), (keys[2], cutmix))
    ]
    share = jnp.where(cut, shares[1], shares[0])
    share = jnp.where(jax.random.uniform(keys[3]) < probability, share, 1.0)
    sides = [jnp.floor(edge * jnp.sqrt(1 - share)) for edge in (H, W)]
    corners = []
    for k, edge, side in ((keys[4], H, sides[0]), (keys[5], W, sides[1])):
        middle = jax.random.randint(k, (), 0, edge)
        ends = middle - side // 2, middle + side // 2
        corners.append([jnp.clip(end, 0, edge) for end in ends])
    (top, bottom), (left, right) = corners
    inside = cut & box(H, W, top, left, bottom, right)
    # The box is cut off at the edge of the image: what is left of it counts.
    share = jnp.where(cut, 1 - (bottom - top) * (right - left) / (H * W), share)
    other = image[::-1]
    blended = jnp.where(cut, image, share * image + (1 - share) * other)
    image = jnp.where(inside[..., None], other, blended)
    return image, share * targets + (1 - share) * targets[::-1]


def mask_bands(x: Array, key: Array, row_share: float, column_share: float) -> Array:
    """Zeros in one band of rows and one of columns of each of [B, H, W, C]. key: one of each row.

    As for spectrograms of AST and EAT: a band is uniform between 0 and its share of the side wide,
    and anywhere (docs/spec/sound.md section 6).
    """

    def inside(keys, size, share):
        # In whole rows, as torchaudio's masks: the width and the place are rounded down.
        width = jax.random.uniform(keys[0]) * int(share * size)
        start = jnp.floor(jax.random.uniform(keys[1]) * (size - width))
        places = jnp.arange(size)
        return (places >= start) & (places < start + jnp.floor(width))

    def one(x, key):
        keys = jax.random.split(key, 4)
        rows = inside(keys[:2], x.shape[0], row_share)
        columns = inside(keys[2:], x.shape[1], column_share)
        return jnp.where((rows[:, None] | columns)[..., None], 0.0, x)

    return jax.vmap(one)(x, key)
