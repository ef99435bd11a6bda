"""The reference runs: pretrain for an hour, probe over time, fine-tune, and keep what was learned.

    python launch/experiments/corpora.py     the data, once
    python launch/reference.py digits        all that is missing; again, it goes on where it stopped

For each corpus: data2vec 1.0 and 2.0 of configs/reference.py, on as many cores as this process may
use (`taskset`). Their kept checkpoints are probed on the split dev, and the best is probed on the
split test once, with three choices of its labels. Then it is fine-tuned, and so is the network from
scratch, on shares of the labels; rate and number of updates are chosen on dev, for each start and
share alike. launch/reference/NAME-{v1,v2,scratch}.json has the scores and the curve; an encoder
that is better than hand-made features goes to data2vec_jax/reference/NAME in float16, for
`data2vec_jax.load("reference:NAME")`.
runs/reference/NAME/report.html shows all of it, with pictures of held-out examples. A run whose
results are here is not made again: fine-tuning starts from its encoder, and there is no report.
"""

import argparse
import itertools
import os
import shutil
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "launch/experiments")]  # a checkout need not be installed

from pages import fill, markdown

from data2vec_jax import evaluate, train
from data2vec_jax.cli.arguments import parse
from data2vec_jax.cli.output import run_main
from data2vec_jax.configs import common
from data2vec_jax.configs.reference import SHARDS
from data2vec_jax.convert import ours
from data2vec_jax.core import checkpoints
from data2vec_jax.core.config import with_options
from data2vec_jax.core.errors import UserError
from data2vec_jax.core.files import read_json, write_json
from data2vec_jax.modalities import contract
from data2vec_jax.modalities.contract import Labelled
from data2vec_jax.report import page
from data2vec_jax.report.reference import mean_and_range
from data2vec_jax.tasks import pretrain, probe
from data2vec_jax.tasks.registry import task_module

RESULTS = ROOT / "launch/reference"
RUNS = ROOT / "runs/reference"
WEIGHTS = ROOT / "data2vec_jax/reference"
SEEDS = 3
ERRORS = "cer", "wer"  # scores of which the lower is the better
VERSIONS = "v1", "v2"
ADAPTERS = "lora", "dora"  # of 2.0
STARTS = {
    "scratch": "from scratch",
    "v1": "1.0",
    "v2": "2.0",
    "lora": "2.0, LoRA",
    "dora": "2.0, DoRA",
}
PAGE = ROOT / "docs/results.md"
FASTER = 5  # times the rates of full fine-tuning: adapters start from zero


@dataclass(frozen=True)
class Of:
    """A reference run.

    title: for tables. labels: of the probes (frames, where frames have labels). finetune: a
    fine-tuning config. options: of that config; the network is the pretrained one's, and so is the
    source unless they name one. metric: of its scores. shares: of the labels. rates, updates: what
    is tried on dev, updates by share. pretrained: the run whose encoder it uses; None for its own.
    labelled: source of its probes; None for that of pretraining. starts: keys of `STARTS`.
    """

    title: str
    labels: int
    finetune: str
    options: Mapping[str, Any]
    metric: str
    shares: Sequence[float]
    rates: Sequence[float]
    updates: Mapping[float, Sequence[int]]
    pretrained: str | None = None
    labelled: str | None = None
    starts: Sequence[str] = ("v2", "v1", "scratch")


def texts(name: str, classes: int) -> dict[str, Any]:
    """Options of fine-tuning on texts of `corpora.py`, with the tokenizer of the run texts.

    The head takes the mean over the tokens. docs/small_scale.md compares it with the head of the
    first token: one seed each, no sure difference.
    """
    return {
        "head": {"name": "utterance", "classes": classes},
        "data.source": f"{SHARDS}/{name}",
        "examples.tokenizer": f"{RUNS}/texts/v2/tokenizer",
        "examples.lengths": (32, 64),
    }


