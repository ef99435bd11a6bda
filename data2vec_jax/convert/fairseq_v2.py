"""fairseq's data2vec 2.0 (finetuning_and_conversion 5.4).

All modalities share one class of model. Parameters of the modality's encoder are below
`modality_encoders.{AUDIO,IMAGE,TEXT}`, those of its lowest ("prenet") blocks among them. The other
blocks are at the top, numbered from 0 again. Ours are one stack: `joined` and `parted` renumber.

The teacher has the same names, or, for text, is a list of blocks only.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from data2vec_jax.convert import fields
from data2vec_jax.convert.fairseq import (
    CTC,
    CTC_PREFIX,
    DEFAULT_CONVS,
    HEAD,
    conv_stack,
    head_names,
    kept,
    number,
    regression,
    settings,
    spelled,
    stored,
)
from data2vec_jax.convert.fields import Config, Field
from data2vec_jax.convert.layouts import Layout, Source, has
from data2vec_jax.convert.tables import (
    CONV1D,
    CONV2D,
    Change,
    Row,
    State,
    Table,
    below,
    conv1d,
    head,
    inside,
    linear,
    norm,
)
from data2vec_jax.core.errors import UserError
from data2vec_jax.models.positions import sincos

MANY = 32  # more convolutions than any stack has
BUFFERS = {
    "^_ema$": "read by itself",
    r"\.alibi_bias$": "computed from the length; of an older file",
    r"\.encoder_mask$": "unused; of an older file",
}

# [1 or L, 1, 1 or H, 1, 1] (in older files without the first axis) -> [1 or L, 1 or H]
SCALES = Change(
    lambda x: x[0].reshape(-1, *x[0].shape[-4:])[:, 0, :, 0, 0],
    lambda x: [x[:, None, :, None, None]],
)
# [1, E, D] -> [E, D], or [D] if there is one
EXTRA = Change(
    lambda x: x[0][0, 0] if x[0].shape[1] == 1 else x[0][0],
    lambda x: [x.reshape(1, -1, x.shape[-1])],
)

BLOCKS = [
    *linear("blocks.{l}.attn.qkv", "encoder/blocks/qkv"),
    *linear("blocks.{l}.attn.proj", "encoder/blocks/out"),
    *norm("blocks.{l}.norm1", "encoder/blocks/norm1"),
    *linear("blocks.{l}.mlp.fc1", "encoder/blocks/up"),
    *linear("blocks.{l}.mlp.fc2", "encoder/blocks/down"),
    *norm("blocks.{l}.norm2", "encoder/blocks/norm2"),
]


def _context(mode: str) -> list[Row]:
    """Rows of the parameters between front end and blocks."""
    return [
        Row(f"{mode}.alibi_scale", "alibi/scale", SCALES),
        Row(f"{mode}.extra_tokens", "class_token", EXTRA),
        *norm(f"{mode}.context_encoder.norm", "norm"),
    ]


def _decoder(mode: str, change: Change, deep: bool) -> list[Row]:
    """Rows of decoder and head. deep: the head has several layers."""
    conv = f"{mode}.decoder.blocks.{{i}}.0"
    return [
        Row(f"{conv}.weight", "decoder/conv{i}/kernel", change),
        Row(f"{conv}.bias", "decoder/conv{i}/bias"),
        *(
            head(f"{mode}.decoder.proj", "head")
            if deep
            else linear(f"{mode}.decoder.proj", "head/linear0")
        ),
    ]


def speech(deep: bool = False, input_norm: bool = False) -> Table:
    """data2vec 2.0 for speech. deep: of the decoder's head, as in the other two. input_norm: of the
    positional convolutions."""
    mode = "modality_encoders.AUDIO"
    local, positions = f"{mode}.local_encoder.conv_layers", f"{mode}.relative_positional_encoder"
    rows = [
        *conv1d(f"{local}.{{i}}.0", "frontend/conv{i}"),
        *norm(f"{local}.{{i}}.2.1", "frontend/norm{i}"),
        *norm(f"{local}.0.2", "frontend/time_norm"),
        *norm(f"{mode}.project_features.1", "frontend/norm"),
        *linear(f"{mode}.project_features.2", "frontend/projection"),
    ]
    # Theirs count from 1, after a transposition, and are one level below if there is a norm first.
    inner = f"{positions}.1" if input_norm else positions
    rows += norm(f"{positions}.0", "positions/norm")
    for i in range(MANY):
        rows += conv1d(f"{inner}.{i + 1}.0", f"positions/conv{i}")
    return Table([*rows, *_context(mode), *BLOCKS, *_decoder(mode, CONV1D, deep)], BUFFERS)


def vision(deep: bool = False, projected: bool = False) -> Table:
    """data2vec 2.0 for vision. projected: patches have another width first."""
    mode = "modality_encoders.IMAGE"
    local = f"{mode}.local_encoder.0" if projected else f"{mode}.local_encoder"
    return Table(
        [
            Row(f"{local}.proj.weight", "patches/kernel", CONV2D),
            Row(f"{local}.proj.bias", "patches/bias"),
            *linear(f"{mode}.local_encoder.1", "patches/projection"),
            *_context(mode),
            *BLOCKS,
            *_decoder(mode, CONV2D, deep),
        ],
        BUFFERS | {r"fixed_positional_encoder\.positions$": "sines, computed from the grid"},
    )


def text(deep: bool = True) -> Table:
    """data2vec 2.0 for text."""
    mode = "modality_encoders.TEXT"
    local = f"{mode}.local_encoder"
    return Table(
        [
            Row(f"{local}.embed_tokens.weight", "embeddings/tokens"),
            Row(f"{local}.embed_positions.weight", "embeddings/positions"),
            *norm(f"{local}.layernorm_embedding", "embeddings/norm"),
            *_context(mode),
            *BLOCKS,
            *_decoder(mode, CONV1D, deep),
        ],
        BUFFERS,
    )


# A teacher that averages blocks only is saved as the list of them.
TEACHER_BLOCKS = inside(Table(BLOCKS), "blocks.")

_PRENET = re.compile(r"(modality_encoders\.\w+\.context_encoder\.)blocks\.(\d+)\.(.*)")
_MAIN = re.compile(r"blocks\.(\d+)\.(.*)")


def joined(state: Mapping[str, np.ndarray]) -> tuple[State, int]:
    """`state` with all blocks numbered through, and the number of prenet blocks."""
    prenet = [m for m in map(_PRENET.fullmatch, state) if m]
    count = len({m[2] for m in prenet})
    names = {m[0]: f"blocks.{m[2]}.{m[3]}" for m in prenet}
    names |= {m[0]: f"blocks.{int(m[1]) + count}.{m[2]}" for m in map(_MAIN.fullmatch, state) if m}
    return {names.get(name, name): array for name, array in state.items()}, count


def parted(state: Mapping[str, np.ndarray], prenet: int, mode: str) -> State:
    """The inverse of `joined`. mode: 'AUDIO', 'IMAGE' or 'TEXT'."""

    def theirs(name):
        found = _MAIN.fullmatch(name)
        if not found:
            return name
        number, rest = int(found[1]), found[2]
        if number >= prenet:
            return f"blocks.{number - prenet}.{rest}"
        return f"modality_encoders.{mode}.context_encoder.blocks.{number}.{rest}"

    return {theirs(name): array for name, array in state.items()}


# Settings -----------------------------------------------------------------------------------------

MODES = {"audio": "AUDIO", "image": "IMAGE", "text": "TEXT"}
MODALITIES = {"speech": "audio", "vision": "image", "text": "text"}
FIELDS = (
    Field("embed_dim", 768, "model.width"),
    Field("num_heads", 12, "model.encoder.heads"),
    Field("attention_dropout", 0.1, "model.encoder.attention_dropout", 0.0),
    Field("activation_dropout", 0.0, "model.encoder.activation_dropout", 0.0),
    Field("encoder_dropout", 0.1, "model.encoder.dropout", 0.0),
    Field("layerdrop", 0.0, "model.encoder.layerdrop", 0.0),
)
ALIBI = (
    Field("alibi_scale", 1.0, "model.alibi.scale", 1.0),
    Field("learned_alibi_scale", False, "model.alibi.learned", True),
    Field("learned_alibi_scale_per_head", False, "model.alibi.per_head", True),
    Field("learned_alibi_scale_per_layer", False, "model.alibi.per_layer", False),
    Field("alibi_distance", "manhattan", "model.alibi.distance", "manhattan"),
)
DECODER = (
    Field("decoder_layers", 5, "model.decoder.layers"),
    Field("decoder_dim", 384, "model.decoder.width"),
    Field("decoder_kernel", 5, "model.decoder.kernel"),
    Field("decoder_groups", 16, "model.decoder.groups", 16),
    Field("decoder_residual", True, "model.decoder.residual", True),
    Field("input_dropout", 0.1, "model.decoder.dropout", 0.0),
)
SPEECH_FIELDS = (
    Field(
        "extractor_mode",
        "layer_norm",
        "model.frontend.norm",
        "layer",
        lambda mode: "layer" if mode == "layer_norm" else "group",
        lambda norm: "layer_norm" if norm == "layer" else "default",
    ),
    Field("conv_pos_depth", 5, "model.positions.depth", 5),
    Field("conv_pos_width", 95, "model.positions.width", 95),
    Field("conv_pos_groups", 16, "model.positions.groups", 16),
    Field("conv_pos_pre_ln", False, "model.positions.input_norm", False),
)
VISION_FIELDS = (
    Field("input_size", 224, "model.image", 224),
    Field("patch_size", 16, "model.patch", 16),
    Field("num_extra_tokens", 1, "model.class_tokens", 1),
    Field("fixed_positions", True, "model.sincos", False),
)
FOREIGN = {  # of the model
    "layer_norm_first": (None, False),
    "norm_affine": (None, True),
    "shared_decoder": (None,),
    "recon_loss": (None, 0, 0.0),
    "num_alibi_heads": (None,),
}
FOREIGN_PART = {  # of the modality
    "learned_alibi": (None, False),
    "alibi_max_pos": (None,),
    "transformer_decoder": (None, False),
    "enc_dec_transformer": (None, False),
    "layernorm_embedding": (None, True),
    "learned_pos": (None, True),
    "no_token_positional_embeddings": (None, False),
}
FIXED = {
    "model.encoder.norm": "post",
    "model.encoder.qkv_bias": "qkv",
    "model.encoder.layer_scale": None,
    "model.encoder.relative": None,
    "model.encoder.activation": "gelu",
    "conv_adapter": None,
}
FIXED_PART = {
    "speech": {
        "model.frontend.kind": "waveform",
        "model.positions.norm": "layer",
        "model.positions.activation": "gelu",
        "model.frontend.activation": "gelu",
        "model.frontend.eps": 1e-5,
        "model.frontend.bias": False,
    },
    "vision": {"model.shared_relative": False, "model.absolute": False},
    "text": {"model.eps": 1e-5, "model.pad": 1, "model.types": 0},
}


def multi(source: Source) -> Mapping[str, Any]:
    """The settings of the pretrained model; a fine-tuned one holds them inside its own."""

    def search(node: Any) -> Iterator[Mapping[str, Any]]:
        if isinstance(node, Mapping):
            if isinstance(node.get("modalities"), Mapping):
                yield node
            for value in node.values():
                yield from search(value)

    for found in search(settings(source)):
        return found
    raise UserError(f"{source.path}: the file has no settings of data2vec 2.0 (modalities)")


def outer(state: Mapping[str, Any]) -> str:
    """Prefix of the encoder's names in a fine-tuned model."""
    for name in state:
        found = re.search(r"^(.*?)(modality_encoders\.|_ema\.)", name)
        if found:
            return found[1]
    return ""


