"""Kaldi's log-mel filterbank, on the host (numpy, FFT) and on the device (JAX, one matrix).

S samples, F frames, n samples of a frame, P = 2^k >= n points of its Fourier transform. Per frame
(docs/spec/sound.md section 2; the formulas are those of torchaudio 2.11 `compliance/kaldi.py`):
subtract the mean, pre-emphasis, window, zeros up to P points, power spectrum, triangles on the mel
scale, natural logarithm. There is no dither and no energy term, and waveforms in [-1, 1] are not
scaled by 2^15 as Kaldi's own tools do.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from data2vec_jax.core.errors import UserError, nearest

BLOCK = 64  # frames that the host computes at a time, so that they stay in the cache
FLOOR = 2.0**-23  # of mel power, the epsilon of float32; its logarithm is -15.942385


def _hann(n: int) -> np.ndarray:
    return 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(n) / (n - 1))


# Symmetric windows: the first and the last of n samples have the same weight.
WINDOWS: dict[str, Callable[[int], np.ndarray]] = {
    "hann": _hann,
    "povey": lambda n: _hann(n) ** 0.85,  # Kaldi's default
    "hamming": lambda n: 0.54 - 0.46 * np.cos(2 * np.pi * np.arange(n) / (n - 1)),
}


def frames(samples: Any, length: int = 400, shift: int = 160) -> Any:
    """Number of frames of `length` samples, `shift` apart, that fit into `samples`.

    1 + floor((samples - length) / shift), 0 if not one fits. Of an int, or of an array of any kind.
    """
    count = (samples - length) // shift + 1
    return max(count, 0) if isinstance(count, int) else count.clip(0)


def mel(hertz: Any) -> Any:
    """Frequency in Hz -> mel: 1127 ln(1 + f / 700)."""
    return 1127.0 * np.log1p(np.asarray(hertz, np.float64) / 700.0)


@dataclass(frozen=True)
class Fbank:
    """Options of a filterbank. Raises UserError for an impossible value.

    The constants are computed in float64 once for equal options. Do not write to them.
    """

    bins: int = 80  # triangles on the mel scale; 128 of them at 512 points leave bin 3 empty
    window: str = "povey"  # a name of `WINDOWS`
    length: int = 400  # of a frame, in samples: 25 ms at 16 kHz
    shift: int = 160  # from one frame to the next, in samples: 10 ms at 16 kHz
    sample_rate: int = 16_000  # in Hz
    low: float = 20.0  # where the lowest triangle begins, in Hz
    high: float | None = None  # where the highest triangle ends, in Hz; None: half the sample rate
    preemphasis: float = 0.97
    floor: float = FLOOR  # least power of a bin, so that its logarithm is finite

    def __post_init__(self):
        if self.window not in WINDOWS:
            hint = nearest(self.window, WINDOWS)
            raise UserError(f"fbank.window: no '{self.window}'{hint}")
        half = self.sample_rate / 2
        top = half if self.high is None else self.high
        good = {
            "bins": (self.bins >= 1, "1 or more"),
            "length": (self.length >= 2, "2 samples or more"),
            "shift": (self.shift >= 1, "1 sample or more"),
            "sample_rate": (self.sample_rate > 0, "above 0 Hz"),
            "low": (0 <= self.low < top, f"from 0 to below {top:g} Hz"),
            "high": (top <= half, f"at most {half:g} Hz, half the sample rate"),
            "preemphasis": (0 <= self.preemphasis <= 1, "a factor from 0 to 1"),
            "floor": (self.floor > 0, "above 0"),
        }
        for field in fields(self):
            fits, meaning = good.get(field.name, (True, ""))
            if not fits:
                value = getattr(self, field.name)
                raise UserError(f"fbank.{field.name}: {value} is not {meaning}")

    def frames(self, samples: Any) -> Any:
        """Number of frames of a waveform of `samples` samples; see the function `frames`."""
        return frames(samples, self.length, self.shift)

    @property
    def points(self) -> int:
        """P, points of the Fourier transform: the least power of 2 that holds a frame."""
        return 1 << (self.length - 1).bit_length()

    @property
    def weights(self) -> np.ndarray:
        """Triangles: float64 [P / 2 + 1, bins], from power spectrum to mel power."""
        return _weights(self)

    @property
    def matrix(self) -> np.ndarray:
        """Window and Fourier transform: float64 [n, P + 2], real parts, then imaginary ones."""
        return _matrix(self)


@functools.lru_cache(maxsize=16)
def _weights(options: Fbank) -> np.ndarray:
    """Triangles with peak 1, each from the middle of its lower neighbour to that of its upper."""
    top = options.sample_rate / 2 if options.high is None else options.high
    low, high = mel(options.low), mel(top)
    step = (high - low) / (options.bins + 1)
    left = low + step * np.arange(options.bins)
    # The highest frequency, half the sample rate, is where the last triangle may end: weight 0.
    hertz = options.sample_rate / options.points * np.arange(options.points // 2)
    at = mel(hertz)[:, None]
    weights = np.maximum(np.minimum(at - left, left + 2 * step - at) / step, 0.0)
    return np.pad(weights, ((0, 1), (0, 0)))


@functools.lru_cache(maxsize=16)
def _matrix(options: Fbank) -> np.ndarray:
    """What the window and the transform make of each of the n unit vectors."""
    spectrum = np.fft.rfft(np.diag(WINDOWS[options.window](options.length)), options.points)
    return np.concatenate([spectrum.real, spectrum.imag], axis=1)


def log_mel(audio: np.ndarray, options: Fbank) -> np.ndarray:
    """Waveform [S] -> float32 [F, bins], computed in float64 on the host.

    Raises UserError: the waveform has more than one axis.
    """
    audio = np.asarray(audio)
    if audio.ndim != 1:
        raise UserError(f"fbank: a waveform has the shape [S], not {list(audio.shape)}")
    if not options.frames(len(audio)):
        return np.zeros((0, options.bins), np.float32)
    views = np.lib.stride_tricks.sliding_window_view(audio, options.length)[:: options.shift]
    window = WINDOWS[options.window](options.length)
    power = np.empty((len(views), options.points // 2 + 1))
    padded = np.zeros((min(len(views), BLOCK), options.points))
    for start in range(0, len(views), BLOCK):
        view = views[start : start + BLOCK]
        frames = padded[: len(view)]
        x = frames[:, : options.length]
        np.subtract(view, view.mean(axis=1, keepdims=True, dtype=np.float64), out=x)
        before = options.preemphasis * x
        x[:, 1:] -= before[:, :-1]
        x[:, 0] -= before[:, 0]  # the first sample follows itself
        x *= window
        parts = np.fft.rfft(frames).view(np.float64)  # real, imaginary, real, ...
        np.square(parts, out=parts)
        np.add(parts[:, ::2], parts[:, 1::2], out=power[start : start + BLOCK])
    power = power @ options.weights
    np.maximum(power, options.floor, out=power)
    return np.log(power, out=power).astype(np.float32)


def device_log_mel(audio: jax.Array, options: Fbank) -> jax.Array:
    """Waveforms [..., S] -> float32 [..., F, bins], for the device: two matrix products, no FFT.

    Always in full float32: bfloat16 would round loud frequencies by more than quiet ones hold. On
    speech 0.07 % of the bins differ from `log_mel` by more than 1e-4, the quietest of a frame.
    """
    audio = jnp.asarray(audio, jnp.float32)
    count = options.frames(audio.shape[-1])
    if not count:
        return jnp.zeros((*audio.shape[:-1], 0, options.bins), jnp.float32)
    product = functools.partial(
        jnp.matmul, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32
    )
    x = _split_frames(audio, count, options)
    # Mean and pre-emphasis could be parts of the matrix. But they remove the loud low frequencies,
    # whose rounding would hide the quiet high ones: on speech five to seven times as many bins
    # would be off.
    x = x - jnp.mean(x, axis=-1, keepdims=True)
    before = jnp.concatenate([x[..., :1], x[..., :-1]], axis=-1)
    x = x - options.preemphasis * before
    spectrum = product(x, options.matrix.astype(np.float32))
    real, imaginary = jnp.split(spectrum, 2, axis=-1)
    power = product(jnp.square(real) + jnp.square(imaginary), options.weights.astype(np.float32))
    return jnp.log(jnp.maximum(power, options.floor))


def _split_frames(audio: jax.Array, count: int, options: Fbank) -> jax.Array:
    """[..., S] -> [..., F, n]: pieces of one shift side by side, as TPUs gather slowly."""
    parts = -(-options.length // options.shift)  # rounded up: the last piece is cut
    total = (count - 1 + parts) * options.shift
    audio = audio[..., :total]
    rest = [(0, 0)] * (audio.ndim - 1) + [(0, total - audio.shape[-1])]
    pieces = jnp.pad(audio, rest).reshape(*audio.shape[:-1], -1, options.shift)
    joined = jnp.concatenate([pieces[..., i : i + count, :] for i in range(parts)], axis=-1)
    return joined[..., : options.length]


def mfcc(audio: np.ndarray, options: Fbank = Fbank(bins=23), number: int = 13) -> np.ndarray:
    """Kaldi's MFCC: waveform [S] -> float32 [F, number], in float64 on the host.

    The orthonormal cosine transform (II) of the log-mel frames; coefficient k is then multiplied by
    1 + 11 sin(pi k / 22). The first is no energy (baselines spec 5).
    """
    k, bins = np.arange(number), options.bins
    transform = np.cos(np.pi / bins * np.outer(np.arange(bins) + 0.5, k)) * np.sqrt(2 / bins)
    transform[:, 0] = np.sqrt(1 / bins)
    lifter = 1 + 11 * np.sin(np.pi * k / 22)
    return (log_mel(audio, options).astype(np.float64) @ transform * lifter).astype(np.float32)


def with_differences(x: np.ndarray) -> np.ndarray:
    """[F, D] -> [F, 3 D]: with first and second differences in time, regressions over 5 frames."""

    def difference(x):
        x = np.pad(x, ((2, 2), (0, 0)), "edge")
        return (x[3:-1] - x[1:-3] + 2 * (x[4:] - x[:-4])) / 10

    if not len(x):
        return np.zeros((0, 3 * x.shape[1]), np.float32)
    first = difference(x)
    return np.concatenate([x, first, difference(first)], axis=1)
