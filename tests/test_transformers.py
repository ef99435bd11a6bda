"""Exports in real transformers, 4.46.3 and the installed one: same outputs, processors found.

All checkpoints are exported once; a process of its own for each version loads them all. The older
version, with the tokenizers and huggingface_hub that it needs, is installed once into a folder that
git ignores.
"""

import dataclasses
import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path
from pydoc_data.topics import topics  # English text that Python brings along

import numpy as np
import pytest
from recorded import CHECKPOINT_CASES as CASES
from recorded import CHECKPOINTS as FOLDER
from recorded import SEGMENTATION

import data2vec_jax
from data2vec_jax.convert import card, export, layouts, ours
from data2vec_jax.convert.tables import entries_of
from data2vec_jax.core import files
from data2vec_jax.modalities.text import tokenizer

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytestmark = pytest.mark.xdist_group("transformers")

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / ".cache/transformers-4.46.3"
OLD = ("transformers==4.46.3", "tokenizers==0.20.3", "huggingface_hub==0.26.5")
TRAINED = ("speech_v1.py:smoke", "demo.py:text", "demo.py:vision,v2")  # 1.0 vision: test_notebooks


def older_version():
    """The folder of the older version; installs it if need be."""
    CACHE.parent.mkdir(exist_ok=True)
    with open(CACHE.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (CACHE / "done").exists():
            command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade"]
            subprocess.run([*command, "--target", CACHE, *OLD], check=True)
            (CACHE / "done").touch()
    return CACHE


# What to load, and what must come out of it -------------------------------------------------------


def plan_of(case, folder):
    """Exports a case; the entries of the plan for it."""
    source = FOLDER / case
    names = {path.name for path in source.iterdir()}
    if "adapter_config.json" in names:
        return []
    if not names & {"model.safetensors", "checkpoint.pt", "checkpoint.pth"}:
        return processor_plan(source, case, folder)
    path = source if "model.safetensors" in names else next(source.glob("checkpoint.pt*"))
    checkpoint = ours.open_checkpoint(path)
    export.export(checkpoint, folder / case, "hf")
    config = files.read_json(folder / case / "config.json")
    with np.load(source / "golden.npz") as found:
        golden = {name: found[name] for name in found.files}
    if path is source:
        runs = recorded_runs(source, golden)
    else:
        runs = {"speech": speech_runs, "text": text_runs, "vision": vision_runs}[
            checkpoint.config["modality"]
        ](golden, config, checkpoint.config["model"])
    arrays = {}
    for run, (inputs, outputs, where) in runs.items():
        arrays |= {f"in/{run}/{name}": value for name, value in inputs.items()}
        arrays |= {f"out/{run}/{name}": value for name, value in outputs.items()}
        arrays |= {} if where is None else {f"where/{run}": where}
    np.savez(folder / f"{case}.npz", **arrays)
    own = config["architectures"][0]
    kinds = ["AutoModel", "file"] if "auto_map" in config else [own, card.auto_class(config)]
    common = dict(arrays=f"{case}.npz", runs=[*runs], allowed=1e-4)
    folders = {case: {}}
    if "Segmentation" in own:  # names of its head differ between the versions
        older = dataclasses.replace(checkpoint, config=checkpoint.config | {"hf_major": 4})
        export.export(older, folder / f"{case}.4", "hf")
        common["allowed"] = SEGMENTATION
        folders = {case: {"version": "5"}, f"{case}.4": {"version": "4"}}
    pooled = any(f"{run}/pooler_output" in golden for run in runs) and "Vision" in own
    plan = [
        dict(
            name=f"{place} {kind}",
            folder=place,
            kind=kind,
            **common,
            **more,
            options={"add_pooling_layer": True} if pooled and kind == own else {},
        )
        for place, more in folders.items()
        for kind in dict.fromkeys(kinds)
    ]
    if "AutoModel" not in kinds:  # the encoder alone can be loaded
        plan.append(dict(name=f"{case} encoder", folder=case, kind="AutoModel", runs=[], allowed=0))
    return plan


def recorded_runs(source, golden):
    runs = {}
    for run, arguments in files.read_json(source / "meta.json")["runs"].items():
        inputs = {
            name: golden[f"in_{run}/{name}"] if isinstance(value, str) else np.asarray(value)
            for name, value in arguments.items()
        }
        outputs = {
            k.removeprefix(f"{run}/"): v for k, v in golden.items() if k.startswith(f"{run}/")
        }
        runs[run] = inputs, outputs, None
    return runs


def speech_runs(golden, config, model):
    """Valid frames only, as theirs fill in padding in another way."""
    second, runs = "auto_map" in config, {}
    first = "inputs" if second else "input_values"
    for run, name in (("nomask", "x"), ("mask", "x_padded")):
        inputs, where = {first: golden[name]}, None
        what = "x" if f"{run}/x" in golden else "logits"
        output = golden[f"{run}/{what}"]
        if run == "mask":
            padding = golden["padding_mask"]
            inputs |= (
                {"padding_mask": padding} if second else {"attention_mask": (~padding).astype(int)}
            )
            lengths = (~padding).sum(-1)
            for _, kernel, stride in model["frontend"]["convs"]:
                lengths = (lengths - kernel) // stride + 1
            where = np.arange(output.shape[1]) < lengths[:, None]
        runs[run] = inputs, {"last_hidden_state" if what == "x" else what: output}, where
    return runs


def text_runs(golden, config, model):
    tokens, second = golden["ids"], "auto_map" in config
    inputs = (
        {"inputs": tokens}
        if second
        else {"input_ids": tokens, "attention_mask": (tokens != 1).astype(int)}
    )
    if "logits" in golden:
        return {"ids": (inputs, {"logits": golden["logits"]}, None)}
    return {"ids": (inputs, {"last_hidden_state": golden["x"]}, tokens != 1)}


def vision_runs(golden, config, model):
    first = "inputs" if "auto_map" in config else "pixel_values"
    known = {"all_tokens": "last_hidden_state", "logits": "logits"}
    if "logits" not in golden:
        known["features"] = "last_hidden_state"
    outputs = {there: golden[name] for name, there in known.items() if name in golden}
    runs = {"x": ({first: golden["x"]}, outputs, None)}
    if "mask" in golden:
        inputs = {first: golden["x"], "bool_masked_pos": golden["mask"].astype(bool)}
        runs["masked"] = inputs, {"last_hidden_state": golden["features_masked"]}, None
    return runs


def processor_plan(source, case, folder):
    """Processor files beside a small model: exported, they must be found."""
    described = files.read_json(source / "config.json")
    model = {
        "data2vec-audio": "Data2VecAudioForCTC",
        "data2vec-text": "Data2VecTextModel",
        "data2vec-vision": "Data2VecVisionModel",
    }[described["model_type"]]
    checkpoint = ours.open_checkpoint(
        next(
            FOLDER / name
            for name in CASES
            if (FOLDER / name / "model.safetensors").exists()
            and files.read_json(FOLDER / name / "config.json")["architectures"] == [model]
        )
    )
    checkpoint = dataclasses.replace(checkpoint, processors=ours._processors(source))
    export.export(checkpoint, folder / case, "hf")
    entry = dict(name=case, folder=case, allowed=0)
    if "audio" in described["model_type"]:
        golden = files.read_json(source / "decode_golden.json")
        more = dict(
            processor=["Wav2Vec2Processor"],
            labels=golden["ids"][0],
            transcript=golden["batch_decode"][0],
        )
    elif "text" in described["model_type"]:
        golden = files.read_json(source / "golden.json")
        more = dict(processor=["RobertaTokenizer"], text=golden["text"], ids=golden["input_ids"])
    else:
        more = dict(processor=["BeitImageProcessor"])
    return [entry | more]


# Trained here -------------------------------------------------------------------------------------


def trained_plan(config, folder):
    """Trains a few steps, exports; PyTorch's outputs must be ours, and it saves the model again."""
    name = config.replace(":", "_")
    workdir = folder / f"{name}.run"
    small = ["--config.total_steps=2", "--config.eval_every=0"]
    quick = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}  # of compilation: there are two steps
    subprocess.run(
        [
            sys.executable,
            "-m",
            "data2vec_jax.train",
            f"--config={ROOT}/configs/{config}",
            f"--workdir={workdir}",
            *small,
        ],
        check=True,
        env=os.environ | {"XLA_FLAGS": "", "PYTHONPATH": str(ROOT)} | quick,
        cwd=ROOT,
        capture_output=True,
    )
    export.export(ours.open_checkpoint(workdir), folder / name, "hf")
    inputs = inputs_of(workdir)
    out = data2vec_jax.load(workdir)(inputs)
    second = "auto_map" in files.read_json(folder / name / "config.json")
    argument = {2: "input_values", 4: "pixel_values"}[inputs.ndim]
    argument = "input_ids" if inputs.dtype == np.int32 else argument
    given = inputs.transpose(0, 3, 1, 2) if inputs.ndim == 4 else inputs
    arrays = {f"in/run/{'inputs' if second else argument}": given}
    arrays |= {f"out/run/hidden_states_{i}": np.asarray(x) for i, x in enumerate(out.hidden_states)}
    np.savez(folder / f"{name}.npz", **arrays)
    return [
        dict(
            name=f"trained {name}",
            folder=name,
            kind="AutoModel",
            arrays=f"{name}.npz",
            runs=["run"],
            allowed=1e-5,
            again=f"{name}.again",
        )
    ]


