"""Ablations: a run for each point and seed, probes of them, and a page beside the paper's finding.

    python -m data2vec_jax.ablate STUDY --config=demo:vision,v2 --workdir=DIR [--seeds=3]
    python -m data2vec_jax.ablate compare NAME=WORKDIR,WORKDIR... NAME=... --workdir=DIR

STUDY: top_k, target, masking, decay, clones or beta. DIR/STUDY/POINT/seedN are workdirs of the
loop; the same command goes on where it stopped. --part=2/8 does the second of eight parts, in a
process or a job of its own (Slurm: --array=1-8 and --part=$SLURM_ARRAY_TASK_ID/8); the one that
ends last writes summary.json, summary.md and report.html to DIR/STUDY. Probes are those of
`python -m data2vec_jax.evaluate`, of at most --labels=N labels: a fifth of them, the dev split,
chooses the block; the test split is seen once. `compare` probes every kept checkpoint of finished
runs, for scores on dev against FLOPs; its rows are named as those of `evaluate --compare`.
"""

import functools
import itertools
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args

import jax
import optax

from data2vec_jax import evaluate, train
from data2vec_jax.cli.arguments import Arguments, parse, user_path
from data2vec_jax.cli.output import as_json, run_main, say
from data2vec_jax.core import checkpoints, sharding
from data2vec_jax.core.config import with_options
from data2vec_jax.core.errors import UserError
from data2vec_jax.core.files import read_json
from data2vec_jax.core.train_step import init_state
from data2vec_jax.metrics.hardware import forget_peak
from data2vec_jax.modalities import contract
from data2vec_jax.models.encoder import Source
from data2vec_jax.report import page, study
from data2vec_jax.report.runs import SUMMARY, read_run
from data2vec_jax.tasks import pretrain, probe
from data2vec_jax.tasks.registry import check_config

# Studies ------------------------------------------------------------------------------------------

Points = dict[str, dict[str, Any]]  # name -> options of the config; in a grid 'RATE x SIZE'


class Study(NamedTuple):
    """What varies, and what the paper found (extensions spec (a), with its tags).

    paper: its word error rates in per cent, by point. ordered: a line may join the points.
    """

    points: Callable[[Mapping[str, Any]], Points]
    finding: str
    paper: Mapping[str, float] = {}
    ordered: bool = True


def top_k(config: Mapping[str, Any]) -> Points:
    """Numbers of averaged blocks, up to all."""
    depth = config["model"]["encoder"]["depth"]
    some = [k for k in (1, 2, 3, 4, 6, 8, 10, 12, 18, 24) if k < depth]
    return {f"K={k}": {"objective.top_k": k} for k in (*some, depth)}


def masking(config: Mapping[str, Any]) -> Points:
    """The config's rate, and a half and twice of its odds (of spans and rectangles less and more by
    23 %: the paper's .5 and .8 beside .65); with spans or blocks of its size, half, one and a half
    of it."""
    mask, found = config.get("mask", {}), {}
    if not (rate := next((name for name in ("prob", "ratio", "count") if name in mask), None)):
        kind = mask.get("kind", "this objective")
        raise UserError(f"config.mask: {kind} has no prob, ratio or count to vary")
    size = next((name for name in ("width", "side", "min_patches") if name in mask), None)
    own, sizes = mask[rate], [max(1, round(f * mask[size])) for f in (0.5, 1, 1.5)] if size else [0]
    rates = [round(own * odds / (1 + own * (odds - 1)), 3) for odds in (0.5, 1, 2)]
    if rate != "ratio":
        rates = [type(own)(round(own * factor, 2)) for factor in (0.77, 1, 1.23)]
    for r, s in itertools.product(rates, sizes):
        options = {f"mask.{rate}": r} | ({f"mask.{size}": s} if size else {})
        if "masked" in mask:  # what such spans cover, compared with the config's
            of_own, of_these = (1 - (1 - p / w) ** w for p, w in ((own, mask[size]), (r, s)))
            options["mask.masked"] = mask["masked"] * of_these / of_own
        found[f"{r:g} x {s}" if size else f"{r:g}"] = options
    return found


def decay(config: Mapping[str, Any]) -> Points:
    """The config's schedule; its ends held; the last horizon, 1 / (1 - decay), a quarter and four
    times as long; and a teacher that is the student."""
    start, end = config["ema"]["start"], config["ema"]["end"]
    pairs = [(start, end), (start, start), (end, end), (0.0, 0.0)]
    pairs += [(start, 1 - (1 - end) * factor) for factor in (4, 0.25)]
    return {f"{a:.6g} to {b:.6g}": {"ema.start": a, "ema.end": b} for a, b in pairs if a <= b}


