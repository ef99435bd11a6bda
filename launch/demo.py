"""The demo: pretrain small encoders on the real samples shipped inside, probe them, write a report.

    bash launch/local.sh

For each modality and seed: the linear probe and k-NN of the untrained and of the pretrained
encoder on held-out examples, same probe and budget for both. Ends with a table,
runs/demo/summary.json, runs/demo/report.html and its picture, runs/demo/probes.svg. The same
command again resumes.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # a checkout need not be installed

from data2vec_jax import train
from data2vec_jax.cli.arguments import parse
from data2vec_jax.cli.output import run_main
from data2vec_jax.core import sharding
from data2vec_jax.core.run import Run
from data2vec_jax.metrics.writer import FILE, read_lines
from data2vec_jax.report import page
from data2vec_jax.tasks import pretrain, probe

FINAL = ("loss", "target_std", "pred_std")
PROBES = {"linear_probe": "linear probe", "knn": "k-NN"}
# Labelled training examples of the probes (speech: frames). Few labels are what it is all for.
LABELS = {"vision": 1_000, "speech": 20_000, "text": 1_000}


def run_variant(modality_name: str, version: int, seeds: int, folder: Path) -> dict[str, Any]:
    """Pretrains and probes `seeds` encoders of a demo config; one compiled program for all."""
    start, variant = time.time(), f"{modality_name},v{version}"
    config, _ = parse(["demo", f"--config={ROOT}/configs/demo.py:{variant}", "--workdir=-"])
    modality, model = pretrain.make_model(config)
    examples = probe.labelled(modality, config, ("train", "test"))
    encode = probe.make_encode(model)
    mesh = sharding.make_mesh(**config["mesh"])
    programs: dict[Any, Any] = {}
    scores = {name: {"untrained": [], "pretrained": []} for name in PROBES}
    last = []
    for seed in range(seeds):
        print(f"{variant}, seed {seed}: {config['total_steps']} steps", file=sys.stderr, flush=True)
        config["seed"] = seed
        with jax.set_mesh(mesh):
            untrained = Run(config, pretrain.make(config), mesh).init(seed).params
        workdir = folder / f"seed{seed}"
        state = train.train(config, workdir, programs=programs, verbose=seed == 0)
        for kind, params in (("untrained", untrained), ("pretrained", state.params)):
            found = probe.probe(encode, params, *examples, limit=LABELS[modality_name])
            for name in PROBES:
                scores[name][kind].append(found[name])
        lines = read_lines(workdir / FILE)
        last.append([line for line in lines if line["split"] == "train"][-1])
    final = {k: statistics.mean(line[k] for line in last) for k in FINAL}
    return scores | final | {"seconds": time.time() - start}


def table(summary: Mapping[str, Mapping[str, Any]]) -> str:
    """One line per modality and probe: mean and range over the seeds."""
    head = ("", "time", *FINAL, "probe", "untrained", "pretrained", "")
    rows = [head]
    for name, found in summary.items():
        first = [name, f"{found['seconds']:.0f} s", *(f"{found[k]:.3f}" for k in FINAL)]
        for probe_name, title in PROBES.items():
            before, after = found[probe_name]["untrained"], found[probe_name]["pretrained"]
            verdict = "better" if min(after) > max(before) else ""
            rows.append((*first, title, spread(before), spread(after), verdict))
            first = [""] * len(first)
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def spread(values: list[float]) -> str:
    """'82.1 % (81.0 to 83.3)'"""
    percent = [100 * v for v in values]
    return f"{statistics.mean(percent):.1f} % ({min(percent):.1f} to {max(percent):.1f})"


def main() -> None:
    """The command: see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--versions", default="2", help="of data2vec: 2, or 1,2")
    parser.add_argument("--modalities", default="vision,speech,text")
    parser.add_argument("--seeds", type=int, default=3, help="pretraining seeds of each")
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
                path.write_text(json.dumps(summary, indent=1) + "\n")
        page.main([str(options.workdir)])
        (options.workdir / "probes.svg").write_text(page.picture(summary), encoding="utf-8")
        print(table(summary))
        print(f"{(time.time() - start) / 60:.1f} minutes; report: {options.workdir}/report.html")

    run_main(command)


if __name__ == "__main__":
    main()
