"""What commands share: their arguments, what they print, and how they end."""

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from absl import flags
from ml_collections import config_flags

from data2vec_jax.core.config import current_name, with_current_names
from data2vec_jax.core.errors import STOPPED, UserError, nearest

RECIPES = Path(__file__).parent.parent / "configs"
NO_RECIPES = ("__init__", "common")
TRAIN_OPTIONS = {"workdir": "DIR", "init_from": "CHECKPOINT"}  # of `train`, beside --config


class Arguments(argparse.ArgumentParser):
    """A command's arguments, of which a wrong one is a `UserError`."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (--help lists the arguments)")


def run_main(main: Callable[[], Any]) -> None:
    """Runs a command; a `UserError` becomes one line on stderr and exit code 2, Ctrl-C is 130."""
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(STOPPED)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def say(text: str) -> None:
    """A line for the user; metrics go to files, and the progress bar to the same stream."""
    print(text, file=sys.stderr, flush=True)


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
    argv, values = [argv[0], *map(_current_option, argv[1:])], flags.FlagValues()
    config_flags.DEFINE_config_file(
        "config", None, "config file, path.py:variant", flag_values=values, sys_argv=argv
    )
    for name, meaning in options.items():
        define = flags.DEFINE_string if meaning else flags.DEFINE_bool
        define(name, None, meaning, flag_values=values)
    try:
        rest = values(argv)
        config = values.config
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        text = one_line(error)
        # ml_collections gives the name, at times quoted and with a hint, and no more.
        if text[0] in "\"'" or isinstance(error, KeyError):
            text = text.replace("\\n", "; ").replace("\\'", "").strip("\"'")
            text = f"the config has no option {text}"
        raise UserError(text) from None
    if len(rest) > 1:
        names = ", ".join(f"--{name}" for name in ("config", *options))
        raise UserError(f"unknown argument '{rest[1]}'; options are {names}")
    if config is None:
        raise UserError("--config=configs/NAME.py:VARIANT is missing")
    for name in required:
        if not values[name].value:
            raise UserError(f"--{name}={options[name]} is missing")
    config = with_current_names(config.to_dict())
    return config, {name: values[name].value for name in options}


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


def find_config(text: str) -> str:
    """'PATH.py:VARIANT' of a recipe that comes with the package, 'NAME:VARIANT', or of a file.

    Raises UserError: there is neither; the nearest name is in the message.
    """
    name, colon, variant = text.partition(":")
    path = Path(name).expanduser()
    if not name.endswith(".py"):
        shipped = {p.stem: p for p in sorted(RECIPES.glob("*.py")) if p.stem not in NO_RECIPES}
        if name not in shipped:
            raise UserError(f"no recipe '{name}'{nearest(name, shipped)}; or give a file, path.py")
        path = shipped[name]
    elif not path.is_file():
        beside = [str(p) for p in path.parent.glob("*.py")] if path.parent.is_dir() else []
        raise UserError(f"no config file {path}{nearest(str(path), beside) if beside else ''}")
    return f"{path}{colon}{variant}"


def config_words(argv: Sequence[str]) -> str:
    """The config of a command line, for the record: file, variant and what overrides it."""
    given = [option.removeprefix("--") for option in argv if option.startswith("--config")]
    return " ".join(given).removeprefix("config=")


def write_json(path: str, result: Mapping[str, Any]) -> None:
    """What --json=FILE asks for. Raises UserError: it cannot be written."""
    try:
        Path(path).write_text(json.dumps(result, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"--json={path}: {error.strerror}") from None


def one_line(error: Exception) -> str:
    """The first line of an error's message that says something; of a traceback in it, the last."""
    text = str(error.args[0] if isinstance(error, KeyError) and error.args else error)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if any(line.startswith("Traceback (most recent call last)") for line in lines):
        return lines[-1].removeprefix("ValueError: ")
    return lines[0] if lines else type(error).__name__
