"""Decoding against exhaustive search: every path of a few frames, with every part of the score."""

import collections
import itertools

import numpy as np
import pytest

from data2vec_jax.core.errors import UserError
from data2vec_jax.data.characters import (
    LIBRISPEECH,
    Characters,
    from_transcripts,
)
from data2vec_jax.tasks import decoding, ngrams

NAMES = Characters(["<pad>", "|", "a", "b"])
WORDS = ngrams.train([["a", "b"], ["a", "ab"], ["b", "a"], ["ab"], ["a"]], 3)
LETTERS = ngrams.train([list(f"{'|'.join(s)}|") for s in (["a", "b"], ["ab", "a"], ["b"])], 3)


def emissions(seed, frames=5, labels=4, scale=2.0):
    return np.random.default_rng(seed).normal(size=(frames, labels)) * scale


def collapse(path):
    merged = [c for c, _ in itertools.groupby(path)]
    return tuple(c for c in merged if c != 0)


def total_probabilities(logits):
    """log P_ctc of every sequence of labels, from every path."""
    logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    found = collections.defaultdict(lambda: -np.inf)
    for path in itertools.product(range(logits.shape[1]), repeat=len(logits)):
        y = collapse(path)
        found[y] = np.logaddexp(
            found[y], sum(frame[c] for frame, c in zip(logs, path, strict=True))
        )
    return found


def earned(y, model, unit, lm_weight, word_score, lexicon):
    """What labels earn beside P_ctc, from their text alone; -inf if a word is not listed."""
    text = "".join(NAMES.names[c] for c in y)
    words = [w for w in text.split("|") if w]
    if lexicon is not None and not set(words) <= set(lexicon):
        return -np.inf
    units = words if unit == "word" else list(text)
    lm = 0.0 if model is None else model.sentence(units)
    return lm_weight * lm + word_score * len(words)


CASES = [
    dict(model=None, unit="word", lm_weight=0.0, word_score=0.0, lexicon=None),
    dict(model=None, unit="word", lm_weight=0.0, word_score=1.5, lexicon=None),
    dict(model=WORDS, unit="word", lm_weight=2.0, word_score=-1.0, lexicon=None),
    dict(model=WORDS, unit="word", lm_weight=0.7, word_score=2.0, lexicon=["a", "ab", "b"]),
    dict(model=WORDS, unit="word", lm_weight=1.0, word_score=0.5, lexicon=["ab", "ba"]),
    dict(model=LETTERS, unit="character", lm_weight=1.3, word_score=0.2, lexicon=None),
    dict(model=LETTERS, unit="character", lm_weight=0.5, word_score=0.0, lexicon=["a", "aab"]),
]


@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
@pytest.mark.parametrize("seed", range(6))
def test_beam_search_equals_exhaustive_search(seed, case):
    logits = emissions(seed)
    wanted = {y: p + earned(y, **case) for y, p in total_probabilities(logits).items()}
    ranked = sorted((y for y in wanted if wanted[y] > -np.inf), key=lambda y: -wanted[y])
    model, options = case["model"], {k: v for k, v in case.items() if k != "model"}
    scorer = decoding.Scorer(NAMES, model, **options)
    found = decoding.beam_search(logits, scorer, beam=10_000, margin=np.inf, best=10_000)
    assert [tuple(h.labels) for h in found[:20]] == ranked[:20]
    assert len(found) == len(ranked)
    for hypothesis in found:
        assert hypothesis.score == pytest.approx(wanted[tuple(hypothesis.labels)], abs=1e-9)


@pytest.mark.parametrize("seed", range(6))
def test_a_narrow_beam_finds_the_best_of_clear_emissions(seed):
    logits = emissions(seed, frames=6, scale=6.0)
    wanted = {y: p + earned(y, **CASES[2]) for y, p in total_probabilities(logits).items()}
    scorer = decoding.Scorer(NAMES, WORDS, lm_weight=2.0, word_score=-1.0)
    (found,) = decoding.beam_search(logits, scorer, beam=20)
    assert tuple(found.labels) == max(wanted, key=wanted.get)
    assert found.score <= wanted[tuple(found.labels)] + 1e-9  # a beam never adds probability


