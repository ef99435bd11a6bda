"""Tables of options: fields of their configs and places in converted ones, for both directions."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from data2vec_jax.core import config as core
from data2vec_jax.core.errors import UserError, nearest

Config = dict[str, Any]

# Sections of converted configs, and of exports of 2.0: the name in older files -> today's.
RENAMED = {"task": "head", "adapter": "conv_adapter"}


def with_current_names(converted: Mapping[str, Any]) -> Config:
    """A converted config whose sections have today's names."""
    options = core.with_current_names(converted)
    return {RENAMED.get(key, key): value for key, value in options.items()}


class Field(NamedTuple):
    """One option in both configs."""

    theirs: str
    """Name in their config."""
    default: Any
    """Their value where the field is absent."""
    ours: str | tuple[str, ...]
    """Dotted path in the converted config; several must have equal values on export."""
    absent: Any = None
    """Our value where the path is absent."""
    there: Callable[[Any], Any] = lambda value: value
    """Their value -> ours."""
    back: Callable[[Any], Any] = lambda value: value
    """Our value -> theirs."""

    @property
    def places(self) -> tuple[str, ...]:
        """Our places, always as a tuple."""
        return (self.ours,) if isinstance(self.ours, str) else self.ours


def get(config: Mapping[str, Any], place: str, absent: Any = None) -> Any:
    """The value at a dotted place."""
    node: Any = config
    for key in place.split("."):
        if not isinstance(node, Mapping) or key not in node:
            return absent
        node = node[key]
    return node


def put(config: Config, place: str, value: Any) -> None:
    """Sets the value at a dotted place."""
    *sections, key = place.split(".")
    for section in sections:
        config = config.setdefault(section, {})
    config[key] = value


def take(fields: Iterable[Field], theirs: Mapping[str, Any], config: Config) -> None:
    """Translates fields of their config into the converted `config`."""
    for field in fields:
        value = theirs.get(field.theirs)
        value = field.default if value is None else value
        for place in field.places:
            put(config, place, field.there(value))


def give(fields: Iterable[Field], config: Mapping[str, Any]) -> Config:
    """The inverse of `take`. Raises UserError: one field of theirs has several values in ours."""
    theirs = {}
    for field in fields:
        values = [get(config, place, field.absent) for place in field.places]
        if any(value != values[0] for value in values):
            first, *others = field.places
            raise UserError(
                f"config.{others[0]} differs from config.{first}; there they are one field, "
                f"'{field.theirs}'"
            )
        theirs[field.theirs] = field.back(values[0])
    return theirs


def demand(config: Mapping[str, Any], wanted: Mapping[str, Any], what: str) -> None:
    """Raises UserError where the config differs from the values that `what` is limited to."""
    for place, value in wanted.items():
        found = get(config, place, value)
        if found != value:
            raise UserError(
                f"config.{place}: {what} has no place for {found!r}, only for {value!r}"
            )


def refuse(theirs: Mapping[str, Any], neutral: Mapping[str, Sequence[Any]], path: Any) -> None:
    """Raises UserError for unsupported options. neutral: name -> values without an effect."""
    for name, allowed in neutral.items():
        if name in theirs and theirs[name] not in allowed:
            raise UserError(f"{path}: config field '{name}' = {theirs[name]!r} is not supported")


def architecture(theirs: Mapping[str, Any], known: Iterable[str], path: Any) -> str:
    """The class that a Hugging Face config names. Raises UserError for none of `known`."""
    names = theirs.get("architectures") or []
    if not names:
        raise UserError(f"{path}: config.json names no 'architectures'")
    if names[0] not in known:
        raise UserError(
            f"{path}: architecture '{names[0]}' is not supported{nearest(names[0], known)}"
        )
    return names[0]


def generation(config: Mapping[str, Any]) -> str:
    """Which data2vec a config of ours is of: '1.0' or '2.0'."""
    model = config["model"]
    second = any(model.get(key) for key in ("decoder", "alibi", "sincos"))
    second |= "2.0" in str((config.get("origin") or {}).get("layout"))
    return "2.0" if second else "1.0"
