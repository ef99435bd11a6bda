"""Malformed options: one line for each, at once, never a traceback and never a run of nonsense."""

import importlib
import inspect
import json
import math
import os
import re
import subprocess
import sys
import types
from pathlib import Path
from typing import Annotated, Literal, Union, get_args, get_origin

import pytest

from data2vec_jax import evaluate
from data2vec_jax.cli.arguments import parse
from data2vec_jax.core import config as core
from data2vec_jax.core import optimizer, sharding
from data2vec_jax.core.errors import UserError
from data2vec_jax.plan.topology import parse_topology
from data2vec_jax.tasks.registry import check_config, task_module

ROOT = Path(__file__).resolve().parents[2]
NAN, INF, HUGE = math.nan, math.inf, 10**20
SMOKE = (
    "speech_v1:smoke",
    "speech_v2:smoke",
    "vision_v1:smoke",
    "vision_v2:smoke",
    "text_v1:smoke",
    "text_v2:smoke",
    "sound_v2:smoke",
    "text_mlm:smoke",
    "speech_wav2vec2:smoke",
    "speech_hubert:smoke",
    "vision_mae:smoke",
    "vision_simmim:smoke",
    "vision_ijepa:smoke",
    "demo:speech",
    "finetune_imagenet:smoke",
    "finetune_imagenet:demo_mae",
    "finetune_librispeech:smoke",
    "finetune_audio:demo",
    "finetune_sound:smoke",
    "finetune_text:demo_dora",
    "finetune_glue:stsb",
    "finetune_squad:base",
)


def recipe(name):
    module, _, variant = name.partition(":")
    return importlib.import_module(f"data2vec_jax.configs.{module}").get_config(variant).to_dict()


def prepare(config):
    """What the commands do with a config before anything is read, traced or compiled."""
    check_config(config)
    module = task_module(config)
    config = module.resolve_config(config)
    sharding.make_mesh(**config["mesh"])
    schedule = optimizer.make_schedule(config["total_steps"], **config["schedule"])
    optimizer.make_optimizer(schedule, optimizer.OptimizerConfig(**config["optim"]), 10)
    return module.abstract_task(config)


def one_line(error, start=""):
    text = str(error.value)
    assert text.startswith(start), text
    assert "\n" not in text and len(text) < 600, text


# The schema ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sections():
    """{(section, function): (its options as a recipe has them, names that the caller supplies)}."""
    found = {}
    original = core.check_section

    def noted(section, options, function, given=()):
        found[section, function] = dict(options), tuple(given)
        original(section, options, function, given)

    with pytest.MonkeyPatch.context() as patch:
        for module in list(sys.modules.values()):
            if getattr(module, "check_section", None) is original:
                patch.setattr(module, "check_section", noted)
        for name in SMOKE:
            prepare(recipe(name))
    return found


def annotations(sections):
    """(section, options, function, given, name, annotation) of every option."""
    for (section, function), (options, given) in sections.items():
        for name, parameter in inspect.signature(function).parameters.items():
            skipped = name in (*given, "self", "parent", "name", "dtype")
            if not skipped and parameter.kind is not parameter.VAR_KEYWORD:
                yield section, options, function, given, name, parameter.annotation


def parts(annotation):
    """An annotation's alternatives."""
    union = get_origin(annotation) in (Union, types.UnionType)
    return [p for each in get_args(annotation) for p in parts(each)] if union else [annotation]


def out_of_range(annotation):
    """Values that an option of this annotation might be given by mistake, and cannot have."""
    values = [object(), {"a": 1}, ["a", {}], NAN, INF, -INF, HUGE, 1e300, "", "no such", None, True]
    values += [[], [NAN], [[[]]], -1, 0, 0.5, -(2**40), "\0"]
    for each in parts(annotation):
        kind, *limits = get_args(each) if get_origin(each) is Annotated else (each,)
        for limit in limits:
            if isinstance(limit, core.Range):
                values += [x for x in (limit.above, limit.below) if x is not None]
                values += [x - 1e-3 for x in (limit.least,) if x is not None]
                values += [x - 1 for x in (limit.least,) if x is not None]
                values += [x + 1 for x in (limit.most,) if x is not None]
        if get_origin(kind) is Literal:
            values += [f"{name}x" for name in get_args(kind) if isinstance(name, str)]
        if get_origin(kind) is tuple and ... not in get_args(kind):
            values += [(1,) * (len(get_args(kind)) + 1), (1,), "ab"]
    return [value for value in values if not core.fits(value, annotation)]


