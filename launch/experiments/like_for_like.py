"""Baselines and data2vec at equal FLOPs, on one small network and one corpus.

    python launch/experiments/like_for_like.py digits [--methods=v2,mae | --tried]

Each method is a variant of configs/demo.py. The FLOPs are those of so many updates of 2.0; what a
method's update costs decides its number of updates. Three rates are tried with seed 0, and one more
if the first or the last is best; the one that is best on dev (a part of the labelled training
examples) gets two more seeds. Then the encoder is fine-tuned on a tenth of the labels, its rate
chosen on dev as well. All in runs/like_for_like/NAME; the same command goes on where it stopped,
and the last writes its page, NAME.json, the table in docs/comparison.md and the picture. After it
--tried trains what else was tried with a method, at the same FLOPs and the method's rate, with one
seed, and writes NAME-tried.json and its table.
"""

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "launch")]  # a checkout need not be installed

from grid import PAPERS_SPEECH
from pages import fill, markdown, pyplot
from reference import ERRORS, TASKS

from data2vec_jax import ablate, cluster, evaluate, train
from data2vec_jax.cli.arguments import parse
from data2vec_jax.cli.output import as_json, run_main
from data2vec_jax.configs import common
from data2vec_jax.core.config import with_options
from data2vec_jax.core.files import read_json
from data2vec_jax.metrics.hardware import forget_peak
from data2vec_jax.report import study
from data2vec_jax.report.reference import mean_and_range
from data2vec_jax.tasks import pretrain

RUNS = Path("runs/like_for_like")
RESULTS = Path(__file__).with_name("like_for_like")
PICTURE = RESULTS.with_suffix(".svg")
PAGE = ROOT / "docs/comparison.md"
OF_CLASS_TOKEN = "dino", "byol"  # methods that learn the class token; others learn the patches
METRICS = "linear_probe", "knn"
TITLES = {
    "v2": "data2vec 2.0",
    "v1": "data2vec 1.0",
    "mae": "MAE",
    "simmim": "SimMIM",
    "ijepa": "I-JEPA",
    "dino": "DINO",
    "byol": "BYOL",
    "wav2vec2": "wav2vec 2.0",
    "hubert": "HuBERT",
    "mlm": "MLM",
}
RATES = (1e-3, 3e-3, 1e-2)  # of every method
FURTHER = {1e-3: 3e-4, 1e-2: 3e-2}  # one more, if the best is at an end
SEEDS = 3
DATA = "runs/corpora"
TRANSCRIBED = TASKS["speech"]  # how the reference run is fine-tuned

CLOSED = {"ema.start": 0.996, "ema.end": 1.0, "ema.anneal": 1.0}  # I-JEPA's and DINO's own decay
SHORT_SPANS = {"mask.ratio": 0.333, "mask.width": 2}
SINGLES = {"mask": {"kind": "independent", "ratio": 0.75}}  # MAE's masks
TRIED = {  # corpus -> what -> method and options
    "digits": {
        "as in the table": ("v2", {}),
        "2 masks of an image": ("v2", {"objective.clones": 2}),
        "4 masks": ("v2", {"objective.clones": 4}),
        "batches of 8 images": ("v2", {"data.batch_size": 8}),
        "a loss of the class token, weight 0.1": ("v2", {"objective.class_weight": 0.1}),
        "weight 1": ("v2", {"objective.class_weight": 1.0}),
        "MAE's masks": ("v2", SINGLES),
        "MAE's masks, 2 of an image": ("v2", SINGLES | {"objective.clones": 2}),
        "targets without what a position has in common": ("v2", {"objective.final_norms": [[0]]}),
        "I-JEPA as in the table": ("ijepa", {}),
        "I-JEPA, rate 0.001, its own decay": ("ijepa", CLOSED | {"schedule.peak": 1e-3}),
        "DINO as in the table": ("dino", {}),
        "DINO, its own decay": ("dino", CLOSED),
        "DINO, rate 0.003, no small views": (
            "dino",
            {"examples.views.local": 0, "schedule.peak": 3e-3},
        ),
    },
    "speech": {
        "as in the table": ("v2", {}),
        "spans of 2 frames": ("v2", {"mask.width": 2}),
        "a third masked, spans of 2": ("v2", SHORT_SPANS),
        "the block's output as target": ("v2", {"objective.target": "block"}),
        "that, a third masked, spans of 2": ("v2", SHORT_SPANS | {"objective.target": "block"}),
    },
}


