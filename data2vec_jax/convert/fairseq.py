"""fairseq's data2vec 1.0 for speech and text (finetuning_and_conversion 5.1-2).

fairseq keeps the teacher in a dict of its own (`_ema`, for text `encoder._ema`) whose names start
inside the averaged module; of the whole model if the teacher averages all of it.
"""

import ast
from collections.abc import Mapping
from typing import Any

import numpy as np

from data2vec_jax.convert import fields
from data2vec_jax.convert.fields import Config, Field
from data2vec_jax.convert.layouts import Layout, Source, has
from data2vec_jax.convert.tables import (
    CONV1D,
    FUSED_BIAS,
    FUSED_LINEAR,
    Entry,
    Row,
    Table,
    below,
    conv1d,
    head,
    inside,
    linear,
    norm,
)
from data2vec_jax.core.errors import UserError


def _layers(theirs: str) -> list[Row]:
    """Rows of the Transformer layers below `theirs`."""
    layer, block = f"{theirs}.{{l}}", "encoder/blocks"
    qkv = [f"{layer}.self_attn.{name}_proj" for name in "qkv"]
    return [
        Row(tuple(f"{name}.weight" for name in qkv), f"{block}/qkv/kernel", FUSED_LINEAR),
        Row(tuple(f"{name}.bias" for name in qkv), f"{block}/qkv/bias", FUSED_BIAS),
        *linear(f"{layer}.self_attn.out_proj", f"{block}/out"),
        *norm(f"{layer}.self_attn_layer_norm", f"{block}/norm1"),
        *linear(f"{layer}.fc1", f"{block}/up"),
        *linear(f"{layer}.fc2", f"{block}/down"),
        *norm(f"{layer}.final_layer_norm", f"{block}/norm2"),
    ]


SPEECH = Table(
    rows=[
        Row("mask_emb", "mask_embedding"),
        *conv1d("feature_extractor.conv_layers.{i}.0", "frontend/conv{i}"),
        *norm("feature_extractor.conv_layers.{i}.2.1", "frontend/norm{i}"),
        # The extractor with one norm over time, after its first convolution.
        *norm("feature_extractor.conv_layers.0.2", "frontend/time_norm"),
        *norm("layer_norm", "frontend/norm"),
        *linear("post_extract_proj", "frontend/projection"),
        *conv1d("encoder.pos_conv.{i}.0", "positions/conv{i}"),
        # A single positional convolution has normalised weights.
        Row("encoder.pos_conv.0.weight_g", "positions/conv/gain", CONV1D),
        Row("encoder.pos_conv.0.weight_v", "positions/conv/kernel", CONV1D),
        Row("encoder.pos_conv.0.bias", "positions/conv/bias"),
        *norm("encoder.layer_norm", "norm"),
        *_layers("encoder.layers"),
        *linear("final_proj", "head/linear0"),
    ],
    aliases=[(r"^final_proj\.0\.", "final_proj.")],
)
SPEECH_TEACHER = inside(SPEECH, "encoder.")

TEXT = Table(
    rows=[
        Row("encoder.sentence_encoder.embed_tokens.weight", "embeddings/tokens"),
        Row("encoder.sentence_encoder.embed_positions.weight", "embeddings/positions"),
        *norm("encoder.sentence_encoder.layernorm_embedding", "embeddings/norm"),
        *_layers("encoder.sentence_encoder.layers"),
        *norm("encoder.sentence_encoder.layer_norm", "norm"),
        *head("encoder.regression_head", "head"),
    ],
    ignored={r"(^|\.)version$": "of a layout long gone"},
    aliases=[(r"^decoder\.", "encoder."), (r"\.emb_layer_norm\.", ".layernorm_embedding.")],
)
TEXT_TEACHER = inside(TEXT, "encoder.sentence_encoder.")


# Settings -----------------------------------------------------------------------------------------


