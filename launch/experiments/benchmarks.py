"""Benchmarks of the recipes on this machine, for the tables and the picture of docs/performance.md.

    python launch/experiments/benchmarks.py            what this device lacks, then the page
    python launch/experiments/benchmarks.py --tables   only the tables and the picture

Each is one run of `python -m data2vec_jax.bench`, kept as benchmarks/DEVICE-NAME.json beside this
file: the same command goes on where it stopped. To measure one again, remove its file. Nothing
else should run on the machine. Needs `pip install torch transformers matplotlib`.
"""

import datetime
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pages import fill, pyplot

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "launch/experiments/benchmarks"
PAGE = ROOT / "docs/performance.md"
PICTURE = ROOT / "launch/experiments/scaling.svg"
RECIPES = ("speech_v1", "speech_v2", "vision_v1", "vision_v2", "text_v1", "text_v2")
SWEEPS = ("vision_v2",)
AXES = ("batch", "length", "depth", "width", "clones")


def device() -> str:
    """A short name of the device that the benchmarks would run on, such as cpu or nvidia-h200."""
    code = "import jax; print(jax.devices()[0].device_kind)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return re.sub(r"\W+", "-", done.stdout.strip().lower())


def commands(kind: str) -> dict[str, list[str]]:
    """Name -> arguments of bench, on a device of this kind."""
    single = ["--config.dtype=float32"] if kind == "cpu" else []
    variants = ["base"] if kind == "cpu" else ["base", "large"]
    found = {}
    for recipe in RECIPES:
        for variant in variants if recipe == "vision_v1" else ["base"]:
            peer = ["--peer"] if recipe.endswith("v1") else []
            config = f"--config=configs/{recipe}.py:{variant}"
            rows = ["--batch=1"] if kind == "cpu" and recipe == "text_v2" else []  # of 8 views
            found[f"{kind}-{recipe}_{variant}"] = [config, *single, *rows, *peer]
    for recipe in SWEEPS:
        config = f"--config=configs/{recipe}.py:base"
        rows = ["--batch=1"] if kind == "cpu" else []
        found[f"{kind}-{recipe}_sweep"] = [config, *single, *rows, "--sweep"]
    return found


def make(name: str, arguments: list[str]) -> bool:
    """Runs one benchmark, if its file is missing; whether it is there in the end."""
    path = FOLDER / f"{name}.json"
    if path.exists():
        return True
    unfinished = path.with_suffix(".unfinished")
    command = [sys.executable, "-m", "data2vec_jax.bench", *arguments, f"--json={unfinished}"]
    print(" ".join(command[1:-1]), flush=True)
    pages = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}  # as launch/local.sh; only a CPU cares
    done = subprocess.run(command, cwd=ROOT, env=pages | os.environ)
    if done.returncode or not unfinished.exists():
        return False
    result = json.loads(unfinished.read_text())
    result["date"] = datetime.date.today().isoformat()
    path.write_text(json.dumps(result, indent=1) + "\n")
    unfinished.unlink()
    return True


def known() -> dict[str, dict[str, Any]]:
    """Name -> result of every benchmark that is kept."""
    return {p.stem: json.loads(p.read_text()) for p in sorted(FOLDER.glob("*.json"))}


def recipe_of(result: Mapping[str, Any]) -> str:
    """Such as 'vision_v1:base'."""
    return Path(result["config"].split()[0]).name.replace(".py", "")


def size_of(result: Mapping[str, Any]) -> str:
    """Shape of a batch in words."""
    (shape,) = [s for k, s in result["shapes"].items() if k in ("audio", "image", "tokens")]
    return " x ".join(f"{n:,}" for n in shape)


def row(result: Mapping[str, Any]) -> str:
    """A line of the table of steps."""
    step, peer = result["step_seconds"], result["peer"]
    share = {k: f"{v / step:.0%}" for k, v in (result["seconds_of_parts"] or {}).items()}
    cells = [
        f"{result['devices']} x {result['device']}, {result['dtype']}",
        recipe_of(result),
        size_of(result),
        f"{1e3 * step:.0f}",
        f"{1e3 * peer['step_seconds']:.0f}" if peer else "–",
        f"{peer['ratio']:.2f}" if peer else "–",
        f"{1e3 * result['seconds_per_masked_view']:.1f}",
        f"{result['mfu_of_measured_matmul']:.0%}",
        ", ".join(share.values()) or "–",
        f"{result['peak_bytes'] / 2**30:.2f}",
        f"{result['compile_seconds']:.0f}, {result['compile_seconds_from_cache']:.1f}",
        result["date"],
    ]
    return "| " + " | ".join(cells) + " |"