def tokenizer_plan(folder, kind):
    """A model with a tokenizer that was learnt here."""
    texts = [text for _, text in sorted(topics.items())]
    ids = tokenizer.train_sentencepiece(texts, 500, kind)
    config = {
        "modality": "text",
        "model": {
            "width": 8,
            "vocab_size": 500,
            "max_length": 30,
            "encoder": {"depth": 1, "heads": 2, "mlp": 8},
        },
    }
    ids.save(folder / f"{kind}.own")
    random = np.random.default_rng(0)
    made = {
        path: random.normal(size=shape).astype(np.float32)
        for path, shape in ours.shapes_of(config).items()
    }
    processors = tuple((folder / f"{kind}.own").iterdir())
    checkpoint = ours.Checkpoint(folder, config, entries_of(made), {}, processors)
    export.export(checkpoint, folder / kind, "hf")
    lines = ["a word of two", "the  second <mask> text, 1980"]
    rows = [[ids.bos, *ids.encode(line), ids.eos] for line in lines]
    return [
        dict(
            name=f"tokenizer {kind}",
            folder=kind,
            text=lines,
            ids=rows,
            allowed=0,
            processor=["PreTrainedTokenizer", "TokenizersBackend"],
        )
    ]


def inputs_of(workdir):
    checkpoint = ours.open_checkpoint(workdir)
    model, random = ours.model_of(checkpoint.config), np.random.default_rng(0)
    if checkpoint.config["modality"] == "text":
        size = model.embeddings.vocab_size
        return random.integers(4, size - 1, (2, 20)).astype(np.int32)
    if checkpoint.config["modality"] == "speech":
        return random.normal(size=(2, 8000)).astype(np.float32)
    return random.normal(size=(2, *model.image, model.channels)).astype(np.float32)


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    folder, plan = tmp_path_factory.mktemp("exports"), []
    for case in CASES:
        plan += plan_of(case, folder)
    for config in TRAINED:
        plan += trained_plan(config, folder)
    for kind in ("bpe", "unigram"):
        plan += tokenizer_plan(folder, kind)
    files.write_json(folder / "plan.json", plan)
    return folder, plan


