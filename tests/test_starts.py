"""What a run of fine-tuning begins with, and how its options are said on the command line."""

import json
import sys
from pathlib import Path
from unittest import mock

import jax
import numpy as np
import pytest

from data2vec_jax.cli.arguments import parse
from data2vec_jax.convert import __main__ as command
from data2vec_jax.core import checkpoints
from data2vec_jax.core.errors import UserError
from data2vec_jax.core.state import TrainState
from data2vec_jax.tasks import classify

GOLDENS = Path(__file__).parent / "goldens/checkpoints"


def parsed(variant, *options):
    argv = ["x", f"--config=configs/{variant}", "--workdir=-", *options]
    with mock.patch.object(sys, "argv", argv):  # where ml_collections looks for them
        return parse(argv)[0]


def test_each_block_begins_with_a_copy_of_the_shared_relative_bias(tmp_path):
    """As the authors' fine-tuning does with their pretraining files (conversion spec 2.1)."""
    command.main(
        [str(GOLDENS / "beit_vision_pretrain/checkpoint.pth"), str(tmp_path / "jax"), "--to=jax"]
    )
    stored = checkpoints.load_params(tmp_path / "jax")
    model = checkpoints.load_config(tmp_path / "jax")["model"]
    size = model["image"] if isinstance(model["image"], int) else model["image"][0]
    patch = model["patch"] if isinstance(model["patch"], int) else model["patch"][0]
    config = parsed("finetune_imagenet.py:base")
    assert config["model_overrides"]["shared_relative"] is False
    config["model_overrides"]["encoder"]["relative"] = (size // patch,) * 2
    config["examples"]["image"], config["data"]["batch_size"] = size, 8
    config = classify.resolve_config(config, str(tmp_path / "jax"))
    task = classify.abstract_task(config)
    params = jax.jit(task.init)(jax.random.key(0))
    state = TrainState(np.int32(0), params, {}, (), jax.random.key(0))
    with jax.set_mesh(jax.make_mesh((1,), ("data",))):
        state, new = checkpoints.init_state_from(
            tmp_path / "jax", state, jax.eval_shape(lambda: state)
        )
        found = task.init_from(state.params, new, tmp_path / "jax")
    own, shared = found["encoder"]["blocks"]["relative_bias"], stored["relative_bias"]
    assert "encoder/blocks/relative_bias" in new and np.abs(shared).max() > 0.1
    np.testing.assert_array_equal(own, np.broadcast_to(shared, own.shape))


def test_a_start_that_would_lose_its_adapters_is_refused(tmp_path):
    config = parsed("finetune_text.py:demo_lora")
    (tmp_path / "config.json").write_text(json.dumps(config))
    plain = parsed("finetune_text.py:demo")
    with pytest.raises(UserError, match=r"would lose its adapters; merge them first: .* --merge"):
        classify.resolve_config(plain, str(tmp_path))
    assert classify.resolve_config(config | {"seed": 1}, str(tmp_path))["init_from"] == str(
        tmp_path
    )


def test_training_examples_are_no_test(tmp_path):
    """A table or a folder without splits."""
    for name in ("all", "train", "test"):
        (tmp_path / f"{name}.csv").write_text("text,label\n" + f"a {name},x\nb {name},y\n" * 64)
    config = parsed("finetune_text.py:smoke")
    config["head"]["classes"], config["model"]["vocab_size"] = 2, 268
    config["examples"]["vocab_size"] = 268
    config["data"] |= {"source": f"manifest:{tmp_path}/all.csv", "share": 1.0}
    config = classify.resolve_config(config)
    for share in (1.0, 0.5):
        config["data"]["share"] = share
        with pytest.raises(UserError, match=r"'test' of .*all.csv is the training examples"):
            classify.make(config)
    config["data"] |= {"share": 1.0, "source": f"manifest:{tmp_path}/{{split}}.csv"}
    assert list(classify.make(config).evals) == ["test"]
    config["data"]["eval_split"] = "train"  # who asks for it, gets it
    assert list(classify.make(config).evals) == ["train"]


def test_adapters_are_options_of_every_recipe():
    options = {"targets": ("blocks/",), "rank": 4, "dora": True, "dropout": 0.1}
    said = [f"--config.adapter.{name}={value}" for name, value in options.items()]
    for variant in ("finetune_imagenet.py:demo", "finetune_glue.py:rte", "finetune_audio.py:demo"):
        config = parsed(variant, *said)
        assert config["adapter"].items() >= options.items()
        assert "never change" in " ".join(
            classify.abstract_task(classify.resolve_config(config)).notes
        )
        assert not classify.resolve_config(parsed(variant))["optim"].get("frozen")
    config = parsed("finetune_text.py:demo", "--config.adapter.rnk=4")
    with pytest.raises(UserError, match=r"config.adapter.rnk: no such option; did you mean 'rank'"):
        classify.abstract_task(classify.resolve_config(config))
    config = parsed("finetune_text.py:demo", "--config.adapter.targets=('blocks/(',)")
    with pytest.raises(UserError, match=r"adapter.targets: .*'blocks/\('"):
        classify.abstract_task(classify.resolve_config(config))


@pytest.mark.parametrize(
    "name", [path.name for path in sorted(Path("configs").glob("*.py"))] or ["no configs"]
)
def test_a_wrong_variant_is_told_the_right_ones(name):
    with pytest.raises(UserError, match=r"^no variant 'wrong'; choose from [a-z0-9]"):
        parsed(f"{name}:wrong")
