"""Masks: the comparison with the authors' distributions notices mistakes; exact counts, keys.

The recorded distributions themselves are a case of test_goldens_pretraining.
"""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mask_statistics import compare, draw_rows, failures, statistics, translate

from data2vec_jax import masking
from data2vec_jax.core import sharding
from data2vec_jax.core.errors import UserError
from data2vec_jax.masking.sampler import choose


def with_replacement(length, prob, width):
    """A wrong sampler: starts drawn with replacement."""
    number = int(prob * length / width)

    def draw(key):
        starts = jax.random.randint(key, (number,), 0, length - width)
        offset = jnp.arange(length) - starts[:, None]
        return ((offset >= 0) & (offset < width)).any(0)[None]

    return draw


@pytest.mark.parametrize("wrong", ["none", "width", "replacement", "range"])
def test_comparison_has_teeth(wrong):
    params = dict(kind="cmi", T=300, B=1, mask_prob=0.65, mask_length=10, require_same_masks=False)
    right, _, lens, _ = translate(params)
    reference = statistics(draw_rows(right, 2000, 1, seed=1)[0], lens, None)
    draw = {
        "none": right,
        "width": translate(params | {"mask_length": 11})[0],
        "replacement": with_replacement(300, 0.65, 10),
        "range": translate(
            dict(
                kind="bert",
                L=300,
                mask_prob=0.65,
                mask_multiple_length=10,
                leave_unmasked_prob=0.0,
                random_token_prob=0.0,
            )
        )[0],
    }[wrong]
    rows = draw_rows(draw, 2000, 1, seed=2) == 1
    assert bool(failures(compare(reference, {}, rows, lens, None))) == (wrong != "none")


@pytest.mark.parametrize("flag", [{"no_overlap": True}, {"mask_type": "normal"}, {"novel": 0}])
def test_flags_we_lack_are_named(flag):
    params = dict(kind="cmi", T=50, B=2, mask_prob=0.5, mask_length=5, **flag)
    with pytest.raises(pytest.fail.Exception, match=next(iter(flag))):
        translate(params)


# Samplers -----------------------------------------------------------------------------------------

ROWS = {
    "spans": lambda: masking.spans(120, prob=0.65, width=10, masked=0.45),
    "token_spans": lambda: masking.token_spans(120, prob=0.35, width=4, masked=0.3),
    "block_spans": lambda: masking.block_spans(120, ratio=0.5, adjust=0.05, width=4),
    "inverse_block_spans": lambda: masking.block_spans(
        120, ratio=0.5, adjust=0.05, width=5, inverse=True
    ),
    "independent": lambda: masking.independent(120, ratio=0.48),
}
GRIDS = {
    "inverse_blocks": lambda: masking.inverse_blocks((6, 10), ratio=0.8, adjust=0.07, width=3),
    "even_blocks": lambda: masking.inverse_blocks(
        (10, 6), ratio=0.6, adjust=0.1, width=2, inverse=False
    ),
    "blocks": lambda: masking.blocks((14, 10), count=80),
    "multiblock": lambda: masking.multiblock((10, 6), kept=0.4),
    "limited_blocks": lambda: masking.blocks((5, 16), count=40, min_patches=4, max_patches=12),
}


@pytest.mark.parametrize("kind", ROWS)
def test_rows_have_exact_counts_within_valid(kind):
    sampler = ROWS[kind]()
    valid = jnp.array([120, 119, 64, 37, 11, 10, 2, 1, 0])
    masks = masking.sample(sampler, jax.random.key(0), 3, jnp.arange(9), 4, valid)
    assert masks.shape == (9, 4, 120) and masks.dtype == bool
    for row, v in zip(masks, valid.tolist(), strict=True):
        assert row.sum(-1).tolist() == [sampler.count(v)] * 4
        assert not row[:, v:].any()
    assert isinstance(sampler.count(50), int)
    everything = jax.jit(sampler.count)(jnp.arange(121))
    assert everything.tolist() == [sampler.count(v) for v in range(121)]
    propose = jax.jit(jax.vmap(sampler.propose))
    proposals = propose(jax.random.split(jax.random.key(1), 9), valid)
    assert not (proposals & (jnp.arange(120) >= valid[:, None])).any()


@pytest.mark.parametrize("kind", GRIDS)
def test_grids_have_exact_counts(kind):
    sampler = GRIDS[kind]()
    assert sampler.length == math.prod(sampler.grid)
    masks = masking.sample(sampler, jax.random.key(0), 3, jnp.arange(50), 2)
    assert masks.shape == (50, 2, sampler.length)
    assert (masks.sum(-1) == sampler.count(sampler.length)).all()
    assert len({bytes(np.asarray(m)) for m in masks.reshape(-1, sampler.length)}) == 100
    with pytest.raises(ValueError, match="no padding"):
        masking.sample(sampler, jax.random.key(0), 3, jnp.arange(2), 2, jnp.array([8, 8]))


