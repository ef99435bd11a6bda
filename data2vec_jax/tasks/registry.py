"""Which module is the task of a config, and whether all of its sections make sense."""

import importlib
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from data2vec_jax.core import optimizer, sharding
from data2vec_jax.core.checkpoints import Checkpoints
from data2vec_jax.core.config import check_section
from data2vec_jax.core.errors import UserError, nearest
from data2vec_jax.core.state import ema_decay
from data2vec_jax.core.train_step import SkipConfig
from data2vec_jax.metrics.collapse import CollapseConfig

# A task's module has: CONFIG, the dataclass of its configs; resolve_config, (config, init_from)
# -> the config with what the checkpoint `init_from` decides; make, config -> Task; abstract_task,
# the same without data.
MODULES = ("pretrain", "classify", "transcribe", "answer")


def task_module(config: Mapping[str, Any]) -> ModuleType:
    """The module of `config.task`."""
    name = config.get("task", "pretrain")
    if name not in MODULES:
        raise UserError(f"config.task: no task '{name}'{nearest(str(name), MODULES)}")
    return importlib.import_module(f"data2vec_jax.tasks.{name}")


def check_config(config: Mapping[str, Any]) -> None:
    """Refuses unknown or missing options before anything is read or compiled."""
    module = task_module(config)
    check_section("", config, module.CONFIG)
    check_section("mesh", config["mesh"], sharding.make_mesh, given=("devices",))
    check_section("sharding", config.get("sharding", {}), sharding.shardings, ("tree", "mesh"))
    check_section("optim", config["optim"], optimizer.OptimizerConfig)
    optimizer.make_schedule(config["total_steps"], **config["schedule"])
    check_section("checkpoint", config["checkpoint"], Checkpoints, given=("directory",))
    if "ema" in config:
        check_section("ema", config["ema"], ema_decay, given=("total_steps",))
    check_section("skip", config.get("skip", {}), SkipConfig)
    check_section("collapse", config.get("collapse", {}), CollapseConfig)
