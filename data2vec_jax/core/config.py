"""Sections of a config: their schema is the function or frozen dataclass that they are for."""

import copy
import dataclasses
import inspect
import numbers
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, get_args, get_origin

from data2vec_jax.core.errors import UserError, nearest


def check_section(
    section: str, options: Mapping[str, Any], function: Callable, given: Iterable[str] = ()
) -> None:
    """Refuses keys of a config section that are not arguments of `function`, and values that are
    not of the annotated type.

    Every section of a config is the keyword arguments of exactly one function, or the fields of a
    frozen dataclass, so its signature is the schema. `given` names the arguments that the caller
    supplies itself.
    """
    parameters = {
        name: p
        for name, p in inspect.signature(function).parameters.items()
        if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)
        and name not in {*given, "self", "parent", "name"}
    }
    prefix = f"config.{section}" if section else "config"
    for key in options:
        if key not in parameters:
            raise UserError(f"{prefix}.{key}: no such option{nearest(key, parameters)}")
        if wanted := misfit(options[key], parameters[key].annotation):
            raise UserError(f"{prefix}.{key}: {options[key]!r} is not {wanted}")
    for name, parameter in parameters.items():
        if parameter.default is parameter.empty and name not in options:
            raise UserError(f"{prefix}: missing option '{name}'")


# What the annotations of options are called, and the values that they take.
KINDS = {
    bool: ("true or false", bool),
    int: ("a whole number", numbers.Integral),
    float: ("a number", numbers.Real),
    str: ("a text", str),
    Sequence: ("a list", (list, tuple)),
    types.NoneType: ("null", types.NoneType),
}


def misfit(value: Any, annotation: Any) -> str:
    """What `value` should be, or '' if it is that, or if the annotation is none of `KINDS`."""
    union = get_origin(annotation) is types.UnionType
    names = []
    for each in get_args(annotation) if union else (annotation,):
        each = get_origin(each) or each
        if not isinstance(each, type) or each not in KINDS:
            return ""
        name, kind = KINDS[each]
        if isinstance(value, kind) and (each is bool or not isinstance(value, bool)):
            return ""
        names.append(name)
    return " or ".join(names)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What the configs of all tasks have. A section is a mapping; its options stand beside what it
    is for."""

    modality: str  # a folder in `data2vec_jax.modalities`, or the dotted path of a user's module
    model: Mapping  # `Modality.model`
    examples: Mapping  # `Modality.layout`; in fine-tuning `Modality.input_layout`
    data: Mapping  # `DataConfig` of the task
    schedule: Mapping  # `optimizer.make_schedule`: the learning rate
    optim: Mapping  # `optimizer.OptimizerConfig`
    seed: int  # of parameters, masks, dropout and the order of the examples
    total_steps: int
    log_every: int  # steps; 0 for never
    eval_every: int  # steps; 0 for never
    accumulate: int  # micro-batches per update
    dtype: str  # of the computation: 'float32' or 'bfloat16'
    mesh: Mapping  # `sharding.make_mesh`
    checkpoint: Mapping  # `Checkpoints`
    skip: Mapping = dataclasses.field(default_factory=dict)  # `train_step.SkipConfig`
    # `sharding.shardings`, if its rule is not what you want.
    sharding: Mapping = dataclasses.field(default_factory=dict)


# Options of configs that users and their workdirs hold: old dotted path -> today's. A section comes
# before its options, whose old paths are those in the renamed section.
RENAMED = {
    "collapse.abort": "collapse.action",
    "data.level": "data.equal_rows",
    "data.multiple": "data.rows_multiple_of",
    "layers": "layerwise_lr",
    "model_changes": "model_overrides",
    "model.leave": "model.keep_prob",
    "model.random": "model.replace_prob",
    "model_overrides.leave": "model_overrides.keep_prob",
    "model_overrides.random": "model_overrides.replace_prob",
    "start": "init_from",
}

# Values of such options that have other names today: today's dotted path -> {old: today's}.
REVALUED = {"collapse.action": {"True": "stop", "False": "warn"}}


def with_current_names(config: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a config in which options with names in `RENAMED` have today's, and values."""
    config = dict(config)
    for old, new in RENAMED.items():
        (*sections, key), name = old.split("."), new.split(".")[-1]
        if not sections:
            if key in config:
                config[name] = config.pop(key)
        elif isinstance(section := config.get(sections[0]), Mapping) and key in section:
            config[sections[0]] = {name if k == key else k: v for k, v in section.items()}
    for path, values in REVALUED.items():
        section, name = path.split(".")
        options = config.get(section)
        if isinstance(options, Mapping) and str(options.get(name)) in values:
            config[section] = {**options, name: values[str(options[name])]}
    return config


def current_name(option: str) -> str:
    """Today's dotted path of an option: 'data.multiple' -> 'data.rows_multiple_of'."""
    for old, new in RENAMED.items():
        if f"{option}.".startswith(f"{old}."):
            option = new + option[len(old) :]
    return option


def with_options(
    config: Mapping[str, Any], options: Mapping[str, Any], strict: bool = False
) -> dict[str, Any]:
    """A copy of `config` with other values at dotted paths, such as 'model.encoder.depth'.

    strict: an option must be in `config` already.
    Raises UserError: it is not, or a part of a path is no section.
    """
    changed = copy.deepcopy(dict(config))
    for path, value in options.items():
        *sections, last = path.split(".")
        section = changed
        for name in sections:
            if strict and name not in section:
                raise UserError(f"config.{path}: no such option{nearest(name, section)}")
            section = section.setdefault(name, {})
            if not isinstance(section, dict):
                raise UserError(f"config.{path}: {name} is no section")
        if strict and last not in section:
            raise UserError(f"config.{path}: no such option{nearest(last, section)}")
        section[last] = value
    return changed


def differences(old: Any, new: Any, path: str = "") -> list[str]:
    """Dotted paths at which two JSON values differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        found = []
        for key in sorted({*old, *new}):
            below = f"{path}.{key}" if path else key
            if key not in old or key not in new:
                found.append(below)
            else:
                found += differences(old[key], new[key], below)
        return found
    return [] if old == new else [path]
