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
import numpy as np
import pytest
import reference
import reference_v2
from recorded import (
    ACTIVATION,
    ELEMENT,
    FOLDER,
    GRADIENT,
    LENGTH,
    LOSS,
    NAMES,
    NORM,
    SCHEDULE,
    TRACE,
    Case,
    Comparison,
    line,
    load,
    quick_jit,
)  # fmt: skip

from data2vec_jax.convert import fairseq, tables
from data2vec_jax.core import optimizer
from data2vec_jax.core.state import overlay, restrict, select
from data2vec_jax.core.task import Task
from data2vec_jax.core.train_step import init_state, make_train_step
from data2vec_jax.metrics.statistics import mean_std
from data2vec_jax.modalities.speech.model import TimeNorm, frames
from data2vec_jax.models import layers, positions
from data2vec_jax.models.encoder import TargetSpec
from data2vec_jax.objectives import targets

NOISE = 1e-6  # share of the global norm below which a gradient counts as zero
# Parameters whose true gradient is zero (the last one: under a norm over time).
ZERO_GRADIENT = (".k_proj.bias",)
ZERO_UNDER_NORM = "feature_extractor.conv_layers.0.0.bias"


@pytest.mark.parametrize("name", NAMES)
def test_case(name, record_property):
    case = load(name)
    info = case.info
    if "data2vec-2.0" in info.get("generation", ""):
        run = reference_v2.run_v2
    elif "generation" in info:
        run = run_v1
    elif "sets" in info:
        run = run_masks
    elif "lr" in info and "ema" in info:
        run = run_schedules
    elif "params" in info:
        run = run_units
    else:
        pytest.fail(f"{name}: the json says nothing that the tests know")
    record_property("line", f"{name}: {line(run(case))}")  # printed at the end, see conftest


def test_there_are_cases():
    assert NAMES, f"no cases in {FOLDER}"
    assert {p.stem for p in FOLDER.glob("*.npz")} == set(NAMES)


# data2vec 1.0 -------------------------------------------------------------------------------------

# Modules whose inputs and outputs are stages, by path.
TRACED = {
    ("frontend", "norm"): "features_layernorm",
    ("frontend", "projection"): "features_proj",
    ("positions",): "student_pos_conv",
}


def run_v1(case: Case) -> dict[str, float]:
    setup, compare = reference.setup(case), Comparison(case)
    compare.skip("batch/", "student/", "teacher/")
    student = to_jax(tables.read(setup.student, case.part("student/")))
    owned = to_jax(tables.read(setup.teacher, case.part("teacher/")))
    teacher = select(owned, setup.config["averaged"])
    for path, theirs in tables.flatten(select(owned, setup.copied)).items():
        ours = tables.flatten(student)[path]
        np.testing.assert_array_equal(ours, theirs, err_msg=path)  # what is shared starts equal
    assert {*tables.flatten(owned)} == {
        *tables.flatten(teacher), *tables.flatten(select(owned, setup.copied))
    }  # fmt: skip
    check_parameters(setup, student)

    grads, (stages, seen) = quick_jit(jax.grad(forward(setup), has_aux=True))(student, teacher)
    check_stages(setup, compare, stages, seen)
    check_gradients(setup, compare, tables.write(setup.student, jax.device_get(grads)))
    train(setup, compare, student, owned)
    return compare.finish()


def to_jax(tree):
    return jax.tree.map(jnp.asarray, tree)


def check_parameters(setup, student) -> None:
    """Our model has the parameters of the case and no others."""
    wanted = jax.eval_shape(setup.model.init, jax.random.key(0), setup.batch)["params"]
    wanted = {path: x.shape for path, x in tables.flatten(wanted).items()}
    assert {path: x.shape for path, x in tables.flatten(student).items()} == wanted


def forward(setup):
    """(student, teacher) -> (mean loss, (stages, inputs and outputs of modules))."""
    most = int(setup.mask.sum(-1).max())

    def program(params, teacher):
        seen = {}

        def record(method, args, kwargs, context):
            out = method(*args, **kwargs)
            name = TRACED.get(context.module.path)
            if name and context.method_name == "__call__":
                seen.setdefault(name, []).append((args[0], out))  # first the student's
            return out

        with nn.intercept_methods(record):
            stages = setup.objective.forward_with_masks(
                params, teacher, setup.batch, setup.visible, setup.mask, most, None, collect=True
            )
        return stages.total / stages.count, (stages, seen)

    return program