class Corpus(NamedTuple):
    """methods: variants of the demo, of `modality`. updates: of 2.0. options: of all methods.
    labels: of a probe. tuned: fine-tuning's config and options; rates: of it; metric: its score.
    own: options of one method."""

    modality: str
    methods: tuple[str, ...]
    updates: int
    options: Mapping[str, Any]
    labels: int
    tuned: tuple[str, Mapping[str, Any]]
    rates: tuple[float, ...] = (5e-4, 2e-3)
    metric: str = "accuracy"
    own: Mapping[str, Mapping[str, Any]] = MappingProxyType({})


CORPORA = {
    "digits": Corpus(
        "vision",
        ("v2", "v1", "mae", "simmim", "ijepa", "dino", "byol"),
        500,
        {"data.source": f"array_record:{DATA}/shards/mnist", "data.eval_split": "test"},
        1_000,
        ("finetune_imagenet:demo", {"total_steps": 300, "data.share": 0.1}),
    ),
    "speech": Corpus(
        "speech",
        ("v2", "v1", "wav2vec2", "hubert"),
        600,
        {"data.source": f"manifest:{DATA}/phones.tsv", "data.eval_split": "test"},
        20_000,
        (
            TRANSCRIBED.finetune,
            {
                **TRANSCRIBED.options,
                "data.split": "train",
                "total_steps": TRANSCRIBED.updates[0.1][0],
                "data.share": 0.1,
            },
        ),
        tuple(TRANSCRIBED.rates),
        TRANSCRIBED.metric,
        {"v2": PAPERS_SPEECH},  # as the other methods have theirs
    ),
    "texts": Corpus(
        "text",
        ("v2", "v1", "mlm"),
        300,
        {
            "data.source": f"array_record:{DATA}/shards/glosses",
            "data.split": "train",
            "data.eval_split": "test",
        },
        1_000,
        ("finetune_text:demo", {"total_steps": 300, "data.share": 0.1}),
    ),
}


def flops(config: Mapping[str, Any]) -> float:
    """Of one update."""
    task = pretrain.abstract_task(config)
    return task.mean([task.flops(s) for s in task.shapes])


