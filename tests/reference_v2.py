"""Recorded cases of the authors' data2vec 2.0: translated, replayed and compared stage by stage.

As `reference` does for 1.0: every flag is translated here or must have the value at which it does
nothing (`NEUTRAL`), or else the test fails and names it. Quirks are values of our options.

B examples, M masks of each, T tokens, V of them visible, E class tokens, D width.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
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
from reference import ANY, Flags

from data2vec_jax.convert import fairseq_v2, tables
from data2vec_jax.core import state
from data2vec_jax.core.task import Task
from data2vec_jax.core.train_step import init_state, make_train_step
from data2vec_jax.models.decoder import fill
from data2vec_jax.models.encoder import TargetSpec
from data2vec_jax.models.layers import repeat
from data2vec_jax.models.positions import sincos
from data2vec_jax.objectives import targets

NEUTRAL = {
    "model": dict(
        _name=ANY,
        modalities=ANY,
        supported_modality=ANY,
        seed=ANY,
        max_update=ANY,
        activation_dropout=0,
        attention_dropout=0,
        dropout_input=0,
        encoder_dropout=0,
        post_mlp_drop=0,
        layerdrop=0,
        start_drop_path_rate=0,
        end_drop_path_rate=0,
        norm_affine=True,
        # The feed-forward part overwrites its own residual there, which nobody means to do.
        layer_norm_first=False,
        # How weights start, and what is watched.
        mae_init=ANY,
        log_norms=ANY,
        min_pred_var=ANY,
        min_target_var=ANY,
        # A group of the optimiser with the same settings; averages are float32 in any case.
        decoder_group=ANY,
        ema_same_dtype=ANY,
        shared_decoder=None,
        recon_loss=0,
        skip_ema=False,
    ),
    "modality_cfg": dict(
        type=ANY,
        model_depth=ANY,
        prenet_layerdrop=0,
        prenet_dropout=0,
        start_drop_path_rate=0,
        end_drop_path_rate=0,
        dropout=0,
        mask_channel_prob=0,
        mask_channel_length=ANY,
        init_extra_token_zero=ANY,
        keep_masked_pct=0,
        # Masks and noise are recorded; these would only matter to who draws them anew.
        mask_noise_std=ANY,
        mask_prob_min=ANY,
        add_masks=ANY,
        remove_masks=ANY,
        encoder_zero_mask=True,
        learned_alibi=False,
        layernorm_embedding=True,
        learned_pos=True,
        alibi_max_pos=ANY,  # read with learned_alibi only
        no_token_positional_embeddings=False,
        transformer_decoder=False,
        enc_dec_transformer=False,
    ),
    "decoder": dict(input_dropout=0, add_positions_all=False),
    "optimizer": dict(composite=ANY),  # groups with the same settings
    "extra": dict(bos_idx=ANY, eos_idx=ANY, unk_idx=ANY, pad_idx=1, ema_copied_not_averaged=ANY),
}
KEYS = "qkv.bias"  # the middle third are biases of keys, whose true gradient is zero
NOISE = 1e-6  # share of the global norm below which a gradient counts as zero


@dataclasses.dataclass(frozen=True)
class Setup:
    """What a case is in our terms.

    config: sections as in configs/. batch: what both see. mask: bool [B, M, T]. noise: [B * M, T,
    D]. most: masked positions of a row. table, teacher: of the states. mode: their name of the
    modality. prenet: of the blocks, the number of prenet ones. shared: of the blocks, how many the
    teacher takes from the student. decay: of the average after update n. scaled: path of the
    parameters whose gradient is multiplied, and the factor.
    """

    config: dict[str, Any]
    model: Any
    objective: Any
    batch: dict[str, jnp.ndarray]
    mask: jnp.ndarray
    noise: jnp.ndarray
    most: int
    table: tables.Table
    teacher: tables.Table
    mode: str
    prenet: int
    shared: int
    decay: Callable[[Any], Any]
    scaled: tuple[str, float]

    def given(self, params: Any, teacher: Any, collect: bool = False) -> targets.Intermediates:
        """The objective with the recorded draws."""
        return self.objective.forward_with_masks(
            self.scale_gradient(params),
            self.share(params, teacher),
            self.batch,
            self.mask,
            self.most,
            self.noise,
            None,
            collect=collect,
        )

    def scale_gradient(self, params: Any) -> Any:
        """`local_grad_mult`: the gradient of the front end's parameters, multiplied."""
        part, factor = self.scaled
        if factor == 1.0:
            return params
        fixed = jax.lax.stop_gradient(params[part])
        own = jax.tree.map(lambda p, f: factor * p + (1 - factor) * f, params[part], fixed)
        return params | {part: own}

    def share(self, params: Any, teacher: Any) -> Any:
        """Quirk: a teacher that is a list of main blocks has the student's prenet blocks.

        No recipe has both, so in our model a stack of blocks is averaged as a whole. The lower
        layers of the average are then replaced here.
        """
        if not self.shared:
            return teacher
        blocks = jax.tree.map(
            lambda own, mean: jnp.concatenate([own[: self.shared], mean[self.shared :]]),
            params["encoder"]["blocks"],
            teacher["encoder"]["blocks"],
        )
        return teacher | {"encoder": teacher["encoder"] | {"blocks": blocks}}