def test_counts_of_the_papers():
    def square(n, **o):
        return masking.inverse_blocks((n, n), width=3, **o).count(n * n)

    # Spec 4.4, 4.5, 4.7; the first is int(196 * (1 - 0.8)) = 39 kept, not 39.2 or 40.
    assert square(14, ratio=0.8, adjust=0.07) == 157
    assert square(14, ratio=0.75, adjust=0.1) == 147
    assert square(16, ratio=0.75, adjust=0.1) == 192
    assert masking.block_spans(499, ratio=0.5, adjust=0.05, width=5).count(499) == 249
    assert masking.independent(512, ratio=0.48).count(512) == 246
    assert masking.independent(512, ratio=0.5).count(512) == 256
    assert masking.blocks((14, 14), count=120).count(196) == 120
    assert masking.spans(499, prob=0.65, width=10, masked=0.45).count(499) == 224


@pytest.mark.parametrize("grid, width", [((7, 11), 2), ((11, 7), 3), ((7, 11), 4)])
def test_windows_are_the_authors_clamped_windows(grid, width):
    # One centre, so that the window is seen alone; drawn here as the authors do.
    adjust = (1.5 * width**2) / 77 - 0.01
    sampler = masking.inverse_blocks(grid, ratio=0.01, adjust=adjust, width=width, inverse=False)
    seen = {
        bytes(np.asarray(m))
        for m in jax.jit(jax.vmap(sampler.propose, (0, None)))(
            jax.random.split(jax.random.key(0), 1500), 77
        )
    }
    windows = set()
    for y, x in itertools.product(*map(range, grid)):
        mask = np.zeros(grid, bool)
        for i, j in itertools.product(range(width), repeat=2):
            mask[
                np.clip(y + i - width // 2, 0, grid[0] - 1),
                np.clip(x + j - width // 2, 0, grid[1] - 1),
            ] = True
        windows.add(mask.tobytes())
    assert seen == windows


def test_blocks_end_even_when_nothing_fits():
    # A grid of height 1: every rectangle is as high as the grid, so none is ever placed.
    sampler = masking.blocks((1, 40), count=20)
    assert not jax.jit(sampler.propose)(jax.random.key(0), 40).any()
    assert masking.sample(sampler, jax.random.key(0), 0, jnp.arange(3), 1).sum() == 60


def test_short_rows_have_one_spare_place_for_starts():
    # 6 spans of 10 in 13 frames: starts among {0, ..., 6}, so position 6 + 9 = 15 is cut at 13.
    sampler = masking.spans(20, prob=0.65, width=10, masked=0.5, min_masks=6)
    propose = jax.jit(jax.vmap(sampler.propose, (0, None)))
    masks = propose(jax.random.split(jax.random.key(0), 200), 13)
    assert masks[:, 1:13].all() and not masks[:, 13:].any()
    assert 10 < (~masks[:, 0]).sum() < 60  # 1 in 7 leaves out start 0.


# Keys ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["spans", "block_spans", "independent"])
def test_mask_belongs_to_its_example(kind):
    sampler, key = ROWS[kind](), jax.random.key(5)
    ids = jnp.array([7, 4_000_000_000, 9, 12], jnp.uint32)
    valid = jnp.array([100, 120, 90, 30])
    masks = masking.sample(sampler, key, 2, ids, 3, valid)
    again = masking.sample(sampler, key, 2, ids[::-1], 3, valid[::-1])[::-1]
    alone = masking.sample(sampler, key, 2, ids[1:2], 2)
    assert (masks == again).all()
    assert (masks[1, :2] == alone[0]).all()
    # Other clones, steps, examples and seeds have other masks.
    others = [
        masks[1, 0],
        masks[1, 1],
        masks[1, 2],
        masking.sample(sampler, key, 3, ids, 3, valid)[1, 0],
        masking.sample(sampler, key, 2, ids + 1, 3, valid)[1, 0],
        masking.sample(sampler, jax.random.key(6), 2, ids, 3, valid)[1, 0],
    ]
    assert len({bytes(np.asarray(m)) for m in others}) == len(others)


def test_mask_does_not_depend_on_the_devices():
    # As in training: rows and their lengths split over an ambient mesh. Blocks: test_step.py.
    sampler, key = ROWS["spans"](), jax.random.key(5)
    batch = {"ids": np.arange(16, dtype=np.uint32), "valid": np.arange(105, 121, dtype=np.int32)}
    alone = masking.sample(sampler, key, 2, batch["ids"], 2, batch["valid"])
    mesh = sharding.make_mesh(devices=jax.devices()[: math.gcd(len(jax.devices()), 16)])
    with jax.set_mesh(mesh):
        rows = sharding.to_global(batch, mesh)
        spread = masking.sample(sampler, key, 2, rows["ids"], 2, rows["valid"])
    assert len(spread.sharding.device_set) == mesh.size
    np.testing.assert_array_equal(jax.device_get(spread), jax.device_get(alone))


def test_no_recompilation():
    sampler, key = ROWS["spans"](), jax.random.key(0)
    draw = jax.jit(lambda step, ids, valid: masking.sample(sampler, key, step, ids, 2, valid))
    for step in range(4):
        draw(jnp.int32(step), jnp.arange(3) + step, jnp.array([120, 60, 30]) - step)
    assert draw._cache_size() == 1


# Pieces -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 3, 20, 41, 60])
def test_equalise(count):
    mask = jnp.zeros(100, bool).at[jnp.arange(20) * 3].set(True)
    for seed in range(20):
        new = masking.equalise(jax.random.key(seed), mask, count, 60)
        assert new.sum() == count and not new[60:].any()
        assert not ((new & ~mask).any() and (mask & ~new).any())
    assert masking.equalise(jax.random.key(0), mask, 90).sum() == 90


def test_equalise_is_uniform():
    mask = jnp.arange(16) < 10
    keys = jax.random.split(jax.random.key(0), 4000)
    equalise = jax.vmap(masking.equalise, (0, None, None))
    fewer, more = equalise(keys, mask, 4).mean(0), equalise(keys, mask, 13).mean(0)
    # 4.5 standard errors of a share of 4000.
    np.testing.assert_allclose(fewer[:10], 0.4, atol=4.5 * (0.24 / 4000) ** 0.5)
    np.testing.assert_allclose(more[10:], 0.5, atol=4.5 * (0.25 / 4000) ** 0.5)
    assert (fewer[10:] == 0).all() and (more[:10] == 1).all()


@pytest.mark.parametrize("share", [0.0, 0.1, 0.25, 0.5])
def test_drop(share):
    for masked in (0, 1, 2, 5, 10, 25, 45):
        mask = jnp.arange(64) < masked
        new = masking.drop(jax.random.key(masked), mask, share)
        assert new.sum() == masked - int(np.rint(masked * share))
        assert not (new & ~mask).any()


def test_bert_roles():
    mask = jnp.arange(200) % 2 == 0
    for seed in range(3):
        roles = masking.bert_roles(jax.random.key(seed), mask, 0.1, 0.15)
        assert roles.dtype == jnp.int8
        assert np.bincount(roles, minlength=4).tolist() == [100, 75, 15, 10]
        assert ((roles > 0) == mask).all()
    assert (masking.bert_roles(jax.random.key(0), mask, 0.0, 0.0) == mask).all()
    loose = masking.bert_roles(jax.random.key(0), jnp.ones(20_000, bool), 0.1, 0.2, exact=False)
    shares = np.bincount(loose, minlength=4) / 20_000
    np.testing.assert_allclose(shares, [0, 0.7, 0.2, 0.1], atol=0.015)


def test_positions():
    mask = jnp.array([[0, 1, 0, 1, 1], [0, 0, 0, 1, 0]], bool)
    assert masking.positions(mask, 3).tolist() == [[1, 3, 4], [3, 0, 0]]
    assert masking.kept(mask, 2).tolist() == [[0, 2], [0, 1]]
    assert masking.positions(mask[0], 2).dtype == jnp.int32
    with pytest.raises(ValueError):
        masking.positions(mask, 6)


def test_counts_are_exact_even_if_random_numbers_tie(monkeypatch):
    monkeypatch.setattr(jax.random, "bits", lambda key, shape, dtype: jnp.zeros(shape, dtype))
    among = jnp.arange(99) % 3 > 0
    assert [choose(None, n, among).sum().item() for n in (0, 1, 40, 66)] == [0, 1, 40, 66]


# Config -------------------------------------------------------------------------------------------


def test_make():
    assert masking.make("independent", (4, 8), ratio=0.5).length == 32
    assert masking.make("blocks", (4, 8), count=10).grid == (4, 8)
    assert masking.make("spans", 99, prob=0.65, width=10, masked=0.45).length == 99
    for message, arguments in {
        "did you mean 'spans'": ("span", 9, {}),
        "needs a grid": ("blocks", 196, dict(count=3)),
        "config.mask.widht: .*'width'": ("spans", 9, dict(prob=0.6, widht=1, masked=0.4)),
        "missing option 'masked'": ("spans", 9, dict(prob=0.6, width=1)),
        "config.mask.ratio: 1.5": ("independent", 9, dict(ratio=1.5)),
        "config.mask.count: 196": ("blocks", (14, 14), dict(count=196)),
    }.items():
        kind, size, options = arguments
        with pytest.raises(UserError, match=message):
            masking.make(kind, size, **options)
