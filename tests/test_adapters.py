"""LoRA and DoRA against their formulas in numpy, on the encoder of a model.

L layers, D width, r rank.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data2vec_jax.core.errors import UserError
from data2vec_jax.models import adapters
from data2vec_jax.models.adapters import Site
from data2vec_jax.models.encoder import Encoder

L, D, R = 3, 8, 2


@pytest.fixture(scope="module")
def model():
    """A function (params, x) -> x, its parameters, and an input."""
    encoder = Encoder(depth=L, width=D, heads=2, mlp=12)
    x = jax.random.normal(jax.random.key(1), (2, 5, D))
    params = {"encoder": encoder.init(jax.random.key(0), x)["params"]}
    return lambda params, x: encoder.apply({"params": params["encoder"]}, x).x, params, x


def find(params, **options):
    return adapters.find(params, **dict(targets=["qkv/(query|value)$", "up$"], rank=R) | options)


def lively(tree, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), tree)


def test_sites_are_kernels_by_pattern(model):
    _, params, _ = model
    sites = find(params, alpha=6, rank_stabilised=True)
    assert {(x.name, x.kernel, x.part) for x in sites} == {
        ("encoder/blocks/qkv/query", "encoder/blocks/qkv/kernel", 0),
        ("encoder/blocks/qkv/value", "encoder/blocks/qkv/kernel", 2),
        ("encoder/blocks/up", "encoder/blocks/up/kernel", None),
    }
    assert all(x.ranks == (R,) * L and x.scales == (6 / R**0.5,) * L for x in sites)
    stored = json.loads(json.dumps([x._asdict() for x in sites]))
    assert [Site.of(x) for x in stored] == sites


@pytest.mark.parametrize("dora", [False, True])
def test_a_new_adapter_changes_nothing(model, dora):
    apply, params, x = model
    sites = find(params, dora=dora)
    new = adapters.init(jax.random.key(2), sites, params)
    a = adapters.get(new, "encoder/blocks/up")["a"]
    assert a.shape == (L, D, R) and 0.5 / D**0.5 < jnp.abs(a).max() <= 1 / D**0.5
    out = jax.jit(apply)(adapters.merged(params, sites, new), x)
    np.testing.assert_allclose(out, jax.jit(apply)(params, x), atol=1e-6)


@pytest.mark.parametrize("dora", [False, True])
def test_kernels_are_those_of_the_formula(model, dora):
    _, params, _ = model
    sites = find(params, dora=dora, alpha=3.0)
    # The second layer has no adapter, the third one of rank 1.
    sites = [x._replace(ranks=(R, 0, 1), scales=(1.5, 0.0, 3.0)) for x in sites]
    leaves = lively(adapters.init(jax.random.key(2), sites, params))
    for site in sites:
        node = adapters.get(leaves, site.name)
        node["a"] = node["a"].at[1].set(0).at[2, :, 1:].set(0)
        node["b"] = node["b"].at[1].set(0).at[2, 1:].set(0)
    found = adapters.merged(params, sites, leaves)
    for site in sites:
        node = jax.tree.map(np.asarray, adapters.get(leaves, site.name))
        before, after = (np.asarray(adapters.base(tree, site)) for tree in (params, found))
        for layer, scale in enumerate(site.scales):
            wanted = before[layer] + scale * node["a"][layer] @ node["b"][layer]
            if dora and site.ranks[layer]:
                wanted = wanted / np.sqrt((wanted**2).sum(0)) * node["magnitude"][layer]
            np.testing.assert_allclose(after[layer], wanted, atol=1e-5)
    keys = np.split(np.asarray(found["encoder"]["blocks"]["qkv"]["kernel"]), 3, -1)[1]
    before = np.split(np.asarray(params["encoder"]["blocks"]["qkv"]["kernel"]), 3, -1)[1]
    np.testing.assert_array_equal(keys, before)
    out = [tree["encoder"]["blocks"]["out"]["kernel"] for tree in (params, found)]
    np.testing.assert_array_equal(*out)


def test_they_learn_alone_and_what_fills_up_stays_zero(model):
    apply, params, x = model
    params = jax.tree.map(lambda a, b: a + 0.3 * b, params, lively(params))
    sites = [s._replace(ranks=(R, 1, 0), scales=(1.0, 1.0, 0.0)) for s in find(params, dora=True)]
    leaves = adapters.init(jax.random.key(2), sites, params)

    @jax.jit
    def step(leaves):
        def loss(leaves):
            out = apply(adapters.merged(params, sites, leaves), x)
            return jnp.mean(jnp.square(out - x[::-1]))

        value, grads = jax.value_and_grad(loss)(leaves)
        return value, jax.tree.map(lambda p, g: p - 0.3 * g, leaves, grads)

    values = []
    for _ in range(12):
        value, leaves = step(leaves)
        values.append(float(value))
    assert values[-1] < 0.9 * values[0]
    node = adapters.get(leaves, "encoder/blocks/qkv/query")
    assert np.abs(node["b"][0]).max() > 0
    for leaf, fill in (
        ("a", np.s_[1, :, 1:]),
        ("b", np.s_[1, 1:]),
        ("a", np.s_[2]),
        ("b", np.s_[2]),
    ):
        assert np.all(np.asarray(node[leaf])[fill] == 0)


@pytest.mark.parametrize("dora", [False, True])
def test_dropout_is_of_inputs_and_right_on_average(model, dora):
    _, params, _ = model
    sites = find(params, targets=["up$"], dora=dora)
    leaves = lively(adapters.init(jax.random.key(2), sites, params), 3)
    kernel = lambda key: adapters.base(  # noqa: E731
        adapters.merged(params, sites, leaves, key, 0.3), sites[0]
    )
    keys = jax.random.split(jax.random.key(0), 4000)
    mean = jnp.mean(jax.vmap(kernel)(keys), 0)
    whole = adapters.base(adapters.merged(params, sites, leaves), sites[0])
    np.testing.assert_allclose(mean, whole, atol=0.3)
    dropped = np.asarray(kernel(keys[0]) - adapters.base(params, sites[0]))
    assert 0 < np.all(np.abs(dropped) < 1e-6, axis=-1).mean() < 0.7 or dora


def test_wrong_options_are_named(model):
    _, params, _ = model
    with pytest.raises(UserError, match=r"no linear layer matches 'quary'.*qkv/query"):
        find(params, targets=["quary"])
    with pytest.raises(UserError, match=r"config\.adapter\.rank: 0"):
        find(params, rank=0)
