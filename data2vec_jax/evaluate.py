"""Scores of fine-tuned checkpoints, and probes of pretrained ones: a table, JSON and Markdown.

    python -m data2vec_jax.evaluate WORKDIR... [--json=FILE] [--markdown=FILE]
    python -m data2vec_jax.evaluate --compare NAME=WORKDIR,WORKDIR... NAME=... [...]

A workdir is evaluated at its newest checkpoint, WORKDIR/checkpoints/STEP at that step.

Runs that differ in their seed alone share a row: mean, and range over the seeds. With --compare
each argument is a row: a workdir, several joined by commas, or a folder of workdirs, maybe with a
name before `=`. `--set data.eval_split=test-clean,test-other scoring.lm=4-gram.arpa` changes the
held-out examples and the scoring. `scoring.lm_weight=[1,2,3] scoring.word_score=[-1,0,1]` finds the
best weights of a language model, for example on `data.eval_split=dev-other`.

For a pretraining run the frozen encoder is probed, beside an untrained one and hand-made features:
linear classifier and k-NN on the block that is best on a fifth of the training examples, and
attention pooling of the output where an example has one label. A sentence for each row says
whether pretraining has brought anything. `data.split` and `data.eval_split` (by
default test) must have labels: a class, or another label that the modality can probe (aligned
phones). --features=FILE.npz writes the features of one such run, for methods that need no
training: neighbours, retrieval, clusters.

Beside a pretraining run, an argument may be another checkpoint of its modality, in any format that
`data2vec_jax.load` opens: `--compare runs/ours BERT=DIR_OF_BERT`. It is probed on the data of the
first such run, with images of its own size and its own tokenizer.
"""

import json
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from etils import epath

import data2vec_jax
from data2vec_jax.cli.arguments import Arguments, user_path
from data2vec_jax.cli.output import as_json, run_main
from data2vec_jax.core import checkpoints, files, sharding, step_folder
from data2vec_jax.core.config import check_section, with_options
from data2vec_jax.core.errors import UserError, nearest
from data2vec_jax.core.state import TrainState, matches, path_name, shapes_of
from data2vec_jax.core.train_step import init_state
from data2vec_jax.modalities import contract
from data2vec_jax.modalities.contract import Labelled
from data2vec_jax.tasks import pretrain, probe
from data2vec_jax.tasks.registry import check_config, task_module

SECTIONS = ("data", "scoring", "mesh")  # of a config, which --set may change
NOT_PERCENTAGES = (" loss", " lm_weight", " word_score")  # ends of the names of such metrics


def open_run(
    workdir: str, changes: Mapping[str, Any]
) -> tuple[Path, dict[str, Any], jax.sharding.Mesh]:
    """Folder, config with changes ('section.key' -> value), and mesh of a training run.

    The folder is the workdir's, or that of one checkpoint if `workdir` is one.
    """
    config = checkpoints.load_config(workdir)
    folder = Path(config.pop("folder"))
    place = Path(workdir) if is_step(Path(workdir)) else folder
    if "total_steps" not in config:
        raise UserError(f"{workdir} is not a training run")
    if (folder / "tokenizer").is_dir():
        config["examples"]["tokenizer"] = str(folder / "tokenizer")
    if "head" in config and (folder / "labels.json").is_file():
        config["labels"] = files.read_json(folder / "labels.json", list)
    for key in changes:
        section, _, name = key.partition(".")
        if section not in SECTIONS or not name:
            known = [f"{choice}.{name or 'KEY'}" for choice in SECTIONS]
            raise UserError(f"--set {key}: no such option{nearest(key, known)}")
    config = with_options(config, changes)
    check_config(config)
    return place, config, sharding.make_mesh(**config["mesh"])


