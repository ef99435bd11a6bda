"""Whether a corpus is fit to train on: every example decoded, measured and compared."""

import hashlib
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data2vec_jax.core.errors import ExampleError
from data2vec_jax.data.characters import Characters
from data2vec_jax.data.codecs.base import Codec
from data2vec_jax.data.codecs.text import read_text
from data2vec_jax.data.normalise import Normaliser, Survey
from data2vec_jax.data.sources import Source
from data2vec_jax.prepare.shards import in_order

NAMED = 5  # examples that a fault names
QUANTILES = {"least": 0, "1 %": 0.01, "median": 0.5, "99 %": 0.99, "greatest": 1}


@dataclass
class Found:
    """What is known of examples, in order. measures: [N, M]; contents: hashes; labels: classes."""

    places: list[str] = field(default_factory=list)
    measures: list[tuple[float, ...]] = field(default_factory=list)
    contents: list[bytes] = field(default_factory=list)
    labels: list[Any] = field(default_factory=list)
    characters: Counter = field(default_factory=Counter)
    bad: list[tuple[str, str]] = field(default_factory=list)  # reason, message
    survey: Survey | None = None  # of transcripts, beside a given alphabet

    def add(self, other: "Found") -> None:
        """Appends what is known of further examples."""
        for name in ("places", "measures", "contents", "labels", "bad"):
            getattr(self, name).extend(getattr(other, name))
        self.characters.update(other.characters)
        self.survey = self.survey + other.survey if self.survey else other.survey


@dataclass(frozen=True)
class Examiner:
    """Range of numbers -> `Found`, of the examples of a source."""

    source: Source
    normaliser: Normaliser | None = None  # of transcripts

    def __call__(self, rows: range) -> Found:
        codec, found = self.source.codec, Found()
        transcripts: list[str] = []
        for i, item in zip(rows, self.source.results(rows), strict=True):
            if isinstance(item, ExampleError):
                found.bad.append((item.reason, str(item)))
                continue
            signal = item[codec.field]
            whole = signal.encode() if isinstance(signal, str) else np.ascontiguousarray(signal)
            shape = "" if isinstance(signal, str) else str(signal.shape)
            content = hashlib.sha256(shape.encode())
            content.update(whole)
            words = signal if isinstance(signal, str) else item.get("transcript")
            words = words if isinstance(words, str) else ""
            transcripts.append(words)
            found.places.append(self.source.location(i))
            found.measures.append(codec.examine(item) if codec.examine else ())
            found.contents.append(content.digest()[:16])
            found.labels.append(item.get("label", item.get("labels")))
            found.characters.update(words)
        if self.normaliser:
            found.survey = self.normaliser.survey(transcripts)
        return found


