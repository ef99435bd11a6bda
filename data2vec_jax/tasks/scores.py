"""Scores of predictions in plain numpy: the metrics of the papers' tables.

N examples, C classes. Each score covers a whole set and is a float; shares are between 0 and 1, not
per cent. The definitions, corner cases included, are those of jiwer, scikit-learn, scipy and the
rules of SQuAD 1.1 (conversion spec 1.5, 1.7, 3.1, 3.3).
"""

import collections
import re
import string
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from data2vec_jax.core.errors import UserError

# Transcripts ------------------------------------------------------------------------------------


def edits(reference: Sequence[Any], guess: Sequence[Any]) -> int:
    """Levenshtein distance: the fewest substitutions, deletions and insertions (cost 1 each)."""
    ids: dict[Any, int] = {}
    one, two = (
        np.array([ids.setdefault(x, len(ids)) for x in row], np.int64) for row in (reference, guess)
    )
    columns = np.arange(len(two) + 1)
    row = columns  # distances from the empty reference
    for i, unit in enumerate(one, 1):
        best = np.empty_like(row)
        best[0] = i
        best[1:] = np.minimum(row[:-1] + (two != unit), row[1:] + 1)
        # Insertions: best[j] = min over k <= j of best[k] + (j - k).
        row = np.minimum.accumulate(best - columns) + columns
    return int(row[-1])


def error_rate(references: Sequence[Sequence[Any]], guesses: Sequence[Sequence[Any]]) -> float:
    """Edits of all N rows over the length of all references.

    The number of insertions if all references are empty, as in jiwer.
    """
    check_count(references, guesses)
    total = sum(edits(*pair) for pair in zip(references, guesses, strict=True))
    return total / (sum(map(len, references)) or 1)


def wer(references: Sequence[str], guesses: Sequence[str]) -> float:
    """Word error rate of N transcripts, of the whole corpus (not the mean over transcripts)."""
    return error_rate(*([line.split() for line in lines] for lines in (references, guesses)))


def cer(references: Sequence[str], guesses: Sequence[str]) -> float:
    """Character error rate of N transcripts, of the whole corpus; spaces inside count."""
    return error_rate(*([line.strip() for line in lines] for lines in (references, guesses)))


# Classes ----------------------------------------------------------------------------------------


def accuracy(labels: Sequence[Any], guesses: Sequence[Any]) -> float:
    """Share of the N guesses that are right."""
    labels, guesses = arrays(labels, guesses)
    return float(np.mean(labels == guesses))


def top_accuracy(labels: Sequence[int], logits: np.ndarray, k: int = 5) -> float:
    """Share of the N labels among the k classes with the highest `logits` [N, C].

    Of equal logits the lower class comes first, as in `argmax`.
    """
    labels, logits = arrays(labels, logits)
    best = np.argsort(-logits, axis=1, kind="stable")[:, :k]
    return float(np.mean(np.any(best == labels[:, None], axis=1)))


def f1(labels: Sequence[Any], guesses: Sequence[Any], positive: Any = 1) -> float:
    """F1 of the class `positive`; 0 if it is neither among the labels nor the guesses."""
    labels, guesses = arrays(labels, guesses)
    labels, guesses = labels == positive, guesses == positive
    return float(2 * np.sum(labels & guesses) / (np.sum(labels) + np.sum(guesses) or 1))


def macro_f1(labels: Sequence[Any], guesses: Sequence[Any]) -> float:
    """Mean F1 over the classes that occur in labels or guesses."""
    labels, guesses = arrays(labels, guesses)
    classes = np.union1d(labels, guesses)
    return float(np.mean([f1(labels, guesses, c) for c in classes]))


def matthews(labels: Sequence[Any], guesses: Sequence[Any]) -> float:
    """Matthews' correlation of N labels of any number of classes; 0 if either is constant.

    The correlation of the indicators of the classes, summed over them (Gorodkin 2004).
    """
    labels, guesses = arrays(labels, guesses)
    classes = np.union1d(labels, guesses)
    one, two = (x[:, None] == classes for x in (labels, guesses))  # [N, C]
    one, two = one - one.mean(0), two - two.mean(0)
    together, alone = np.sum(one * two), np.sum(one * one) * np.sum(two * two)
    return float(together / np.sqrt(alone)) if alone > 0 else 0.0


