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
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import soundfile

from data2vec_jax.core.errors import ExampleError
from data2vec_jax.data.codecs.base import Codec, Item, Measure, unreadable

BLOCK = 2**22  # samples of all channels that are decoded at a time
UNKNOWN = 2**62  # lengths above it stand for one that the header does not have
PER_BYTE = 8192  # samples; no format gets as many into a byte, even of silence
# A frame is silent if its RMS is below -60 dB of full scale; a sample is clipped if it is at it.
SILENCE, FULL_SCALE = 1e-3, 32766 / 32768
MEASURES = (
    Measure("length", "seconds", 0.5, 60, "too short", "too long"),
    Measure("peak", "of full scale", 0.01, below="faint"),
    Measure("clipped", "of the samples", most=1e-3, above="clipped"),
    Measure("silence", "of the frames", most=0.9, above="silent"),
)


@dataclass(frozen=True, kw_only=True)
class AudioConversion:
    """How `prepare` changes audio; by default not at all."""

    resample: bool = field(
        default=False, metadata={"help": "to the rate that models read, by soxr"}
    )
    encode: Literal["", "flac", "wav"] = field(
        default="", metadata={"help": "all files, to one channel in this format"}
    )


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
        read_part=functools.partial(read_part, **options),
        measure=functools.partial(count_samples, **options),
        measure_record=functools.partial(count_record_samples, **options),
        conversion=AudioConversion,
        convert=functools.partial(convert, **options),
        examine=examine,
        measures=MEASURES,
        kinds=kinds or {},
    )


def read_audio(file: str | io.BytesIO, name: str, *, sample_rate: int) -> Item:
    """An audio file -> {'audio', 'sample_rate'}. Raises ExampleError as `open_audio`."""
    return {"audio": decode_audio(file, name, sample_rate), "sample_rate": sample_rate}


def read_part(
    file: str | io.BytesIO, name: str, start: int, count: int, *, sample_rate: int
) -> Item:
    """As `read_audio`, of `count` samples from `start`: no others are decoded."""
    audio = decode_audio(file, name, sample_rate, start, count)
    return {"audio": audio, "sample_rate": sample_rate}


def read_record(value: Any, rest: Item, name: str, *, sample_rate: int) -> Item:
    """A record's audio, a file's bytes or raw samples -> {'audio', 'sample_rate'}."""
    check_rate(rest.pop("sample_rate", sample_rate), name, sample_rate)
    if isinstance(value, bytes):
        return read_audio(io.BytesIO(value), name, sample_rate=sample_rate)
    return {"audio": scale_audio(np.asarray(value), name), "sample_rate": sample_rate}


def count_samples(file: str | io.BytesIO, name: str, *, sample_rate: int) -> int:
    """Length of an audio file in samples, from its header; one without a length is decoded.

    Raises ExampleError as `open_audio`.
    """
    with open_audio(file, name, sample_rate) as sound:
        if sound.frames < UNKNOWN:
            return sound.frames
        return sum(len(block) for block in blocks_of(sound, UNKNOWN))


def count_record_samples(
    value: Any, rest: Mapping[str, Any], name: str, *, sample_rate: int
) -> int:
    """Length in samples of a record's audio, a file's bytes or raw samples."""
    check_rate(rest.get("sample_rate", sample_rate), name, sample_rate)
    if isinstance(value, bytes):
        return count_samples(io.BytesIO(value), name, sample_rate=sample_rate)
    if not isinstance(value, np.ndarray | list):
        raise ExampleError(name, "format", f"audio is a {type(value).__name__}, needed samples")
    return len(value)


@contextmanager
def open_audio(file: str | io.BytesIO, name: str, sample_rate: int) -> Iterator[Any]:
    """An audio file, open. Raises ExampleError: missing, damaged, another sample rate, or a header
    that promises more than the file can hold.
    """
    try:
        with soundfile.SoundFile(file) as sound:
            check_rate(sound.samplerate, name, sample_rate)
            check_whole(sound, name)
            size = os.path.getsize(file) if isinstance(file, str) else file.getbuffer().nbytes
            if PER_BYTE * size < sound.frames < UNKNOWN:
                text = f"damaged audio, {size:,} bytes cannot hold {sound.frames:,} samples"
                raise ExampleError(name, "damaged", text)
            yield sound
    except (soundfile.SoundFileError, OSError, MemoryError) as error:
        if isinstance(file, str) and not os.path.exists(file):
            raise ExampleError(name, "missing", "no such file") from error
        raise unreadable(name, "audio", error) from error


