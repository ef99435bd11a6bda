"""Ablations: a run for each point and seed, probes of them, and a page beside the paper's finding.

    python -m data2vec_jax.ablate STUDY --config=demo:vision,v2 --workdir=DIR [--seeds=3]
    python -m data2vec_jax.ablate compare NAME=WORKDIR,WORKDIR... NAME=... --workdir=DIR

STUDY: top_k, target, masking, decay, clones or beta. --config and --config.KEY=VALUE are those of
`python -m data2vec_jax.train`; a study changes one thing or two of them, for each seed from the
config's on. DIR/STUDY/POINT/seedN are workdirs of the loop; the same command goes on where it
stopped. --part=2/8 does the second of eight parts, in a process or a job of its own (Slurm:
--array=1-8 and --part=$SLURM_ARRAY_TASK_ID/8); the one that ends last writes summary.json,
summary.md and report.html to DIR/STUDY. Probes are those of `python -m data2vec_jax.evaluate`, of
at most --labels=N labels, and as many of the test split: a fifth of them, the dev split, chooses
the block; the test split is seen once. `compare` probes every kept checkpoint of finished runs, for
scores on dev against FLOPs; its rows are named as those of `evaluate --compare`, and --set
data.eval_split=val changes their data.
"""

import argparse
import functools
import hashlib
import itertools
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, get_args

import jax
import optax

