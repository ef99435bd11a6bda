"""N-gram models: probabilities that sum to 1, Kneser-Ney by hand, KenLM's scores, ARPA files."""

import gzip
import json
import math
from pathlib import Path

import numpy as np
import pytest

from data2vec_jax import train_ngram
from data2vec_jax.core.errors import UserError
from data2vec_jax.data.characters import SPECIALS, Characters
from data2vec_jax.tasks import ngrams

GOLDENS = Path(__file__).parent / "goldens" / "ngrams"


def corpus(seed=0, count=40, units="abcdef"):
    """Sentences of a Markov chain, some empty: the next unit depends on the one before."""
    rng = np.random.default_rng(seed)
    chain = rng.dirichlet([0.5] * len(units), len(units))

    def sentence():
        found = [rng.integers(len(units))]
        for _ in range(rng.integers(0, 8)):
            found.append(rng.choice(len(units), p=chain[found[-1]]))
        return [units[i] for i in found[: rng.integers(0, 9)]]

    return [sentence() for _ in range(count)]


@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize("seed", [0, 1])
def test_probabilities_sum_to_one(order, seed):
    sentences = corpus(seed)
    model = ngrams.train(sentences, order)
    assert model.order == order
    units = sorted({u for s in sentences for u in s})
    everything = [*units, ngrams.END, ngrams.UNKNOWN]
    rng = np.random.default_rng(seed)
    histories = [(), (ngrams.START,), ("unheard", "of"), *model.backoffs]
    histories += [tuple(rng.choice(everything, 3)) for _ in range(20)]
    for history in histories:
        total = sum(10 ** model.score(history, unit) for unit in everything)
        assert total == pytest.approx(1, abs=1e-9), history


def test_kneser_ney_by_hand():
    # Bigrams of "a b", "a c", "b a": <s>a 2, ab, b</s>, ac, c</s>, <s>b, ba, a</s>: 1 each.
    model = ngrams.train([["a", "b"], ["a", "c"], ["b", "a"]], 2)
    # Too few counts for estimated discounts: 0.5, 1, 1.5. Units before a: <s>, b: 2; before b: a,
    # <s>: 2; before c: a: 1; before </s>: b, c, a: 3. Of 8; freed: 1 + 1 + 0.5 + 1.5 = 4 of 8.
    uniform = 1 / 5  # a, b, c, </s>, <unk>
    unigram = {"a": 1 / 8, "b": 1 / 8, "c": 0.5 / 8, ngrams.END: 1.5 / 8, ngrams.UNKNOWN: 0}
    unigram = {unit: value + 4 / 8 * uniform for unit, value in unigram.items()}
    for unit, value in unigram.items():
        assert 10 ** model.score((), unit) == pytest.approx(value)
    # After a: b, c, </s>, once each: 0.5 of each is freed, 1.5 of 3.
    assert 10 ** model.score(("a",), "b") == pytest.approx(0.5 / 3 + 0.5 * unigram["b"])
    assert 10 ** model.score(("a",), "a") == pytest.approx(0.5 * unigram["a"])  # backs off
    # After <s>: a twice (1 freed), b once (0.5 freed), so 1.5 of 3.
    start = (ngrams.START,)
    assert 10 ** model.score(start, "a") == pytest.approx(1 / 3 + 0.5 * unigram["a"])
    whole = model.score(start, "a") + model.score(("a",), "b") + model.score(("b",), ngrams.END)
    assert model.sentence(["a", "b"]) == pytest.approx(whole)


def test_discounts():
    # n1..n4 = 8, 4, 2, 1: Y = 1/2; D = 1 - 2Y/2, 2 - 3Y/2, 3 - 4Y/2.
    counts = [1] * 8 + [2] * 4 + [3] * 2 + [4]
    assert ngrams.discounts(counts) == pytest.approx((0, 0.5, 1.25, 2.0))
    assert ngrams.discounts([1, 2, 2]) == (0.0, 0.5, 1.0, 1.5)


def test_longer_models_predict_better():
    train, test = corpus(3, 800), corpus(3, 1000)[800:]
    values = [ngrams.perplexity(ngrams.train(train, n), test) for n in (1, 2)]
    assert values[1] < 0.9 * values[0]


@pytest.mark.parametrize("name", ["model.arpa", "model.arpa.gz"])
def test_arpa_round_trip(tmp_path, name):
    model = ngrams.train(corpus(units="aбc'é♥"), 3)
    ngrams.write_arpa(model, tmp_path / name)
    again = ngrams.read_arpa(tmp_path / name)
    assert again.probs == pytest.approx(model.probs, abs=1e-7)
    assert again.backoffs == pytest.approx(model.backoffs, abs=1e-7)


