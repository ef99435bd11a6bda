"""Text as the letters of an alphabet: one step, which counts what it changes and what it loses."""

import dataclasses
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from data2vec_jax.core.config import check_section
from data2vec_jax.core.errors import UserError
from data2vec_jax.data.characters import SPACE, Characters

FILE = "normalise.json"  # of a workdir: what was done to its transcripts
APOSTROPHES = "'\u2019\u02bc\u2018\u00b4`"  # of which an alphabet has one
MAX_OUTSIDE_SHARE = 0.05
TOLD = 8  # letters that are named

# What becomes of a character.
AS_IS, CASE, FORM, ACCENT, SIGN, OUTSIDE = WAYS = (
    "as they are",
    "in the other case",
    "in another Unicode form",
    "without accents",
    "signs",
    "outside",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class NormaliseConfig:
    """Config section `data.normalise`: how transcripts become letters of the alphabet.

    What the alphabet spells in another Unicode form (Hangul in syllables or in jamo, accents as
    characters of their own) is written so in any case.
    """

    # Of the text. 'NFKC': full-width letters, ligatures and the positional forms of Arabic are
    # plain letters.
    form: Literal["NFC", "NFKC"] = "NFC"
    # 'alphabet': a letter that is only there in the other case is written so; 'keep': not.
    case: Literal["alphabet", "keep"] = "alphabet"
    # Whether a letter that is only there without its accents is written so; if not, it is outside.
    drop_accents: bool = True
    # Characters that are left out as punctuation is, and so are not outside: '0123456789'.
    drop: str = ""


class Normaliser:
    """Text -> words of the letters of an alphabet, with single spaces.

    letters: characters, of which each is one code point. What is not among them is written as they
    can, and left out if they cannot. Of an alphabet with İ or ı, i and ı are two letters.
    """

    def __init__(self, letters: Iterable[str], config: NormaliseConfig = NormaliseConfig()):
        self.letters, self.config = frozenset(letters), config
        self._spelling = _Spelling(self.letters, config)
        forms = {unicodedata.normalize(config.form, x): x for x in self.letters}
        # Letters that the form takes apart, such as those with a nukta: whole again.
        self._whole = {form: x for form, x in forms.items() if form not in self.letters}
        self._final = "ς" in self.letters and "Σ" not in self.letters and config.case != "keep"

    def __call__(self, text: str) -> str:
        words = (word.translate(self._spelling) for word in self._unified(text).split())
        return " ".join(filter(None, words))

    def _unified(self, text: str) -> str:
        text = unicodedata.normalize(self.config.form, text).replace(SPACE, " ")
        for parts, letter in self._whole.items():
            text = text.replace(parts, letter)
        # A sigma that ends a word is ς, which no longer shows in capitals.
        return re.sub(r"(?<=\w)Σ(?!\w)", "ς", text) if self._final else text

    def survey(self, texts: Iterable[str]) -> "Survey":
        """What becomes of the characters of texts."""
        counts: Counter[str] = Counter()
        empty = total = 0
        for total, text in enumerate(texts, 1):  # noqa: B007
            unified = self._unified(text)
            counts.update(unified)
            empty += not unified.translate(self._spelling)
        ways, outside = dict.fromkeys(WAYS, 0), {}
        for letter, count in counts.most_common():
            if not letter.isspace():
                way = self._spelling.way(letter)
                ways[way] += count
                if way == OUTSIDE:
                    outside[letter] = count
        return Survey(total, empty, ways, outside)


class _Spelling(dict):
    """Code point -> how the letters spell it, '' if they cannot: for `str.translate`."""

    def __init__(self, letters: frozenset[str], config: NormaliseConfig):
        self._letters, self._config, self._ways = letters, config, {}
        # Turkish, Azerbaijani: i and ı are two letters, with the capitals İ and I.
        self._pairs = {"i": "İ", "ı": "I"} if "İ" in letters else {}
        self._pairs |= {"I": "ı", "İ": "i"} if "ı" in letters else {}
        self._pairs |= {"ß": "ẞ"} if "ẞ" in letters else {}  # not SS

    def way(self, letter: str) -> str:
        """One of `WAYS`."""
        self[ord(letter)]  # is noted in `_ways`
        return self._ways[letter]

    def __missing__(self, code: int) -> str:
        letter = chr(code)
        self._ways[letter], self[code] = self._spelled(letter)
        return self[code]

    def _spelled(self, letter: str) -> tuple[str, str]:
        """(way, spelling) of a character."""
        if letter in self._letters:
            return AS_IS, letter
        if letter in self._config.drop:
            return SIGN, ""
        if letter in APOSTROPHES:
            found = next((x for x in APOSTROPHES if x in self._letters), "")
            return (FORM if found else SIGN), found
        cases = [letter]
        if self._config.case == "alphabet":
            upper, folded = letter.upper(), letter.casefold()  # which turns ς to σ, ẞ to ss
            cases += [self._pairs.get(letter, letter), upper, letter.lower(), upper.lower()]
            cases += [folded, folded.upper()]
        apart = [unicodedata.normalize("NFD", x) for x in cases]
        ways = {CASE: cases, FORM: [*apart, separate_jamo(letter) or letter]}
        if self._config.drop_accents:
            ways[ACCENT] = ["".join(x for x in text if not is_accent(x)) for text in apart]
        for way, forms in ways.items():
            for found in filter(self._letters.issuperset, forms):
                return way, found
        # Letters, marks and numbers are content; punctuation, symbols and controls are not.
        return (OUTSIDE if unicodedata.category(letter)[0] in "LMN" else SIGN), ""


def is_accent(character: str) -> bool:
    """Whether it is a mark that a letter can do without; vowel signs and viramas are none."""
    return unicodedata.combining(character) not in (0, 9)


def separate_jamo(syllable: str) -> str:
    """A Hangul syllable in letters that are not joined, as keyboards have them (ㅎㅏㄴ); or ''."""
    parts = unicodedata.normalize("NFD", syllable)
    names = [unicodedata.name(x, "").rpartition(" ") for x in parts]
    if not all(kind.startswith(("HANGUL J", "HANGUL C")) for kind, *_ in names):
        return ""
    try:
        return "".join(unicodedata.lookup(f"HANGUL LETTER {name}") for *_, name in names)
    except KeyError:
        return ""


@dataclasses.dataclass(frozen=True)
class Survey:
    """What became of the characters of texts.

    texts, empty: how many, and how many of them have no letter of the alphabet. ways: `WAYS` ->
    characters, white space not among them. outside: letter -> how often, the most frequent first.
    """

    texts: int
    empty: int
    ways: Mapping[str, int]
    outside: Mapping[str, int]

    def __add__(self, other: "Survey") -> "Survey":
        """That of the texts of both."""
        outside = Counter(self.outside) + Counter(other.outside)
        return Survey(
            self.texts + other.texts,
            self.empty + other.empty,
            {way: self.ways[way] + other.ways[way] for way in WAYS},
            dict(outside.most_common()),
        )

    @property
    def letters(self) -> int:
        """All characters but signs."""
        return sum(self.ways.values()) - self.ways[SIGN]

    @property
    def share(self) -> float:
        """Of the letters, those outside of the alphabet."""
        return self.ways[OUTSIDE] / max(self.letters, 1)

    def line(self, name: str) -> str:
        """'NAME: 1,204 letters, 98.0 % as they are, 2.0 % without accents, ...'."""
        parts = [f"{name}: {self.letters:,} letters"]
        for way in (AS_IS, CASE, FORM, ACCENT):
            if self.ways[way]:
                parts.append(f"{100 * self.ways[way] / self.letters:.1f} % {way}")
        parts.append(f"{self.ways[OUTSIDE]:,} outside of the alphabet{self.named}")
        for count, words in ((self.ways[SIGN], "signs"), (self.empty, f"of {self.texts:,} empty")):
            parts += [f"{count:,} {words}"] if count else []
        return ", ".join(parts)

    @property
    def named(self) -> str:
        """' (0.25 %: '2' 2, 'é' 1)'; '' if none is outside."""
        if not self.outside:
            return ""
        first = ", ".join(f"'{x}' {n:,}" for x, n in list(self.outside.items())[:TOLD])
        more = ", ..." if len(self.outside) > TOLD else ""
        return f" ({float(f'{100 * self.share:.2g}'):g} %: {first}{more})"

    def check(self, name: str, most: float) -> None:
        """Raises UserError: more than the share `most` of the letters is outside, or every text
        is empty."""
        if self.share > most:
            raise UserError(
                f"{name}: {self.ways[OUTSIDE]:,} of {self.letters:,} letters are outside of the "
                f"alphabet{self.named}, more than config.data.max_outside_share={most:g} allows: "
                "give it the letters of the data, leave them out (data.normalise.drop), or allow "
                "more"
            )
        if self.texts and self.empty == self.texts:
            raise UserError(f"{name}: none of {self.texts:,} has a letter of the alphabet")


def of_config(characters: Characters, options: Mapping[str, Any]) -> Normaliser:
    """That of a config's section `data.normalise`. Raises UserError: no such option."""
    check_section("data.normalise", options, NormaliseConfig)
    return Normaliser(characters.letters, NormaliseConfig(**options))


def save(folder: Path, normaliser: Normaliser, surveys: Mapping[str, Survey]) -> None:
    """Writes `normalise.json`: the options, and by split what became of the characters."""
    found = {name: dataclasses.asdict(survey) for name, survey in surveys.items()}
    text = {"options": dataclasses.asdict(normaliser.config), "texts": found}
    (folder / FILE).write_text(json.dumps(text, ensure_ascii=False, indent=1) + "\n", "utf-8")


def load(folder: Path) -> Normaliser:
    """That of a run, or of what it was converted to: `vocab.json`, and `normalise.json` if it has
    one. Raises UserError: they are damaged."""
    characters, path = Characters.load(folder / "vocab.json"), folder / FILE
    try:
        options = json.loads(path.read_text("utf-8"))["options"] if path.exists() else {}
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"{path}: does not say how text was normalised ({error})") from None
    return of_config(characters, options)
