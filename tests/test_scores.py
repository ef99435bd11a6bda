"""Scores against jiwer, scikit-learn, scipy, and the rules of SQuAD written out."""

import re
import string
import warnings

import jiwer
import numpy as np
import pytest
import scipy.stats
import sklearn.metrics

from data2vec_jax.core.errors import UserError
from data2vec_jax.tasks import scores

SEEDS = range(20)


def transcripts(rng, count=6):
    """Pairs of lines, some empty, with a small vocabulary so that words agree by chance."""
    words = ["a", "bb", "c'd", "é", "ффф", "a"]
    line = lambda: " ".join(rng.choice(words, rng.integers(0, 9)))  # noqa: E731
    return [line() for _ in range(count)], [line() for _ in range(count)]


@pytest.mark.parametrize("seed", SEEDS)
def test_error_rates_equal_jiwer(seed):
    references, guesses = transcripts(np.random.default_rng(seed))
    assert scores.wer(references, guesses) == pytest.approx(jiwer.wer(references, guesses), 1e-12)
    assert scores.cer(references, guesses) == pytest.approx(jiwer.cer(references, guesses), 1e-12)


def test_error_rates_of_empty_lines():
    assert scores.wer(["a b", ""], ["a b", ""]) == 0
    assert scores.wer(["a b", "c"], ["", ""]) == 1  # empty guesses: all deletions
    assert scores.wer(["a b", ""], ["a b", "x y z"]) == 1.5  # insertions beside an empty reference
    assert scores.wer([""], ["x y"]) == jiwer.wer([""], ["x y"]) == 2
    assert scores.wer([""], [""]) == jiwer.wer([""], [""]) == 0
    assert scores.wer(["a b c d", "e"], ["a b c d", "x"]) == 0.2  # of the corpus, not a mean
    assert scores.cer(["ab cd"], [" abcd "]) == 0.2  # the space inside counts, those outside don't


@pytest.mark.parametrize("seed", SEEDS)
def test_edits_by_recursion(seed):
    rng = np.random.default_rng(seed)
    one, two = ("".join(rng.choice(list("abc"), rng.integers(0, 6))) for _ in range(2))

    def distance(x, y):
        if not x or not y:
            return len(x) + len(y)
        change = distance(x[1:], y[1:]) + (x[0] != y[0])
        return min(change, distance(x[1:], y) + 1, distance(x, y[1:]) + 1)

    assert scores.edits(one, two) == distance(one, two)


@pytest.mark.parametrize("classes", [1, 2, 4])
@pytest.mark.parametrize("seed", SEEDS)
def test_classes_equal_scikit_learn(seed, classes):
    rng = np.random.default_rng(seed)
    labels, guesses = rng.integers(0, classes, (2, rng.integers(1, 12)))
    theirs = sklearn.metrics
    close = lambda x: pytest.approx(x, rel=1e-9, abs=1e-12)  # noqa: E731
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert scores.accuracy(labels, guesses) == close(theirs.accuracy_score(labels, guesses))
        assert scores.matthews(labels, guesses) == close(theirs.matthews_corrcoef(labels, guesses))
        macro = theirs.f1_score(labels, guesses, average="macro")
        assert scores.macro_f1(labels, guesses) == close(macro)
        for c in range(classes):
            one = theirs.f1_score(labels == c, guesses == c, zero_division=0)
            assert scores.f1(labels, guesses, c) == close(one)


@pytest.mark.parametrize("levels", [3, 1000])
@pytest.mark.parametrize("seed", SEEDS)
def test_mean_average_precision_with_ties(seed, levels):
    rng = np.random.default_rng(seed)
    labels = rng.random((30, 4)) < 0.3
    labels[0] = True
    values = rng.integers(0, levels, labels.shape) / levels
    theirs = sklearn.metrics.average_precision_score(labels, values, average="macro")
    assert scores.mean_average_precision(labels, values) == pytest.approx(theirs, 1e-12)
    more = np.column_stack([labels, np.zeros(30, bool)])  # a class without a positive is left out
    values = np.column_stack([values, values[:, 0]])
    assert scores.mean_average_precision(more, values) == pytest.approx(theirs, 1e-12)