def settings(source: Source) -> Mapping[str, Any]:
    """The section of the model in a checkpoint's `cfg`; older files have everything in `args`."""
    cfg = source.config.get("cfg") or {}
    found = cfg.get("model") or source.config.get("args")
    if not isinstance(found, Mapping):
        raise UserError(f"{source.path}: the file has no settings (cfg.model)")
    return found


def number(source: Source, value: Any) -> float:
    """YAML reads 1e-5 as a text."""
    try:
        return float(value)
    except (TypeError, ValueError):
        raise UserError(f"{source.path}: {value!r} in its settings is not a number") from None


def conv_stack(spec: str, path: Any) -> list[list[int]]:
    """'[(512, 10, 5)] + [(512, 3, 2)] * 4' -> [[channels, kernel, stride], ...]."""

    def value(node):
        match node:
            case ast.List(elts=elements) | ast.Tuple(elts=elements):
                return [value(element) for element in elements]
            case ast.Constant(value=int(number)):
                return number
            case ast.BinOp(left=left, op=ast.Add(), right=right):
                return value(left) + value(right)
            case ast.BinOp(left=left, op=ast.Mult(), right=right):
                return value(left) * value(right)
        raise ValueError

    try:
        stack = value(ast.parse(spec, mode="eval").body)
        if all(len(conv) == 3 for conv in stack):
            return stack
    except (ValueError, SyntaxError, TypeError):
        pass
    raise UserError(f"{path}: cannot read the convolutions '{spec}'")


def spelled(convs: Any) -> str:
    """The inverse of `conv_stack`."""
    return "[" + ", ".join(str(tuple(conv)) for conv in convs) + "]"


DEFAULT_CONVS = "[(512, 10, 5)] + [(512, 3, 2)] * 4 + [(512, 2, 2)] * 2"


def stored(state: Mapping[str, Any], config: Config) -> dict[str, Any]:
    """The nested dict of a file: the teacher's tensors are in a dict of their own."""
    model: dict[str, Any] = {}
    for name, tensor in state.items():
        above, ema, rest = name.partition("_ema.")
        if ema:
            model.setdefault(f"{above}_ema", {})[rest] = tensor
        else:
            model[name] = tensor
    return {"model": model, "extra_state": {}, "optimizer_history": []}


def kept(config: Config, layout: str) -> Config | None:
    """The settings that a checkpoint came with, if it came from this layout."""
    origin = config.get("origin") or {}
    return dict(origin["config"]) if origin.get("layout") == layout else None


# Speech -------------------------------------------------------------------------------------------

CTC, CTC_PREFIX = "w2v_encoder.proj", "w2v_encoder.w2v_model."
SPEECH_FIELDS = (
    Field("encoder_embed_dim", 768, "model.width"),
    Field("encoder_layers", 12, "model.encoder.depth"),
    Field("encoder_attention_heads", 12, "model.encoder.heads"),
    Field("encoder_ffn_embed_dim", 3072, "model.encoder.mlp"),
    Field("activation_fn", "gelu", "model.encoder.activation", "gelu"),
    Field(
        "layer_norm_first",
        False,
        "model.encoder.norm",
        "post",
        lambda first: "pre" if first else "post",
        lambda norm: norm == "pre",
    ),
    Field(
        "extractor_mode",
        "default",
        "model.frontend.norm",
        "layer",
        lambda mode: "layer" if mode == "layer_norm" else "group",
        lambda norm: "layer_norm" if norm == "layer" else "default",
    ),
    Field("conv_bias", False, "model.frontend.bias", False),
    Field("conv_pos", 128, "model.positions.width", 95),
    Field("conv_pos_groups", 16, "model.positions.groups", 16),
    Field("pos_conv_depth", 1, "model.positions.depth", 5),
    Field("dropout", 0.1, "model.encoder.dropout", 0.0),
    Field("attention_dropout", 0.1, "model.encoder.attention_dropout", 0.0),
    Field("activation_dropout", 0.0, "model.encoder.activation_dropout", 0.0),
    Field("encoder_layerdrop", 0.0, "model.encoder.layerdrop", 0.0),
)
SPEECH_FOREIGN = {
    "layer_type": ("transformer",),
    "pos_enc_type": ("abs", ""),
    "conv_pos_batch_norm": (False,),
    "adp_num": (-1,),
}
SPEECH_FIXED = {
    "model.frontend.kind": "waveform",
    "model.encoder.eps": 1e-5,
    "model.encoder.qkv_bias": "qkv",
    "model.encoder.layer_scale": None,
    "model.encoder.relative": None,
    "model.positions.activation": "gelu",
    "model.frontend.activation": "gelu",
    "model.positions.input_norm": False,
    "model.frontend.eps": 1e-5,
    "model.decoder": None,
    "model.alibi": None,
    "conv_adapter": None,
}