MODES = {"audio": "AUDIO", "image": "IMAGE", "text": "TEXT"}


def setup(case: Case) -> Setup:
    """fairseq's data2vec_multi, with one modality."""
    flags = Flags(case.info, NEUTRAL)
    kind = {"audio": "speech", "image": "vision", "text": "text"}.get(case.info["modality"])
    if kind is None:
        pytest.fail(f"modality {case.info['modality']!r} is unknown to the tests")

    def model(name, default):
        return flags.take("model", name, default)

    def modality(name, default):
        return flags.take("modality_cfg", name, default)

    width, heads, depth = model("embed_dim", 768), model("num_heads", 12), model("depth", 8)
    part = PARTS[kind](case, flags, width)
    prenet, extra = modality("prenet_depth", 4), modality("num_extra_tokens", 0)
    if kind != "vision" and extra:
        pytest.fail(f"flag modality_cfg.num_extra_tokens={extra}: only images have class tokens")
    if kind == "text" and prenet:
        part["model"]["input_norm"] = True
    clones = model("clone_batch", 1)

    blocks_only = model("ema_encoder_only", True)
    own_front = modality("ema_local_encoder", False) and not blocks_only
    front = {"speech": "frontend", "vision": "patches", "text": "embeddings"}[kind]
    others = "decoder/|head/" + ("" if own_front else f"|{front}/")
    averaged = ("^encoder/",) if blocks_only else (f"^(?!{others})",)

    masked = case.arrays["batch/mask"] == 1
    rows = len(masked)
    weight = model("d2v_loss", 1)
    if weight <= 0:
        pytest.fail(f"flag model.d2v_loss={weight}: without it there is no data2vec")
    scale, beta = model("loss_scale", None), model("loss_beta", 0)
    reference.check_loss_kind("extra", flags, beta)
    config = dict(
        modality=kind,
        averaged=averaged,
        model=dict(
            width=width,
            encoder=dict(
                depth=prenet + depth,
                heads=heads,
                mlp=int(width * model("mlp_ratio", 4)),
                norm="post",
                eps=model("norm_eps", 1e-6),
                initializer="bert",
            ),
            alibi=alibi(case, flags, heads),
            **decoder(case, flags),
            **part["model"],
        ),
        mask=mask(flags, kind),
        objective=dict(
            name="data2vec2",
            clones=clones,
            beta=beta,
            noise_std=0.01,
            top_k=min(model("average_top_k_layers", 8), depth),
            target="block" if model("end_of_block_targets", False) else "ffn",
            scale=weight * (width**-0.5 if scale is None else scale),
            # Quirk: cls_loss multiplies a sum over rows, which nothing divides by their number.
            class_weight=model("cls_loss", 0) * rows / weight,
            **reference.fairseq_norms(flags),
        ),
        **reference.fairseq_optimizer(flags),
    )
    if kind == "vision":
        config["model"]["class_tokens"] = extra
    gradient = max(modality("local_grad_mult", 1.0), 0.0)
    if gradient == 0:  # no gradient, so no update and no decay either
        inside = r"(conv\d|norm\d|time_norm)" if kind == "speech" else ""
        config["optim"]["frozen"] = (f"^{front}/{inside}",)
    if kind == "speech":  # ours, where it is theirs: at the end of the convolutions
        config["model"]["frontend"]["gradient"], gradient = gradient, 1.0
    decay = reference.fairseq_ema(case, flags)
    built = reference.build(config, flags, part["batch"])
    return Setup(
        **built,
        mask=jnp.asarray(masked.reshape(-1, clones, masked.shape[-1])),
        noise=jnp.asarray(case.arrays["batch/decoder_noise"]) + part.get("noise", 0.0),
        most=int(masked.sum(-1).max()),
        table=part["table"],
        teacher=fairseq_v2.TEACHER_BLOCKS if blocks_only else part["table"],
        mode=MODES[case.info["modality"]],
        prenet=prenet,
        shared=prenet if blocks_only else 0,
        decay=decay,
        scaled=(front, gradient),
    )


