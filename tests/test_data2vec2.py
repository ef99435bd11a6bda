"""data2vec 2.0: sizes, and the objective against a plain implementation of it (`naive_v2`)."""

import copy
import json
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import naive_v2
import numpy as np
import pytest
import reference_v2
from configs_for_tests import config_of, quiet
from recorded import Case, quick_jit

from data2vec_jax import masking
from data2vec_jax.convert import fairseq_v2, tables
from data2vec_jax.core.errors import UserError
from data2vec_jax.core.train_step import StepKeys
from data2vec_jax.modalities import contract
from data2vec_jax.models.decoder import Decoder, fill
from data2vec_jax.models.layers import convolve, gather_tokens
from data2vec_jax.models.positions import sincos
from data2vec_jax.objectives import data2vec2
from data2vec_jax.tasks import pretrain

ROOT = Path(__file__).resolve().parent.parent
GOLDENS = Path(__file__).parent / "goldens/pretraining"


def smoke(modality: str, **objective) -> tuple[dict, contract.Modality, object, object]:
    """(config, modality, model, objective) of a smoke config, without dropout."""
    config = quiet(config_of(f"{modality}_v2"))
    config["objective"] |= objective
    modality, model = pretrain.make_model(config)
    return config, modality, model, pretrain.make_objective(config, modality, model)[0]


def batch_of(config: dict, rows: int) -> dict:
    """Random examples of the first bucket of a config."""
    rng, modality = np.random.default_rng(0), contract.get(config["modality"])
    batch = {"example_id": jnp.arange(rows, dtype=jnp.uint32)}
    for name, shape in modality.layout(**config["examples"]).shapes[0].items():
        size = (rows, *shape.shape)
        if name == "tokens":
            value = rng.integers(4, config["model"]["vocab_size"] - 1, size)
        elif shape.dtype == np.uint8:
            value = rng.integers(0, 256, size)
        else:
            value = rng.normal(size=size)
        batch[name] = jnp.asarray(value, shape.dtype)
    return batch


def init(model, batch) -> dict:
    """Random parameters, by one program."""
    return quick_jit(lambda key: model.init(key, batch)["params"])(jax.random.key(0))


# Sizes --------------------------------------------------------------------------------------------

SIZES = {  # spec 13
    ("speech_v2", "base"): (93_163_532, 619_776),
    ("speech_v2", "large"): (313_275_408, 1_908_736),
    ("vision_v2", "base"): (85_647_360, 2_585_856),
    ("vision_v2", "large"): (303_099_904, 5_967_872),
    ("vision_v2", "huge14"): (630_435_840, 6_639_872),
    ("text_v2", "base"): (124_054_272, 28_907_520),
    ("text_v2", "large"): (354_309_120, 31_070_464),
}


@pytest.mark.parametrize(("name", "variant"), SIZES)
def test_parameter_counts(name, variant):
    config = config_of(name, variant).to_dict()
    _, model = pretrain.make_model(config)
    inputs = {
        "speech": {"audio": jnp.zeros((1, 16_000))},
        "vision": {"image": jnp.zeros((1, 224, 224, 3), jnp.uint8)},
        "text": {"tokens": jnp.zeros((1, 64), jnp.int32)},
    }[config["modality"]]
    params = jax.eval_shape(model.init, jax.random.key(0), inputs)["params"]
    counts = {False: 0, True: 0}
    for path, x in tables.flatten(params).items():
        counts[path.startswith(("decoder/", "head/"))] += x.size
    assert (counts[False], counts[True]) == SIZES[name, variant]


@pytest.mark.parametrize(
    ("name", "variant", "seen", "masked"),
    [
        ("vision_v2", "base", 39, 157),
        ("vision_v2", "large", 49, 147),
        ("vision_v2", "huge14", 64, 192),
        ("text_v2", "base", 266, 246),
        ("text_v2", "large", 256, 256),
    ],
)
def test_masked_counts(name, variant, seen, masked):
    config = config_of(name, variant).to_dict()
    modality, model = pretrain.make_model(config)
    _, sampler = pretrain.make_objective(config, modality, model)
    shapes = modality.layout(**config["examples"]).shapes[-1]
    masks = sampler(shapes)
    assert masks.count(masks.length) == masked and masks.length - masked == seen