@pytest.mark.parametrize("version", ["4", "5"])
def test_exports_load_and_agree(exports, version, capsys):
    folder, plan = exports
    paths = [str(older_version())] if version == "4" else []
    done = subprocess.run(
        [sys.executable, ROOT / "tests/run_exports.py", folder],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "HF_HOME": str(folder / "home")},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["version"].startswith("4.46.3" if version == "4" else "5.")
    results = found["results"]
    wrong = {
        case["name"]: results[case["name"]]
        for case in plan
        if case["name"] in results
        if isinstance(results[case["name"]], str) or results[case["name"]] > case["allowed"]
    }
    with capsys.disabled():
        worst = max(x for x in results.values() if not isinstance(x, str))
        print(f"\ntransformers {found['version']}: {len(results)} loaded, worst {worst:.1e}")
    assert not wrong and {name.split()[0] for name in results} >= set(CASES) - adapters()
    there_and_back(folder)


def adapters():
    """Cases that are no models."""
    return {case for case in CASES if (FOLDER / case / "adapter_config.json").exists()}


def there_and_back(folder):
    """What PyTorch saved again gives the trained model's outputs here."""
    for config in TRAINED:
        name = config.replace(":", "_")
        inputs = inputs_of(folder / f"{name}.run")
        before = data2vec_jax.load(folder / f"{name}.run")(inputs)
        after = data2vec_jax.load(folder / f"{name}.again")(inputs)
        for a, b in zip(before.hidden_states, after.hidden_states, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5)


def test_layouts_of_exports_are_found_again(exports):
    folder, plan = exports
    for name in {case["folder"] for case in plan}:
        layouts.find_layout(layouts.open_source(folder / name))