from data2vec_jax import evaluate, train
from data2vec_jax.cli.arguments import Arguments, parse, user_path
from data2vec_jax.cli.output import as_json, run_main, say
from data2vec_jax.core import checkpoints, distributed, sharding, step_folder
from data2vec_jax.core.config import differences, with_options
from data2vec_jax.core.errors import UserError, nearest
from data2vec_jax.core.files import read_json, whole
from data2vec_jax.core.train_step import init_state
from data2vec_jax.metrics.hardware import forget_peak
from data2vec_jax.metrics.skipped import SkippedError
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
    times as long, from the config's start or, if that is above it, held; and a teacher that is the
    student."""
    if "ema" not in config:
        raise UserError("config.ema: this objective has no teacher, and no decay to vary")
    start, end = config["ema"]["start"], config["ema"]["end"]
    pairs = [(start, end), (start, start), (end, end), (0.0, 0.0)]
    pairs += [(min(start, b), b) for b in (max(0.0, 1 - (1 - end) * f) for f in (4, 0.25))]
    return {f"{a:.6g} to {b:.6g}": {"ema.start": a, "ema.end": b} for a, b in pairs}


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
    if "objective" not in config:
        raise UserError(f"--config: a recipe of fine-tuning; {name} is of pretraining")
    # The run of a point that collapses goes on: it is a result.
    config = with_options(config, {"collapse.action": "warn"})
    check_config(config)
    found, left = {}, {}
    for point, options in STUDIES[name].points(config).items():
        try:
            changed = with_options(config, options)
            with jax.set_mesh(sharding.make_mesh(**config["mesh"])):
                pretrain.abstract_task(changed)
            found[point] = changed
        except UserError as error:
            left[point] = error
    if not found:
        raise next(iter(left.values()))
    for point, error in left.items():
        say(f"{name} {point} is left out: {error}")
    return found


# What a run has cost and learned ------------------------------------------------------------------

KEPT = "probes.json"  # in a workdir
NOTED = ("peak_bytes", "target_std", "target_by_position", "target_rank", "feature_rank")
# Of a config: what probes of an untrained encoder and of hand-made features, and FLOPs, depend on.
PROBED = ("modality", "model", "dtype", "data", "examples", "objective", "mask", "seed")


def kept_probes(workdir: Path) -> dict[str, Any]:
    """What `measured` has written into a workdir: 'labels', 'config' (a hash), 'flops' of an
    update, 'probes', of which 'checkpoints'. Or 'diverged': why the run ended without a result.

    Raises UserError: the file is damaged.
    """
    path = workdir / KEPT
    if not path.exists():
        return {}
    try:
        kept = read_json(path)
        found = kept.get("probes", {})
        sound = all({*probe.PROBES, "blocks", "dev"} <= {*x} for x in found.values() if x)
        sound &= all(x for name, x in found.items() if name != "hand_made")
        sound &= not found or {"labels", "flops"} <= {*kept}
    except (AttributeError, TypeError):
        sound = False
    except UserError as error:
        raise UserError(f"{error}; delete it, and the run is probed again") from None
    if not sound:
        raise UserError(f"{path}: is damaged; delete it, and the run is probed again")
    return kept


def keep(workdir: Path, kept: Mapping[str, Any]) -> None:
    """Writes what `kept_probes` reads; a kill leaves the old file whole."""
    with whole(workdir / KEPT) as draft:
        draft.write_text(as_json(kept))


def is_done(workdir: Path, step: int) -> bool:
    """Whether the checkpoint of this update was probed (`compare` may have probed others), or the
    run diverged."""
    kept, name = kept_probes(workdir), str(step)
    if "diverged" in kept:
        return True
    now, then = step_folder.identities(workdir).get(name), kept.get("checkpoints", {}).get(name)
    return name in kept.get("probes", {}) and (now is None or now == then)


@functools.lru_cache(maxsize=1)
def _encoder(sections: str) -> tuple[Any, list[Any], Any]:
    """What `evaluate.frozen_encoder` returns for a config as JSON: all points have the same."""
    return evaluate.frozen_encoder(json.loads(sections))


def measured(
    workdir: str | Path,
    labels: int,
    curve: bool,
    baseline: bool,
    changes: Mapping[str, Any] = MappingProxyType({}),
) -> dict[str, Any]:
    """What a pretraining run has cost, and its probes, which are kept in its folder, also if its
    checkpoints are deleted.

    labels: at most, of a probe. curve: of every kept checkpoint, not of the newest alone.
    baseline: of an untrained encoder and of hand-made features, too. changes: of the config, as of
    `evaluate.open_run`.

    Returns 'updates', their 'FLOPs' and 'seconds', the last of the scalars `NOTED` (None for those
    that it has not) and 'probes' {step, 'untrained' or 'hand_made': as of `tasks.probe.judge`}.
    Raises UserError: it is no such run, or has no checkpoint.
    """
    folder, config, mesh = evaluate.open_run(str(workdir), changes)
    if "objective" not in config:
        raise UserError(f"{workdir} is not a pretraining run")
    kept, here = kept_probes(folder), step_folder.identities(folder)
    own = train.as_json({key: config.get(key) for key in PROBED})
    own["examples"].pop("tokenizer", None)  # a path: that of the workdir
    digest = hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()
    if (kept.get("labels"), kept.get("config")) != (labels, digest):
        kept = {"labels": labels, "config": digest, "checkpoints": {}, "probes": {}}
    for name in here.keys() & kept["probes"].keys():
        if kept["checkpoints"].get(name) != here[name]:  # another run's, or one that went back
            del kept["probes"][name]
    steps = sorted(int(name) for name in here or kept["probes"] if name.isdigit())
    if not steps:
        raise UserError(f"{workdir} has no checkpoint to probe")
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
        kept["checkpoints"] |= {name: here[name] for name in wanted if name in here}
        keep(folder, kept)
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
    train.make_workdir(folder)
    (folder / SUMMARY).write_text(as_json(summary))
    (folder / "summary.md").write_text(study.markdown(summary))
    page.main([str(folder)])


def ablate(name: str, config: Mapping[str, Any], folder: Path, options: Any) -> None:
    """Trains and probes this process's share of a study's runs, and draws if all are done.

    Raises UserError, before a run begins: a workdir holds another run, or nothing can be probed.
    """
    configs, seeds = configs_of(name, config), range(options.seeds)
    runs = [(p, s, folder / p.replace(" ", "") / f"seed{s}") for p in configs for s in seeds]
    changed = {w: with_options(configs[p], {"seed": config["seed"] + s}) for p, s, w in runs}
    for workdir, wanted in changed.items():
        if (workdir / "config.json").exists():
            train.check_same_run(workdir, read_json(workdir / "config.json"), wanted)
    (part, parts), first = options.part, next(iter(configs))  # which has the baselines
    own = runs[len(runs) * (part - 1) // parts : len(runs) * part // parts]
    updates = config["total_steps"]
    if not all(is_done(workdir, updates) for *_, workdir in own):
        probe.opened(contract.get(config["modality"]), config, evaluate.probed_splits(config))
    programs: dict[str, dict[Any, Any]] = {}
    for point, _, workdir in own:
        if not is_done(workdir, updates):
            forget_peak()  # so that it is that of this run
            programs = {point: programs.get(point, {})}  # those of another are of no use
            try:
                train.train(changed[workdir], workdir, programs=programs[point], verbose=False)
            except SkippedError as error:  # a result, too
                say(f"{workdir} is left out: {error}")
                keep(workdir, {"diverged": str(error)})
        if "diverged" not in kept_probes(workdir):
            measured(workdir, options.labels, False, point == first)
    if left := [w for *_, w in runs if not is_done(w, updates)]:
        say(f"{len(left)} of {len(runs)} runs are left for other parts, such as {left[0]}")
        return
    rows: dict[str, list[Any]] = {point: [] for point in configs}
    diverged: dict[str, str] = {}
    for point, seed, workdir in runs:
        if problem := kept_probes(workdir).get("diverged"):
            diverged[f"{point}, seed {seed}"] = problem
        else:
            rows[point].append(measured(workdir, options.labels, False, point == first))
    rows = {point: found for point, found in rows.items() if found}
    if not rows:
        raise UserError(f"all runs of {folder} diverged: {next(iter(diverged.values()))}")
    about = STUDIES[name]._asdict() | {"diverged": diverged}
    summarise(folder, {"study": name, **about, "points": rows})


def compare(texts: Sequence[str], folder: Path, labels: int, changes: Mapping[str, Any]) -> None:
    """Probes finished runs, a row for each of `texts`, and draws.

    Raises UserError: rows that do not compare.
    """
    rows: dict[str, list[str]] = {}
    for name, workdirs in map(evaluate.workdirs_of, texts):
        if name in rows:
            raise UserError(f"two rows have the name {name}")
        rows[name] = workdirs
    check_comparable(rows, changes)
    train.make_workdir(folder)
    if (folder / SUMMARY).exists() and read_json(folder / SUMMARY).get("study") != "compare":
        raise UserError(f"--workdir={folder}: has the page of another study; choose another")
    points = {
        name: [measured(w, labels, True, not i, changes) for i, w in enumerate(workdirs)]
        for name, workdirs in rows.items()
    }
    for name, runs in points.items():
        if len(updates := {run["updates"] for run in runs}) > 1:
            least, most = min(updates), max(updates)
            raise UserError(f"{name}: its runs have {least:,} to {most:,} updates; wait for all")
    summarise(folder, {"study": "compare", "points": points})


def check_comparable(rows: Mapping[str, Sequence[str]], changes: Mapping[str, Any]) -> None:
    """Refuses a row of runs that differ in more than their seed, and rows of other data."""
    data: dict[str, tuple[str, str, Any]] = {}
    for name, workdirs in rows.items():
        configs = {w: evaluate.open_run(w, changes)[1] for w in workdirs}
        runs = [{"workdir": w, "seed": c["seed"], "config": c} for w, c in configs.items()]
        if len(groups := evaluate.grouped(runs)) > 1:
            one, two = (group[0]["workdir"] for _, group in groups[:2])
            what = [x for x in differences(configs[one], configs[two]) if "tokenizer" not in x]
            raise UserError(
                f"{name}: {one} and {two} differ in config.{(what or ['seed'])[0]}; a row is of "
                "seeds of one run, so give each a row of its own"
            )
        for w, config in configs.items():
            source, splits = config["data"]["source"], evaluate.probed_splits(config)
            data[w] = config["modality"], source, splits
    (first, wanted), *others = data.items()
    for w, found in others:
        if found != wanted:
            shown = [f"{source} {'/'.join(splits)}" for _, source, splits in (found, wanted)]
            raise UserError(
                f"{w} is of {found[0]}, {shown[0]}, and {first} of {wanted[0]}, {shown[1]}: scores "
                "on other data do not compare; --set data.source=... (data.split, data.eval_split) "
                "probes all on the same"
            )


def part_of(text: str) -> tuple[int, int]:
    """'2/8' -> (2, 8)."""
    part, _, parts = text.partition("/")
    if not (part.isdecimal() and parts.isdecimal() and 1 <= int(part) <= int(parts)):
        raise argparse.ArgumentTypeError(f"'{text}' is not I/N, such as 2/8, with I from 1 to N")
    return int(part), int(parts)


def count(text: str) -> int:
    """A whole number of 1 or more."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is no whole number from 1 on")
    return int(text)