def test_scores_equal_kenlm():
    """model.arpa was written by `write_arpa`, scores.json by KenLM 0.3.0 from that file."""
    model = ngrams.read_arpa(GOLDENS / "model.arpa")
    cases = json.loads((GOLDENS / "scores.json").read_text(encoding="utf-8"))
    assert len(cases) > 50
    for case in cases:
        units = case["sentence"].split()
        assert model.sentence(units) == pytest.approx(case["score"], abs=2e-5)
        history = (ngrams.START,)
        for unit, wanted in zip([*units, ngrams.END], case["each"], strict=True):
            assert model.score(history, unit) == pytest.approx(wanted, abs=1e-5)
            history = model.extend(history, unit)


def test_unknown_units_without_unk():
    model = ngrams.Ngrams({("a",): -0.3, ("</s>",): -0.3, ("<s>",): -99.0}, {})
    assert model.score((), "zzz") == ngrams.NO_UNKNOWN
    assert "zzz" not in model and "a" in model


WHOLE = "\\data\\\nngram 1=2\n\n\\1-grams:\n-0.3\ta\n-0.3\t</s>\n\n\\end\\\n"


@pytest.mark.parametrize(
    "text, message",
    [
        (WHOLE.replace("\\end\\", ""), "no \\end\\"),
        (WHOLE.replace("1=2", "1=3"), "announces 3 1-grams, has 2 1-grams"),
        (WHOLE.replace("-0.3\ta", "x\ta"), ":5: not an ARPA file"),
        (WHOLE.replace("-0.3\ta", "-0.3\ta -1 -1"), "not a 1-gram"),
        ("", "announces no n-grams"),
    ],
)
def test_damaged_files_are_named(tmp_path, text, message):
    (tmp_path / "x.arpa").write_text(text)
    with pytest.raises(UserError, match=r"x\.arpa") as error:
        ngrams.read_arpa(tmp_path / "x.arpa")
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text",
    [
        "\ufeff" + WHOLE,
        WHOLE.replace("1=2", "1=2\nngram 2=0").replace("\\end", "\\2-grams:\n\n\\end"),
    ],
)
def test_a_byte_order_mark_and_an_empty_section_are_read(tmp_path, text):
    (tmp_path / "x.arpa").write_text(text, encoding="utf-8")
    assert ngrams.read_arpa(tmp_path / "x.arpa").probs == {("a",): -0.3, ("</s>",): -0.3}


def test_unk_of_srilm(tmp_path):
    (tmp_path / "x.arpa").write_text(WHOLE.replace("-0.3\ta", "-1.5\t<UNK>"))
    assert ngrams.read_arpa(tmp_path / "x.arpa").score((), "zzz") == -1.5


def test_damaged_gzip_is_named(tmp_path):
    damaged = bytearray(gzip.compress(WHOLE.encode()))
    damaged[10] = 0xFF  # a kind of block that there is not
    (tmp_path / "x.arpa.gz").write_bytes(damaged)
    with pytest.raises(UserError, match=r"x\.arpa\.gz:0: not an ARPA file"):
        ngrams.read_arpa(tmp_path / "x.arpa.gz")


def test_mistakes():
    with pytest.raises(UserError, match="no such file"):
        ngrams.read_arpa("nowhere.arpa")
    with pytest.raises(UserError, match="no sentences"):
        ngrams.train([], 2)
    with pytest.raises(UserError, match="order 0"):
        ngrams.train([["a"]], 0)
    for unit in ("a b", "", "<s>", "</s>", "<unk>"):
        with pytest.raises(UserError, match="cannot have the unit"):
            ngrams.train([["a", unit]], 2)
    assert math.isfinite(ngrams.train([[]], 3).sentence([]))  # only empty sentences


def test_the_command_writes_a_model_of_text_in_the_characters_of_a_run(tmp_path, capsys):
    Characters((*SPECIALS, "|", *"ABCÄ")).save(tmp_path / "vocab.json")
    (tmp_path / "text.txt").write_text("A cab, a bäc!\n\n... \ncab a\n", encoding="utf-8")
    command = [str(tmp_path / "text.txt"), f"--workdir={tmp_path}", "--order=2"]
    train_ngram.main([*command, f"--arpa={tmp_path}/words.arpa.gz"])
    found = ngrams.read_arpa(tmp_path / "words.arpa.gz")
    wanted = ngrams.train([["A", "CAB", "A", "BÄC"], ["CAB", "A"]], 2)
    assert found.probs == pytest.approx(wanted.probs, abs=1e-6)
    assert found.backoffs == pytest.approx(wanted.backoffs, abs=1e-6)
    assert "2 sentences" in capsys.readouterr().out
    train_ngram.main([*command, "--unit=character", f"--arpa={tmp_path}/letters.arpa"])
    assert ("B", "Ä") in ngrams.read_arpa(tmp_path / "letters.arpa").probs
    with pytest.raises(UserError, match=r"nowhere\.txt: unreadable text"):
        train_ngram.main([str(tmp_path / "nowhere.txt"), *command[1:], f"--arpa={tmp_path}/x.arpa"])
    with pytest.raises(UserError, match="vocabulary"):
        train_ngram.main([command[0], f"--workdir={tmp_path}/none", f"--arpa={tmp_path}/x.arpa"])
