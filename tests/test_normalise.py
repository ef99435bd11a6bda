"""Text as letters of an alphabet: scripts, forms, cases; what is counted, refused and recorded."""

import json
import re
import unicodedata

import numpy as np
import pytest
from configs_for_tests import Items, config_of

from data2vec_jax import train_ngram
from data2vec_jax.core.errors import UserError
from data2vec_jax.data import normalise
from data2vec_jax.data.characters import SPECIALS, Characters
from data2vec_jax.data.normalise import NormaliseConfig, Normaliser
from data2vec_jax.models import heads
from data2vec_jax.tasks import ngrams, transcribe


def letters_of(keep):
    """'A-CX' -> ABCX."""
    ranges = re.sub("(.)-(.)", lambda m: "".join(map(chr, range(ord(m[1]), ord(m[2]) + 1))), keep)
    return list(ranges)


def normalise_transcript(text, keep="A-Z'", **options):
    return Normaliser(letters_of(keep), NormaliseConfig(**options))(text)


def test_transcripts_are_normalised():
    assert normalise_transcript(" It’s -- a «Test», no. 2!\n") == "IT'S A TEST NO"
    assert normalise_transcript("Ёлка, дом", keep="А-ЯЁ") == "ЁЛКА ДОМ"
    assert normalise_transcript("Д'Артаньян", keep="А-Я") == "ДАРТАНЬЯН"


@pytest.mark.parametrize(
    ("text", "keep", "expected"),
    [
        # Georgian: Unicode has capitals that nobody writes.
        ("გამარჯობა, მსოფლიო!", "ა-ჰ", "გამარჯობა მსოფლიო"),
        ("ᲒᲐᲛᲐᲠᲯᲝᲑᲐ", "ა-ჰ", "გამარჯობა"),
        # Turkish: i and ı are two letters, in either case.
        ("kırk kirk Iğdır İzmir", "A-ZÇĞİÖŞÜ", "KIRK KİRK IĞDIR İZMİR"),
        ("kırk KIRK KİRK Iğdır İzmir", "a-zçğıöşü", "kırk kırk kirk ığdır izmir"),
        ("It is", "A-Z", "IT IS"),
        ("IT is", "a-z", "it is"),
        # Both cases are letters of their own.
        ("It is I", "A-Za-z", "It is I"),
        ("Straße, Maß", "A-ZÄÖÜ", "STRASSE MASS"),
        ("STRASSE straße", "a-zäöüß", "strasse straße"),
        ("Ὀδυσσεύς", "α-ω", "οδυσσευς"),
        ("Οδυσσεύς", "Α-Ω", "ΟΔΥΣΣΕΥΣ"),
        ("café cafe\u0301 naïve", "A-Z", "CAFE CAFE NAIVE"),
        ("cafe\u0301", "a-zé", "café"),
        ("שלום, עולם", "א-ת", "שלום עולם"),
        ("こんにちは 世界", "ぁ-ん世界", "こんにちは 世界"),
    ],
)
def test_transcripts_follow_their_alphabet(text, keep, expected):
    assert normalise_transcript(text, keep) == expected


def test_ascii_text_in_librispeech_letters_is_upper_case_without_signs():
    """As the transcripts of LibriSpeech, and its language model, have it."""
    rng, spell = np.random.default_rng(0), Normaliser(Characters().letters)
    for _ in range(200):
        text = "".join(map(chr, rng.choice([*range(32, 127), 9, 10, *[32] * 20], 60)))
        upper = text.upper().replace("`", "'").replace("|", " ")
        assert spell(text) == " ".join(re.sub(r"[^A-Z'\s]", "", upper).split())


GREEK, KOREAN = "αβγδεζηθικλμνξοπρστυφχψω", "가나다라마바사한글국어"
JAMO = [chr(c) for c in (*range(0x1100, 0x1113), *range(0x1161, 0x1176), *range(0x11A8, 0x11C3))]
KEYS = [chr(c) for c in range(0x3131, 0x3164)]
HINDI = [*letters_of("क-ह"), *"अआइईउऊएऐओऔािीुूेैोौ्ंँ"]
ARABIC = letters_of("ا-غف-ي")


