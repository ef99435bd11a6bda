"""Hugging Face's BERT, RoBERTa, ViT (and DINO), wav2vec 2.0 and HuBERT.

Their encoders are data2vec's with other settings, so each is read as the data2vec class of its
modality, and only what differs is here. Written back, they are what they were.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from data2vec_jax.convert import fields, hf, hf_vision
from data2vec_jax.convert.fields import Config
from data2vec_jax.convert.layouts import Layout, Source, has
from data2vec_jax.convert.tables import Table
from data2vec_jax.core import files
from data2vec_jax.core.errors import UserError

# Names in files of other versions -> names in the tables.
ALIASES = (
    (r"\bLayerNorm\.gamma$", "LayerNorm.weight"),
    (r"\bLayerNorm\.beta$", "LayerNorm.bias"),
    (r"\.parametrizations\.weight\.original0$", ".weight_g"),
    (r"\.parametrizations\.weight\.original1$", ".weight_v"),
)
IGNORED = {
    r"^(quantizer|project_q|project_hid)\.": "it serves wav2vec 2.0's pretraining only",
    r"^cls\.seq_relationship\.": "it serves BERT's pretraining only",
    r"^cls\.predictions\.decoder\.weight$": "the token embeddings once more",
}
# Names that have no prefix in classes with a head.
HEADS = r"(cls|lm_head|projector|classifier|layer_weights|tdnn|objective|qa_outputs)\b"
HEADS += r"|feature_extractor\.(weight|bias)$"
# Their fields -> the values that can be represented.
ONLY = {
    "pooler_act": ("tanh",),
    "adapter_attn_dim": (),
    "feat_proj_layer_norm": (True,),
    "conv_pos_batch_norm": (False,),
}
Names = Sequence[tuple[str, str]]


def _layout(
    kind: str,
    like: Layout,
    classes: Mapping[str, str],
    options: Callable[[Config], Config] = lambda theirs: {},
    adapt: Callable[[Config, Config, Source], None] = lambda config, theirs, source: None,
    names: Callable[[Config], Names] = lambda config: (),
) -> Layout:
    """The layout of folders whose `model_type` is `kind`.

    like: of the data2vec class that they are read as. classes: theirs -> data2vec's; of several for
    one, the first is written. options: their config -> data2vec's fields that say the same in other
    words. adapt: (converted config, their config, source) sets what data2vec's cannot say. names:
    converted config -> (regular expression, replacement) from data2vec's names to theirs.
    """
    prefixed = hf.with_prefix(f"{kind}.", HEADS)

    def configure(source: Source) -> Config:
        theirs = {key: value for key, value in source.config.items() if value is not None}
        fields.refuse(theirs, ONLY, source.path)
        name = fields.architecture(theirs, classes, source.path)
        theirs |= options(theirs) | {"architectures": [classes[name]]}
        # Without its folder, as the processor in it is of another kind.
        config = like.configure(dataclasses.replace(source, config=theirs, folder=None))
        adapt(config, theirs, source)
        return config

    def describe(config: Config) -> Config:
        theirs = dict(config["origin"]["config"])
        read_as = classes[theirs["architectures"][0]]
        name = next(name for name, known in classes.items() if known == read_as)
        return theirs | {"architectures": [name], "dtype": "float32", "torch_dtype": "float32"}

    def table(config: Config) -> Table:
        found, rows = like.table(config), {}
        for row in found.rows:
            theirs = row.names
            for pattern, new in ((r"^data2vec_\w+\.", f"{kind}."), *names(config)):
                theirs = tuple(re.sub(pattern, new, name) for name in theirs)
            rows[theirs] = dataclasses.replace(row, theirs=theirs)  # of equal names the head's
        return Table([*rows.values()], {**found.ignored, **IGNORED}, ALIASES)

    def rename(state: Mapping[str, Any], config: Config) -> dict[str, Any]:
        state = prefixed(state, config)
        if fields.get(config, "head.name") != "masked_lm":
            return state
        return hf.both_biases(state, "cls.predictions." if kind == "bert" else "lm_head.")

    return Layout(
        name=kind,
        kind="huggingface",
        to="hf",
        modality=like.modality,
        claims=hf.claims(kind),
        configure=configure,
        table=table,
        describe=describe,
        holds=lambda config: fields.get(config, "origin.layout") == kind,
        drops=hf.PRETRAINING,
        rename=rename,
        arguments=like.arguments,
    )


def _classes(theirs: str, like: str, heads: Sequence[str]) -> dict[str, str]:
    return {f"{theirs}{x}": f"{like}{x}" for x in ("Model", *(f"For{head}" for head in heads))}


# Text ---------------------------------------------------------------------------------------------


def _adapt_bert(config: Config, theirs: Config, source: Source) -> None:
    places = theirs.get("max_position_embeddings", 512)
    config["model"] |= {"count_pads": True, "max_length": places}
    activation = config["model"]["encoder"]["activation"]
    if fields.get(config, "head.name") == "masked_lm" and activation != "gelu":
        raise UserError(
            f"{source.path}: config field 'hidden_act' = '{activation}' is not supported with "
            f"{source.config['architectures'][0]}, whose head would have it, too"
        )


def _bert_names(config: Config) -> Names:
    if fields.get(config, "head.name") == "sequence":
        pooler = (r"^classifier\.dense\.", "bert.pooler.dense.")
        return pooler, (r"^classifier\.out_proj\.", "classifier.")
    return (
        (r"^lm_head\.dense\.", "cls.predictions.transform.dense."),
        (r"^lm_head\.layer_norm\.", "cls.predictions.transform.LayerNorm."),
        (r"^lm_head\.", "cls.predictions."),
    )


# Images -------------------------------------------------------------------------------------------

VIT = {
    "use_absolute_position_embeddings": True,
    "use_relative_position_bias": False,
    "use_shared_relative_position_bias": False,
    "use_mean_pooling": False,
    "layer_scale_init_value": 0.0,
    "drop_path_rate": 0.0,
}


def _adapt_vit(config: Config, theirs: Config, source: Source) -> None:
    model = config["model"]
    model["mask_embedding"] = has(source, "embeddings.mask_token")
    model["encoder"]["qkv_bias"] = "qkv" if theirs.get("qkv_bias", True) else "none"
    path = source.folder / "preprocessor_config.json"
    processor = files.read_json(path) if path.is_file() else {}
    if not processor.get("do_normalize", True):
        model["mean"], model["std"] = [0.0] * len(model["mean"]), [1.0] * len(model["std"])
    elif processor.get("image_mean") and processor.get("image_std"):
        model["mean"], model["std"] = processor["image_mean"], processor["image_std"]
    if theirs["architectures"] == ["Data2VecVisionModel"]:
        del config["head"]
        if has(source, "pooler.dense."):
            config["head"] = {"name": "pooler"}


# Speech -------------------------------------------------------------------------------------------


def _speech_options(theirs: Config) -> Config:
    # The kernel of one convolution; in data2vec-audio the same field is the number of them.
    kernel = theirs.get("num_conv_pos_embeddings", 128)
    return {"num_conv_pos_embeddings": 1, "conv_pos_kernel_size": kernel}


def _adapt_speech(config: Config, theirs: Config, source: Source) -> None:
    model = config["model"]
    model["positions"]["norm"] = "weight"
    model["frontend"]["norm"] = theirs.get("feat_extract_norm", "group")
    model["encoder"]["norm"] = "pre" if theirs.get("do_stable_layer_norm") else "post"


_SPEECH, _TEXT, _VISION = (*hf.LAYOUTS, *hf_vision.LAYOUTS)
_WORDS = ("MaskedLM", "SequenceClassification", "TokenClassification", "QuestionAnswering")
_BERT = _classes("Bert", "Data2VecText", (*_WORDS, "MultipleChoice"))
_ROBERTA = _classes("Roberta", "Data2VecText", (*_WORDS, "MultipleChoice"))
_UTTERANCES = ("CTC", "SequenceClassification")
_WAV2VEC2 = (*_UTTERANCES, "AudioFrameClassification", "XVector")
LAYOUTS = [
    _layout(
        "bert",
        _TEXT,
        _BERT | {"BertForPreTraining": "Data2VecTextForMaskedLM"},
        lambda theirs: {"pad_token_id": theirs.get("pad_token_id", 0)},
        _adapt_bert,
        _bert_names,
    ),
    _layout("roberta", _TEXT, _ROBERTA),
    _layout(
        "vit",
        _VISION,
        _classes("ViT", "Data2VecVision", ("ImageClassification",)),
        lambda theirs: VIT,
        _adapt_vit,
    ),
    _layout(
        "wav2vec2",
        _SPEECH,
        _classes("Wav2Vec2", "Data2VecAudio", _WAV2VEC2)
        | {"Wav2Vec2ForPreTraining": "Data2VecAudioModel"},
        _speech_options,
        _adapt_speech,
    ),
    _layout(
        "hubert",
        _SPEECH,
        _classes("Hubert", "Data2VecAudio", _UTTERANCES),
        _speech_options,
        _adapt_speech,
    ),
]