def configure_speech(source: Source) -> Config:
    """cfg of data2vec_audio, or of a CTC model on it, -> ours."""
    theirs, ctc = settings(source), has(source, CTC)
    if ctc:
        theirs = theirs.get("w2v_args") or theirs
        theirs = theirs.get("model") or theirs
    fields.refuse(theirs, SPEECH_FOREIGN, source.path)
    config: Config = {"modality": "speech", "model": {"padding": "reference"}}
    fields.take(SPEECH_FIELDS, theirs, config)
    model = config["model"]
    model["dropout"] = model["encoder"]["dropout"]
    spec = theirs.get("conv_feature_layers") or DEFAULT_CONVS
    model["frontend"]["convs"] = conv_stack(spec, source.path)
    if model["positions"]["depth"] == 1:  # one convolution, whose kernel is normalised
        model["positions"] |= {"norm": "weight"}
    model["mask_embedding"] = has(source, "mask_emb")
    if ctc:
        classes = len(source.state[f"{CTC}.weight"])
        config["head"] = {"name": "ctc", "vocab_size": classes, "zero_infinity": True}
    if has(source, "_ema."):  # of the encoder, or of the whole model
        config["teacher"] = "model" if has(source, "_ema.encoder.") else "encoder"
    return config


def describe_speech(config: Config) -> Config:
    """Ours -> cfg."""
    if found := kept(config, "fairseq data2vec audio 1.0"):
        return found
    fields.demand(config, SPEECH_FIXED, "fairseq's data2vec_audio")
    theirs = {"_name": "data2vec_audio"} | fields.give(SPEECH_FIELDS, config)
    positions = fields.get(config, "model.positions", {})
    if (positions.get("norm", "layer") == "weight") != (theirs["pos_conv_depth"] == 1):
        raise UserError("config.model.positions.norm: fairseq normalises weights at depth 1 only")
    if kernel := positions.get("kernel"):
        theirs["conv_pos"] = kernel * max(theirs["pos_conv_depth"], 1)
        if kernel < 3:
            raise UserError("config.model.positions.kernel: fairseq's are 3 or more")
    convs = fields.get(config, "model.frontend.convs")
    theirs["conv_feature_layers"] = spelled(convs) if convs else DEFAULT_CONVS
    task = {"_name": "audio_pretraining", "normalize": True}
    cfg = {"model": theirs, "task": task}
    if fields.get(config, "head.name") == "ctc":
        blank = fields.get(config, "head.blank", 0)
        if blank:
            raise UserError(f"config.head.blank: fairseq's is 0, not {blank}")
        cfg = {
            "model": {"_name": "wav2vec_ctc", "w2v_args": cfg},
            "task": {"_name": "audio_finetuning", "normalize": True, "labels": "ltr"},
        }
    elif config.get("head"):
        raise UserError(f"config.head.name: fairseq has no place for '{config['head']['name']}'")
    return {"cfg": cfg}


def speech_table(config: Config) -> Table:
    """Names of data2vec_audio, and of its teacher."""
    p = CTC_PREFIX if config.get("head") else ""
    teacher = SPEECH if config.get("teacher") == "model" else SPEECH_TEACHER
    rows = [
        *below(SPEECH, p),
        *below(teacher, f"{p}_ema.", "teacher/"),
        *linear(CTC, "task/output"),
    ]
    return Table(rows, SPEECH.ignored)