def main(argv: Sequence[str] = sys.argv) -> None:
    """The command: see the module's docstring."""
    parser = Arguments(
        prog="python -m data2vec_jax.ablate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("study", choices=(*STUDIES, "compare"))
    parser.add_argument("runs", nargs="*", metavar="NAME=WORKDIR,WORKDIR", help="of compare")
    parser.add_argument("--workdir", type=user_path, required=True, metavar="DIR")
    parser.add_argument("--seeds", type=count, default=3, metavar="N", help="of each point (3)")
    parser.add_argument(
        "--labels", type=count, default=20_000, metavar="N", help="of a probe, at most (20,000)"
    )
    parser.add_argument(
        "--part", type=part_of, default=(1, 1), metavar="I/N", help="of the runs (all)"
    )
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="KEY=VALUE", help="of compare: change the configs"
    )
    options, rest = parser.parse_known_args(argv[1:])
    if options.study != "compare":
        if options.set:
            parser.error("--set is of compare; a study takes --config.KEY=VALUE")
        if wrong := [a for a in rest if a.startswith("-") and not a.startswith("--config")]:
            known = ("--config", "--workdir", "--seeds", "--labels", "--part")
            hint = nearest(wrong[0].partition("=")[0], known)
            parser.error(f"no option {wrong[0]}{hint}")
        config, _ = parse([argv[0], *rest, *options.runs], {}, ())
        ablate(options.study, config, options.workdir / options.study, options)
        return
    if rest or not options.runs:
        parser.error(f"compare takes NAME=WORKDIR,WORKDIR..., not {rest or 'nothing'}")
    changes = dict(map(evaluate.change, options.set))
    compare(options.runs, options.workdir, options.labels, changes)


if __name__ == "__main__":
    with distributed.failing_together():
        run_main(main)