TASKS = {
    "digits": Of(
        title="MNIST, 10 digits",
        labels=1_000,
        finetune="finetune_imagenet:demo",
        options={"examples.scale": (0.8, 1.0), "loss.erasing": 0.0, "data.batch_size": 32},
        metric="accuracy",
        shares=(0.002, 0.02, 1.0),
        rates=(5e-4, 2e-3),
        updates={0.002: (300, 900, 2_700), 0.02: (1_000,), 1.0: (6_000,)},
    ),
    "pictures": Of(
        title="Emoji, 9 classes",
        labels=1_500,
        finetune="finetune_imagenet:demo",
        options={
            "examples.image": 64,
            "examples.channels": 3,
            "examples.flip": 0.5,
            "head.classes": 9,
            "data.batch_size": 32,
        },
        metric="accuracy",
        shares=(0.1, 1.0),
        rates=(5e-4, 2e-3),
        updates={0.1: (300,), 1.0: (1_500,)},
    ),
    "speech": Of(
        title="Russian speech, 51 phones; characters",
        labels=20_000,
        finetune="finetune_librispeech:demo",
        options={
            "data.source": f"{SHARDS}/russian",
            "examples.seconds": (4.0,),
            "loss.time_prob": 0.2,
            "loss.time_width": 5,
            "loss.channel_prob": 0.15,
            "loss.channel_width": 16,
        },
        metric="cer",
        shares=(0.1, 1.0),
        rates=(1e-3,),  # at 3e-3 nothing but blanks comes out, pretrained or not
        updates={0.1: (1_500,), 1.0: (6_000,)},
    ),
    "sounds": Of(
        title="Notes of instruments, 9 classes",
        labels=1_160,
        finetune="finetune_sound:demo",
        options={
            "head.classes": 9,
            "examples.frames": 128,
            "examples.min_samples": 1_600,  # as in pretraining: many notes are short
            "data.batch_size": 16,
        },
        metric="accuracy",
        shares=(0.1, 1.0),
        rates=(5e-4, 2e-3),
        updates={0.1: (300,), 1.0: (1_500,)},
        starts=("v2", "scratch"),
    ),
    "texts": Of(
        title="Debian descriptions, 16 sections",
        labels=1_000,
        finetune="finetune_text:demo",
        options=texts("sections", 16),
        metric="accuracy",
        shares=(0.1, 1.0),
        rates=(5e-4, 2e-3),
        updates={0.1: (400,), 1.0: (1_500,)},
        labelled=f"{SHARDS}/sections",
    ),
    "glosses": Of(
        title="WordNet glosses, 45 classes",
        labels=1_000,
        finetune="finetune_text:demo",
        options=texts("glosses", 45),
        metric="accuracy",
        shares=(0.1, 1.0),
        rates=(5e-4, 2e-3),
        updates={0.1: (1_500,), 1.0: (6_000,)},
        pretrained="texts",
        labelled=f"{SHARDS}/glosses",
    ),
}


def line_of(name: str, start: str) -> Path:
    """The file with the results of a start: 'v1', 'v2' or 'scratch'."""
    return RESULTS / f"{name}-{start}.json"


def config_of(name: str, version: str) -> dict[str, Any]:
    """The config of a reference run's pretraining."""
    run = TASKS[name].pretrained or name
    config, _ = parse(["reference", f"--config=reference:{run},{version}", "--workdir=-"])
    return config


def workdir_of(name: str, version: str) -> Path:
    """The workdir of a reference run's pretraining."""
    return RUNS / (TASKS[name].pretrained or name) / version


# Probes -------------------------------------------------------------------------------------------


def chosen(data: Labelled, limit: int, seed: int) -> Labelled:
    """Random examples of `data`, as many as have `limit` labels."""
    order = np.random.default_rng(seed).permutation(len(data.labels))
    has = (data.labels[order].reshape(len(order), -1) >= 0).sum(1)
    rows = np.sort(order[: int(np.searchsorted(np.cumsum(has), limit)) + 1])
    return data.take(rows)


def probe_config(name: str, version: str) -> dict[str, Any]:
    """The same config, with the examples of the probes."""
    config, tokenizer = config_of(name, version), workdir_of(name, version) / "tokenizer"
    if not TASKS[name].labelled:
        return config
    options = {"data.source": TASKS[name].labelled, "data.split": "train"}
    if tokenizer.exists():
        options["examples.tokenizer"] = str(tokenizer)
    return with_options(config, options)