def configure(source: Source) -> Config:
    """cfg of data2vec_multi, with one modality, or of a model fine-tuned from it -> ours."""
    theirs = multi(source)
    name = next((x for x in MODES if has(source, f"modality_encoders.{MODES[x]}.")), None)
    part = (theirs.get("modalities") or {}).get(name or "") or {}
    fields.refuse(theirs, FOREIGN, source.path)
    fields.refuse(part, FOREIGN_PART, source.path)
    kind = next(ours for ours, there in MODALITIES.items() if there == name)
    config: Config = {"modality": kind, "model": {}}
    fields.take(FIELDS, theirs, config)
    model, width = config["model"], config["model"]["width"]
    prenet = _count(source, r"context_encoder\.blocks\.(\d+)\.")
    depth = _count(source, r"(?<!context_encoder\.)(?<!decoder\.)(?<!_ema\.)\bblocks\.(\d+)\.")
    eps = theirs.get("norm_eps")
    model["encoder"] |= {
        "depth": prenet + depth,
        "eps": number(source, 1e-6 if eps is None else eps),
        "mlp": int(width * number(source, theirs.get("mlp_ratio") or 4)),
    }
    model["dropout"] = number(source, theirs.get("dropout_input") or 0.0)
    config["prenet"] = prenet
    if part.get("use_alibi_encoder"):
        fields.take(ALIBI, part, config)
        if part.get("alibi_dims", 1) != (2 if kind == "vision" else 1):
            raise UserError(f"{source.path}: config field 'alibi_dims' is not supported")
        if not model["alibi"]["learned"]:  # a constant is stored all the same
            stored_scale = [x for n, x in source.state.items() if n.endswith("alibi_scale")]
            scale = float(stored_scale[0].reshape(-1)[0]) if stored_scale else 1.0
            model["alibi"]["scale"] = max(scale, 0.0)
    if has(source, ".decoder."):
        fields.take(DECODER, part.get("decoder") or {}, config)
        if kind == "vision" or not has(source, ".decoder.proj.0."):
            model["head"] = {"depth": 1, "initializer": "torch"}
        else:
            model["head"] = regression(source, ".decoder.proj.") | {"initializer": "torch"}
    READ[kind](source, part, config)
    if has(source, "_ema."):
        config["teacher"] = "encoder" if has(source, "_ema.0.") else "model"
    return config


