"""Sections of a config: their schema is the function or frozen dataclass that they are for.

An option's type and range are its annotation there, such as `Annotated[float, Range(0, 1)]`,
`Literal["post", "pre"]` or `Sequence[PositiveInt]`.
"""

import copy
import dataclasses
import inspect
import numbers
import re
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from data2vec_jax.core.errors import UserError, nearest

# Ranges of options --------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Range:
    """Numbers from `least` to `most`, or above `above`, or below `below`."""

    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None

    def holds(self, value: Any) -> bool:
        """Whether a number is inside."""
        return (
            (self.least is None or value >= self.least)
            and (self.most is None or value <= self.most)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        if self.least is not None and self.most is not None:
            return f"from {self.least:,} to {self.most:,}"
        if self.least is not None and self.below is None:
            return f"of {self.least:,} or more"
        words = ("from", self.least), ("above", self.above), ("below", self.below)
        parts = [f"{word} {n:,}" for word, n in (*words, ("at most", self.most)) if n is not None]
        return " and ".join(parts)


@dataclasses.dataclass(frozen=True)
class Length:
    """Lists of `least` to `most` values."""

    least: int = 1
    most: int = 10_000

    def holds(self, value: Any) -> bool:
        """Whether a list is that long."""
        return self.least <= len(value) <= self.most

    def __str__(self) -> str:
        return f"({self.least:,} to {self.most:,} of them)"


@dataclasses.dataclass(frozen=True)
class RegularExpression:
    """Texts that compile as one."""

    def holds(self, value: Any) -> bool:
        """Whether a text compiles."""
        try:
            re.compile(value)
        except (re.error, RecursionError, OverflowError):
            return False
        return True

    def __str__(self) -> str:
        return "in the syntax of regular expressions"


PositiveInt = Annotated[int, Range(1)]
NonNegativeInt = Annotated[int, Range(0)]
PositiveFloat = Annotated[float, Range(above=0)]
NonNegativeFloat = Annotated[float, Range(0)]
Share = Annotated[float, Range(0, 1)]
Inside = Annotated[float, Range(above=0, below=1)]
DropRate = Annotated[float, Range(0, below=1)]  # what is kept is divided by 1 - rate
Size = Annotated[int, Range(1, 2**20)]  # of an axis of a model's arrays
Vocabulary = Annotated[int, Range(2, 2**24)]  # tokens
Span = Annotated[int, Range(1, 10_000)]  # positions in a row
Depth = Annotated[int, Range(1, 1000)]  # layers
Steps = Annotated[int, Range(1, 2**31 - 1)]  # the step is an int32 on devices
Rows = Annotated[int, Range(1, 2**24)]  # of a batch
Pattern = Annotated[str, RegularExpression()]  # found in paths of parameters

# What plain annotations are called, one and many, and the values that they take.
KINDS = {
    bool: ("true or false", "true or false", bool),
    int: ("a whole number", "whole numbers", numbers.Integral),
    float: ("a number", "numbers", numbers.Real),
    str: ("a text", "texts", str),
    types.NoneType: ("null", "null", types.NoneType),
    Mapping: ("a section of options", "sections of options", Mapping),
}
LARGEST = {int: 10**18, float: 1e30}  # float32, in which options are used, ends soon after


def check_section(
    section: str, options: Mapping[str, Any], function: Callable, given: Iterable[str] = ()
) -> None:
    """Refuses keys of a config section that are not arguments of `function`, and values that its
    annotations do not allow.

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
    if not is_section(options):
        raise UserError(f"{prefix}: {shown(options)} is not a section of options")
    for key in options:
        if key not in parameters:
            raise UserError(f"{prefix}.{key}: no such option{nearest(str(key), parameters)}")
        check_option(f"{prefix}.{key}", options[key], parameters[key].annotation)
    for name, parameter in parameters.items():
        if parameter.default is parameter.empty and name not in options:
            raise UserError(f"{prefix}: missing option '{name}'")


def is_section(value: Any) -> bool:
    """Whether it is a mapping; ml_collections' ConfigDict is one in all but name."""
    return isinstance(value, Mapping) or {"keys", "items"} <= set(dir(type(value)))


def check_option(option: str, value: Any, annotation: Any) -> None:
    """Raises UserError unless `value` is what the annotation of `option` allows."""
    if fits(value, annotation):
        return
    choices = [name for name in _choices(annotation) if isinstance(name, str)]
    if choices and isinstance(value, str):
        raise UserError(f"{option}: no {shown(value)}{nearest(value, choices)}")
    raise UserError(f"{option}: {shown(value)} is not {_wanted(annotation, value)}")


def choose(section: str, options: Mapping[str, Any], key: str, choices: Iterable[str]) -> str:
    """The option `key` of a section, which says what its other options are for.

    Raises UserError: it is missing, or none of `choices`.
    """
    if key not in options:
        names = ", ".join(sorted(choices))
        raise UserError(f"config.{section}: missing option '{key}'; choose from {names}")
    check_option(f"config.{section}.{key}", options[key], Literal[*choices])
    return options[key]


def shown(value: Any) -> str:
    """A value as it stands in a config, cut off where it is long."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}..."


def fits(value: Any, annotation: Any) -> bool:
    """Whether an option of this annotation can have this value; any, if it is none of `KINDS`.

    Numbers are finite, and lists may be tuples: JSON knows no others.
    """
    origin, args = get_origin(annotation) or annotation, get_args(annotation)
    if origin in (Union, types.UnionType):
        return any(fits(value, each) for each in args)
    if origin is Literal:
        return any(type(value) is type(each) and value == each for each in args)
    if origin is Annotated:
        return fits(value, args[0]) and all(limit.holds(value) for limit in args[1:])
    if origin in (Sequence, tuple):
        if not isinstance(value, list | tuple):
            return False
        if origin is tuple and args[-1] is not ...:
            return len(value) == len(args) and all(map(fits, value, args))
        return all(fits(each, args[0]) for each in value)
    if origin not in KINDS:
        return True
    if origin is Mapping:
        return is_section(value)
    good = isinstance(value, KINDS[origin][-1]) and (origin is bool or not isinstance(value, bool))
    if origin in LARGEST:
        return good and abs(value) <= LARGEST[origin]
    return good and not (origin is str and "\0" in value)  # which no path can have


def _wanted(annotation: Any, value: Any, many: bool = False) -> str:
    """What an annotation allows, in words; `many`: of each value of a list."""
    origin, args = get_origin(annotation) or annotation, get_args(annotation)
    if origin in (Union, types.UnionType):
        return " or ".join(_wanted(each, value, many) for each in args)
    if origin is Literal:
        return f"{'some' if many else 'one'} of {', '.join(map(str, args))}"
    if origin is Annotated:
        return " ".join([_wanted(args[0], value, many), *map(str, args[1:])])
    if origin in (Sequence, tuple):
        number = f"{len(args)} " if origin is tuple and args[-1] is not ... else ""
        return f"{'lists' if many else 'a list'} of {number}{_wanted(args[0], value, True)}"
    words = KINDS[origin][many] if origin in KINDS else "anything"
    if origin in LARGEST and isinstance(value, int) and abs(value) > LARGEST[origin]:
        return f"{words} of at most {'18 digits' if origin is int else '1e30'}"
    if origin is float and isinstance(value, float) and not abs(value) <= LARGEST[float]:
        return words.replace(
            "number", "finite number" if value - value != 0 else "number below 1e30"
        )
    return words


def _choices(annotation: Any) -> list[Any]:
    """The names that an option can be, if it can be one of some."""
    if get_origin(annotation) is Literal:
        return list(get_args(annotation))
    if get_origin(annotation) in (Union, types.UnionType):
        return [name for each in get_args(annotation) for name in _choices(each)]
    return []


# What all configs have ----------------------------------------------------------------------------


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
    seed: NonNegativeInt  # of parameters, masks, dropout and the order of the examples
    total_steps: Steps
    log_every: NonNegativeInt  # steps; 0 for never
    eval_every: NonNegativeInt  # steps; 0 for never
    accumulate: PositiveInt  # micro-batches per update
    dtype: Literal["float32", "bfloat16"]  # of the computation
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
