"""Waveforms -> a batch, and characters -> ids and back, as Hugging Face's speech models have them.

The steps of its `Wav2Vec2FeatureExtractor` and `Wav2Vec2CTCTokenizer`, read from and written to
their files (finetuning_and_conversion 1.1, 4.7).   B batch, S samples, T frames, V vocabulary.
"""

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from data2vec_jax.core.errors import UserError
from data2vec_jax.data.characters import SPECIALS

KIND = "Wav2Vec2FeatureExtractor"


@dataclass(frozen=True)
class Processor:
    """Zero mean and unit variance of each utterance (eps 1e-7), then padding at the right.

    rate: samples a second. normalise: off for waveforms as they are. padding: value of what is
    added. masked: padding is told apart; otherwise it takes part in the statistics.
    """

    rate: int = 16_000
    normalise: bool = True
    padding: float = 0.0
    masked: bool = True

    @classmethod
    def of(cls, theirs: Mapping[str, Any]) -> "Processor":
        """From the object in a `preprocessor_config.json`."""
        wanted = {"feature_extractor_type": KIND, "feature_size": 1, "padding_side": "right"}
        for key, value in wanted.items():
            if theirs.get(key, value) != value:
                raise UserError(f"preprocessor_config.json: {key} {theirs[key]!r} is not {value!r}")
        return cls(
            int(theirs.get("sampling_rate", cls.rate)),
            bool(theirs.get("do_normalize", True)),
            float(theirs.get("padding_value", 0.0)),
            bool(theirs.get("return_attention_mask", False)),
        )

    def to_json(self) -> dict[str, Any]:
        """Every key."""
        return {
            "feature_extractor_type": KIND,
            "feature_size": 1,
            "sampling_rate": self.rate,
            "padding_value": self.padding,
            "padding_side": "right",
            "do_normalize": self.normalise,
            "return_attention_mask": self.masked,
        }

    def __call__(self, utterances: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Waveforms [S'] of any lengths -> audio float32 [B, S], padding bool [B, S]."""
        size = max(map(len, utterances))
        audio = np.full((len(utterances), size), self.padding, np.float32)
        padding = np.ones(audio.shape, bool)
        for row, waveform in enumerate(utterances):
            audio[row, : len(waveform)], padding[row, : len(waveform)] = waveform, False
            if self.normalise:
                part = audio[row, : len(waveform) if self.masked else size]
                part[:] = (part - part.mean()) / np.sqrt(part.var() + 1e-7)
        return audio, padding


@dataclass(frozen=True)
class Letters:
    """A vocabulary of characters for CTC.

    ids: token -> id. blank: the token of the CTC blank. word: what stands for a space, and
    `between` what it is decoded to. unknown: the token of characters that are not in it. lower:
    texts are lower case, and the vocabulary upper case. specials: blank, start, end, unknown.
    """

    ids: Mapping[str, int]
    blank: str = "<pad>"
    word: str = "|"
    unknown: str = "<unk>"
    between: str = " "
    lower: bool = False
    specials: tuple[str, ...] = SPECIALS

    @classmethod
    def of(cls, ids: Mapping[str, int], theirs: Mapping[str, Any]) -> "Letters":
        """From the objects in `vocab.json` and `tokenizer_config.json`."""

        def name(key, default):
            value = theirs.get(key, default)
            return value["content"] if isinstance(value, Mapping) else value

        kind = theirs.get("tokenizer_class", "Wav2Vec2CTCTokenizer")
        if kind != "Wav2Vec2CTCTokenizer":
            raise UserError(f"tokenizer_config.json: '{kind}' is not 'Wav2Vec2CTCTokenizer'")
        names = (
            ("pad_token", "<pad>"),
            ("bos_token", "<s>"),
            ("eos_token", "</s>"),
            ("unk_token", "<unk>"),
        )
        specials = tuple(name(*x) for x in names)
        for token in specials:
            if token not in ids:
                raise UserError(f"vocab.json: no '{token}'")
        return cls(
            dict(ids),
            specials[0],
            name("word_delimiter_token", "|"),
            specials[3],
            name("replace_word_delimiter_char", " "),
            bool(theirs.get("do_lower_case")),
            specials,
        )

    def to_json(self) -> dict[str, Any]:
        """The object of `tokenizer_config.json`."""
        names = dict(
            zip(("pad_token", "bos_token", "eos_token", "unk_token"), self.specials, strict=True)
        )
        return {
            "tokenizer_class": "Wav2Vec2CTCTokenizer",
            **names,
            "word_delimiter_token": self.word,
            "do_lower_case": self.lower,
            "replace_word_delimiter_char": self.between,
        }

    def encode(self, text: str) -> list[int]:
        """Ids of a text, one a character. Longer tokens in it, special ones among them, are one id
        and take the blanks around them along."""
        longer = "|".join(re.escape(token) for token in self.ids if len(token) > 1)
        pattern = rf"\s*({longer})\s*|(.)" if longer else "()(.)"
        unknown, found = self.ids[self.unknown], []
        for token, letter in re.findall(pattern, text, re.DOTALL):
            letter = letter.upper() if self.lower else letter
            found.append(self.ids.get(token or letter.replace(" ", self.word), unknown))
        return found

    def decode(self, frames: Iterable[int]) -> str:
        """The text of the best id of each frame: repeats are one, blanks are none."""
        names = {number: token for token, number in self.ids.items()}
        merged = [names[int(number)] for number, _ in itertools.groupby(frames)]
        spoken = (self.between if x == self.word else x for x in merged if x != self.blank)
        text = "".join(spoken).strip()
        return text.lower() if self.lower else text
