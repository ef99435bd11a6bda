"""Sounds for fine-tuning: shifted in a circle, louder or softer, with noise; as they are otherwise.

docs/spec/sound.md sections 1 and 6. Mixing and masks are of whole batches, in `tasks.mixing`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from data2vec_jax.core.config import NonNegativeFloat
from data2vec_jax.modalities.contract import Inputs
from data2vec_jax.modalities.sound.data import SoundLayout, check_size, measured_buckets
from data2vec_jax.modalities.sound.spectrogram import centre, spectrogram

ROLLED_FRAMES = 10  # by noise: -10 to 9


@dataclasses.dataclass(frozen=True, kw_only=True)
class SoundInputLayout(SoundLayout):
    """Config section `examples` of sound, in fine-tuning; a `Layout`."""

    roll: bool = False  # waveforms shift by any offset, and are multiplied by Beta(10, 10) + 0.5
    # Largest strength of the noise that is added to log-mel spectrograms, padding included, which
    # then shift by -10 to 9 frames. The authors add up to 0.1 after the division by 2 std.
    noise: NonNegativeFloat = 0.0


class Sounds(Inputs):
    """spectrogram float32 [F, 128, 1]. With `like` (evaluation) nothing is random."""

    def __init__(self, source: Any, like: "Sounds | None" = None, **options: Any):
        self.source, self.fixed = source, like is not None
        self.layout = SoundInputLayout(**options)
        self.lengths, self.bucket_of = measured_buckets(source, self.layout)

    def load(self, index: int, bucket: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """See `prepare`."""
        return self.prepare(index, self.source[index], bucket, rng)

    def prepare(
        self, index: int, item: Mapping[str, Any], bucket: int, rng: np.random.Generator
    ) -> dict[str, np.ndarray]:
        """{'spectrogram': float32 [F, 128, 1]}, log-mel, not normalised."""
        audio, layout = centre(item["audio"]), self.layout
        if layout.roll and not self.fixed:
            audio = np.roll(audio, int(rng.integers(len(audio))))
            audio = audio * (rng.beta(10, 10) + 0.5)
        found = spectrogram(audio, layout.frames)
        if layout.noise and not self.fixed:
            noise = rng.random(found.shape, np.float32) * np.float32(rng.random() * layout.noise)
            found = np.roll(found + noise, int(rng.integers(-ROLLED_FRAMES, ROLLED_FRAMES)), axis=0)
        return {"spectrogram": found}

    def check(self, model: Any) -> None:
        """The lengths of spectrograms must agree."""
        check_size(model, self.layout.frames)