def _count(source: Source, pattern: str) -> int:
    found = {m[1] for m in (re.search(pattern, name) for name in source.state) if m}
    return len(found)


def read_speech(source: Source, part: Mapping[str, Any], config: Config) -> None:
    model = config["model"]
    model["padding"] = "attention"
    fields.take(SPEECH_FIELDS, part, config)
    spec = part.get("feature_encoder_spec") or DEFAULT_CONVS
    model["frontend"]["convs"] = conv_stack(spec, source.path)
    model["mask_embedding"] = False  # masked frames are noise or zeros
    if has(source, CTC):
        classes = len(source.state[f"{CTC}.weight"])
        config["head"] = {"name": "ctc", "vocab_size": classes, "zero_infinity": True}


def read_vision(source: Source, part: Mapping[str, Any], config: Config) -> None:
    model = config["model"]
    fields.take(VISION_FIELDS, part, config)
    for name, array in source.state.items():  # patches of another width than the model's
        if name.endswith("IMAGE.local_encoder.1.weight") and "_ema." not in name:
            model["patch_width"] = array.shape[1]
    channels = part.get("in_chans") or 3
    model |= {"shared_relative": False, "initializer": "bert", "mask_embedding": False}
    if channels != 3:
        model |= {"mean": [0.5] * channels, "std": [0.5] * channels}
    if has(source, "fc_norm."):
        if model["class_tokens"] != 1:
            raise UserError(f"{source.path}: a head needs one class token")
        classes = len(source.state["head.weight"]) if "head.weight" in source.state else 0
        config["head"] = {"name": "image", "classes": classes, "pooling": "mean", "eps": 1e-6}