@pytest.mark.parametrize("seed", SEEDS)
def test_top_accuracy(seed):
    rng = np.random.default_rng(seed)
    labels, logits = rng.integers(0, 7, 20), rng.normal(size=(20, 7))
    theirs = sklearn.metrics.top_k_accuracy_score(labels, logits, k=3, labels=range(7))
    assert scores.top_accuracy(labels, logits, 3) == pytest.approx(theirs)
    tied = np.round(logits)
    assert scores.top_accuracy(labels, tied, 1) == np.mean(tied.argmax(1) == labels)


@pytest.mark.parametrize("levels", [3, 10**6])
@pytest.mark.parametrize("seed", SEEDS)
def test_correlations_equal_scipy(seed, levels):
    rng = np.random.default_rng(seed)
    labels, guesses = rng.integers(0, levels, (2, 15)) / 7
    one, two = scipy.stats.pearsonr(labels, guesses), scipy.stats.spearmanr(labels, guesses)
    assert scores.pearson(labels, guesses) == pytest.approx(one.statistic, abs=1e-12)
    assert scores.spearman(labels, guesses) == pytest.approx(two.statistic, abs=1e-12)
    np.testing.assert_array_equal(scores.ranks(labels), scipy.stats.rankdata(labels))
    shifted = scores.pearson(labels + 1e9, guesses * 1e-9)
    assert shifted == pytest.approx(one.statistic, abs=1e-5)
    assert np.isnan(scores.pearson(labels, np.ones(15)))
    assert np.isnan(scores.spearman(np.full(15, 0.1), guesses))


def squad_rules(guess, answers):
    """(exact, f1) of one question, written from the rules, one word at a time."""

    def clean(text):
        kept = "".join(c for c in text.lower() if c not in set(string.punctuation))
        return [w for w in re.sub(r"\b(a|an|the)\b", " ", kept).split() if w]

    best = [0.0, 0.0]
    for answer in answers:
        ours, theirs = clean(guess), clean(answer)
        left, common = list(theirs), 0
        for word in ours:
            if word in left:
                left.remove(word)
                common += 1
        f1 = 0.0
        if common:
            precision, recall = common / len(ours), common / len(theirs)
            f1 = 2 * precision * recall / (precision + recall)
        best = [max(best[0], float(" ".join(ours) == " ".join(theirs))), max(best[1], f1)]
    return best


@pytest.mark.parametrize("seed", SEEDS)
def test_squad_equals_its_rules(seed):
    rng = np.random.default_rng(seed)
    words = ["The", "a", "an", "cat", "Cat's", "cats", "—", "...", "!", "U.S.", "us", "é", " ", "’"]
    text = lambda: " ".join(rng.choice(words, rng.integers(0, 6)))  # noqa: E731
    answers = {str(i): [text() for _ in range(rng.integers(1, 4))] for i in range(12)}
    guesses = {name: text() for name in answers}
    wanted = np.mean([squad_rules(guesses[name], answers[name]) for name in answers], axis=0)
    found = scores.squad(guesses, answers)
    assert [found["exact"], found["f1"]] == pytest.approx(list(wanted), abs=1e-12)


def test_squad_by_hand():
    assert scores.normalise_answer("The  U.S.A., an apple!") == "usa apple"
    one = lambda guess, *answers: scores.squad({"q": guess}, {"q": answers})  # noqa: E731
    assert one("...", "!?") == {"exact": 1.0, "f1": 0.0}  # nothing is left of either: no overlap
    assert one("the", "cat") == {"exact": 0.0, "f1": 0.0}
    assert one("big big cat", "big cat", "dog")["f1"] == pytest.approx(0.8)
    assert scores.squad({}, {"q": ["x"]}) == {"exact": 0.0, "f1": 0.0}
    assert one("theatre a b", "theatre b")["exact"] == 1.0  # whole words only


def test_mistakes_are_one_line():
    for call in (
        lambda: scores.wer(["a"], []),
        lambda: scores.accuracy([], []),
        lambda: scores.squad({}, {}),
        lambda: scores.squad({"q": "x"}, {"q": []}),
    ):
        with pytest.raises(UserError) as error:
            call()
        assert "\n" not in str(error.value)
