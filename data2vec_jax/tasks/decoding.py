"""From the outputs of a CTC model to labels: best path, and beam search with a language model.

B batch, T frames, V labels. The score of labels y is, in natural logarithms except for the language
model's log10 (so that weights mean the same as with KenLM; conversion spec 1.5),

    log P_ctc(y) + lm_weight * log10 P_lm(y) + word_score * (number of words),

where P_ctc sums over all alignments (prefix beam search, Hannun et al. 2014, arXiv 1408.2873).
"""

import bisect
import math
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from data2vec_jax.core.errors import UserError
from data2vec_jax.data.characters import BLANK, Characters
from data2vec_jax.tasks.ngrams import END, START, Gram, Ngrams
from data2vec_jax.tasks.scores import wer

NEVER = float("-inf")


def greedy(logits: np.ndarray, lengths: Sequence[int] | None = None) -> list[list[int]]:
    """Labels of the best path of each row: repeats merged, then blanks dropped.

    logits [B, T, V]; lengths [B]: valid frames, None for all.
    """
    paths = np.argmax(logits, axis=-1)
    found = []
    for row, path in enumerate(paths):
        path = path if lengths is None else path[: lengths[row]]
        changes = np.append(True, path[1:] != path[:-1])[: len(path)]
        found.append([int(c) for c in path[changes] if c != BLANK])
    return found


class State(NamedTuple):
    """State of a scorer: the language model's history, and the letters of the unfinished word."""

    history: Gram
    partial: str = ""


class Scorer:
    """The part of a hypothesis's score beside P_ctc: language model, word score, lexicon.

    Args:
      characters: names of the labels.
      model: of words, or with unit='character' of characters (words end in `|`); None for none.
      lm_weight: factor of log10 P_lm.
      word_score: added for each word.
      lexicon: the words allowed; None for any.
      unit: of the model, 'word' or 'character'.
    """

    def __init__(
        self,
        characters: Characters,
        model: Ngrams | None = None,
        *,
        lm_weight: float = 2.0,
        word_score: float = -1.0,
        lexicon: Iterable[str] | None = None,
        unit: str = "word",
    ):
        if unit not in ("word", "character"):
            raise UserError(f"unit '{unit}' of a language model; choose from word, character")
        self.characters, self.model, self.unit = characters, model, unit
        self.lm_weight, self.word_score = lm_weight, word_score
        self.lexicon = None if lexicon is None else sorted(set(lexicon))
        if self.lexicon == []:
            raise UserError("a lexicon without words allows no transcript")
        self.start = State((START,))

    def _lm(self, history: Gram, unit: str) -> tuple[Gram, float]:
        if self.model is None:
            return history, 0.0
        gain = self.lm_weight * self.model.score(history, unit)
        return self.model.extend(history, unit), gain

    def _word(self, state: State) -> tuple[State, float] | None:
        """State and gain after the unfinished word ends; None if it is not in the lexicon."""
        history, gain = state.history, self.word_score
        if self.lexicon is not None and not self._listed(state.partial, whole=True):
            return None
        if self.unit == "word":
            history, added = self._lm(history, state.partial)
            gain += added
        return State(history), gain

    def _listed(self, text: str, whole: bool) -> bool:
        """Whether a word of the lexicon is, or begins with, `text`."""
        i = bisect.bisect_left(self.lexicon, text)
        if i == len(self.lexicon):
            return False
        return self.lexicon[i] == text if whole else self.lexicon[i].startswith(text)

    def extend(self, state: State, label: int) -> tuple[State, float] | None:
        """State and gain after one more label; None if no word of the lexicon begins so."""
        gain = 0.0
        name = self.characters.names[label]
        if label == self.characters.space:
            if state.partial:
                found = self._word(state)
                if found is None:
                    return None
                state, gain = found
        elif len(name) > 1:
            return None  # <s>, <unk> and the like are never spoken
        else:
            state = State(state.history, state.partial + name)
            if self.lexicon is not None and not self._listed(state.partial, whole=False):
                return None
        if self.unit == "character":
            history, added = self._lm(state.history, name)
            state, gain = State(history, state.partial), gain + added
        return state, gain

    def finish(self, state: State) -> float:
        """Gain of the last word and of the end of the sentence; -inf if the word is not allowed."""
        gain = 0.0
        if state.partial:
            found = self._word(state)
            if found is None:
                return NEVER
            state, gain = found
        return gain + self._lm(state.history, END)[1]


class Hypothesis(NamedTuple):
    """score: see the top of this file. labels: of the characters, without blanks."""

    score: float
    labels: list[int]


