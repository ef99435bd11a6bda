"""LoRA and DoRA adapters of the PEFT library: folders of small matrices beside a base checkpoint.

A folder holds adapter_config.json and the tensors `base_model.model.<module>.lora_A.weight` and so
on, where <module> is a name in the base's layout; its table says which kernel of ours that is.
Tensors without `lora_` in their name (trained heads, biases) replace the base's own
(finetuning_and_conversion 3.5).

In our config: "adapters": {"sites": [...], "peft": {adapter_config.json}, "saved": {name there: the
base's name of what it replaces}}; our tensors are `adapters/<site>/{a,b,magnitude}`.
"""

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from data2vec_jax.convert import fields, pickles
from data2vec_jax.convert.layouts import Config, Source
from data2vec_jax.convert.tables import FUSED_LINEAR, LINEAR, Entry, Table
from data2vec_jax.core import files, safetensors
from data2vec_jax.core.errors import UserError
from data2vec_jax.models import adapters
from data2vec_jax.models.adapters import Site

CONFIG, WEIGHTS = "adapter_config.json", ("adapter_model.safetensors", "adapter_model.bin")
PREFIX, OURS = "base_model.model.", "adapters/"
LEAVES = {"lora_A.weight": "a", "lora_B.weight": "b", "lora_magnitude_vector": "magnitude"}
# Fields that change what an adapter computes, in ways that we do not have.
NEUTRAL = {
    name: (None, False, [])
    for name in (
        "lora_bias",
        "use_qalora",
        "use_bdlora",
        "layer_replication",
        "trainable_token_indices",
        "target_parameters",
        "alora_invocation_tokens",
        "arrow_config",
        "kasa_config",
        "monteclora_config",
        "megatron_config",
    )
}
INITIAL = (None, True, False, "gaussian", "orthogonal", "eva")  # the others change the base


class Module(NamedTuple):
    """One of their linear layers, by our site."""

    site: str
    """Name of the site."""
    kernel: str
    """Path of the kernel."""
    part: int | None
    """Third of a fused kernel; None for all of it."""
    layer: int | None
    """Index in a stacked kernel; None for the kernel of one layer."""


def is_adapter(path: Path) -> bool:
    """Whether a folder (or a file in it) is an adapter of PEFT's."""
    return (_folder(path) / CONFIG).is_file()


def _folder(path: Path) -> Path:
    return path if path.is_dir() else path.parent


def modules(table: Table, depth: int) -> dict[str, Module]:
    """The linear layers of a layout by their names there."""
    found = {}
    for row in table.rows:
        if row.change not in (LINEAR, FUSED_LINEAR):
            continue
        for name, (site, part) in zip(row.names, adapters.places(row.ours).items(), strict=True):
            for layer in range(depth) if row.stacked else [None]:
                module = name.removesuffix(".weight").replace("{l}", str(layer))
                found[module] = Module(site, row.ours, part, layer)
    return found


# Reading ------------------------------------------------------------------------------------------


class Adapter(NamedTuple):
    """An opened folder of PEFT's."""

    path: Path
    """The folder."""
    config: Config
    """adapter_config.json."""
    state: Mapping[str, Any]
    """Tensors by name, without `base_model.model.`."""


def open_adapter(path: Path) -> Adapter:
    """Reads a folder of PEFT's. Raises UserError for kinds of adapters that we do not have."""
    folder = _folder(path)
    config = files.read_json(folder / CONFIG)
    if config.get("peft_type") != "LORA":
        raise UserError(f"{folder}: adapters of type {config.get('peft_type')!r}, not 'LORA'")
    fields.refuse(config, NEUTRAL | {"init_lora_weights": INITIAL}, folder)
    found = [folder / name for name in WEIGHTS if (folder / name).is_file()]
    if not found:
        raise UserError(f"{folder}: no {WEIGHTS[0]} in it")
    binary = found[0].suffix == ".bin"
    state = pickles.tensors(pickles.read(found[0])) if binary else safetensors.SafeTensors(found[0])
    foreign = [name for name in state if not name.startswith(PREFIX)]
    if foreign:
        raise UserError(f"{folder}: '{foreign[0]}' is not of an adapter")
    return Adapter(folder, config, {name.removeprefix(PREFIX): state[name] for name in state})


