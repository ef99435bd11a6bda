"""Pretraining against training from scratch, on real data: the results of docs/results.md.

    python launch/experiments/corpora.py        the data, once
    python launch/experiments/grid.py           all that is missing; then the tables and the picture
    python launch/experiments/grid.py --tables  the tables and the picture alone

For each task: data2vec 1.0 and 2.0 pretrain a small network on its inputs; then the same network,
with the same fine-tuning, learns the labels from scratch and from each of them. A line of a task is
kept as grid/TASK-START.json beside this file, so the same command goes on where it stopped; to make
a line again, remove its file. Two lines are made at a time, each on half of the cores. The picture
needs matplotlib.
"""

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs/results.md"
sys.path.insert(0, str(ROOT))  # a checkout need not be installed

from pages import fill, pyplot

FOLDER = ROOT / "launch/experiments/grid"
RUNS = ROOT / "runs/grid"
CORPORA = ROOT / "runs/corpora"
PICTURE = ROOT / "launch/experiments/grid.svg"
SEEDS = 3
JOBS = 2
STARTS = {
    "scratch": "from scratch",
    "v1": "1.0",
    "v2": "2.0",
    "full": "all parameters",
    "lora": "LoRA",
    "dora": "DoRA",
}


@dataclass(frozen=True)
class Of:
    """A task of the grid.

    title: for the table. pretrain, finetune: variants of configs/demo.py and of a fine-tuning
    config, each with options. metrics: scores on the split test, the first is drawn. shares: of the
    labels. starts: 'scratch', and what it is compared with. table: where it stands. versions:
    more options of pretraining, by version. base: the task whose pretraining it is, if not its own.
    tuned_on_test: whether its rate or length was chosen by these scores; the title gets a star.
    """

    title: str
    pretrain: str
    finetune: str
    metrics: tuple[str, ...]
    table: str = "short"
    shares: tuple[float, ...] = (0.1, 1.0)
    starts: tuple[str, ...] = ("scratch", "v2")
    pretrain_options: Mapping[str, Any] = field(default_factory=dict)
    finetune_options: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    base: str | None = None
    tuned_on_test: bool = False


FULL: dict[str, Any] = dict(table="full", shares=(0.01, 0.1, 1.0), starts=("scratch", "v1", "v2"))
# Frames of 40 ms: half the time of a step.
CONVS = {"model.frontend": {"convs": ((32, 20, 10), (64, 11, 4), (64, 4, 4), (64, 4, 4))}}
# Of 1.0 as of 2.0 here, so that one network from scratch is what both are compared with.
ALIBI = {"model.alibi": {"scale": 1.0, "learned": True, "per_head": True, "per_layer": False}}
# What a recording is as a whole (its language, its voice) stays in targets that are normalised over
# the batch and not over each recording; a front end of the teacher's own loses less of it.
WHOLE = {"averaged": ("^(?!decoder/|head/)",), "objective.layer_norms": ("batch",)}
COLOURS = {
    "model.image": 32,
    "model.mean": (0.5,) * 3,
    "model.std": (0.5,) * 3,
    "examples.image": 32,
    "examples.channels": 3,
    "examples.flip": 0.5,
}


# Recipes of the demo when these lines were made; docs/small_scale.md has what changed them.
DECAY = {"ema.start": 0.99, "ema.end": 0.999, "ema.anneal": 1.0}
RATE = {"schedule.peak": 1e-3}
DECODER = {"model.decoder.layers": 3, "model.decoder.width": 96, "model.decoder.groups": 8}
CROPS = {"examples.scale": (0.6, 1.0), "examples.aspect": (3 / 4, 4 / 3)}
ENCODER_ALONE = {"averaged": ("^positions/", "^alibi/", "^norm/", "^encoder/")}
PAPERS_SPEECH = {"mask.ratio": 0.5, "mask.width": 5, "objective.target": "ffn"}
EARLIER: dict[str, dict[str, Any]] = {
    "vision,v1": {},
    "vision,v2": {**CROPS, **DECAY, **RATE, **DECODER},
    "speech,v1": {**DECAY, **RATE},
    "speech,v2": {**DECAY, **RATE, **DECODER, **ENCODER_ALONE, **PAPERS_SPEECH},
    "text,v1": {},
    "text,v2": {**DECAY, "model.decoder.width": 96},
}


