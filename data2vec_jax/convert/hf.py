"""Hugging Face's data2vec for speech and text (conversion spec 4.1 to 4.4)."""

import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

from data2vec_jax.convert import fields
from data2vec_jax.convert.fields import Config, Field
from data2vec_jax.convert.layouts import Layout, Source
from data2vec_jax.convert.tables import (
    CONV1D,
    FUSED_BIAS,
    FUSED_LINEAR,
    LINEAR,
    SAME,
    Change,
    Row,
    Table,
    conv1d,
    linear,
    norm,
)
from data2vec_jax.core.errors import UserError

COPIES = Change(lambda x: x[0], lambda x: [x, x])  # two names for one array
PRETRAINING = {
    r"^head/": "the prediction head of pretraining has no place in Hugging Face's classes",
    r"^teacher/": "the teacher of pretraining has no place in Hugging Face's classes",
}
# Fields with an effect that no data2vec model has; they come from other classes or older versions.
FOREIGN = {
    "quantization_config": (None,),
    "pruned_heads": (None, {}),
    "is_decoder": (None, False),
    "add_cross_attention": (None, False),
    "position_embedding_type": (None, "absolute"),
}


def labels(theirs: Mapping[str, Any]) -> int:
    """Number of labels of a Hugging Face config."""
    names = theirs.get("id2label")
    return len(names) if names else int(theirs.get("num_labels") or 2)


def agreeing(encoder: Config, head: Config) -> Config:
    """Fields of both; refuses different values of one field."""
    for name in encoder.keys() & head.keys():
        if encoder[name] != head[name]:
            raise UserError(
                f"config.head and config.model disagree about '{name}': {head[name]}, "
                f"{encoder[name]}"
            )
    return encoder | head


def described(
    config: Config,
    kind: str,
    named: Config,
    meaning: Mapping[str, Callable[[Any], Any]] = MappingProxyType({}),
) -> Config:
    """A Hugging Face config: the original one, if it came from this layout, updated by `named`.

    meaning: field -> function that maps equivalent values to one. Such a field keeps its original
    value if that is equivalent to the one in `named`.
    """
    origin = config.get("origin") or {}
    kept = dict(origin.get("config") or {}) if origin.get("layout") == kind else {}
    said = [k for k in meaning if k in kept and k in named and kept[k] is not None]
    named = named | {k: kept[k] for k in said if meaning[k](kept[k]) == meaning[k](named[k])}
    count = fields.get(config, "head.classes")
    if count is not None and (labels(kept) != count or "labels" in config):
        kept.pop("num_labels", None)
        names = config.get("labels") or [f"LABEL_{i}" for i in range(count)]
        kept["id2label"] = {str(i): name for i, name in enumerate(names)}
        kept["label2id"] = {name: i for i, name in enumerate(names)}
    kept.pop("torch_dtype", None)
    return kept | {"model_type": kind, "dtype": "float32", "torch_dtype": "float32"} | named


def first(config: Config) -> bool:
    """Whether a config of ours is of data2vec 1.0, the only one that Hugging Face has."""
    return fields.generation(config) == "1.0"


def head_name(known: Mapping[str, Any], config: Config) -> str:
    """The class for a config's head."""
    name = fields.get(config, "head.name")
    found = [architecture for architecture, (head, _) in known.items() if head == name]
    if not found:
        raise UserError(f"config.head.name: Hugging Face has no class for '{name}'")
    return found[0]


# Speech -------------------------------------------------------------------------------------------