def base_of(adapter: Adapter, given: Any = None) -> Path:
    """The folder of the base: `given`, or where the adapter says, seen from here or from it."""
    name = str(given or adapter.config.get("base_model_name_or_path") or "")
    candidates = [Path(name), adapter.path / name, adapter.path.parent / name]
    found = [path for path in candidates if name and path.exists()]
    if not found:
        raise UserError(
            f"{adapter.path}: the base model '{name}' is not here; name its folder (--base=FOLDER)"
        )
    return found[0]


# The classes that PEFT's types of tasks stand for, if the base is an encoder without a head.
TASKS = {
    "SEQ_CLS": "ForSequenceClassification",
    "TOKEN_CLS": "ForTokenClassification",
    "QUESTION_ANS": "ForQuestionAnswering",
}


def with_head(source: Source, adapter: Adapter) -> Source:
    """The base's source with the class that the adapter was trained on, and that class's head."""
    named = (adapter.config.get("auto_mapping") or {}).get("base_model_class") or ""
    (have, *_) = source.config.get("architectures") or [""]
    family = have.removesuffix("Model")
    kind = TASKS.get(adapter.config.get("task_type") or "")
    wanted = named if named.startswith(family) else f"{family}{kind}" if kind else have
    if not have.endswith("Model") or wanted == have:
        return source
    config = dict(source.config) | {"architectures": [wanted]}
    heads = [x for n, x in replaced(adapter).items() if re.search(r"(classifier|outputs)", n)]
    if heads:  # the last layer of a head has a row for each label
        count = len(heads[-1])
        config["id2label"] = {str(i): f"LABEL_{i}" for i in range(count)}
        config["label2id"] = {f"LABEL_{i}": i for i in range(count)}
    return replace(source, config=config)


def saved(adapter: Adapter) -> dict[str, str]:
    """Names of tensors that stand in for the base's -> the base's names."""
    found = [n for n in adapter.state if ".original_module." not in n and ".lora_" not in n]
    wrappers = r"\.(modules_to_save\.\w+|base_layer)\."
    return {name: re.sub(wrappers, ".", name) for name in sorted(found)}


def replaced(adapter: Adapter) -> dict[str, np.ndarray]:
    """Tensors that stand in for the base's, by the base's names."""
    return {there: adapter.state[name] for name, there in saved(adapter).items()}


def sites(adapter: Adapter, known: Mapping[str, Module]) -> tuple[list[Site], list[Entry]]:
    """Sites of ours, and their tensors. known: the base's linear layers.

    Raises UserError for adapters elsewhere, and for a folder that lacks some of its own.
    """
    leaves: dict[str, dict[str, str]] = {}  # module -> leaf of ours -> name in the file
    for name in adapter.state:
        module, found, leaf = name.partition(".lora_")
        if not found:
            continue
        if module not in known or f"lora_{leaf}" not in LEAVES:
            raise UserError(f"{adapter.path}: '{name}' adapts what is not a linear layer")
        leaves.setdefault(module, {})[LEAVES[f"lora_{leaf}"]] = name
    if not leaves:
        raise UserError(f"{adapter.path}: no adapters in it")
    dora = bool(adapter.config.get("use_dora"))
    needed = {*leaves, *wanted(adapter.config, known)}
    for module in (module for module in known if module in needed):
        for leaf, short in LEAVES.items():
            if (short in leaves.get(module, {})) < (dora or short != "magnitude"):
                raise UserError(f"{adapter.path}: the adapter lacks '{module}.{leaf}'")
    found, entries = [], []
    for name in dict.fromkeys(known[module].site for module in leaves):
        layers = {where.layer: module for module, where in known.items() if where.site == name}
        where = known[next(iter(layers.values()))]
        ranks = [
            adapter.state[leaves[module]["a"]].shape[0] if module in leaves else 0
            for module in layers.values()
        ]
        scales = [
            scale(adapter.config, module, rank) if rank else 0.0
            for module, rank in zip(layers.values(), ranks, strict=True)
        ]
        site = Site(name, where.kernel, where.part, tuple(ranks), tuple(scales), dora)
        there = {layer: leaves[module] for layer, module in layers.items() if module in leaves}
        found.append(site)
        entries += _entries(adapter, site, there)
    return found, entries