def tokens(vocabulary: int, table: str) -> dict[str, Any]:
    """Options of a text config."""
    sizes = {"examples.vocab_size": vocabulary, "model.vocab_size": vocabulary}
    return {**source(table), **sizes}


def source(table: str) -> dict[str, Any]:
    """Options of any config: a table of `corpora.py`, with what is its split dev today."""
    split = "train" if table in ("descriptions.csv", "russian.tsv") else "train+dev"
    shards = CORPORA / "shards" / Path(table).stem
    return {"data.source": f"array_record:{shards}", "data.split": split}


TASKS = {
    "digits": Of(
        "MNIST digits: 10 classes, 4,000 labels",
        "vision",
        "finetune_imagenet.py:demo",
        ("accuracy",),
        **FULL,
        finetune_options={"total_steps": 400},
        versions={"v1": {"total_steps": 900}, "v2": {"total_steps": 300}},
    ),
    "sections": Of(
        "Debian descriptions: 16 sections, 9,400 labels",
        "text",
        "finetune_text.py:demo",
        ("accuracy", "macro_f1"),
        **FULL,
        tuned_on_test=True,
        # Whole descriptions are longer than a row: they are cut, not left out.
        pretrain_options={
            **tokens(4_000, "descriptions.csv"),
            "examples.lengths": (64,),
            "examples.mode": "none",
            "data.batch_size": 24,
            "total_steps": 1_600,
        },
        finetune_options={**tokens(4_000, "sections.csv"), "head.classes": 16, "total_steps": 200},
        versions={"v2": {"schedule.peak": 2e-3}},
    ),
    "languages": Of(
        "Spoken captions: 5 languages, 3,100 labels",
        "speech",
        "finetune_audio.py:demo",
        ("accuracy", "macro_f1"),
        tuned_on_test=True,
        pretrain_options={**source("languages.tsv"), **CONVS, **ALIBI, **WHOLE, "total_steps": 800},
        finetune_options={
            **source("languages.tsv"),
            **CONVS,
            "head.classes": 5,
            "total_steps": 200,
        },
    ),
    "emoji": Of(
        "Emoji: 9 classes, 1,500 labels",
        "vision",
        "finetune_imagenet.py:demo",
        ("accuracy",),
        pretrain_options={**source("emoji.tsv"), **COLOURS, "total_steps": 300},
        finetune_options={**source("emoji.tsv"), **COLOURS, "head.classes": 9, "total_steps": 300},
    ),
    "glosses": Of(
        "WordNet glosses: 45 classes, 94,000 labels",
        "text",
        "finetune_text.py:demo",
        ("accuracy", "macro_f1"),
        tuned_on_test=True,
        pretrain_options={
            **tokens(4_000, "glosses.csv"),
            "total_steps": 1_600,
            "schedule.peak": 2e-3,
        },
        finetune_options={**tokens(4_000, "glosses.csv"), "total_steps": 200},
    ),
    "adapters": Of(
        "Debian descriptions, as above",
        "text",
        "finetune_text.py:demo",
        ("accuracy", "macro_f1"),
        table="adapters",
        shares=(1.0,),
        starts=("full", "lora", "dora"),
        base="sections",
        finetune_options={**tokens(4_000, "sections.csv"), "head.classes": 16, "total_steps": 200},
    ),
    "russian": Of(
        "Russian phrases: characters, 2,092 transcripts (85 minutes)",
        "speech",
        "finetune_librispeech.py:demo",
        ("cer", "wer", "cer_lm", "wer_lm"),
        **FULL,
        pretrain_options={**source("russian.tsv"), **CONVS, **ALIBI, "total_steps": 4_000},
        finetune_options={
            **source("russian.tsv"),
            **CONVS,
            "examples.seconds": (4.0,),
            "total_steps": 1_000,
        },
    ),
}


# One line -----------------------------------------------------------------------------------------