def evaluate(
    workdir: str, changes: Mapping[str, Any], beside: Sequence[str] = ()
) -> dict[str, Any]:
    """Scores of one run's newest checkpoint: {'scores': {split: {name: value}}, ...}.

    changes: of its config, 'section.key' -> value. beside: workdirs; where `workdir` is another
    checkpoint, it is probed on the data of the first pretraining run of its modality.
    """
    if not is_run(workdir):
        return probe_other(workdir, changes, beside)
    folder, config, mesh = open_run(workdir, changes)
    if "task" not in config:
        return probe_run(workdir, folder, config, mesh)
    with jax.set_mesh(mesh):
        task = task_module(config).make(config)
        if not task.evals:
            raise UserError(f"{workdir}: config.data.eval_split names no held-out examples")
        params = load_params(workdir, task, config, mesh)
        state = TrainState(np.int32(0), params, {}, (), jax.random.key(0))
        scores = {split: dict(run(state)) for split, run in task.evals.items()}
    return record(folder, config, scores, params)


def load_params(workdir: str, task: Any, config: Mapping[str, Any], mesh: jax.sharding.Mesh) -> Any:
    """Parameters of a run's newest checkpoint, on the mesh."""
    shapes = shapes_of(task.init)
    places = sharding.shardings(shapes, mesh, **config.get("sharding", {}))
    abstract = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, places
    )
    return checkpoints.load_params(workdir, abstract)


def probe_run(
    workdir: str, folder: Path, config: Mapping[str, Any], mesh: jax.sharding.Mesh
) -> dict[str, Any]:
    """Scores of a pretrained encoder, of an untrained one and of hand-made features.

    'probes' of the record has the whole results of `tasks.probe`, by network.
    """
    frozen = frozen_encoder(config)
    with jax.set_mesh(mesh):
        task = pretrain.abstract_task(config)
        params = load_params(workdir, task, config, mesh)
        untrained = init_state(task, optax.identity(), jax.random.key(config["seed"])).params
        return probed(folder, config, frozen, params, untrained)


def is_run(folder: str) -> bool:
    """Whether a folder is a training run's, not a checkpoint of another kind."""
    path = Path(folder) / "config.json"
    return not path.is_file() or "total_steps" in files.read_json(path)


def probe_other(folder: str, changes: Mapping[str, Any], beside: Sequence[str]) -> dict[str, Any]:
    """As `probe_run`, of a checkpoint that is no run; see `evaluate`.

    Raises UserError: no run of its modality is beside it, or it cannot read the data.
    """
    loaded = data2vec_jax.load(folder)
    if "adapters" in loaded.config:
        raise UserError(f"{folder}: merge its adapters first (convert ... --to=jax --merge)")
    kind = loaded.config["modality"]
    runs = (open_run(path, changes) for path in beside if is_run(path))
    alike = (x for x in runs if x[1]["modality"] == kind and "task" not in x[1])
    found = next(alike, None)
    if found is None:
        raise UserError(
            f"{folder} is not a training run: name a pretraining run of {kind} beside it, on whose "
            "data it is probed"
        )
    _, host, mesh = found
    config = {key: value for key, value in host.items() if key != "objective"}
    config["model"] = loaded.config["model"]
    modality, model = pretrain.make_model(config)
    config["examples"] = config["examples"] | modality.inference.examples(model, folder)
    frozen = frozen_encoder(config)
    for part in frozen[1]:
        modality.inference.prepare(model, part.inputs)
        places = np.prod(model.mask_shape(part.inputs))
        if part.labels.ndim == 2 and part.labels.shape[1] != places:
            raise UserError(f"{folder}: {places} frames for {part.labels.shape[1]} labels")
    params = {key: value for key, value in loaded.params.items() if key != "task"}
    with jax.set_mesh(mesh):
        init = pretrain.initialiser(model, frozen[1][0].inputs)
        key, _ = jax.random.split(jax.random.key(config["seed"]))  # as `init_state` does
        untrained = jax.jit(init)(key)
        return probed(Path(folder), config, frozen, params, untrained) | {"is_run": False}


