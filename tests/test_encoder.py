"""The scanned encoder against a loop in numpy, and against itself under every option.

B batch, T tokens, D width, H heads, L layers.
"""

import functools
import math
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data2vec_jax.core import sharding
from data2vec_jax.models import layers
from data2vec_jax.models.encoder import Encoder, Source, TargetSpec
from data2vec_jax.models.layers import convolve
from data2vec_jax.models.positions import relative_index, token_positions
from data2vec_jax.objectives.targets import normaliser, regression

B, T, D, H, L = 2, 7, 16, 4, 3


def lively(params, seed=1):
    """Parameters far from their initial values, so that a missing bias or scale shows."""
    leaves, tree = jax.tree.flatten(params)
    rng = np.random.default_rng(seed)
    return jax.tree.unflatten(
        tree, [jnp.asarray(x + 0.3 * rng.normal(size=x.shape), jnp.float32) for x in leaves]
    )


def setup(**options):
    encoder = Encoder(depth=L, width=D, heads=H, mlp=32, **options)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(B, T, D)), jnp.float32)
    return encoder, lively(encoder.init(jax.random.key(0), x)["params"]), x


def np_norm(x, p):
    y = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    return y * p["scale"] + p["bias"]


def np_block(x, p, norm, valid):
    """A block's output and its parts, head by head, as the paper's figure says."""
    erf = np.vectorize(math.erf)

    def attend(x):
        q, k, v = np.split(x @ p["qkv"]["kernel"] + p["qkv"]["bias"], 3, -1)
        out = np.zeros_like(x)
        for b in range(B):
            for h in range(H):
                cut = slice(h * D // H, (h + 1) * D // H)
                scores = q[b, :, cut] @ k[b, :, cut].T / math.sqrt(D // H)
                scores[:, ~valid[b]] = -np.inf
                weights = np.exp(scores - scores.max(-1, keepdims=True))
                out[b, :, cut] = weights / weights.sum(-1, keepdims=True) @ v[b, :, cut]
        return out @ p["out"]["kernel"] + p["out"]["bias"]

    def feed(x):
        y = x @ p["up"]["kernel"] + p["up"]["bias"]
        y = y * (1 + erf(y / math.sqrt(2))) / 2
        return y @ p["down"]["kernel"] + p["down"]["bias"]

    if norm == "post":
        a = attend(x)
        u = np_norm(x + a, p["norm1"])
        t = feed(u)
        y = np_norm(u + t, p["norm2"])
    else:
        a = attend(np_norm(x, p["norm1"])) * p.get("layer_scale1", 1)
        u = x + a
        t = feed(np_norm(u, p["norm2"])) * p.get("layer_scale2", 1)
        y = u + t
    return y, {"attention": a, "ffn": t, "residual": u + t, "block": y}


@pytest.mark.parametrize("norm", ["post", "pre"])
def test_equals_numpy(norm):
    encoder, params, x = setup(norm=norm)
    valid = np.ones((B, T), bool)
    valid[1, 5:] = False
    out = encoder.apply({"params": params}, x, valid=jnp.asarray(valid), collect=True)
    y = np.asarray(x, np.float64)
    for i in range(L):
        layer = jax.tree.map(lambda a, i=i: np.asarray(a[i], np.float64), params["blocks"])
        y, parts = np_block(y, layer, norm, valid)
        np.testing.assert_allclose(out.layers[i][valid], y[valid], rtol=2e-4, atol=2e-5)
        np.testing.assert_allclose(out.ffn[i][valid], parts["ffn"][valid], rtol=2e-4, atol=2e-5)
    np.testing.assert_array_equal(out.x, out.layers[-1])
    np.testing.assert_array_equal(out.first, x)


@pytest.mark.parametrize("options", [{}, {"norm": "pre"}, {"norm": "pre", "layer_scale": 0.5}])
def test_recorded_parts_equal_numpys(options):
    """Table 5 of the 1.0 paper: where in a block the targets are taken from."""
    encoder, params, x = setup(**options)
    valid, averaged = np.ones((B, T), bool), (0, 2)
    y, wanted = np.asarray(x, np.float64), dict.fromkeys(get_args(Source), 0.0)
    for i in range(L):
        layer = jax.tree.map(lambda a, i=i: np.asarray(a[i], np.float64), params["blocks"])
        y, parts = np_block(y, layer, options.get("norm", "post"), valid)
        if i in averaged:
            wanted = {name: wanted[name] + parts[name] / len(averaged) for name in wanted}
    assert set(wanted) == set(parts)
    for name, mean in wanted.items():
        record = TargetSpec(averaged, name, lambda x: x)
        out = encoder.apply({"params": params}, x, record=record)
        np.testing.assert_allclose(out.targets, mean, rtol=2e-4, atol=5e-5, err_msg=name)
        np.testing.assert_allclose(out.x, y, rtol=2e-4, atol=5e-5)


@pytest.mark.parametrize("what", ["ffn", "block"])
@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_accumulated_targets_are_the_mean_of_the_collected(what, top_k):
    encoder, params, x = setup()
    record = TargetSpec(top_k, what, normaliser(("instance", "layer")), skip=1)
    out = encoder.apply({"params": params}, x, record=record, collect=True)
    lean = encoder.apply({"params": params}, x, record=record)
    layers = np.asarray(out.ffn if what == "ffn" else out.layers, np.float64)[-top_k:, :, 1:]
    over_time = (layers - layers.mean(2, keepdims=True)) / np.sqrt(
        layers.var(2, keepdims=True) + 1e-5
    )
    normed = (over_time - over_time.mean(-1, keepdims=True)) / np.sqrt(
        over_time.var(-1, keepdims=True) + 1e-5
    )
    np.testing.assert_allclose(lean.targets, normed.mean(0), rtol=1e-3, atol=1e-4)
    np.testing.assert_array_equal(lean.targets, out.targets)


def test_a_small_start_has_xaviers_queries_keys_and_values():
    """N(0, 0.02) but for these, whose variance is 2 / (D + 3 D): at D = 768 nearly the same."""
    for width, spread in ((96, 0.0722), (768, 0.0255)):
        encoder = Encoder(1, width, 4, 2 * width, initializer="small")
        x = jnp.zeros((1, 2, width))
        blocks = encoder.init(jax.random.key(0), x)["params"]["blocks"]
        assert np.std(blocks["qkv"]["kernel"]) == pytest.approx(spread, rel=0.02)
        for name in ("out", "up", "down"):
            assert np.std(blocks[name]["kernel"]) == pytest.approx(0.02, rel=0.02)


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_remat_changes_nothing(remat):
    plain, params, x = setup(dropout=0.1, attention_dropout=0.1)
    saved, _, _ = setup(dropout=0.1, attention_dropout=0.1, remat=remat)

    def loss(encoder, params):
        return jnp.sum(jnp.square(encoder.apply({"params": params}, x, key=jax.random.key(5)).x))

    one = jax.grad(lambda p: loss(plain, p))(params)
    two = jax.grad(lambda p: loss(saved, p))(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), one, two)


def test_dropouts_act_in_training_only():
    for options in (dict(dropout=0.5), dict(attention_dropout=0.5), dict(layerdrop=0.5)):
        encoder, params, x = setup(**options)
        quiet = [encoder.apply({"params": params}, x).x for _ in range(2)]
        loud = [encoder.apply({"params": params}, x, key=jax.random.key(i)).x for i in range(4)]
        np.testing.assert_array_equal(*quiet)
        assert max(float(jnp.abs(quiet[0] - y).max()) for y in loud) > 0.1
    encoder, params, x = setup(layerdrop=1.0)
    dropped = encoder.apply({"params": params}, x, key=jax.random.key(0)).x
    np.testing.assert_array_equal(dropped, x)  # every block skipped


def test_drop_path_keeps_the_mean_and_grows_with_depth():
    encoder, params, x = setup(norm="pre", drop_path=0.5)
    rows = jnp.tile(x[:1], (512, 1, 1))
    out = encoder.apply({"params": params}, rows, key=jax.random.key(0), collect=True).layers
    np.testing.assert_allclose(out[0], jnp.broadcast_to(out[0][:1], out[0].shape), atol=1e-6)
    spread = [float(jnp.std(out[i] - out[i].mean(0))) for i in range(L)]
    assert spread[0] < 1e-5 < 0.1 < spread[1] < spread[2]


@pytest.mark.parametrize(
    ("device", "fsdp", "option", "kept"),
    [
        ("gpu", 1, "auto", "dots"),
        ("tpu", 1, "auto", "dots"),
        ("cpu", 1, "auto", "none"),
        ("tpu", 4, "auto", "dots"),
        ("gpu", 1, "none", "none"),
        ("gpu", 1, "full", "full"),
    ],
)
def test_what_is_kept_for_the_gradients_is_the_devices_choice(device, fsdp, option, kept):
    """By what the gradient of an encoder computes again: products of attention, with weights."""
    encoder, params, x = setup(remat=option)
    x = jnp.tile(x, (4, 1, 1))  # a row for each device

    def products(encoder):
        gradient = jax.grad(lambda p: jnp.sum(encoder.apply({"params": p}, x).x))
        return str(jax.make_jaxpr(gradient)(params)).count("dot_general")

    wanted = products(setup(remat=kept)[0])
    mesh = sharding.make_mesh(-1, fsdp).abstract_mesh
    named = jax.sharding.AbstractDevice(device_kind=device, num_cores=None, platform=device)
    with jax.sharding.use_abstract_mesh(mesh.update(abstract_device=named)):
        assert products(encoder) == wanted
    assert len({products(setup(remat=r)[0]) for r in ("none", "dots", "full")}) == 3


@pytest.mark.parametrize("by_taps", [False, True])
def test_a_native_convolution_sends_no_rows(by_taps):
    """On GPUs XLA would gather them. The choice of back end is not made here: this is a CPU."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(16, 31, 8)), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(9, 2, 12)), jnp.float32)
    gradient = jnp.asarray(rng.normal(size=(16, 23, 12)), jnp.float32)
    forward = functools.partial(layers._conv_natively, stride=1, groups=4)
    wanted, pull = jax.vjp(forward, x, kernel)
    mesh = sharding.make_mesh(4, 2)
    rows = jax.sharding.NamedSharding(mesh, sharding.BATCH)
    x, gradient = jax.device_put((x, gradient), rows)

    @jax.jit
    def both(x, kernel, gradient):
        backward = layers._conv_natively_backward(x, kernel, gradient, 1, 4, by_taps)
        return forward(x, kernel), *backward

    with jax.set_mesh(mesh):
        text = both.lower(x, kernel, gradient).compile().as_text()
        found = both(x, kernel, gradient)
    for one, two in zip(found, (wanted, *pull(jnp.asarray(gradient))), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-5)
    assert "all-reduce" in text and "all-gather" not in text


@pytest.mark.parametrize(("stride", "padding", "groups"), [(1, 4, 4), (2, 0, 1), (5, 3, 2)])
def test_conv_equals_xlas(stride, padding, groups):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 31, 8)), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(9, 8 // groups, 12)), jnp.float32)
    ours = convolve(x, kernel, stride=stride, padding=padding, groups=groups)
    xlas = jax.lax.conv_general_dilated(
        x,
        kernel,
        (stride,),
        [(padding, padding)],
        dimension_numbers=("NWC", "WIO", "NWC"),
        feature_group_count=groups,
    )
    np.testing.assert_allclose(ours, xlas, rtol=1e-4, atol=1e-4)


def test_relative_index_of_a_rectangle():
    index = relative_index((2, 3))
    assert index.shape == (7, 7) and index.max() == 3 * 5 + 2
    assert (index[0, 1:] == 15).all() and (index[1:, 0] == 16).all() and index[0, 0] == 17
    assert index[1, 1] == 1 * 5 + 2  # no offset
    assert index[1, 6] == 0 and index[6, 1] == 14  # the two corners


def test_positions_count_tokens_that_are_not_padding():
    valid = jnp.array([[1, 1, 1, 0, 0], [1, 0, 1, 1, 0]], bool)
    np.testing.assert_array_equal(token_positions(valid), [[2, 3, 4, 1, 1], [2, 1, 3, 4, 1]])


def test_regression_losses():
    d = jnp.array([[-3.0, -0.5, 0.0, 0.25, 2.0]])
    zero = jnp.zeros_like(d)
    assert float(regression(d, zero, 0.0)[0]) == pytest.approx(9 + 0.25 + 0.0625 + 4)
    wanted = (3 - 0.5) + 0.5**2 / 2 + 0.25**2 / 2 + (2 - 0.5)
    assert float(regression(d, zero, 1.0)[0]) == pytest.approx(wanted)


def test_padding_takes_no_part_in_the_norms_of_targets():
    rng = np.random.default_rng(0)
    short = jnp.asarray(rng.normal(size=(2, 5, 3)), jnp.float32)
    padded = jnp.concatenate([short, jnp.full((2, 2, 3), 99.0)], axis=1)
    valid = jnp.arange(7)[None] < jnp.array([[5], [5]])
    for names in (("instance",), ("layer", "instance")):
        alone = normaliser(names)(short)
        together = normaliser(names, valid)(padded)[:, :5]
        np.testing.assert_allclose(alone, together, rtol=1e-5, atol=1e-6)
