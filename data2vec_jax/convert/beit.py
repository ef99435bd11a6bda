"""Weights in BEiT's layout: data2vec 1.0 for vision (finetuning_and_conversion 5.3).

The student stands under `model` (DeepSpeed: `module`), the teacher under `model_ema`, both with all
names.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from data2vec_jax.convert import fields
from data2vec_jax.convert.fields import Config, Field
from data2vec_jax.convert.layouts import Layout, Source
from data2vec_jax.convert.tables import (
    CONV2D,
    LEAD1,
    LEAD2,
    LINEAR,
    Row,
    State,
    Table,
    below,
    linear,
    norm,
)
from data2vec_jax.core.errors import UserError
from data2vec_jax.models.positions import relative_index

BLOCK, OURS = "blocks.{l}", "encoder/blocks"

VISION = Table(
    rows=[
        Row("cls_token", "class_token", LEAD2),
        Row("mask_token", "mask_embedding", LEAD2),
        Row("pos_embed", "positions", LEAD1),
        Row("patch_embed.proj.weight", "patches/kernel", CONV2D),
        Row("patch_embed.proj.bias", "patches/bias"),
        Row("rel_pos_bias.relative_position_bias_table", "relative_bias"),
        *norm(f"{BLOCK}.norm1", f"{OURS}/norm1"),
        Row(f"{BLOCK}.attn.qkv.weight", f"{OURS}/qkv/kernel", LINEAR),
        Row(f"{BLOCK}.attn.q_bias", f"{OURS}/q_bias"),
        Row(f"{BLOCK}.attn.v_bias", f"{OURS}/v_bias"),
        Row(f"{BLOCK}.attn.relative_position_bias_table", f"{OURS}/relative_bias"),
        *linear(f"{BLOCK}.attn.proj", f"{OURS}/out"),
        Row(f"{BLOCK}.gamma_1", f"{OURS}/layer_scale1"),
        *norm(f"{BLOCK}.norm2", f"{OURS}/norm2"),
        *linear(f"{BLOCK}.mlp.fc1", f"{OURS}/up"),
        *linear(f"{BLOCK}.mlp.fc2", f"{OURS}/down"),
        Row(f"{BLOCK}.gamma_2", f"{OURS}/layer_scale2"),
        *norm("norm", "norm"),
        *linear("lm_head", "head/linear0"),
    ],
    ignored={r"relative_position_index$": "computed from the grid"},
)


NAME, EMA, EPS = "BEiT data2vec vision 1.0", "model_ema.", 1e-6
SHARED, OWN = "rel_pos_bias.relative_position_", "attn.relative_position_"
RATES = (  # they have no effect on a trained model; either name of the settings may stand there
    Field("drop_path", 0.0, "model.encoder.drop_path", 0.0),
    Field("attn_drop_rate", 0.0, "model.encoder.attention_dropout", 0.0),
    Field("drop", 0.0, ("model.dropout", "model.encoder.dropout"), 0.0),
)
ONLY = {
    "model.encoder.norm": "pre",
    "model.encoder.eps": EPS,
    "model.encoder.activation": "gelu",
    "model.encoder.activation_dropout": 0.0,
    "model.encoder.layerdrop": 0.0,
    "model.class_tokens": 1,
    "model.sincos": False,
    "model.alibi": None,
    "model.decoder": None,
}
HEADS = (None, "image", "image_pooler")


def configure(source: Source) -> Config:
    """Settings (`args`), and where they are silent the shapes of the weights, -> ours."""
    args = source.config.get("args") or {}
    args = args if isinstance(args, Mapping) else {}
    state = {name: x for name, x in source.state.items() if not name.startswith(EMA)}

    def shape(name):
        if name not in state:
            raise UserError(f"{source.path}: the weights lack '{name}'")
        return tuple(state[name].shape)

    width, channels, *patch = shape("patch_embed.proj.weight")
    depth = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    tables = [x for name, x in state.items() if name.endswith("relative_position_bias_table")]
    image = _image(source, args, state, patch, tables)
    own = "blocks.0.attn.relative_position_bias_table" in state
    encoder = {
        "depth": depth,
        "heads": _heads(source, args, tables, width),
        "mlp": shape("blocks.0.mlp.fc1.weight")[0],
        "norm": "pre",
        "eps": EPS,
        "qkv_bias": _bias(source, state),
        "layer_scale": (args.get("init_values") or 0.1) if "blocks.0.gamma_1" in state else None,
        "relative": [a // b for a, b in zip(image, patch, strict=True)] if own else None,
    }
    config: Config = {
        "modality": "vision",
        "model": {
            "width": width,
            "image": image,
            "patch": patch,
            "encoder": encoder,
            "mean": [0.5] * channels,
            "std": [0.5] * channels,
            "shared_relative": f"{SHARED}bias_table" in state,
            "absolute": "pos_embed" in state,
            "mask_embedding": "mask_token" in state,
            "final_norm": "norm.weight" in state,
        },
    }
    fields.take(RATES, args, config)
    if "head.weight" in state:
        pooling = "mean" if "fc_norm.weight" in state else "class"
        classes = shape("head.weight")[0]
        config["head"] = {"name": "image", "classes": classes, "pooling": pooling, "eps": EPS}
    else:  # pretraining normalises colours by ImageNet's statistics, fine-tuning does not
        for key in ("mean", "std") if channels == 3 else ():
            config["model"].pop(key)
    if any(name.startswith(EMA) for name in source.state):
        config["teacher"] = "model"
    return config


def _image(source: Source, args: Config, state: Mapping, patch: list[int], tables: list) -> list:
    """(height, width) by the settings, or square and as large as the tables are."""
    for name in ("img_size", "input_size"):
        if size := args.get(name):
            return [size, size] if isinstance(size, int) else [int(x) for x in size]
    if "pos_embed" in state:
        cells = state["pos_embed"].shape[1] - 1
        side = round(cells**0.5)
    elif tables:
        side = (round((len(tables[0]) - 3) ** 0.5) + 1) // 2
        cells = side * side if (2 * side - 1) ** 2 + 3 == len(tables[0]) else -1
    else:
        side, cells = 224 // patch[0], (224 // patch[0]) ** 2  # nothing depends on it
    if side * side != cells:
        raise UserError(f"{source.path}: the file does not say the size of images (args.img_size)")
    return [side * patch[0], side * patch[1]]


def _heads(source: Source, args: Config, tables: list, width: int) -> int:
    """Attention heads: columns of the tables, or by the settings, or of BEiT's usual width, 64."""
    if tables:
        return int(tables[0].shape[1])
    if args.get("num_heads"):
        return int(args["num_heads"])
    if width % 64:
        raise UserError(f"{source.path}: the file does not say how many heads (args.num_heads)")
    return width // 64