def probed(name: str, version: str) -> dict[str, Any]:
    """Curve of the probes on dev, the best step, and the scores of that on test."""
    config, workdir = probe_config(name, version), workdir_of(name, version)
    modality, model = pretrain.make_model(config)
    whole, dev, test = probe.labelled(modality, config, ("train", "dev", "test"))
    encode, limit = probe.make_encode(model), TASKS[name].labels
    steps = sorted(int(path.name) for path in (workdir / "checkpoints").glob("[0-9]*"))

    def score(step: int, seed: int, held_out: Labelled) -> dict[str, Any]:
        params = checkpoints.load_params(workdir / "checkpoints" / str(step))
        return probe.probe(encode, params, chosen(whole, limit, seed), held_out, limit=limit)

    first, curve = chosen(dev, 5 * limit, 0), []
    for step in steps:
        found = score(step, 0, first)
        curve.append([step, found["linear_probe"], found["knn"]])
        print(f"{name} {version} {step}: {found}", file=sys.stderr, flush=True)
    best = max(curve, key=lambda line: line[1])[0]
    # Of the test split as many rows as there are: one score of each choice of labels.
    results = [score(best, seed, test) for seed in range(SEEDS)]
    hand_made = [
        probe.probe_hand_made(modality, chosen(whole, limit, seed), test, limit=limit)
        for seed in range(SEEDS)
    ]
    metrics = "linear_probe", "knn"
    shapes = pretrain.abstract_task(config)
    return {
        "task": name,
        "updates": config["total_steps"],
        "seconds": evaluate.train_seconds(workdir),
        "flops": config["total_steps"] * shapes.flops(shapes.shapes[-1]),
        "labels": limit,
        "dev_curve": [line[:2] for line in curve],
        "dev_curve_knn": [[line[0], line[2]] for line in curve],
        "step": best,
        "blocks": [found["blocks"] for found in results],
        "test": {m: [found[m] for found in results] for m in metrics},
        "hand_made": {m: [found[m] for found in hand_made if found] for m in metrics},
    }


def compared(name: str, version: str, step: int) -> dict[str, Any]:
    """What the report draws beside the curve.

    'dev': {metric: {block: score}} of the network at `step`, with which the probes choose a block,
    the mean over choices of the labels. 'untrained': the same of an untrained network, with its
    scores on the split dev; 'hand_made_dev': those of hand-made features.
    """
    config, workdir = probe_config(name, version), workdir_of(name, version)
    modality, model = pretrain.make_model(config)
    whole, dev = probe.labelled(modality, config, ("train", "dev"))
    encode, limit = probe.make_encode(model), TASKS[name].labels
    held_out, few = chosen(dev, 5 * limit, 0), [chosen(whole, limit, s) for s in range(SEEDS)]
    init = jax.jit(pretrain.abstract_task(config).init)
    sides = {
        "": checkpoints.load_params(workdir / "checkpoints" / str(step)),
        "untrained": init(jax.random.key(config["seed"])),
    }
    found: dict[str, Any] = {}
    for side, params in sides.items():
        scores = [probe.probe(encode, params, part, held_out, limit=limit) for part in few]
        blocks = {
            metric: {
                block: float(np.mean([score["dev"][metric][block] for score in scores]))
                for block in scores[0]["dev"][metric]
            }
            for metric in probe.PROBES
        }
        found |= {"dev": blocks} if not side else {side: {"dev": blocks}}
        if side:
            found[side] |= {metric: scores[0][metric] for metric in probe.PROBES}
    hand_made = probe.probe_hand_made(modality, few[0], held_out, limit=limit) or {}
    return found | {"hand_made_dev": {m: hand_made[m] for m in probe.PROBES if m in hand_made}}