def test_every_option_is_limited(sections):
    """A free annotation, such as Any, would let everything through."""
    listed = list(annotations(sections))
    assert len({(function, name) for _, _, function, _, name, _ in listed}) > 200
    for section, *_, name, annotation in listed:
        assert not core.fits(object(), annotation), f"config.{section}.{name}: {annotation}"
        assert not core.fits(NAN, annotation), f"config.{section}.{name}: {annotation}"
        assert not core.fits([[NAN]], annotation), f"config.{section}.{name}: {annotation}"


def test_values_out_of_range_are_refused(sections):
    count = 0
    for section, options, function, given, name, annotation in annotations(sections):
        where = f"config.{section}.{name}" if section else f"config.{name}"
        for value in out_of_range(annotation):
            with pytest.raises(UserError) as error:
                core.check_section(section, {**options, name: value}, function, given)
            one_line(error, f"{where}: ")
            count += 1
    assert count > 2000


def test_the_ends_of_ranges_are_inside(sections):
    count = 0
    for _, _, _, _, _, annotation in annotations(sections):
        for each in parts(annotation):
            limits = get_args(each)[1:] if get_origin(each) is Annotated else ()
            for end in (x for x in limits if isinstance(x, core.Range)):
                for value in (x for x in (end.least, end.most) if x is not None):
                    assert core.fits(value, annotation)
                    count += 1
    assert count > 100


def test_unknown_options_name_the_nearest(sections):
    for (section, function), (options, given) in sections.items():
        for name in options:
            misspelt = f"{name}s"
            with pytest.raises(UserError) as error:
                core.check_section(section, {misspelt: options[name]}, function, given)
            one_line(error, f"config.{section}.{misspelt}: ".replace("..", "."))
            assert f"did you mean '{name}'" in str(error.value)
        with pytest.raises(UserError, match="is not a section of options"):
            core.check_section(section, 5, function, given)


@pytest.mark.parametrize(
    ("value", "annotation", "text"),
    [
        (2, core.Share, "2 is not a number from 0 to 1"),
        (NAN, core.Share, "nan is not a finite number from 0 to 1"),
        (1e300, core.PositiveFloat, "1e+300 is not a number below 1e30 above 0"),
        (NAN, core.Size, "nan is not a whole number from 1 to 1,048,576"),
        (1, core.DropRate, "1 is not a number from 0 and below 1"),
        (0, core.PositiveFloat, "0 is not a number above 0"),
        (0, core.PositiveInt, "0 is not a whole number of 1 or more"),
        (0, core.Steps, "0 is not a whole number from 1 to 2,147,483,647"),
        (True, core.Share, "True is not a number from 0 to 1"),
        ("x", core.Share | None, "'x' is not a number from 0 to 1 or null"),
        (3, tuple[core.Share, core.Share], "3 is not a list of 2 numbers from 0 to 1"),
        (("[",), core.Sequence[core.Pattern], "is not a list of texts in the syntax of regular"),
        ("pots", Literal["post", "pre"], "no 'pots'; did you mean 'post'?"),
        (3, Literal["post", "pre"], "3 is not one of post, pre"),
        ("x" * 9999, bool, "... is not true or false"),
    ],
)
def test_what_is_said(value, annotation, text):
    with pytest.raises(UserError, match=re.escape(text)) as error:
        core.check_option("config.x", value, annotation)
    one_line(error, "config.x: ")


# Whole configs ------------------------------------------------------------------------------------

