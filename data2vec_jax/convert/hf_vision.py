"""Hugging Face's data2vec for vision (conversion spec 4.1, 4.5, 4.6)."""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from data2vec_jax.convert import fields
from data2vec_jax.convert.fields import Config, Field
from data2vec_jax.convert.hf import (
    FOREIGN,
    PRETRAINING,
    PROBLEM,
    agreeing,
    claims,
    described,
    first,
    labels,
    with_prefix,
)
from data2vec_jax.convert.layouts import Layout, Source
from data2vec_jax.convert.tables import (
    CONV2D,
    FUSED_BIAS,
    FUSED_LINEAR,
    LEAD1,
    LEAD2,
    Change,
    Row,
    State,
    Table,
    linear,
    norm,
)
from data2vec_jax.core import files
from data2vec_jax.core.errors import UserError
from data2vec_jax.modalities.vision.processor import Processor

DOUBLE = Change(lambda x: x[0].transpose(2, 3, 0, 1), lambda x: [x.transpose(2, 3, 0, 1)])
COUNT = Change(lambda x: x[0].astype("int32"), lambda x: [x.astype("int64")])

FIELDS = (
    Field("hidden_size", 768, "model.width"),
    Field("num_hidden_layers", 12, "model.encoder.depth"),
    Field("num_attention_heads", 12, "model.encoder.heads"),
    Field("intermediate_size", 3072, "model.encoder.mlp"),
    Field("hidden_act", "gelu", "model.encoder.activation", "gelu"),
    Field("layer_norm_eps", 1e-12, "model.encoder.eps", 1e-5),
    Field("hidden_dropout_prob", 0.0, ("model.dropout", "model.encoder.dropout"), 0.0),
    Field("attention_probs_dropout_prob", 0.0, "model.encoder.attention_dropout", 0.0),
    Field("drop_path_rate", 0.1, "model.encoder.drop_path", 0.0),
    Field("use_mask_token", False, "model.mask_embedding", True),
    Field("use_absolute_position_embeddings", False, "model.absolute", False),
    Field("use_shared_relative_position_bias", False, "model.shared_relative", True),
    Field(
        "use_mean_pooling",
        True,
        "model.final_norm",
        True,
        lambda value: not value,
        lambda value: not value,
    ),
    Field(
        "layer_scale_init_value",
        0.1,
        "model.encoder.layer_scale",
        None,
        lambda value: value if value > 0 else None,
        lambda value: value or 0.0,
    ),
)
SEGMENTATION = (
    Field("pool_scales", (1, 2, 3, 6), "head.pools", (1, 2, 3, 6), list, list),
    Field("auxiliary_loss_weight", 0.4, "head.auxiliary_weight", 0.4),
    Field("semantic_loss_ignore_index", 255, "head.ignore", 255),
    # A number counts states from 1, where the first is the input of the first block.
    Field(
        "out_indices",
        (3, 5, 7, 11),
        "head.states",
        there=lambda x: sorted(i - 1 for i in x),
        back=lambda x: [i + 1 for i in x],
    ),
)
AUXILIARY = (
    Field("auxiliary_channels", 256, "head.auxiliary.width"),
    Field("auxiliary_num_convs", 1, "head.auxiliary.convs", 1),
    Field("auxiliary_concat_input", False, "head.auxiliary.joined", False),
)
CLASSES = {
    "Data2VecVisionModel": "image_pooler",
    "Data2VecVisionForImageClassification": "image",
    "Data2VecVisionForSemanticSegmentation": "segmentation",
}
ONLY = {
    "model.encoder.norm": "pre",
    "model.class_tokens": 1,
    "model.sincos": False,
    "model.alibi": None,
    "model.decoder": None,
    "model.encoder.activation_dropout": 0.0,
    "model.encoder.layerdrop": 0.0,
}


def pair(value: Any, what: str, path: Any) -> list[int]:
    """(height, width) of a number or of two."""
    found = [value, value] if isinstance(value, int) else value
    if not isinstance(found, list | tuple) or len(found) != 2:
        raise UserError(f"{path}: config field '{what}' = {value!r} is not a size")
    return [int(x) for x in found]