def probed(
    folder: Path, config: Mapping[str, Any], frozen: Any, params: Any, untrained: Any
) -> dict[str, Any]:
    """The record of a frozen encoder. frozen: what `frozen_encoder` returns."""
    splits, labelled, encode = frozen
    scores, probes = {}, {}
    for name, tree in (("", params), (" untrained", untrained)):
        probes[name] = probe.probe(encode, tree, *labelled)
        if labelled[0].labels.ndim == 1:
            parts = (probe.tokens(encode, tree, part) for part in labelled)
            scores[f"attentive_probe{name}"] = probe.attentive(*parts)
    modality, model = pretrain.make_model(config)
    if found := probe.probe_hand_made(modality, *labelled):
        probes[" hand-made"] = found
    for name, found in probes.items():
        scores |= {f"{key}{name}": found[key] for key in probe.PROBES}
    if labelled[1].unknown:
        scores["unknown_classes"] = labelled[1].unknown
    run = record(folder, config, {splits[1]: dict(sorted(scores.items()))}, params)
    example = {k: jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for k, x in labelled[0].inputs.items()}
    flops = modality.flops(model, example, 0, 0)
    return run | {"probes": probes, "forward_flops": flops["frontend"] + flops["encoder"]}


def probed_splits(config: Mapping[str, Any]) -> tuple[str, str]:
    """The splits that a probe of a pretraining run learns from, and is tested on."""
    data = config["data"]
    train = ";".join(split.split("+")[0] for split in data["split"].split(";"))  # of a mixture
    return train, data.get("eval_split") or "test"


def frozen_encoder(config: Mapping[str, Any]) -> tuple[tuple[str, str], list[Labelled], Any]:
    """Of a pretraining run: the splits for training and test, their examples, the encoder."""
    modality, model = pretrain.make_model(config)
    check_section("data", config["data"], pretrain.DataConfig)
    check_section("examples", config["examples"], modality.layout)
    splits = probed_splits(config)
    return splits, probe.labelled(modality, config, splits), probe.make_encode(model)