SPEECH = (
    Field("hidden_size", 768, "model.width"),
    Field("num_hidden_layers", 12, "model.encoder.depth"),
    Field("num_attention_heads", 12, "model.encoder.heads"),
    Field("intermediate_size", 3072, "model.encoder.mlp"),
    Field("hidden_act", "gelu", "model.encoder.activation", "gelu"),
    Field("layer_norm_eps", 1e-5, ("model.encoder.eps", "model.frontend.eps"), 1e-5),
    Field(
        "feat_extract_activation",
        "gelu",
        ("model.frontend.activation", "model.positions.activation"),
        "gelu",
    ),
    Field("conv_bias", False, "model.frontend.bias", False),
    Field("num_conv_pos_embeddings", 5, "model.positions.depth", 5),
    Field("num_conv_pos_embedding_groups", 16, "model.positions.groups", 16),
    Field("attention_dropout", 0.1, "model.encoder.attention_dropout", 0.0),
    Field("activation_dropout", 0.1, "model.encoder.activation_dropout", 0.0),
    Field("layerdrop", 0.1, "model.encoder.layerdrop", 0.0),
)
# Two numbers of ours, of which one is enough for theirs.
SPEECH_DROPOUT = Field("hidden_dropout", 0.1, ("model.encoder.dropout", "model.dropout"), 0.0)
SPEECH_ADAPTER = (
    Field("output_hidden_size", None, "conv_adapter.width"),
    Field("num_adapter_layers", 3, "conv_adapter.layers", 3),
    Field("adapter_kernel_size", 3, "conv_adapter.kernel", 3),
    Field("adapter_stride", 2, "conv_adapter.stride", 2),
)
WEIGHTED = Field("use_weighted_layer_sum", False, "head.weighted", False)
PROBLEM = Field("problem_type", None, "head.problem")
SPEECH_HEADS = {  # class -> (head, fields)
    "Data2VecAudioModel": (None, ()),
    "Data2VecAudioForCTC": (
        "ctc",
        (
            Field("vocab_size", 32, "head.vocab_size"),
            Field("pad_token_id", 0, "head.blank", 0),
            Field("ctc_loss_reduction", "sum", "head.reduction", "sum"),
            Field("ctc_zero_infinity", False, "head.zero_infinity", False),
            Field("final_dropout", 0.1, "head.dropout", 0.0),
        ),
    ),
    "Data2VecAudioForSequenceClassification": (
        "utterance",
        (
            Field("classifier_proj_size", 256, "head.projection", 256),
            WEIGHTED,
        ),
    ),
    "Data2VecAudioForAudioFrameClassification": ("frames", (WEIGHTED,)),
    "Data2VecAudioForXVector": (
        "xvector",
        (
            Field("tdnn_dim", (512, 512, 512, 512, 1500), "head.channels", there=list),
            Field("tdnn_kernel", (5, 3, 3, 1, 1), "head.kernels", there=list),
            Field("tdnn_dilation", (1, 2, 3, 1, 1), "head.dilations", there=list),
            Field("xvector_output_dim", 512, "head.width", 512),
            WEIGHTED,
        ),
    ),
}
CLASSES = ("utterance", "frames", "xvector", "sequence")  # heads with a number of labels
SPEECH_ONLY = {
    "model.frontend.kind": "waveform",
    "model.encoder.norm": "post",
    "model.encoder.qkv_bias": "qkv",
    "model.encoder.layer_scale": None,
    "model.encoder.relative": None,
    "model.frontend.norm": "layer",
    "model.positions.norm": "layer",
    "model.positions.input_norm": False,
    "model.decoder": None,
    "model.alibi": None,
}
STACK = (512,) * 7, (10, 3, 3, 3, 3, 2, 2), (5, 2, 2, 2, 2, 2, 2)