class _Prefix:
    """A sequence of labels as a node of a tree, hashed by identity: a tuple costs its length."""

    __slots__ = ("children", "gain", "last", "parent", "state")

    def __init__(self, parent: Any, last: int, state: State, gain: float):
        self.parent, self.last, self.state, self.gain = parent, last, state, gain
        self.children: dict[int, Any] = {}

    def child(self, label: int, scorer: Scorer) -> Any:
        """The prefix with one more label; None if the scorer does not allow it."""
        if label not in self.children:
            found = scorer.extend(self.state, label)
            self.children[label] = found and _Prefix(self, label, found[0], self.gain + found[1])
        return self.children[label]

    def labels(self) -> list[int]:
        found, node = [], self
        while node.parent is not None:
            found.append(node.last)
            node = node.parent
        return found[::-1]


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """In float64, over the last axis."""
    x = np.asarray(logits, np.float64)
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def beam_search(
    logits: np.ndarray, scorer: Scorer, *, beam: int = 50, margin: float = 10.0, best: int = 1
) -> list[Hypothesis]:
    """The `best` hypotheses of one utterance, best first; logits [T, V] of its valid frames.

    beam: prefixes kept after each frame. margin: labels of a frame that are e^margin times less
    likely than its best are not tried. With a lexicon the list is empty if no words fit.
    """
    log_probs = log_softmax(logits)
    root = _Prefix(None, -1, scorer.start, 0.0)
    beams = {root: (0.0, NEVER)}  # log P of the alignments that end in a blank, and of the others
    for frame in log_probs:
        tried = [int(c) for c in np.flatnonzero(frame >= frame.max() - margin) if c != BLANK]
        frame = frame.tolist()
        blanks: dict[_Prefix, float] = {}
        others: dict[_Prefix, float] = {}
        for prefix, (blank, other) in beams.items():
            either = add(blank, other)
            blanks[prefix] = either + frame[BLANK]
            if prefix.last >= 0:  # the last label goes on
                others[prefix] = add(others.get(prefix, NEVER), other + frame[prefix.last])
            for label in tried:
                # An equal label is a new one only after a blank.
                before = blank if label == prefix.last else either
                longer = prefix.child(label, scorer) if before > NEVER else None
                if longer is not None:
                    others[longer] = add(others.get(longer, NEVER), before + frame[label])
        merged = {p: (blanks.get(p, NEVER), others.get(p, NEVER)) for p in {**blanks, **others}}
        ranked = sorted(merged, key=lambda p: -(add(*merged[p]) + p.gain))
        beams = {prefix: merged[prefix] for prefix in ranked[:beam]}
    ends = {p: add(*pair) + p.gain + scorer.finish(p.state) for p, pair in beams.items()}
    ranked = sorted((p for p in ends if ends[p] > NEVER), key=lambda p: -ends[p])
    return [Hypothesis(ends[p], p.labels()) for p in ranked[:best]]


def add(a: float, b: float) -> float:
    """log(e^a + e^b)."""
    if a < b:
        a, b = b, a
    return a if b == NEVER else a + math.log1p(math.exp(b - a))


def tune(
    logits: Sequence[np.ndarray],
    references: Sequence[str],
    characters: Characters,
    model: Ngrams,
    lm_weights: Sequence[float],
    word_scores: Sequence[float],
    *,
    search: Callable[..., list[Hypothesis]] = beam_search,
    **options: Any,
) -> tuple[float, float, float]:
    """(word error rate, lm_weight, word_score): the best pair of a grid on a development set.

    logits: [T, V] of each utterance. options: of `Scorer`. Of equally good pairs the first wins.
    """
    found = []
    for lm_weight in lm_weights:
        for word_score in word_scores:
            scorer = Scorer(
                characters, model, lm_weight=lm_weight, word_score=word_score, **options
            )
            texts = [transcript(search(x, scorer), characters) for x in logits]
            found.append((wer(references, texts), lm_weight, word_score))
    return min(found, key=lambda entry: entry[0])


def transcript(hypotheses: Sequence[Hypothesis], characters: Characters) -> str:
    """Words of the best hypothesis; empty if there is none."""
    return characters.decode(hypotheses[0].labels) if hypotheses else ""


def read_lexicon(path: str, characters: Characters) -> list[str]:
    """Words of a lexicon with lines `WORD<TAB>W O R D |`, each spelled by its own characters.

    Raises UserError: no such file, no words, another spelling, a character without a label.
    """
    words = []
    try:
        with open(os.path.expanduser(path), encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                word, *spelling = line.split()
                if spelling and spelling != [*word, characters.names[characters.space]]:
                    raise UserError(
                        f"{path}:{number}: '{word}' is spelled '{' '.join(spelling)}'; "
                        f"only '{' '.join(word)} |' is supported"
                    )
                if not set(word) <= set(characters.names):
                    raise UserError(f"{path}:{number}: '{word}' has characters without a label")
                words.append(word)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: unreadable lexicon ({error})") from error
    if not words:
        raise UserError(f"{path}: has no words")
    return words
