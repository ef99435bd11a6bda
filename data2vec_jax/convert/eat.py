"""EAT's checkpoints: fairseq's data2vec 2.0 of spectrograms, and its Hugging Face folder.

docs/spec/sound.md section 8. The files call the modality IMAGE and have one channel; what they say
beyond that of frames and statistics is their data's, not the model's.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from data2vec_jax.convert import fairseq_v2, fields
from data2vec_jax.convert.fairseq import kept, stored
from data2vec_jax.convert.fairseq_v2 import BLOCKS, EXTRA
from data2vec_jax.convert.fields import Config
from data2vec_jax.convert.layouts import Layout, Source, has
from data2vec_jax.convert.tables import CONV2D, Row, Table, below, linear, norm
from data2vec_jax.core.errors import UserError
from data2vec_jax.models.positions import sincos

BINS, PATCH, LONGEST = 128, 16, 768  # LONGEST: rows of patches in the table of positions, 2 minutes
POSITIONS = "fixed_positional_encoder.positions"
FRAMES = 1024  # where the settings do not say
# Classes of a fine-tuned model -> frames, mean and standard deviation of its corpus.
CORPORA = {527: (1024, -4.268, 4.569), 50: (512, -6.627, 5.359), 35: (128, -6.846, 5.565)}
HEAD = {"name": "image", "pooling": "class", "class_norm": True}


def is_sound(source: Source) -> bool:
    """Whether a file of data2vec 2.0 reads spectrograms: one channel, and EAT's settings."""
    weight = next(
        (x for n, x in source.state.items() if n.endswith("local_encoder.proj.weight")), None
    )
    if weight is None or not has(source, "modality_encoders.IMAGE.") or weight.shape[1] != 1:
        return False
    rows = [x.shape[1] for n, x in source.state.items() if n.endswith(POSITIONS)]
    return any(values(source.config, "target_length", "audio_mae")) or LONGEST * 8 in rows


def values(node: Any, *names: str) -> Iterator[Any]:
    """What these names stand for, anywhere in nested settings."""
    if isinstance(node, Mapping):
        yield from (node[name] for name in names if name in node)
        for value in node.values():
            yield from values(value, *names)


def with_corpus(config: Config, frames: int | None, classes: int | None) -> Config:
    """The config with the length of sounds, and with the head and statistics of a corpus."""
    model = config["model"]
    if classes is not None:
        config["head"] = HEAD | {"classes": classes, "eps": config.pop("eps")}
    known = CORPORA.get(classes)
    model["frames"] = frames or (known[0] if known else FRAMES)
    if known:
        model["mean"], model["std"] = known[1:]
    return config


# fairseq ------------------------------------------------------------------------------------------


def configure(source: Source) -> Config:
    """cfg -> converted config."""
    theirs = fairseq_v2.configure(source)  # as if it were an image
    model = {k: v for k, v in theirs["model"].items() if k not in PICTURE}
    head = theirs.pop("head", None)
    config = theirs | {"modality": "sound", "model": model, "eps": 1e-6}
    frames = next((int(n) for n in values(source.config, "target_length") if n), None)
    config = with_corpus(config, frames, head and head["classes"])
    config.pop("eps", None)
    return config


# Options of vision that sound has not.
PICTURE = ("image", "patch", "patch_width", "mean", "std", "sincos", "shared_relative")


def as_image(config: Config) -> Config:
    """A config of sound as the one of vision that has the same parameters."""
    model = {k: v for k, v in config["model"].items() if k not in ("frames", "mean", "std")}
    model |= {"image": [config["model"].get("frames", FRAMES), BINS], "patch": PATCH}
    model |= {"sincos": True, "shared_relative": False, "mean": [0.0], "std": [1.0]}
    return {**config, "modality": "vision", "model": model}


def describe(config: Config) -> Config:
    """Ours -> cfg."""
    if found := kept(config, NAME):
        return found
    check_head(config)
    cfg = fairseq_v2.describe(as_image(config))
    part = settings_of(cfg["cfg"]["model"])["modalities"]["image"]
    part |= {"input_size": 224, "target_length": config["model"].get("frames", FRAMES)}
    return cfg


def settings_of(model: Mapping[str, Any]) -> Mapping[str, Any]:
    """Settings of the pretrained model, also inside those of a fine-tuned one."""
    return model["w2v_args"]["cfg"]["model"] if "w2v_args" in model else model


