"""Our own checkpoints, and `Checkpoint`, which every conversion passes through.

On disk, a converted checkpoint is a folder with config.json (see the package's docstring),
model.safetensors (tensors at our paths), and the processor and tokenizer files that came with it.
Workdirs of training runs are read as well.
"""

import functools
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from data2vec_jax.convert import fields, layouts, peft
from data2vec_jax.convert.layouts import Config
from data2vec_jax.convert.tables import Entry, entries_of, plan_read
from data2vec_jax.core import checkpoints, files, safetensors
from data2vec_jax.core.config import with_current_names
from data2vec_jax.core.errors import UserError
from data2vec_jax.core.trees import flatten, nest
from data2vec_jax.modalities import contract
from data2vec_jax.models import adapters, heads
from data2vec_jax.models.outputs import head_name

# Files that prepare inputs or name outputs; they are copied with the weights.
PROCESSORS = (
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "normalise.json",
    "merges.txt",
    "tokenizer.json",
    "sentencepiece.model",
    "encoder.json",
    "vocab.bpe",
    "dict.txt",
    "dict.ltr.txt",
    "metrics.json",
)
TEACHER = "teacher/"


@dataclass(frozen=True)
class Checkpoint:
    """A converted config, and tensors at our paths that are read when used."""

    path: Path
    """Of the source, for messages."""
    config: Config
    """The converted config."""
    entries: list[Entry]
    """Tensors at our paths."""
    unused: dict[str, str] = field(default_factory=dict)
    """Name of a source's tensor that no entry reads -> the reason."""
    processors: tuple[Path, ...] = ()
    """Processor and tokenizer files that are copied along."""
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Shapes of the source's tensors by their names."""

    def tree(self) -> dict[str, np.ndarray]:
        """All tensors by path, in memory."""
        return {entry.name: entry.make() for entry in self.entries}