def views(results: Mapping[str, Any]) -> str:
    """What a masked view of 2.0 takes beside one of 1.0, as FLOPs and as time."""
    lines = [
        "| device | | ms a masked view, 1.0 | 2.0 | time | FLOPs |",
        "|---|---|---|---|---|---|",
    ]
    for name, old in results.items():
        new = results.get(name.replace("_v1_", "_v2_"))
        if not name.endswith("_v1_base") or new is None:
            continue
        ms = [1e3 * r["seconds_per_masked_view"] for r in (old, new)]
        flops = new["flops_per_masked_view"] / old["flops_per_masked_view"]
        modality = recipe_of(old).split("_")[0]
        lines.append(
            f"| {old['device']} | {modality} | {ms[0]:.0f} | {ms[1]:.0f} | {ms[1] / ms[0]:.0%} | "
            f"{flops:.0%} |"
        )
    return "\n".join(lines)


def exponents(results: Mapping[str, Any]) -> str:
    """Fitted exponents of the sweeps."""
    lines = [
        "| device | recipe | grows | sizes | step time | memory | FLOPs | compile time |",
        "|---|---|---|---|---|---|---|---|",
    ]
    names = "step_seconds", "peak_bytes", "flops_per_step", "compile_seconds"
    for result in results.values():
        for axis, found in result.get("sweep", {}).items():
            fits = " | ".join(f"{found['exponents'][name]:.2f}" for name in names)
            sizes = ", ".join(f"{n:g}" for n in found["sizes"])
            lines.append(
                f"| {result['device']} | {recipe_of(result)} | {axis} | {sizes} | {fits} |"
            )
    return "\n".join(lines)


def draw(results: Mapping[str, Any]) -> None:
    """Time and memory of the sweeps against each size, logarithmic."""
    plt = pyplot()
    figure, grid = plt.subplots(2, len(AXES), figsize=(14, 5.2), sharex="col", sharey="row")
    for result in results.values():
        for axis, found in result.get("sweep", {}).items():
            column = AXES.index(axis)
            for line, (name, factor) in enumerate((("step_seconds", 1.0), ("peak_bytes", 2**-30))):
                fit = found["exponents"][name]
                share = [n / found["sizes"][-1] for n in found["sizes"]]
                label = f"{recipe_of(result).split(':')[0]}, {fit:.2f}"
                values = [factor * v for v in found[name]]
                grid[line, column].loglog(share, values, "o-", label=label, linewidth=1.5)
    for column, axis in enumerate(AXES):
        grid[0, column].set_title(axis)
        grid[1, column].set_xlabel("share of the largest")
        for panel in grid[:, column]:
            panel.grid(True, which="both", color="#e9ecef")
            panel.legend(fontsize=7, title="exponent", title_fontsize=7)
            panel.set_xticks([0.25, 0.5, 1.0], ["1/4", "1/2", "1"])
            panel.minorticks_off()
    for panel in grid[:, 0]:
        low, high = (math.log2(y) for y in panel.get_ylim())
        ticks = [2.0**n for n in range(math.ceil(low), math.floor(high) + 1)]
        panel.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    grid[0, 0].set_ylabel("seconds a step")
    grid[1, 0].set_ylabel("GiB at most")
    figure.tight_layout()
    figure.savefig(PICTURE, metadata={"Date": None})


def tables(results: Mapping[str, Any]) -> dict[str, str]:
    """The tables of the page, by the name of their place."""
    head = (
        "| device | recipe | batch | step, ms | PyTorch's | ratio | ms a masked view |"
        " MFU of a measured product | front end, masks, student, teacher, loss, update |"
        " GiB at most | compile, from cache: s | date |\n|" + "---|" * 12 + "\n"
    )
    steps = "\n".join(row(r) for name, r in results.items() if not name.endswith("_sweep"))
    return {"steps": head + steps, "views": views(results), "exponents": exponents(results)}


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    wanted = {} if "--tables" in sys.argv else commands(device())
    failed = [name for name, arguments in wanted.items() if not make(name, arguments)]
    results = known()
    fill(PAGE, tables(results))
    if any("sweep" in result for result in results.values()):
        draw(results)
    if failed:
        sys.exit(f"error: {len(failed)} of {len(wanted)} failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
