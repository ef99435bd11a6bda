"""Audio: waveforms of one channel, from files that libsndfile reads (wav, flac, ogg, mp3, ...).

Items hold audio, float32 [n] in [-1, 1] (channels are averaged), and sample_rate, an int. Nothing
is ever resampled.
"""

import functools
import io
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import soundfile

from data2vec_jax.core.errors import UserError
from data2vec_jax.data.codecs.base import Codec, Item, unreadable


def codec(
    sample_rate: int = 16_000, kinds: Mapping[str, Callable[..., Any]] | None = None
) -> Codec:
    """The codec of audio at `sample_rate` Hz; audio of any other rate is refused.

    In records: audio_bytes (a file), audio or speech (int16 or float [n], or a file), and
    sample_rate; raw samples without one are believed to have the right rate.
    """
    options = {"sample_rate": sample_rate}
    return Codec(
        field="audio",
        suffixes=(".flac", ".mp3", ".oga", ".ogg", ".opus", ".wav"),
        read=functools.partial(read_audio, **options),
        record_fields=("audio_bytes", "audio", "speech"),
        read_record=functools.partial(read_record, **options),
        measure=functools.partial(count_samples, **options),
        measure_record=functools.partial(count_record_samples, **options),
        kinds=kinds or {},
    )


def read_audio(file: str | io.BytesIO, name: str, *, sample_rate: int) -> Item:
    """An audio file -> {'audio', 'sample_rate'}. Raises UserError as `open_audio`."""
    return {"audio": decode_audio(file, name, sample_rate), "sample_rate": sample_rate}


def read_record(value: Any, rest: Item, name: str, *, sample_rate: int) -> Item:
    """A record's audio, a file's bytes or raw samples -> {'audio', 'sample_rate'}."""
    check_rate(int(rest.pop("sample_rate", sample_rate)), name, sample_rate)
    if isinstance(value, bytes):
        return read_audio(io.BytesIO(value), name, sample_rate=sample_rate)
    return {"audio": scale_audio(np.asarray(value), name), "sample_rate": sample_rate}


def count_samples(file: str | io.BytesIO, name: str, *, sample_rate: int) -> int:
    """Length of an audio file in samples, from its header. Raises UserError as `open_audio`."""
    with open_audio(file, name, sample_rate) as sound:
        return sound.frames


def count_record_samples(
    value: Any, rest: Mapping[str, Any], name: str, *, sample_rate: int
) -> int:
    """Length in samples of a record's audio, a file's bytes or raw samples."""
    check_rate(int(rest.get("sample_rate", sample_rate)), name, sample_rate)
    if isinstance(value, bytes):
        return count_samples(io.BytesIO(value), name, sample_rate=sample_rate)
    return len(value)


@contextmanager
def open_audio(file: str | io.BytesIO, name: str, sample_rate: int) -> Iterator[Any]:
    """An audio file, open. Raises UserError: missing, damaged, another sample rate."""
    try:
        with soundfile.SoundFile(file) as sound:
            check_rate(sound.samplerate, name, sample_rate)
            check_whole(sound, name)
            yield sound
    except (soundfile.SoundFileError, OSError) as error:
        if isinstance(file, str) and not os.path.exists(file):
            raise UserError(f"{name}: no such file") from error
        raise unreadable(name, "audio", error) from error


def decode_audio(file: str | io.BytesIO, name: str, sample_rate: int) -> np.ndarray:
    """Audio file -> float32 [n] in [-1, 1], one channel. Raises UserError as `open_audio`."""
    with open_audio(file, name, sample_rate) as sound:
        audio, frames = sound.read(dtype="float32", always_2d=True), sound.frames
    if len(audio) < frames:
        raise UserError(f"{name}: damaged audio, ends after {len(audio)} of {frames} samples")
    return scale_audio(audio.mean(axis=1), name)


def check_rate(found: int, name: str, needed: int) -> None:
    """Raises UserError unless the two rates, in Hz, are the same."""
    if found != needed:
        raise UserError(
            f"{name}: sample rate is {found} Hz, needed {needed} Hz; convert it first "
            f"(ffmpeg -ar {needed}): nothing is resampled silently"
        )


def check_whole(sound: Any, name: str) -> None:
    """Raises UserError if a WAV file is shorter than its header says.

    libsndfile corrects `sound.frames` then, and says so in its notes. A stream's header announces
    2 or 4 GiB, for want of the length.
    """
    cut = re.search(r"^data : (\d+) \(should be (\d+)\)", sound.extra_info, re.MULTILINE)
    if cut and int(cut[1]) < 0x7FFF0000:
        raise UserError(f"{name}: damaged audio, ends after {cut[2]} of {cut[1]} bytes")


def scale_audio(samples: np.ndarray, name: str) -> np.ndarray:
    """Raw samples [n], int16 or float -> float32 [n] in [-1, 1]."""
    if samples.ndim != 1 or samples.dtype.kind not in "fi" or samples.dtype.itemsize < 2:
        shape, dtype = list(samples.shape), samples.dtype
        raise UserError(f"{name}: audio is {dtype} {shape}, needed int16 or float [n]")
    if samples.dtype.kind == "i":
        samples = samples / np.float32(-np.iinfo(samples.dtype).min)
    if not np.isfinite(samples).all():
        raise UserError(f"{name}: damaged audio, has samples that are not finite")
    return np.clip(samples.astype(np.float32), -1, 1)