def alibi(case: Case, flags: Flags, heads: int) -> dict[str, Any] | None:
    """Section `model.alibi`."""

    def modality(name, default):
        return flags.take("modality_cfg", name, default)

    options = dict(
        scale=modality("alibi_scale", 1.0),
        learned=modality("learned_alibi_scale", False),
        per_head=modality("learned_alibi_scale_per_head", False),
        per_layer=modality("learned_alibi_scale_per_layer", False),
        distance=modality("alibi_distance", "manhattan"),
    )
    natural = 2 if case.info["modality"] == "image" else 1
    biased, axes = modality("num_alibi_heads", heads), modality("alibi_dims", natural)
    if not modality("use_alibi_encoder", False):
        return None
    if biased != heads:
        pytest.fail(f"flag modality_cfg.num_alibi_heads={biased}, and there are {heads} heads")
    if axes != natural:
        pytest.fail(f"flag modality_cfg.alibi_dims={axes} is not implemented")
    # Quirk: a scale that is not learned is a tensor all the same, and never below 0.
    return options if options["learned"] else options | {"scale": max(options["scale"], 0.0)}


def is_deep(case: Case) -> bool:
    """Whether the decoder ends in several linear layers (for images it never does)."""
    return any(".decoder.proj.0." in name for name in case.arrays)


def decoder(case: Case, flags: Flags) -> dict[str, Any]:
    """Sections `model.decoder` and `model.head`."""

    def option(name, default):
        return flags.take("decoder", name, default)

    width, ratio = option("decoder_dim", 384), option("projection_ratio", 2.0)
    depth = option("projection_layers", 1)
    return dict(
        decoder=dict(
            layers=option("decoder_layers", 5),
            width=width,
            kernel=option("decoder_kernel", 5),
            groups=option("decoder_groups", 16),
            residual=option("decoder_residual", True),
        ),
        head=dict(
            depth=depth if is_deep(case) else 1, hidden=int(width * ratio), initializer="torch"
        ),
    )


def mask(flags: Flags, kind: str) -> dict[str, Any]:
    """Section `mask`; what is drawn from it is not used, as the masks are recorded."""

    def modality(name, default):
        return flags.take("modality_cfg", name, default)

    ratio, adjust = modality("mask_prob", 0.7), modality("mask_prob_adjust", 0)
    width, inverse = modality("mask_length", 5), modality("inverse_mask", False)
    dropout = modality("mask_dropout", 0)
    if width == 1 or kind == "vision":  # recorded grids may be too small for a kept square
        return dict(kind="independent", ratio=ratio)
    return dict(
        kind="block_spans",
        ratio=ratio,
        adjust=adjust,
        width=width,
        inverse=inverse,
        dropout=dropout,
    )


