"""The command line: arguments of argparse's commands, and configs with options that override them.

`--config=NAME:VARIANT` is a recipe that comes with the package, `--config=path.py:VARIANT` a file
of the user's own. `--config.section.key=value` overrides an option of it.
"""

import argparse
import ast
import functools
import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from absl import flags
from ml_collections import ConfigDict, config_flags

from data2vec_jax.cli.output import one_line
from data2vec_jax.core.config import current_name, with_current_names
from data2vec_jax.core.errors import UserError, nearest

RECIPES = Path(__file__).parent.parent / "configs"
NO_RECIPES = ("__init__", "common")
LONGEST = 500  # characters of a message that repeats what was given
PATHS = ("DIR", "CHECKPOINT", "FILE")  # meanings of options whose `~` is the home folder
# Of `train`, beside --config.
TRAIN_OPTIONS = {"workdir": "DIR", "init_from": "CHECKPOINT", "changed_corpus": ""}


def user_path(text: str) -> Path:
    """A path of the command line: no shell replaces the `~` in `--json=~/scores.json`."""
    return Path(os.path.expanduser(text))


class Arguments(argparse.ArgumentParser):
    """A command's arguments, of which a wrong one is a `UserError`."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (--help lists the arguments)")


def find_config(text: str) -> str:
    """'PATH.py:VARIANT' of a recipe that comes with the package, 'NAME:VARIANT', or of a file.

    Raises UserError: there is neither; the nearest name is in the message.
    """
    name, colon, variant = text.partition(":")
    path = Path(name).expanduser()
    if not name.endswith(".py"):
        shipped = {p.stem: p for p in sorted(RECIPES.glob("*.py")) if p.stem not in NO_RECIPES}
        if name not in shipped:
            hint = nearest(name, shipped)
            if Path(f"{name}.py").is_file():
                hint = f"; did you mean {name}.py{colon}{variant}?"
            raise UserError(f"'{name}' is no recipe, and no path that ends in .py{hint}")
        path = shipped[name]
    elif not path.is_file():
        beside = [str(p) for p in path.parent.glob("*.py")] if path.parent.is_dir() else []
        raise UserError(f"no config file {path}{nearest(str(path), beside) if beside else ''}")
    return f"{path}{colon}{variant}"


def parse(
    argv: Sequence[str],
    options: Mapping[str, str] = TRAIN_OPTIONS,
    required: Sequence[str] = ("workdir",),
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(config, values of the other `options`) from the command line.

    options: name -> what it is, '' for a switch without a value. --help prints the command's
    docstring and ends it. Raises UserError for what absl would crash on.
    """
    if {"-h", "--help"} & set(argv):
        print((sys.modules["__main__"].__doc__ or __doc__).strip())
        sys.exit(0)
    argv = [argv[0], *map(_current_option, _joined(argv[1:]))]
    changes = {a.split("=")[0]: a for a in argv if a.startswith("--config.") and "=" in a}
    # ml_collections knows the options that the recipe sets; others stay at their defaults.
    values, added = _flags([a for a in argv if a not in changes.values()], options), {}
    if changes:
        recipe = values.config
        added = {name: a for name, a in changes.items() if _is_added(recipe, name.split(".")[1:])}
        values = _flags([a for a in argv if a not in added.values()], options)
    for name in required:
        if not values[name].value:
            raise UserError(f"--{name}={options[name]} is missing")
    found = {name: values[name].value for name in options}
    paths = {name for name, meaning in options.items() if meaning in PATHS}
    found |= {name: str(user_path(found[name])) for name in paths if found[name]}
    config = values.config.to_dict()
    for name, argument in added.items():
        *sections, key = name.split(".")[1:]
        place = config
        for section in sections:
            place = place.setdefault(section, {})
        place[key] = _value(argument.partition("=")[2])
    for name, argument in changes.items():
        # ml_collections reads a None as a text where the recipe has one.
        if argument.partition("=")[2] == "None":
            *sections, key = name.split(".")[1:]
            place = functools.reduce(lambda place, section: place[section], sections, config)
            place[key] = None
    return with_current_names(config), found