def read_text(source: Source, part: Mapping[str, Any], config: Config) -> None:
    model, names = config["model"], list(source.state)
    local = next(n for n in names if n.endswith("local_encoder.embed_tokens.weight"))
    positions = source.state.get(local.replace("embed_tokens", "embed_positions"))
    model |= {
        "padding": "attention",
        "vocab_size": len(source.state[local]),
        "max_length": (0 if positions is None else len(positions)) - 2,
        "scale": not part.get("no_scale_embedding", True),
    }
    if config["prenet"]:
        model["input_norm"] = True
    if head_names(source):
        weight = next((x for n, x in source.state.items() if "out_proj.weight" in n), ())
        config["head"] = {"name": "sequence", "classes": len(weight)}


READ = {"speech": read_speech, "vision": read_vision, "text": read_text}


def describe(config: Config) -> Config:
    """Ours -> cfg."""
    kind = config["modality"]
    if found := kept(config, LAYOUT_NAMES[kind]):
        return found
    fields.demand(config, FIXED | FIXED_PART[kind], "fairseq's data2vec_multi")
    model = config["model"]
    encoder, width = model["encoder"], model["width"]
    part: Config = {"prenet_depth": config.get("prenet", 0)}
    part["use_alibi_encoder"] = bool(model.get("alibi"))
    if model.get("alibi") is not None:
        part |= fields.give(ALIBI, config) | {"alibi_dims": 2 if kind == "vision" else 1}
    if model.get("decoder"):
        part["decoder"] = fields.give(DECODER, config)
        part["decoder"]["projection_layers"] = fields.get(
            config, "model.head.depth", 2 if kind == "text" else 1
        )
    if kind == "speech":
        part |= fields.give(SPEECH_FIELDS, config)
        convs = fields.get(config, "model.frontend.convs")
        part["feature_encoder_spec"] = spelled(convs) if convs else DEFAULT_CONVS
        if kernel := fields.get(config, "model.positions.kernel"):
            part["conv_pos_width"] = kernel * part["conv_pos_depth"]
    elif kind == "vision":
        part |= fields.give(VISION_FIELDS, config)
        part["embed_dim"] = model.get("patch_width") or width
        part["in_chans"] = len(model.get("mean") or (0, 0, 0))
    else:
        part["max_source_positions"] = model.get("max_length", 512)
        part["no_scale_embedding"] = not model.get("scale", False)
    theirs = {"_name": "data2vec_multi"} | fields.give(FIELDS, config)
    theirs |= {
        "depth": encoder["depth"] - config.get("prenet", 0),
        "mlp_ratio": encoder["mlp"] / width,
        "norm_eps": encoder.get("eps", 1e-5),
        "layer_norm_first": False,
        "supported_modality": MODES[MODALITIES[kind]],
        "ema_encoder_only": kind == "text",
        "modalities": {MODALITIES[kind]: part},
    }
    cfg: Config = {"model": theirs}
    if config.get("head"):
        name = {
            "ctc": "wav2vec_ctc",
            "sequence": "data2vec_text_classification",
            "image": "mae_image_classification",
        }.get(config["head"]["name"])
        if name is None:
            raise UserError(f"config.head.name: 2.0 has no place for '{config['head']['name']}'")
        cfg = {"model": {"_name": name, "w2v_args": cfg}}
    return {"cfg": cfg}