def configured(file: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """A config's variant, 'FILE.py:VARIANT', with options by their dotted names."""
    from data2vec_jax.cli.arguments import parse
    from data2vec_jax.core.config import with_options

    config, _ = parse(["grid", f"--config={ROOT}/configs/{file}", "--workdir=-"])
    return with_options(config, options, strict=True)


def pretrain(name: str, version: str) -> None:
    """The pretraining that lines of a task start from, in runs/grid/TASK/VERSION."""
    from data2vec_jax import train

    task = TASKS[name]
    variant = f"{task.pretrain},{version}"
    options = {**EARLIER[variant], **task.pretrain_options, **task.versions.get(version, {})}
    config = configured(f"demo.py:{variant}", options)
    train.train(config, RUNS / name / version, verbose=False)


def finetune(name: str, start: str) -> dict[str, Any]:
    """Share of the labels -> scores of each seed and seconds of training; all from one start."""
    from data2vec_jax import evaluate, train
    from data2vec_jax.metrics.writer import FILE, read_lines

    task, found = TASKS[name], {}
    programs: dict[Any, Any] = {}
    version = {"scratch": None, "v1": "v1"}.get(start, "v2")
    init_from = str(RUNS / (task.base or name) / version) if version else None
    variant = task.finetune + (f"_{start}" if start in ("lora", "dora") else "")
    for share in task.shares:
        runs = []
        for seed in range(SEEDS):
            options = {"seed": seed, "data.share": share, "eval_every": 0, **task.finetune_options}
            config = configured(variant, options)
            if (
                init_from is None and "tokenizer" in config["examples"]
            ):  # the words are not in question
                config["examples"]["tokenizer"] = str(RUNS / name / "v2/tokenizer")
            workdir = RUNS / name / f"{start}-{share:g}-{seed}"
            train.train(config, workdir, programs=programs, verbose=False, init_from=init_from)
            lines = read_lines(workdir / FILE)
            runs.append([line for line in lines if line["split"] == "test"][-1])
            runs[-1]["seconds"] = evaluate.train_seconds(workdir)
            print(f"{name} {start} {share:g} {seed}: {runs[-1]}", file=sys.stderr, flush=True)
        found[f"{share:g}"] = {key: [run[key] for run in runs] for key in runs[0] if key != "split"}
    return found


def with_language(name: str, workdirs: list[Path]) -> dict[str, list[float]]:
    """Error rates with a trigram of the training transcripts, its weights chosen on split dev."""
    from data2vec_jax import evaluate
    from data2vec_jax.data.sources import open_source
    from data2vec_jax.modalities import contract
    from data2vec_jax.tasks import ngrams, transcribe

    arpa = RUNS / name / "words.arpa"
    if not arpa.exists():
        config = configured(TASKS[name].finetune, TASKS[name].finetune_options)
        normaliser = transcribe.normaliser_of(config)
        codec = contract.get(config["modality"]).codec
        source = open_source(config["data"]["source"], "train", codec=codec)
        texts = [source.field(i, "transcript") for i in range(len(source))]
        words = [transcribe.transcript_of(t, normaliser, source.uri).split() for t in texts]
        ngrams.write_arpa(ngrams.train(words, 3), arpa)
    options = {"scoring.lm": str(arpa), "scoring.beam": 10}
    tried = {"scoring.lm_weight": [0.5, 1.5, 3.0], "scoring.word_score": [0.0, 2.0]}
    dev = evaluate.evaluate(str(workdirs[0]), {"data.eval_split": "dev", **options, **tried})
    options |= {f"scoring.{k}": dev["scores"]["dev"][k] for k in ("lm_weight", "word_score")}
    found = [evaluate.evaluate(str(w), options)["scores"]["test"] for w in workdirs]
    return {key: [scores[key] for scores in found] for key in ("cer_lm", "wer_lm")}


def line(name: str, start: str) -> None:
    """Makes launch/experiments/grid/NAME-START.json."""
    from data2vec_jax import evaluate

    task = TASKS[name]
    scores = finetune(name, start)
    if "wer_lm" in task.metrics:
        for share, found in scores.items():
            workdirs = [RUNS / name / f"{start}-{share}-{seed}" for seed in range(SEEDS)]
            found |= with_language(name, workdirs)
    first = evaluate.evaluate(str(RUNS / name / f"{start}-{task.shares[0]:g}-0"), {})
    result = {
        "scores": scores,
        "date": datetime.date.today().isoformat(),
        **{key: first[key] for key in ("parameters", "trained_parameters")},
    }
    (FOLDER / f"{name}-{start}.json").write_text(json.dumps(result, indent=1) + "\n")


# All of them --------------------------------------------------------------------------------------


def missing() -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """(task, version) of pretraining, then (task, start) of lines, that are still to be made."""
    lines = [
        (name, start)
        for name, task in TASKS.items()
        for start in task.starts
        if not (FOLDER / f"{name}-{start}.json").exists()
    ]
    # From scratch, too, texts are read with the tokenizer of 2.0.
    wanted = {(TASKS[n].base or n, "v1" if start == "v1" else "v2") for n, start in lines}
    ready = {(n, v) for n, v in wanted if (RUNS / n / v / "done").exists()}
    return sorted(wanted - ready), lines


def run_all(jobs: list[list[str]]) -> list[str]:
    """Runs this script with each list of options, JOBS at a time; names of those that failed."""
    cores = sorted(os.sched_getaffinity(0))
    share = max(1, len(cores) // JOBS)
    free = [cores[i * share : (i + 1) * share] for i in range(JOBS)]
    lock = threading.Lock()

    def one(options):
        with lock:
            mine = free.pop()
        began, log = time.time(), RUNS / f"{'-'.join(options).strip('-')}.log"
        with log.open("w") as file:
            cache = {"JAX_COMPILATION_CACHE_DIR": str(RUNS / ".cache")}
            pages = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}  # as launch/local.sh
            done = subprocess.run(
                ["taskset", "-c", ",".join(map(str, mine)), sys.executable, __file__, *options],
                stdout=file,
                stderr=file,
                env=cache | pages | os.environ,
            )
        with lock:
            free.append(mine)
        how = f"failed, see {log}" if done.returncode else "done"
        print(f"{' '.join(options)}: {how}, {time.time() - began:.0f} s", flush=True)
        return [" ".join(options)] if done.returncode else []

    with ThreadPoolExecutor(JOBS) as pool:
        return [name for names in pool.map(one, jobs) for name in names]


def known() -> dict[str, dict[str, Any]]:
    """'TASK-START' -> what is kept of every line."""
    return {p.stem: json.loads(p.read_text()) for p in sorted(FOLDER.glob("*-*.json"))}


def spread(values: list[float]) -> str:
    """'82.1 (81.0 to 83.3)', in per cent."""
    percent = [100 * v for v in values]
    return f"{statistics.mean(percent):.1f} ({min(percent):.1f} to {max(percent):.1f})"


NAMES = {
    "accuracy": "accuracy",
    "macro_f1": "macro F1",
    "cer": "character errors",
    "wer": "word errors",
    "cer_lm": "character errors, trigram",
    "wer_lm": "word errors, trigram",
}


def errors(metric: str) -> bool:
    """Whether less is better."""
    return metric.startswith(("cer", "wer"))


def table(kind: str, results: Mapping[str, Any]) -> str:
    """Tasks, shares and scores down, starts across; bold where all seeds beat all from scratch.

    Tasks of which no line has been made are left out.
    """
    tasks = {name: task for name, task in TASKS.items() if task.table == kind}
    starts = list(dict.fromkeys(s for task in tasks.values() for s in task.starts))
    lines = ["| task | labels | score, % | " + " | ".join(STARTS[s] for s in starts) + " |"]
    lines.append("|" + " --- |" * (3 + len(starts)))
    for name, task in tasks.items():
        found = {s: results[f"{name}-{s}"]["scores"] for s in starts if f"{name}-{s}" in results}
        if not found:
            continue
        title = task.title.replace(":", "*:", 1) if task.tuned_on_test else task.title
        for share in task.shares:
            for metric in task.metrics:
                values = {s: scores[f"{share:g}"][metric] for s, scores in found.items()}
                sign = -1 if errors(metric) else 1
                cells = []
                for s in starts:
                    text = spread(values[s]) if s in values else "not run"
                    better = (
                        s != "scratch"
                        and {s, "scratch"} <= values.keys()
                        and (
                            min(sign * v for v in values[s])
                            > max(sign * v for v in values["scratch"])
                        )
                    )
                    cells.append(f"**{text}**" if better else text)
                label = f"{100 * share:g} %" if metric == task.metrics[0] else ""
                lines.append(f"| {title} | {label} | {NAMES[metric]} | {' | '.join(cells)} |")
                title = ""
    return "\n".join(lines)


def adapters(results: Mapping[str, Any]) -> str:
    """Full fine-tuning and adapters, a row each."""
    task = TASKS["adapters"]
    lines = ["| learns | accuracy, % | macro F1, % | trained parameters | seconds of training |"]
    lines.append("|" + " --- |" * 5)
    for start in task.starts:
        if f"adapters-{start}" in results:
            result = results[f"adapters-{start}"]
            found = result["scores"]["1"]
            seconds = statistics.fmean(found["seconds"])
            lines.append(
                f"| {STARTS[start]} | {spread(found['accuracy'])} | {spread(found['macro_f1'])} | "
                f"{result['trained_parameters']:,} of {result['parameters']:,} | {seconds:.0f} |"
            )
    return "\n".join(lines)


def draw(results: Mapping[str, Any]) -> None:
    """A panel for each task of the full grid: its first score against the share of the labels."""
    plt = pyplot()
    tasks = {
        name: task
        for name, task in TASKS.items()
        if task.table == "full" and any(f"{name}-{start}" in results for start in task.starts)
    }
    figure, panels = plt.subplots(1, len(tasks), figsize=(4.2 * len(tasks), 3.4), squeeze=False)
    colours = {"scratch": "#868e96", "v1": "#1971c2", "v2": "#e8590c"}
    for panel, (name, task) in zip(panels[0], tasks.items(), strict=True):
        for start in task.starts:
            if f"{name}-{start}" not in results:
                continue
            scores = results[f"{name}-{start}"]["scores"]
            values = [[100 * v for v in scores[f"{x:g}"][task.metrics[0]]] for x in task.shares]
            means = [statistics.fmean(v) for v in values]
            shares, colour = [100 * x for x in task.shares], colours[start]
            panel.plot(shares, means, "o-", color=colour, label=STARTS[start])
            low, high = [min(v) for v in values], [max(v) for v in values]
            panel.fill_between(shares, low, high, color=colour, alpha=0.2, linewidth=0)
        panel.set_xscale("log")
        panel.set_xticks([100 * x for x in task.shares], [f"{100 * x:g} %" for x in task.shares])
        panel.minorticks_off()
        panel.set_title(task.title.split(":")[0], fontsize=10)
        panel.set_xlabel("labels used")
        panel.set_ylabel(f"{NAMES[task.metrics[0]]}, %")
        panel.grid(True, color="#e9ecef")
    panels[0, 0].legend()
    figure.tight_layout()
    figure.savefig(PICTURE, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tables", action="store_true")
    parser.add_argument("--pretrain", nargs=2, metavar=("TASK", "VERSION"), help="one, by itself")
    parser.add_argument("--line", nargs=2, metavar=("TASK", "START"), help="one, by itself")
    options = parser.parse_args()
    FOLDER.mkdir(exist_ok=True)
    RUNS.mkdir(parents=True, exist_ok=True)
    if options.pretrain:
        name, version = options.pretrain
        pretrain(name, version)
        (RUNS / name / version / "done").touch()
        return
    if options.line:
        line(*options.line)
        return
    failed = []
    if not options.tables:
        first, then = missing()
        failed = run_all([["--pretrain", *job] for job in first])
        failed += run_all([["--line", *job] for job in then]) if not failed else []
    results = known()
    tables = {f"grid of {kind}": table(kind, results) for kind in ("full", "short")}
    fill(PAGE, tables | {"grid of adapters": adapters(results)})
    try:
        draw(results)
    except ModuleNotFoundError as error:
        failed.append(f"the picture (pip install {error.name})")
    if failed:
        sys.exit(f"error: {len(failed)} failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
