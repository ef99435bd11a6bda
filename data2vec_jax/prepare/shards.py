"""The shards of a corpus, made by many processes, and the manifest that is written last.

A block makes its shard alone, from what is stored and the options, so shards are the same for any
number of processes, here or by Apache Beam, and after any interruption. While the work lasts,
`unfinished/` holds a report of each finished shard; the same command goes on from there.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import math
import signal
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import chain
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from data2vec_jax.core.errors import ExampleError, UserError
from data2vec_jax.core.files import whole, write_json
from data2vec_jax.data import places
from data2vec_jax.data.codecs.base import Codec
from data2vec_jax.data.copies import local_copies
from data2vec_jax.data.readers import end_with_parent
from data2vec_jax.data.sources import Source, shards, write_array_record
from data2vec_jax.data.sources.array_record import ArrayRecordSource, lengths_file
from data2vec_jax.prepare.corpus import Block
from data2vec_jax.prepare.examples import prepare_example

BAD = "bad_examples.jsonl"  # as in a workdir


@dataclasses.dataclass(frozen=True)
class ShardMaker:
    """Makes shards in `folder`. options: all that change them, as text."""

    folder: str  # a place, see `data.places`
    codec: Codec
    conversion: Any
    options: str

    def __call__(self, block: Block) -> dict[str, Any]:
        """The report of a block's shard: its entry in the manifest, and the bad examples."""
        reports, digest = places.join(self.folder, shards.UNFINISHED), block.digest(self.options)
        with contextlib.suppress(UserError, KeyError):
            report = places.read_json(places.join(reports, block.name))
            if report["digest"] == digest:
                shards.check_shards(self.folder, report["shards"])
                return report
        with places.written(self.folder) as folder:
            made, bad = self._make(block, folder / block.name)
        report = {"digest": digest, "shards": made, "bad": bad}
        write_whole(reports, block.name, report)
        return report

    def _make(self, block: Block, path: Path) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
        """Writes a block's shard and what lies beside it; its entry, and the bad examples."""
        made, bad = [], []
        columns: dict[str, list[Any]] = {name: [] for name in shards.COLUMNS}
        records = self._records(block, bad, columns)
        if (first := next(records, None)) is not None:
            try:
                count = write_array_record(path, chain([first], records), codec=self.codec)
            except RuntimeError as error:  # of the C++ writer, which has no exception of its own
                raise UserError(f"cannot write {path}: {' '.join(str(error).split())}") from error
            shard = {"file": block.name, "split": block.split, "examples": count}
            shard |= {"bytes": path.stat().st_size, "mark": shards.mark_of(path)}
            shard["sha256"] = sha256_of(path)
            if (lengths := Path(lengths_file(str(path)))).exists():
                shard |= {"length": int(np.load(lengths).sum()), "lengths": shards.mark_of(lengths)}
            if beside := shards.write_columns(path, columns):
                shard["columns"] = shards.mark_of(beside)
            made = [shard]
        return made, bad

    def _records(
        self, block: Block, bad: list[dict[str, str]], columns: dict[str, list[Any]]
    ) -> Iterator[dict[str, Any]]:
        for stored in block.examples:
            try:
                record = prepare_example(stored, self.codec, self.conversion)
            except ExampleError as error:
                path, message = (  # names of files may be no text
                    text.encode(errors="backslashreplace").decode()
                    for text in (stored.where, str(error))
                )
                line = {"split": block.split, "path": path, "reason": error.reason}
                bad.append(line | {"message": message})
            else:
                for name, values in columns.items():
                    values.append(record.get(name))
                yield record


def make_shards(
    target: str,
    blocks: Iterable[Block],
    codec: Codec,
    *,
    conversion: Any,
    about: Mapping[str, Any],
    mapped: Callable[[ShardMaker, Iterable[Block]], Iterator[dict[str, Any]]],
    max_bad_share: float,
    learn: Mapping[str, Callable[[Source, Path], Mapping[str, Any]]],
    tell: Callable[[str], None],
) -> dict[str, Any]:
    """Writes the shards and then the manifest, which it returns.

    about: what the manifest says besides: source, licence, ... mapped: `map` by any engine, which
    keeps the order. max_bad_share: see `counts_of`. learn: folders to write beside the shards, from
    those of the first split, and what the manifest says of them. tell: gets lines for the user.
    Raises UserError: the target is finished, in use or holds other files; too much is bad; ...
    """
    with claimed(target):
        light = dataclasses.replace(codec, kinds={})
        maker = ShardMaker(target, light, conversion, json.dumps(about, sort_keys=True))
        made, bad = [], []
        for report in mapped(maker, blocks):
            made += report["shards"]
            bad += report["bad"]
            for shard in report["shards"]:
                text = f"{shard['file']}: {shard['examples']:,} examples"
                tell(f"{text}, {len(report['bad']):,} left out" if report["bad"] else text)
        with places.written(target) as folder:
            (folder / BAD).write_text("".join(json.dumps(line) + "\n" for line in bad))
        splits = {
            split: counts_of(split, made, bad, max_bad_share, places.join(target, BAD))
            for split in dict.fromkeys(one["split"] for one in [*made, *bad])
        }
        if not made:
            raise UserError(f"{about['source']}: has no examples")
        units = codec.units if codec.measure else None
        manifest = {"version": shards.VERSION, **about, "units": units}
        manifest |= {"splits": splits, "shards": made}
        for name, make in learn.items():
            first = next(iter(splits))
            tell(f"{name}: learned from a sample of {first}")
            manifest[name] = learned(target, name, make, first, made, codec)
        wanted = tuple(shard["file"] for shard in made)
        for name in places.names_in(target):  # of an earlier state of the corpus
            if ".array_record" in name and (
                not name.startswith(wanted) or name.endswith(".partial")  # of a kill
            ):
                places.remove(places.join(target, name))
        write_whole(target, shards.MANIFEST, manifest)
        places.remove(places.join(target, shards.UNFINISHED))
    return manifest


