"""Baselines and data2vec at equal FLOPs, on one small network and one corpus.

    python launch/experiments/like_for_like.py digits [--methods=v2,mae]

Each method is a variant of configs/demo.py. The FLOPs are those of so many updates of 2.0; what a
method's update costs decides its number of updates. Three rates are tried with seed 0, the one that
is best on dev (a part of the labelled training examples) gets two more seeds. Then the encoder is
fine-tuned on a tenth of the labels, its rate chosen on dev as well. All in runs/like_for_like/NAME;
the same command goes on where it stopped, and the last writes its page and NAME.json.
"""

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # a checkout need not be installed

from data2vec_jax import ablate, evaluate, train
from data2vec_jax.cli.arguments import parse
from data2vec_jax.cli.output import as_json, run_main
from data2vec_jax.configs import common
from data2vec_jax.core.config import with_options
from data2vec_jax.metrics.hardware import forget_peak
from data2vec_jax.tasks import pretrain

RUNS = Path("runs/like_for_like")
RESULTS = Path(__file__).with_name("like_for_like")
RATES = (1e-3, 3e-3, 1e-2)  # of every method
SEEDS = 3
DATA = "runs/corpora"


class Corpus(NamedTuple):
    """methods: variants of the demo, of `modality`. updates: of 2.0. labels: of a probe. tuned:
    fine-tuning's config and options, None if there is no such task; rates: of it."""

    modality: str
    methods: tuple[str, ...]
    updates: int
    options: Mapping[str, Any]
    labels: int
    tuned: tuple[str, Mapping[str, Any]] | None
    rates: tuple[float, ...] = (5e-4, 2e-3)


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
        None,
    ),
    "texts": Corpus(
        "text",
        ("v2", "v1", "mlm"),
        300,
        {},
        1_000,
        ("finetune_text:demo", {"total_steps": 300, "data.share": 0.1}),
    ),
}


def flops(config: Mapping[str, Any]) -> float:
    """Of one update."""
    task = pretrain.abstract_task(config)
    return task.mean([task.flops(s) for s in task.shapes])


def config_of(name: str, method: str) -> dict[str, Any]:
    """A method's config, with as many updates as 2.0's FLOPs pay for."""
    corpus = CORPORA[name]
    configs = {
        m: parse(["like", f"--config=demo:{corpus.modality},{m}", "--workdir=-"])[0]
        for m in {"v2", method}
    }
    configs = {m: with_options(c, corpus.options) for m, c in configs.items()}
    config, own = configs[method], configs["v2"]
    steps = round(corpus.updates * flops(own) / flops(config))
    options = {"total_steps": steps, "checkpoint.every": steps, "log_every": max(1, steps // 50)}
    options |= {"checkpoint.keep_every": steps // 4}
    if "ema" in config:
        decay = common.short_decay(steps)
        options |= {f"ema.{end}": decay[end] for end in ("start", "end")}
    return with_options(config, options)


def run(config: Mapping[str, Any], workdir: Path, init_from: Path | None = None) -> Path:
    """Trains, or goes on; what is done is not done again."""
    done = workdir / "checkpoints" / str(config["total_steps"])
    if not done.exists():
        forget_peak()  # so that it is that of this run
        train.train(config, workdir, verbose=False, init_from=init_from and str(init_from))
    return workdir


def pretrained(name: str, method: str) -> list[Path]:
    """The workdirs of the seeds, at the rate that is best on dev."""
    config, found = config_of(name, method), {}
    steps = str(config["total_steps"])

    def made(rate: float, seed: int) -> Path:
        changed = with_options(config, {"schedule.peak": rate, "seed": seed})
        return run(changed, RUNS / name / method / f"{rate:g}" / f"seed{seed}")

    for rate in RATES:
        probes = ablate.measured(made(rate, 0), CORPORA[name].labels, False, False)["probes"]
        found[rate] = max(probes[steps]["dev"]["linear_probe"].values())
        print(f"{name} {method} {rate:g}: {found[rate]} on dev", file=sys.stderr, flush=True)
    best = max(found, key=found.__getitem__)
    return [made(best, seed) for seed in range(SEEDS)]


def finetuned(name: str, workdirs: list[Path]) -> list[float]:
    """Scores on test with a tenth of the labels, from each seed."""
    config_name, options = CORPORA[name].tuned
    base, _ = parse(["like", f"--config={config_name}", "--workdir=-"])
    base = with_options(base, {**CORPORA[name].options, **options})

    def score(rate: float, workdir: Path, split: str) -> float:
        changed = {"schedule.peak": rate, "data.eval_split": split, "eval_every": 0}
        tuned = run(with_options(base, changed), workdir / f"tuned-{rate:g}-{split}", workdir)
        return evaluate.evaluate(str(tuned), {})["scores"][split]["accuracy"]

    rate = max(CORPORA[name].rates, key=lambda r: score(r, workdirs[0], "dev"))
    return [score(rate, workdir, "test") for workdir in workdirs]


def main() -> None:
    """The command: see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("name", choices=CORPORA)
    parser.add_argument("--methods", help="of them alone, without a page")
    arguments = parser.parse_args()

    def command():
        name = arguments.name
        chosen = arguments.methods.split(",") if arguments.methods else CORPORA[name].methods
        found = {}
        for method in chosen:
            workdirs = pretrained(name, method)
            rates = finetuned(name, workdirs) if CORPORA[name].tuned else None
            found[method] = {"workdirs": [str(w) for w in workdirs], "a tenth of labels": rates}
            print(f"{name} {method}: {found[method]}", file=sys.stderr, flush=True)
        if arguments.methods:
            return
        labels = CORPORA[name].labels
        rows = {
            method: [
                ablate.measured(w, labels, True, not i) for i, w in enumerate(line["workdirs"])
            ]
            for method, line in found.items()
        }
        ablate.summarise(RUNS / name / "page", {"study": "compare", "points": rows})
        RESULTS.mkdir(exist_ok=True)
        table = {m: {**found[m], "runs": rows[m]} for m in found}
        (RESULTS / f"{name}.json").write_text(as_json(table))

    run_main(command)


if __name__ == "__main__":
    main()