def scale(config: Mapping[str, Any], module: str, rank: int) -> float:
    """s of a module: alpha / r, or alpha / sqrt(r)."""
    pattern = config.get("alpha_pattern") or {}
    matching = [key for key in pattern if re.match(rf"(.*\.)?({key})$", module)]
    alpha = pattern[matching[0]] if matching else config.get("lora_alpha", 8)
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def wanted(config: Mapping[str, Any], known: Mapping[str, Module]) -> list[str]:
    """The modules that a PEFT config targets, among those `known`."""
    targets, excluded = config.get("target_modules"), config.get("exclude_modules")
    kept = config.get("modules_to_save") or []

    def among(names, module):
        if isinstance(names, str):
            return bool(re.fullmatch(names, module))
        return any(module == name or module.endswith(f".{name}") for name in names or ())

    def chosen(module):
        if excluded and among(excluded, module):
            return False
        if any(re.match(rf"(^|.*\.){name}($|\..*)", module) for name in kept):
            return False
        if targets == "all-linear":
            return False  # which ones that were is written nowhere
        return among(targets, module) and (isinstance(targets, str) or _in_layers(config, module))

    return [module for module in known if chosen(module)]


def _in_layers(config, module):
    """Whether a module is in one of `layers_to_transform`."""
    layers, patterns = config.get("layers_to_transform"), config.get("layers_pattern")
    if layers is None or layers == []:
        return True
    patterns = [patterns] if isinstance(patterns, str) else patterns or [r"[^.]*"]
    found = [re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", module) for pattern in patterns]
    numbers = [int(match[1]) for match in found if match][:1]
    return bool(numbers) and numbers[0] in ([layers] if isinstance(layers, int) else layers)


def _entries(
    adapter: Adapter, site: Site, layers: Mapping[int | None, Mapping[str, str]]
) -> list[Entry]:
    """Their matrices, transposed, filled up to the largest rank, and stacked."""
    stacked, names = None not in layers, next(iter(layers.values()))
    inputs = adapter.state[names["a"]].shape[1]
    outputs, rank = adapter.state[names["b"]].shape[0], max(site.ranks)
    shapes = {"a": (inputs, rank), "b": (rank, outputs)}
    shapes |= {"magnitude": (outputs,)} if site.dora else {}

    def entry(leaf):
        def make():
            whole = np.zeros((len(site.ranks), *shapes[leaf]), np.float32)
            for layer, names in layers.items():
                array = np.asarray(adapter.state[names[leaf]]).T
                whole[(layer or 0, *map(slice, array.shape))] = array
            return whole if stacked else whole[0]

        sources = tuple(PREFIX + names[leaf] for names in layers.values())
        shape = (len(site.ranks), *shapes[leaf]) if stacked else shapes[leaf]
        return Entry(f"{OURS}{site.name}/{leaf}", sources, shape, np.dtype("f4"), make, True)

    return [entry(leaf) for leaf in shapes]


def read(
    adapter: Adapter, table: Table, config: Config, state: Mapping[str, Any]
) -> tuple[Config, list[Entry]]:
    """Our config's section `adapters`, and the tensors below `adapters/`. state: the base's."""
    known = modules(table, config["model"]["encoder"]["depth"])
    known = {name: module for name, module in known.items() if f"{name}.weight" in state}
    found, entries = sites(adapter, known)
    section = {"sites": [json_of(site) for site in found], "peft": dict(adapter.config)}
    return section | {"saved": saved(adapter)}, entries


def json_of(site: Site) -> Config:
    """A site as JSON."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in site._asdict().items()}


def sites_of(config: Mapping[str, Any]) -> list[Site]:
    """The sites of a config of ours."""
    return [Site.of(options) for options in (config.get("adapters") or {}).get("sites", ())]


# Merging, writing ---------------------------------------------------------------------------------


def merge(config: Config, entries: list[Entry]) -> tuple[Config, list[Entry]]:
    """A config and tensors of ours with the adapters merged into their kernels."""
    tensors, kernels = {entry.name: entry for entry in entries}, {}
    for site in sites_of(config):
        kernels.setdefault(site.kernel, []).append(site)

    def entry(kernel):
        def make():
            tree: Config = {}
            adapters.put(tree, kernel, jnp.asarray(tensors[kernel].make()))
            leaves: Config = {}
            for name, tensor in tensors.items():
                if any(name.startswith(f"{OURS}{x.name}/") for x in kernels[kernel]):
                    adapters.put(leaves, name.removeprefix(OURS), jnp.asarray(tensor.make()))
            return np.asarray(adapters.get(adapters.merged(tree, kernels[kernel], leaves), kernel))

        return tensors[kernel]._replace(make=make, changed=True)

    kept = [x for x in entries if not x.name.startswith(OURS)]
    merged = [entry(x.name) if x.name in kernels else x for x in kept]
    return {key: value for key, value in config.items() if key != "adapters"}, merged


def describe(config: Config, table: Table, base: str) -> Config:
    """adapter_config.json: the adapter's own, or made from our sites. base: the base's class."""
    section = config["adapters"]
    if "peft" in section:
        return section["peft"]
    names = modules(table, config["model"]["encoder"]["depth"])
    known = {(m.site, m.layer or 0): module for module, m in names.items()}
    rank, alpha = {}, {}
    for site in sites_of(config):
        for layer, (r, s) in enumerate(zip(site.ranks, site.scales, strict=True)):
            if r:
                rank[known[site.name, layer]], alpha[known[site.name, layer]] = r, s * r
    usual, strength = (Counter(x.values()).most_common(1)[0][0] for x in (rank, alpha))
    family = re.match(r"Data2Vec(Audio|Text|Vision)", base)
    library = family and f"transformers.models.data2vec.modeling_data2vec_{family[1].lower()}"
    other = lambda found, usual: {re.escape(k): v for k, v in found.items() if v != usual}  # noqa: E731
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": section.get("base"),
        "task_type": None,
        "auto_mapping": {"base_model_class": base, "parent_library": library} if library else None,
        "r": usual,
        "lora_alpha": strength,
        "target_modules": list(rank),
        "rank_pattern": other(rank, usual),
        "alpha_pattern": other(alpha, strength),
        "use_dora": any(site.dora for site in sites_of(config)),
        "use_rslora": False,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": sorted({name.split(".")[0] for name in section.get("saved", ())}),
    }


def tensors(config: Config, entries: list[Entry], base: list[Entry], table: Table) -> list[Entry]:
    """Their tensors. base: those of the base's layout, of which the saved ones are taken."""
    known = modules(table, config["model"]["encoder"]["depth"])
    ours = {entry.name: entry for entry in entries if entry.name.startswith(OURS)}
    by_place = {(m.site, m.layer or 0): (name, m) for name, m in known.items()}
    found = []
    for site in sites_of(config):
        for layer, rank in enumerate(site.ranks):
            if rank:
                module, where = by_place[site.name, layer]
                found += _theirs(ours, site, module, where.layer, rank)
    kept = {entry.name: entry for entry in base}
    beside = config["adapters"].get("saved", {}).items()
    return found + [kept[there]._replace(name=PREFIX + name) for name, there in beside]


def _theirs(ours, site, module, layer, rank):
    """The tensors of one module of theirs."""
    found = []
    for leaf, short in LEAVES.items():
        entry = ours.get(f"{OURS}{site.name}/{short}")
        if entry is None:
            continue

        def make(entry=entry, short=short):
            array = entry.make() if layer is None else entry.make()[layer]
            cut = {"a": np.s_[:, :rank], "b": np.s_[:rank], "magnitude": np.s_[:]}[short]
            return np.ascontiguousarray(array[cut].T)

        inputs, outputs = ours[f"{OURS}{site.name}/a"], ours[f"{OURS}{site.name}/b"]
        shape = {"a": (rank, inputs.shape[-2]), "b": (outputs.shape[-1], rank)}
        name = f"{PREFIX}{module}.{leaf}"
        shape = shape.get(short, (outputs.shape[-1],))
        found.append(Entry(name, (entry.name,), shape, entry.dtype, make, True))
    return found