def encoder_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Section `model` of a pretraining config without what only pretraining needs."""
    model = {k: v for k, v in config["model"].items() if k not in ("decoder", "head")}
    if contract.get(config["modality"]).learned_mask:
        model["mask_embedding"] = False
    return model


# Fine-tuning --------------------------------------------------------------------------------------


def tuning_config(name: str, start: str) -> dict[str, Any]:
    """The config of fine-tuning from a start, without share, rate and length."""
    task, network = TASKS[name], config_of(name, "v2")
    base, _ = parse(["reference", f"--config={task.finetune}", "--workdir=-"])
    base = base | {"model": encoder_of(network)}
    base = with_options(base, {"data.source": network["data"]["source"], **task.options})
    if start == "scratch":
        return with_options(base, common.from_scratch(base))
    if start in ADAPTERS:
        adapter = {"adapter.targets": ("blocks/",), "adapter.dora": start == "dora"}
        return with_options(base, adapter | {"optim.weight_decay": 0.0})
    return base


def learned(name: str, version: str) -> Path:
    """The checkpoint that was best on dev; of a run of 2.0 that was made elsewhere, the encoder
    that is kept of it, in float16."""
    step = read_json(line_of(name, version))["step"]
    path = workdir_of(name, version) / "checkpoints" / str(step)
    return WEIGHTS / name if version == "v2" and not path.exists() else path


def finetuned(name: str, start: str, share: float) -> dict[str, Any]:
    """Scores on test by seed, with a share of the labels and the rate and updates best on dev."""
    task, base, init_from = TASKS[name], tuning_config(name, start), None
    if start != "scratch":
        init_from = str(learned(name, "v2" if start in ADAPTERS else start))
    programs: dict[Any, Any] = {}

    def run(rate: float, updates: int, seed: int) -> Path:
        options = {"total_steps": updates, "eval_every": 0, "seed": seed, "log_every": 100}
        options |= {"data.share": share, "data.eval_split": "dev", "schedule.peak": rate}
        workdir = RUNS / name / "finetune" / f"{start}-{share:g}-{rate:g}-{updates}-{seed}"
        config = with_options(base, options)
        train.train(config, workdir, programs=programs, verbose=False, init_from=init_from)
        return workdir

    def scored(workdir: Path, split: str) -> float:
        found = evaluate.evaluate(str(workdir), {"data.eval_split": split})["scores"][split]
        print(f"{name} {workdir.name} {split}: {found}", file=sys.stderr, flush=True)
        if found.get("left_out"):
            raise UserError(f"{workdir}: {found['left_out']:.0%} of the split {split} is left out")
        return found[task.metric]

    rates = [rate * FASTER if start in ADAPTERS else rate for rate in task.rates]
    tries = list(itertools.product(rates, task.updates[share]))
    on_dev = {t: scored(run(*t, 0), "dev") for t in tries}
    best = min if task.metric in ERRORS else max
    rate, updates = best(on_dev, key=on_dev.__getitem__)
    runs = [run(rate, updates, seed) for seed in range(SEEDS)]
    return {
        "dev": [[*t, score] for t, score in on_dev.items()],
        "rate": rate,
        "updates": updates,
        "seconds": [evaluate.train_seconds(workdir) for workdir in runs],
        task.metric: [scored(workdir, "test") for workdir in runs],
    }


def of_scratch(name: str, tuned: Mapping[str, Any]) -> dict[str, Any]:
    """What the file of a pretrained network says, of the one from scratch with most labels.

    Its 'dev_curve' has the lengths that were tried, each with its best score.
    """
    metric, share = TASKS[name].metric, max(tuned, key=float)
    config, line = tuning_config(name, "scratch"), line_of(name, "v2")
    found, shapes = tuned[share], task_module(config).abstract_task(config)
    best = min if metric in ERRORS else max
    lengths = sorted({updates for _, updates, _ in found["dev"]})
    per_step = shapes.mean([shapes.flops(shape) for shape in shapes.shapes])
    return {
        "updates": found["updates"],
        "seconds": statistics.fmean(found["seconds"]),
        "flops": found["updates"] * per_step,
        "dev_curve": [[n, best(s for _, u, s in found["dev"] if u == n)] for n in lengths],
        "test": {metric: found[metric]},
        "hand_made": read_json(line)["hand_made"] if line.exists() else {},
    }


# Weights ------------------------------------------------------------------------------------------


def worth_keeping(name: str) -> bool:
    """Whether the encoder of 2.0 is the run's own, and better than hand-made features."""
    result = read_json(line_of(name, "v2"))
    made, learned = (result[side]["linear_probe"] for side in ("hand_made", "test"))
    return TASKS[name].pretrained is None and min(learned) > statistics.fmean(made)


def keep(name: str, step: int) -> None:
    """Writes the encoder of 2.0, without what only pretraining needs, in float16."""
    found = ours.open_checkpoint(RUNS / name / "v2/checkpoints" / str(step))
    config = {"modality": found.config["modality"], "model": encoder_of(found.config)}
    wanted, half = ours.shapes_of(config), np.dtype(np.float16)
    entries = [
        e._replace(dtype=half, make=lambda make=e.make: np.asarray(make(), half))
        for e in found.entries
        if e.name in wanted and not e.name.startswith("head/")
    ]
    shutil.rmtree(WEIGHTS / name, ignore_errors=True)
    WEIGHTS.mkdir(exist_ok=True)
    ours.save(replace(found, config=config, entries=entries), WEIGHTS / name)


