"""Sound examples: log-mel spectrograms of whole clips, padded or cut to one length.

Nothing is random: pretraining has no augmentation (docs/spec/sound.md section 1).
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from data2vec_jax.core.config import PositiveFloat, PositiveInt
from data2vec_jax.core.errors import UserError
from data2vec_jax.modalities.contract import Examples, check_varies, measured, with_bad_ones
from data2vec_jax.modalities.sound.codec import RATE
from data2vec_jax.modalities.sound.spectrogram import (
    BINS,
    FBANK,
    centre,
    check_frames,
    samples_of,
    spectrogram,
)

WHOLE = 60 * RATE  # samples; longer sounds are not read whole for their beginning


@dataclasses.dataclass(frozen=True, kw_only=True)
class SoundLayout:
    """Config section `examples` of sound, in pretraining; a `Layout`."""

    frames: PositiveInt = 1024  # F of 10 ms, a multiple of 16; longer sounds lose their end
    min_samples: PositiveInt = 10_000  # shorter sounds are left out
    max_seconds: PositiveFloat = 3600.0  # longer ones, too

    def __post_init__(self):
        check_frames(self.frames, "examples")
        if self.min_samples < FBANK.length:
            raise UserError(
                f"config.examples.min_samples: {self.min_samples} is less than a frame of "
                f"{FBANK.length} samples"
            )

    @property
    def buckets(self) -> Sequence[int]:
        return (samples_of(self.frames),)

    @property
    def padded(self) -> bool:
        return True

    @property
    def shapes(self) -> list[dict[str, jax.ShapeDtypeStruct]]:
        return [{"spectrogram": jax.ShapeDtypeStruct((self.frames, BINS, 1), np.float32)}]


def measured_buckets(source: Any, layout: SoundLayout) -> tuple[np.ndarray, np.ndarray]:
    """Lengths, int64 [N], and buckets, int [N]: 0, the only one, or -1 for sounds that are too
    short; those without a frame are bad.
    """
    longest = round(layout.max_seconds * RATE)
    lengths = measured(source, longest, "config.examples.max_seconds", FBANK.length)
    bucket_of = np.where(lengths >= layout.min_samples, 0, -1).astype(np.int32)
    return lengths, with_bad_ones(bucket_of, source.bad)


def check_size(model: Any, frames: int) -> None:
    """Raises UserError unless the model reads spectrograms of this length."""
    if model.image[0] != frames:
        raise UserError(f"config.model.frames is {model.image[0]}, config.examples.frames {frames}")


class SoundExamples(Examples):
    """One spectrogram of each sound. Of those above `WHOLE` samples only so many are read."""

    def __init__(self, source: Any, like: "SoundExamples | None" = None, **options: Any):
        del like  # nothing is random, and nothing is learned from the data
        self.source, self.layout = source, SoundLayout(**options)
        self.lengths, self.bucket_of = measured_buckets(source, self.layout)

    def load(self, index: int, bucket: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """{'spectrogram': float32 [F, 128, 1]}, log-mel, not normalised."""
        most = max(WHOLE, self.layout.buckets[0])
        if self.lengths[index] > most:
            audio = self.source.part(index, 0, most)["audio"]
        else:
            audio = self.source[index]["audio"]
        check_varies(audio, self.source, index)
        return {"spectrogram": spectrogram(centre(audio), self.layout.frames)}

    def check(self, model: Any) -> None:
        """The lengths of spectrograms must agree."""
        check_size(model, self.layout.frames)


def log_mel_statistics(
    train: Mapping[str, np.ndarray], inputs: Mapping[str, np.ndarray]
) -> np.ndarray:
    """Hand-made features: spectrograms [N, F, 128, 1] -> mean and deviation over time of each bin,
    float32 [N, 256]. Padded frames, which are 0, are left out.
    """
    del train
    x = inputs["spectrogram"][..., 0].astype(np.float64)
    inside = np.any(x != 0, axis=2, keepdims=True)  # [N, F, 1]
    count = np.maximum(inside.sum(1), 1)
    mean = x.sum(1) / count
    deviation = np.sqrt((np.square(x - mean[:, None]) * inside).sum(1) / count)
    return np.concatenate([mean, deviation], axis=1).astype(np.float32)


def picture(inputs: Mapping[str, np.ndarray]) -> np.ndarray:
    """spectrogram [F, 128, 1] -> float32 [F, 128]; padded frames, which are 0, as silence."""
    x = inputs["spectrogram"][..., 0]
    return np.where(np.any(x != 0, axis=1, keepdims=True), x, x.min())
