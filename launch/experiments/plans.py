"""Plans the recipes for TPUs and GPUs; writes tables of launch/README.md and docs/performance.md.

    python launch/experiments/plans.py            the plans that are missing, then the tables
    python launch/experiments/plans.py --tables   only the tables

Each plan is one run of `python -m data2vec_jax.plan`, minutes long, kept as plans/NAME.json beside
this file: the same command goes on where it stopped. To plan one again, remove its file. Plans for
TPUs need libtpu, those for GPUs JAX's CUDA plugin: without one its plans fail, and the others are
made.
"""

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # a checkout need not be installed

from pages import fill

from data2vec_jax.plan.topology import parse_topology

FOLDER = ROOT / "launch/experiments/plans"
README = ROOT / "launch/README.md"
PERFORMANCE = ROOT / "docs/performance.md"

# Rows of a batch of the longest examples: the recipe's (speech_v1 256, vision_v1 2,048 and 4,096,
# vision_v2 256, text_v1 256), or one a chip where the recipe has fewer than chips. Batches of
# shorter crops of speech must divide over the chips too.
V5E = {
    "speech_v1:base": "data.rows_multiple_of=256",
    "speech_v1:large": "data.rows_multiple_of=256",
    "speech_v2:base": "data.batch_size=256 data.rows_multiple_of=256",
    "speech_v2:large": "data.batch_size=256 data.rows_multiple_of=256",
    "vision_v1:base": "",
    "vision_v1:large": "",
    "vision_v2:base": "",
    "vision_v2:large": "data.batch_size=256",
    "vision_v2:huge": "data.batch_size=256",
    "vision_v2:huge14": "data.batch_size=256",
    "text_v1:base": "",
    "text_v1:large": "",
    "text_v2:base": "data.batch_size=256",
    "text_v2:large": "data.batch_size=256",
}
BASE = [recipe for recipe in V5E if recipe.endswith(":base")]
LARGE = {
    "speech_v1:large": "data.batch_size={chips} data.rows_multiple_of={chips}",
    "speech_v2:large": "data.batch_size={chips} data.rows_multiple_of={chips}",
    "vision_v1:large": "",
    "vision_v2:large": "data.batch_size={chips}",
    "vision_v2:huge": "data.batch_size={chips}",
}
# (topology, slices, chips)
SLICES = (("v6e:16x16", 1, 256), ("v5p:8x8x8", 1, 512), ("v5p:4x8x8", 2, 512))
# On a machine of eight GPUs, with the recipe's rows.
GPUS = [
    f"{modality}_{version}:base"
    for modality in ("speech", "vision", "text")
    for version in ("v1", "v2")
] + ["sound_v2:base"]
ROWS = (1, 4, 16)  # of the longest examples, on each of 256 chips
# The same small model at three depths: the scan over layers keeps the program's size.
DEPTHS = (
    "data.batch_size=64 model.width=128 model.encoder.heads=4 model.encoder.mlp=512 "
    "model.decoder.width=128 model.decoder.layers=2 model.encoder.depth={depth}"
)


def name_of(recipe: str, topology: str, slices: int) -> str:
    """The name of a plan, and of its file."""
    return f"{recipe}-{slices}x{topology}".replace(":", "_")


def name_by_rows(recipe: str, rows: int) -> str:
    """The same, by the rows of each of 256 chips: the recipe's own plan, if it has so many."""
    if (8 if recipe == "vision_v1:base" else 1) == rows:
        return name_of(recipe, "v5e:16x16", 1)
    return f"rows-{rows}-{recipe.replace(':', '_')}"


def plans() -> dict[str, list[str]]:
    """Name -> arguments of the planner."""
    found = {}

    def add(name, recipe, topology, slices, options):
        config, variant = recipe.split(":")
        arguments = [f"--config=configs/{config}.py:{variant}"]
        arguments += [f"--config.{option}" for option in options.split()]
        arguments += [f"--topology={topology}"] + [f"--slices={slices}"] * (slices > 1)
        found[name] = arguments

    for recipe, options in V5E.items():
        add(name_of(recipe, "v5e:16x16", 1), recipe, "v5e:16x16", 1, options)
    for topology, slices, chips in SLICES:
        for recipe, options in LARGE.items():
            options = options.format(chips=chips)
            add(name_of(recipe, topology, slices), recipe, topology, slices, options)
    for recipe in GPUS:
        add(name_of(recipe, "h100:8", 1), recipe, "h100:8", 1, "")
    for recipe in BASE:
        kept = [x for x in V5E[recipe].split() if not x.startswith("data.batch_size")]
        for rows in ROWS:
            if (name := name_by_rows(recipe, rows)) not in found:
                add(
                    name, recipe, "v5e:16x16", 1, " ".join([*kept, f"data.batch_size={256 * rows}"])
                )
    for depth in (12, 24, 48):
        add(f"depth-{depth}", "vision_v2:base", "v5e:2x4", 1, DEPTHS.format(depth=depth))
    return found


def make(name: str, arguments: list[str]) -> bool:
    """Runs one plan, if its file is missing; whether it is there in the end."""
    path = FOLDER / f"{name}.json"
    if path.exists():
        return True
    print(f"{name}: planning", flush=True)
    start, unfinished = time.time(), path.with_suffix(".unfinished")
    command = [sys.executable, "-m", "data2vec_jax.plan", *arguments, f"--json={unfinished}"]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    if done.returncode or not unfinished.exists():
        reason = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
        print(f"{name}: exit code {done.returncode} {' '.join(reason)}", flush=True)
        return False
    plan = json.loads(unfinished.read_text())
    if plan["compile_seconds"] is None:
        print(f"{name}: {plan['advice'][0]}", flush=True)
        unfinished.unlink()
        return False
    unfinished.rename(path)
    print(f"{name}: {time.time() - start:.0f} s", flush=True)
    return True


