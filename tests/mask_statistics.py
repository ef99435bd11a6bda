"""Distributions of masks, ours against those recorded from the authors' code.

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
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data2vec_jax import masking

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
            length,
            prob=p.pop("mask_prob"),
            width=p.pop("mask_length"),
            masked=0.5,
            min_masks=p.pop("min_masks", 0),
        )
        dropout = p.pop("mask_dropout", 0.0)
        same, add_masks = p.pop("require_same_masks", True), p.pop("add_masks", False)
    elif kind in ("b1", "b2"):
        factory = masking.block_spans if kind == "b1" else masking.inverse_blocks
        sampler = factory(
            length if kind == "b1" else grid,
            ratio=p.pop("mask_prob"),
            adjust=p.pop("mask_prob_adjust", 0),
            width=p.pop("mask_length"),
            inverse=p.pop("inverse_mask", False),
            dropout=p.pop("mask_dropout", 0.0),
        )
        dropout, trim = 0.0, p.pop("require_same_masks", True)
    elif kind == "bert":
        sampler = masking.token_spans(
            length, prob=p.pop("mask_prob"), width=p.pop("mask_multiple_length", 1), masked=0.5
        )
        dropout = 0.0
        role = functools.partial(
            masking.bert_roles,
            keep_prob=p.pop("leave_unmasked_prob"),
            replace_prob=p.pop("random_token_prob"),
            exact=False,
        )
    elif kind == "beit":
        sampler = masking.blocks(
            grid,
            count=p.pop("num_masking_patches"),
            min_patches=p.pop("min_num_patches", 4),
            max_patches=p.pop("max_num_patches", None),
            min_aspect=p.pop("min_aspect", 0.3),
        )
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
            for i, (d, e) in enumerate(
                zip(np.ravel(np.abs(ours[name] - expected)), np.ravel(error), strict=True)
            ):
                results.append((f"{name}[{i}] se", d, max(ERRORS * e, 1e-7)))
    return results


def failures(results):
    return [f"{n}: {d:.3g} > {limit:.3g}" for n, d, limit in results if not d <= limit]


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