BETAS = {"L2": 0.0, "L1": 1e-6, "0.08": 0.08, "0.25": 0.25, "0.5": 0.5, "1": 1.0}
STUDIES = {
    "top_k": Study(
        top_k,
        "1.0, Figure 2, plotted only: several layers beat K = 1, strongly in speech and text, "
        "slightly in vision; all layers are little worse than a tuned K [P1]",
    ),
    "target": Study(
        lambda config: {name: {"objective.target": name} for name in get_args(Source)},
        "1.0, Table 5, speech: self-attention fails, as its output is of other time steps [P1]",
        {"attention": 100.0, "ffn": 13.1, "residual": 14.8, "block": 14.5},
        ordered=False,
    ),
    "masking": Study(
        masking,
        "1.0, Table 8, speech: the length of spans matters, their probability hardly [P1]; 2.0, "
        "vision: block masks do worse than inverse blocks [2H]",
        {
            "0.5 x 10": 17.3,
            "0.65 x 5": 22.1,
            "0.65 x 10": 17.1,
            "0.65 x 15": 18.9,
            "0.8 x 10": 17.2,
        },
    ),
    "decay": Study(
        decay,
        "no ablation known to us; 2.0, vision, goes from 0.9998 to 0.99999, 1 and 1 in 100,000, "
        "500,000 and 300,000 updates (base, large, huge) [2H]",
        ordered=False,
    ),
    "clones": Study(
        lambda config: {f"M={m}": {"objective.clones": m} for m in (1, 2, 4, 8, 16)},
        "2.0, vision: 16 masks of an image instead of 2 gain 5.2 points with batches of 64 images, "
        "and less with larger ones [2H]",
    ),
    "beta": Study(
        lambda config: {name: {"objective.beta": beta} for name, beta in BETAS.items()},
        "1.0, Table 7, speech: the loss hardly matters [P1]",
        {"L2": 17.1, "L1": 17.2, "0.08": 17.2, "0.25": 16.8, "0.5": 16.8, "1": 17.3},
        ordered=False,
    ),
}


def configs_of(name: str, config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Point of a study -> its config. What does not fit the config is named and left out.

    Raises UserError: nothing fits.
    """
    # The run of a point that collapses goes on: it is a result.
    config = with_options(config, {"collapse.action": "warn"})
    check_config(config)
    found, problem = {}, None
    for point, options in STUDIES[name].points(config).items():
        try:
            changed = with_options(config, options)
            with jax.set_mesh(sharding.make_mesh(**config["mesh"])):
                pretrain.abstract_task(changed)
            found[point] = changed
        except UserError as error:
            problem = error
            say(f"{name} {point} is left out: {error}")
    if not found:
        raise problem
    return found


# What a run has cost and learned ------------------------------------------------------------------

KEPT = "probes.json"  # in a workdir
NOTED = ("peak_bytes", "target_std", "target_by_position", "target_rank", "feature_rank")


def is_probed(workdir: Path, step: int) -> bool:
    """Whether the checkpoint of this update was probed; `compare` may have probed others."""
    path = workdir / KEPT
    return path.exists() and str(step) in read_json(path).get("probes", {})


@functools.lru_cache(maxsize=1)
def _encoder(sections: str) -> tuple[Any, list[Any], Any]:
    """What `evaluate.frozen_encoder` returns for a config as JSON: all points have the same."""
    return evaluate.frozen_encoder(json.loads(sections))


def measured(workdir: str | Path, labels: int, curve: bool, baseline: bool) -> dict[str, Any]:
    """What a pretraining run has cost, and its probes, which are kept in its folder.

    labels: at most, of a probe. curve: of every kept checkpoint, not of the newest alone.
    baseline: of an untrained encoder and of hand-made features, too.

    Returns 'updates', their 'FLOPs' and 'seconds', the last of the scalars `NOTED` (None for those
    that it has not) and 'probes' {step, 'untrained' or 'hand_made': as of `tasks.probe.judge`}.
    Raises UserError: it is no such run, or has no checkpoint.
    """
    folder, config, mesh = evaluate.open_run(str(workdir), {})
    steps = sorted(int(p.name) for p in (folder / "checkpoints").glob("*") if p.name.isdigit())
    if "objective" not in config or not steps:
        raise UserError(f"{workdir} is not a pretraining run with a checkpoint")
    path = folder / KEPT
    kept = read_json(path) if path.exists() else {}
    if kept.get("labels") != labels:
        kept = {"labels": labels, "probes": {}}
    wanted = [*map(str, steps if curve else steps[-1:]), *["untrained", "hand_made"] * baseline]
    if missing := [name for name in wanted if name not in kept["probes"]]:
        sections = ("modality", "model", "dtype", "data", "examples")
        _, splits, encode = _encoder(json.dumps({key: config[key] for key in sections}))
        with jax.set_mesh(mesh):
            task = pretrain.make(config)
            kept["flops"] = task.mean([task.flops(s) for s in task.shapes])
            for name in missing:
                if name == "hand_made":
                    modality = contract.get(config["modality"])
                    kept["probes"][name] = probe.probe_hand_made(modality, *splits, limit=labels)
                    continue
                if name == "untrained":
                    key = jax.random.key(config["seed"])
                    params = init_state(task, optax.identity(), key).params
                else:
                    params = checkpoints.load_params(folder / "checkpoints" / name)
                kept["probes"][name] = probe.probe(encode, params, *splits, limit=labels)
        path.with_suffix(".tmp").write_text(as_json(kept))
        path.with_suffix(".tmp").replace(path)  # a kill leaves the old one whole
    scalars = (read_run(folder).train or [{}])[-1]
    return {
        "updates": steps[-1],
        "FLOPs": steps[-1] * kept["flops"],
        "seconds": evaluate.train_seconds(folder),
        **{name: scalars.get(name) for name in NOTED},
        "probes": {name: kept["probes"][name] for name in wanted},
    }


# The command --------------------------------------------------------------------------------------


def summarise(folder: Path, summary: Mapping[str, Any]) -> None:
    """Writes summary.json, summary.md and report.html. summary: see `report.study`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / SUMMARY).write_text(as_json(summary))
    (folder / "summary.md").write_text(study.markdown(summary))
    page.main([str(folder)])


