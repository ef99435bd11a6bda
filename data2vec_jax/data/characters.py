"""Characters as CTC labels (conversion spec 1.1); `normalise` makes them of text."""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from data2vec_jax.core.errors import UserError

BLANK, SPACE = 0, "|"
# The blank is index 0: Hugging Face calls it <pad>, fairseq <s> (and index 1 <pad>).
SPECIALS = ("<pad>", "<s>", "</s>", "<unk>")
LIBRISPEECH = (*SPECIALS, *"|ETAONIHSRDLUMWCFGYPBVK'XJQZ")


class Characters:
    """The labels of a CTC head. names: of each index; 0 is the blank, `|` ends a word. letters:
    those that words are made of."""

    def __init__(self, names: Sequence[str] = LIBRISPEECH):
        self.names = tuple(names)
        self._index = {name: i for i, name in enumerate(self.names)}
        if len(self._index) != len(self.names) or SPACE not in self._index:
            raise UserError(f"characters: each once, and '{SPACE}' among them")
        self.space = self._index[SPACE]
        self.letters = tuple(x for x in self.names if len(x) == 1 and x != SPACE)

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