def check(
    sources: Mapping[str, Source], codec: Codec, *, workers: int, alphabet: Path | None = None
) -> dict[str, Any]:
    """What `check.json` holds: for each split counts, measures and faults, and what splits share.

    alphabet: a file with the characters that are known, or a `vocab.json`. Transcripts are written
    with them as training writes them, so a letter in the other case is not outside; texts are not.
    """
    known = alphabet and known_characters(alphabet)
    normaliser = Normaliser(known - {" ", "\n"}) if known and not codec.in_tables else None
    found: dict[str, Found] = {}
    for split, source in sources.items():
        size = max(len(source) // (8 * workers) + 1, 64)
        parts = [range(i, min(i + size, len(source))) for i in range(0, len(source), size)]
        found[split] = Found()
        for part in in_order(Examiner(source, normaliser), parts, workers):
            found[split].add(part)
    splits = {
        split: of_split(one, sources[split].label_names, codec, known)
        for split, one in found.items()
    }
    faults = [f"{split}: {fault}" for split, one in splits.items() for fault in one["faults"]]
    names = list(found)
    for a, b in ((a, b) for i, a in enumerate(names) for b in names[i + 1 :]):
        if shared := set(found[a].contents) & set(found[b].contents):
            place = next(
                p for p, c in zip(found[b].places, found[b].contents, strict=True) if c in shared
            )
            faults.append(f"{len(shared):,} examples are in both {a} and {b}, such as {place}")
        classes = [set(splits[split]["classes"]) for split in (a, b)]
        if all(classes) and (only := classes[1] - classes[0]):
            faults.append(f"{len(only)} classes of {b} are not in {a}: {named(sorted(only))}")
    uri = next(iter(sources.values())).uri
    return {"source": uri, "fit": not faults, "faults": faults, "splits": splits}


def of_split(
    found: Found, names: Sequence[str] | None, codec: Codec, known: set[str] | None
) -> dict[str, Any]:
    """The counts, measures, classes, characters and faults of a split."""
    count, faults, measures = len(found.places), [], {}
    total = count + len(found.bad)
    reasons = Counter(reason for reason, _ in found.bad)
    for reason, n in reasons.most_common():
        first = next(message for r, message in found.bad if r == reason)
        faults.append(f"{share(n, total)} cannot be read ({reason}), such as {first}")
    values = np.array(found.measures).reshape(count, -1)
    for measure, column in zip(codec.measures if count else (), values.T, strict=True):
        spread = {name: float(np.quantile(column, q)) for name, q in QUANTILES.items()}
        heights, edges = np.histogram(column, bins=24)
        measures[measure.name] = {
            "unit": measure.unit,
            "sum": float(column.sum()),
            **spread,
            "histogram": {"counts": heights.tolist(), "edges": edges.tolist()},
        }
        for name, beyond in (
            (measure.below, column < measure.least),
            (measure.above, column > measure.most),
        ):
            if name and beyond.any():
                places = named([found.places[i] for i in np.flatnonzero(beyond)[:NAMED]])
                faults.append(f"{share(int(beyond.sum()), total)} are {name}: {places}")
    if repeated := count - len(set(found.contents)):
        seen: set[bytes] = set()
        again = (
            place
            for place, content in zip(found.places, found.contents, strict=True)
            if content in seen or seen.add(content)
        )
        faults.append(f"{share(repeated, total)} repeat others, such as {next(again)}")
    labels = [c for v in found.labels for c in (v if isinstance(v, list) else [v]) if c is not None]
    classes = Counter(str(names[c]) if names and isinstance(c, int) else str(c) for c in labels)
    if names and classes:
        if missing := [name for name in names if name not in classes]:
            faults.append(f"{len(missing)} classes have no example: {named(missing)}")
        most, fewest = max(classes.values()), min(classes.values())
        if most > 20 * fewest:
            faults.append(f"classes differ in size from {fewest:,} to {most:,}")
    if found.survey:
        outside, characters = found.survey.outside, found.survey.letters
        if found.survey.empty == count:
            faults.append("no transcript has a letter of the alphabet")
    else:
        outside = Counter({c: n for c, n in found.characters.items() if known and c not in known})
        outside, characters = dict(outside.most_common()), found.characters.total()
    if outside:
        text = f"of the characters are not in the alphabet: {named(map(repr, outside))}"
        faults.append(f"{share(sum(outside.values()), characters)} {text}")
    scripts = Counter()
    for character, n in found.characters.items():
        if character.isalpha():
            scripts[unicodedata.name(character, "UNKNOWN").split()[0].lower()] += n
    return {
        "examples": count,
        "bad": dict(reasons),
        "repeated": repeated,
        "measures": measures,
        "classes": dict(classes.most_common()) if names else {},
        "characters": dict(found.characters.most_common()),
        "scripts": dict(scripts.most_common()),
        "faults": faults,
    }


def share(count: int, total: int) -> str:
    """'12 of 400 (3 %)'."""
    return f"{count:,} of {total:,} ({100 * count / max(total, 1):.3g} %)"


def named(names: Any) -> str:
    """The first few of many names."""
    names = list(names)
    more = f", and {len(names) - NAMED:,} more" if len(names) > NAMED else ""
    return ", ".join(map(str, names[:NAMED])) + more


def known_characters(path: Path) -> set[str]:
    """Those of a `vocab.json`, or of a text; and the space. Raises UserError: no such file."""
    if path.suffix == ".json":
        names = {name for name in Characters.load(path).names if len(name) == 1}
        return (names - {"|"}) | {" "}
    return {*read_text(str(path)), " ", "\n"}