def ablate(name: str, config: Mapping[str, Any], folder: Path, options: Any) -> None:
    """Trains and probes this process's share of a study's runs, and draws if all are done."""
    configs, seeds = configs_of(name, config), range(options.seeds)
    runs = [(p, s, folder / p.replace(" ", "") / f"seed{s}") for p in configs for s in seeds]
    (part, parts), first = options.part, next(iter(configs))  # which has the baselines
    programs: dict[str, dict[Any, Any]] = {}
    for point, seed, workdir in runs[len(runs) * (part - 1) // parts : len(runs) * part // parts]:
        if not is_probed(workdir, config["total_steps"]):
            forget_peak()  # so that it is that of this run
            programs = {point: programs.get(point, {})}  # those of another are of no use
            changed = with_options(configs[point], {"seed": config["seed"] + seed})
            train.train(changed, workdir, programs=programs[point], verbose=False)
        measured(workdir, options.labels, False, point == first)
    if left := [w for *_, w in runs if not is_probed(w, config["total_steps"])]:
        say(f"{len(left)} of {len(runs)} runs are left for other parts, such as {left[0]}")
        return
    rows: dict[str, list[Any]] = {point: [] for point in configs}
    for point, _, workdir in runs:
        rows[point].append(measured(workdir, options.labels, False, point == first))
    summarise(folder, {"study": name, **STUDIES[name]._asdict(), "points": rows})


def part_of(text: str) -> tuple[int, int]:
    """'2/8' -> (2, 8)."""
    part, parts = map(int, text.split("/"))
    if not 1 <= part <= parts:
        raise ValueError
    return part, parts


def count(text: str) -> int:
    """A whole number of 1 or more."""
    return part_of(f"1/{text}")[1]


def main(argv: Sequence[str] = sys.argv) -> None:
    """The command: see the module's docstring."""
    parser = Arguments(prog="python -m data2vec_jax.ablate", description=__doc__.split("\n")[0])
    parser.add_argument("study", choices=(*STUDIES, "compare"))
    parser.add_argument("runs", nargs="*", metavar="NAME=WORKDIR,WORKDIR", help="of compare")
    parser.add_argument("--workdir", type=user_path, required=True, metavar="DIR")
    parser.add_argument("--seeds", type=count, default=3, metavar="N")
    parser.add_argument("--labels", type=count, default=20_000, metavar="N")
    parser.add_argument("--part", type=part_of, default=(1, 1), metavar="I/N")
    options, rest = parser.parse_known_args(argv[1:])
    if options.study != "compare":
        config, _ = parse([argv[0], *rest, *options.runs], {}, ())
        ablate(options.study, config, options.workdir / options.study, options)
        return
    if rest or not options.runs:
        parser.error(f"compare takes NAME=WORKDIR,WORKDIR..., not {rest or 'nothing'}")
    rows = {}
    for name, workdirs in map(evaluate.workdirs_of, options.runs):
        rows[name] = [measured(w, options.labels, True, not i) for i, w in enumerate(workdirs)]
    summarise(options.workdir, {"study": "compare", "points": rows})


if __name__ == "__main__":
    run_main(main)