# The page -----------------------------------------------------------------------------------------


def write_page(name: str) -> None:
    """Writes report.html of a reference run, and the summary.json that it is made from."""
    folder, summary = RUNS / name, {}
    for start in STARTS:
        if line_of(name, start).exists():
            summary[start] = read_json(line_of(name, start))
            if start in VERSIONS:
                source = TASKS[name].labelled or config_of(name, start)["data"]["source"]
                summary[start] |= {"workdir": str(workdir_of(name, start)), "source": source}
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "summary.json", summary)
    page.main([str(folder)])


# Tables -------------------------------------------------------------------------------------------


def per_cent(scores: Sequence[float]) -> str:
    """'63.0 (62.4 to 63.1)': the tables' heads say what the scores are."""
    return mean_and_range(scores, unit="")


def tables() -> dict[str, str]:
    """Tables of docs/results.md, of all that is known, by the names of their places."""
    known = {
        (name, start): read_json(line_of(name, start))
        for name in TASKS
        for start in STARTS
        if line_of(name, start).exists()
    }
    costs, probes, tuned = [], [], []
    for name, task in TASKS.items():
        runs = {v: known[name, v] for v in VERSIONS if (name, v) in known}
        for version, run in runs.items():
            curve = " ".join(f"{100 * score:.1f}" for _, score in run["dev_curve"])
            cost = f"{run['updates']:,}", f"{run['seconds'] / 60:.0f}", f"{run['flops']:.1e}"
            if task.pretrained is None:
                costs.append((task.title, STARTS[version], *cost, f"{run['step']:,}", curve))
        for metric, title in (("linear_probe", "linear"), ("knn", "k-NN")):
            if runs:
                made = next(iter(runs.values()))["hand_made"][metric]
                cells = [per_cent(runs[v]["test"][metric]) if v in runs else "" for v in VERSIONS]
                labels = f"{task.labels:,}"
                probes.append((task.title, labels, title, per_cent(made), *cells))
        for share in task.shares:
            found = {
                start: known.get((name, start), {}).get("finetuned", {}).get(f"{share:g}")
                for start in STARTS
            }
            if any(found.values()):
                cells = [per_cent(line[task.metric]) if line else "" for line in found.values()]
                tuned.append((task.title, f"{100 * share:g} %", task.metric, *cells))
    versions = [STARTS[version] for version in VERSIONS]
    return {
        "costs of reference runs": markdown(
            ("run", "version", "updates", "minutes", "FLOPs", "best at", "linear on dev"), costs
        ),
        "probes of reference runs": markdown(
            ("task", "labels", "probe", "hand-made", *versions), probes
        ),
        "fine-tuned reference runs": markdown(
            ("task", "labels", "score, %", *STARTS.values()), tuned
        ),
    }


def main() -> None:
    """The command: see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(TASKS))
    parser.add_argument("--starts", help="such as v2,scratch; by default those of the run")
    parser.add_argument("--shares", help="of the labels, for fine-tuning; none to leave it out")
    options = parser.parse_args()

    def command():
        os.chdir(ROOT)
        RESULTS.mkdir(exist_ok=True)
        for name in options.names or TASKS:
            starts = TASKS[name].starts
            if options.starts is not None:
                starts = [start for start in options.starts.split(",") if start]
            for version in starts:
                line = line_of(name, version)
                if version not in VERSIONS or (line.exists() and "dev" in read_json(line)):
                    continue
                train.train(config_of(name, version), workdir_of(name, version))
                if not line.exists():
                    write_json(line, probed(name, version))
                found = read_json(line)
                write_json(line, found | compared(name, version, found["step"]))
                if version == "v2" and worth_keeping(name):
                    keep(name, found["step"])
            shares = TASKS[name].shares
            if options.shares:
                shares = [float(x) for x in options.shares.split(",") if x != "none"]
            for share, start in itertools.product(shares, starts):
                line = line_of(name, start)
                result = read_json(line) if line.exists() else {"task": name}
                found = result.setdefault("finetuned", {})
                if f"{share:g}" not in found:
                    found[f"{share:g}"] = finetuned(name, start, share)
                    if start == "scratch":
                        result |= of_scratch(name, found)
                    write_json(line, result)
            fill(PAGE, tables())
            if all(workdir_of(name, v).exists() for v in VERSIONS if line_of(name, v).exists()):
                write_page(name)

    run_main(command)


if __name__ == "__main__":
    main()
