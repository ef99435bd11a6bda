"""data2vec 2.0: sizes, and the objective against a plain implementation of it (`naive_v2`)."""

import copy
import functools
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import naive_v2
import numpy as np
import pytest
import reference_v2
from recorded import Case

from data2vec_jax import masking
from data2vec_jax.convert import tables
from data2vec_jax.errors import UserError
from data2vec_jax.models.decoder import Decoder, fill
from data2vec_jax.models.layers import convolve, visible
from data2vec_jax.models.positions import sincos
from data2vec_jax.objectives.targets import Draw
from data2vec_jax.tasks import pretrain
from data2vec_jax.tasks.task import Task, init_state, make_train_step

ROOT = Path(__file__).resolve().parent.parent
GOLDENS = Path(__file__).parent / "goldens/pretraining"


def config_of(name: str, variant: str) -> dict:
    """A config file's variant."""
    spec = importlib.util.spec_from_file_location(name, ROOT / f"configs/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(variant).to_dict()


def batch_of(config: dict, rows: int, key: int = 0) -> dict:
    """Random examples of the first bucket of a config."""
    rng = np.random.default_rng(key)
    modality, _ = pretrain.make_model(config)
    batch = {"example_id": jnp.arange(rows, dtype=jnp.uint32) + 7 * key}
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
    config = config_of(name, variant)
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
    [("vision_v2", "base", 39, 157), ("vision_v2", "large", 49, 147),
     ("vision_v2", "huge14", 64, 192), ("text_v2", "base", 266, 246), ("text_v2", "large", 256, 256)],
)  # fmt: skip
def test_masked_counts(name, variant, seen, masked):
    config = config_of(name, variant)
    modality, model = pretrain.make_model(config)
    _, sampler = pretrain.make_objective(config, modality, model)
    shapes = modality.layout(**config["examples"]).shapes[-1]
    masks = sampler(shapes)
    assert masks.count(masks.length) == masked and masks.length - masked == seen


def test_flops_grow_with_clones():
    config = config_of("vision_v2", "base")
    modality, model = pretrain.make_model(config)
    _, sampler = pretrain.make_objective(config, modality, model)
    batch = {"image": jax.ShapeDtypeStruct((2, 224, 224, 3), jnp.uint8),
             "example_id": jax.ShapeDtypeStruct((2,), jnp.uint32)}  # fmt: skip
    one, four, seven = (pretrain.step_flops(modality, model, sampler, batch, m) for m in (1, 4, 7))
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
        "MA_audio_v2", dict(
            model=dict(depth=2, average_top_k_layers=2, norm_eps=1e-6, clone_batch=2,
                       end_of_block_targets=True, layer_norm_target_layer=True, loss_beta=0.5,
                       loss_scale=0.3, instance_norm_targets=True),
            modality_cfg=dict(prenet_depth=1, ema_local_encoder=True, conv_pos_pre_ln=True,
                              conv_pos_depth=2, conv_pos_width=8, conv_pos_groups=4,
                              local_grad_mult=0.1, learned_alibi_scale_per_layer=True,
                              learned_alibi_scale_per_head=False),
            decoder=dict(decoder_kernel=4, decoder_dim=24, decoder_groups=4, decoder_layers=3,
                         projection_layers=2),
            extra=dict(loss_kind="smooth_l1"),
        ), (4_000, 2_900),
    ),
    "vision, blocks averaged": (
        "MV_image_v2", dict(
            model=dict(ema_encoder_only=True, cls_loss=0.1, clone_batch=2, norm_eps=1e-5,
                       instance_norm_target_layer=False, batch_norm_target_layer=True,
                       loss_beta=1.0, num_heads=2),
            modality_cfg=dict(ALIBI, prenet_depth=2, num_extra_tokens=2, local_grad_mult=0.5,
                              alibi_distance="euclidean", learned_alibi_scale=False,
                              num_alibi_heads=2, input_size=32),
            decoder=dict(decoder_kernel=4, decoder_dim=16, decoder_groups=2, decoder_layers=2),
            extra=dict(loss_kind="smooth_l1"),
        ), None,
    ),
    "vision, no class token": (
        "MV_image_v2", dict(
            model=dict(cls_loss=0, clone_batch=1, depth=1, average_top_k_layers=1,
                       ema_end_decay=1.0, ema_anneal_end_step=1),
            modality_cfg=dict(ALIBI, prenet_depth=0, num_extra_tokens=0, ema_local_encoder=False,
                              learned_alibi_scale=True, fixed_positions=False, input_size=32),
            decoder=dict(decoder_residual=False, decoder_layers=2),
        ), None,
    ),
    "text, prenet": (
        "MT_text_v2_alibi", dict(
            model=dict(depth=2, average_top_k_layers=2, instance_norm_target_layer=False,
                       layer_norm_target_layer=True, instance_norm_targets=True),
            modality_cfg=dict(prenet_depth=1, learned_alibi_scale_per_layer=False,
                              no_scale_embedding=False),
            decoder=dict(decoder_dim=16, decoder_groups=4, decoder_residual=True,
                         projection_layers=3, projection_ratio=1.5),
        ), (14, 9, 11),
    ),
    "text, all averaged": (
        "MT_text_v2_base", dict(
            model=dict(depth=2, ema_encoder_only=False, layer_norm_targets=True),
            modality_cfg=dict(ema_local_encoder=True),
            decoder=dict(projection_layers=1, decoder_kernel=5),
        ), (12, 12),
    ),
}  # fmt: skip


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
    student = {
        k: (rng.normal(size=x.shape) * (0.1 if x.ndim < 2 else 0.25)).astype(np.float32)
        + np.float32(k.endswith((".norm.weight", "norm1.weight", "norm2.weight", "alibi_scale",
                                 ".2.1.weight", "project_features.1.weight", "embedding.weight")))
        for k, x in reference_v2.write(ours, jax.tree.map(lambda x: np.zeros(x.shape), shapes)).items()
    }  # fmt: skip
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
        if k not in info["frozen_params"] else v
        for k, v in teacher.items()
    }  # fmt: skip
    played = naive_v2.record(info, student, teacher, batch, mask, noise)
    return Case(name, info, played)


@pytest.mark.parametrize("name", VARIANTS)
def test_objective_equals_the_plain_one(name):
    reference_v2.run_v2(case_of(name))
