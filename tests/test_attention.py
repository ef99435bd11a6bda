"""Attention: the kernel of TPUs, by Pallas' interpreter, equals the formula; dropout of weights."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from data2vec_jax.core import sharding
from data2vec_jax.models import attention_gpu, attention_parts, attention_tpu, layers
from data2vec_jax.models.attention_parts import LinearBias

H, WIDTH, RATE = 2, 8, 0.3

CASES = {  # what there is beside q, k and v, and T: one block of 128 lanes, padding, two blocks
    "plain": ((), 128),
    "padded keys": (("valid",), 130),
    "bias": (("bias",), 197),
    "line": (("line", "valid"), 150),
    "grid": (("grid", "bias"), 140),
    "dropout": (("dropout",), 100),
    "all": (("valid", "bias", "grid", "dropout"), 133),
    "two blocks": (("valid", "line", "dropout"), 250),
}


def arrays(parts, length, rows=2, dtype=jnp.float32):
    """(q, k, v), (bias, slopes), what has no gradient, and the weights of a loss."""
    rng = np.random.default_rng(length)
    q, k, v, weights = (
        jnp.asarray(rng.standard_normal((rows, H, length, WIDTH)), dtype) for _ in range(4)
    )
    bias = jnp.asarray(rng.standard_normal((H, length, length)), jnp.float32)
    slopes = -jnp.asarray(rng.uniform(0.05, 0.5, H), jnp.float32)
    ends = rng.integers(length // 2, length, rows)
    valid = jnp.arange(length) < ends[:, None]
    places = np.stack([rng.permutation(4 * length)[:length] for _ in range(rows)])
    line = functools.partial(LinearBias, jnp.float32(places)[..., None], distance="manhattan")
    grid = jnp.stack(jnp.divmod(jnp.int32(places), 16), -1).astype(jnp.float32)
    grid = functools.partial(LinearBias, grid, distance="euclidean", extra=1)
    linear = line if "line" in parts else grid if "grid" in parts else None
    seeds = attention_parts.seeds(jax.random.key(length), rows, H)
    return (
        (q, k, v),
        (bias if "bias" in parts else None, slopes if linear else None),
        (linear, valid if "valid" in parts else None, seeds if "dropout" in parts else None),
        weights,
    )


def results(attend, learned, biases, rest, weights):
    """{name: array} of the output and all gradients."""
    linear, valid, seeds = rest

    def loss(learned, biases):
        bias, slopes = biases
        out = attend(*learned, bias, linear and linear(slopes=slopes), valid, RATE, seeds)
        return jnp.sum(out * weights).astype(jnp.float32), out

    both = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    (_, out), (found, of) = both(learned, biases)
    names = dict(zip(("q", "k", "v", "bias", "slopes"), (*found, *of), strict=True))
    found = {"out": out} | {name: x for name, x in names.items() if x is not None}
    return {name: np.asarray(x, np.float32) for name, x in found.items()}


kernel = functools.partial(attention_tpu.attend, interpret=True)


@pytest.mark.parametrize("name", CASES)
def test_the_kernel_equals_the_formula(name, monkeypatch):
    parts, length = CASES[name]
    if name == "two blocks":
        monkeypatch.setattr(attention_tpu, "LARGEST", 128 * 256)
    given = arrays(parts, length)
    ours, expected = results(kernel, *given), results(layers.attend, *given)
    assert ours.keys() == expected.keys()
    for part, x in expected.items():
        np.testing.assert_allclose(ours[part], x, atol=3e-6 * np.abs(x).max(), rtol=0, err_msg=part)


def test_the_kernel_in_bfloat16_is_as_near_to_float32_as_the_formula():
    parts, length = ("valid", "line", "bias"), 130
    exact = results(layers.attend, *arrays(parts, length))
    given = arrays(parts, length, dtype=jnp.bfloat16)
    ours, theirs = results(kernel, *given), results(layers.attend, *given)
    for part, x in exact.items():
        error, usual = (np.abs(found[part] - x).mean() for found in (ours, theirs))
        assert error <= 1.25 * usual, part


def test_rows_on_eight_devices():
    parts, length = ("valid", "bias", "grid", "dropout"), 133
    given = arrays(parts, length, rows=8)
    expected = results(layers.attend, *given)
    mesh = sharding.make_mesh(fsdp=2)

    def split(x):
        if not isinstance(x, jax.Array):
            return x
        return jax.device_put(x, NamedSharding(mesh, sharding.BATCH if x.shape[0] == 8 else P()))

    with jax.set_mesh(mesh):
        ours = results(kernel, *jax.tree.map(split, given))
    for part, x in expected.items():
        np.testing.assert_allclose(ours[part], x, atol=3e-6 * np.abs(x).max(), rtol=0, err_msg=part)


def test_what_the_kernel_takes():
    takes = attention_tpu.takes
    assert takes(3, 512, 64, False) and takes(3, 197, 64, True) and takes(3, 1500, 128, False)
    assert not takes(3, 80, 64, False)  # of which there is little to save
    assert not takes(3, 1500, 64, True)  # the gradient of a bias needs all queries at once
    assert not takes(3, 3000, 64, False) and not takes(3, 512, 256, False)
    with jax.set_mesh(sharding.make_mesh()):
        assert takes(16, 512, 64, False) and not takes(12, 512, 64, False)


@pytest.mark.parametrize(("parts", "length"), [((), 128), ((), 131), (("valid",), 131)])
def test_the_wrapper_of_cudnn_equals_the_formula(parts, length):
    """By JAX's own implementation of what cuDNN computes."""

    def wrapped(q, k, v, bias, linear, valid, rate, seeds):
        return attention_gpu.attend(q, k, v, valid, "xla")

    given = arrays(parts, length)
    ours, expected = results(wrapped, *given), results(layers.attend, *given)
    for part, x in expected.items():
        np.testing.assert_allclose(ours[part], x, atol=3e-6 * np.abs(x).max(), rtol=0)