def test_flops_grow_with_clones():
    config = config_of("vision_v2", "base").to_dict()
    modality, model = pretrain.make_model(config)
    _, sampler = pretrain.make_objective(config, modality, model)
    batch = {
        "image": jax.ShapeDtypeStruct((2, 224, 224, 3), jnp.uint8),
        "example_id": jax.ShapeDtypeStruct((2,), jnp.uint32),
    }
    one, four, seven = (
        pretrain.step_flops(modality, model, sampler, batch, True, m) for m in (1, 4, 7)
    )
    assert seven - four == pytest.approx(four - one)
    # A student is 40 tokens through 12 blocks (10.3 M multiply-adds a token and block, attention
    # included), and 196 through the decoder; 3 passes, 2 rows, 2 FLOPs.
    blocks = 40 * 12 * (12 * 768**2 + 2 * 40 * 768)
    decoder = 196 * 6 * 9 * 768**2 / 16 + 157 * 768**2
    assert (four - one) / 3 == pytest.approx(12 * (blocks + decoder))


# Against the plain implementation -----------------------------------------------------------------

ALIBI = dict(use_alibi_encoder=True, alibi_scale=0.8)
VARIANTS = {
    "speech, everything else": (
        "MA_audio_v2",
        dict(
            model=dict(
                depth=2,
                average_top_k_layers=2,
                norm_eps=1e-6,
                clone_batch=2,
                end_of_block_targets=True,
                layer_norm_target_layer=True,
                loss_beta=0.5,
                loss_scale=0.3,
                instance_norm_targets=True,
            ),
            modality_cfg=dict(
                prenet_depth=1,
                ema_local_encoder=True,
                conv_pos_pre_ln=True,
                conv_pos_depth=2,
                conv_pos_width=8,
                conv_pos_groups=4,
                local_grad_mult=0.1,
                learned_alibi_scale_per_layer=True,
                learned_alibi_scale_per_head=False,
            ),
            decoder=dict(
                decoder_kernel=4,
                decoder_dim=24,
                decoder_groups=4,
                decoder_layers=3,
                projection_layers=2,
            ),
            extra=dict(loss_kind="smooth_l1"),
        ),
        (4_000, 2_900),
    ),
    "vision, blocks averaged": (
        "MV_image_v2",
        dict(
            model=dict(
                ema_encoder_only=True,
                cls_loss=0.1,
                clone_batch=2,
                norm_eps=1e-5,
                d2v_loss=0.5,
                instance_norm_target_layer=False,
                batch_norm_target_layer=True,
                loss_beta=1.0,
                num_heads=2,
            ),
            modality_cfg=dict(
                ALIBI,
                prenet_depth=2,
                num_extra_tokens=2,
                local_grad_mult=0.5,
                alibi_distance="euclidean",
                learned_alibi_scale=False,
                num_alibi_heads=2,
                input_size=32,
            ),
            decoder=dict(decoder_kernel=4, decoder_dim=16, decoder_groups=2, decoder_layers=2),
            extra=dict(loss_kind="smooth_l1"),
        ),
        None,
    ),
    "vision, no class token": (
        "MV_image_v2",
        dict(
            model=dict(
                cls_loss=0,
                clone_batch=1,
                depth=1,
                average_top_k_layers=1,
                ema_end_decay=1.0,
                ema_anneal_end_step=1,
            ),
            modality_cfg=dict(
                ALIBI,
                prenet_depth=0,
                num_extra_tokens=0,
                ema_local_encoder=False,
                learned_alibi_scale=True,
                fixed_positions=False,
                input_size=32,
            ),
            decoder=dict(decoder_residual=False, decoder_layers=2),
        ),
        None,
    ),
    "text, prenet": (
        "MT_text_v2_alibi",
        dict(
            model=dict(
                depth=2,
                average_top_k_layers=2,
                instance_norm_target_layer=False,
                layer_norm_target_layer=True,
                instance_norm_targets=True,
            ),
            modality_cfg=dict(
                prenet_depth=1, learned_alibi_scale_per_layer=False, no_scale_embedding=False
            ),
            decoder=dict(
                decoder_dim=16,
                decoder_groups=4,
                decoder_residual=True,
                projection_layers=3,
                projection_ratio=1.5,
            ),
        ),
        (14, 9, 11),
    ),
    "text, all averaged": (
        "MT_text_v2_base",
        dict(
            model=dict(depth=2, ema_encoder_only=False, layer_norm_targets=True),
            modality_cfg=dict(ema_local_encoder=True),
            decoder=dict(projection_layers=1, decoder_kernel=5),
        ),
        (12, 12),
    ),
}


