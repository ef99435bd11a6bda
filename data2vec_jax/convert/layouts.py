"""Opened checkpoints of others, and the record of a checkpoint layout."""

import importlib
import os
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data2vec_jax.convert import pickles
from data2vec_jax.convert.tables import Entry, State, Table
from data2vec_jax.core import files, safetensors
from data2vec_jax.core.errors import UserError

Config = dict[str, Any]
Rename = Callable[[Mapping[str, Any], Config], dict[str, Any]]


@dataclass(frozen=True)
class Source:
    """An opened checkpoint in a layout of others."""

    path: Path
    kind: str
    """'huggingface' (a folder), or 'pickle' (a file of fairseq's or BEiT's)."""
    config: Mapping[str, Any]
    """Their config, as plain JSON."""
    state: Mapping[str, np.ndarray]
    """Their arrays by name, read when used. Nested dicts of a pickle are flattened
    ('_ema.layers.0...')."""
    folder: Path | None = None
    """Folder of the processor and tokenizer files, if there is one."""


@dataclass(frozen=True)
class Layout:
    """One kind of checkpoint; `data2vec_jax.convert` says how the parts are used."""

    name: str
    """Stands in reports, model cards and `origin.layout` of converted configs."""
    kind: str
    """As of `Source`."""
    to: str
    """Value of `--to` that writes this layout: 'hf' or 'fairseq'."""
    modality: str
    """Name of the modality that it stores."""
    claims: Callable[[Source], bool]
    """Whether a source has this layout, judged by its content."""
    configure: Callable[[Source], Config]
    """Source -> converted config."""
    table: Callable[[Config], Table]
    """Converted config -> table of parameter names, for both directions."""
    describe: Callable[[Config], Config]
    """Converted config -> their config. Raises UserError for options that they lack."""
    holds: Callable[[Config], bool] = lambda config: True
    """Whether a converted config can be written in this layout (1.0 or 2.0)."""
    drops: Mapping[str, str] = field(default_factory=dict)
    """Regular expression of our paths that the layout cannot store -> the reason."""
    fit: Callable[[list[Entry]], list[Entry]] = lambda entries: entries
    """Our entries -> entries of the same model without those that `drops` names."""
    rename: Rename = lambda state, config: dict(state)
    """(arrays by their names, converted config) -> arrays by the table's names, where names depend
    on more than a table can say (the version of a library, a prefix)."""
    rename_back: Rename = lambda state, config: dict(state)
    """The inverse of `rename`, for arrays and for entries."""
    constants: Callable[[Config], State] = lambda config: {}
    """Converted config -> arrays in the file that are not parameters."""
    store: Callable[[Mapping[str, Any], Config], dict[str, Any]] | None = None
    """Of a pickle: (tensors by name, converted config) -> the nested dict to write."""
    beside: Callable[[Any, Path], None] | None = None
    """(checkpoint, folder) -> None: writes further files of an export."""
    arguments: Callable[[Mapping[str, Any]], dict[str, Any]] | None = None
    """Of a Hugging Face layout: our inputs by name -> arguments of its PyTorch model."""


# Modules with a list `LAYOUTS` each; a source is of the first layout that claims it.
MODULES = ("eat", "hf", "hf_vision", "hf_others", "hf_v2", "fairseq_v2", "fairseq", "beit")


def layouts() -> list[Layout]:
    """All known layouts."""
    modules = (importlib.import_module(f"data2vec_jax.convert.{name}") for name in MODULES)
    return [layout for module in modules for layout in module.LAYOUTS]


def named(name: str) -> Layout:
    """The layout of that name."""
    return next(layout for layout in layouts() if layout.name == name)


def find_layout(source: Source) -> Layout:
    """The layout of a source, by what is in it."""
    for layout in layouts():
        if layout.kind == source.kind and layout.claims(source):
            return layout
    names, kind = [n for n in source.state][:2], source.config.get("model_type")
    raise UserError(
        f"{source.path}: not data2vec; its weights are of another model than those that open here "
        f"({f'{kind}: ' if kind else ''}{names} ...)"
    )


WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")


def open_source(path: str | os.PathLike) -> Source:
    """Opens a Hugging Face folder (or a file in it), or a pickle of fairseq's or BEiT's.

    Raises UserError if there is nothing that can be read.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path} does not exist")
    if path.is_file() and path.name in WEIGHTS and (path.parent / "config.json").is_file():
        path = path.parent
    if path.is_dir():
        return _open_folder(path)
    if path.suffix == ".safetensors":
        raise UserError(f"{path}: no config.json beside it")
    if zipfile.is_zipfile(path) or path.suffix in (".pt", ".pth", ".bin", ".ckpt"):
        return _open_pickle(path)
    raise UserError(f"{path}: neither a folder nor a PyTorch file")


def _open_folder(path: Path) -> Source:
    found = [name for name in WEIGHTS if (path / name).is_file()]
    if not found:
        raise UserError(f"{path}: no {WEIGHTS[0]} in it")
    if not (path / "config.json").is_file():
        raise UserError(f"{path}: no config.json in it")
    config = files.read_json(path / "config.json")
    weights = path / found[0]
    if found[0] == "pytorch_model.bin":
        state = pickles.tensors(pickles.read(weights))
    elif found[0] == "model.safetensors":
        state = safetensors.SafeTensors(weights)
    else:
        state = _sharded(path, files.read_json(weights))
    return Source(path, "huggingface", config, state, path)


def _sharded(path: Path, index: Mapping[str, Any]) -> Mapping[str, np.ndarray]:
    state: dict[str, np.ndarray] = {}
    for name in sorted(set(index.get("weight_map", {}).values())):
        shard = path / Path(name).name
        if not os.path.isfile(shard):  # nor is what cannot be a name
            raise UserError(f"{path}: {name:.200} is missing; the checkpoint is incomplete")
        state |= safetensors.SafeTensors(shard)
    missing = index.get("weight_map", {}).keys() - state.keys()
    if missing:
        raise UserError(f"{path}: the checkpoint lacks '{min(missing)}'")
    return state


def _open_pickle(path: Path) -> Source:
    content = pickles.read(path)
    if not isinstance(content, Mapping):
        raise UserError(f"{path}: not a checkpoint")
    wrapper = next((k for k in ("model", "module") if isinstance(content.get(k), Mapping)), "")
    arrays = pickles.tensors(content.get(wrapper) or {})
    if not arrays:
        raise UserError(f"{path}: no weights below 'model' or 'module'")
    settings = {k: pickles.plain(content[k]) for k in ("cfg", "args", "vocab") if k in content}
    if wrapper == "module":  # DeepSpeed's name
        settings["wrapper"] = wrapper
    if isinstance(content.get("model_ema"), Mapping):
        arrays |= pickles.tensors(content["model_ema"], "model_ema.")
    return Source(path, "pickle", settings, arrays, path.parent)


def has(source: Source, *names: str) -> bool:
    """Whether one of these texts stands in a name of the source's arrays."""
    return any(text in name for name in source.state for text in names)
