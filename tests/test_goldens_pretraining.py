"""Every recorded case of the authors' code, stage by stage, against ours.

The folder is named by DATA2VEC_GOLDENS; its README says what each array is and what it may differ
by. A case is run by what its json says, never by its name; an array that nothing compares, a flag
that is unknown (see `reference`) or a case of no known kind fails.
"""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import mask_statistics
import numpy as np
import pytest
import reference
import reference_v2
import replay_v1
from recorded import (
    ACTIVATION,
    FOLDER,
    LOSS,
    NAMES,
    NORM,
    SCHEDULE,
    Case,
    Comparison,
    line,
    load,
)

from data2vec_jax.convert import fairseq, tables
from data2vec_jax.core import optimizer
from data2vec_jax.metrics.statistics import mean_std
from data2vec_jax.modalities.speech.frontend import TimeNorm, frames
from data2vec_jax.models import attention_tpu, layers, positions
from data2vec_jax.objectives import targets


@pytest.mark.parametrize("name", NAMES)
def test_case(name, record_property):
    case = load(name)
    info = case.info
    if "data2vec-2.0" in info.get("generation", ""):
        run = reference_v2.run_v2
    elif "generation" in info:
        run = replay_v1.run_v1
    elif "sets" in info:
        run = run_masks
    elif "lr" in info and "ema" in info:
        run = run_schedules
    elif "params" in info:
        run = run_units
    else:
        pytest.fail(f"{name}: the json says nothing that the tests know")
    record_property("line", f"{name}: {line(run(case))}")  # printed at the end, see conftest


NETWORKS = [name for name in NAMES if "generation" in load(name).info]


@pytest.mark.parametrize("name", NETWORKS)
def test_case_by_the_kernel_of_tpus(name, record_property, monkeypatch):
    """By the interpreter of Pallas."""
    kernel = functools.partial(attention_tpu.attend, interpret=True)
    monkeypatch.setattr(layers, "attend", kernel)
    test_case(name, lambda key, text: record_property(key, f"{text} (kernel)"))


def test_there_are_cases():
    assert NAMES, f"no cases in {FOLDER}"
    assert {p.stem for p in FOLDER.glob("*.npz")} == set(NAMES)


# Masks, schedules, single operations --------------------------------------------------------------


def run_masks(case: Case) -> dict[str, float]:
    compare = Comparison(case)
    for name in case.info["sets"]:
        compare.skip(f"{name}/")
        for statistic, distance, limit in mask_statistics.results_of(name, case.info, case.arrays):
            share = float(distance) / (float(limit) or 1.0)
            compare.note(name, f"{name} {statistic}, of the limit", share, 1.0 if limit else 0.0)
    return compare.finish()


def run_schedules(case: Case) -> dict[str, float]:
    compare, info = Comparison(case), case.info

    def check(kind, name, function, until=np.inf):
        key = f"{kind}/{name}"
        steps, values = compare.theirs(f"{key}/step"), compare.theirs(f"{key}/value")
        steps, values = steps[steps < until], values[steps < until]
        ours = np.array([function(int(n)) for n in steps], np.float64)
        # 1 + cos(x) loses digits towards the end of their cosine, even in float64.
        difference = np.maximum(np.abs(ours - values) - 2e-16 * values.max(), 0.0)
        error = difference / np.where(values == 0, 1.0, values)
        compare.note(kind, key, float(error.max()), SCHEDULE)
        return steps, values

    def check_decay(kind, name, decay):
        """The decay, and 1 - decay as it is in float64; returns the steps and our 1 - decay."""
        steps, values = check(kind, name, lambda n: decay(n).value)
        ours = np.array([decay(int(n)).complement for n in steps], np.float64)
        error = np.maximum(np.abs(ours - (1.0 - values)) - 4e-16, 0.0) / np.maximum(ours, 1e-30)
        compare.note(f"1 - {kind}", f"{kind}/{name}", float(error.max()), SCHEDULE)
        return steps, ours

    for name, section in info["ema"].items():
        decay = reference.fairseq_decay(*(section[flag] for flag in FAIRSEQ_EMA))
        steps, complements = check_decay("ema", name, decay)
        applied = compare.theirs(f"ema/{name}/ema_update_applied") == 1
        np.testing.assert_array_equal((steps > 0) & (complements > 0.0), applied)
    for name, section in info["lr"].items():
        total, schedule = reference.fairseq_schedule(section)
        # At its end their cosine starts anew, at a step that is never used.
        until = total if schedule["kind"] == "cosine" else np.inf
        check("lr", name, optimizer.make_schedule(total, **schedule), until)
    for name, section in info.get("ema_beit", {}).items():
        decay = reference.beit_decay(*(section[flag] for flag in BEIT_EMA))
        check_decay("ema_beit", name, lambda n, decay=decay: decay(n + 1))
    for name, section in info.get("lr_beit", {}).items():
        total, schedule = reference.beit_schedule(section)
        check("lr_beit", name, optimizer.make_schedule(total, **schedule))
    return compare.finish()