def _bias(source: Source, state: Mapping[str, Any]) -> str:
    if "blocks.0.attn.qkv.bias" in state:
        raise UserError(f"{source.path}: 'blocks.0.attn.qkv.bias': data2vec's keys have no bias")
    return "qv" if "blocks.0.attn.q_bias" in state else "none"


def describe(config: Config) -> Config:
    """Ours -> the settings."""
    origin = config.get("origin") or {}
    if origin.get("layout") == NAME:
        return {key: x for key, x in origin["config"].items() if key != "wrapper"}
    fields.demand(config, ONLY, "BEiT's layout")
    model, encoder = config["model"], config["model"]["encoder"]
    if encoder.get("qkv_bias") not in ("qv", "none"):
        raise UserError("config.model.encoder.qkv_bias: BEiT's layout has no biases of keys")
    if fields.get(config, "head.name") not in HEADS:
        raise UserError(f"config.head.name: BEiT's layout has none for '{config['head']['name']}'")
    rows, columns = grid(config)
    if rows != columns and model.get("resampling") == "huggingface":
        raise UserError("config.model.resampling: BEiT reads positions of other grids differently")
    args = {
        "img_size": list(size(model, "image", 224)),
        "patch_size": size(model, "patch", 16)[0],
        "embed_dim": model["width"],
        "depth": encoder["depth"],
        "num_heads": encoder["heads"],
        "mlp_ratio": encoder["mlp"] / model["width"],
        "qkv_bias": encoder["qkv_bias"] == "qv",
        "init_values": encoder.get("layer_scale") or 0.0,
        "use_abs_pos_emb": model.get("absolute", False),
        "use_shared_rel_pos_bias": model.get("shared_relative", True),
        "use_rel_pos_bias": encoder.get("relative") is not None,
    }
    return {"args": args | fields.give(RATES, config)}


def size(model: Config, key: str, default: int) -> tuple[int, int]:
    """(height, width) of an option that may be one number."""
    value = model.get(key, default)
    return (value, value) if isinstance(value, int) else tuple(value)


def grid(config: Config) -> tuple[int, int]:
    """Rows and columns of patches."""
    image, patch = size(config["model"], "image", 224), size(config["model"], "patch", 16)
    return image[0] // patch[0], image[1] // patch[1]


def table(config: Config) -> Table:
    """Names of the student, its head, and the teacher."""
    head = [*norm("fc_norm", "task/norm"), *linear("head", "task/output")]
    student = Table([*VISION.rows, *head], VISION.ignored)
    return Table([*student.rows, *below(student, EMA, "teacher/")], VISION.ignored)


def constants(config: Config) -> State:
    """The index of relative positions, beside every table."""
    model = config["model"]
    index = relative_index(grid(config)).astype(np.int64)
    names = [f"{SHARED}index"] if model.get("shared_relative", True) else []
    if model["encoder"].get("relative"):
        names += [f"blocks.{l}.{OWN}index" for l in range(model["encoder"]["depth"])]
    if config.get("teacher"):
        names += [EMA + name for name in names]
    return dict.fromkeys(names, index)


def store(state: Mapping[str, Any], config: Config) -> dict[str, Any]:
    """Student and teacher, each below its key."""
    wrapper = fields.get(config, "origin.config.wrapper", "model")
    tree: dict[str, Any] = {wrapper: {}}
    for name, tensor in state.items():
        if name.startswith(EMA):
            tree.setdefault(EMA[:-1], {})[name.removeprefix(EMA)] = tensor
        else:
            tree[wrapper][name] = tensor
    return tree


LAYOUTS = [
    Layout(
        name=NAME,
        kind="pickle",
        to="fairseq",
        modality="vision",
        claims=lambda source: "patch_embed.proj.weight" in source.state,
        configure=configure,
        table=table,
        describe=describe,
        constants=constants,
        store=store,
        holds=lambda config: fields.generation(config) == "1.0",
    )
]
