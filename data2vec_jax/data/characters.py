"""Characters as CTC labels, and transcripts as characters (conversion spec 1.1)."""

import functools
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from data2vec_jax.core.errors import UserError

BLANK, SPACE = 0, "|"
# The blank is index 0: Hugging Face calls it <pad>, fairseq <s> (and index 1 <pad>).
SPECIALS = ("<pad>", "<s>", "</s>", "<unk>")
LIBRISPEECH = (*SPECIALS, *"|ETAONIHSRDLUMWCFGYPBVK'XJQZ")


class Characters:
    """The labels of a CTC head. names: of each index; 0 is the blank, `|` ends a word."""

    def __init__(self, names: Sequence[str] = LIBRISPEECH):
        self.names = tuple(names)
        self._index = {name: i for i, name in enumerate(self.names)}
        if len(self._index) != len(self.names) or SPACE not in self._index:
            raise UserError(f"characters: each once, and '{SPACE}' among them")
        self.space = self._index[SPACE]

    def __len__(self) -> int:
        return len(self.names)

    def encode(self, text: str) -> list[int]:
        """Words -> labels, `|` after every word, the last too. Raises UserError: a character
        that is not among the labels, without an `<unk>` to stand for it."""
        line = "".join(word + SPACE for word in text.split())
        unknown = self._index.get("<unk>")
        labels = [self._index.get(character, unknown) for character in line]
        if None in labels:
            bad = line[labels.index(None)]
            raise UserError(f"transcript '{text}': '{bad}' is not among the characters")
        return labels

    def decode(self, labels: Iterable[int]) -> str:
        """Labels (blanks and repeats already gone) -> words; special names are dropped."""
        names = [self.names[i] for i in labels]
        kept = "".join(name for name in names if len(name) == 1)
        return " ".join(kept.replace(SPACE, " ").split())

    def save(self, path: str | Path) -> None:
        """Writes `vocab.json`, {name: index}, as Hugging Face's CTC tokenizers read it."""
        Path(path).write_text(json.dumps(self._index, ensure_ascii=False, indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> "Characters":
        """Reads `vocab.json`. Raises UserError: not a table of names and indices."""
        try:
            table = json.loads(Path(path).read_text(encoding="utf-8"))
            names = sorted(table, key=table.get)
            if [table[name] for name in names] != list(range(len(names))):
                raise ValueError("indices are not 0, 1, 2, ...")
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: not a vocabulary of characters ({error})") from error
        return cls(names)


def from_transcripts(texts: Iterable[str]) -> Characters:
    """The characters of normalised transcripts, most frequent first, after `|`."""
    counts = Counter("".join("".join(text.split()) for text in texts))
    found = sorted(counts, key=lambda c: (-counts[c], c))
    return Characters((*SPECIALS, SPACE, *(c for c in found if c != SPACE)))


class _Spelling(dict):
    """Code point -> how the letters `keep` spell it, '' if they cannot: for `str.translate`."""

    def __init__(self, keep: str):
        self._kept = re.compile(f"[{keep}]+").fullmatch
        # Turkish, Azerbaijani: i and ı are two letters, with the capitals İ and I.
        self._dotted = {"i": "İ", "ı": "I"} if self._kept("İ") else {}
        self._dotted |= {"I": "ı", "İ": "i"} if self._kept("ı") else {}

    def __missing__(self, code: int) -> str:
        letter = chr(code)
        turned = letter.upper(), letter.lower(), letter.upper().lower()  # the last: ς as σ
        cases = letter, self._dotted.get(letter, ""), *turned
        plain = ("".join(filter(self._kept, unicodedata.normalize("NFD", x))) for x in cases)
        self[code] = next(filter(self._kept, (*cases, *plain)), "")
        return self[code]


_spelling = functools.lru_cache(maxsize=8)(_Spelling)


def normalise_transcript(text: str, keep: str = "A-Z'") -> str:
    """Only the characters `keep` (as in a regular expression's brackets) and single spaces.

    A letter that is not among them is written in the case that is, and without its accents if it
    has to be; ' stands for typographic apostrophes.
    """
    text = re.sub("[\u2018\u2019\u02bc\u00b4`]", "'", unicodedata.normalize("NFC", text))
    return " ".join(filter(None, (word.translate(_spelling(keep)) for word in text.split())))