def older_speech(state: Mapping[str, Any], config: Config) -> dict[str, Any]:
    """Released files number the one layer of the prediction head."""
    return {name.replace("final_proj.0.", "final_proj."): x for name, x in state.items()}


# Text ---------------------------------------------------------------------------------------------

TEXT_PREFIX = "encoder.sentence_encoder."
HEAD = "classification_heads."
TEXT_FIELDS = (
    Field("embed_dim", 768, "model.width"),
    Field("layers", 12, "model.encoder.depth"),
    Field("attention_heads", 12, "model.encoder.heads"),
    Field("ffn_embed_dim", 3072, "model.encoder.mlp"),
    Field(
        "normalize_before",
        False,
        "model.encoder.norm",
        "post",
        lambda first: "pre" if first else "post",
        lambda norm: norm == "pre",
    ),
    Field("layerdrop", 0.0, "model.encoder.layerdrop", 0.0),
)
TEXT_DROPOUTS = (
    Field("activation_fn", "gelu", "model.encoder.activation", "gelu"),
    Field("dropout", 0.1, ("model.encoder.dropout", "model.dropout"), 0.0),
    Field("attention_dropout", 0.1, "model.encoder.attention_dropout", 0.0),
    Field("activation_dropout", 0.0, "model.encoder.activation_dropout", 0.0),
    Field("no_scale_embedding", True, "model.scale", False, lambda no: not no, lambda on: not on),
)
TEXT_FIXED = {
    "model.encoder.eps": 1e-5,
    "model.eps": 1e-5,
    "model.encoder.qkv_bias": "qkv",
    "model.encoder.layer_scale": None,
    "model.encoder.relative": None,
    "model.pad": 1,
    "model.input_norm": False,
    "model.decoder": None,
    "model.alibi": None,
    "model.count_pads": False,
}


def configure_text(source: Source) -> Config:
    """cfg of data2vec_text -> ours."""
    theirs = settings(source)
    transformer = theirs.get("transformer") or {}
    encoder = transformer.get("encoder") or {}
    config: Config = {"modality": "text", "model": {"padding": "reference"}}
    fields.take(TEXT_FIELDS, encoder, config)
    fields.take(TEXT_DROPOUTS, transformer, config)
    names = [n for n in source.state if n.endswith(".embed_tokens.weight") and "_ema" not in n]
    if not names:
        raise UserError(f"{source.path}: the weights lack '{TEXT_PREFIX}embed_tokens.weight'")
    tokens, positions = (
        len(source.state[names[0].replace("embed_tokens", x)])
        if names[0].replace("embed_tokens", x) in source.state
        else 0
        for x in ("embed_tokens", "embed_positions")
    )
    config["model"] |= {"vocab_size": tokens, "max_length": positions - 2}
    config["model"]["head"] = regression(source, "regression_head.")
    if has(source, "_ema."):
        config["teacher"] = "encoder"
    if heads := head_names(source):
        weight = f"{HEAD}{heads[0]}.out_proj.weight"
        if weight not in source.state:
            raise UserError(f"{source.path}: the weights lack '{weight}'")
        classes = len(source.state[weight])
        config["head"] = {"name": "sequence", "classes": classes}
    return config


def regression(source: Source, name: str) -> dict[str, int]:
    """Section `model.head` of a head whose layers are numbered 0, 2, 4, ... below `name`."""
    found = [
        (key, x)
        for key, x in source.state.items()
        if name in key and key.endswith(".weight") and "_ema" not in key
    ]
    return {"depth": len(found), "hidden": found[0][1].shape[0]} if found else {}


def head_names(source: Source) -> list[str]:
    """Names of the classification heads, in their order."""
    parts = [n.partition(HEAD)[2].split(".")[0] for n in source.state if HEAD in n]
    return list(dict.fromkeys(parts))