def _flags(argv: Sequence[str], options: Mapping[str, str]) -> flags.FlagValues:
    """What absl and ml_collections make of a command line."""
    values = flags.FlagValues()
    config_flags.DEFINE_config_file(
        "config", None, "config file, path.py:variant", flag_values=values, sys_argv=list(argv)
    )
    for name, meaning in options.items():
        define = flags.DEFINE_string if meaning else flags.DEFINE_bool
        define(name, None, meaning, flag_values=values)
    names = ", ".join(f"--{name}" for name in ("config", *options))
    try:
        rest = values(argv)
    except Exception as error:  # anything, for a config file is Python
        text = one_line(error)
        if isinstance(error, flags.UnrecognizedFlagError):
            near = nearest(error.flagname, ("config", *options))
            text = f"no option --{error.flagname}{near}; there are {names}, and --config.NAME"
        elif place := _line_of_config(error, argv):
            text = f"{place}: {type(error).__name__}: {text}"
        # ml_collections gives the name, at times quoted and with a hint, and no more.
        elif text[0] in "\"'" or isinstance(error, KeyError):
            text = text.replace("\\n", "; ").replace("\\'", "").strip("\"'")
            text = f"the config has no option {text}"
        raise UserError(text[:LONGEST]) from None
    if len(rest) > 1:
        raise UserError(f"unknown argument '{rest[1]}'; options are {names}")
    if values.config is None:
        raise UserError("--config=NAME:VARIANT is missing")
    if not isinstance(values.config, ConfigDict):
        kind = type(values.config).__name__
        raise UserError(f"--config: get_config returns a {kind}, not an ml_collections.ConfigDict")
    return values


def _is_added(config: Any, path: Sequence[str]) -> bool:
    """Whether the recipe has no such option, in sections that it has or may get.

    Whether there is such an option is for those to say who know the section: `check_section`.
    """
    for part in path:
        if not isinstance(config, ConfigDict) or not part.isidentifier():
            return False
        if part not in config:
            return all(each.isidentifier() for each in path)
        config = config[part]
    return False


def _value(text: str) -> Any:
    """A number, a list or a name such as None or true; else the text itself."""
    names = {"none": None, "null": None, "true": True, "false": False}
    if text.lower() in names:
        return names[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text


def _line_of_config(error: Exception, argv: Sequence[str]) -> str:
    """'mine.py:3' of a config file of the user's own in which an error arose, or ''."""
    value = next((a for a in argv if a.startswith("--config=")), "").removeprefix("--config=")
    path = os.path.abspath(value.partition(":")[0])
    if Path(path).parent == RECIPES:
        return ""
    frames = [(f.filename, f.lineno) for f in traceback.extract_tb(error.__traceback__)]
    if isinstance(error, SyntaxError):
        frames.append((error.filename or "", error.lineno))
    lines = [line for file, line in frames if os.path.abspath(file) == path]
    return f"{path}:{lines[-1]}" if lines else ""


def _joined(argv: Sequence[str]) -> list[str]:
    """Arguments with `--config NAME` as `--config=NAME`."""
    argv = list(argv)
    if "--config" in argv[:-1]:
        i = argv.index("--config")
        argv[i : i + 2] = [f"--config={argv[i + 1]}"]
    return argv


def _current_option(option: str) -> str:
    """An option of the command line with today's name and the path of its recipe."""
    name, equals, value = option.partition("=")
    if name == "--config":
        value = find_config(value) if equals else value
    elif name.startswith("--config."):
        name = f"--config.{current_name(name.removeprefix('--config.'))}"
    elif name.startswith("--"):
        name = f"--{current_name(name.removeprefix('--'))}"
    return f"{name}{equals}{value}"


def config_words(argv: Sequence[str]) -> str:
    """The config of a command line, for the record: file, variant and what overrides it."""
    given = [option.removeprefix("--") for option in argv if option.startswith("--config")]
    return " ".join(given).removeprefix("config=")
