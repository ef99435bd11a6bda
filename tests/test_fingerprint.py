"""Fingerprints: equal on every mesh and in numpy, different after the smallest change."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from data2vec_jax.core import fingerprint

RNG = np.random.default_rng(0)
ARRAYS = [
    RNG.normal(size=(8, 6, 4)).astype(np.float32),
    RNG.normal(size=16).astype(jnp.bfloat16),
    np.float32(3),
    RNG.integers(0, 5, (4, 4)).astype(np.int32),
    np.zeros((0, 3), np.float32),
    RNG.integers(0, 2, 5).astype(bool),
    RNG.normal(size=(8, 6)).astype(np.float16),
]
SPECS = [P(None, "fsdp"), P("fsdp"), P(), P(("data", "fsdp")), P(), P(), P("data", ("fsdp",))]
EXPECTED = [fingerprint.text(fingerprint.of_array(np.asarray(x))) for x in ARRAYS]


@pytest.mark.parametrize(
    ("shape", "specs"), [((2, 2, 2), SPECS), ((1, 8, 1), [P()] * 7), (None, None)]
)
def test_the_same_on_every_mesh(shape, specs):
    leaves = [jnp.asarray(x) for x in ARRAYS]
    if shape:
        mesh = Mesh(np.array(jax.devices()[:8]).reshape(shape), ("slice", "data", "fsdp"))
        places = [NamedSharding(mesh, spec) for spec in specs]
        leaves = [jax.device_put(x, place) for x, place in zip(leaves, places, strict=True)]
    rows = np.asarray(fingerprint.of_arrays(leaves))
    assert [fingerprint.text(row) for row in rows] == EXPECTED and not rows[:, 2].any()
    if shape:
        specs = tuple(x.sharding.spec for x in leaves)
        program = fingerprint._sums.lower(leaves, mesh, specs).compile().as_text()
        assert program.count(" all-reduce(") == (1 if specs[0] else 0)  # however many arrays


@pytest.mark.parametrize("index", [0, 1, 2, 3, 6])
def test_every_bit_counts(index):
    """Both sums change with any one bit, so neither is idle."""
    array = np.asarray(ARRAYS[index])
    before = fingerprint.of_array(array)
    for bit in range(8 * array.nbytes):
        changed = array.copy()
        changed.reshape(-1).view(np.uint8)[bit // 8] ^= np.uint8(1 << bit % 8)
        after = fingerprint.of_array(changed)
        assert after[0] != before[0] and after[1] != before[1]


def test_changes_that_simple_sums_do_not_see():
    x = RNG.normal(size=200_000).astype(np.float32)  # more than a chunk
    swapped, moved = x.copy(), np.roll(x, 1 << 16)
    swapped[[5, 5 + (1 << 17)]] = x[[5 + (1 << 17), 5]]
    variants = [x, -x, x[::-1], swapped, moved, np.abs(x), x.astype(np.float64)]
    assert len({fingerprint.of_array(v) for v in variants}) == len(variants)


def test_elements_that_are_not_finite_are_counted():
    leaves = [
        jnp.array([1.0, jnp.nan, -jnp.inf]),
        jnp.arange(3),
        jnp.array([jnp.inf], jnp.bfloat16),
    ]
    assert np.asarray(fingerprint.of_arrays(leaves))[:, 2].tolist() == [2, 0, 1]
