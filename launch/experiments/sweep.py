"""One pretraining run for each set of options, probed without the test split: for choosing.

    python launch/experiments/sweep.py demo:vision,v2 '{"schedule.peak": 3e-3}' '{}'

Each set of options is JSON, on top of the config. Labels (`LABELS` of them) and held-out examples
are both from the training split. A line for each run is added to sweeps.jsonl beside this file,
which docs/small_scale.md is written from. On one core: `taskset -c 0`.
"""

import argparse
import json
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # a checkout need not be installed

from data2vec_jax import evaluate, train
from data2vec_jax.cli.arguments import parse
from data2vec_jax.cli.output import run_main
from data2vec_jax.core.config import with_options
from data2vec_jax.metrics.writer import FILE, read_lines
from data2vec_jax.modalities.contract import Labelled
from data2vec_jax.tasks import pretrain, probe

LINES = Path(__file__).with_name("sweeps.jsonl")
RUN = ROOT / f"runs/sweep-{os.getpid()}"
LABELS = {"vision": 1_000, "speech": 10_000, "text": 1_000, "sound": 10_000}
MONITOR = ("loss", "target_std", "pred_std", "target_by_position", "feature_rank")


def halves(data: Labelled, labels: int) -> tuple[Labelled, Labelled]:
    """Examples with so many labels, at most half of all, and up to three times as many others."""
    rows = np.random.default_rng(0).permutation(len(data.labels))
    per_example = max(1, round((data.labels >= 0).sum() / len(rows)))
    first = min(labels // per_example, len(rows) // 2)
    return data.take(np.sort(rows[:first])), data.take(np.sort(rows[first : 4 * first]))


def run(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Pretrains one network and probes it."""
    config, _ = parse(["sweep", f"--config={name}", "--workdir=-"])
    config = with_options(config, options)
    modality, model = pretrain.make_model(config)
    split = config["data"]["split"].split("+")[0]
    limit = LABELS[config["modality"]]
    parts = halves(*probe.labelled(modality, config, (split,)), limit)
    shutil.rmtree(RUN, ignore_errors=True)
    state = train.train(config, RUN, verbose=False)
    found = probe.probe(probe.make_encode(model), state.params, *parts, limit=limit)
    last = [line for line in read_lines(RUN / FILE) if line["split"] == "train"][-1]
    hand_made = probe.probe_hand_made(modality, *parts, limit=limit)
    return {
        "config": name,
        "options": options,
        "updates": config["total_steps"],
        "seconds": evaluate.train_seconds(RUN),
        **{key: last[key] for key in MONITOR if key in last},
        **{key: found[key] for key in ("linear_probe", "knn", "blocks", "dev")},
        "hand_made": hand_made and {key: hand_made[key] for key in ("linear_probe", "knn")},
    }


def main() -> None:
    """The command: see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("config", help="such as demo:vision,v2")
    parser.add_argument("options", nargs="+", type=json.loads, help="JSON, a run each")
    arguments = parser.parse_args()

    def command():
        for options in arguments.options:
            line = run(arguments.config, options)
            with LINES.open("a") as file:
                file.write(json.dumps(line) + "\n")
            print(json.dumps({k: line[k] for k in ("options", "linear_probe", "knn", "blocks")}))
        shutil.rmtree(RUN)

    run_main(command)


if __name__ == "__main__":
    main()