def average_precision(labels: np.ndarray, scores: np.ndarray) -> float:
    """Mean of precision over recall for one class: labels bool [N], scores [N].

    The sum over thresholds of (gain in recall) x precision; equal scores are one threshold. NaN
    without a positive label.
    """
    labels, scores = arrays(labels, scores)
    order = np.argsort(-scores, kind="stable")
    hits, sorted_scores = np.cumsum(labels[order] != 0), scores[order]
    last = np.flatnonzero(np.append(sorted_scores[1:] != sorted_scores[:-1], True))
    hits = hits[last]
    if not hits[-1]:
        return float("nan")
    gains = np.diff(hits, prepend=0) / hits[-1]
    return float(np.sum(gains * hits / (last + 1)))


def mean_average_precision(labels: np.ndarray, scores: np.ndarray) -> float:
    """mAP: mean of `average_precision` over classes; labels bool [N, C], scores [N, C].

    Classes without a positive label are left out.
    """
    labels, scores = arrays(labels, scores)
    parts = [average_precision(labels[:, c], scores[:, c]) for c in range(labels.shape[1])]
    parts = [part for part in parts if not np.isnan(part)]
    return float(np.mean(parts)) if parts else float("nan")


# Numbers ----------------------------------------------------------------------------------------


def pearson(labels: Sequence[float], guesses: Sequence[float]) -> float:
    """Linear correlation of N pairs; NaN if either side is constant."""
    one, two = (np.asarray(x, np.float64) for x in arrays(labels, guesses))
    if np.ptp(one) == 0 or np.ptp(two) == 0:
        return float("nan")
    one, two = one - one.mean(), two - two.mean()
    value = np.sum(one / np.linalg.norm(one) * (two / np.linalg.norm(two)))
    return float(np.clip(value, -1.0, 1.0))


def ranks(values: Sequence[float]) -> np.ndarray:
    """Ranks from 1, float [N]; equal values share the mean of theirs."""
    _, index, counts = np.unique(np.asarray(values), return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return (ends - (counts - 1) / 2.0)[index]


def spearman(labels: Sequence[float], guesses: Sequence[float]) -> float:
    """Correlation of the ranks of N pairs; NaN if either side is constant."""
    return pearson(ranks(labels), ranks(guesses))


# Answers ----------------------------------------------------------------------------------------

ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalise_answer(text: str) -> str:
    """Lower case; without ASCII punctuation, then without a, an, the; single spaces."""
    return " ".join(ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split())


def answer_exact(guess: str, answer: str) -> float:
    """1 if the two are equal once normalised, else 0."""
    return float(normalise_answer(guess) == normalise_answer(answer))


def answer_f1(guess: str, answer: str) -> float:
    """F1 of the two multisets of words; 0 without a common word, also if both are empty."""
    words = [collections.Counter(normalise_answer(text).split()) for text in (guess, answer)]
    common = (words[0] & words[1]).total()
    return 2.0 * common / (words[0].total() + words[1].total()) if common else 0.0


def squad(guesses: Mapping[str, str], answers: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """SQuAD 1.1: {'exact', 'f1'}, the best over a question's answers, mean over questions.

    guesses, answers: by the question's id. A question without a guess counts as 0. Raises
    UserError: a question without answers, or no questions.
    """
    if not answers:
        raise UserError("no questions to score")
    exact = total = 0.0
    for name, right in answers.items():
        if not right:
            raise UserError(f"question '{name}' has no answer to compare with")
        if name in guesses:
            exact += max(answer_exact(guesses[name], answer) for answer in right)
            total += max(answer_f1(guesses[name], answer) for answer in right)
    return {"exact": exact / len(answers), "f1": total / len(answers)}


# By name ----------------------------------------------------------------------------------------

BY_NAME: Mapping[str, Callable[[Any, Any], float]] = {
    "accuracy": accuracy,
    "f1": f1,
    "macro_f1": macro_f1,
    "matthews": matthews,
    "pearson": pearson,
    "spearman": spearman,
    "mean_average_precision": mean_average_precision,
    "wer": wer,
    "cer": cer,
}


def check_count(labels: Sequence[Any], guesses: Sequence[Any]) -> None:
    """Raises UserError unless both have the same number N > 0 of rows."""
    if len(labels) != len(guesses) or not len(labels):
        raise UserError(f"{len(labels)} labels and {len(guesses)} guesses cannot be compared")


def arrays(labels: Any, guesses: Any) -> tuple[np.ndarray, np.ndarray]:
    """Both as arrays, after `check_count`."""
    check_count(labels, guesses)
    return np.asarray(labels), np.asarray(guesses)