def learned(
    target: str,
    name: str,
    make: Callable[[Source, Path], Mapping[str, Any]],
    split: str,
    made: Sequence[Mapping[str, Any]],
    codec: Codec,
) -> dict[str, Any]:
    """Writes the folder `name` beside the shards, from those of a split; what a manifest says of
    it."""
    names = [places.join(target, shard["file"]) for shard in made if shard["split"] == split]
    source = ArrayRecordSource(name, split, codec, local_copies(names))
    place = places.join(target, name)
    places.remove(place)  # of an earlier state
    with places.written(place) as folder:
        found = {"split": split, **make(source, folder)}
        files = {path.name: sha256_of(path) for path in sorted(folder.iterdir())}
    return found | {"sha256": files}


def sha256_of(path: Path) -> str:
    """The hash of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_whole(folder: str, name: str, value: Any) -> None:
    """Writes a JSON file, whole or not at all."""
    with places.written(folder) as local, whole(local / name) as draft:
        write_json(draft, value)


def counts_of(
    split: str,
    made: Sequence[Mapping[str, Any]],
    bad: Sequence[Mapping[str, str]],
    max_bad_share: float,
    file: str,
) -> dict[str, Any]:
    """What a manifest says of a split: examples, their length, bad ones by reason.

    Raises UserError: there are more bad ones than `max_bad_share`, rounded up, or no others.
    """
    own = [shard for shard in made if shard["split"] == split]
    found = [line for line in bad if line["split"] == split]
    reasons = dict(sorted(Counter(line["reason"] for line in found).items()))
    examples = sum(shard["examples"] for shard in own)
    total = examples + len(found)
    if len(found) > math.ceil(round(max_bad_share * total, 9)) or not own:
        said = ", ".join(f"{reason} {n}" for reason, n in reasons.items())
        raise UserError(
            f"{len(found):,} of {total:,} examples of {split} cannot be used ({said}; the first is "
            f"{found[0]['message']}), see {file}; mend them, or allow more with --max_bad_share"
        )
    length = sum(shard.get("length", 0) for shard in own)
    return {"examples": examples, "length": length, "bad": reasons}


@contextlib.contextmanager
def claimed(target: str) -> Iterator[None]:
    """Holds an unfinished target folder for one process; stores know no locks, but shards made
    twice are the same. Raises UserError: it is no such folder."""
    again, there = "remove it, or choose another target", places.names_in(target)
    try:
        if shards.MANIFEST in there:
            raise UserError(f"{target} is finished; {again}")
        if there and shards.UNFINISHED not in there:
            raise UserError(f"{target} holds other files; choose another target")
        with places.written(places.join(target, shards.UNFINISHED)) as work:
            lock = (work / "lock").open("w")  # also the first of the names that show the state
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise UserError(f"{target}: another process is preparing it") from None
            yield
    except OSError as error:
        raise UserError(f"cannot write {target}: {error.strerror or error}") from error


def in_order(make: Callable[[Any], Any], work: Iterable[Any], workers: int) -> Iterator[Any]:
    """`map(make, work)` by so many processes, which get `make` once; `work` is read only a little
    ahead.

    Raises UserError: a process was killed.
    """
    if workers == 1:
        yield from map(make, work)
        return
    # A fork would copy locks that other threads hold.
    pool = ProcessPoolExecutor(workers, get_context("spawn"), initializer=_begin, initargs=(make,))
    try:
        waiting: list[Future] = []
        for each in work:
            waiting.append(pool.submit(_call, each))
            if len(waiting) >= 2 * workers:
                yield waiting.pop(0).result()
        yield from (future.result() for future in waiting)
    except BrokenProcessPool:
        text = "a worker was killed, perhaps for want of memory; give the same command again"
        raise UserError(f"{text}, maybe with fewer --workers") from None
    finally:
        pool.shutdown(cancel_futures=True)


_made: list[Callable[[Any], Any]] = []  # in a worker: its one function, which may hold a corpus


def _begin(make: Callable[[Any], Any]) -> None:
    """The start of a worker: it ends with the command, which alone hears Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent()
    _made.append(make)


def _call(each: Any) -> Any:
    return _made[0](each)