def describe_text(config: Config) -> Config:
    """Ours -> cfg."""
    if found := kept(config, "fairseq data2vec text 1.0"):
        return found
    fields.demand(config, TEXT_FIXED, "fairseq's data2vec_text")
    if fields.get(config, "head.name", "sequence") not in ("sequence", "pooler"):
        raise UserError(f"config.head.name: fairseq has no place for '{config['head']['name']}'")
    length = fields.get(config, "model.max_length", 512)
    transformer = fields.give(TEXT_DROPOUTS, config) | {
        "max_source_positions": length,
        "layernorm_embedding": True,
        "encoder": fields.give(TEXT_FIELDS, config) | {"learned_pos": True},
    }
    theirs = {"_name": "data2vec_text", "max_positions": length, "transformer": transformer}
    theirs["head_layers"] = fields.get(config, "model.head.depth", 2)
    return {"cfg": {"model": theirs}}


def text_table(config: Config) -> Table:
    """Names of data2vec_text, and of its teacher."""
    rows = [*TEXT.rows, *below(TEXT_TEACHER, "encoder._ema.", "teacher/")]
    name = fields.get(config, "head.name")
    if name == "sequence":
        rows += linear(f"{HEAD}sentence_classification_head.dense", "task/dense")
        rows += linear(f"{HEAD}sentence_classification_head.out_proj", "task/output")
    return Table(rows, TEXT.ignored)


def text_names(state: Mapping[str, Any], config: Config) -> dict[str, Any]:
    """Names of older files, and the first classification head under the usual name."""
    heads = list(dict.fromkeys(n.split(".")[1] for n in state if n.startswith(HEAD)))
    renamed = {}
    for name, tensor in state.items():
        if name.startswith("decoder."):
            name = "encoder." + name.removeprefix("decoder.")
        name = name.replace(".emb_layer_norm.", ".layernorm_embedding.")
        if heads and name.startswith(f"{HEAD}{heads[0]}."):
            rest = name.removeprefix(f"{HEAD}{heads[0]}.")
            name = f"{HEAD}sentence_classification_head.{rest}"
        renamed[name] = tensor
    return renamed


def text_constants(config: Config) -> dict[str, np.ndarray]:
    """The version of their encoder's layout."""
    names = ["encoder.sentence_encoder.version"]
    if config.get("teacher"):
        names.append("encoder._ema.version")
    return {name: np.full(1, 3, np.float32) for name in names}


def one_segment(entries: list[Entry]) -> list[Entry]:
    """Positions with the vector of the only segment added, if it is not zero."""
    types = {x.name: x for x in entries if x.name.endswith("embeddings/types")}
    for found in types.values():
        if found.shape[0] > 1:
            raise UserError(f"config.model.types: fairseq has one segment, not {found.shape[0]}")

    def fitted(entry):
        segment = types.get(entry.name.removesuffix("positions") + "types")
        vector = segment.make()[0] if segment else np.zeros(1)
        return entry._replace(make=lambda: entry.make() + vector) if vector.any() else entry

    return [fitted(x) if x.name.endswith("embeddings/positions") else x for x in entries]


LAYOUTS = [
    Layout(
        name="fairseq data2vec audio 1.0",
        kind="pickle",
        to="fairseq",
        modality="speech",
        claims=lambda source: has(source, "post_extract_proj"),
        configure=configure_speech,
        table=speech_table,
        describe=describe_speech,
        holds=lambda config: fields.generation(config) == "1.0",
        rename=older_speech,
        store=stored,
    ),
    Layout(
        name="fairseq data2vec text 1.0",
        kind="pickle",
        to="fairseq",
        modality="text",
        claims=lambda source: has(source, "sentence_encoder.embed_tokens"),
        configure=configure_text,
        table=text_table,
        describe=describe_text,
        holds=lambda config: fields.generation(config) == "1.0",
        rename=text_names,
        drops={
            r"^task/pooler/": "fairseq's encoder has no pooler",
            r"embeddings/types$": "fairseq's has no segments; the vector is in the positions",
        },
        constants=text_constants,
        store=stored,
        fit=one_segment,
    ),
]
