"""Masks: the authors' distributions (goldens), exact counts, keys. Python -m pytest runs it alone.

The goldens are statistics of two runs, `a` and `b`, of about 2000 rows per generator. We draw four
times as many rows and compare them with `a`, at the limits of the goldens' README, except that a
retest distance is one draw of a random number and can be small by luck. So we also measure what
two samples of that size differ by, on our own rows, and allow for whichever is larger:

* histograms (total variation) and position frequencies (rms): twice the largest retest distance,
  of the goldens' one and the six between our own four samples of the size of `a`;
* largest difference of position frequencies: 1.5 times the largest retest distance;
* means, standard deviations, shares: 4 standard errors of the difference, measured on 40 groups of
  whole batches of ours, because the rows of a batch share their count (4.48: Student's t with 39
  degrees of freedom is as rarely beyond it as a normal variable beyond 4);
* extremes: how many rows of the other sample lie beyond, see `beyond`;
* where the standard deviation is 0, the counts must be equal.
"""

import functools
import itertools
import json
import math
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data2vec_jax import masking
from data2vec_jax.core import sharding
from data2vec_jax.core.errors import UserError
from data2vec_jax.masking.sampler import choose

HERE = pathlib.Path(__file__).parent
GOLDENS = pathlib.Path(os.environ.get("DATA2VEC_GOLDENS", HERE / "goldens/pretraining"))
SAMPLES, GROUPS, ERRORS = 4, 40, 4.48

# Flags of the authors' functions that we do not have, with the value at which they do nothing.
NEUTRAL = {
    "mask_type": "static",
    "mask_other": 0,
    "no_overlap": False,
    "min_space": None,  # Read only with no_overlap.
    "expand_adjcent": False,
    "non_overlapping": False,
    "mask_stdev": 0,
    "idc_select_ver": 1,
    "num_mask_ver": 2,
    "flexible_mask": False,
}


# Drawing as a golden set says ---------------------------------------------------------------------


def translate(params):
    """A set's parameters -> (draw, batch, lens, grid).

    draw: key -> masks bool [B, T], or for BERT roles int8 [B, T]; B rows of lengths `lens`.
    """
    p = dict(params)
    kind = p.pop("kind")
    batch = p.pop("B", 1)
    grid = tuple(p.pop("grid")) if "grid" in p else None
    length = p.pop("T", None) or p.pop("L", None) or math.prod(grid)
    assert p.pop("L", length) == length
    lens = np.array(p.pop("lens", [length] * batch))
    same, add_masks, role = False, False, None
    if kind == "cmi":
        sampler = masking.spans(
            length, prob=p.pop("mask_prob"), width=p.pop("mask_length"), masked=0.5,
            min_masks=p.pop("min_masks", 0),
        )  # fmt: skip
        dropout = p.pop("mask_dropout", 0.0)
        same, add_masks = p.pop("require_same_masks", True), p.pop("add_masks", False)
    elif kind in ("b1", "b2"):
        factory = masking.block_spans if kind == "b1" else masking.inverse_blocks
        sampler = factory(
            length if kind == "b1" else grid, ratio=p.pop("mask_prob"),
            adjust=p.pop("mask_prob_adjust", 0), width=p.pop("mask_length"),
            inverse=p.pop("inverse_mask", False), dropout=p.pop("mask_dropout", 0.0),
        )  # fmt: skip
        dropout, trim = 0.0, p.pop("require_same_masks", True)
    elif kind == "bert":
        sampler = masking.token_spans(
            length, prob=p.pop("mask_prob"), width=p.pop("mask_multiple_length", 1), masked=0.5
        )
        dropout = 0.0
        role = functools.partial(
            masking.bert_roles, keep_prob=p.pop("leave_unmasked_prob"),
            replace_prob=p.pop("random_token_prob"), exact=False,
        )  # fmt: skip
    elif kind == "beit":
        sampler = masking.blocks(
            grid, count=p.pop("num_masking_patches"), min_patches=p.pop("min_num_patches", 4),
            max_patches=p.pop("max_num_patches", None), min_aspect=p.pop("min_aspect", 0.3),
        )  # fmt: skip
        dropout = 0.0
    elif kind == "rand":
        sampler = masking.independent(length, ratio=p.pop("mask_ratio"))
        dropout = 0.0
    else:
        pytest.fail(f"kind {kind!r} is unknown")
    for flag, value in p.items():
        if flag not in NEUTRAL or NEUTRAL[flag] not in (None, value):
            pytest.fail(f"flag {flag}={value!r} is not implemented")

    def draw(key):
        keys = jax.random.split(key, (4, batch))
        masks = jax.vmap(sampler.propose)(keys[0], jnp.asarray(lens))
        if kind in ("b1", "b2") and trim:
            masks = jax.vmap(masking.equalise)(keys[1], masks, sampler.count(lens))
        if same:
            counts = masks.sum(-1)
            target = counts.max() if add_masks else counts.min()
            # None: the authors fill anywhere in the row, padding included.
            fill = functools.partial(masking.equalise, valid=None)
            masks = jax.vmap(fill, (0, 0, None))(keys[1], masks, target)
        if dropout:
            masks = jax.vmap(functools.partial(masking.drop, share=dropout))(keys[2], masks)
        return jax.vmap(role)(keys[3], masks) if role else masks

    return draw, batch, lens, grid