def check_head(config: Config) -> None:
    """Raises UserError for a head that EAT does not have."""
    head = config.get("head")
    if head and {key: head.get(key) for key in HEAD} != HEAD:
        raise UserError(
            "config.head: EAT has a norm of the class token and a linear layer, no other"
        )


def constants(config: Config) -> dict[str, np.ndarray]:
    """Positions of two minutes, of which shorter sounds use the first rows."""
    places = sincos((LONGEST, BINS // PATCH), config["model"]["width"])[None]
    p = fairseq_v2.PREFIXES.get(fields.get(config, "head.name"), "")
    name = f"modality_encoders.IMAGE.{POSITIONS}"
    teacher = [f"{p}_ema.{name}"] if config.get("teacher") == "model" else []
    return {name: places for name in (f"{p}{name}", *teacher)}


# Hugging Face -------------------------------------------------------------------------------------

VARIANT = {"pretrain": False, "finetune": True}


def configure_folder(source: Source) -> Config:
    """config.json -> converted config."""
    theirs, state = source.config, source.state
    width, mlp = int(theirs.get("embed_dim", 768)), state["model.blocks.0.mlp.fc1.weight"].shape[0]
    encoder = {
        "depth": int(theirs.get("depth", 12)),
        "heads": int(theirs.get("num_heads", 12)),
        "mlp": mlp,
        "norm": "post",
        "eps": float(theirs.get("norm_eps", 1e-6)),
    }
    model = {"width": width, "encoder": encoder, "mask_embedding": False}
    size = theirs.get("img_size") or [FRAMES, BINS]
    weight = state.get("model.head.weight")
    # The norm of this code's head has PyTorch's own eps.
    config = {"modality": "sound", "model": model, "eps": 1e-5}
    config = with_corpus(config, int(size[0]), None if weight is None else len(weight))
    config.pop("eps", None)
    return config


def describe_folder(config: Config) -> Config:
    """Converted config -> config.json."""
    if found := kept(config, FOLDER):
        return found
    check_head(config)
    fields.demand(config, fairseq_v2.FIXED, "EAT's Hugging Face model")
    model = config["model"]
    encoder, head = model["encoder"], config.get("head") or {}
    return {
        "architectures": ["EATModel"],
        "model_type": "eat",
        "model_variant": "finetune" if head else "pretrain",
        "embed_dim": model["width"],
        "depth": encoder["depth"],
        "num_heads": encoder["heads"],
        "mlp_ratio": encoder["mlp"] / model["width"],
        "norm_eps": encoder.get("eps", 1e-5),
        "img_size": [model.get("frames", FRAMES), BINS],
        "mel_bins": BINS,
        "patch_size": PATCH,
        "in_chans": 1,
        "num_classes": head.get("classes", 0),
    }


def folder_table(config: Config) -> Table:
    """Names of the encoder and of the head; there is neither decoder nor teacher."""
    rows = [
        Row("model.local_encoder.proj.weight", "patches/kernel", CONV2D),
        Row("model.local_encoder.proj.bias", "patches/bias"),
        Row("model.extra_tokens", "class_token", EXTRA),
        *norm("model.pre_norm", "norm"),
        *below(Table(BLOCKS), "model."),
    ]
    if config.get("head"):
        rows += norm("model.fc_norm", "task/norm") + linear("model.head", "task/output")
    return Table(rows, {rf"{POSITIONS}$": "sines, computed from the grid"})


def folder_constants(config: Config) -> dict[str, np.ndarray]:
    """Positions of two minutes."""
    places = sincos((LONGEST, BINS // PATCH), config["model"]["width"])
    return {f"model.{POSITIONS}": places[None]}


NAME, FOLDER = "fairseq EAT", "EAT"
LAYOUTS = [
    Layout(
        name=NAME,
        kind="pickle",
        to="fairseq",
        modality="sound",
        claims=is_sound,
        configure=configure,
        table=lambda config: fairseq_v2.table(as_image(config)),
        describe=describe,
        rename=lambda state, config: fairseq_v2.rename(state, as_image(config)),
        rename_back=lambda state, config: fairseq_v2.rename_back(state, as_image(config)),
        constants=constants,
        store=stored,
        holds=lambda config: True,
    ),
    Layout(
        name=FOLDER,
        kind="huggingface",
        to="hf",
        modality="sound",
        claims=lambda source: source.config.get("model_type") == "eat",
        configure=configure_folder,
        table=folder_table,
        describe=describe_folder,
        constants=folder_constants,
        drops={
            r"^(decoder|head|teacher)/": "EAT's folder holds the encoder alone",
            r"^mask_embedding$": "EAT has none",
        },
    ),
]
