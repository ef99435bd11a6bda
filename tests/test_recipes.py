"""Recipes against tests/recipes.json, which says what is published and why ours is what it is.

A hyper-parameter that changes in configs/, or as a default of the functions that read them, fails
here until its line in the registry changes too. What durations, batches and masks come to is
compared with a table of its own, below.
"""

import copy
import importlib
import inspect
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
import pytest

from data2vec_jax import masking
from data2vec_jax.configs import common
from data2vec_jax.modalities.speech.frontend import frames
from data2vec_jax.tasks import pretrain

ROOT = Path(__file__).resolve().parent.parent
REGISTRY = json.loads((ROOT / "tests/recipes.json").read_text())
RECIPES = REGISTRY["recipes"]
# Options that no paper defines: where and how often, not what.
INFRASTRUCTURE = re.compile(
    r"^(mesh|checkpoint)\.|^(log_every|eval_every|modality)$|\.remat$"
    r"|^data\.(workers|rows_multiple_of|eval_split|eval_batches|max_bad_share)$"
)
VARIANTS_OURS_ALONE = ("smoke",)  # variants of recipes that no paper has
IMAGENET, AUDIOSET, RATE = 1_281_167, 1_912_134, 16_000


# Those of fine-tuning are checked beside their tasks (test_classify, test_transcribe).
MODULES = {
    name: importlib.import_module(f"data2vec_jax.configs.{name}")
    for name in {recipe.split(":")[0] for recipe in RECIPES}
}


def recipe_config(recipe):
    name, variant = recipe.split(":")
    return MODULES[name].get_config(variant).to_dict()


def leaves(section, prefix=""):
    """{'section.key': value} of a nested mapping."""
    found = {}
    for key, value in section.items():
        if isinstance(value, Mapping) and value:
            found |= leaves(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found


def defined(config):
    """The options of a config that a paper defines."""
    return {k: v for k, v in leaves(config).items() if not INFRASTRUCTURE.search(k)}


def plain(value):
    """A value of a config or of the registry in one form: lists for tuples, numbers for 'a/b'."""
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, Mapping):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, str) and (ratio := re.fullmatch(r"(\d+)/(\d+)", value)):
        return int(ratio[1]) / int(ratio[2])
    return value


def same(a, b):
    a, b = plain(a), plain(b)
    return a == b and isinstance(a, bool) == isinstance(b, bool)


def differences(ours, registered):
    """A line for each key that only one of two flat mappings has, or whose values differ."""
    lines = [f"{key}: not in the registry" for key in sorted(ours.keys() - registered.keys())]
    lines += [f"{key}: only in the registry" for key in sorted(registered.keys() - ours.keys())]
    for key in sorted(ours.keys() & registered.keys()):
        if not same(ours[key], registered[key]):
            lines.append(f"{key}: {ours[key]!r}, in the registry {registered[key]!r}")
    return lines


def test_every_recipe_is_registered():
    found = set()
    for path in sorted((ROOT / "data2vec_jax/configs").glob("[!_]*.py")):
        name = path.stem
        if name == "common" or name.startswith("finetune_"):
            continue
        module = importlib.import_module(f"data2vec_jax.configs.{name}")
        if not getattr(module, "OF_A_PAPER", True):  # it says so by itself
            continue
        with pytest.raises(ValueError, match="choose from") as error:
            module.get_config("?")
        variants = str(error.value).partition("choose from ")[2].split(", ")
        found |= {f"{name}:{v}" for v in variants if v not in VARIANTS_OURS_ALONE}
    assert found == set(RECIPES)


@pytest.mark.parametrize("recipe", RECIPES)
def test_configs_are_as_registered(recipe):
    registered = {key: row["ours"] for key, row in RECIPES[recipe].items()}
    assert not (lines := differences(defined(recipe_config(recipe)), registered)), "\n".join(lines)


