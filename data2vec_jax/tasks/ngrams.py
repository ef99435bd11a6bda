"""N-gram language models: training, scores, and ARPA files.

A unit is a word or a character: any string without white space. Scores are log10, as in ARPA files
and in KenLM. A model is a dict in memory, meant for some million n-grams.
"""

import gzip
import math
import os
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from data2vec_jax.core.errors import UserError

START, END, UNKNOWN = "<s>", "</s>", "<unk>"  # SRILM also writes <UNK>
NEVER = -99.0  # log10 probability of a unit that is never predicted, such as <s>
SPECIALS = (START, END, UNKNOWN)
NO_UNKNOWN = -100.0  # of an unknown unit if the model has no <unk>, as in KenLM

Gram = tuple[str, ...]


class Ngrams:
    """A back-off model of order n (Katz 1987).

    probs: n-gram, a tuple of 1 to n units, -> log10 probability of the last after the others.
    backoffs: n-gram of 1 to n - 1 units -> log10 weight, 0 where there is none.
    """

    def __init__(self, probs: Mapping[Gram, float], backoffs: Mapping[Gram, float]):
        self.probs, self.backoffs = dict(probs), dict(backoffs)
        self.order = max(map(len, self.probs))

    def __contains__(self, unit: str) -> bool:
        return (unit,) in self.probs

    def score(self, history: Gram, unit: str) -> float:
        """log10 P(unit | history), of which the last n - 1 units count."""
        if unit not in self:
            unit = UNKNOWN
        context = history[max(len(history) - self.order + 1, 0) :]
        total = 0.0
        while True:
            found = self.probs.get((*context, unit))
            if found is not None:
                return total + found
            if not context:
                return total + NO_UNKNOWN
            total += self.backoffs.get(context, 0.0)
            context = context[1:]

    def extend(self, history: Gram, unit: str) -> Gram:
        """The history after `unit`: the last n - 1 units, with <unk> for those not known."""
        longer = (*history, unit if unit in self else UNKNOWN)
        return longer[max(len(longer) - self.order + 1, 0) :]

    def sentence(self, units: Sequence[str]) -> float:
        """log10 probability of a sentence between <s> and </s>."""
        history, total = (START,), 0.0
        for unit in (*units, END):
            total += self.score(history, unit)
            history = self.extend(history, unit)
        return total


def perplexity(model: Ngrams, sentences: Sequence[Sequence[str]]) -> float:
    """10 ^ (- mean log10 probability of a unit), ends of sentences counted."""
    units = sum(len(sentence) + 1 for sentence in sentences)
    return 10.0 ** (-sum(map(model.sentence, sentences)) / units)


# Training ---------------------------------------------------------------------------------------


def train(sentences: Iterable[Sequence[str]], order: int) -> Ngrams:
    """Interpolated, modified Kneser-Ney (Chen & Goodman 1998) of sentences of units.

    An n-gram of the highest order counts its occurrences; a shorter one counts the different units
    before it, unless it starts with <s>. Each count is discounted by one of three amounts; the
    probability freed in a context goes to the next lower order, and from unigrams to a uniform
    distribution over all units, </s> and <unk>. So the probabilities after any context sum to 1.
    Raises UserError: no sentences, an order out of range, a unit that ARPA files cannot hold.
    """
    if not 1 <= order <= 20:
        raise UserError(f"an n-gram model of order {order}: use 1 to 20")
    counts = adjusted_counts(sentences, order)
    if not counts[0]:
        raise UserError("no sentences to train an n-gram model on")
    for (unit,) in counts[0]:
        if unit.split() != [unit]:
            raise UserError(f"an n-gram model cannot have the unit {unit!r}")
    uniform = 1.0 / (len(counts[0]) + 1)  # </s> is among the counts, <s> is not; and <unk>
    probs: dict[Gram, float] = {}  # plain probabilities at first
    backoffs: dict[Gram, float] = {}
    for table in counts:
        amounts = discounts(table.values())
        totals: dict[Gram, float] = defaultdict(float)
        freed: dict[Gram, float] = defaultdict(float)
        for gram, count in table.items():
            totals[gram[:-1]] += count
            freed[gram[:-1]] += amounts[min(count, 3)]
        for gram, count in table.items():
            context = gram[:-1]
            weight = freed[context] / totals[context]
            lower = probs[gram[1:]] if context else uniform
            own = (count - amounts[min(count, 3)]) / totals[context]
            probs[gram] = own + weight * lower
            backoffs[context] = weight
    probs[(UNKNOWN,)] = backoffs.pop(()) * uniform
    log = {gram: math.log10(value) if value > 0 else NEVER for gram, value in probs.items()}
    log[(START,)] = NEVER
    return Ngrams(log, {g: math.log10(w) if w > 0 else NEVER for g, w in backoffs.items()})


def adjusted_counts(sentences: Iterable[Sequence[str]], order: int) -> list[Counter[Gram]]:
    """Counts of the n-grams of each order, 1 first, as Kneser and Ney count them."""
    counts: list[Counter[Gram]] = [Counter() for _ in range(order)]
    for sentence in sentences:
        if special := {START, END, UNKNOWN} & set(sentence):
            raise UserError(f"an n-gram model cannot have the unit {min(special)!r}")
        units = (START, *sentence, END)
        for end in range(2, len(units) + 1):
            for n in range(1, min(order, end) + 1):
                counts[n - 1][units[end - n : end]] += 1
    for n in range(order - 1):
        before = Counter(gram[1:] for gram in counts[n + 1])
        counts[n] = Counter({g: c if g[0] == START else before[g] for g, c in counts[n].items()})
    return counts