@pytest.mark.parametrize(
    ("text", "letters", "expected"),
    [
        # Greek: the sigma that ends a word.
        ("ΟΔΟΣ ΣΟΦΟΣ, ΣΑΣ!", GREEK + "ς", "οδος σοφος σας"),
        ("οδός σοφός", GREEK + "ς", "οδος σοφος"),
        ("οδός σοφός σας", GREEK, "οδοσ σοφοσ σασ"),
        ("οδός", GREEK.upper(), "ΟΔΟΣ"),
        ("ΟΔΌΣ", GREEK + "ςό", "οδός"),
        ("ΟΔΟΣ οδος", GREEK + "ς" + "Σ", "οδοΣ οδος"),
        # German: sharp s, which has a capital of its own since 2017.
        ("Maß MASSE GROẞ", "abcdefghijklmnopqrstuvwxyzäöüß", "maß masse groß"),
        ("Maß GROẞ", "ABCDEFGHIJKLMNOPQRSTUVWXYZÄÖÜ", "MASS GROSS"),
        ("Maß GROẞ", "ABCDEFGHIJKLMNOPQRSTUVWXYZÄÖÜẞ", "MAẞ GROẞ"),
        ("Maß GROẞ", "abcdefghijklmnopqrstuvwxyz", "mass gross"),
        # Turkish and Azerbaijani: two letters i; a careless lower() leaves a dot of its own.
        ("ılık ilik", "abcçdefgğhıijklmnoöprsştuüvyz", "ılık ilik"),
        ("ILIK İLİK", "abcçdefgğhıijklmnoöprsştuüvyz", "ılık ilik"),
        ("ılık ilik", "ABCÇDEFGĞHIİJKLMNOÖPRSŞTUÜVYZ", "ILIK İLİK"),
        ("İLİK".lower(), "abcçdefgğhıijklmnoöprsştuüvyz", "ilik"),
        ("QIZIL ƏLİF", "abcçdeəfgğhxıijkqlmnoöprsştuüvyz", "qızıl əlif"),
        # Hangul, syllables and jamo, whichever the text and the alphabet have.
        ("한글, 한국어!", KOREAN, "한글 한국어"),
        (unicodedata.normalize("NFD", "한글 한국어"), KOREAN, "한글 한국어"),
        ("한글", JAMO, unicodedata.normalize("NFD", "한글")),
        (unicodedata.normalize("NFD", "한글"), JAMO, unicodedata.normalize("NFD", "한글")),
        ("한글", KEYS, "ㅎㅏㄴㄱㅡㄹ"),
        ("값을", KEYS, "ㄱㅏㅄㅇㅡㄹ"),
        # Devanagari: a vowel sign is a letter, a nukta can be left out; NFC takes क़ apart.
        ("नमस्ते, दुनिया।", HINDI, "नमस्ते दुनिया"),
        ("क़लम \u0958लम", [*HINDI, "\u0958"], "\u0958लम \u0958लम"),
        ("क़लम \u0958लम", [*HINDI, "\u093c"], "क\u093cलम क\u093cलम"),
        ("क़लम \u0958लम", HINDI, "कलम कलम"),
        # Arabic: marks of vowels, tatweel, alif with hamza; Persian with a non-joiner.
        ("مَرْحَبًا، العَالَم؟", ARABIC, "مرحبا العالم"),
        ("مَرْ", [*ARABIC, "\u064e", "\u0652"], "مَرْ"),
        ("أحمد", letters_of("ابتثجح-غف-ي"), "احمد"),
        ("می\u200cروم", [*ARABIC, *"یکگپچژ"], "میروم"),
        # Chinese, and Japanese: no cases, no spaces.
        ("你好，世界。", "你好世界", "你好世界"),
        ("你好　世界", "你好世界", "你好 世界"),
        # Ukrainian and Breton: an apostrophe is a letter, of one form.
        ("п’ять пʼять п'ять", "п'ять", "п'ять п'ять п'ять"),
        ("п'ять", "п\u2019ять", "п\u2019ять"),
        # Georgian, Hebrew, Thai, Vietnamese.
        ("თბილისი ᲗᲑᲘᲚᲘᲡᲘ", letters_of("ა-ჰ"), "თბილისი თბილისი"),
        ("שָׁלוֹם", letters_of("א-ת"), "שלום"),
        ("สวัสดี", letters_of("ก-ฮะ-ู่้"), "สวัสดี"),
        ("TIẾNG VIỆT", [*"tiếngvệ"], "tiếng việt"),
        ("tiếng việt", [*"tiengvt\u0302\u0301\u0323"], unicodedata.normalize("NFD", "tiếng việt")),
    ],
)
def test_scripts(text, letters, expected):
    assert Normaliser(letters)(text) == expected