# A recipe, and options that are wrong, each by itself.
WRONG = {
    "vision_v2:smoke": [
        *({"seed": x} for x in (-1, HUGE, 1.5, "0", None, [0])),
        *({"total_steps": x} for x in (0, -1, HUGE, 2**31, 1.0, "many", True)),
        *({"log_every": x} for x in (-1, None)),
        *({"eval_every": x} for x in (-1, 0.5)),
        *({"accumulate": x} for x in (0, -2, 3)),
        *({"dtype": x} for x in ("float16", None, 32)),
        *({"modality": x} for x in ("visoin", "", 5, "no.such.module")),
        *(
            {x: 5}
            for x in ("model", "examples", "data", "mask", "objective", "ema", "mesh", "optim")
        ),
        *({"schedule.peak": x} for x in (NAN, -1, INF, "high")),
        *({"schedule.warmup": x} for x in (NAN, -0.5, 2)),
        *({"schedule.kind": x} for x in ("cosin", None, 5, ["cosine"])),
        {"schedule.total_steps": 5},
        {"schedule": {}},
        *({"optim.betas": x} for x in (3, (0.9,), ("a", "b"), (2, 3), (0.9, 1.0), (NAN, 0.9))),
        *({"optim.eps": x} for x in (-1, 0, NAN)),
        *({"optim.weight_decay": x} for x in (NAN, -0.1)),
        *({"optim.no_decay": x} for x in ("bias", ("(",), 5)),
        {"optim.frozen": ("*",)},
        {"optim.rates": (("head", "fast"),)},
        *({"ema.start": x} for x in (2, -1, NAN)),
        *({"ema.anneal": x} for x in (-1, 1.5)),
        *({"averaged": x} for x in ((), "", ("[",), 5, ("^nothing$",), ("^encoder/", "^encodr/"))),
        *({"collapse.after": x} for x in (-1, 0.5)),
        *({"checkpoint.every": x} for x in (-1, None)),
        *({"checkpoint.keep": x} for x in (0, -1)),
        *({"mesh.data": x} for x in (0, -2, 7)),
        *({"mesh.fsdp": x} for x in (0, -1, 3, HUGE)),
        *({"sharding.rules": x} for x in ((("[", ("fsdp",)),), 5, (("head", ("data",)),))),
        *({"data.batch_size": x} for x in (0, -8, 2**30, HUGE, 8.0)),
        *({"data.workers": x} for x in (-1, 10**6)),
        *({"data.prefetch": x} for x in (0, 10**9)),
        *({"data.max_bad_share": x} for x in (-0.1, 1.1, NAN)),
        {"data.reader_timeout": 0},
        *({"data.source": x} for x in (5, None, "a\0b")),
        *({"model.width": x} for x in (0, -32, 33, 34, 10**12)),
        *({"model.image": x} for x in (0, -32, 10**9, (32,), 33)),
        *({"model.patch": x} for x in (0, 64, (16, 0))),
        *({"model.mean": x} for x in ((), (0.5, 0.5), "grey")),
        *({"model.std": x} for x in ((0, 0, 0), (NAN, 1, 1))),
        {"model.class_tokens": -1},
        *({"model.encoder.heads": x} for x in (0, -1, 5, HUGE)),
        *({"model.encoder.depth": x} for x in (0, 10**6)),
        *({"model.encoder.mlp": x} for x in (0, 10**12)),
        *({"model.encoder.drop_path": x} for x in (1.0, NAN)),
        {"model.encoder.relative": (3, 3)},
        {"model.encoder": {}},
        *({"model.decoder.groups": x} for x in (0, 5)),
        *({"model.decoder.kernel": x} for x in (0, -3)),
        {"model.decoder.layers": 0},
        {"model.decoder": None},
        *({"objective.clones": x} for x in (0, -3, 10**9)),
        *({"objective.top_k": x} for x in (0, 99, (), (99,), "all")),
        *({"objective.layer_norms": x} for x in (("instnce",), ((7,),), "layer")),
        *({"objective.scale": x} for x in ("sum", 0, NAN)),
        {"objective.name": "data2vec3"},
        {"objective": {"clones": 2, "top_k": 1}},
        *({"mask.ratio": x} for x in (0, 1, NAN, 0.999)),
        *({"mask.width": x} for x in (0, 10**12)),
        *({"mask.kind": x} for x in ("inverse_block", None, [])),
        {"mask.size": 5},
        {"mask": {"ratio": 0.8}},
        *({"examples.scale": x} for x in (5, (1.0, 0.5), (-1.0, 1.0), ())),
        *({"examples.aspect": x} for x in ((0.0, 0.0), (2.0, 0.5))),
        *({"examples.jitter": x} for x in (-1.0, NAN)),
        *({"examples.flip": x} for x in (NAN, 2)),
        *({"examples.channels": x} for x in (2, 0)),
        *({"examples.background": x} for x in ((0, 0), (0, 0, 256))),
    ],
    "speech_v1:smoke": [
        *({"examples.crops": x} for x in (("a",), (), (0,), (2.0, 1.0), (NAN,), (10**9,), (0.01,))),
        *({"model.frontend.convs": x} for x in (((1, 2),), (), ((0, 1, 1),), "seven")),
        *({"model.frontend.kind": x} for x in ("wave", 5, [])),
        *({"model.positions.groups": x} for x in (0, 5)),
        {"model.positions.depth": -1},
        *({"mask.prob": x} for x in (0, -1, NAN)),
        *({"mask.masked": x} for x in (0, 1)),
        {"mask.min_masks": HUGE},
        {"model.alibi": {"distance": "far"}},
        {"model.padding": "exactly"},
        {"model.encoder.relative": (2, 2)},
    ],
    "speech_v2:smoke": [{"schedule": {"kind": "tri_stage", "peak": 1, "warmup": 0.5, "hold": 0.5}}],
    "text_v1:smoke": [
        *({"examples.lengths": x} for x in ((), (4,), (64, 32), (64.5,), 64)),
        *({"model.keep_prob": x} for x in (-0.1, 1.1)),
        {"model.keep_prob": 0.6, "model.replace_prob": 0.6},
        {"model.pad": 10**6},
        {"model.head": {"depth": 2, "hidden": 0}},
        {"model.teacher_sees": "some"},
        {"examples.mode": "docs"},
    ],
    "sound_v2:smoke": [{"examples.frames": 17}, {"examples.min_samples": 1}, {"model.std": 0}],
    "finetune_librispeech:smoke": [
        *({"schedule.hold": x} for x in (0.9, -0.1)),
        *({"loss.time_prob": x} for x in (-1, 2)),
        *({"loss.time_width": x} for x in (0, HUGE)),
        *({"scoring.lm_weight": x} for x in ((), "heavy", NAN)),
        {"scoring.beam": 0},
        {"scoring.unit": "words"},
        {"head.name": "ctcs"},
        *({"examples.seconds": x} for x in ((), (0,), (2.0, 1.0), "long")),
        {"examples.seconds": (0.01,), "examples.overlap": 0.0},
        {"head.blank": 3},
        {"head": {}},
        {"characters": "AA"},
        *({"examples.overlap": x} for x in (-1, 99, 0.001)),
    ],
    "finetune_imagenet:smoke": [
        *({"loss.smoothing": x} for x in (-0.1, 1)),
        *({"loss.mixup": x} for x in (-1, INF)),
        {"loss.binary": "label"},
        *({"layerwise_lr": x} for x in ({"decay": 0}, {"decay": 2}, {}, 5)),
        *({"examples.crop": x} for x in (0, 2)),
        {"examples.magnitude": 11},
        {"head.classes": 0},
        {"head.pooling": "max"},
        {"scoring.metrics": ()},
        {"scoring.metrics": ("acuracy",)},
    ],
    "finetune_text:demo_dora": [
        *({"adapter.rank": x} for x in (0, -1)),
        *({"adapter.targets": x} for x in (("[",), ("^nothing$",), "qkv")),
        {"adapter.dropout": 1.0},
        {"data.share": 0},
        {"data.repeat": 0},
    ],
}
CASES = [(name, wrong) for name, all_wrong in WRONG.items() for wrong in all_wrong]


