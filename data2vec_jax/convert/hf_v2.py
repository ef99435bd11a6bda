"""Our Hugging Face folder of data2vec 2.0, which transformers has no class for.

The names of fairseq's data2vec_multi without prefixes, in a safetensors file. The PyTorch model is
in modeling_data2vec2.py, which is copied beside the weights.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from data2vec_jax.convert import fields
from data2vec_jax.convert.fairseq import DEFAULT_CONVS, conv_stack
from data2vec_jax.convert.fairseq_v2 import (
    FIXED,
    FIXED_PART,
    MODALITIES,
    PREFIXES,
    constants,
    rename,
    rename_back,
    table,
)
from data2vec_jax.convert.fields import Config
from data2vec_jax.convert.layouts import Layout, Source
from data2vec_jax.core.errors import UserError

# Entries of a converted config that the folder keeps, in config.json's entry `data2vec`.
KEPT = ("modality", "model", "head", "teacher", "prenet")


def describe(config: Config) -> Config:
    """Converted config -> config.json."""
    fields.demand(config, FIXED | FIXED_PART[config["modality"]], "the PyTorch model of 2.0")
    name = fields.get(config, "head.name")
    if name not in (None, *PREFIXES):
        raise UserError(f"config.head.name: the PyTorch model of 2.0 has no head '{name}'")
    own = {key: config[key] for key in KEPT if config.get(key) is not None}
    if config["modality"] == "speech" and not fields.get(own, "model.frontend.convs"):
        frontend = fields.get(own, "model.frontend", {})
        convs = conv_stack(DEFAULT_CONVS, "")
        own["model"] = own["model"] | {"frontend": {**frontend, "convs": convs}}
    return {
        "architectures": ["Data2Vec2Model"],
        "model_type": "data2vec2",
        "auto_map": {
            "AutoConfig": "modeling_data2vec2.Data2Vec2Config",
            "AutoModel": "modeling_data2vec2.Data2Vec2Model",
        },
        "dtype": "float32",
        "torch_dtype": "float32",
        "data2vec": own,
    }


def configure(source: Source) -> Config:
    """config.json -> converted config."""
    own = source.config.get("data2vec")
    if not isinstance(own, Mapping) or own.get("modality") not in MODALITIES:
        raise UserError(f"{source.path}: config.json has no settings of data2vec 2.0")
    own = fields.with_current_names(own)
    return {key: own[key] for key in KEPT if key in own}


def write_model_file(checkpoint: Any, folder: Path) -> None:
    """Writes the PyTorch model beside the weights."""
    name = "modeling_data2vec2.py"
    shutil.copyfile(Path(__file__).with_name(name), folder / name)


def arguments(inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Our inputs -> arguments of the PyTorch model."""
    (array,) = inputs.values()
    if "image" in inputs:
        array = array.transpose(0, 3, 1, 2)
    return {"inputs": array.astype(np.int64) if "tokens" in inputs else array}


LAYOUTS = [
    Layout(
        name="data2vec 2.0",
        kind="huggingface",
        to="hf",
        modality=kind,
        claims=lambda source, kind=kind: (
            source.config.get("model_type") == "data2vec2"
            and fields.get(source.config, "data2vec.modality") == kind
        ),
        configure=configure,
        table=lambda config: table(config, {}, "proj"),
        describe=describe,
        rename=rename,
        rename_back=rename_back,
        constants=lambda config: constants(config, {}),
        holds=lambda config: fields.generation(config) == "2.0",
        beside=write_model_file,
        arguments=arguments,
    )
    for kind in MODALITIES
]