def config_of(
    name: str, method: str, changes: Mapping[str, Any] = MappingProxyType({})
) -> dict[str, Any]:
    """A method's config, with as many updates as 2.0's FLOPs pay for. changes: options."""
    corpus = CORPORA[name]
    configs = {
        m: parse(["like", f"--config=demo:{corpus.modality},{m}", "--workdir=-"])[0]
        for m in {"v2", method}
    }
    configs = {
        m: with_options(c, {**corpus.options, **corpus.own.get(m, {})}) for m, c in configs.items()
    }
    config, own = with_options(configs[method], changes), configs["v2"]
    steps = round(corpus.updates * flops(own) / flops(config))
    quarter = -(-steps // 4)  # a checkpoint each, for the curve; the last is that of the end
    options = {"total_steps": steps, "log_every": max(1, steps // 50)}
    options |= {"checkpoint.every": quarter, "checkpoint.keep_every": quarter}
    if "labels" in config["examples"]:
        options["examples.labels"] = str(RUNS / name / "labels")
    if "ema" in config:
        decay = common.short_decay(steps)
        options |= {f"ema.{end}": decay[end] for end in ("start", "end")}
    return with_options(config, options | changes)


def run(config: Mapping[str, Any], workdir: Path, init_from: Path | None = None) -> Path:
    """Trains, or goes on; what is done is not done again."""
    done = workdir / "checkpoints" / str(config["total_steps"])
    if not done.exists():
        forget_peak()  # so that it is that of this run
        train.train(config, workdir, verbose=False, init_from=init_from and str(init_from))
    return workdir


def pretrained(name: str, method: str) -> tuple[float, list[Path]]:
    """The rate that is best on dev, and the workdirs of the seeds at it."""
    config, found = config_of(name, method), {}
    steps = str(config["total_steps"])
    if labels := config["examples"].get("labels"):  # HuBERT's, of MFCC
        source, clusters = config["data"]["source"], config["objective"]["clusters"]
        places = f"--source={source}", f"--workdir={labels}", f"--clusters={clusters}"
        cluster.main([*places, "--splits=train,test"])

    def made(rate: float, seed: int) -> Path:
        changed = with_options(config, {"schedule.peak": rate, "seed": seed})
        return run(changed, RUNS / name / method / f"{rate:g}" / f"seed{seed}")

    def best(rates: Sequence[float]) -> float:
        for rate in rates:
            probes = ablate.measured(made(rate, 0), CORPORA[name].labels, False, False)["probes"]
            found[rate] = max(probes[steps]["dev"]["linear_probe"].values())
            print(f"{name} {method} {rate:g}: {found[rate]} on dev", file=sys.stderr, flush=True)
        return max(found, key=found.__getitem__)

    rate = best(RATES)
    if rate in FURTHER:
        rate = best([FURTHER[rate]])
    return rate, [made(rate, seed) for seed in range(SEEDS)]


def finetuned(name: str, starts: Sequence[Path | None], more: Mapping[str, Any]) -> dict[str, Any]:
    """Scores on test with a tenth of the labels, from the encoder of each seed or (None) from
    scratch, and the rate, which is best on dev. more: options."""
    corpus = CORPORA[name]
    config_name, options = corpus.tuned
    base, _ = parse(["like", f"--config={config_name}", "--workdir=-"])
    base = with_options(base, {**corpus.options, **options, **more})
    if None in starts:
        base = with_options(base, common.from_scratch(base))

    def score(rate: float, seed: int, split: str) -> float:
        start = starts[seed]
        changed = {"schedule.peak": rate, "data.eval_split": split, "eval_every": 0, "seed": seed}
        folder = start or RUNS / name / f"scratch/seed{seed}"
        tuned = run(with_options(base, changed), folder / f"tuned-{rate:g}-{split}", start)
        return evaluate.evaluate(str(tuned), {})["scores"][split][corpus.metric]

    rate, *others = corpus.rates
    if others:
        best = min if corpus.metric in ERRORS else max
        rate = best(corpus.rates, key=lambda r: score(r, 0, "dev"))
    return {"rate": rate, corpus.metric: [score(rate, s, "test") for s in range(len(starts))]}


def tried(name: str) -> None:
    """Trains and probes what is in `TRIED`, and writes its table."""
    corpus, best, found = CORPORA[name], read_json(RESULTS / f"{name}.json"), {}
    for what, (method, changes) in TRIED[name].items():
        config = config_of(name, method, {"schedule.peak": best[method]["rate"], **changes})
        place = RUNS / name / "tried" / "".join(c if c.isalnum() else "_" for c in what)
        line = ablate.measured(run(config, place), corpus.labels, False, False)
        scores = {m: max(study.last(line)["dev"][m].values()) for m in METRICS}
        found[what] = {"method": method, "options": changes, "updates": line["updates"], **scores}
        print(f"{name} {what}: {found[what]}", file=sys.stderr, flush=True)
    (RESULTS / f"{name}-tried.json").write_text(as_json(found))
    rows = [
        [w, f"{x['updates']:,}", *(f"{100 * x[m]:.1f}" for m in METRICS)] for w, x in found.items()
    ]
    fill(PAGE, {f"tried: {name}": markdown(("what", "updates", "linear", "k-NN"), rows)})


# The page -----------------------------------------------------------------------------------------


def table(name: str, found: Mapping[str, Any]) -> str:
    """A row for each method; scores in per cent, mean and range over seeds."""
    metric = CORPORA[name].metric
    head = "method", "rate", "updates", "FLOPs", "seconds", "linear", "k-NN"
    rows, others = [], []
    for method, line in found.items():
        last = mean_and_range(line["tuned"][metric], "") if "tuned" in line else ""
        if method == "scratch":
            others.append(["from scratch", *[""] * 6, last])
            continue
        runs = line["runs"]
        probes = [study.last(run) for run in runs]
        scores = [mean_and_range([p[metric] for p in probes], "") for metric in METRICS]
        seconds = statistics.fmean(run["seconds"] for run in runs)
        cost = f"{runs[0]['updates']:,}", f"{runs[0]['FLOPs']:.1e}", f"{seconds:.0f}"
        rows.append([TITLES[method], f"{line['rate']:g}", *cost, *scores, last])
        if method == "v2":  # whose network the others have
            for side, title in (("untrained", "untrained"), ("hand_made", "hand-made features")):
                one = runs[0]["probes"][side]
                others.append([title, *[""] * 4, *(f"{100 * one[m]:.1f}" for m in METRICS), ""])
    return markdown((*head, f"a tenth of labels: {metric}"), [*rows, *others])


def draw(results: Mapping[str, Mapping[str, Any]]) -> None:
    """A panel for each corpus: the linear probe on dev against the FLOPs of training."""
    plt = pyplot()
    colours = dict(zip(TITLES, plt.get_cmap("tab10").colors, strict=False))
    figure, panels = plt.subplots(1, len(results), figsize=(6 * len(results), 3.8), squeeze=False)
    for panel, (name, found) in zip(panels[0], results.items(), strict=True):
        for method, line in found.items():
            if method == "scratch":
                continue
            scores = study.scores_over_flops("linear_probe", line["runs"])
            means = [statistics.fmean(v) for v in scores.values()]
            ink = colours[method]
            panel.plot(list(scores), means, "o-", markersize=3, color=ink, label=TITLES[method])
            low, high = [[f(v) for v in scores.values()] for f in (min, max)]
            panel.fill_between(list(scores), low, high, color=ink, alpha=0.15, linewidth=0)
        for side, style in (("untrained", ":"), ("hand_made", "--")):
            one = found["v2"]["runs"][0]["probes"][side]["dev"]["linear_probe"]
            panel.axhline(100 * max(one.values()), color="#495057", linestyle=style, linewidth=1)
        panel.set_title(f"{name} (dotted: untrained, dashed: hand-made)", fontsize=9)
        panel.set_xlabel("FLOPs of training")
        panel.set_ylabel("linear probe on dev, %")
        panel.grid(True, color="#e9ecef")
        panel.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.tight_layout()
    figure.savefig(PICTURE, metadata={"Date": None})


def main() -> None:
    """The command: see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("name", choices=CORPORA)
    parser.add_argument("--methods", help="of them alone, without tables and picture")
    parser.add_argument("--tried", action="store_true", help="what else was tried")
    arguments = parser.parse_args()
    if arguments.tried and arguments.name not in TRIED:
        parser.error(f"--tried is of {', '.join(TRIED)} alone")

    def command():
        name = arguments.name
        if arguments.tried:
            tried(name)
            return
        corpus, found = CORPORA[name], {}
        chosen = arguments.methods.split(",") if arguments.methods else corpus.methods
        for method in chosen:
            rate, workdirs = pretrained(name, method)
            found[method] = {"rate": rate, "workdirs": [str(w) for w in workdirs]}
            pooling = {"head.pooling": "class"} if method in OF_CLASS_TOKEN else {}
            found[method]["tuned"] = finetuned(name, workdirs, pooling)
            print(f"{name} {method}: {found[method]}", file=sys.stderr, flush=True)
        if arguments.methods:
            return
        for line in found.values():
            line["runs"] = [
                ablate.measured(w, corpus.labels, True, not i)
                for i, w in enumerate(line["workdirs"])
            ]
        rows = {method: line["runs"] for method, line in found.items()}
        ablate.summarise(RUNS / name / "page", {"study": "compare", "points": rows})
        tokenizer = Path(found["v2"]["workdirs"][0], "tokenizer")
        own = {"examples.tokenizer": str(tokenizer)} if tokenizer.exists() else {}
        found["scratch"] = {"tuned": finetuned(name, [None] * SEEDS, own)}
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{name}.json").write_text(as_json(found))
        results = {n: read_json(RESULTS / f"{n}.json") for n in CORPORA if known(n)}
        fill(PAGE, {f"like for like: {n}": table(n, results[n]) for n in results})
        draw(results)

    run_main(command)


def known(name: str) -> bool:
    """Whether a corpus has been run to its end."""
    return (RESULTS / f"{name}.json").exists()


if __name__ == "__main__":
    main()