def test_there_are_two_hundred():
    assert len(CASES) >= 200


@pytest.mark.parametrize("name", WRONG)
def test_a_config_with_one_wrong_option_is_refused(name):
    """Each of them before anything is traced; the recipe itself is good."""
    base = recipe(name)
    prepare(base)
    for wrong in WRONG[name]:
        with pytest.raises(UserError) as error:
            prepare(core.with_options(base, wrong))
            pytest.fail(f"accepted: {name} {wrong}")
        one_line(error)


def test_options_of_the_command_line(tmp_path):
    base = "--config=vision_v2:smoke"
    for arguments in (
        ["--config=/etc/passwd"],
        ["--config="],
        ["--config"],
        ["--config=vision_v2:nope"],
        ["--config=visoin_v2"],
        [base, "--config.seed=abc"],
        [base, "--config.seed=1.5"],
        [base, "--config.seed=" + "9" * 5000],
        [base, "--config.total_steps=1e20"],
        [base, "--config.optim.betas=(0.9,"],
        [base, "--config.optim.betas[0]=0.5"],
        [base, "--config.optim.betas[0.5"],
        [base, "--config.schedule.warmup=[1]"],
        [base, "--config.model=5"],
        [base, "--config.model.encoder="],
        [base, "--config.model..width=5"],
        [base, "--config.=5"],
        [base, "--config.model.widht=5"],
        [base, "--config.model.encoder.heads.x=5"],
        [base, "--workdirr=x"],
        [base, "more"],
    ):
        with pytest.raises(UserError) as error:
            config, _ = parse(["train", *arguments, f"--workdir={tmp_path}"])
            prepare(config)  # which knows the options that the recipe does not set
        one_line(error)
    with pytest.raises(UserError, match="--workdir=DIR is missing"):
        parse(["train", base])


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("def get_config(v=''):\n  return (\n", r"own\.py:2: SyntaxError"),
        ("import no_such_neighbour\n", r"own\.py:1: ModuleNotFoundError: .*no_such_neighbour"),
        ("def get_config(v=''):\n  return undefined\n", r"own\.py:2: NameError"),
        ("def get_config(v=''):\n  return 1 / 0\n", r"own\.py:2: ZeroDivisionError"),
        ("def get_config(v=''):\n  return get_config()\n", r"own\.py:2: RecursionError"),
        (
            "def get_config(v=''):\n  return {}\n",
            "get_config returns a dict, not an ml_collections",
        ),
        ("x = 1\n", "get_config"),
        ("\0", "null bytes"),
    ],
)
def test_faults_of_a_config_file_are_named(tmp_path, monkeypatch, text, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(text)
    with pytest.raises(UserError, match=says) as error:
        parse(["train", "--config=own.py", "--workdir=w"])
    one_line(error)


@pytest.mark.parametrize(
    "name",
    [
        "v5e:999999x999999",
        "v5e:9999x9999",
        "v5e:0x4",
        "v5e:" + "9" * 5000 + "x1",
        "v5e:-1x4",
        "v5e:",
    ],
)
def test_topologies_are_of_a_size_that_can_be(name):
    with pytest.raises(UserError) as error:
        parse_topology(name[:600])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "change",
    [
        "data.source=5",
        "data.batch_size=0",
        "data.batch_size=" + "9" * 30,
        "data.workers=-1",
        "data.max_bad_share=NaN",
        "data.eval_split=3",
        "data.nothing=3",
        "data=3",
        "model.width=3",
        "mesh.fsdp=0",
        "mesh.data=[1]",
        "data.split=" + "[" * 100_000,
    ],
)
def test_changes_of_an_evaluation(tmp_path, change):
    """A pretraining run's own config, read back from JSON, with one thing changed."""
    (tmp_path / "config.json").write_text(json.dumps(recipe("vision_v2:smoke")))
    changes = dict([evaluate.change(change)])
    if change.startswith("data.split"):  # a text like any other
        return
    with pytest.raises(UserError) as error:
        _, config, _ = evaluate.open_run(str(tmp_path), changes)
        evaluate.frozen_encoder(config)
    one_line(error)