# The modalities: their sections of `model`, batch, table, and what is added to the noise ----------


def speech(case: Case, flags: Flags, width: int) -> dict[str, Any]:
    def modality(name, default):
        return flags.take("modality_cfg", name, default)

    default = "[(512, 10, 5)] + [(512, 3, 2)] * 4 + [(512,2,2)] + [(512,2,2)]"
    extractor = modality("extractor_mode", "layer_norm")
    if extractor not in ("default", "layer_norm"):
        pytest.fail(f"flag modality_cfg.extractor_mode={extractor!r} is unknown to the tests")
    input_norm = modality("conv_pos_pre_ln", False)
    if flags.take("decoder", "add_positions_masked", False):
        pytest.fail("flag decoder.add_positions_masked: there are no fixed positions")
    batch = {"audio": jnp.asarray(case.arrays["batch/source"])}
    padding = case.arrays.get("batch/padding_mask")
    if padding is not None and padding.any():
        batch["length"] = jnp.asarray((padding == 0).sum(-1))
    return dict(
        model=dict(
            padding="attention",
            frontend=dict(
                convs=reference.conv_stack(modality("feature_encoder_spec", default)),
                norm="layer" if extractor == "layer_norm" else "group",
            ),
            positions=dict(
                depth=modality("conv_pos_depth", 5),
                width=modality("conv_pos_width", 95),
                groups=modality("conv_pos_groups", 16),
                input_norm=input_norm,
            ),
        ),
        batch=batch,
        table=fairseq_v2.speech(is_deep(case), input_norm),
    )


