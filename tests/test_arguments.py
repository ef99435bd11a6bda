"""Configs on the command line: shipped recipes, files of one's own, options and their old names."""

import json
import shutil
from pathlib import Path

import pytest

from data2vec_jax import evaluate
from data2vec_jax.cli.arguments import find_config, parse
from data2vec_jax.cli.output import as_json, write_json
from data2vec_jax.core.errors import UserError
from data2vec_jax.data.sources import open_source
from data2vec_jax.modalities.text.codec import CODEC as TEXT
from data2vec_jax.prepare.__main__ import main as prepare
from data2vec_jax.report.page import main as report
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
    with pytest.raises(UserError, match=r"no option --total_steps; .* and --config\.NAME"):
        parsed("--config=vision_v2:smoke", "--total_steps=8")
    with pytest.raises(UserError, match=r"no option --workdri; did you mean 'workdir'"):
        parsed("--config=vision_v2:smoke", "--workdri=x")
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


def test_a_tilde_is_the_home_folder_of_every_command(tmp_path, monkeypatch):
    """No shell replaces it after an equals sign."""
    home, here = tmp_path / "home", tmp_path / "here"
    (home / "texts").mkdir(parents=True)
    (home / "texts/1.txt").write_text("A text.")
    (home / "mine.jsonl").write_text('{"text": "A row."}\n')
    shutil.copy(CONFIGS / "demo.py", home / "mine.py")
    here.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    options = ["--config=~/mine.py:vision", "--workdir=~/runs/a", "--init_from=~/runs/b"]
    config, values = parse(["train", *options])
    assert config == parsed("--config=demo:vision")[0]
    assert (values["workdir"], values["init_from"]) == (f"{home}/runs/a", f"{home}/runs/b")
    found = parse(["plan", *options[:1], "--json=~/plan.json"], {"json": "FILE"}, ())
    assert found[1] == {"json": f"{home}/plan.json"}
    for kind, place in (("folder", "texts"), ("manifest", "mine.jsonl")):
        assert len(open_source(f"{kind}:~/{place}", codec=TEXT)) == 1
    prepare(["text", "--source=folder:~/texts", "--target=~/shards", "--workers=1"])
    assert open_source("array_record:~/shards", codec=TEXT)[0]["text"] == "A text."
    prepare(["text", "--source=array_record:~/shards", "--check=~/checked", "--workers=1"])
    assert (home / "checked/check.html").exists()
    (home / "runs/a").mkdir(parents=True)
    (home / "runs/a/config.json").write_text("{}")
    for text in ("~/runs/a", "~/runs", "mine=~/runs/a"):
        assert evaluate.workdirs_of(text)[1] == [str(home / "runs/a")]
    with pytest.raises(UserError, match=f"no folder '{home}/nothing'"):
        report(["~/nothing"])
    assert not list(here.iterdir())


@pytest.mark.parametrize(
    ("given", "name", "folders"),
    [
        ("lr=0.003,bs=16", "lr=0.003,bs=16", ["lr=0.003,bs=16"]),
        ("lr=0.003,bs=16/", "lr=0.003,bs=16/", ["lr=0.003,bs=16"]),
        ("a,b,c", "a,b,c", ["a,b,c"]),
        ("a,b", "a,b", ["a", "b"]),
        ("a,lr=0.003,bs=16,b", "a,lr=0.003,bs=16,b", ["a", "lr=0.003,bs=16", "b"]),
        ("best=lr=0.003,bs=16", "best", ["lr=0.003,bs=16"]),
        ("x=1,y=2=a,b", "x=1,y=2", ["a", "b"]),
        ("all", "all", ["all/s=0,t=1", "all/s=1,t=1"]),
    ],
)
def test_workdirs_may_have_commas_and_equals_signs(tmp_path, monkeypatch, given, name, folders):
    for folder in ("lr=0.003,bs=16", "a,b,c", "a", "b", "all/s=0,t=1", "all/s=1,t=1"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    assert evaluate.workdirs_of(given) == (name, [str(tmp_path / folder) for folder in folders])


def test_json_has_no_nan(tmp_path):
    def refuse(word):
        raise ValueError(f"{word} is not JSON")

    for value, wanted in (
        ({"wer": float("nan"), "cer": 0.5}, {"wer": "nan", "cer": 0.5}),
        (
            {"scores": [{"f1": float("inf")}, (float("-inf"), 1)]},
            {"scores": [{"f1": "inf"}, ["-inf", 1]]},
        ),
        (
            {"splits": {"a": {"spread": {"0.5": float("nan")}}}},
            {"splits": {"a": {"spread": {"0.5": "nan"}}}},
        ),
        ({"none": None, 3: True, "text": "nan"}, {"none": None, "3": True, "text": "nan"}),
    ):
        assert json.loads(as_json(value), parse_constant=refuse) == wanted
        write_json(str(tmp_path / "x.json"), value)
        text = (tmp_path / "x.json").read_text()
        assert json.loads(text, parse_constant=refuse) == wanted