def draw_rows(draw, rows, batch, seed):
    """[SAMPLES, n, B, T]: samples of n whole batches, `rows` rows or a little more."""
    keys = jax.random.split(jax.random.key(seed), (SAMPLES, -(-rows // batch)))
    # Nearly all of the time is compilation; this level takes a third of the default's, and the
    # programs run once.
    level = {"xla_backend_optimization_level": 1}
    many = jax.jit(jax.vmap(draw)).lower(keys[0]).compile(compiler_options=level)
    return np.stack([np.asarray(many(k)) for k in keys])


# Statistics ---------------------------------------------------------------------------------------


def run_lengths(masks, bins):
    """Histogram [bins] of the lengths of masked runs of [N, T] (last bin: and above), runs [N]."""
    edges = np.diff(np.pad(masks.astype(np.int8), ((0, 0), (1, 1))), axis=1)
    row, start = np.nonzero(edges == 1)
    length = np.nonzero(edges == -1)[1] - start
    hist = np.bincount(np.minimum(length, bins - 1), minlength=bins)
    return hist, np.bincount(row, minlength=len(masks))


def mean_std(x):
    return np.array([np.mean(x), np.std(x)])


def statistics(rows, lens, grid):
    """The golden arrays of `rows` [n, B, T]: masks, or roles (then 1, `<mask>`, is masked)."""
    values = rows.reshape(-1, rows.shape[-1])
    masks = values == 1
    count = masks.sum(-1)
    fraction = count / np.tile(lens, len(rows))
    stats = {
        "fraction_mean": fraction.mean(),
        "fraction_std": fraction.std(),
        "fraction_minmax": np.array([fraction.min(), fraction.max()]),
        "count_hist": np.bincount(count, minlength=masks.shape[1] + 1),
        "position_freq": masks.mean(0),
    }
    if grid:
        high, wide = grid
        patches = masks.reshape(-1, high, wide)
        stats["run_length_hist_rows"], runs = run_lengths(patches.reshape(-1, wide), wide + 1)
        columns = patches.transpose(0, 2, 1).reshape(-1, high)
        stats["run_length_hist_cols"] = run_lengths(columns, high + 1)[0]
        stats["runs_per_gridrow_mean_std"] = mean_std(runs)
        left, above = patches[:, :, :-1], patches[:, :-1]
        stats["p_right_given_masked"] = (left & patches[:, :, 1:]).sum() / left.sum()
        stats["p_below_given_masked"] = (above & patches[:, 1:]).sum() / above.sum()
    else:
        stats["run_length_hist"], runs = run_lengths(masks, 81)
        stats["runs_per_row_mean_std"] = mean_std(runs)
    if values.dtype == np.int8:
        chosen = (values > 0).sum()
        stats["chosen_fraction_mean_std"] = mean_std((values > 0).mean(-1))
        stats["mask_of_chosen"] = masks.sum() / chosen
        stats["random_changed_of_chosen"] = (values == masking.REPLACE).sum() / chosen
        stats["kept_or_same_of_chosen"] = (values == masking.KEEP).sum() / chosen
        stats["touched_outside_chosen"] = 0
        stats["chosen_fraction"] = (values > 0).mean()
    return stats


def variation(p, q):
    size = max(len(p), len(q))
    p, q = (np.pad(x / x.sum(), (0, size - len(x))) for x in (p, q))
    return 0.5 * np.abs(p - q).sum()


def rms(p, q):
    return np.sqrt(np.mean((p - q) ** 2))


def largest(p, q):
    return np.abs(p - q).max()


def beyond(mine, theirs, mine_weight, their_weight, share):
    """Whether the lowest of two samples is implausibly low.

    If both come from one distribution, the k lowest values of all come from one and the same
    sample with probability (its share of all values)^k: k may not be beyond a chance of 1e-5.
    """
    if mine.min() < theirs.min():
        return share ** mine_weight[mine < theirs.min()].sum() < 1e-5
    return (1 - share) ** their_weight[theirs < mine.min()].sum() < 1e-5


def compare(reference, retest, rows, lens, grid, tied=1):
    """[(name, distance, limit)] of every statistic in `reference`, from `rows` [SAMPLES, n, B, T].

    retest: name -> the goldens' own retest distances. tied: rows of a batch that share a count.
    """
    flat = rows.reshape(-1, *rows.shape[2:])
    ours = statistics(flat, lens, grid)
    samples = [statistics(x, lens, grid) for x in rows]
    groups = [statistics(x, lens, grid) for x in np.array_split(flat, GROUPS)]
    fractions = flat.reshape(-1, rows.shape[-1]) == 1
    fractions = fractions.sum(-1) / np.tile(lens, len(flat))
    results = []

    def distance(name, measure, factor, retest_name):
        pairs = itertools.combinations(samples, 2)
        noise = max(measure(s[name], t[name]) for s, t in pairs)
        limit = factor * max(noise, retest.get(f"{name}_{retest_name}", 0.0))
        results.append((f"{name} {retest_name}", measure(ours[name], reference[name]), limit))

    exact = reference["fraction_std"] < 1e-9 and len(set(lens)) == 1
    for name, expected in reference.items():
        if name not in ours:
            pytest.fail(f"statistic {name} is unknown")
        if name.endswith("position_freq"):
            distance(name, rms, 2, "rms")
            distance(name, largest, 1.5, "maxabs")
        elif "_hist" in name:
            distance(name, variation, 2, "TV")
            if name == "count_hist":
                mine, theirs = np.flatnonzero(ours[name]), np.flatnonzero(expected)
                weights = ours[name][mine] / tied, expected[theirs] / tied
                share = SAMPLES / (SAMPLES + 1)
                low = beyond(mine, theirs, *weights, share)
                high = beyond(-mine, -theirs, *weights, share)
                results.append(("count_hist extremes", low + high, 0))
        elif name.endswith("minmax"):
            below = (fractions < expected[0] - 1e-9).sum() / tied
            above = (fractions > expected[1] + 1e-9).sum() / tied
            # As in `beyond`; the other direction is that of count_hist.
            limit = math.log(1e-5) / math.log(SAMPLES / (SAMPLES + 1))
            results.append((name, max(below, above), 0 if exact else limit))
        else:
            spread = np.var([g[name] for g in groups], axis=0, ddof=1)
            error = np.sqrt(spread * (1 / GROUPS + SAMPLES / GROUPS))
            for i, (d, e) in enumerate(zip(
                np.ravel(np.abs(ours[name] - expected)), np.ravel(error), strict=True
            )):  # fmt: skip
                results.append((f"{name}[{i}] se", d, max(ERRORS * e, 1e-7)))
    return results


def failures(results):
    return [f"{n}: {d:.3g} > {limit:.3g}" for n, d, limit in results if not d <= limit]


# Tests against the goldens ------------------------------------------------------------------------


@functools.cache
def goldens():
    """(json, arrays) of the case that holds distributions of masks."""
    for path in sorted(GOLDENS.glob("*.json")):
        if "sets" in (case := json.loads(path.read_text())):
            with np.load(path.with_suffix(".npz")) as arrays:
                return case, {name: arrays[name] for name in arrays.files}
    return {"sets": {}}, {}


def results_of(name, case, arrays):
    """[(statistic, distance, limit)] of one of the case's sets."""
    entry = case["sets"][name]
    draw, batch, lens, grid = translate(entry["params"])
    rows = draw_rows(draw, case["n_samples"], batch, seed=0)
    prefix = f"{name}/a/"
    found = {k[len(prefix) :]: v for k, v in arrays.items() if k.startswith(prefix)}
    single = {}  # Row of a batch -> its statistics.
    for key in [k for k in found if k.startswith("row") and "/" in k]:
        row, statistic = key.split("/")
        single.setdefault(int(row[3:]), {})[statistic] = found.pop(key)
    summary = entry.get("summary", {}).get("a", {})
    found |= {k: v for k, v in summary.items() if k not in ("count_min", "count_max")}
    retest = entry["retest_distance"]
    tied = batch if entry["params"].get("require_same_masks") and batch > 1 else 1
    results = compare(found, retest, rows, lens, grid, tied)
    for b, reference in single.items():
        own = {k.split(".")[1]: v for k, v in retest.items() if k.startswith(f"row{b}.")}
        part = compare(reference, own, rows[:, :, b : b + 1], lens[b : b + 1], grid)
        results += [(f"row{b} {n}", d, limit) for n, d, limit in part]
    return results


@pytest.mark.parametrize("name", goldens()[0]["sets"])
def test_distribution_is_the_authors(name, record_property):
    results = results_of(name, *goldens())
    record_property("results", [(n, float(d), float(limit)) for n, d, limit in results])
    assert not failures(results)


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
        "range": translate(dict(kind="bert", L=300, mask_prob=0.65, mask_multiple_length=10,
                                leave_unmasked_prob=0.0, random_token_prob=0.0))[0],
    }[wrong]  # fmt: skip
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
    seen = {bytes(np.asarray(m)) for m in jax.jit(jax.vmap(sampler.propose, (0, None)))(
        jax.random.split(jax.random.key(0), 1500), 77
    )}  # fmt: skip
    windows = set()
    for y, x in itertools.product(*map(range, grid)):
        mask = np.zeros(grid, bool)
        for i, j in itertools.product(range(width), repeat=2):
            mask[np.clip(y + i - width // 2, 0, grid[0] - 1),
                 np.clip(x + j - width // 2, 0, grid[1] - 1)] = True  # fmt: skip
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
