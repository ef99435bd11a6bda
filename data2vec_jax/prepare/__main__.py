"""Turns a corpus into checked ArrayRecord shards, or tells whether it is fit to train on.

    python -m data2vec_jax.prepare MODALITY --source=KIND:PLACE --target=FOLDER [--splits=NAMES]
    python -m data2vec_jax.prepare MODALITY --source=KIND:PLACE --check=FOLDER [--splits=NAMES]
    python -m data2vec_jax.prepare MODALITY ... --target=FOLDER --runner=NAME [-- BEAM'S OPTIONS]

The first decodes every example, names those that it cannot read in FOLDER/bad_examples.jsonl, and
writes the others to shards, which `--config.data.source=array_record:FOLDER` trains on, with a
manifest. Files keep their bytes unless an option changes them. The same command goes on after an
interruption. The second writes FOLDER/check.html and check.json. The third is the first by workers
of Apache Beam. MODALITY --help lists all options; docs/your_data.md has examples.
"""

import dataclasses
import functools
import os
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import data2vec_jax
from data2vec_jax.cli.arguments import Arguments, user_path
from data2vec_jax.cli.output import run_main, say
from data2vec_jax.core.config import PositiveFloat, PositiveInt, Share, check_option
from data2vec_jax.core.errors import UserError
from data2vec_jax.data.codecs.base import Codec
from data2vec_jax.data.places import is_remote, store_of
from data2vec_jax.prepare.beam import beam_map
from data2vec_jax.prepare.check import check
from data2vec_jax.prepare.corpus import blocks, open_splits, parse_splits
from data2vec_jax.prepare.shards import in_order, make_shards

CHANGE = "soundfile", "soxr", "pillow"  # what a conversion is made with
RANGES = {"workers": PositiveInt, "max_bad_share": Share, "shard_mb": PositiveFloat}


def parser(name: str, codec: Codec, kinds: Sequence[Any]) -> Arguments:
    """The command's arguments for one modality. kinds: dataclasses of further options."""
    found = Arguments(prog=f"python -m data2vec_jax.prepare {name}")
    add = found.add_argument
    add("--source", required=True, metavar="KIND:PLACE", help="as data.source, see docs/data.md")
    text = "a new folder for shards and manifest; may be remote, gs://bucket/folder"
    add("--target", type=os.path.expanduser, metavar="FOLDER", help=text)
    text = "where check.html and check.json go"
    add("--check", type=os.path.expanduser, metavar="FOLDER", help=text)
    text = "for --check: a vocab.json, or a text with all characters that are known"
    add("--alphabet", type=user_path, metavar="FILE", help=text)
    text = "NAME or NAME=SPLIT OF THE SOURCE, comma-separated; by default train"
    add("--splits", default="train", metavar="NAMES", help=text)
    add("--key", metavar="COLUMN", help=f"of a table: its paths, or its {codec.field}")
    add("--columns", metavar="NAMES", help="of a table without a line of names, comma-separated")
    add("--licence", metavar="TEXT", help="of the corpus, for the manifest")
    text = "more bad examples than this share of a split are refused; by default 0.01"
    add("--max_bad_share", default=0.01, type=float, metavar="SHARE", help=text)
    text = "stored bytes of a shard, about, in millions; by default 256"
    add("--shard_mb", default=256.0, type=float, metavar="MB", help=text)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    add("--workers", default=cores, type=int, metavar="N", help="processes; by default all cores")
    text = "of Apache Beam, in place of these processes: direct, prism, dataflow, ..."
    add("--runner", metavar="NAME", help=f"{text}; its own options follow `--`")
    for option in (field for kind in kinds for field in dataclasses.fields(kind)):
        flags = dict.fromkeys((f"--{option.name.replace('_', '-')}", f"--{option.name}"))
        about: dict[str, Any] = {"type": int, "metavar": "N"}
        if option.type is bool:
            about = {"action": "store_true"}
        elif get_origin(option.type) is Literal:
            about = {"choices": [choice for choice in get_args(option.type) if choice]}
        add(*flags, default=option.default, help=option.metadata.get("help"), **about)
    return found