def test_a_change_is_seen():
    config = recipe_config("vision_v2:base")
    registered = {key: row["ours"] for key, row in RECIPES["vision_v2:base"].items()}
    for section, key, value in (
        ("schedule", "peak", 1.1e-3),
        ("model", "sincos", 1),
        ("optim", "no_decay", ("bias",)),
        ("objective", "final_norms", ()),
    ):
        changed = copy.deepcopy(config)
        changed[section][key] = value
        (line,) = differences(defined(changed), registered)
        assert line.startswith(f"{section}.{key}:")
    del config["optim"]["clip"]
    assert differences(defined(config), registered) == ["optim.clip: only in the registry"]


@pytest.mark.parametrize("recipe", RECIPES)
def test_differences_have_a_reason(recipe):
    for key, row in RECIPES[recipe].items():
        where = f"{recipe} {key}"
        assert list(row) == ["ours", "paper", "released", "reason"], where
        published = [row[name] for name in ("paper", "released") if row[name] is not None]
        # Where the two differ from each other, one of them differs from ours.
        if not all(same(row["ours"], value) for value in published):
            assert row["reason"].strip(), f"{where}: no reason"
        if row["paper"] is not None:
            assert re.search(r"\[(P1|P2|P3|2H)\]", row["reason"]), f"{where}: no source"


@pytest.mark.parametrize("function", REGISTRY["defaults"])
def test_defaults_are_as_registered(function):
    module, name = function.rsplit(".", 1)
    target = getattr(importlib.import_module(f"data2vec_jax.{module}"), name)
    defaults = {
        p.name: {} if repr(p.default) == "<factory>" else p.default
        for p in inspect.signature(target).parameters.values()
        if p.default is not p.empty and p.name not in ("dtype", "name", "parent")
    }
    assert not (lines := differences(defaults, REGISTRY["defaults"][function])), "\n".join(lines)


def test_quirks_are_complete():
    for quirk in REGISTRY["quirks"]:
        assert list(quirk) == ["trap", "reference", "ours"] and all(quirk.values()), quirk
    traps = [quirk["trap"] for quirk in REGISTRY["quirks"]]
    assert len(set(traps)) == len(traps) >= 30


# What the shares and sizes come to ----------------------------------------------------------------

# Updates: all, warm-up, annealing of the decay. Units of a batch: rows x seconds, tokens, images,
# and the same of the authors. Positions of the longest row, and how many of them are masked.
NUMBERS = {
    "speech_v1:base": ((400_000, 12_000, 30_000), (3_840, 3_800), (749, 337)),
    "speech_v1:large": ((400_000, 12_000, 30_000), (3_840, 3_800), (749, 337)),
    "speech_v2:base": ((400_000, 8_000, 75_000), (480, 500), (749, 374)),
    "speech_v2:large": ((600_000, 10_000, 300_000), (960, 960), (749, 411)),
    "vision_v1:base": ((500_000, 6_250, 0), (2_048, 2_048), (196, 120)),
    "vision_v1:large": ((249_600, 24_960, 0), (4_096, 4_096), (196, 120)),
    "vision_v2:base": ((375_300, 50_040, 100_000), (256, 256), (196, 196 - 39)),
    "vision_v2:large": ((375_300, 50_040, 150_000), (128, 128), (196, 196 - 49)),
    "vision_v2:huge": ((375_300, 50_040, 150_000), (128, 128), (196, 196 - 49)),
    "vision_v2:huge14": ((500_000, 50_040, 300_000), (256, 256), (256, 256 - 64)),
    "sound_v2:base": ((400_000, 53_333, 100_000), (48, 48), (512, 410)),
    "sound_v2:large": ((400_000, 53_333, 150_000), (48, 48), (512, 384)),
    "text_v1:base": ((1_000_000, 10_000, 300_000), (131_072, 131_072), (512, 157)),
    "text_v1:large": ((1_000_000, 10_000, 300_000), (131_072, 131_072), (512, 157)),
    "text_v2:base": ((1_000_000, 4_000, 100_000), (32_768, 32_768), (512, 512 - 266)),
    "text_v2:large": ((600_000, 4_000, 100_000), (32_768, 32_768), (512, 512 - 256)),
}


