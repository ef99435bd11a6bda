"""Configs on the command line: shipped recipes, files of one's own, options and their old names."""

import shutil
from pathlib import Path

import pytest

from data2vec_jax.cli.arguments import find_config, parse
from data2vec_jax.core.errors import UserError
from data2vec_jax.tasks import pretrain
from data2vec_jax.tasks.registry import check_config

CONFIGS = Path(__file__).resolve().parent.parent / "data2vec_jax/configs"


def parsed(*options):
    return parse(["train", *options, "--workdir=w"])


def test_recipes_by_name_by_path_and_copied(tmp_path, monkeypatch):
    shipped = parsed("--config=demo:vision,v2")
    assert parsed(f"--config={CONFIGS}/demo.py:vision,v2") == shipped
    # A recipe imports its neighbours from the package, so a copy needs none of them.
    monkeypatch.chdir(tmp_path)
    shutil.copy(CONFIGS / "demo.py", "mine.py")
    shutil.copy(CONFIGS / "finetune_text.py", "own_text.py")
    assert parsed("--config=mine.py:vision,v2") == shipped
    assert parsed("--config=own_text.py:demo") == parsed("--config=finetune_text:demo")


def test_options_by_their_names_of_today_and_of_old():
    config, values = parsed(
        "--config=finetune_librispeech:smoke",
        "--config.data.multiple=4",
        "--config.model_changes.encoder.layerdrop=0.3",
        "--start=CHECKPOINT",
    )
    assert config["data"]["rows_multiple_of"] == 4 and "multiple" not in config["data"]
    assert config["model_overrides"]["encoder"]["layerdrop"] == 0.3
    assert values == {"workdir": "w", "init_from": "CHECKPOINT", "changed_corpus": None}


def test_options_of_an_old_file_of_ones_own(tmp_path):
    path = tmp_path / "old.py"
    path.write_text(
        "from ml_collections import ConfigDict\n"
        "def get_config(variant=''):\n"
        "    return ConfigDict(dict(data=dict(multiple=8), layers=dict(decay=0.5)))\n"
    )
    config, _ = parsed(f"--config={path}")
    assert config == {"data": {"rows_multiple_of": 8}, "layerwise_lr": {"decay": 0.5}}


def test_mistakes_name_what_is_near():
    with pytest.raises(UserError, match=r"'visoin_v2' is no recipe, .*; did you mean 'vision_v2'"):
        find_config("visoin_v2:base")
    with pytest.raises(UserError, match="'common' is no recipe"):
        find_config("common")
    with pytest.raises(UserError, match=r"no config file /nowhere/mine\.py"):
        find_config("/nowhere/mine.py:base")
    config, _ = parsed("--config=vision_v2:smoke", "--config.model.widht=8")
    with pytest.raises(
        UserError, match=r"config.model.widht: no such option; did you mean 'width'"
    ):
        pretrain.abstract_task(config)
    config, _ = parsed("--config=vision_v2:smoke", "--config.skipp.max_in_a_row=8")
    with pytest.raises(UserError, match=r"config.skipp: no such option; did you mean 'skip'"):
        check_config(config)


def test_options_that_the_recipe_leaves_at_their_defaults():
    """They have no place in the recipe, which ml_collections asks for."""
    recipe, _ = parsed("--config=vision_v2:smoke")
    assert "skip" not in recipe and "max_pixels" not in recipe["examples"]
    config, _ = parsed(
        "--config=vision_v2:smoke",
        "--config.skip.max_deviations=6.5",
        "--config.examples.max_pixels=1000000",
        "--config.examples.background=(0, 0, 0)",
        "--config.collapse.action=back",
        "--config.data.eval_split=none",
        "--config.model.width=16",
    )
    assert config["skip"] == {"max_deviations": 6.5}
    assert config["examples"]["max_pixels"] == 1_000_000
    assert config["examples"]["background"] == (0, 0, 0)
    assert config["collapse"]["action"] == "back"
    assert config["data"]["eval_split"] is None and config["model"]["width"] == 16
    check_config(config)
    pretrain.abstract_task(config)
    config, _ = parsed("--config=vision_v2:smoke", "--config.skip.max_deviations=many")
    with pytest.raises(UserError, match=r"config.skip.max_deviations: 'many' is not a number"):
        check_config(config)


def test_none_is_none_where_the_recipe_has_a_text():
    for recipe in ("vision_v1:smoke", "demo:vision,v2"):  # without and with a split of its own
        config, _ = parsed(f"--config={recipe}", "--config.data.eval_split=None")
        assert config["data"]["eval_split"] is None
