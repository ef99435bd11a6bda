"""Runs a recorded case of data2vec 1.0: its first step stage by stage, then its training.

`reference` makes our model and objective of the case's flags; `reference_v2` runs cases of 2.0.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import reference
from recorded import (
    ACTIVATION,
    ELEMENT,
    GRADIENT,
    LENGTH,
    LOSS,
    NORM,
    SCHEDULE,
    TRACE,
    Case,
    Comparison,
    quick_jit,
)

from data2vec_jax.convert import tables
from data2vec_jax.core.state import overlay, restrict, select
from data2vec_jax.core.task import Task
from data2vec_jax.core.train_step import init_state, make_train_step
from data2vec_jax.models.encoder import TargetSpec
from data2vec_jax.objectives import targets

NOISE = 1e-6  # share of the global norm below which a gradient counts as zero
# Parameters whose true gradient is zero (the last one: under a norm over time).
ZERO_GRADIENT = (".k_proj.bias",)
ZERO_UNDER_NORM = "feature_extractor.conv_layers.0.0.bias"

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
        *tables.flatten(teacher),
        *tables.flatten(select(owned, setup.copied)),
    }
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
        shapes=(),
        shares=(),
        init=lambda key: student,
        loss=loss,
        data=lambda start: (),
        averaged=averaged,
    )
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
