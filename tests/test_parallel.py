"""The mesh: what it asks of the devices, how it orders them, and who reads which rows."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from data2vec_jax.core import sharding
from data2vec_jax.core.errors import UserError
from data2vec_jax.core.state import path_name


def fake(slices, processes, each, platform="gpu"):
    """Devices as jax describes them: `slices` x `processes` x `each`."""
    return [
        SimpleNamespace(
            id=(s * processes + p) * each + i,
            slice_index=s,
            process_index=s * processes + p,
            platform=platform,
            device_kind="H100",
        )
        for s in range(slices)
        for p in range(processes)
        for i in range(each)
    ]


def ids(mesh):
    return np.vectorize(lambda device: device.id)(mesh.devices)


@pytest.mark.parametrize(
    "options, shape",
    [
        ({}, (1, 8, 1)),
        ({"fsdp": 4}, (1, 2, 4)),
        ({"data": 1, "fsdp": 8}, (1, 1, 8)),
        ({"fsdp": 2, "slices": 2}, (2, 2, 2)),
    ],
)
def test_shape(options, shape):
    mesh = sharding.make_mesh(**options)
    assert mesh.devices.shape == shape and mesh.axis_names == ("slice", "data", "fsdp")
    assert ids(mesh).ravel().tolist() == list(range(8))


def test_fsdp_stays_inside_a_slice():
    devices = fake(slices=2, processes=2, each=4)
    shuffled = [devices[i] for i in np.random.default_rng(0).permutation(16)]
    arranged = sharding._slices(shuffled, None)
    assert [len(group) for group in arranged] == [8, 8]
    assert [{d.slice_index for d in group} for group in arranged] == [{0}, {1}]
    placed = np.stack([sharding._arrange(group, (4, 2)) for group in arranged])
    wanted = np.arange(16).reshape(2, 4, 2)  # and inside a process too
    np.testing.assert_array_equal(np.vectorize(lambda d: d.id)(placed), wanted)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"fsdp": 3}, r"fsdp=3 does not use the 8 devices; use data=-1 and fsdp=2"),
        ({"data": 3, "fsdp": 2}, r"data=3 x fsdp=2 does not use the 8 devices"),
        ({"fsdp": 8, "slices": 2}, r"4 devices of each of the 2 slices; use .* fsdp=4, or"),
        ({"slices": 3}, r"8 devices are not 3 equal slices; use 2"),
        ({"data": 0}, r"data=0"),
        ({"slices": 0}, r"slices=0"),
    ],
)
def test_wrong_shapes(options, message):
    with pytest.raises(UserError, match=message):
        sharding.make_mesh(**options)


@pytest.mark.parametrize(
    "platform, size, fsdp",
    [("tpu", 256, 16), ("tpu", 4, 4), ("tpu", 24, 8), ("tpu", 1, 1), ("gpu", 8, 1), ("cpu", 8, 1)],
)
def test_fsdp_that_no_config_gives(platform, size, fsdp):
    assert sharding.fsdp_of(platform, size) == fsdp


def test_slices_of_different_sizes():
    with pytest.raises(UserError, match="slices of 4, 8 devices"):
        sharding.make_mesh(devices=[*fake(1, 1, 4), *fake(2, 1, 8)[8:]])


def test_a_slice_axis_changes_no_result():
    """A sum over the batch on 2 x 2 x 2 devices equals the sum on one."""
    x = np.random.default_rng(0).normal(size=(16, 4)).astype(np.float32)
    mesh = sharding.make_mesh(fsdp=2, slices=2)
    batch = sharding.to_global({"x": x}, mesh)
    assert batch["x"].addressable_shards[0].data.shape == (2, 4)
    np.testing.assert_allclose(jax.jit(lambda b: b["x"].sum())(batch), x.sum(), rtol=1e-5)


@pytest.mark.parametrize(
    "rows, shape, fsdp",
    [
        (8, (7, 6), 2),
        (8, (7, 10_000), 2),  # split by columns
        (8, (10_000, 7), 2),  # split by rows
        (8, (9_999, 7), 2),
        (8, (7, 10_000), 1),
        (3, (7, 10_000), 2),  # rows of the batch that do not divide
    ],
)
def test_rows_of_a_table(rows, shape, fsdp):
    """The gradient of rows that several devices use."""
    rng = np.random.default_rng(0)
    table = rng.normal(size=shape).astype(np.float32)
    indices = rng.integers(0, 7, (rows, 4))
    weights = rng.normal(size=(rows, 4, shape[1])).astype(np.float32)
    expected = np.zeros_like(table)
    np.add.at(expected, indices, weights)

    def weighted(table, dtype):
        return (weights * sharding.lookup(table, indices, dtype)).sum()

    with jax.set_mesh(sharding.make_mesh(fsdp=fsdp)):
        np.testing.assert_array_equal(sharding.lookup(table, indices, "float32"), table[indices])
        for dtype, limit in (("float32", 1e-6), ("bfloat16", 2e-2)):
            found = jax.jit(jax.grad(weighted), static_argnums=1)(table, dtype)
            assert found.dtype == np.float32
            np.testing.assert_allclose(found, expected, rtol=0, atol=limit * abs(expected).max())


def test_one_rule_and_its_exceptions():
    mesh = sharding.make_mesh(fsdp=4)
    tree = {
        "params": {"encoder": {"blocks": {"up": np.zeros((8, 16, 64)), "norm": np.zeros((8, 16))}}},
        "teacher": {"encoder": {"blocks": {"up": np.zeros((8, 16, 64))}}},
        "opt_state": {"mu": {"embed": np.zeros((1000, 16)), "odd": np.zeros((999, 15))}},
    }

    def specs(**options):
        found = sharding.shardings(tree, mesh, **options)
        return {path_name(path): s.spec for path, s in jax.tree.leaves_with_path(found)}

    blocks = "params/encoder/blocks/"
    assert set(specs().values()) == {P()}  # all are small
    ours = specs(min_size=1000)
    assert ours == {
        blocks + "up": P(None, None, "fsdp"),  # never the layers' axis
        blocks + "norm": P(),
        "teacher/encoder/blocks/up": P(None, None, "fsdp"),
        "opt_state/mu/embed": P("fsdp"),
        "opt_state/mu/odd": P(),  # nothing divides
    }
    rules = (("blocks/up", (None, "fsdp")), ("norm", (None, "fsdp")), ("embed", ()))
    assert specs(min_size=1000, rules=rules) == ours | {
        blocks + "up": P(None, "fsdp"),
        "teacher/encoder/blocks/up": P(None, "fsdp"),
        blocks + "norm": P(None, "fsdp"),
        "opt_state/mu/embed": P(),
    }


@pytest.mark.parametrize("spec", [("fsdp",), (None, "data"), ("fsdp", "fsdp"), (None, None, None)])
def test_a_rule_that_does_not_fit(spec):
    mesh = sharding.make_mesh(fsdp=4)
    with pytest.raises(
        UserError, match=r"config.sharding.rules: 'head' asks for .* of head \[6, 4\]"
    ):
        sharding.shardings({"head": np.zeros((6, 4))}, mesh, rules=(("head", spec),))


def test_a_process_owns_the_rows_of_its_devices():
    mesh = sharding.make_mesh(fsdp=2)
    assert sharding.own_blocks(mesh) == list(range(8))
    hosts = SimpleNamespace(devices=np.array(fake(slices=1, processes=2, each=2))[[0, 2, 1, 3]])
    assert sharding.own_blocks(hosts) == [0, 2]