def test_options():
    assert normalise_transcript("Ａｂ ﬁn", "a-z") == "fin"  # of full width alone
    assert normalise_transcript("Ａｂ ﬁn", "a-z", form="NFKC") == "ab fin"
    assert normalise_transcript("\ufee3\ufeae\ufea3\ufe92\ufe8e", "ا-ي", form="NFKC") == "مرحبا"
    assert normalise_transcript("Ab cd", "a-z", case="keep") == "b cd"
    assert normalise_transcript("café", "a-z", drop_accents=False) == "caf"
    survey = Normaliser("abc", NormaliseConfig(drop="12")).survey(["a1 b2 c3"])
    assert (survey.ways["signs"], survey.outside) == (2, {"3": 1})
    for options, message in (
        ({"case": "upper"}, "config.data.normalise.case: no 'upper'; choose from alphabet, keep"),
        ({"from": "NFC"}, "config.data.normalise.from: no such option; did you mean 'form'"),
        ({"drop": 3}, "config.data.normalise.drop: 3 is not a text"),
    ):
        with pytest.raises(UserError, match=re.escape(message)):
            normalise.of_config(Characters(), options)


def test_every_change_is_counted():
    """Letter by letter: their ways add up, and 'as they are' is what was not touched."""
    survey = Normaliser("abcdeé한").survey(["Abc é È ñ 7-7!", "…", "", "Z\t한", "ab \u0958"])
    assert survey.ways == {
        "as they are": 6,  # b c é 한 a b
        "in the other case": 1,  # A
        "in another Unicode form": 0,
        "without accents": 2,  # È, and the nukta of क़, which NFC takes apart
        "signs": 3,  # - ! …
        "outside": 5,  # ñ 7 7 Z क
    }
    assert survey.outside == {"7": 2, "ñ": 1, "Z": 1, "क": 1}
    assert (survey.texts, survey.empty, survey.letters) == (5, 2, 14)
    assert survey.share == 5 / 14
    line = survey.line("t.tsv train")
    assert line.startswith("t.tsv train: 14 letters, 42.9 % as they are, 7.1 % in the other case")
    assert "5 outside of the alphabet (36 %: '7' 2, 'ñ' 1" in line and "2 of 5 empty" in line
    survey.check("t.tsv", 0.36)
    with pytest.raises(UserError, match=r"t\.tsv: 5 of 14 letters .*max_outside_share=0\.35 "):
        survey.check("t.tsv", 0.35)
    with pytest.raises(UserError, match="none of 2 has a letter"):
        Normaliser("a").survey(["...", "?"]).check("t.tsv", 1.0)


# In a run ---------------------------------------------------------------------------------------


def task_of(characters, **options):
    config = config_of("finetune_librispeech").to_dict()
    config["characters"], config["head"]["vocab_size"] = characters, 5 + len(characters)
    config["data"] |= options.pop("data", {})
    config |= options
    return config, transcribe.targets(config, heads.make(config["head"], "head"))


class Transcripts(Items):
    """Utterances whose transcripts are a column."""

    def column(self, name):
        return [item.get(name) for item in self.held]


def source_of(texts, split="train"):
    items = [{"audio": np.zeros(400, np.float32), "transcript": text} for text in texts]
    return Transcripts(items, split=split)


def test_a_run_tells_records_and_refuses(tmp_path):
    _, targets = task_of("ΑΒΓ")
    (line,) = targets.check(source_of(["αβ γ", "γα!"]))
    assert line.startswith("transcripts of items train: 5 letters, 100.0 % in the other case")
    targets.check(source_of(["Αά", None], "test"))
    targets.save(tmp_path)
    kept = json.loads((tmp_path / "normalise.json").read_text("utf-8"))
    assert kept["options"] == {"form": "NFC", "case": "alphabet", "drop_accents": True, "drop": ""}
    assert kept["texts"]["train"]["ways"]["in the other case"] == 5
    assert kept["texts"]["test"]["ways"]["without accents"] == 1
    with pytest.raises(UserError, match=r"3 of 6 letters .*'x' 2, 'y' 1.*max_outside_share=0\.05"):
        targets.check(source_of(["αβγ xxy"]))
    _, lenient = task_of("ΑΒΓ", data=dict(max_outside_share=0.5))
    lenient.check(source_of(["αβγ xxy"]))
    _, strict = task_of("ΑΒΓ", data=dict(normalise=dict(case="keep")))
    with pytest.raises(UserError, match="'α' 1"):
        strict.check(source_of(["αβγ"]))