@pytest.mark.parametrize(
    ("device", "dtype", "length", "linear", "kernel"),
    [
        ("tpu", "bfloat16", 512, True, "attention"),
        ("tpu", "bfloat16", 64, True, None),
        ("gpu", "bfloat16", 64, False, "dot_product_attention"),
        ("gpu", "bfloat16", 64, True, None),
        ("gpu", "float32", 64, False, None),
        ("cpu", "bfloat16", 512, False, None),
    ],
)
def test_devices_and_shapes_choose(device, dtype, length, linear, kernel, monkeypatch):
    called = []
    for module, name in ((attention_tpu, "attention"), (attention_gpu, "dot_product_attention")):
        monkeypatch.setattr(module, "attend", lambda q, *rest, name=name: called.append(name) or q)
    monkeypatch.setattr(layers, "attend", lambda q, *rest: called.append(None) or q)
    q = jnp.zeros((2, H, length, WIDTH), dtype)
    bias = LinearBias(jnp.zeros((1, length, 1)), jnp.zeros(H), "manhattan") if linear else None
    named = jax.sharding.AbstractDevice(device_kind=device, num_cores=None, platform=device)
    mesh = sharding.make_mesh(devices=jax.devices()[:1]).abstract_mesh
    with jax.sharding.use_abstract_mesh(mesh.update(abstract_device=named)):
        layers.attention(q, q, q, linear=bias)
        words = layers.attention_by()
    assert called == [kernel]
    assert ("kernel" in words) == (device != "cpu")


# Dropout ------------------------------------------------------------------------------------------


def hashed(query, key, seed):
    """The bits of `drop_weights`, in Python's integers."""
    mask = 2**32 - 1
    bits = ((query << 16) + key) ^ seed[0]
    for factor in (0x7FEB352D, 0x846CA68B):
        bits = (bits ^ (bits >> 16)) * factor & mask
        bits ^= bits >> 15
    return (bits ^ seed[1]) * 0x9E3779B1 & mask


def dropped(rate, seeds, length):
    """Which weights are kept, bool [B, H, T, T]."""
    places = jnp.arange(length, dtype=jnp.int32)
    seed = seeds[:, :, 0, None, None], seeds[:, :, 1, None, None]
    ones = jnp.ones((*seeds.shape[:2], length, length))
    found = attention_parts.drop_weights(ones, rate, seed, places[:, None], places)
    kept = np.asarray(found) > 0
    np.testing.assert_allclose(found, kept / (1 - rate), rtol=1e-6)
    return kept


def test_dropout_keeps_what_the_hash_says():
    seeds = attention_parts.seeds(jax.random.key(1), 1, 2)
    kept = dropped(0.25, seeds, 6)
    for (head, query, key), found in np.ndenumerate(kept[0]):
        numbers = [int(x) % 2**32 for x in seeds[0, head]]
        bits = (hashed(query, key, numbers) + 2**31) % 2**32  # signed, in order
        assert found == (bits >= 0.25 * 2**32)


@pytest.mark.parametrize("rate", [0.05, 0.1, 0.5])
def test_dropout_is_independent_from_place_to_place(rate):
    rows, heads, length = 8, 12, 128
    kept = dropped(rate, attention_parts.seeds(jax.random.key(0), rows, heads), length)
    drops = (~kept).astype(np.float64) - rate

    def near_zero(x, name):  # a mean of independent numbers, within five deviations
        limit = 5 * x.std() / np.sqrt(x.size)
        assert abs(x.mean()) < limit, (name, x.mean(), limit)

    near_zero(drops, "share")
    near = (0, 0, 0, 1), (0, 0, 1, 0), (0, 0, 1, -1), (0, 0, 0, 64)
    for shift in (*near, (0, 1, 0, 0), (1, 0, 0, 0)):
        near_zero(drops * np.roll(drops, shift, (0, 1, 2, 3)), shift)
    for axes in ((0, 1, 2), (0, 1, 3), (2, 3)):  # of keys, of queries, of heads of rows
        sums = drops.sum(axes)
        variance = sums.var() / (drops.size / sums.size * rate * (1 - rate))
        assert 0.5 < variance < 1.6, (axes, variance)