@pytest.mark.parametrize("seed", range(6))
def test_greedy_is_the_collapsed_best_path(seed):
    logits = np.stack([emissions(seed, 7), emissions(seed + 100, 7)])
    for lengths in (None, [7, 4], [0, 1]):
        paths = [logits[i, : None if lengths is None else lengths[i]].argmax(-1) for i in range(2)]
        found = decoding.greedy(logits, lengths)
        assert [tuple(row) for row in found] == [collapse(path) for path in paths]


def test_greedy_by_hand():
    path = [0, 2, 2, 0, 2, 1, 1, 3, 0, 1]
    assert decoding.greedy(np.eye(4)[None, path]) == [[2, 2, 1, 3, 1]]
    assert NAMES.decode([2, 2, 1, 3, 1]) == "aa b"


def test_word_score_and_weight_change_the_words():
    # Frames say "a b" and "ab" alike: the model knows which of the two is likely.
    logits = np.log(np.array([[0.1, 0.1, 0.7, 0.1], [0.5, 0.5, 0, 0], [0.1, 0.1, 0.1, 0.7]]) + 1e-9)
    search = lambda **options: decoding.transcript(  # noqa: E731
        decoding.beam_search(logits, decoding.Scorer(NAMES, **options)), NAMES
    )
    assert search(word_score=1.0) == "a b"
    assert search(word_score=-1.0) == "ab"
    apart = ngrams.train([["a", "b"]] * 9, 2)
    assert search(model=apart, lm_weight=2.0, word_score=0.0) == "a b"
    together = ngrams.train([["ab"]] * 9, 2)
    assert search(model=together, lm_weight=2.0, word_score=0.0) == "ab"
    assert search(lexicon=["a", "b"], word_score=0.0) == "a b"
    assert search(lexicon=["bb"], word_score=0.0) in ("", "bb")


def test_tuning_finds_the_pair_that_makes_fewest_errors():
    logits = [emissions(seed, 12) for seed in range(8)]
    goal = decoding.Scorer(NAMES, WORDS, lm_weight=1.5, word_score=1.0)
    texts = [decoding.transcript(decoding.beam_search(x, goal), NAMES) for x in logits]
    found = decoding.tune(logits, texts, NAMES, WORDS, [0.0, 1.5], [-1.0, 1.0])
    assert found == (0.0, 1.5, 1.0)


# Characters -------------------------------------------------------------------------------------


def test_librispeech_characters():
    names = Characters()
    assert len(names) == 32 and names.names == LIBRISPEECH
    assert "".join(names.names[i] for i in names.encode("A B'S")) == "A|B'S|"
    assert names.decode(names.encode(" IT'S  THE\tEND ")) == "IT'S THE END"
    assert names.encode("") == [] and names.decode([]) == ""
    assert names.encode("é") == [3, 4]  # <unk> |
    assert names.decode([1, 2, 3, 7, 4]) == "A"


def test_characters_of_transcripts_and_files(tmp_path):
    names = from_transcripts(["дом да", "да"])
    assert names.names == ("<pad>", "<s>", "</s>", "<unk>", "|", "д", "а", "м", "о")
    names.save(tmp_path / "vocab.json")
    assert Characters.load(tmp_path / "vocab.json").names == names.names
    (tmp_path / "bad.json").write_text('{"a": 1, "|": 3}')
    for path in ("bad.json", "missing.json"):
        with pytest.raises(UserError, match=path):
            Characters.load(tmp_path / path)
    with pytest.raises(UserError, match="'z' is not among the characters"):
        NAMES.encode("za")
    with pytest.raises(UserError, match="among them"):
        Characters(["<pad>", "a"])


def test_lexicon_files(tmp_path):
    path = tmp_path / "lexicon.txt"
    path.write_text("ab\ta b |\nba\n\nab\ta b |\n")
    assert decoding.read_lexicon(str(path), NAMES) == ["ab", "ba", "ab"]
    for text, message in (
        ("ab\ta b b |\n", "spelled"),
        ("abz\n", "without a label"),
        ("", "has no words"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            decoding.read_lexicon(str(path), NAMES)
    with pytest.raises(UserError, match="unreadable"):
        decoding.read_lexicon(str(tmp_path / "none"), NAMES)
    with pytest.raises(UserError, match="choose from word, character"):
        decoding.Scorer(NAMES, unit="letter")
    with pytest.raises(UserError, match="without words"):
        decoding.Scorer(NAMES, lexicon=[])