def features(workdir: str, changes: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """{SPLIT_x: [N, D], SPLIT_y: [N]}: features of labelled examples, and their labels.

    Means over the positions, or each frame that has a label; see `probe.features`.
    Raises UserError: it is not a pretraining run.
    """
    _, config, mesh = open_run(workdir, changes)
    if "task" in config:
        raise UserError(f"--features: {workdir} is not a pretraining run")
    splits, labelled, encode = frozen_encoder(config)
    with jax.set_mesh(mesh):
        params = load_params(workdir, pretrain.abstract_task(config), config, mesh)
        pairs = [probe.features(encode, params, part) for part in labelled]
    parts = zip(splits, pairs, strict=True)
    return {
        f"{split}_{name}": a for split, pair in parts for name, a in zip("xy", pair, strict=True)
    }


def record(
    folder: Path, config: Mapping[str, Any], scores: Mapping[str, Any], params: Any
) -> dict[str, Any]:
    """The scores of one run with its folder, config, parameter counts and training time."""
    frozen = config["optim"].get("frozen", ())
    sizes = {path_name(p): x.size for p, x in jax.tree_util.tree_leaves_with_path(params)}
    return {
        "workdir": str(folder),
        "seed": config["seed"],
        "config": config,
        "scores": scores,
        "parameters": sum(sizes.values()),
        "trained_parameters": sum(n for p, n in sizes.items() if not matches(frozen, p)),
        "train_seconds": train_seconds(folder),
    }


def train_seconds(folder: Path) -> float | None:
    """Seconds in train steps, without compilation and evaluation; None if not recorded."""
    steps = step_folder.steps(epath.Path(folder / "checkpoints"))  # not those that were set aside
    place = folder / "checkpoints" / str(max(steps)) if steps else folder
    try:
        watch = json.loads((place / "position/data.json").read_text())["stopwatch"]
        return float(watch.get("seconds", watch)["train"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def paper(config: Mapping[str, Any], split: str, metric: str) -> float | None:
    """The paper's score for the same task, in per cent, or None."""
    published_scores = contract.get(config["modality"]).published_scores
    return published_scores(config, split, metric) if published_scores else None


# Rows ---------------------------------------------------------------------------------------------


def grouped(runs: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[Mapping[str, Any]]]]:
    """(name, runs) of the runs whose configs differ in the seed alone.

    Each seed may start from another pretraining run; two runs of one seed that start from
    different ones are in two groups.
    """
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for run in runs:
        config = json.loads(json.dumps(run["config"]))
        seed, _ = config.pop("seed"), config.pop("init_from", None)
        config["examples"].pop("tokenizer", None)
        key, number = json.dumps(config, sort_keys=True), 0
        while seed in (other["seed"] for other in groups.get(f"{number} {key}", ())):
            number += 1
        groups.setdefault(f"{number} {key}", []).append(run)
    return [(name_of([run["workdir"] for run in group]), group) for group in groups.values()]


def name_of(workdirs: Sequence[str]) -> str:
    """The workdir, or the common prefix of several and `*`."""
    if len(workdirs) == 1:
        return workdirs[0]
    letters = enumerate(zip(*workdirs, strict=False))
    same = next((i for i, found in letters if len(set(found)) > 1), min(map(len, workdirs)))
    return f"{workdirs[0][:same]}*"


def workdirs_of(text: str) -> tuple[str, list[str]]:
    """'NAME=A,B' or 'A,B' -> name, absolute workdirs; a folder stands for the workdirs in it."""
    cuts = [(None, 0), *((i, i + 1) for i, letter in enumerate(text) if letter == "=")]
    ways = [(text[:end] if end else "", split_folders(text[start:])) for end, start in cuts]
    existing = (way for way in ways if all(map(is_folder, way[1])))
    name, places = next(existing, ways[-1])
    found = []
    for place in places:
        folder = user_path(place)
        inside = sorted(folder.glob("*/config.json")) if is_folder(place) else []
        inside = [folder] if os.path.isfile(folder / "config.json") else [p.parent for p in inside]
        if not inside and is_step(folder):
            inside = [folder]
        if not inside:
            raise UserError(f"{place:.200}: not a workdir (no config.json), and contains none")
        found += (str(path.resolve()) for path in inside)  # the same name for the same run
    if twice := {path for path in found if found.count(path) > 1}:
        raise UserError(f"{text}: {min(twice)} is in it twice")
    return name or ",".join(places), found


def is_step(folder: Path) -> bool:
    """Whether a folder is one checkpoint of a workdir: WORKDIR/checkpoints/STEP."""
    workdir = folder.absolute().parent.parent
    return os.path.isdir(folder / "state") and os.path.isfile(workdir / "config.json")


def split_folders(text: str) -> list[str]:
    """'A,B' -> ['A', 'B']; a comma may be a part of a folder's name, as in 'lr=0.1,rows=16'."""
    parts, found = text.split(","), []
    while parts:
        counts = (n for n in range(len(parts), 1, -1) if is_folder(",".join(parts[:n])))
        count = next(counts, 1)
        found.append(",".join(parts[:count]))
        parts = parts[count:]
    return found


def is_folder(text: str) -> bool:
    """Whether there is one; what cannot be a path is none."""
    return os.path.isdir(user_path(text))


def summary(name: str, runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One row: scores with their mean and deviation over the runs."""
    first = runs[0]
    scores: dict[str, Any] = {}
    for split, found in first["scores"].items():
        for metric in found:
            values = [run["scores"].get(split, {}).get(metric, float("nan")) for run in runs]
            scores[f"{split} {metric}"] = {
                "values": values,
                "mean": statistics.fmean(values),
                "std": statistics.stdev(values) if len(values) > 1 else 0.0,
                "paper": paper(first["config"], split, metric),
            }
    words = {}
    if "probes" in first:
        (split,) = first["scores"]
        add_blocks(scores, split, runs)
        words = {"verdict": verdicts(scores, split)}
    return {
        "name": name,
        "workdirs": [run["workdir"] for run in runs],
        "seeds": [run["seed"] for run in runs],
        "scores": scores,
        **words,
        **{key: first[key] for key in ("parameters", "trained_parameters")},
        **({"forward_flops": first["forward_flops"]} if "forward_flops" in first else {}),
        "train_seconds": [run["train_seconds"] for run in runs],
    }


def add_blocks(
    scores: dict[str, dict[str, Any]], split: str, runs: Sequence[Mapping[str, Any]]
) -> None:
    """Adds to probes' scores the 'blocks' that they are of, by run, and what the dev split says."""
    for name in runs[0]["probes"]:
        found = [run.get("probes", {}).get(name) for run in runs]
        for key in probe.PROBES:
            score = scores[f"{split} {key}{name}"]
            score["blocks"] = [one["blocks"][key] for one in found if one]
            score["dev"] = [one["dev"][key] for one in found if one]


def verdicts(scores: Mapping[str, Mapping[str, Any]], split: str) -> dict[str, str]:
    """Probe -> what pretraining has brought, in words; see `tasks.probe.verdict`."""
    found = {}
    for key in probe.PROBES:
        first = f"{split} {key}"
        hand_made = max(scores.get(f"{first} hand-made", {}).get("values", ()), default=None)
        values = (scores[f"{first}{name}"]["values"] for name in ("", " untrained"))
        found[key] = probe.verdict(*values, hand_made)
    return found


def cell(name: str, score: Mapping[str, Any]) -> str:
    """'82.10 (81.00 to 83.30) [paper 84.2]', in per cent except for losses and weights.

    A probe's names the features that it is of, too: '82.10, block 3'.
    """
    scale, digits = (1, 4) if name.endswith(NOT_PERCENTAGES) else (100, 2)
    values = [scale * value for value in score["values"]]
    text = f"{scale * score['mean']:.{digits}f}"
    if len(values) > 1:
        text += f" ({min(values):.{digits}f} to {max(values):.{digits}f})"
    if "blocks" in score:
        text += f", {'; '.join(dict.fromkeys(score['blocks']))}"
    return text + (f" [paper {score['paper']}]" if score["paper"] is not None else "")


def table(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Head and cells: a line for each row, a column for each score."""
    names = list(dict.fromkeys(name for row in rows for name in row["scores"]))
    costs = ["forward MFLOPs"] if any("forward_flops" in row for row in rows) else []
    lines = [["", "runs", *names, "trained parameters", *costs, "seconds"]]
    for row in rows:
        seconds = [s for s in row["train_seconds"] if s is not None]
        lines.append(
            [
                row["name"],
                str(len(row["seeds"])),
                *(cell(n, row["scores"][n]) if n in row["scores"] else "" for n in names),
                f"{row['trained_parameters']:,} of {row['parameters']:,}",
                *(
                    f"{row['forward_flops'] / 1e6:,.3g}" if "forward_flops" in row else ""
                    for _ in costs
                ),
                f"{statistics.fmean(seconds):.0f}" if seconds else "",
            ]
        )
    return lines


def sentences(row: Mapping[str, Any]) -> list[str]:
    """'NAME, linear probe: better than untrained only', of a row of pretraining runs."""
    found = row.get("verdict", {})
    chance = " (one seed: a point or two is chance)" if len(row["workdirs"]) == 1 else ""
    return [
        f"{row['name']}, {key.replace('_', ' ')}: {text}{chance if 'better' in text else ''}"
        for key, text in found.items()
    ]


def plain(lines: Sequence[Sequence[str]]) -> str:
    """The table for a terminal."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def markdown(lines: Sequence[Sequence[str]], rows: Sequence[Mapping[str, Any]], runs: Any) -> str:
    """The table for a model card, and a sentence on the runs of each row."""
    head, *body = (f"| {' | '.join(line)} |" for line in lines)
    text = ["## Evaluation", "", head, f"|{' --- |' * len(lines[0])}", *body, ""]
    text.append("Scores in per cent, losses in nats; mean and range over the runs.")
    if any(score["paper"] is not None for row in rows for score in row["scores"].values()):
        text.append("The paper's scores are as known to us, not checked again.")
    for row in rows:
        run = runs[row["workdirs"][0]]
        config = run["config"]
        data, how = config["data"], config.get("init_from") or "scratch"
        share = "" if data.get("share", 1.0) == 1 else f" ({100 * data['share']:g} % of it)"
        if not run.get("is_run", True):
            where = f"probed on `{data['source']}` {data['split']}."
            said = (f"\n{text}." for text in sentences(row))
            text += ["", f"`{row['name']}`: the checkpoint {run['workdir']}, {where}", *said]
            continue
        text += [
            "",
            f"`{row['name']}`: {config.get('task', 'pretraining')} on `{data['source']}` "
            f"{data['split']}{share}, "
            f"from {how}, {config['total_steps']:,} updates of {data['batch_size']} rows, rate "
            f"{config['schedule']['peak']:g}, seeds {', '.join(map(str, row['seeds']))}.",
            *(f"\n{text}." for text in sentences(row)),
        ]
    return "\n".join(text) + "\n"


# The command --------------------------------------------------------------------------------------


def parser() -> Arguments:
    """The command's arguments."""
    found = Arguments(
        prog="python -m data2vec_jax.evaluate", description="Scores of fine-tuned checkpoints."
    )
    found.add_argument("runs", nargs="+", metavar="WORKDIR")
    found.add_argument("--compare", action="store_true", help="each argument is a row of its own")
    found.add_argument(
        "--features", type=user_path, metavar="FILE", help="write features, not scores"
    )
    found.add_argument("--json", type=user_path, metavar="FILE")
    found.add_argument("--markdown", type=user_path, metavar="FILE")
    found.add_argument(
        "--set", nargs="+", default=[], metavar="KEY=VALUE", help="change options of the configs"
    )
    return found


def check_writable(path: Path, option: str) -> None:
    """Raises UserError: no file can be written there. Cheap, so done before all the work."""
    if path.is_dir() or not path.parent.is_dir():
        raise UserError(f"--{option}={path}: not a file in an existing folder")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UserError(f"--{option}={path}: no permission to write")


def write(option: str, path: Path, writer: Callable[[Path], Any]) -> None:
    """Calls `writer`. Raises UserError: it cannot write, a full disk for example."""
    try:
        writer(path)
    except OSError as error:
        raise UserError(f"--{option}={path}: {error.strerror}") from None


def change(text: str) -> tuple[str, Any]:
    """'key=value' -> key, value as JSON, or else as text."""
    key, equals, value = text.partition("=")
    if not equals:
        raise UserError(f"--set {text}: not KEY=VALUE")
    try:
        return key, json.loads(value)
    except (ValueError, RecursionError):
        return key, value


def main(argv: Sequence[str] | None = None) -> None:
    """The command: see the module's docstring."""
    options = parser().parse_args(argv)
    changes = dict(map(change, options.set))
    places = [workdirs_of(text) for text in options.runs]
    for name in ("features", "json", "markdown"):
        path = getattr(options, name)
        if path:
            check_writable(path, name)
    if options.features:
        if len(places) > 1 or len(places[0][1]) > 1:
            raise UserError("--features takes one run")
        found = features(places[0][1][0], changes)
        write("features", options.features, lambda path: np.savez(path, **found))
        return
    once = dict.fromkeys(path for _, paths in places for path in paths)
    runs = {path: evaluate(path, changes, tuple(once)) for path in once}
    if options.compare:
        groups = [(name, [runs[path] for path in paths]) for name, paths in places]
    else:
        groups = grouped(list(runs.values()))
    rows = [summary(name, group) for name, group in groups]
    by_folder = {run["workdir"]: run for run in runs.values()}
    lines = table(rows)
    print("\n".join([plain(lines), *(text for row in rows for text in sentences(row))]))
    texts = {
        "json": as_json(rows),
        "markdown": markdown(lines, rows, by_folder),
    }
    for name, text in texts.items():
        if path := getattr(options, name):
            write(name, path, lambda path, text=text: path.write_text(text, encoding="utf-8"))


if __name__ == "__main__":
    run_main(main)