def case_of(name: str) -> Case:
    """A case of the authors' flags, changed, with random weights, played by `naive_v2`."""
    golden, changes, lengths = VARIANTS[name]
    info = copy.deepcopy(json.loads((GOLDENS / f"{golden}.json").read_text()))
    for section, flags in changes.items():
        info[section] |= flags
    rng, cfg, width = np.random.default_rng(0), info["modality_cfg"], info["model"]["embed_dim"]
    if info["modality"] == "image":
        side = cfg["input_size"]
        rows, length = 2, (side // cfg["patch_size"]) ** 2
        batch = {"image": rng.normal(size=(rows, cfg["in_chans"], side, side)).astype(np.float32)}
    elif info["modality"] == "audio":
        rows, length = len(lengths), max(lengths)
        padding = np.arange(length) >= np.array(lengths)[:, None]
        source = np.where(padding, 0, rng.normal(size=(rows, length))).astype(np.float32)
        batch = {"source": source, "padding_mask": padding}
        for _, taps, stride in eval(cfg["feature_encoder_spec"]):
            length = (length - taps) // stride + 1
    else:
        rows, length = len(lengths), max(lengths)
        padding = np.arange(length) >= np.array(lengths)[:, None]
        tokens = rng.integers(4, info["extra"]["vocab_size"] - 1, (rows, length))
        batch = {"src_tokens": np.where(padding, 1, tokens), "padding_mask": padding}
    rows *= info["model"]["clone_batch"]
    mask = rng.permuted(np.tile(np.arange(length) < length // 2, (rows, 1)), axis=1).astype(int)
    noise = 0.1 * rng.normal(size=(*mask.shape, width)).astype(np.float32) * mask[..., None]
    mode = reference_v2.MODES[info["modality"]]
    prefix = f"modality_encoders.{mode}"

    # Names and shapes come from our model through the tables; values are lively.
    arrays = {f"batch/{k}": v for k, v in batch.items()}
    arrays |= {"batch/mask": mask, "batch/decoder_noise": noise}
    if info["decoder"]["projection_layers"] > 1:
        arrays[f"student/{prefix}.decoder.proj.0.weight"] = None
    ours = reference_v2.setup(Case(name, info, arrays))
    shapes = jax.eval_shape(ours.model.init, jax.random.key(0), ours.batch)["params"]
    zeros = reference_v2.write(ours, jax.tree.map(lambda x: np.zeros(x.shape), shapes))
    student = {
        k: (rng.normal(size=x.shape) * (0.1 if x.ndim < 2 else 0.25)).astype(np.float32)
        + np.float32(
            k.endswith(
                (
                    ".norm.weight",
                    "norm1.weight",
                    "norm2.weight",
                    "alibi_scale",
                    ".2.1.weight",
                    "project_features.1.weight",
                    "embedding.weight",
                )
            )
        )
        for k, x in zeros.items()
    }
    info["frozen_params"] = []
    if info["modality"] == "image":
        table = f"{prefix}.fixed_positional_encoder.positions"
        student[table] = sincos(ours.model.grid, width)[None]
        info["frozen_params"] = [table]
    if cfg["use_alibi_encoder"] and not cfg["learned_alibi_scale"]:
        scale = f"{prefix}.alibi_scale"
        student[scale] = np.full((1, 1, 1, 1, 1), cfg["alibi_scale"], np.float32)
        info["frozen_params"].append(scale)
    for k in student:  # rows of padding
        if k.endswith(("embed_tokens.weight", "embed_positions.weight")):
            student[k][1] = 0
    if info["model"]["ema_encoder_only"]:
        teacher = {k[7:]: v for k, v in student.items() if k.startswith("blocks.")}
    else:
        own = (".local_encoder.", ".project_features.") if not cfg["ema_local_encoder"] else ()
        teacher = {k: v for k, v in student.items() if not any(p in k for p in (".decoder.", *own))}
    teacher = {
        k: v + np.float32(0.02) * rng.normal(size=v.shape).astype(np.float32)
        if k not in info["frozen_params"]
        else v
        for k, v in teacher.items()
    }
    played = naive_v2.record(info, student, teacher, batch, mask, noise)
    return Case(name, info, played)


@pytest.mark.parametrize("name", VARIANTS)
def test_objective_equals_the_plain_one(name):
    reference_v2.run_v2(case_of(name))


@pytest.mark.parametrize("name", ["MA_audio_v2", "MV_image_v2", "MT_text_v2_base"])
def test_weights_survive_the_way_to_ours_and_back(name):
    mode = {"A": "AUDIO", "V": "IMAGE", "T": "TEXT"}[name[1]]
    table = {"AUDIO": fairseq_v2.speech, "IMAGE": fairseq_v2.vision, "TEXT": fairseq_v2.text}[
        mode
    ]()
    with np.load(GOLDENS / f"{name}.npz") as arrays:
        theirs = {k[8:]: arrays[k] for k in arrays.files if k.startswith("student/")}
    joined, prenet = fairseq_v2.joined(theirs)
    tree = tables.read(table, joined)
    assert len(tree["encoder"]["blocks"]["qkv"]["bias"]) == prenet + sum(
        name.startswith("blocks.") and name.endswith("qkv.bias") for name in theirs
    )
    back = fairseq_v2.parted(tables.write(table, tree), prenet, mode)
    theirs = {k: v for k, v in theirs.items() if "fixed_positional" not in k}
    assert {*back} == {*theirs}
    for key, value in theirs.items():
        np.testing.assert_array_equal(back[key], value, err_msg=key)


# The parts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("groups", "taps"), [(1, 3), (4, 3), (2, 4)])
def test_convolution_on_a_grid_equals_xlas(groups, taps):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 5, 6, 8)), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(taps, taps, 8 // groups, 12)), jnp.float32)

    def xlas(x, kernel):
        return jax.lax.conv_general_dilated(
            x,
            kernel,
            (1, 1),
            [(2, 2)] * 2,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
        )

    def ours(x, kernel):
        return convolve(x, kernel, padding=2, groups=groups)

    results = [
        jax.value_and_grad(lambda *a, f=f: jnp.sum(jnp.sin(f(*a))), (0, 1))(x, kernel)
        for f in (ours, xlas)
    ]
    for one, two in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-4)


def test_visible_tokens_and_noise_make_the_whole_sequence():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 10, 3)), jnp.float32)
    mask = jnp.asarray(rng.permuted(np.tile(np.arange(10) < 6, (4, 1)), axis=1))  # 2 clones each
    keep = masking.kept(mask, 4)
    noise = jnp.asarray(rng.normal(size=(4, 10, 3)), jnp.float32)
    seen = gather_tokens(x, keep)
    for row in range(4):
        np.testing.assert_array_equal(seen[row], x[row // 2][~mask[row]])
    whole = fill(seen, mask, noise)
    np.testing.assert_array_equal(whole, np.where(mask[..., None], noise, np.repeat(x, 2, axis=0)))


def test_noise_of_visible_places_is_not_used():
    decoder = Decoder(layers=2, width=8, kernel=3, groups=2)
    rng = np.random.default_rng(0)
    x, noise = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((2, 3, 8), (2, 7, 8)))
    mask = jnp.asarray(rng.permuted(np.tile(np.arange(7) < 4, (2, 1)), axis=1))
    params = decoder.init(jax.random.key(0), x, mask, noise)
    slope = jax.grad(lambda noise: jnp.sum(jnp.sin(decoder.apply(params, x, mask, noise))))(noise)
    used = np.abs(slope).sum(-1) > 0
    np.testing.assert_array_equal(used, mask)


def test_noise_depends_on_step_and_example_only():
    key, shape = jax.random.key(0), (3, 5, 256)

    def draw(step, ids):
        ids = jnp.asarray(ids, jnp.uint32)
        return np.asarray(data2vec2.draw_noise(StepKeys(key, jnp.int32(step), key), ids, shape))

    first = draw(4, [7, 9]).reshape(2, *shape)
    np.testing.assert_array_equal(first[1], draw(4, [9]))
    assert np.abs(first[1] - draw(5, [9])).mean() > 0.5
    assert np.abs(first[0, 0] - first[0, 1]).mean() > 0.5  # clones differ
    assert abs(first.std() - 1) < 0.02 and abs(first.mean()) < 0.02


def test_initial_values():
    config, _, model, _ = smoke("vision")
    params = init(model, batch_of(config, 1))
    assert 0.6 < params["class_token"].std() < 1.5  # N(0, 1)
    kernel, bound = params["patches"]["kernel"], np.sqrt(6 / (16 + 32))  # Xavier
    assert 0.95 * bound < np.abs(kernel).max() < bound
    _, _, model, _ = smoke("speech")
    params = init(model, {"audio": jnp.zeros((1, 8_000))})
    np.testing.assert_array_equal(params["alibi"]["scale"], np.ones((1, 4)))
    assert "mask_embedding" not in params


# The objective ------------------------------------------------------------------------------------


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("modality", ["speech", "vision", "text"])
def test_front_end_and_teacher_run_once_per_example(modality, own):
    config, _, model, objective = smoke(modality, clones=3)
    batch, calls = batch_of(config, 2), []

    def note(method, args, kwargs, context):
        mine = type(context.module) is type(model)
        if mine and context.method_name in ("features", "encode", "decode"):
            tokens = getattr(args[0], "x", args[0])
            out = method(*args, **kwargs)
            rows = len(getattr(out, "x", out))
            calls.append((context.method_name, getattr(tokens, "shape", (0,))[0], rows))
            return out
        return method(*args, **kwargs)

    def loss(key):
        params = model.init(key, batch)["params"]
        calls.clear()
        teacher = {model.frontend_params: params[model.frontend_params]} if own else {}
        return objective.loss(params, teacher, batch, StepKeys(key, jnp.int32(0), key))[0]

    with nn.intercept_methods(note):
        jax.eval_shape(loss, jax.random.key(0))
    students = [("features", 0, 2), ("encode", 2, 6), ("decode", 6, 6)]
    teacher = [("encode", 2, 2)]
    if own:
        teacher = [("features", 0, 2), *teacher]
    assert calls == students + teacher


def test_the_texts_teacher_sees_the_students_dropout():
    config = config_of("text_v2").to_dict()
    config["model"] |= {"dropout": 0.5}
    modality, model = pretrain.make_model(config)
    objective, _ = pretrain.make_objective(config, modality, model)
    batch = batch_of(config, 2)
    params = init(model, batch)
    mask = jnp.zeros((2, 2, 64), bool).at[:, :, ::2].set(True)
    noise = jnp.zeros((4, 64, 32))

    @quick_jit
    def targets(key):
        return objective.forward_with_masks(params, {}, batch, mask, 32, noise, key).targets

    one, again, other = (targets(jax.random.key(k)) for k in (1, 1, 2))
    np.testing.assert_array_equal(one, again)
    assert np.abs(one - other).mean() > 0.1  # its blocks drop nothing, its input does


def test_class_loss_is_a_mean_over_rows_beside_a_mean_over_positions():
    config, _, model, with_class = smoke("vision", class_weight=2.5)
    without = smoke("vision", class_weight=0.0)[-1]
    batch, draw = batch_of(config, 4), StepKeys(jax.random.key(1), jnp.int32(3), jax.random.key(2))
    params = init(model, batch)

    def sums(objective, rows):
        part = {k: v[rows] for k, v in batch.items()}
        return quick_jit(objective.loss)(params, {}, part, draw)[:2]

    total, count = sums(with_class, slice(None))
    plain, _ = sums(without, slice(None))
    halves = [sums(with_class, rows) for rows in (slice(0, 2), slice(2, 4))]
    np.testing.assert_allclose(sum(h[0] for h in halves), total, rtol=1e-6)
    assert sum(h[1] for h in halves) == count == 4 * 2 * 40  # rows, clones, masked of 49

    def parts(batch):
        masks = masking.make("inverse_blocks", (7, 7), ratio=0.8, adjust=0.07, width=3)
        mask = masking.sample(masks, draw.mask_key, draw.step, batch["example_id"], 2)
        noise = jnp.zeros((8, 49, 32))
        stages = with_class.forward_with_masks(params, {}, batch, mask, 40, noise, None)
        middle = jnp.repeat(stages.targets.mean(1), 2, axis=0)
        return jnp.square(stages.student.class_tokens[:, 0] - middle).sum(-1) / np.sqrt(32)

    mean = quick_jit(parts)(batch).mean()
    np.testing.assert_allclose((total - plain) / count, 2.5 * mean, rtol=1e-5)


# What users meet ----------------------------------------------------------------------------------


def test_mistakes_are_named():
    def refused(text, modality, **changes):
        config = quiet(config_of(f"{modality}_v2"))
        for section, options in changes.items():
            config[section] |= options
        with pytest.raises(UserError, match=text):
            modality, model = pretrain.make_model(config)
            pretrain.make_objective(config, modality, model)
            jax.eval_shape(model.init, jax.random.key(0), batch_of(config, 1))

    refused("config.model.decoder: data2vec2 needs one", "text", model=dict(decoder=None))
    refused("class_weight", "text", objective=dict(class_weight=1.0))
    refused("shared_relative", "vision", model=dict(shared_relative=True))
    refused("multiple of 4", "vision", model=dict(width=30, encoder=dict(depth=2, heads=2, mlp=8)))
    refused(
        "config.model.decoder.groups",
        "speech",
        model=dict(decoder=dict(layers=1, width=30, kernel=3)),
    )
    refused("did you mean 'manhattan'", "speech", model=dict(alibi=dict(distance="manhatan")))
    refused("did you mean 'clones'", "speech", objective=dict(clone=2))
    config = quiet(config_of("text_v2")) | {"objective": dict(name="data2vec1", top_k=2)}
    with pytest.raises(UserError, match=r"config.model.decoder: data2vec1 needs none"):
        pretrain.make_objective(config, *pretrain.make_model(config))