PREFIXES = {"ctc": CTC_PREFIX, "sequence": "model.", "image": "model."}  # of fine-tuned models
OWN_HEAD = f"{HEAD}sentence_classification_head"


def table(config: Config, prefixes: Mapping[str, str] = PREFIXES, ctc: str = CTC) -> Table:
    """Names of data2vec_multi, of its teacher, and of the heads on it.

    prefixes: head -> what stands before the encoder's names. ctc: name of that head.
    """
    kind, head_name = config["modality"], fields.get(config, "head.name")
    deep = fields.get(config, "model.head.depth", 2 if kind == "text" else 1) > 1
    if kind == "speech":
        norm_first = fields.get(config, "model.positions.input_norm", False)
        own = speech(deep, norm_first)
    elif kind == "vision":
        own = vision(deep, bool(fields.get(config, "model.patch_width")))
    else:
        own = text(deep)
    p = prefixes.get(head_name, "")
    teacher = TEACHER_BLOCKS if config.get("teacher") == "encoder" else own
    rows = [*below(own, p), *below(teacher, f"{p}_ema.", "teacher/")]
    if head_name == "ctc":
        rows += linear(ctc, "task/output")
    elif head_name == "image":
        rows += norm("fc_norm", "task/norm") + linear("head", "task/output")
    elif head_name == "sequence":
        rows += linear(f"{OWN_HEAD}.dense", "task/dense")
        rows += linear(f"{OWN_HEAD}.out_proj", "task/output")
    ignored = {k: reason for k, reason in own.ignored.items() if k != "^_ema$"}
    if not fields.get(config, "model.alibi.learned", True):
        rows = [row for row in rows if not row.names[0].endswith("alibi_scale")]
        ignored[r"alibi_scale$"] = "a constant, in the config"
    return Table(rows, ignored)