def decode_audio(
    file: str | io.BytesIO, name: str, sample_rate: int, start: int = 0, count: int | None = None
) -> np.ndarray:
    """Audio file -> float32 [n] in [-1, 1], one channel; `count` samples from `start`, or all.

    Memory is taken as samples are found, not as the header promises. Raises ExampleError as
    `open_audio`, or if there are fewer samples.
    """
    with open_audio(file, name, sample_rate) as sound:
        if start:
            sound.seek(start)
        known = count is not None or sound.frames < UNKNOWN
        wanted = sound.frames - start if count is None else count
        blocks = list(blocks_of(sound, wanted)) or [np.zeros(0, np.float32)]
        audio = blocks[0] if len(blocks) == 1 else np.concatenate(blocks)
        if known and len(audio) < wanted:
            found, promised = start + len(audio), start + wanted
            text = f"damaged audio, ends after {found} of {promised} samples"
            raise ExampleError(name, "damaged", text)
    return scale_audio(audio, name)


def blocks_of(sound: Any, count: int) -> Iterator[np.ndarray]:
    """The next `count` samples of an open file, or as many as there are, the mean of its channels:
    float32 [n], a block after the other.
    """
    # After each read soundfile seeks to where it is, which fails in a FLAC without a length.
    sound.seekable = lambda: False
    size = max(BLOCK // sound.channels, 1)
    while count:
        asked = min(count, size)
        block = sound.read(asked, dtype="float32", always_2d=True)
        block = block[:, 0] if sound.channels == 1 else block.mean(axis=1)
        count -= len(block)
        yield block
        if len(block) < asked:
            return


def check_rate(found: Any, name: str, needed: int) -> None:
    """Raises ExampleError unless the two rates, in Hz, are the same."""
    if found != needed:
        raise ExampleError(
            name,
            "sample rate",
            f"sample rate is {found} Hz, needed {needed} Hz; convert it first "
            f"(ffmpeg -ar {needed}): nothing is resampled silently",
        )


def check_whole(sound: Any, name: str) -> None:
    """Raises ExampleError if a WAV file is shorter than its header says.

    libsndfile corrects `sound.frames` then, and says so in its notes. A stream's header announces
    2 or 4 GiB, for want of the length.
    """
    cut = re.search(r"^data : (\d+) \(should be (\d+)\)", sound.extra_info, re.MULTILINE)
    if cut and int(cut[1]) < 0x7FFF0000:
        text = f"damaged audio, ends after {cut[2]} of {cut[1]} bytes"
        raise ExampleError(name, "damaged", text)


def scale_audio(samples: np.ndarray, name: str) -> np.ndarray:
    """Raw samples [n], int16 or float -> float32 [n] in [-1, 1]."""
    if samples.ndim != 1 or samples.dtype.kind not in "fi" or samples.dtype.itemsize < 2:
        shape, dtype = list(samples.shape), samples.dtype
        text = f"audio is {dtype} {shape}, needed int16 or float [n]"
        raise ExampleError(name, "format", text)
    if samples.dtype.kind == "i":
        samples = samples / np.float32(-np.iinfo(samples.dtype).min)
    if not np.isfinite(samples).all():
        text = "damaged audio, has samples that are not finite"
        raise ExampleError(name, "not finite", text)
    return np.clip(samples.astype(np.float32, copy=False), -1, 1)


def convert(options: AudioConversion, data: bytes, name: str, *, sample_rate: int) -> bytes:
    """A file's bytes -> those of a file of one channel at `sample_rate` Hz; audio that needs no
    change keeps its bytes, unless `encode` asks for a format.

    Raises ExampleError as `open_audio`.
    """
    try:
        found = soundfile.info(io.BytesIO(data))
    except (soundfile.SoundFileError, OSError) as error:
        raise unreadable(name, "audio", error) from error
    resample = options.resample and found.samplerate != sample_rate
    if not resample and not options.encode:
        return data
    rate = found.samplerate
    audio = decode_audio(io.BytesIO(data), name, rate)
    if resample:
        import soxr

        # Its filter rings beyond full scale where a peak was near it.
        audio = np.clip(soxr.resample(audio, rate, sample_rate, "VHQ"), -1, 1)
        rate = sample_rate
    if not len(audio):
        text = f"no sample is left of {found.frames} at {sample_rate:,} Hz"
        raise ExampleError(name, "too short", text)
    file = io.BytesIO()
    soundfile.write(file, audio, rate, format=options.encode or "flac", subtype="PCM_16")
    return file.getvalue()


def examine(item: Item) -> tuple[float, ...]:
    """The `MEASURES` of decoded audio; silence is measured in frames of 10 ms."""
    audio, rate = item["audio"], item["sample_rate"]
    size, frame = np.abs(audio), rate // 100
    frames = audio[: len(audio) // frame * frame].reshape(-1, frame)
    rms = np.sqrt(np.mean(np.square(frames), axis=1)) if len(frames) else np.zeros(1)
    clipped = np.count_nonzero(size >= FULL_SCALE) / max(len(audio), 1)
    return len(audio) / rate, float(size.max(initial=0)), clipped, float(np.mean(rms < SILENCE))
