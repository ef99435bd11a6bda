"""Examples that were not learned from: `bad_examples.jsonl` of a workdir; when they are too many.

A line is {"step": n, "example_id": i, "path": p, "reason": r}: in update n (0: at the start), the
example could not be read (r: 'damaged', 'sample rate', ...), or the whole update was not applied.
"""

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from data2vec_jax.core import distributed
from data2vec_jax.core.appended import AppendedFile
from data2vec_jax.core.errors import UserError

FILE = "bad_examples.jsonl"
KEY = "bad_examples"  # of a batch that stands in for some: the examples that it could not read
UPDATE = "update not applied"  # reason of examples that may be sound themselves
MAX_BAD_SHARE = 0.01
TOLD = 5  # lines at a time


class BadExample(NamedTuple):
    """An example that could not be read. message: the fault, in a line for the user."""

    step: int
    example_id: int
    path: str
    reason: str
    message: str = ""


def line_of(bad: BadExample) -> dict[str, Any]:
    """What the file holds of it."""
    return {k: v for k, v in bad._asdict().items() if k != "message"}


def pack(bad: Sequence[BadExample]) -> np.ndarray:
    """Bad examples as uint8 [n]: processes that read pass on nothing but arrays."""
    return np.frombuffer(json.dumps(bad).encode(), np.uint8)


def unpack(data: np.ndarray) -> list[BadExample]:
    """The inverse of `pack`."""
    return [BadExample(*fields) for fields in json.loads(bytes(data))]


class BadExamplesFile:
    """The file of a run, which is made with its first line. A disk that is full ends no run: lines
    wait in memory, see `AppendedFile`.

    resume_step: the file is cut back to it; 0 starts it anew.
    """

    def __init__(self, workdir: Path, resume_step: int = 0):
        self.path = workdir / FILE
        self._file: AppendedFile | None = None
        self._waiting = b""
        try:
            self.kept = read_lines(workdir, resume_step) if resume_step else []
            self.path.unlink(missing_ok=True)
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror}") from None
        self.append(self.kept)

    def append(self, lines: Iterable[Mapping[str, Any]] = ()) -> None:
        """Puts lines on disk, and those that wait."""
        self._waiting += b"".join(json.dumps(line).encode() + b"\n" for line in lines)
        if not self._waiting and not (self._file and self._file.problem):
            return
        try:
            self._file = self._file or AppendedFile(self.path)
        except OSError:
            return
        self._file.append(self._waiting)
        self._file.sync()
        self._waiting = b""


def read_lines(workdir: Path, up_to: int) -> list[dict[str, Any]]:
    """The whole lines of steps up to `up_to`; none if there is no file."""
    path, found = workdir / FILE, []
    for raw in path.read_bytes().splitlines() if path.exists() else ():
        try:
            line = json.loads(raw)
            one = BadExample(**line)
            hash(one)  # no field is a list
            if one.step <= up_to:
                found.append(line)
        except (ValueError, TypeError, RecursionError):
            continue  # a crash cut it short
    return found


class BadExamples:
    """Counts the bad examples of a run, each once, and writes them to its file.

    file: of the run; None on all processes but the first. size: examples of the corpus. max_share:
    of them, rounded up, that may be bad. tell: is called with lines for the user. With many
    processes the first one writes, and all learn of the others' at `meet`.
    """

    def __init__(
        self,
        file: BadExamplesFile | None,
        size: int,
        max_share: float,
        tell: Callable[[str], None] = lambda line: None,
    ):
        if not 0 <= max_share <= 1:
            raise UserError(f"config.data.max_bad_share: {max_share} is not a share from 0 to 1")
        self._file, self._size, self._max_share = file, size, max_share
        self._tell, self._place = tell, file.path if file else FILE
        self._allowed = math.ceil(round(max_share * size, 9))
        self._waiting: list[BadExample] = []
        kept = file.kept if file else []
        if jax.process_count() > 1:
            kept = json.loads(distributed.gather_texts(json.dumps(kept))[0])
        self._met = {  # (id, reason) -> what is said of it
            (line["example_id"], line["reason"]): line["path"]
            for line in kept
            if line["reason"] != UPDATE
        }

    def begin(self, bad: Sequence[BadExample]) -> None:
        """Takes those that are known from the start. Raises UserError: they are too many."""
        self.add(bad)
        self.meet()
        self.check()

    def add(self, bad: Sequence[BadExample]) -> None:
        """Takes those that this process met; tells the user of those that are new."""
        if jax.process_count() > 1:
            self._waiting += bad
        else:
            self._count(bad)

    def meet(self) -> None:
        """Brings together what `add` took, of all processes: call it at the same steps on all."""
        if jax.process_count() > 1:
            texts = distributed.gather_texts(json.dumps(self._waiting))
            self._waiting = []
            self._count([BadExample(*one) for text in texts for one in json.loads(text)])

    def _count(self, bad: Sequence[BadExample]) -> None:
        new: dict[tuple[int, str], BadExample] = {}
        for one in sorted(bad, key=lambda one: one.step):  # processes do not meet after each step
            if (key := (one.example_id, one.reason)) not in self._met:
                new.setdefault(key, one)
        self._met |= {key: one.message or one.path for key, one in new.items()}
        if self._file:  # also what waits
            self._file.append(map(line_of, new.values()))
        if new and self._file:
            for one in list(new.values())[:TOLD]:
                self._tell(f"left out: {one.message}")
            if len(new) > TOLD:
                self._tell(f"left out: {len(new) - TOLD:,} more, see {self._place}")

    @property
    def summary(self) -> str:
        """'3 of 400 examples were left out (damaged 2, empty 1; the first is PATH), see ...', or ''
        if none was."""
        count = len({example for example, _ in self._met})
        if not count:
            return ""
        reasons = Counter(reason for _, reason in self._met)
        words = ", ".join(f"{reason} {n}" for reason, n in sorted(reasons.items()))
        first = next(iter(self._met.values()))
        return (
            f"{count:,} of {self._size:,} examples were left out ({words}; the first is {first}), "
            f"see {self._place}"
        )

    @property
    def too_many(self) -> bool:
        """Whether the run must stop; all processes agree."""
        return len({example for example, _ in self._met}) > self._allowed

    def check(self) -> None:
        """Raises UserError if there are too many."""
        if self.too_many:
            raise UserError(
                f"{self.summary}; more than config.data.max_bad_share={self._max_share:g} allows: "
                "mend or remove them, or allow more"
            )