def rename(state: Mapping[str, Any], config: Config) -> dict[str, Any]:
    """All blocks numbered through, those of the teacher as well."""
    prefix = outer(state)
    named = _one_head(state, prefix)
    inner = {n.removeprefix(prefix): x for n, x in named.items() if n.startswith(prefix)}
    own = {n: x for n, x in inner.items() if not n.startswith("_ema.")}
    teacher = {n[5:]: x for n, x in inner.items() if n.startswith("_ema.")}
    others = {n: x for n, x in named.items() if not n.startswith(prefix)}
    joint, prenet = joined(own)
    if config.get("teacher") == "encoder":
        # A list of the main blocks; the prenet blocks below them are the student's.
        teacher = {_shift(n, prenet): x for n, x in teacher.items()}
        blocks = {n.removeprefix("blocks."): x for n, x in joint.items() if n.startswith("blocks.")}
        teacher |= {n: x for n, x in blocks.items() if int(n.split(".")[0]) < prenet}
    else:
        teacher, _ = joined(teacher)
    found = {f"{prefix}{n}": x for n, x in joint.items()} | others
    return found | {f"{prefix}_ema.{n}": x for n, x in teacher.items()}


def _shift(name: str, count: int) -> str:
    number, rest = name.split(".", 1)
    return f"{int(number) + count}.{rest}"


def _one_head(state: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """The first classification head under the usual name."""
    state = {n.removeprefix(prefix) if f"{prefix}{HEAD}" in n else n: x for n, x in state.items()}
    first = next((n.removeprefix(HEAD).split(".")[0] for n in state if n.startswith(HEAD)), None)
    return {n.replace(f"{HEAD}{first}.", f"{OWN_HEAD}."): x for n, x in state.items()}


def rename_back(state: Mapping[str, Any], config: Config) -> dict[str, Any]:
    """The inverse of `rename`."""
    prenet, mode = config.get("prenet", 0), MODES[MODALITIES[config["modality"]]]
    prefix = outer(state)
    inner = {n.removeprefix(prefix): x for n, x in state.items() if n.startswith(prefix)}
    others = {n: x for n, x in state.items() if not n.startswith(prefix)}
    own = {n: x for n, x in inner.items() if not n.startswith("_ema.")}
    teacher = {n[5:]: x for n, x in inner.items() if n.startswith("_ema.")}
    if config.get("teacher") == "encoder":
        main = {n: x for n, x in teacher.items() if int(n.split(".")[0]) >= prenet}
        teacher = {_shift(n, -prenet): x for n, x in main.items()}
    else:
        teacher = parted(teacher, prenet, mode)
    found = {f"{prefix}{n}": x for n, x in parted(own, prenet, mode).items()} | others
    return found | {f"{prefix}_ema.{n}": x for n, x in teacher.items()}


def constants(config: Config, prefixes: Mapping[str, str] = PREFIXES) -> dict[str, np.ndarray]:
    """Positions of images, and a scale of ALiBi that is not learned."""
    model, found = config["model"], {}
    mode = f"modality_encoders.{MODES[MODALITIES[config['modality']]]}."
    if model.get("sincos"):
        sizes = [model.get("image", 224), model.get("patch", 16)]
        image, patch = ((size, size) if isinstance(size, int) else size for size in sizes)
        places = sincos((image[0] // patch[0], image[1] // patch[1]), model["width"])
        found[f"{mode}fixed_positional_encoder.positions"] = places[None]
    if model.get("alibi") is not None and not model["alibi"].get("learned", True):
        scale = np.float32(model["alibi"].get("scale", 1.0))
        found[f"{mode}alibi_scale"] = np.full((1, 1, 1, 1, 1), scale)
    p = prefixes.get(fields.get(config, "head.name"), "")
    teacher = found if config.get("teacher") == "model" else {}
    return {p + n: x for n, x in found.items()} | {f"{p}_ema.{n}": x for n, x in teacher.items()}


LAYOUT_NAMES = {kind: f"fairseq data2vec {name} 2.0" for kind, name in MODALITIES.items()}
LAYOUTS = [
    Layout(
        name=LAYOUT_NAMES[kind],
        kind="pickle",
        to="fairseq",
        modality=kind,
        claims=lambda source, mode=MODES[name]: has(source, f"modality_encoders.{mode}."),
        configure=configure,
        table=table,
        describe=describe,
        rename=rename,
        rename_back=rename_back,
        constants=constants,
        store=stored,
        holds=lambda config: fields.generation(config) == "2.0",
        drops={r"^task/pooler/": "fairseq's encoder has no pooler"},
    )
    for kind, name in MODALITIES.items()
]