def check_stages(setup, compare, stages, seen) -> None:
    objective, model, case = setup.config["objective"], setup.model, compare.case
    valid, rows = stages.tokens.valid, stages.weights > 0
    student, teacher = stages.student, stages.teacher

    def activation(stage, name, *passes):
        if f"fwd/{name}" in compare.left:
            recorded = case.arrays[f"fwd/{name}"]
            same = [x for x in map(np.asarray, passes) if x.shape == recorded.shape]
            nearest = min(same, key=lambda x: np.abs(x - recorded).max(), default=passes[0])
            compare.check(stage, f"fwd/{name}", nearest, ACTIVATION)

    # Against the README, stages of modules that the teacher owns were overwritten by its pass in
    # some cases: A1 to A3 have its positions (unmasked), A3 its features and layers too. So these
    # stages may be either's; the student's are in its predictions and gradients in any case.
    if "features_layernorm" in seen:
        convolved = [jnp.moveaxis(x, 1, 2) for x, _ in seen["features_layernorm"]]
        activation("features", "conv_features", *convolved)
        for name in ("features_layernorm", "features_proj"):
            activation("features", name, *(out for _, out in seen[name]))
        activation("positions", "student_pos_conv", *(out for _, out in seen["student_pos_conv"]))
    activation("features", "patch_embed", stages.tokens.x)
    padding = jnp.zeros(stages.tokens.x.shape[:2]) if valid is None else ~valid
    if "fwd/feature_padding_mask" in compare.left:
        compare.check("features", "fwd/feature_padding_mask", padding, 0.0)
    activation("layers", "student_layer_out", student.layers, teacher.layers)
    activation("layers", "student_blocks_out", student.layers)
    whole = (
        student.x
        if student.class_tokens is None
        else jnp.concatenate([student.class_tokens, student.x], 1)
    )
    activation("layers", "student_encoder_out", whole, teacher.x)

    chosen = TargetSpec(objective["top_k"], "", None).layers(model.encoder.depth)
    raw = teacher.ffn if objective["target"] == "ffn" else teacher.layers
    skip = 0 if student.class_tokens is None else student.class_tokens.shape[1]
    raw = raw[np.array(chosen), :, skip:]
    activation("targets", "target_layers_raw", raw)
    counted = None if model.padding == "reference" else valid
    norm = targets.normaliser(objective["layer_norms"], counted)
    activation("targets", "target_layers_normed", jnp.stack([norm(layer) for layer in raw]))
    activation("targets", "target_avg", teacher.targets)
    activation("targets", "target_full", stages.targets)
    activation("targets", "target", stages.masked_targets[rows])
    activation("prediction", "pred", stages.prediction[rows])

    unit = 1.0 if setup.sums else 1.0 / stages.count
    losses = {
        "loss": stages.total * unit,
        "loss_regression": stages.parts["regression"] * unit / setup.factor,
        "loss_main": stages.parts["regression"] * unit / setup.factor,
    }
    if setup.margin is not None:
        losses["variance_penalty"] = targets.variance_penalty(
            stages.prediction, stages.weights, setup.margin
        )
    for name, value in losses.items():
        if f"fwd/{name}" in compare.left:
            compare.check("loss", f"fwd/{name}", value, LOSS)
    if "fwd/sample_size" in compare.left:
        compare.check("loss", "fwd/sample_size", stages.count, 0.0)
    watched = targets.monitor(stages)
    activation("loss", "pred_var", watched["pred_std"])
    activation("loss", "target_var", watched["target_std"])


def is_zero(setup, name: str) -> bool:
    """Whether the true gradient of a parameter is zero."""
    over_time = setup.config["model"].get("frontend", {}).get("norm") == "group"
    return name.endswith(ZERO_GRADIENT) or (over_time and name.endswith(ZERO_UNDER_NORM))


def check_gradients(setup, compare, ours) -> None:
    theirs = compare.case.part("grad/")
    length = np.sqrt(sum(float(np.sum(np.square(g, dtype=np.float64))) for g in theirs.values()))
    for name, value in ours.items():
        if name not in theirs:  # no gradient at all
            compare.note("gradients", f"grad/{name}", float(np.abs(value).max()), 0.0)
        elif is_zero(setup, name):
            compare.theirs(f"grad/{name}")
            compare.note("zeros", f"grad/{name}", float(np.linalg.norm(value)) / length, NOISE)
        else:
            compare.check("gradients", f"grad/{name}", value, GRADIENT)


def replay(setup, student, owned, updates: int):
    """Yields the state after n = 0, 1, ... updates and the scalars of the next one.

    By the loop's own train step, with the recorded masks in place of drawn ones. owned: the state
    of their teacher, with what it copies.
    """
    most = int(setup.mask.sum(-1).max())
    tx, schedule = reference.make_optimizer(setup)

    def loss(params, teacher, batch, draw):
        stages = setup.objective.forward_with_masks(
            params, teacher, batch, setup.visible, setup.mask, most, None
        )
        return stages.total, stages.count, targets.monitor(stages)

    # Quirk: at a decay of 1 nothing is averaged, and what they copy stays behind as well. Then we
    # keep the copies like averages, and renew them below.
    averages = [float(setup.decay(n).complement) > 0.0 for n in range(updates + 1)]
    copied = () if all(averages) else setup.copied
    averaged = (*setup.config["averaged"], *copied)
    task = Task(
        shapes=(), shares=(), init=lambda key: student, loss=loss, data=lambda start: (),
        averaged=averaged,
    )  # fmt: skip
    step = quick_jit(make_train_step(task, tx, setup.decay, schedule))
    state = init_state(task, tx, jax.random.key(0)).replace(teacher=select(owned, averaged))
    for n in range(updates + 1):
        after, scalars = step(state, setup.batch)
        yield state, jax.device_get(scalars)
        if copied and n < updates:
            renewed = after.params if averages[n + 1] else state.teacher
            after = after.replace(teacher=overlay(after.teacher, select(renewed, copied)))
        state = after