FAIRSEQ_EMA = ("ema_decay", "ema_end_decay", "ema_anneal_end_step")
BEIT_EMA = ("ema_decay_init", "ema_decay", "ema_start_at", "niter_per_ep")


def run_units(case: Case) -> dict[str, float]:
    compare = Comparison(case)
    for family, check in UNITS.items():
        if names := case.part(f"{family}/"):
            check(compare, names, case.info["params"])
    return compare.finish()


def numbers(pattern: str, name: str) -> list[str]:
    """The groups of a regular expression that must match the whole name."""
    match = re.fullmatch(pattern, name)
    return list(match.groups()) if match else []


def unit_layer_norm(compare, names, params):
    weights = {"scale": names["weight"], "bias": names["bias"]}
    compare.skip("layer_norm/x", "layer_norm/weight", "layer_norm/bias")
    for name in names:
        if found := numbers(r"y_(noaffine_)?(?:eps(.+)|reference_default)", name):
            plain, eps = found[0] or not found[1], float(found[1] or 1e-5)
            layer = layers.LayerNorm(eps, affine=not plain)
            ours = layer.apply({"params": {} if plain else weights}, names["x"])
            compare.check("layer_norm", f"layer_norm/{name}", ours, ACTIVATION)


def unit_over_time_norm(compare, names, params):
    compare.skip("over_time_norm/x_BTC")
    affine = compare.case.part("layer_norm/")
    weights = {"scale": affine["weight"], "bias": affine["bias"]}
    ways = {
        "instance_norm": targets.normaliser(("instance",)),
        "batch_norm": targets.normaliser(("batch",)),
        "group_norm_per_channel_affine": lambda x: TimeNorm().apply({"params": weights}, x),
    }
    for name, way in ways.items():
        if name in names:
            ours = way(names["x_BTC"])
            # Some channels hardly vary around a large mean; theirs differ by 2e-5 among themselves.
            compare.check("over_time_norm", f"over_time_norm/{name}", ours, 1e-4)


def unit_gelu(compare, names, params):
    compare.skip("gelu/x")
    x = jnp.asarray(names["x"])
    slope = jax.vmap(jax.grad(layers.gelu))(x)
    for name in names:
        if name.startswith("y") or name == "dy_dx":
            ours = slope if name == "dy_dx" else layers.gelu(x)
            compare.check("gelu", f"gelu/{name}", ours, ACTIVATION)


def unit_regression_loss(compare, names, params):
    compare.skip("regression_loss/diff")
    diff = jnp.asarray(names["diff"])

    def element(d, beta):
        return targets.regression(d[None], jnp.zeros(1), beta)

    for name in names:
        if found := numbers(r"(?:smooth_l1_beta(.+?)|mse)(_grad)?", name):
            loss = functools.partial(element, beta=float(found[0] or 0))
            ours = jax.vmap(jax.grad(loss) if found[1] else loss)(diff)
            compare.check("regression_loss", f"regression_loss/{name}", ours, ACTIVATION)


def unit_alibi(compare, names, params):
    for name in names:
        if found := numbers(r"(1d|2d_(manhattan|euclidean))_H(\d+)_[TN](\d+)", name):
            kind, distance, heads, length = found[0], found[1], int(found[2]), int(found[3])
            side = int(np.sqrt(length))
            module = positions.Alibi(
                layers=1, heads=heads, learned=False, distance=distance or "manhattan"
            )
            grid = None if kind == "1d" else (side, side)
            bias = module.apply({}, jnp.arange(length)[None], grid)
            ours = bias.slopes[0][:, None, None] * bias.distances()
            compare.check("alibi", f"alibi/{name}", ours, ACTIVATION)


def unit_sincos2d(compare, names, params):
    for name in names:
        if found := numbers(r"D(\d+)_grid(\d+)", name):
            width, side = map(int, found)
            ours = positions.sincos((side, side), width)
            compare.check("sincos", f"sincos2d/{name}", ours, ACTIVATION)