def recipe_of(plan: Mapping[str, Any]) -> str:
    """'speech_v1:base'."""
    return Path(plan["config"].split()[0]).name.replace(".py", "")


def where(plan: Mapping[str, Any]) -> str:
    """'2 x v5p:4x8x8'."""
    return (f"{plan['slices']} x " if plan["slices"] > 1 else "") + plan["topology"]


def known() -> dict[str, Any]:
    """Name -> plan, of those that were made."""
    paths = {name: FOLDER / f"{name}.json" for name in plans()}
    return {name: json.loads(path.read_text()) for name, path in paths.items() if path.exists()}


def attention_of(plan: Mapping[str, Any]) -> str:
    """How many kernels of attention are in the program; '*' for a plan of before there were any."""
    if plan.get("kernels") is None:
        return "*" if plan["step_seconds_estimate"] else "–"
    return str(sum(n for name, n in plan["kernels"].items() if re.search("attention|fmha", name)))


def row(plan: Mapping[str, Any]) -> str:
    """A line of the table of slices."""
    sent = "; ".join(
        f"{kind} {found['count']:,} ({found['bytes'] / 2**20:,.0f} MiB)"
        for kind, found in (plan["collectives"] or {}).items()
    )
    used, step = plan["bytes_per_device"]["total"], plan["step_seconds_estimate"]
    cells = [
        recipe_of(plan),
        where(plan),
        f"{plan['batch_size']:,}",
        str(plan["mesh"]["fsdp"]),
        "yes" if plan["fits"] else "no: " + "; ".join(plan["advice"]),
        f"{used / 2**30:.2f} of {plan['hbm_bytes'] / 2**30:.2f}",
        sent or "–",
        attention_of(plan),
        f"{1e3 * step:.1f}" if step else "–",
        f"{plan['mfu_estimate']:.0%}" if step else "–",
        f"{plan['compile_cpu_seconds']:.0f}",
    ]
    return "| " + " | ".join(cells) + " |"


def tables() -> dict[str, str]:
    """The tables of the README, by the name of their place."""
    made = known()
    head = (
        "| recipe | where | rows | fsdp | fits | HBM, GiB a device | collectives a step |"
        " attention kernels | step, ms | MFU | compile, CPU s |\n"
        "|---|---|---|---|---|---|---|---|---|---|---|\n"
    )

    def rows(wanted: Callable[[str], bool]) -> str:
        return head + "\n".join(row(p) for n, p in made.items() if wanted(n))

    slices = rows(lambda name: not name.startswith(("depth", "rows")) and "xh100" not in name)
    gpus = rows(lambda name: "xh100" in name)
    depths = "| layers | instructions of the program | compile, CPU s |\n|---|---|---|\n"
    depths += "\n".join(
        f"| {n.split('-')[1]} | {p['instructions']:,} | {p['compile_cpu_seconds']:.0f} |"
        for n, p in made.items()
        if n.startswith("depth")
    )
    return {"plans": slices, "GPU plans": gpus, "depths": depths}


def bounds() -> str:
    """The table of docs/performance.md: what no program can beat, and what the plans come to."""
    lines = [
        "| recipe | where | FLOPs at peak, ms | state read and written | messages | plan, ms |",
        "|---|---|---|---|---|---|",
    ]
    for name, plan in known().items():
        step = plan["step_seconds_estimate"]
        if name.startswith(("depth", "rows")) or not step:  # it does not fit
            continue
        chip, size = parse_topology(plan["topology"]).chip, plan["bytes_per_device"]
        times = (
            step * plan["mfu_estimate"],
            (size["arguments"] + size["output"]) / (chip.hbm_bandwidth / chip.devices),
            plan["roofline_seconds"]["ici"] + plan["roofline_seconds"]["dcn"],
            step,
        )
        numbers = " | ".join(f"{1e3 * seconds:.1f}" for seconds in times)
        lines.append(f"| {recipe_of(plan)} | {where(plan)} | {numbers} |")
    return "\n".join(lines)


def sweep() -> str:
    """The table of docs/performance.md: base recipes by the rows of a chip."""

    def cell(plan):
        if not plan:
            return "–"
        size, step = plan["bytes_per_device"]["total"] / 2**30, plan["step_seconds_estimate"]
        if not step:
            return f"does not fit: {size:.1f}"
        return f"{1e3 * step:.1f}, {plan['mfu_estimate']:.0%}, {size:.1f}"

    heads, made = " | ".join(f"{rows} a chip: ms, MFU, GiB" for rows in ROWS), known()
    lines = [f"| recipe | {heads} |", "|---" * (len(ROWS) + 1) + "|"]
    for recipe in BASE:
        found = [made.get(name_by_rows(recipe, rows)) for rows in ROWS]
        if any(found):
            lines.append(f"| {recipe} | {' | '.join(map(cell, found))} |")
    return "\n".join(lines)


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    wanted = plans()
    failed = [] if "--tables" in sys.argv else [n for n, a in wanted.items() if not make(n, a)]
    fill(README, tables())
    fill(PERFORMANCE, {"bounds": bounds(), "sweep": sweep()})
    if failed:
        sys.exit(f"error: {len(failed)} of {len(wanted)} plans failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