def is_ours(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is one of ours."""
    return "modality" in config and "model" in config and "model_type" not in config


# What code meets that believes in settings which make no sense.
FAULTS_OF_SETTINGS = (TypeError, ValueError, LookupError, ArithmeticError, AttributeError)
FAULTS_OF_SETTINGS += (MemoryError, RecursionError)


def open_checkpoint(path: Any, base: Any = None) -> Checkpoint:
    """Anything that we can read, by its content. Raises UserError for anything else.

    base: of an adapter, the folder of its base model, if it is not where the adapter says.
    """
    path = Path(checkpoints.located(path))
    try:
        if peft.is_adapter(path):
            return _open_theirs(path, peft.open_adapter(path), base)
        if base is not None:
            raise UserError(f"{path} is not an adapter, so it has no base")
        home = _home(path)
        return _open_theirs(path) if home is None else _open_ours(path, home)
    except UserError as error:
        if str(error).startswith("config."):  # the options that its settings amount to
            raise UserError(f"{path}: {error}") from error
        raise
    except OSError as error:  # longer than a path may be, or closed to this user
        raise UserError(f"{str(path)[:80]}: {error.strerror or error}") from error
    except FAULTS_OF_SETTINGS as error:
        reason = (str(error).splitlines() or ["?"])[0]
        raise UserError(
            f"{path}: its settings make no model ({type(error).__name__}: {reason})"
        ) from error


def _open_theirs(path: Path, adapter: peft.Adapter | None = None, base: Any = None) -> Checkpoint:
    source = layouts.open_source(peft.base_of(adapter, base) if adapter else path)
    if adapter:
        source = peft.with_head(source, adapter)
    layout = layouts.find_layout(source)
    config = layout.configure(source)
    model_of(config)  # refuses sizes of which no table should be made
    config["origin"] = {"layout": layout.name, "config": dict(source.config)}
    state, table, small = layout.rename(source.state, config), layout.table(config), []
    if adapter:
        state = {**state, **peft.replaced(adapter)}
        config["adapters"], small = peft.read(adapter, table, config, state)
    try:
        reading = plan_read(table, state)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    shapes = {name: array.shape for name, array in {**source.state, **state}.items()}
    checkpoint = Checkpoint(
        path if adapter else source.path,
        config,
        reading.entries + small,
        reading.unused,
        _processors(source.folder),
        shapes,
    )
    return fitted(checkpoint)


def _home(path: Path) -> Path | None:
    """The folder with our config.json: the path itself, or above a step's folder."""
    folders = [path, *path.parents[:2]] if path.is_dir() else [path.parent]
    for folder in folders if path.is_dir() or path.name in layouts.WEIGHTS else ():
        if (folder / "config.json").is_file():
            return folder if is_ours(files.read_json(folder / "config.json")) else None
    return None


# Entries of a converted config.
KEPT = (
    "modality",
    "model",
    "conv_adapter",
    "head",
    "labels",
    "teacher",
    "prenet",
    "adapters",
    "hf_major",
    "origin",
)


def _config_of_run(training: Config, home: Path) -> Config:
    """Converted config of a run (there `task` names a module, and `adapter` is LoRA's section)."""
    config = {key: training[key] for key in ("modality", "model")}
    if training.get("head"):
        config["head"] = {k: v for k, v in training["head"].items() if v is not None}
    if (home / "labels.json").is_file():  # names of the classes that the run found in its data
        config["labels"] = files.read_json(home / "labels.json", list)
    return config


def _open_ours(path: Path, home: Path) -> Checkpoint:
    stored = with_current_names(files.read_json(home / "config.json"))
    training = stored if "total_steps" in stored else {}
    if training:
        config = _config_of_run(training, home)
    else:
        stored = fields.with_current_names(stored)
        config = {key: stored[key] for key in KEPT if stored.get(key) is not None}
    weights = home / "model.safetensors"
    if weights.is_file():
        found: Mapping[str, Any] = safetensors.SafeTensors(weights)
    else:
        found, teacher = flatten(checkpoints.load_params(path)), {}
        if checkpoints.held_paths(path, "teacher"):  # fine-tuned models have none
            teacher = flatten(checkpoints.load_params(path, subtree="teacher"), TEACHER)
        found = found | teacher
        if teacher:
            front = f"{TEACHER}{model_of(config).frontend_params}/"
            whole = any(path.startswith(front) for path in teacher)
            config["teacher"] = "model" if whole else "encoder"
    if adapters.switched_on(training.get("adapter")):
        options = {k: v for k, v in training["adapter"].items() if k != "dropout"}
        base = {k: v for k, v in found.items() if not k.startswith(("task/", peft.OURS))}
        sites = adapters.find(nest(base), **options)
        config["adapters"] = {"sites": [site._asdict() for site in sites]}
    shapes = {name: array.shape for name, array in found.items()}
    return fitted(Checkpoint(home, config, entries_of(found), {}, _processors(home), shapes))


def _processors(folder: Path | None) -> tuple[Path, ...]:
    if folder is None:
        return ()
    folders = (folder, folder / "tokenizer")  # the second in a workdir
    paths = {name: place / name for place in folders for name in PROCESSORS}
    paths |= {name: folder / name for name in PROCESSORS if (folder / name).is_file()}
    return tuple(path for path in paths.values() if path.is_file())


# What the model of a config expects ---------------------------------------------------------------


def model_of(config: Config) -> Any:
    """The linen module of a config; computes in float32."""
    modality = contract.get(config["modality"])
    return contract.make_model(modality, config["model"])


def inference_of(config: Config) -> contract.Inference:
    """The modality's `inference`. Raises UserError: its record has none."""
    found = contract.get(config["modality"]).inference
    if found is None:
        raise UserError(
            f"config.modality: '{config['modality']}' cannot be loaded, its MODALITY has no "
            "`inference`"
        )
    return found


def shapes_of(config: Config) -> dict[str, tuple[int, ...]]:
    """Path -> shape of every parameter that the config's model and heads have."""
    model = model_of(config)
    example = dict(inference_of(config).example(model))
    found = jax.eval_shape(model.init, jax.random.key(0), example)["params"]
    width = model.width
    x = jax.ShapeDtypeStruct((2, 8, width), jnp.float32)
    states = jax.ShapeDtypeStruct((model.encoder.depth + 1, 2, 8, width), jnp.float32)
    parts = {"": found}
    if config.get("conv_adapter"):
        adapter = heads.make_adapter(config["conv_adapter"])
        long = jax.ShapeDtypeStruct((2, 100_000, width), jnp.float32)  # enough for any stride
        parts["adapter/"] = jax.eval_shape(adapter.init, jax.random.key(0), long)["params"]
        x = jax.ShapeDtypeStruct((2, 8, adapter.width), jnp.float32)
    if head_name(config) in heads.HEADS:
        table = jax.ShapeDtypeStruct((config["model"].get("vocab_size", 8), width), jnp.float32)
        head, features = heads.make(config["head"]), heads.Features(x, states, None, table)
        parts["task/"] = jax.eval_shape(head.init, jax.random.key(0), features).get("params", {})
    if sites := peft.sites_of(config):
        params = {**found, "task": parts.get("task/", {})}
        init = functools.partial(adapters.init, jax.random.key(0), sites)
        parts["adapters/"] = jax.eval_shape(init, params)
    return {
        path: tuple(x.shape)
        for prefix, tree in parts.items()
        for path, x in flatten(tree, prefix).items()
    }


# Parameters that serve pretraining only; a checkpoint may do without. Those of `pretext/`, which
# models of a config do not have, are left behind.
OPTIONAL = r"^(head|decoder|pretext)/"


def fitted(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint, with tensors that its config has no use for set aside.

    Raises UserError if a shape is not what the config says. What is missing is not checked here;
    see `missing`.
    """
    wanted, entries, unused = shapes_of(checkpoint.config), [], dict(checkpoint.unused)
    for entry in checkpoint.entries:
        path = entry.name.removeprefix(TEACHER)
        if path not in wanted:
            of_pretraining = re.search(OPTIONAL, path)
            for name in entry.sources:
                unused[name] = (
                    "it serves pretraining only"
                    if of_pretraining
                    else "the config has no use for it"
                )
            continue
        if entry.shape != wanted[path]:
            raise UserError(
                f"{checkpoint.path}: '{entry.sources[0]}' does not fit the config: {path} is "
                f"{list(entry.shape)}, and should be {list(wanted[path])}"
            )
        entries.append(entry)
    return replace(checkpoint, entries=entries, unused=unused)


def missing(checkpoint: Checkpoint) -> list[str]:
    """Paths of parameters that the config's model has and the checkpoint lacks."""
    have = {entry.name for entry in checkpoint.entries}
    wanted = shapes_of(checkpoint.config)
    return [path for path in wanted if path not in have and not re.search(OPTIONAL, path)]


def demand_whole(checkpoint: Checkpoint, allowed: tuple[str, ...] = ()) -> None:
    """Raises UserError if parameters are missing, except paths that match `allowed` (patterns)."""
    lost = [p for p in missing(checkpoint) if not any(re.search(a, p) for a in allowed)]
    if lost:
        more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
        raise UserError(
            f"{checkpoint.path}: the checkpoint is incomplete; it lacks '{lost[0]}'{more} "
            "(if that is meant: --missing=PATTERN)"
        )


def of_teacher(checkpoint: Checkpoint) -> Checkpoint:
    """The teacher in the student's place: its averaged tensors, and the student's others."""
    teacher = {
        entry.name.removeprefix(TEACHER): entry._replace(name=entry.name.removeprefix(TEACHER))
        for entry in checkpoint.entries
        if entry.name.startswith(TEACHER)
    }
    if not teacher:
        raise UserError(f"{checkpoint.path}: holds no teacher")
    students = [entry for entry in checkpoint.entries if not entry.name.startswith(TEACHER)]
    config = {key: value for key, value in checkpoint.config.items() if key != "teacher"}
    return replace(checkpoint, config=config, entries=[teacher.get(e.name, e) for e in students])


# Writing ------------------------------------------------------------------------------------------


def save(checkpoint: Checkpoint, target: Path) -> None:
    """Writes our own folder."""
    with files.new_target(target) as draft:
        draft.mkdir()
        files.write_json(draft / "config.json", checkpoint.config)
        safetensors.write_safetensors(
            draft / "model.safetensors", checkpoint.entries, {"format": "data2vec_jax"}
        )
        copy(checkpoint.processors, draft)


def copy(paths: tuple[Path, ...], folder: Path) -> None:
    """Copies processor files."""
    for path in paths:
        shutil.copyfile(path, folder / path.name)
