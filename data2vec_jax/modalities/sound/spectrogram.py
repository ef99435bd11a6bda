"""Spectrograms of sound as EAT (arXiv 2401.03497) reads them; docs/spec/sound.md section 1.

S samples, F frames of 10 ms. The order is the authors': the mean of the waveform is subtracted, the
log-mel spectrogram is padded with 0, and then (in the model) it is normalised. So a padded frame
is (0 - mean) / (2 std), which is louder than silence.
"""

import jax
import jax.numpy as jnp
import numpy as np

from data2vec_jax.core.errors import UserError
from data2vec_jax.data.fbank import Fbank, device_log_mel, log_mel

BINS = 128
FBANK = Fbank(bins=BINS, window="hann")
# Mean and standard deviation of log-mel spectrograms of a corpus (paper, table 4).
AUDIOSET = (-4.268, 4.569)


def samples_of(frames: int) -> int:
    """Samples that F frames cover."""
    return (frames - 1) * FBANK.shift + FBANK.length


def check_frames(frames: int, section: str) -> None:
    """Raises UserError unless the frames are whole patches of 16."""
    if frames < 16 or frames % 16:
        raise UserError(f"config.{section}.frames: {frames} is not a multiple of 16, the patch")


def centre(audio: np.ndarray) -> np.ndarray:
    """Waveform [S] without its mean."""
    return audio - audio.mean(dtype=np.float64)


def spectrogram(audio: np.ndarray, frames: int) -> np.ndarray:
    """Centred waveform [S] at 16 kHz -> log-mel float32 [F, 128, 1], on the host, not normalised.

    frames: F; a shorter spectrogram is padded with 0, a longer one loses its end.
    """
    found = log_mel(audio[: samples_of(frames)], FBANK)
    return np.pad(found, ((0, frames - len(found)), (0, 0)))[..., None]


def device_spectrogram(audio: jax.Array, length: jax.Array, frames: int) -> jax.Array:
    """Waveforms [B, S], of which the first `length` int [B] samples are not padding, -> float32
    [B, F, 128, 1] as `spectrogram` makes of each, centred and without its padding, on the device.
    """
    inside = jnp.arange(audio.shape[-1]) < length[:, None]
    audio = jnp.where(inside, audio.astype(jnp.float32), 0.0)
    mean = jnp.sum(audio, -1) / jnp.maximum(length, 1)
    found = device_log_mel(audio - mean[:, None], FBANK)[:, :frames]
    # A frame counts if all its samples do.
    whole = jnp.arange(found.shape[1]) < FBANK.frames(length)[:, None]
    found = jnp.where(whole[..., None], found, 0.0)
    return jnp.pad(found, ((0, 0), (0, frames - found.shape[1]), (0, 0)))[..., None]