def train(setup, compare, student, owned) -> None:
    """Losses, norms, rates, decays and weights of N updates."""
    case, scalars = compare.case, []
    updates = len(case.arrays["train/grad_norm"])
    for n, (state, step) in enumerate(replay(setup, student, owned, updates)):
        check_traces(setup, compare, states(setup, state, owned), n)
        scalars.append(step)  # of the last, only the loss: it is that of the final weights

    count = np.float32(setup.mask.sum())
    mean = np.array([s["loss"] for s in scalars])
    compare.check("losses", "train/loss", mean * count if setup.sums else mean, LOSS)
    for name, value in {
        "train/loss_per_sample": mean,
        "train/sample_size": np.full(updates + 1, count),
        "train/loss_regression": mean * count if setup.sums else mean,
        "train/weight_decay": np.full(updates + 1, setup.config["optim"]["weight_decay"]),
    }.items():
        if name in compare.left:
            compare.check("losses", name, value, LOSS)
    norms = np.array([s["grad_norm"] for s in scalars])
    compare.check("grad_norm", "train/grad_norm", norms[:updates], NORM)
    rates = np.array([s["learning_rate"] for s in scalars])
    compare.check("schedules", "train/lr", rates[: len(case.arrays["train/lr"])], SCHEDULE)
    decays = [float(setup.decay(0).value), *(s["ema_decay"] for s in scalars[:updates])]
    # Theirs for vision start with the first average, for the others with step 0.
    compare.check("schedules", "train/ema_decay", decays if setup.sums else decays[1:], SCHEDULE)
    check_final(setup, compare, states(setup, state, owned), float(np.sum(rates[:updates])))


def states(setup, state, owned) -> dict[str, dict[str, np.ndarray]]:
    """Student and teacher under their names; the teacher with what it shares."""
    params, teacher = jax.device_get((state.params, state.teacher))
    return {
        "student": tables.write(setup.student, params),
        "teacher": tables.write(setup.teacher, restrict(overlay(params, teacher), owned)),
    }


def check_traces(setup, compare, ours, n: int) -> None:
    for who, arrays in ours.items():
        for name in compare.case.part(f"trace/{who}/{n}/"):
            compare.check("traces", f"trace/{who}/{n}/{name}", arrays[name], TRACE)


def check_final(setup, compare, ours, moved: float) -> None:
    """moved: the sum of the learning rates, which no parameter without a gradient can exceed."""
    case = compare.case
    gradients, norm = case.part("grad/"), float(case.arrays["train/grad_norm"][0])
    for name in case.part("final_student/"):
        key, value = f"final_student/{name}", ours["student"][name]
        theirs = compare.theirs(key)
        difference = np.abs(value.astype(np.float64) - theirs)
        if is_zero(setup, name):  # Adam turns noise into steps
            compare.note("noise", key, float(difference.max()) / (moved or 1.0), 2.0)
            continue
        # So it does with single elements, which may end a step apart.
        noise = np.zeros(theirs.shape, bool)
        if name in gradients:
            gradient = np.abs(gradients[name])
            noise = (gradient > 0) & (gradient < 1e-7 * norm)
        difference = np.where(noise, np.maximum(difference - moved, 0.0), difference)
        size, length = np.abs(theirs).max() or 1.0, np.linalg.norm(theirs) or 1.0
        compare.note("weights", key, float(difference.max() / size), ELEMENT)
        share = float(np.linalg.norm(difference) / length)
        compare.note("weights", f"{key} (length)", share, LENGTH)
    for name in case.part("final_teacher/"):
        key = f"final_teacher/{name}"
        if is_zero(setup, name):
            compare.theirs(key)
        else:
            compare.check("teacher", key, ours["teacher"][name], TRACE)


# Masks, schedules, single operations --------------------------------------------------------------


def run_masks(case: Case) -> dict[str, float]:
    import test_masking

    compare = Comparison(case)
    for name in case.info["sets"]:
        compare.skip(f"{name}/")
        for statistic, distance, limit in test_masking.results_of(name, case.info, case.arrays):
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
            apart, slopes = module.apply({}, jnp.arange(length)[None], grid)
            compare.check("alibi", f"alibi/{name}", slopes[0][:, None, None] * apart, ACTIVATION)


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
        tx = optimizer.make_optimizer(
            optimizer.make_schedule(len(grads), kind="constant", peak=flags["lr"]),
            betas=flags.get("betas", (0.9, 0.999)), eps=flags.get("eps", 1e-8), eps_on=raw,
            weight_decay=flags.get("weight_decay", flags.get("wd")),
            clip=flags.get("clip_norm") or None,
        )  # fmt: skip
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