def chosen(options: Any, kind: Any) -> Any:
    """The command's options of a dataclass; None if all are at their defaults, or it is None.

    Raises UserError: one is out of range.
    """
    if kind is None:
        return None
    fields = dataclasses.fields(kind)
    for field in fields:
        check_option(f"--{field.name}", getattr(options, field.name), field.type)
    found = kind(**{field.name: getattr(options, field.name) for field in fields})
    return None if found == kind() else found


def main(argv: Sequence[str] | None = None) -> None:
    """The command: see the module's docstring."""
    from data2vec_jax.modalities import contract  # it imports jax, which workers do without

    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0].startswith("-"):
        print(__doc__)
        if argv[:1] in (["-h"], ["--help"]):
            return
        raise UserError(f"MODALITY is missing; choose from {', '.join(contract.names())}")
    modality = contract.get(argv[0])
    codec, learned = modality.codec, modality.learned
    kinds = codec.conversion, learned and learned.options
    end = argv.index("--") if "--" in argv else len(argv)
    arguments = parser(argv[0], codec, list(filter(None, kinds)))
    options, of_beam = arguments.parse_args(argv[1:end]), argv[end + 1 :]
    for name, annotation in RANGES.items():
        check_option(f"--{name}", getattr(options, name), annotation)
    if bool(options.target) == bool(options.check):
        raise UserError("give one of --target=FOLDER and --check=FOLDER")
    if options.check and is_remote(options.check):
        raise UserError(f"--check={options.check}: is written to a folder of this machine only")
    if options.runner and options.check:
        raise UserError(f"--runner={options.runner} makes shards; --check has --workers alone")
    if of_beam and not options.runner:
        raise UserError(f"-- {of_beam[0]}: options after `--` are those of a --runner=NAME")
    mapped = functools.partial(in_order, workers=options.workers)
    if options.runner:
        mapped = beam_map(options.runner, of_beam)
    said, (conversion, learning) = None, (chosen(options, kind) for kind in kinds)
    if options.check and (conversion or learning):
        raise UserError("--check changes and learns nothing; leave out the options for --target")
    if conversion:
        installed = {d.name: d.version for n in CHANGE for d in metadata.distributions(name=n)}
        said = dataclasses.asdict(conversion) | installed
    if options.target and is_remote(options.target):
        store_of(options.target)  # which must be installed
    splits = parse_splits(options.splits)
    columns = options.columns and options.columns.split(",")
    sources = open_splits(options.source, splits, codec, options.key, columns)
    for note in dict.fromkeys(note for source in sources.values() for note in source.notes):
        say(note)
    if options.check:
        from data2vec_jax.prepare.page import write_page  # as above

        result = check(sources, codec, workers=options.workers, alphabet=options.alphabet)
        page = write_page(Path(options.check), result)
        print(*result["faults"] or ["no fault was found"], page, sep="\n")
        return
    manifest = make_shards(
        options.target,
        blocks(sources, round(options.shard_mb * 1e6)),
        codec,
        conversion=conversion,
        about={
            "modality": argv[0],
            "source": options.source,
            "read": splits,
            "licence": options.licence,
            "conversion": said,
            "label_names": next(iter(sources.values())).label_names,
            "shard_mb": options.shard_mb,
            "data2vec_jax": data2vec_jax.__version__,
        },
        mapped=mapped,
        max_bad_share=options.max_bad_share,
        learn={learned.name: functools.partial(learned.learn, learning)} if learning else {},
        tell=say,
    )
    print(summary(manifest))


def summary(manifest: dict[str, Any]) -> str:
    """A table of the splits."""
    units = manifest["units"]
    lines = [f"{'split':<12}{'examples':>12}{units or '':>16}  left out"]
    for split, counts in manifest["splits"].items():
        length = f"{counts['length']:,}" if units else ""
        bad = ", ".join(f"{reason} {count}" for reason, count in counts["bad"].items())
        lines.append(f"{split:<12}{counts['examples']:>12,}{length:>16}  {bad or '-'}")
    return "\n".join(lines)


if __name__ == "__main__":
    run_main(main)