def configure_speech(source: Source) -> Config:
    """config.json of data2vec-audio -> ours."""
    theirs = source.config
    fields.refuse(theirs, FOREIGN, source.path)
    name, options = SPEECH_HEADS[fields.architecture(theirs, SPEECH_HEADS, source.path)]
    config: Config = {"modality": "speech", "model": {"padding": "reference"}}
    fields.take((*SPEECH, SPEECH_DROPOUT), theirs, config)
    stack = [
        list(theirs.get(field) or default)
        for field, default in zip(("conv_dim", "conv_kernel", "conv_stride"), STACK, strict=True)
    ]
    if len({*map(len, stack)}) > 1:
        raise UserError(
            f"{source.path}: config fields 'conv_dim', 'conv_kernel' and 'conv_stride' differ in "
            "length"
        )
    config["model"]["frontend"]["convs"] = [list(conv) for conv in zip(*stack, strict=True)]
    kernel = theirs.get("conv_pos_kernel_size")
    config["model"]["positions"]["kernel"] = 19 if kernel is None else kernel
    masks = [theirs.get("mask_time_prob", 0.05), theirs.get("mask_feature_prob", 0.0)]
    config["model"]["mask_embedding"] = any(p > 0 for p in masks)
    if theirs.get("add_adapter"):
        fields.take(SPEECH_ADAPTER, theirs, config)
        adapter = config["conv_adapter"]
        adapter["width"] = adapter["width"] or config["model"]["width"]
    if name:
        config["head"] = {"name": name} | ({"classes": labels(theirs)} if name in CLASSES else {})
        fields.take(options, theirs, config)
    return config


