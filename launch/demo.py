"""The demo: pretrain small encoders on the real samples shipped inside, probe them, write a report.

    bash launch/local.sh

For each modality: the linear probe and k-NN of hand-made features (pixels, log-mel, TF-IDF), of the
untrained and of the pretrained encoder on held-out examples, same probe and budget for all. Ends
with a table, a sentence for each modality, runs/demo/summary.json, runs/demo/report.html and its
picture, runs/demo/probes.svg. `python launch/demo.py --seeds=3` says how much the scores vary. The
same command again resumes.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import optax

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # a checkout need not be installed

from data2vec_jax import train
from data2vec_jax.cli.arguments import parse
from data2vec_jax.cli.output import as_json, run_main
from data2vec_jax.core import sharding
from data2vec_jax.core.train_step import init_state
from data2vec_jax.metrics.writer import FILE, read_lines
from data2vec_jax.report import page
from data2vec_jax.report.reference import mean_and_range
from data2vec_jax.tasks import pretrain, probe

FINAL = ("loss", "target_std", "pred_std")
PROBES = {"linear_probe": "linear probe", "knn": "k-NN"}
# Labelled training examples of the probes (speech: frames). Few labels are what it is all for.
LABELS = {"vision": 1_000, "speech": 20_000, "text": 1_000}
UNTRAINED = 3  # networks at least, however few are pretrained: they differ by some per cent


def run_variant(modality_name: str, version: int, seeds: int, folder: Path) -> dict[str, Any]:
    """Pretrains and probes `seeds` encoders of a demo config; one compiled program for all."""
    start, variant = time.time(), f"{modality_name},v{version}"
    config, _ = parse(["demo", f"--config={ROOT}/configs/demo.py:{variant}", "--workdir=-"])
    modality, model = pretrain.make_model(config)
    examples = probe.labelled(modality, config, ("train", "test"))
    encode = probe.make_encode(model)
    mesh = sharding.make_mesh(**config["mesh"])
    programs: dict[Any, Any] = {}
    seconds = []  # in probes

    def probed(score: Callable[..., Any], *parts: Any) -> Any:
        begin = time.time()
        found = score(*parts, *examples, limit=LABELS[modality_name])
        seconds.append(time.time() - begin)
        return found

    hand_made = probed(probe.probe_hand_made, modality)
    untrained, pretrained, last = [], [], []
    with jax.set_mesh(mesh):
        task = pretrain.abstract_task(config)
        init = jax.jit(lambda key: init_state(task, optax.identity(), key).params)
        for seed in range(max(seeds, UNTRAINED)):
            untrained.append(probed(probe.probe, encode, init(jax.random.key(seed))))
    for seed in range(seeds):
        print(f"{variant}, seed {seed}: {config['total_steps']} steps", file=sys.stderr, flush=True)
        config["seed"], workdir = seed, folder / f"seed{seed}"
        state = train.train(config, workdir, programs=programs, verbose=seed == 0)
        pretrained.append(probed(probe.probe, encode, state.params))
        lines = read_lines(workdir / FILE)
        last.append([line for line in lines if line["split"] == "train"][-1])
    return {
        "data": config["data"]["source"].rpartition(":")[2],
        "hand_made": modality.hand_made and modality.hand_made.name,
        **probe.compared(untrained, pretrained, hand_made),
        **{k: statistics.mean(line[k] for line in last) for k in FINAL},
        "probe_seconds": sum(seconds),
        "seconds": time.time() - start,
    }


def table(summary: Mapping[str, Mapping[str, Any]]) -> str:
    """One line per modality and probe: mean, and with several seeds the range."""
    head = ("", "time", *FINAL, "probe", "hand-made", "untrained", "pretrained", "from", "")
    rows = [head]
    for name, found in summary.items():
        first = [name, f"{found['seconds']:.0f} s", *(f"{found[k]:.3f}" for k in FINAL)]
        for probe_name, title in PROBES.items():
            scores = found[probe_name]
            cells = (
                "" if scores["hand_made"] is None else mean_and_range([scores["hand_made"]]),
                mean_and_range(scores["untrained"]),
                mean_and_range(scores["pretrained"]),
                found["blocks"][probe_name]["pretrained"][0],
                found["verdict"][probe_name],
            )
            rows.append((*first, title, *cells))
            first = [""] * len(first)
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def sentence(name: str, found: Mapping[str, Any]) -> str:
    """'digits: pixels 87.9, untrained 52.6, pretrained 89.1 (block 4): better than ...'"""
    scores = found["linear_probe"]
    mean = {side: 100 * statistics.mean(scores[side]) for side in ("untrained", "pretrained")}
    what = f"{found['data']} (1.0)" if not name.endswith("_v2") else found["data"]
    reference = scores["hand_made"]
    first = "" if reference is None else f"{found['hand_made']} {100 * reference:.1f}, "
    return (
        f"{what}: {first}untrained {mean['untrained']:.1f}, pretrained {mean['pretrained']:.1f} "
        f"({found['block']}): {found['verdict']['linear_probe']}"
    )


def main() -> None:
    """The command: see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--versions", default="2", help="of data2vec: 2, or 1,2")
    parser.add_argument("--modalities", default="vision,speech,text")
    parser.add_argument("--seeds", type=int, default=1, help="pretraining seeds of each")
    parser.add_argument("--workdir", type=Path, default=Path("runs/demo"))
    options = parser.parse_args()

    def command():
        start, summary = time.time(), {}
        for modality in options.modalities.split(","):
            for version in options.versions.split(","):
                name = modality if version == "1" else f"{modality}_v{version}"
                summary[name] = run_variant(
                    modality, int(version), options.seeds, options.workdir / name
                )
                path = options.workdir / "summary.json"
                path.write_text(as_json(summary))
        page.main([str(options.workdir)])
        (options.workdir / "probes.svg").write_text(page.picture(summary), encoding="utf-8")
        print(table(summary))
        print(*(sentence(*item) for item in summary.items()), sep="\n")
        print(f"{(time.time() - start) / 60:.1f} minutes; report: {options.workdir}/report.html")

    run_main(command)


if __name__ == "__main__":
    main()