def vision(case: Case, flags: Flags, width: int) -> dict[str, Any]:
    def modality(name, default):
        return flags.take("modality_cfg", name, default)

    image, patch = modality("input_size", 224), modality("patch_size", 16)
    grid = (image // patch, image // patch)
    fixed = modality("fixed_positions", True)
    if modality("in_chans", 3) != case.arrays["batch/image"].shape[1]:
        pytest.fail("flag modality_cfg.in_chans: the images have other channels")
    inner = modality("embed_dim", width)
    inner = None if inner == width else inner
    noise = 0.0
    if flags.take("decoder", "add_positions_masked", False):  # where the noise is: a part of it
        noise = np.where(case.arrays["batch/mask"][..., None] == 1, sincos(grid, width), 0)
    return dict(
        model=dict(
            image=image,
            patch=patch,
            patch_width=inner,
            sincos=fixed,
            shared_relative=False,
            initializer="bert",
        ),
        batch={"image": jnp.asarray(case.arrays["batch/image"].transpose(0, 2, 3, 1))},
        table=fairseq_v2.vision(is_deep(case), inner is not None),
        noise=noise,
    )


def text(case: Case, flags: Flags, width: int) -> dict[str, Any]:
    def modality(name, default):
        return flags.take("modality_cfg", name, default)

    tokens, size = case.arrays["batch/src_tokens"], flags.take("extra", "vocab_size")
    if flags.take("extra", "mask_idx", size - 1) != size - 1:
        pytest.fail("flag extra.mask_idx: ours is the last of the vocabulary")
    if flags.take("decoder", "add_positions_masked", False):
        pytest.fail("flag decoder.add_positions_masked: there are no fixed positions")
    padding = case.arrays.get("batch/padding_mask", np.zeros_like(tokens))
    np.testing.assert_array_equal(padding == 1, tokens == 1)
    return dict(
        model=dict(
            padding="attention",
            vocab_size=size,
            max_length=modality("max_source_positions", 512),
            scale=not modality("no_scale_embedding", True),
        ),
        batch={"tokens": jnp.asarray(tokens)},
        table=fairseq_v2.text(is_deep(case)),
    )


PARTS = {"speech": speech, "vision": vision, "text": text}


# States -------------------------------------------------------------------------------------------


def read(setup: Setup, table: tables.Table, arrays: Mapping[str, np.ndarray]) -> Any:
    """Their arrays -> our tree."""
    arrays, _ = fairseq_v2.joined(arrays)
    if setup.config["model"]["alibi"] and not setup.config["model"]["alibi"]["learned"]:
        name = f"modality_encoders.{setup.mode}.alibi_scale"  # a constant of ours
        constant = arrays.pop(name, np.float32(setup.config["model"]["alibi"]["scale"]))
        np.testing.assert_allclose(
            np.maximum(constant, 0), setup.config["model"]["alibi"]["scale"], rtol=1e-6
        )
    return jax.tree.map(jnp.asarray, tables.read(table, arrays))


def write(setup: Setup, tree: Any) -> dict[str, np.ndarray]:
    """Our tree -> their arrays."""
    return fairseq_v2.parted(tables.write(setup.table, tree), setup.prenet, setup.mode)


def read_teacher(setup: Setup, student: Any, arrays: Mapping[str, np.ndarray]) -> Any:
    """The averaged leaves of the first teacher; what it shares must equal the student's."""
    owned = read(setup, setup.teacher, arrays)
    if setup.shared:  # a list of the main blocks; the prenet blocks are the student's
        owned = {
            "encoder": {
                "blocks": jax.tree.map(
                    lambda own, main: jnp.concatenate([own[: setup.shared], main]),
                    student["encoder"]["blocks"],
                    owned["encoder"]["blocks"],
                )
            }
        }
    teacher = state.select(owned, setup.config["averaged"])
    flat = tables.flatten(state.overlay(state.restrict(student, owned), teacher))
    for path, theirs in tables.flatten(owned).items():
        np.testing.assert_array_equal(flat[path], theirs, err_msg=path)
    missing = set(tables.flatten(state.select(student, setup.config["averaged"]))) - set(flat)
    assert not missing, f"the recorded teacher lacks {missing}"
    return teacher


def write_teacher(setup: Setup, params: Any, teacher: Any) -> dict[str, np.ndarray]:
    """Everything that the teacher uses under its recorded names."""
    if setup.teacher is not fairseq_v2.TEACHER_BLOCKS:
        return write(setup, state.overlay(params, teacher))
    return {
        name.removeprefix("blocks."): array
        for name, array in write(setup, state.overlay(params, teacher)).items()
        if name.startswith("blocks.")
    }


# The run ------------------------------------------------------------------------------------------

# Modules whose first input or output is a stage: path -> (its input, its output).
TRACED = {("positions",): (None, "relative_positions"), ("encoder",): ("blocks_in", None)}


def run_v2(case: Case) -> dict[str, float]:
    """Fails if anything differs; the worst relative error of each stage."""
    setup_, compare = setup(case), Comparison(case)
    compare.skip("batch/", "student/", "teacher/")
    student = read(setup_, setup_.table, case.part("student/"))
    check_parameters(setup_, student)
    check_constants(setup_, compare)
    teacher = read_teacher(setup_, student, case.part("teacher/"))

    program = quick_jit(forward_and_gradients(setup_))
    stages, seen, derived, grads = jax.device_get(program(student, teacher))
    check_stages(setup_, compare, stages, seen, derived)
    check_gradients(setup_, compare, write(setup_, grads))
    train(setup_, compare, student, teacher)
    return compare.finish()


def check_parameters(setup: Setup, student: Any) -> None:
    """Our model has the parameters of the case and no others."""
    wanted = jax.eval_shape(setup.model.init, jax.random.key(0), setup.batch)["params"]
    wanted = {path: x.shape for path, x in tables.flatten(wanted).items()}
    assert {path: x.shape for path, x in tables.flatten(student).items()} == wanted


def check_constants(setup: Setup, compare) -> None:
    """What is saved but never learned: sin-cos positions, a fixed scale of ALiBi (see `read`)."""
    frozen = set(compare.case.info.get("frozen_params", ()))
    for name in frozen:
        if name.endswith("fixed_positional_encoder.positions"):
            ours = sincos(setup.model.grid, setup.model.width)[None]
        elif name.endswith("alibi_scale"):
            ours = compare.case.arrays[f"student/{name}"]
        else:
            pytest.fail(f"frozen parameter {name} is unknown to the tests")
        for where in ("student", "final_student", "teacher", "final_teacher"):
            if f"{where}/{name}" in compare.case.arrays:
                compare.check("constants", f"{where}/{name}", ours, ACTIVATION)


def forward_and_gradients(setup: Setup):
    """(student, teacher) -> (stages, inputs and outputs of modules, what `derive` makes of them,
    gradient of the mean loss)."""

    def program(params, teacher):
        def total(params):
            seen = {}

            def record(method, args, kwargs, context):
                out = method(*args, **kwargs)
                if context.method_name == "__call__":
                    names = TRACED.get(context.module.path, (None, None))
                    for name, value in zip(names, (args[0], out), strict=True):
                        if name:
                            seen.setdefault(name, []).append(value)  # first the student's
                return out

            with nn.intercept_methods(record):
                stages = setup.given(params, teacher, collect=True)
            return stages.total / stages.count, (stages, seen)

        grads, (stages, seen) = jax.grad(total, has_aux=True)(params)
        return stages, seen, derive(setup, params, stages), grads

    return program


# Intermediates that the objective does not keep -> the group that they are reported in.
STAGES = dict(
    decoder_in="decoder",
    decoder_out="decoder",
    target_layers_raw="targets",
    target_layers_normed="targets",
    target_avg="targets",
    target_full="targets",
    cls_pred="prediction",
    cls_target="targets",
    pred_var="loss",
    target_var="loss",
)


def derive(setup: Setup, params: Any, stages: targets.Intermediates) -> dict[str, jax.Array]:
    """The stages of `STAGES`."""
    mask = setup.mask.reshape(-1, setup.mask.shape[-1])
    rows, objective = len(mask), setup.config["objective"]
    apply, x = functools.partial(setup.model.apply, {"params": params}), stages.student.x
    valid = repeat(stages.tokens.valid, rows)
    chosen = TargetSpec(objective["top_k"], "", None).layers(setup.model.encoder.depth)
    raw = stages.teacher.ffn if objective["target"] == "ffn" else stages.teacher.layers
    raw = raw[np.array(chosen)][:, :, raw.shape[2] - mask.shape[1] :]
    norm = targets.normaliser(objective["layer_norms"])
    watched = targets.monitor(stages)
    found = dict(
        decoder_in=fill(x, mask, setup.noise),
        decoder_out=apply(apply(x, mask, setup.noise, valid, method="decode"), method="predict"),
        target_layers_raw=raw,
        target_layers_normed=jax.vmap(norm)(raw),
        target_avg=stages.teacher.targets,
        target_full=stages.targets,
        pred_var=watched["pred_std"],
        target_var=watched["target_std"],
    )
    if stages.student.class_tokens is not None and stages.student.class_tokens.shape[1]:
        found["cls_pred"] = stages.student.class_tokens[:, -1]
        found["cls_target"] = repeat(jnp.mean(stages.targets, 1), rows)
    return found


def check_stages(setup: Setup, compare, stages, seen, derived) -> None:
    case, (rows, length) = compare.case, compare.case.arrays["batch/mask"].shape
    extra = stages.student.class_tokens
    E = 0 if extra is None else extra.shape[1]
    # Theirs are in the order in which visible tokens happened to be gathered.
    order = np.argsort(np.argsort(case.arrays["batch/ids_keep"], axis=1), axis=1)
    order = np.concatenate([np.tile(np.arange(E), (rows, 1)), E + order], axis=1)

    def activation(stage, name, ours):
        if f"fwd/{name}" in compare.left:
            compare.check(stage, f"fwd/{name}", ours, ACTIVATION)

    def reordered(x):  # [..., rows, E + V, D]
        return np.asarray(x)[..., np.arange(rows)[:, None], order, :]

    if "relative_positions" in seen:
        activation("positions", "relative_positions", seen["relative_positions"][0])
    inputs, layers = seen["blocks_in"][0], stages.student.layers
    context = layers[setup.prenet - 1] if setup.prenet else inputs
    activation("context", "context_out", reordered(context))
    activation("layers", "student_blocks_out", reordered(layers[setup.prenet :]))
    whole = stages.student.x if extra is None else jnp.concatenate([extra, stages.student.x], 1)
    activation("layers", "student_encoder_out", reordered(whole))

    for name, value in derived.items():
        activation(STAGES[name], name, value)
    some = np.asarray(stages.weights) > 0
    activation("targets", "target", np.asarray(stages.masked_targets)[some])
    activation("prediction", "pred", np.asarray(stages.prediction)[some])
    visible = case.arrays["batch/ids_keep"].shape[1]
    for name, value in {
        "loss": stages.total,
        "loss_regression": stages.parts["regression"],
        "loss_main": stages.parts["regression"],
        "loss_cls": stages.parts.get("class", 0.0),
        "sample_size": stages.count,
        "masked_pct": np.float32(1 - visible / length),
    }.items():
        if f"fwd/{name}" in compare.left:
            compare.check("loss", f"fwd/{name}", value, LOSS)


def thirds(name: str, *arrays: np.ndarray) -> list[tuple[str, list[np.ndarray]]]:
    """(kind, parts) of arrays: a bias of queries, keys and values has keys whose gradient is 0."""
    if not name.endswith(KEYS):
        return [("plain", list(arrays))]
    parts = [np.split(a, 3) for a in arrays]
    return [
        ("keys", [p[1] for p in parts]),
        ("plain", [np.concatenate([p[0], p[2]]) for p in parts]),
    ]


def relative(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Largest difference over largest value."""
    size = np.abs(theirs).max(initial=0.0) or 1.0
    return float(np.abs(ours.astype(np.float64) - theirs).max(initial=0.0) / size)


def check_gradients(setup: Setup, compare, ours: Mapping[str, np.ndarray]) -> None:
    recorded = compare.case.part("grad/")
    length = math.sqrt(sum(np.sum(np.square(g, dtype=np.float64)) for g in recorded.values()))
    for name, value in ours.items():
        key = f"grad/{name}"
        if name not in recorded:  # no gradient at all
            compare.note("gradients", key, float(np.abs(value).max()), 0.0)
            continue
        theirs = compare.theirs(key)
        assert value.shape == theirs.shape, key
        for kind, (mine, other) in thirds(name, value, theirs):
            if kind == "keys":
                compare.note("zeros", key, float(np.linalg.norm(mine)) / length, NOISE)
            else:
                compare.note("gradients", key, relative(mine, other), GRADIENT)


def train(setup: Setup, compare, student: Any, teacher: Any) -> None:
    """N updates by the loop's own train step, with the recorded draws in place of its own."""
    case = compare.case
    tx, schedule = reference.make_optimizer(setup)

    def loss(params, teacher, batch, draw):
        stages = setup.given(params, teacher)
        parts = {f"loss_{name}": part for name, part in stages.parts.items()}
        return stages.total, stages.count, targets.monitor(stages) | parts

    task = Task(
        shapes=(),
        shares=(),
        init=lambda key: student,
        loss=loss,
        data=lambda start: (),
        averaged=setup.config["averaged"],
    )
    step = quick_jit(make_train_step(task, tx, setup.decay, schedule))
    now = init_state(task, tx, jax.random.key(0)).replace(teacher=teacher)
    updates, scalars = len(case.arrays["train/grad_norm"]), []
    check_traces(setup, compare, now, 0)
    for n in range(updates):
        now, metrics = step(now, setup.batch)
        scalars.append(jax.device_get(metrics))
        check_traces(setup, compare, now, n + 1)
    scalars.append(jax.device_get(step(now, setup.batch)[1]))  # the loss of the final weights

    count = np.float32(setup.mask.sum())
    mean = np.array([s["loss"] for s in scalars])
    for name, value in {
        "loss": mean * count,
        "loss_per_sample": mean,
        "sample_size": np.full(updates + 1, count),
        "loss_regression": np.array([s["loss_regression"] for s in scalars]),
        "loss_cls": np.array([s.get("loss_class", 0.0) for s in scalars]),
    }.items():
        if f"train/{name}" in compare.left:
            compare.check("losses", f"train/{name}", value, LOSS)
    norms = np.array([s["grad_norm"] for s in scalars])
    compare.check("grad_norm", "train/grad_norm", norms[:updates], NORM)
    rates = np.array([s["learning_rate"] for s in scalars])
    compare.check("schedules", "train/lr", rates[:updates], SCHEDULE)
    decays = [float(setup.decay(n).value) for n in range(updates + 1)]
    assert [s["ema_decay"] for s in scalars[:updates]] == pytest.approx(decays[1:], rel=1e-7)
    compare.check("schedules", "train/ema_decay", decays, SCHEDULE)
    check_final(setup, compare, now, float(np.sum(rates[:updates])))


def both(setup: Setup, now: Any) -> dict[str, dict[str, np.ndarray]]:
    """Student and teacher under their names."""
    params, teacher = jax.device_get((now.params, now.teacher))
    return {"student": write(setup, params), "teacher": write_teacher(setup, params, teacher)}


def check_traces(setup: Setup, compare, now: Any, n: int) -> None:
    for who, arrays in both(setup, now).items():
        for name in compare.case.part(f"trace/{who}/{n}/"):
            compare.check("traces", f"trace/{who}/{n}/{name}", arrays[name], TRACE)


def check_final(setup: Setup, compare, now: Any, moved: float) -> None:
    """moved: the sum of the learning rates, which no parameter without a gradient can exceed."""
    case, ours = compare.case, both(setup, now)
    gradients, length = case.part("grad/"), float(case.arrays["train/grad_norm"][0])
    for name in case.part("final_student/"):
        key = f"final_student/{name}"
        if key not in compare.left:
            continue  # a constant
        theirs, value = compare.theirs(key), ours["student"][name]
        gradient = gradients.get(name, np.zeros_like(theirs))
        for kind, (mine, other, slope) in thirds(name, value, theirs, gradient):
            difference = np.abs(mine.astype(np.float64) - other)
            if kind == "keys":  # Adam turns noise into steps
                compare.note("noise", key, float(difference.max()) / (moved or 1.0), 2.0)
                continue
            # So it does with single elements, which may end a step apart.
            noise = (slope != 0) & (np.abs(slope) < 1e-7 * length)
            difference = np.where(noise, np.maximum(difference - moved, 0.0), difference)
            size = np.abs(other).max()
            compare.note("weights", key, float(difference.max() / size), ELEMENT)
            ratio = float(np.linalg.norm(difference) / np.linalg.norm(other))
            compare.note("weights", f"{key} (length)", ratio, LENGTH)
    for name in case.part("final_teacher/"):
        key = f"final_teacher/{name}"
        if key not in compare.left:
            continue
        theirs, value = compare.theirs(key), ours["teacher"][name]
        for kind, (mine, other) in thirds(name, value, theirs):
            if kind == "plain":
                compare.note("teacher", key, relative(mine, other), TRACE)