def describe_speech(config: Config) -> Config:
    """Ours -> config.json of data2vec-audio."""
    fields.demand(config, SPEECH_ONLY, "Hugging Face's data2vec-audio")
    architecture = head_name(SPEECH_HEADS, config)
    theirs = fields.give(SPEECH, config) | {"architectures": [architecture]}
    dropout = fields.get(config, "model.encoder.dropout", 0.0)
    theirs["hidden_dropout"] = dropout
    convs = fields.get(config, "model.frontend.convs") or [*zip(*STACK, strict=True)]
    theirs |= dict(
        zip(
            ("conv_dim", "conv_kernel", "conv_stride"),
            map(list, zip(*convs, strict=True)),
            strict=True,
        )
    )
    theirs["num_feat_extract_layers"] = len(convs)
    positions = fields.get(config, "model.positions", {})
    depth = positions.get("depth", 5)
    kernel = positions.get("kernel") or max(3, positions.get("width", 95) // max(depth, 1))
    theirs |= {"num_conv_pos_embeddings": depth, "conv_pos_kernel_size": kernel}
    if not fields.get(config, "model.mask_embedding", True):
        theirs |= {"mask_time_prob": 0.0, "mask_feature_prob": 0.0}
    theirs["add_adapter"] = "conv_adapter" in config
    if "conv_adapter" in config:
        theirs |= fields.give(SPEECH_ADAPTER, config)
    theirs = agreeing(theirs, fields.give(SPEECH_HEADS[architecture][1], config))
    return described(config, "data2vec-audio", theirs)


def tdnn(kernel: int) -> Change:
    """[out, kernel * in], taps first -> [kernel, in, out]."""
    return Change(
        lambda x: x[0].reshape(len(x[0]), kernel, -1).transpose(1, 2, 0),
        lambda x: [x.transpose(2, 0, 1).reshape(x.shape[2], -1)],
    )


def speech_table(config: Config) -> Table:
    """Names of data2vec-audio; with a head, the encoder's have a prefix."""
    head = config.get("head") or {}
    p = "data2vec_audio." if head else ""
    layer, block = f"{p}encoder.layers.{{l}}", "encoder/blocks"
    qkv = [f"{layer}.attention.{x}_proj" for x in "qkv"]
    conv = f"{p}feature_extractor.conv_layers.{{i}}"
    norms = norm(f"{conv}.layer_norm", "frontend/norm{i}")
    if fields.get(config, "model.frontend.norm") == "group":
        norms = norm(conv.replace("{i}", "0") + ".layer_norm", "frontend/time_norm")
    one = f"{p}encoder.pos_conv_embed.conv"
    rows = [
        Row(f"{p}masked_spec_embed", "mask_embedding"),
        *conv1d(f"{conv}.conv", "frontend/conv{i}"),
        *norms,
        *norm(f"{p}feature_projection.layer_norm", "frontend/norm"),
        *linear(f"{p}feature_projection.projection", "frontend/projection"),
        *conv1d(f"{p}encoder.pos_conv_embed.layers.{{i}}.conv", "positions/conv{i}"),
        # A single positional convolution has normalised weights.
        Row(f"{one}.weight_g", "positions/conv/gain", CONV1D),
        Row(f"{one}.weight_v", "positions/conv/kernel", CONV1D),
        Row(f"{one}.bias", "positions/conv/bias"),
        *norm(f"{p}encoder.layer_norm", "norm"),
        Row(tuple(f"{x}.weight" for x in qkv), f"{block}/qkv/kernel", FUSED_LINEAR),
        Row(tuple(f"{x}.bias" for x in qkv), f"{block}/qkv/bias", FUSED_BIAS),
        *linear(f"{layer}.attention.out_proj", f"{block}/out"),
        *norm(f"{layer}.layer_norm", f"{block}/norm1"),
        *linear(f"{layer}.feed_forward.intermediate_dense", f"{block}/up"),
        *linear(f"{layer}.feed_forward.output_dense", f"{block}/down"),
        *norm(f"{layer}.final_layer_norm", f"{block}/norm2"),
        *linear(f"{p}adapter.proj", "adapter/projection"),
        *norm(f"{p}adapter.proj_layer_norm", "adapter/norm"),
        *conv1d(f"{p}adapter.layers.{{i}}.conv", "adapter/conv{i}"),
        Row("layer_weights", "task/layers/weights"),
        *linear("projector", "task/projection_in"),
        *linear("lm_head" if head.get("name") == "ctc" else "classifier", "task/output"),
    ]
    if head.get("name") == "xvector":
        for i, kernel in enumerate(head["kernels"]):
            name = f"tdnn.{i}.kernel"
            rows.append(Row(f"{name}.weight", f"task/conv{i}_kernel", tdnn(kernel)))
            rows.append(Row(f"{name}.bias", f"task/conv{i}_bias"))
        rows += linear("feature_extractor", "task/embedding")
        rows.append(Row("objective.weight", "task/objective"))
    return Table(rows)


# Text ---------------------------------------------------------------------------------------------

TEXT = (
    Field("hidden_size", 768, "model.width"),
    Field("vocab_size", 30_522, "model.vocab_size", 50_265),
    Field("num_hidden_layers", 12, "model.encoder.depth"),
    Field("num_attention_heads", 12, "model.encoder.heads"),
    Field("intermediate_size", 3072, "model.encoder.mlp"),
    Field("hidden_act", "gelu", "model.encoder.activation", "gelu"),
    Field("layer_norm_eps", 1e-12, ("model.encoder.eps", "model.eps"), 1e-5),
    Field("pad_token_id", 1, "model.pad", 1),
    Field("type_vocab_size", 2, "model.types", 0, back=lambda count: max(count, 1)),
    Field("attention_probs_dropout_prob", 0.1, "model.encoder.attention_dropout", 0.0),
)
CLASSIFIER_DROPOUT = Field("classifier_dropout", None, "head.dropout")
TEXT_HEADS = {
    "Data2VecTextModel": ("pooler", ()),
    "Data2VecTextForMaskedLM": (
        "masked_lm",
        (
            Field("vocab_size", 30_522, "head.vocab_size"),
            Field("layer_norm_eps", 1e-12, "head.eps", 1e-5),
            Field("tie_word_embeddings", True, "head.tied", True),
        ),
    ),
    "Data2VecTextForSequenceClassification": ("sequence", (PROBLEM, CLASSIFIER_DROPOUT)),
    "Data2VecTextForTokenClassification": ("frames", (CLASSIFIER_DROPOUT,)),
    "Data2VecTextForQuestionAnswering": ("answer", ()),
    "Data2VecTextForMultipleChoice": ("choice", ()),
}
TEXT_ONLY = {
    "model.encoder.norm": "post",
    "model.encoder.qkv_bias": "qkv",
    "model.encoder.layer_scale": None,
    "model.encoder.relative": None,
    "model.input_norm": False,
    "model.decoder": None,
    "model.alibi": None,
    "model.count_pads": False,
    "model.encoder.activation_dropout": 0.0,
    "model.encoder.layerdrop": 0.0,
}


def configure_text(source: Source) -> Config:
    """config.json of data2vec-text -> ours."""
    theirs = source.config
    fields.refuse(theirs, FOREIGN, source.path)
    name, options = TEXT_HEADS[fields.architecture(theirs, TEXT_HEADS, source.path)]
    if name == "answer" and labels(theirs) != 2:
        raise UserError(f"{source.path}: question answering has 2 labels, not {labels(theirs)}")
    # Pads are vectors like others, left out of attention where the mask says so.
    config: Config = {"modality": "text", "model": {"padding": "attention", "pad_rows": True}}
    fields.take(TEXT, theirs, config)
    rows, pad = theirs.get("max_position_embeddings", 512), config["model"]["pad"]
    config["model"]["max_length"] = rows - pad - 1
    dropout = theirs.get("hidden_dropout_prob", 0.1)
    config["model"]["dropout"] = config["model"]["encoder"]["dropout"] = dropout
    if name == "pooler" and not any("pooler." in key for key in source.state):
        return config
    config["head"] = {"name": name} | ({"classes": labels(theirs)} if name in CLASSES else {})
    fields.take(options, theirs, config)
    if "dropout" in config["head"] and config["head"]["dropout"] is None:
        config["head"]["dropout"] = dropout
    return config


def describe_text(config: Config) -> Config:
    """Ours -> config.json of data2vec-text."""
    fields.demand(config, TEXT_ONLY, "Hugging Face's data2vec-text")
    head = fields.get(config, "head.name")
    if head == "masked_lm":  # its output has the table, which is stored with the factor
        fields.demand(config, {"model.scale": False}, "Hugging Face's masked language model")
    architecture = head_name(TEXT_HEADS, config) if head else "Data2VecTextModel"
    theirs = fields.give(TEXT, config) | {"architectures": [architecture]}
    rows = fields.get(config, "model.max_length", 512) + theirs["pad_token_id"] + 1
    theirs["max_position_embeddings"] = rows
    theirs["hidden_dropout_prob"] = fields.get(config, "model.encoder.dropout", 0.0)
    theirs = agreeing(theirs, fields.give(TEXT_HEADS[architecture][1], config))
    if theirs.get("classifier_dropout") == theirs["hidden_dropout_prob"]:
        del theirs["classifier_dropout"]  # as if it were not given
    return described(config, "data2vec-text", theirs)


def text_table(config: Config) -> Table:
    """Names of data2vec-text; with a head, the encoder's have a prefix."""
    head = (config.get("head") or {}).get("name")
    p = "" if head in (None, "pooler") else "data2vec_text."
    layer, block = f"{p}encoder.layer.{{l}}", "encoder/blocks"
    qkv = [f"{layer}.attention.self.{x}" for x in ("query", "key", "value")]
    factor = np.float32(config["model"]["width"] ** 0.5 if config["model"].get("scale") else 1)
    scaled = Change(lambda x: x[0] / factor, lambda x: [x * factor])  # theirs has it inside
    rows = [
        Row(
            f"{p}embeddings.word_embeddings.weight",
            "embeddings/tokens",
            SAME if factor == 1 else scaled,
        ),
        Row(f"{p}embeddings.position_embeddings.weight", "embeddings/positions"),
        Row(f"{p}embeddings.token_type_embeddings.weight", "embeddings/types"),
        *norm(f"{p}embeddings.LayerNorm", "embeddings/norm"),
        Row(tuple(f"{x}.weight" for x in qkv), f"{block}/qkv/kernel", FUSED_LINEAR),
        Row(tuple(f"{x}.bias" for x in qkv), f"{block}/qkv/bias", FUSED_BIAS),
        *linear(f"{layer}.attention.output.dense", f"{block}/out"),
        *norm(f"{layer}.attention.output.LayerNorm", f"{block}/norm1"),
        *linear(f"{layer}.intermediate.dense", f"{block}/up"),
        *linear(f"{layer}.output.dense", f"{block}/down"),
        *norm(f"{layer}.output.LayerNorm", f"{block}/norm2"),
        *linear(f"{p}pooler.dense", "task/pooler"),
    ]
    ignored = {r"embeddings\.(position_ids|token_type_ids)$": "a buffer of older versions"}
    if head == "masked_lm":
        rows += linear("lm_head.dense", "task/dense") + norm("lm_head.layer_norm", "task/norm")
        # transformers 4 reads the second name; 5 the first, or the second if it is untied.
        names = ("lm_head.bias", "lm_head.decoder.bias")
        if config["head"].get("tied", True):
            ignored[r"^lm_head\.decoder\.weight$"] = "the token embeddings once more"
        else:
            names = names[::-1]
            rows.append(Row("lm_head.decoder.weight", "task/kernel", LINEAR))
        rows.append(Row(names, "task/bias", COPIES))
    elif head == "sequence":
        rows += linear("classifier.dense", "task/dense")
        rows += linear("classifier.out_proj", "task/output")
    elif head in ("frames", "choice"):
        rows += linear("classifier", "task/output")
    elif head == "answer":
        rows += linear("qa_outputs", "task/output")
    return Table(rows, ignored)


def both_biases(state: Mapping[str, Any], head: str = "lm_head.") -> dict[str, Any]:
    """A language model's bias under both of its names, of which a file may have one."""
    names, state = (f"{head}bias", f"{head}decoder.bias"), dict(state)
    for name, other in (names, names[::-1]):
        if name in state:
            state.setdefault(other, state[name])
    return state


def text_constants(config: Config) -> dict[str, np.ndarray]:
    """One segment of zeros for models that know none."""
    if fields.get(config, "model.types", 0):
        return {}
    p = "" if fields.get(config, "head.name") in (None, "pooler") else "data2vec_text."
    width = config["model"]["width"]
    return {f"{p}embeddings.token_type_embeddings.weight": np.zeros((1, width), np.float32)}


def claims(kind: str):
    """A source's config says that it is of this model type."""
    return lambda source: source.config.get("model_type") == kind


def with_prefix(prefix: str, heads: str):
    """Puts the encoder's names where the config's head wants them, whichever class saved them."""

    def rename(state, config):
        wanted = bool(config.get("head")) and fields.get(config, "head.name") != "pooler"
        stored = any(name.startswith(prefix) for name in state)
        if stored and not wanted:
            return {name.removeprefix(prefix): array for name, array in state.items()}
        if wanted and not stored:
            own = re.compile(heads)
            return {n if own.match(n) else prefix + n: array for n, array in state.items()}
        return dict(state)

    return rename


_speech_prefix = with_prefix(
    "data2vec_audio.",
    r"(lm_head|projector|classifier|layer_weights|tdnn|objective)\b"
    r"|feature_extractor\.(weight|bias)$",
)
_text_prefix = with_prefix("data2vec_text.", r"(lm_head|classifier|qa_outputs)\b")

LAYOUTS = [
    Layout(
        name="data2vec-audio",
        kind="huggingface",
        to="hf",
        modality="speech",
        claims=claims("data2vec-audio"),
        configure=configure_speech,
        table=speech_table,
        describe=describe_speech,
        drops=PRETRAINING,
        holds=first,
        rename=_speech_prefix,
        arguments=lambda inputs: {"input_values": inputs["audio"]},
    ),
    Layout(
        name="data2vec-text",
        kind="huggingface",
        to="hf",
        modality="text",
        claims=claims("data2vec-text"),
        configure=configure_text,
        table=text_table,
        describe=describe_text,
        drops=PRETRAINING,
        holds=first,
        rename=lambda state, config: both_biases(_text_prefix(state, config)),
        constants=text_constants,
        arguments=lambda inputs: {"input_ids": inputs["tokens"].astype(np.int64)},
    ),
]