def test_every_recipe_has_numbers():
    assert set(NUMBERS) == set(RECIPES)


@pytest.mark.parametrize("recipe", NUMBERS)
def test_updates(recipe):
    config, (total, warmup, anneal) = recipe_config(recipe), NUMBERS[recipe][0]
    shares = config["schedule"]["warmup"], config["ema"]["anneal"]
    assert config["total_steps"] == total
    # Exact but for rounding of the quotient: `round` in the schedules must have nothing to do.
    for share, updates in zip(shares, (warmup, anneal), strict=True):
        assert share * total == pytest.approx(updates, abs=1e-6)
        assert round(share * total) == updates
    if config["schedule"]["kind"] == "tri_stage":
        stages = [round(config["schedule"][k] * total) for k in ("warmup", "hold", "decay")]
        assert stages == [12_000, 360_000, 28_000] and sum(stages) == total
    if not anneal:
        assert config["ema"]["start"] == config["ema"]["end"]


@pytest.mark.parametrize("recipe", NUMBERS)
def test_batches(recipe):
    config, (units, theirs) = recipe_config(recipe), NUMBERS[recipe][1]
    examples, rows = config["examples"], config["data"]["batch_size"]
    longest = {
        "speech": lambda: examples["crops"][-1],
        "text": lambda: examples["lengths"][-1],
        "vision": lambda: 1,
        "sound": lambda: 1,
    }[config["modality"]]()
    assert rows * longest == units
    assert units == pytest.approx(theirs, rel=0.05 if config["modality"] == "speech" else 0)