def unit_relative_position_index(compare, names, params):
    for name in names:
        if found := numbers(r"(\d+)x(\d+)", name):
            ours = positions.relative_index(tuple(map(int, found)))
            compare.check("relative_index", f"relative_position_index/{name}", ours, 0.0)


def unit_positions(compare, names, params):
    compare.skip("positions/tokens")
    for name in names:
        if found := numbers(r"position_ids_pad(\d+)", name):
            pad = int(found[0])
            ours = positions.token_positions(jnp.asarray(names["tokens"] != pad), pad)
            compare.check("positions", f"positions/{name}", ours, 0.0)


def unit_conv_lengths(compare, names, params):
    for i, spec in enumerate(params["conv_specs"]):
        samples = compare.theirs(f"conv_lengths/{i}/samples")
        ours = frames(samples, reference.conv_stack(spec))
        compare.check("conv_lengths", f"conv_lengths/{i}/frames", ours, 0.0)


def unit_pos_conv(compare, names, params):
    for which in sorted({name.split("/")[0] for name in names}):
        part = {n: compare.theirs(f"pos_conv/{which}/{n}") for n in ("x_BCT", "weight", "bias")}
        x = jnp.moveaxis(part["x_BCT"], 1, 2)
        weights = {"kernel": jnp.transpose(part["weight"], (2, 1, 0)), "bias": part["bias"]}
        taps, per_group, channels = weights["kernel"].shape
        stack = positions.ConvPositions(depth=1, width=taps, groups=channels // per_group)
        seen = {}

        def record(method, args, kwargs, context, seen=seen):
            seen[context.module.name] = out = method(*args, **kwargs)
            return out

        with nn.intercept_methods(record):
            ours = stack.apply({"params": {"conv0": weights}}, x)
        for name, value in (("conv_same", seen["conv0"]), ("conv_same_ln_gelu", ours)):
            value = jnp.moveaxis(value[:, : x.shape[1]], 1, 2)
            compare.check("pos_conv", f"pos_conv/{which}/{name}", value, ACTIVATION)


def unit_weight_norm_pos_conv(compare, names, params):
    compare.skip("weight_norm_pos_conv/0.", "weight_norm_pos_conv/x_BCT")
    state = {name: value for name, value in names.items() if name.startswith("0.")}
    weights = tables.read(tables.inside(fairseq.SPEECH, "encoder.pos_conv."), state)["positions"]
    taps, per_group, channels = weights["conv"]["kernel"].shape
    stack = positions.ConvPositions(1, taps, channels // per_group, norm="weight")
    ours = stack.apply({"params": weights}, jnp.moveaxis(names["x_BCT"], 1, 2))
    name = "weight_norm_pos_conv/y_BCT"
    compare.check("pos_conv", name, jnp.moveaxis(ours, 1, 2), ACTIVATION)


def unit_adam(compare, names, params):
    for which in sorted({name.split("/")[0] for name in names}):
        key = f"adam/{which}"
        p, grads = compare.theirs(f"{key}/p0"), compare.theirs(f"{key}/grads")
        if fairseq_flags := params["optim"].get(which):
            flags, raw = fairseq_flags, "raw"
        else:
            flags, raw = params["adamw"], "corrected"
        config = optimizer.OptimizerConfig(
            betas=flags.get("betas", (0.9, 0.999)),
            eps=flags.get("eps", 1e-8),
            eps_on=raw,
            weight_decay=flags.get("weight_decay", flags.get("wd")),
            clip=flags.get("clip_norm") or None,
        )
        schedule = optimizer.make_schedule(len(grads), kind="constant", peak=flags["lr"])
        tx = optimizer.make_optimizer(schedule, config)
        p, state, after, norms = jnp.asarray(p), None, [], []
        state = tx.init(p)
        for grad in grads:
            updates, state = tx.update(jnp.asarray(grad), state, p)
            p = p + updates
            after.append(p)
            norms.append(jnp.linalg.norm(grad))
        compare.check("adam", f"{key}/params_after", np.stack(after), LOSS)
        if f"{key}/grad_norm" in compare.left:
            compare.check("adam", f"{key}/grad_norm", norms, NORM)


def unit_collapse_metric(compare, names, params):
    compare.skip("collapse_metric/y")
    ours = mean_std(jnp.asarray(names["y"]))
    compare.check("collapse_metric", "collapse_metric/value", ours, LOSS)


UNITS = {
    name.removeprefix("unit_"): function
    for name, function in list(globals().items())
    if name.startswith("unit_")
}