def discounts(counts: Iterable[int]) -> tuple[float, float, float, float]:
    """Amounts to subtract from counts of 0, 1, 2, and 3 or more.

    From the numbers of n-grams counted once to four times (Chen & Goodman, equation 17); 0.5, 1 and
    1.5 where there are too few, as in KenLM's fallback.
    """
    seen = Counter(counts)
    n = [seen[k] for k in range(5)]
    if min(n[1:]) > 0:
        y = n[1] / (n[1] + 2 * n[2])
        found = [k - (k + 1) * y * n[k + 1] / n[k] for k in (1, 2, 3)]
        if all(0 <= d <= k for k, d in enumerate(found, 1)):
            return (0.0, *found)
    return 0.0, 0.5, 1.0, 1.5


# ARPA files -------------------------------------------------------------------------------------


def open_text(path: str | Path, mode: str) -> Any:
    """A UTF-8 file, compressed if it is called *.gz; read without a byte order mark."""
    opener = gzip.open if str(path).endswith(".gz") else open
    encoding = "utf-8-sig" if mode == "r" else "utf-8"
    return opener(os.path.expanduser(path), mode + "t", encoding=encoding, newline="\n")


def write_arpa(model: Ngrams, path: str | Path) -> None:
    """Writes an ARPA file, sorted, with 7 digits after the point; *.gz too."""
    by_order: dict[int, list[Gram]] = {n: [] for n in range(1, model.order + 1)}
    for gram in sorted(model.probs):
        by_order[len(gram)].append(gram)
    with open_text(path, "w") as file:
        file.write("\\data\\\n")
        file.writelines(f"ngram {n}={len(grams)}\n" for n, grams in by_order.items())
        for n, grams in by_order.items():
            file.write(f"\n\\{n}-grams:\n")
            for gram in grams:
                backoff = f"\t{model.backoffs[gram]:.7f}" if gram in model.backoffs else ""
                file.write(f"{model.probs[gram]:.7f}\t{' '.join(gram)}{backoff}\n")
        file.write("\n\\end\\\n")


def read_units(path: str | Path) -> list[str]:
    """The units of an ARPA file, without reading longer n-grams. Raises UserError: it is none."""
    return [unit for (unit,) in _read(path, order=1).probs]


def read_arpa(path: str | Path) -> Ngrams:
    """Reads an ARPA file; *.gz too. Raises UserError with the line that is wrong."""
    arpa = _read(path)
    if not arpa.ended or not arpa.probs or arpa.found != arpa.announced:
        wanted = _sizes(arpa.announced) or "no n-grams"
        has = _sizes(arpa.found) or "none"
        end = "" if arpa.ended else " and no \\end\\"
        raise UserError(f"{path}: not a whole ARPA file: announces {wanted}, has {has}{end}")
    return Ngrams(arpa.probs, arpa.backoffs)


def _read(path: str | Path, order: int = 1_000) -> "_Arpa":
    """An ARPA file up to its n-grams of an order, or up to what is missing at its end."""
    arpa, number = _Arpa(), 0
    try:
        with open_text(path, "r") as file:
            for number, line in enumerate(file, 1):  # noqa: B007
                arpa.read(line.strip())
                if arpa.ended or arpa.order > order:
                    break
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except (ValueError, OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}:{number}: not an ARPA file ({error})") from error
    return arpa


class _Arpa:
    """What has been read of an ARPA file."""

    def __init__(self):
        self.probs: dict[Gram, float] = {}
        self.backoffs: dict[Gram, float] = {}
        self.announced: Counter[int] = Counter()  # order -> number of n-grams, by the header
        self.found: Counter[int] = Counter()  # order -> number of n-grams read
        self.order = -1  # of the section being read; -1 before \data\, 0 in the header
        self.ended = False

    def read(self, line: str) -> None:
        """Reads one more line. Raises ValueError: it is not one of an ARPA file."""
        if line == "\\end\\":
            self.ended = True
        elif line == "\\data\\":
            self.order = 0
        elif line.startswith("\\") and line.endswith("-grams:"):
            self.order = int(line[1:].removesuffix("-grams:"))
        elif self.order == 0 and line.startswith("ngram "):
            n, count = line[6:].split("=")
            self.announced[int(n)] = int(count)
        elif self.order > 0 and line:
            self._read_gram(line)

    def _read_gram(self, line: str) -> None:
        """A line 'log10-probability unit ... unit [log10-backoff]'."""
        prob, *rest = line.split()
        units, backoff = rest[: self.order], rest[self.order :]
        if len(units) != self.order or len(backoff) > 1:
            raise ValueError(f"not a {self.order}-gram")
        gram = tuple(UNKNOWN if unit == "<UNK>" else unit for unit in units)
        self.probs[gram] = float(prob)
        self.found[self.order] += 1
        if backoff:
            self.backoffs[gram] = float(backoff[0])


def _sizes(counts: Mapping[int, int]) -> str:
    return ", ".join(f"{count} {n}-grams" for n, count in sorted(counts.items()))
