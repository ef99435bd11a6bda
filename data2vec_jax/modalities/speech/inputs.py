"""Whole utterances for fine-tuning: normalised, then padded to a few fixed lengths."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import numpy as np

from data2vec_jax.core.config import NonNegativeFloat, PositiveFloat
from data2vec_jax.core.errors import ExampleError, UserError
from data2vec_jax.data.sources import Subset
from data2vec_jax.modalities.contract import Inputs, measured, with_bad_ones
from data2vec_jax.modalities.speech.codec import RATE
from data2vec_jax.modalities.speech.data import Lengths, normalise

STEP = 320  # samples; windows are a multiple of them apart, so that they share their frames


@dataclasses.dataclass(frozen=True, kw_only=True)
class UtteranceConfig:
    """Config section `examples` of speech, in fine-tuning; a `Layout`."""

    # Lengths of rows, ascending; an utterance is padded to the shortest that holds it.
    seconds: Lengths
    # Longer ones are cut (training: at random, evaluation: in the middle). Otherwise they are left
    # out of training, and in evaluation are windows of the longest length, see `overlap`.
    cut: bool = False
    overlap: NonNegativeFloat = 1.0  # seconds that windows share
    max_seconds: PositiveFloat = 3600.0  # longer utterances are left out
    padded: ClassVar[bool] = True

    def __post_init__(self):
        seconds, overlap = self.seconds, self.overlap
        if overlap >= max(seconds) or round(overlap * RATE) % STEP:
            raise UserError(
                f"config.examples.overlap: {overlap}; use a multiple of {STEP / RATE} s below the "
                "longest length"
            )
        if list(seconds) != sorted(set(seconds)):
            raise UserError(
                f"config.examples.seconds: {tuple(seconds)} is not an ascending list of seconds"
            )

    @property
    def buckets(self) -> list[int]:
        return [round(s * RATE) for s in self.seconds]

    @property
    def shapes(self) -> list[dict[str, jax.ShapeDtypeStruct]]:
        length = jax.ShapeDtypeStruct((), np.int32)
        return [
            {"audio": jax.ShapeDtypeStruct((n,), np.float32), "length": length}
            for n in self.buckets
        ]


def window_starts(length: int, size: int, overlap: int) -> range:
    """First samples of windows of `size` samples, the last of which reaches the end."""
    step = window_step(size, overlap)
    return range(0, max(length - overlap, 1), step) if length > size else range(1)


def window_step(size: int, overlap: int) -> int:
    """Samples from one window of `size` samples to the next."""
    return (size - overlap) // STEP * STEP


class Utterances(Inputs):
    """audio float32 [S], zero after `length` samples. With `like` nothing is random.

    owner: int [N], the number in the source of each row's utterance. starts: int [N], its first
    sample there. source: the utterance of each row.
    """

    def __init__(self, source: Any, like: "Utterances | None" = None, **options: Any):
        self.fixed, self.layout = like is not None, UtteranceConfig(**options)
        self.cut, longest = self.layout.cut, self.layout.buckets[-1]
        limit = round(self.layout.max_seconds * RATE)
        whole = measured(source, limit, "config.examples.max_seconds")
        whole = np.where(whole > limit, -1, whole)
        self.overlap = overlap = round(self.layout.overlap * RATE)
        windows = self.fixed and not self.cut
        rows = [
            (number, start)
            for number, length in enumerate(whole)
            for start in (window_starts(int(length), longest, overlap) if windows else (0,))
        ]
        self.owner, self.starts = np.array(rows, np.int64).reshape(-1, 2).T
        self.utterances, self.source = source, Subset(source, self.owner)
        self.lengths = whole[self.owner] - self.starts
        if windows:
            self.lengths = np.minimum(self.lengths, longest)
        held = np.minimum(self.lengths, longest) if self.cut else self.lengths
        self.bucket_of = np.searchsorted(self.layout.buckets, held)
        self.bucket_of[held > longest] = -1
        self.bucket_of = with_bad_ones(self.bucket_of, self.source.bad)

    def load(self, index: int, bucket: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """See `prepare`."""
        return self.prepare(index, self.source[index], bucket, rng)

    def prepare(
        self, index: int, item: Mapping[str, Any], bucket: int, rng: np.random.Generator
    ) -> dict[str, np.ndarray]:
        """{'audio': float32 [S] of the bucket's length, 'length': int32}."""
        audio, size = normalise(item["audio"]), self.layout.buckets[bucket]
        start = int(self.starts[index])
        if self.cut:
            spare = max(len(audio) - size, 0)
            start = spare // 2 if self.fixed else int(rng.integers(spare + 1))
        audio = audio[start : start + size]
        return {
            "audio": np.pad(audio, (0, size - len(audio))),
            "length": np.int32(len(audio)),
        }

    def check(self, model: Any) -> None:
        """Utterances without a frame are bad; padding must not leak into statistics; windows must
        start with a frame, and leave none out.
        """
        if model.frontend.pads_statistics and model.padding == "exact":
            raise UserError(
                "config.model.frontend.norm: 'group' takes statistics over padding too; use "
                "'layer', or config.model_overrides.padding='reference'"
            )
        step = window_step(self.layout.buckets[-1], self.overlap)
        between, least = model.frontend.hop, model.frontend.reach - model.frontend.hop
        if not self.cut and (step % between or self.overlap < least):
            raise UserError(
                f"config.examples: windows of long utterances are {step} samples apart and share "
                f"{self.overlap}, but this model has a frame every {between} and needs {least}; "
                f"make seconds - overlap a multiple of {between / RATE:g} s, and overlap at least "
                f"{least / RATE:g} s"
            )
        for row in np.flatnonzero((self.lengths < model.frontend.reach) & (self.bucket_of >= 0)):
            number, length = int(self.owner[row]), int(self.lengths[row])
            if length >= 0 and not self.starts[row]:
                text = f"an utterance of {length} samples has no frame"
                error = ExampleError(self.utterances.location(number), "too short", text)
                self.source.bad.setdefault(int(row), error)
                self.utterances.bad.setdefault(number, error)