def test_of_records_the_first_transcripts_are_looked_at():
    items = [{"audio": np.zeros(400, np.float32), "transcript": "ab"} for _ in range(70)]
    _, targets = task_of("AB")
    (line,) = targets.check(Items(items))
    assert line.startswith("the first 64 transcripts of items train: 128 letters")
    with pytest.raises(UserError, match="the first 64 transcripts of items train: 64 of 128"):
        task_of("A")[1].check(Items(items))
    (line,) = targets.check(Items(items[:3]))
    assert line.startswith("transcripts of items train: 6 letters")


def test_a_score_counts_what_its_references_lost():
    config, _ = task_of("AB")
    characters, scored = transcribe.characters_of(config), transcribe.job(config).score
    source = source_of(["ab", "...", "ba", "ab"])

    class Inputs:
        utterances, owner, starts = source, np.arange(4), np.zeros(4, int)

    logits = np.full((8, len(characters)), -9.0, np.float32)
    logits[np.arange(8), [5, 0, 6, 0, 4, 0, 0, 0]] = 9.0  # AB|
    predictions = [{"logits": logits, "frames": 8}] * 4
    found = scored(predictions, Inputs)
    assert found["empty_references"] == 0.25 and "outside" not in found
    # AB for AB, '', BA, AB: errors 0, 1 inserted, 1 substituted, 0 of 3 words.
    assert found["wer"] == pytest.approx(2 / 3)
    source.held[2]["transcript"] = "ba7"
    with pytest.raises(UserError, match=r"references of items: 1 of 7 .* '7' 1"):
        scored(predictions, Inputs)
    config["data"]["max_outside_share"] = 0.2
    found = transcribe.job(config).score(predictions, Inputs)
    assert found["outside"] == pytest.approx(1 / 7) and found["wer"] == pytest.approx(2 / 3)


def test_a_language_model_of_other_letters_is_refused_at_the_start(tmp_path):
    for name, words in (("upper", ["AB", "BA"]), ("lower", ["ab", "ba"])):
        ngrams.write_arpa(ngrams.train([words, words[:1]], 2), tmp_path / f"{name}.arpa")
    _, good = task_of("AB", scoring=dict(lm=str(tmp_path / "upper.arpa")))
    lines = good.check(source_of(["ab"]))
    assert lines[1].endswith("2 units, 0 of other letters (0.0%)")
    assert len(good.check(source_of(["ba"], "test"))) == 1
    _, bad = task_of("AB", scoring=dict(lm=str(tmp_path / "lower.arpa")))
    with pytest.raises(
        UserError, match=r"2 units, 2 of other letters \(100\.0%\), the first is 'ab"
    ):
        bad.check(source_of(["ab"]))
    config = transcribe.ScoringConfig(lm=str(tmp_path / "upper.arpa"))
    characters = Characters((*SPECIALS, "|", *"AB"))
    logits = [np.eye(7, dtype=np.float32)[[5, 6, 4]] * 9]
    found = transcribe.beam_search_scores(logits, ["AB AA"], characters, config)
    assert found["unknown_words"] == 0.5 and found["wer_lm"] == 0.5


def test_the_text_of_a_language_model_is_normalised_as_the_run(tmp_path, capsys):
    _, targets = task_of("αβς", data=dict(normalise=dict(drop="1")))
    targets.save(tmp_path)
    (tmp_path / "t.txt").write_text("ΑΒΣ αβς1\n\n", encoding="utf-8")
    command = [str(tmp_path / "t.txt"), f"--workdir={tmp_path}", f"--arpa={tmp_path}/x.arpa"]
    train_ngram.main([*command, "--order=1"])
    assert ngrams.read_units(tmp_path / "x.arpa")[-1:] == ["αβς"]
    assert "0 outside of the alphabet, 1 signs" in capsys.readouterr().out
    (tmp_path / "t.txt").write_text("αβς xyz\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"t\.txt: 3 of 6 letters are outside"):
        train_ngram.main(command)
    train_ngram.main([*command, "--max-outside-share=0.5", "--order=1"])
    (tmp_path / "normalise.json").write_text("{}")
    with pytest.raises(UserError, match=r"normalise\.json: does not say"):
        train_ngram.main(command)