def configure(source: Source) -> Config:
    """config.json of data2vec-vision -> ours."""
    theirs = source.config
    fields.refuse(theirs, FOREIGN, source.path)
    head = CLASSES[fields.architecture(theirs, CLASSES, source.path)]
    image = pair(theirs.get("image_size", 224), "image_size", source.path)
    patch = pair(theirs.get("patch_size", 16), "patch_size", source.path)
    channels = theirs.get("num_channels", 3)
    processor = _processor(source, channels)
    config: Config = {
        "modality": "vision",
        "model": {
            "image": image,
            "patch": patch,
            "resampling": "huggingface",
            "mean": list(processor.mean),
            "std": list(processor.std),
            "encoder": {"norm": "pre", "qkv_bias": "qv", "relative": None},
        },
    }
    fields.take(FIELDS, theirs, config)
    model = config["model"]
    if theirs.get("use_relative_position_bias"):
        model["encoder"]["relative"] = [a // b for a, b in zip(image, patch, strict=True)]
    pooling = "class" if model["final_norm"] else "mean"
    eps = model["encoder"]["eps"]
    if head == "image":
        config["head"] = {"name": head, "classes": labels(theirs), "pooling": pooling, "eps": eps}
        fields.take((PROBLEM,), theirs, config)
    elif head == "segmentation":
        config["head"] = {"name": head, "classes": labels(theirs)}
        fields.take(SEGMENTATION, theirs, config)
        config["head"]["auxiliary"] = None
        if theirs.get("use_auxiliary_head", True):
            config["head"]["auxiliary"] = {}
            fields.take(AUXILIARY, theirs, config)
        if any(name.startswith("decode_head.bottleneck.") for name in source.state):
            config["hf_major"] = 4
    elif pooling == "class" or any("pooler.layernorm." in name for name in source.state):
        config["head"] = {"name": head, "pooling": pooling, "eps": eps}
    return config


def _processor(source: Source, channels: int) -> Processor:
    """The processor in the source's folder, or the usual one."""
    path = source.folder / "preprocessor_config.json" if source.folder else None
    found = Processor.of(files.read_json(path)) if path and path.is_file() else Processor()
    if len(found.mean) == channels:
        return found
    return Processor(mean=(0.5,) * channels, std=(0.5,) * channels)


def _size(value: Any) -> int | list[int]:
    height, width = pair(value, "", "")
    return height if height == width else [height, width]


def describe(config: Config) -> Config:
    """Ours -> config.json of data2vec-vision."""
    what = "Hugging Face's data2vec-vision"
    fields.demand(config, ONLY, what)
    head = fields.get(config, "head.name", "image_pooler")
    found = [name for name, kind in CLASSES.items() if kind == head]
    if not found:
        raise UserError(f"config.head.name: {what} has no class for '{head}'")
    model = config["model"]
    if fields.get(config, "model.encoder.qkv_bias", "qkv") == "qkv":
        raise UserError(f"config.model.encoder.qkv_bias: {what} has no biases of keys; only 'qv'")
    image, patch = (pair(model.get(k, d), k, "config.model") for k, d in DEFAULT_SIZES.items())
    theirs = fields.give(FIELDS, config) | {
        "architectures": found,
        "image_size": _size(image),
        "patch_size": _size(patch),
        "num_channels": len(model.get("mean", (0, 0, 0))),
        "use_relative_position_bias": bool(fields.get(config, "model.encoder.relative")),
    }
    _refuse_other_grids(model, theirs, image, patch)
    head_fields: Config = {}
    if head == "segmentation":
        head_fields = fields.give(SEGMENTATION, config)
        head_fields["use_auxiliary_head"] = config["head"].get("auxiliary") is not None
        if head_fields["use_auxiliary_head"]:
            head_fields |= fields.give(AUXILIARY, config)
    elif fields.get(config, "head.pooling", "class") == "mean":
        head_fields = {"use_mean_pooling": True, "layer_norm_eps": config["head"]["eps"]}
    if head == "image":
        head_fields |= fields.give((PROBLEM,), config)
    return described(config, "data2vec-vision", agreeing(theirs, head_fields), MEANING)


MEANING = {
    "image_size": lambda size: pair(size, "image_size", "config"),
    "patch_size": lambda size: pair(size, "patch_size", "config"),
    "layer_scale_init_value": lambda value: value > 0 and value,
    "out_indices": sorted,
}
DEFAULT_SIZES = {"image": 224, "patch": 16}


def _refuse_other_grids(model: Config, theirs: Config, image: list[int], patch: list[int]) -> None:
    """Its class misreads relative biases of grids that are not square, unless they come from it."""
    rows, columns = (a // b for a, b in zip(image, patch, strict=True))
    relative = theirs["use_relative_position_bias"] or theirs["use_shared_relative_position_bias"]
    positions = relative or theirs["use_absolute_position_embeddings"]
    if positions and rows != columns and model.get("resampling") != "huggingface":
        raise UserError(
            f"config.model.image: Hugging Face's class computes other positions for a grid of "
            f"{rows} x {columns} patches; only square ones can be exported"
        )


def prefix(config: Config) -> str:
    """Prefix of the encoder's names."""
    bare = (None, "image_pooler", "pooler")
    return "" if fields.get(config, "head.name") in bare else "data2vec_vision."


def table(config: Config) -> Table:
    """Names of data2vec-vision; with a head, the encoder's have a prefix."""
    head, p = fields.get(config, "head.name"), prefix(config)
    layer, block = f"{p}encoder.layer.{{l}}", "encoder/blocks"
    inner, bias = f"{layer}.attention.attention", "relative_position_bias_table"
    qkv = tuple(f"{inner}.{name}.weight" for name in ("query", "key", "value"))
    biases = [
        Row(f"{inner}.query.bias", f"{block}/q_bias"),
        Row(f"{inner}.value.bias", f"{block}/v_bias"),
    ]
    if fields.get(config, "model.encoder.qkv_bias", "qkv") == "qkv":
        names = tuple(name.replace(".weight", ".bias") for name in qkv)
        biases = [Row(names, f"{block}/qkv/bias", FUSED_BIAS)]
    patches = f"{p}embeddings.patch_embeddings.projection"
    rows = [
        Row(f"{p}embeddings.cls_token", "class_token", LEAD2),
        Row(f"{p}embeddings.mask_token", "mask_embedding", LEAD2),
        Row(f"{p}embeddings.position_embeddings", "positions", LEAD1),
        *conv2d(patches, "patches"),
        Row(f"{p}encoder.relative_position_bias.{bias}", "relative_bias"),
        *norm(f"{layer}.layernorm_before", f"{block}/norm1"),
        Row(qkv, f"{block}/qkv/kernel", FUSED_LINEAR),
        *biases,
        Row(f"{inner}.relative_position_bias.{bias}", f"{block}/relative_bias"),
        *linear(f"{layer}.attention.output.dense", f"{block}/out"),
        Row(f"{layer}.lambda_1", f"{block}/layer_scale1"),
        *norm(f"{layer}.layernorm_after", f"{block}/norm2"),
        *linear(f"{layer}.intermediate.dense", f"{block}/up"),
        *linear(f"{layer}.output.dense", f"{block}/down"),
        Row(f"{layer}.lambda_2", f"{block}/layer_scale2"),
        *norm(f"{p}layernorm", "norm"),
    ]
    if head == "segmentation":
        rows += _segmentation_rows()
    else:
        rows += norm(f"{p}pooler.layernorm", "task/norm") + linear("classifier", "task/output")
        rows += linear(f"{p}pooler.dense", "task/pooler")
    return Table(rows, {r"relative_position_index$": "computed from the grid"})


def constants(config: Config) -> State:
    """Biases of zero for models that have none of queries and values."""
    encoder, width = config["model"]["encoder"], config["model"]["width"]
    if encoder.get("qkv_bias") != "none":
        return {}
    p = prefix(config)
    return {
        f"{p}encoder.layer.{l}.attention.attention.{name}.bias": np.zeros(width, np.float32)
        for l in range(encoder["depth"])
        for name in ("query", "value")
    }


def conv2d(theirs: str, ours: str) -> list[Row]:
    """Rows of a convolution over an image."""
    return linear(theirs, ours, CONV2D)


def _batch_norm(theirs: str, ours: str) -> list[Row]:
    return [
        *norm(theirs, ours),
        Row(f"{theirs}.running_mean", f"{ours}/mean"),
        Row(f"{theirs}.running_var", f"{ours}/var"),
        Row(f"{theirs}.num_batches_tracked", f"{ours}/batches", COUNT),
    ]


def _segmentation_rows() -> list[Row]:
    head, extra = "decode_head", "auxiliary_head"
    convs = {
        f"{head}.psp_modules.blocks.{{i}}.conv": "pool{i}",
        f"{head}.psp_bottleneck": "context",
        f"{head}.lateral_convs.{{i}}": "side{i}",
        f"{head}.fpn_convs.{{i}}": "smooth{i}",
        f"{head}.fpn_bottleneck": "fuse",
        f"{extra}.convs.{{i}}": "auxiliary/conv{i}",
        f"{extra}.conv_cat": "auxiliary/joined",
    }
    rows = [
        *linear("fpn1.0", "task/up4_first", DOUBLE),
        *_batch_norm("fpn1.1", "task/up4_norm"),
        *linear("fpn1.3", "task/up4_second", DOUBLE),
        *linear("fpn2.0", "task/up2", DOUBLE),
        *conv2d(f"{head}.classifier", "task/output"),
        *conv2d(f"{extra}.classifier", "task/auxiliary/output"),
    ]
    for theirs, ours in convs.items():
        rows.append(Row(f"{theirs}.convolution.weight", f"task/{ours}/conv/kernel", CONV2D))
        rows += _batch_norm(f"{theirs}.normalization", f"task/{ours}/norm")
    return rows


# Names of the segmentation heads in transformers 4 -> 5; neither version reads the other's.
_HEADS = r"^((?:decode|auxiliary)_head\..*)"
TO_5 = (
    (r"^decode_head\.psp_modules\.(\d+)\.1\.", r"decode_head.psp_modules.blocks.\1.conv."),
    (r"^decode_head\.bottleneck\.", "decode_head.psp_bottleneck."),
    (_HEADS + r"\.conv\.weight$", r"\1.convolution.weight"),
    (_HEADS + r"\.bn\.", r"\1.normalization."),
)
TO_4 = (
    (_HEADS + r"\.convolution\.weight$", r"\1.conv.weight"),
    (_HEADS + r"\.normalization\.", r"\1.bn."),
    (r"^decode_head\.psp_modules\.blocks\.(\d+)\.conv\.", r"decode_head.psp_modules.\1.1."),
    (r"^decode_head\.psp_bottleneck\.", "decode_head.bottleneck."),
)


def _replaced(names: Mapping[str, Any], changes: Any) -> dict[str, Any]:
    found = {}
    for name, value in names.items():
        for pattern, new in changes:
            name = re.sub(pattern, new, name)
        found[name] = value
    return found


_prefixed = with_prefix("data2vec_vision.", r"(classifier|fpn[12]|decode_head|auxiliary_head)\.")


def rename(state: Mapping[str, Any], config: Config) -> dict[str, Any]:
    """Their names -> the table's: prefix, and segmentation heads of transformers 4."""
    wanted = config if fields.get(config, "head.name") != "image_pooler" else {}
    return _replaced(_prefixed(state, wanted), TO_5)


def rename_back(state: Mapping[str, Any], config: Config) -> dict[str, Any]:
    """The table's names -> theirs; `hf_major` 4 has other segmentation heads."""
    return _replaced(state, TO_4) if config.get("hf_major", 5) == 4 else dict(state)


LAYOUTS = [
    Layout(
        name="data2vec-vision",
        kind="huggingface",
        to="hf",
        modality="vision",
        claims=claims("data2vec-vision"),
        configure=configure,
        table=table,
        describe=describe,
        drops=PRETRAINING,
        rename=rename,
        rename_back=rename_back,
        constants=constants,
        holds=first,
        arguments=lambda inputs: {"pixel_values": inputs["image"].transpose(0, 3, 1, 2)},
    )
]
