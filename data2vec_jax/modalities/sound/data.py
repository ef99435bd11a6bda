"""Sound examples: log-mel spectrograms of whole clips, padded or cut to one length.

Nothing is random: pretraining has no augmentation (docs/spec/sound.md section 1).
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from data2vec_jax.core.errors import UserError
from data2vec_jax.modalities.contract import Examples
from data2vec_jax.modalities.sound.spectrogram import (
    BINS,
    FBANK,
    centre,
    check_frames,
    samples_of,
    spectrogram,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SoundLayout:
    """Config section `examples` of sound, in pretraining; a `Layout`."""

    frames: int = 1024  # F of 10 ms, a multiple of 16; longer sounds lose their end
    min_samples: int = 10_000  # shorter sounds are left out

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


def buckets_of(lengths: np.ndarray, layout: SoundLayout) -> np.ndarray:
    """int32 [N]: 0, the only bucket, or -1 for sounds that are too short."""
    return np.where(lengths >= layout.min_samples, 0, -1).astype(np.int32)


def check_size(model: Any, frames: int) -> None:
    """Raises UserError unless the model reads spectrograms of this length."""
    if model.image[0] != frames:
        raise UserError(f"config.model.frames is {model.image[0]}, config.examples.frames {frames}")


class SoundExamples(Examples):
    """One spectrogram of each sound."""

    def __init__(self, source: Any, like: "SoundExamples | None" = None, **options: Any):
        del like  # nothing is random, and nothing is learned from the data
        self.source, self.layout = source, SoundLayout(**options)
        self.lengths = np.asarray(source.lengths())
        self.bucket_of = buckets_of(self.lengths, self.layout)

    def load(self, index: int, bucket: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """{'spectrogram': float32 [F, 128, 1]}, log-mel, not normalised."""
        audio = centre(self.source[index]["audio"])
        return {"spectrogram": spectrogram(audio, self.layout.frames)}

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