@pytest.mark.parametrize("recipe", NUMBERS)
def test_masked_positions(recipe):
    config, (positions, masked) = recipe_config(recipe), NUMBERS[recipe][2]
    model = config["model"]
    size = {
        "speech": lambda: frames(round(config["examples"]["crops"][-1] * RATE)),
        "text": lambda: config["examples"]["lengths"][-1],
        "vision": lambda: (model["image"] // model["patch"],) * 2,
        "sound": lambda: (model["frames"] // 16, 8),
    }[config["modality"]]()
    mask = {key: value for key, value in config["mask"].items() if key != "kind"}
    sampler = masking.make(config["mask"]["kind"], size, **mask)
    assert sampler.length == positions
    assert sampler.count(positions) == masked


def test_vision_masks_and_epochs():
    centres = {"base": 5, "large": 7, "huge": 7, "huge14": 9}
    epochs = {"base": 75, "large": 37.5, "huge": 37.5, "huge14": 99.9}
    per_gpu = {"base": 16, "large": 8, "huge": 8, "huge14": 8}
    for variant in centres:
        config = recipe_config(f"vision_v2:{variant}")
        mask, patches = config["mask"], (config["model"]["image"] // config["model"]["patch"]) ** 2
        kept = 1 - mask["ratio"] + mask["adjust"]
        assert math.floor(patches * kept / mask["width"] ** 2) == centres[variant]
        seen = config["total_steps"] * config["data"]["batch_size"] / IMAGENET
        assert seen == pytest.approx(epochs[variant], abs=0.05)
        objective = config["objective"]  # 0.01 x the rows of one of the authors' GPUs
        rows = per_gpu[variant] * objective["clones"]
        assert objective["class_weight"] == pytest.approx(0.01 * rows)
    for variant, batch, gpus, steps in (("base", 128, 16, 625), ("large", 64, 64, 312)):
        config = recipe_config(f"vision_v1:{variant}")
        assert IMAGENET // batch // gpus == steps  # of an epoch
        assert config["total_steps"] == 800 * steps
        assert config["data"]["batch_size"] == batch * gpus


def test_sound_masks_and_epochs():
    for variant, seeds in (("base", 5), ("large", 7)):
        config = recipe_config(f"sound_v2:{variant}")
        mask, rows = config["mask"], config["data"]["batch_size"]
        kept = 1 - mask["ratio"] + mask["adjust"]
        assert math.floor(64 * 8 * kept / mask["width"] ** 2) == seeds
        assert config["total_steps"] * rows / AUDIOSET == pytest.approx(10.04, abs=0.005)
        # 1 x the rows of one of the authors' 4 GPUs.
        assert config["objective"]["class_weight"] == rows / 4 * config["objective"]["clones"]


def test_frozen_teachers():
    frozen = {recipe for recipe in RECIPES if recipe_config(recipe)["ema"]["end"] == 1.0}
    assert frozen == {"speech_v2:large", "vision_v2:huge14"}


def test_targets_are_main_blocks():
    """Lowest blocks that are never targets: of 2.0, the authors' prenet, or as many as K leaves."""
    spared = {
        r: (c := recipe_config(r))["model"]["encoder"]["depth"] - c["objective"]["top_k"]
        for r in RECIPES
    }
    assert spared == {
        "speech_v1:base": 4,
        "speech_v1:large": 16,
        "speech_v2:base": 4,
        "speech_v2:large": 8,
        "vision_v1:base": 6,
        "vision_v1:large": 18,
        "vision_v2:base": 2,
        "vision_v2:large": 6,
        "vision_v2:huge": 8,
        "vision_v2:huge14": 8,
        "text_v1:base": 2,
        "text_v1:large": 4,
        "text_v2:base": 0,
        "text_v2:large": 0,
        "sound_v2:base": 0,
        "sound_v2:large": 0,
    }


def demo_config(variant):
    return importlib.import_module("data2vec_jax.configs.demo").get_config(variant)


# Updates, time constants of the decay at the start and end, rate; clones and mask.
SHORT_RUNS = {
    "speech": (1_200, 50, 240, 1 / 96, None, dict(prob=0.65, width=10, masked=0.45)),
    "speech,v2": (1_200, 50, 240, 1 / 96, 4, dict(ratio=0.333, adjust=0.05, width=2)),
    "vision,v2": (2_000, 50, 400, 1 / 96, 8, dict(ratio=0.8, adjust=0.07, width=3)),
    "sound,v2": (800, 50, 160, 3e-3, 8, dict(ratio=0.8, adjust=0.07, width=2)),
    "text,v2": (600, 50, 120, 4e-3, 4, dict(ratio=0.3)),
}


@pytest.mark.parametrize("variant", SHORT_RUNS)
def test_short_runs_of_the_demo(variant):
    config, (updates, slow, fast, rate, clones, mask) = demo_config(variant), SHORT_RUNS[variant]
    constants = [1 / (1 - config.ema[key]) for key in ("start", "end")]
    assert constants == pytest.approx([slow, fast])
    assert (config.total_steps, config.schedule.warmup, config.ema.anneal) == (updates, 0.1, 0.5)
    assert config.schedule.peak == pytest.approx(rate, 1e-3)
    assert config.objective.get("clones") == clones
    assert {k: v for k, v in config.mask.items() if k != "kind"} == mask


def test_a_short_run_follows_its_length_and_width():
    config = demo_config("vision,v2")
    config.model.width = 128
    for updates, slow, fast, warmup in ((300, 50, 60, 0.2), (20_000, 200, 4_000, 0.1)):
        common.short_run(config, updates)
        assert config.schedule.warmup == pytest.approx(warmup)
        constants = [1 / (1 - config.ema[key]) for key in ("start", "end")]
        assert constants == pytest.approx([slow, fast])
        assert config.total_steps == updates
        assert config.schedule.peak == pytest.approx(1 / 128, 1e-3)
    common.short_run(config, 2_000, ema_end=0.998)
    assert config.ema.end == 0.998


def test_a_short_run_refuses_what_cannot_work():
    config = demo_config("sound,v2")
    for options, message in (
        (dict(updates=199), "200"),
        (dict(updates=800, ema_end=0.998), "more than half of 800 updates.* 0.99375"),
        (dict(updates=800, ema_end=1.0), "more than half"),
        (dict(updates=800, side=4), "4 x 4 patches, but 12 of 8 x 8"),
        (dict(updates=800, side=5), "5 x 5 patches, but 12 of 8 x 8"),
    ):
        with pytest.raises(ValueError, match=message):
            common.short_run(config, **options)
    common.short_run(config, 800, side=3)
    assert config.mask.width == 3
    config.model.frames = 32
    with pytest.raises(ValueError, match="2 x 8"):
        common.short_run(config, 800, side=2)


def test_a_short_run_leaves_other_masks_alone():
    config = demo_config("vision")
    before = config.mask.to_dict(), config.objective.to_dict()
    common.short_run(config, 1_000)
    assert (config.mask.to_dict(), config.objective.to_dict()) == before


def in_squares(grid, side, draws=4_000):
    """(squares, patches that they cover in each draw), drawn with numpy. A fifth is kept."""
    rng = np.random.default_rng(0)
    squares = math.floor(grid[0] * grid[1] * 0.27 / side**2)
    covered = np.zeros((draws, *grid), bool)
    for mask in covered:
        for top, left in rng.integers(grid, size=(squares, 2)) - side // 2:
            mask[max(top, 0) : top + side, max(left, 0) : left + side] = True
    return squares, covered.sum((1, 2))


# The table in docs/small_scale.md: squares, kept patches, how many of these are in squares, and
# whether the rule takes this side of this grid.
BLOCKS = {
    ((7, 7), 3): (1, 9, 7.3, True),
    ((8, 8), 3): (1, 12, 7.6, False),
    ((8, 8), 2): (4, 12, 11.6, True),
    ((8, 8), 5): (0, 12, 0, False),
    ((14, 14), 3): (5, 39, 36.5, True),
}


@pytest.mark.parametrize(("grid", "side"), BLOCKS)
def test_blocks_fill_the_kept_part(grid, side):
    squares, kept, inside, taken = BLOCKS[grid, side]
    drawn, covered = in_squares(grid, side)
    assert drawn == squares
    assert np.minimum(covered, kept).mean() == pytest.approx(inside, abs=0.1)
    assert (common.block_side(grid, ratio=0.8, adjust=0.07) == side) == taken
    if not squares:
        return
    sampler = masking.make("inverse_blocks", grid, ratio=0.8, adjust=0.07, width=side)
    assert sampler.length - sampler.count(sampler.length) == kept
    keys = jax.random.split(jax.random.key(0), 2_000)
    masks = jax.vmap(lambda key: sampler.propose(key, sampler.length))(keys)
    assert (~masks).sum(1).mean() == pytest.approx(covered.mean(), abs=0.3)


def test_blocks_of_small_grids_are_single_patches():
    assert common.block_side((4, 4), ratio=0.8, adjust=0.07) == 1  # 3 are kept
    with pytest.raises(ValueError, match="0 of 2 x 2"):
        common.block_side((2, 2), ratio=0.8, adjust=0.07)


@pytest.mark.parametrize("variant", ["vision,v2", "sound,v2"])
def test_the_grid_of_a_config_is_its_models(variant):
    config = demo_config(variant)
    _, model = pretrain.make_model(config.to_dict())
    assert common._grid(config.model) == model.grid


@pytest.mark.parametrize("variant", ["digits,v1", "digits,v2"])
def test_a_reference_run_keeps_checkpoints_to_choose_from(variant):
    config = importlib.import_module("data2vec_jax.configs.reference").get_config(variant)
    assert config.total_steps % config.checkpoint.keep_every == 0
    assert config.total_steps // config.checkpoint.keep_every == 10
    assert config.data.split == "train" and config.data.eval_split == "dev"