def run(command, *arguments):
    found = subprocess.run(
        [sys.executable, "-m", f"data2vec_jax.{command}", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    return found.returncode, found.stderr.strip().splitlines()


@pytest.mark.parametrize(
    ("command", "arguments", "says"),
    [
        ("train", ["--config=/etc/passwd"], "'/etc/passwd' is no recipe"),
        (
            "train",
            ["--config=vision_v2:smoke", "--config.total_steps=99999999999999999999"],
            "config.total_steps: 99999999999999999999 is not a whole number of at most 18 digits",
        ),
        (
            "train",
            ["--config=speech_v1:smoke", "--config.schedule.warmup=2"],
            "config.schedule.warmup: 2.0 is not a number from 0 to 1",
        ),
        (
            "plan",
            ["--config=vision_v2:smoke", "--topology=v5e:9999x9999"],
            "99,980,001 chips are more than",
        ),
        ("evaluate", ["a" * 5000, "--json=~/x.json"], "not a workdir"),
        ("convert", ["a" * 5000, "x", "--to=jax"], "File name too long"),
    ],
)
def test_commands_say_it_in_one_line(command, arguments, says, tmp_path):
    extra = [f"--workdir={tmp_path}/run"] if command == "train" else []
    code, lines = run(command, *arguments, *extra)
    assert code == 2 and len(lines) == 1 and says in lines[0], lines
    assert not (tmp_path / "run").exists()
