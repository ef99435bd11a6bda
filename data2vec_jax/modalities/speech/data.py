"""Speech examples: whole utterances normalised, then cropped to a few fixed lengths."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar

import jax
import numpy as np

from data2vec_jax.core.config import Length, PositiveFloat, Range
from data2vec_jax.core.errors import ExampleError, UserError
from data2vec_jax.data.fbank import Fbank, log_mel
from data2vec_jax.data.frame_labels import FrameLabels
from data2vec_jax.modalities.contract import (
    Examples,
    Labelled,
    check_varies,
    measured,
    with_bad_ones,
)
from data2vec_jax.modalities.speech.codec import RATE
from data2vec_jax.modalities.speech.samples import SAMPLES

Lengths = Annotated[Sequence[Annotated[float, Range(above=0, most=3600)]], Length()]
# Of hand-made features: frames as long and as far apart as those of the labels, and how many
# neighbours on each side.
FBANK, CONTEXT = Fbank(length=400, shift=320), 4
WHOLE = 60 * RATE  # samples; longer utterances are not read whole for a crop


@dataclasses.dataclass(frozen=True, kw_only=True)
class CropConfig:
    """Config section `examples` of speech, in pretraining; a `Layout`."""

    crops: Lengths  # lengths in seconds, ascending
    max_seconds: PositiveFloat = 3600.0  # longer utterances are left out
    # Folder of labels of frames, which HuBERT predicts (`data.frame_labels`); 'samples' for those
    # of the speech shipped inside. None: there are none.
    labels: str | None = None
    padded: ClassVar[bool] = False

    def __post_init__(self):
        crops = self.crops
        if list(crops) != sorted(set(crops)):
            raise UserError(
                f"config.examples.crops: {tuple(crops)} is not an ascending list of seconds"
            )

    @property
    def buckets(self) -> list[int]:
        return [round(seconds * RATE) for seconds in self.crops]

    @property
    def shapes(self) -> list[dict[str, jax.ShapeDtypeStruct]]:
        shapes = [{"audio": jax.ShapeDtypeStruct((n,), np.float32)} for n in self.buckets]
        if self.labels:
            for n, shape in zip(self.buckets, shapes, strict=True):
                shape["labels"] = jax.ShapeDtypeStruct((FBANK.frames(n),), np.int32)
        return shapes


def normalise(audio: np.ndarray) -> np.ndarray:
    """Zero mean, unit variance over the whole utterance, before any crop (spec 1.1)."""
    audio = audio - audio.mean(dtype=np.float64)
    return (audio / np.sqrt(audio.var(dtype=np.float64) + 1e-5)).astype(np.float32)


class SpeechExamples(Examples):
    """Random crops of the longest fixed length that an utterance fills; no padding (spec 1.1).

    Utterances shorter than the shortest crop are left out. With `like` (evaluation) the crop is
    the middle one. Of utterances above `WHOLE` samples only so many are read, those around the
    crop, and normalised.
    """

    def __init__(self, source: Any, like: "SpeechExamples | None" = None, **options: Any):
        self.source, self.fixed = source, like is not None
        self.layout = CropConfig(**options)
        longest = round(self.layout.max_seconds * RATE)
        # Not a frame: a wrong time stamp, where one above it is merely shorter than the crops.
        frame = min(FBANK.length, self.layout.buckets[0])
        self.lengths = measured(source, longest, "config.examples.max_seconds", frame)
        bucket_of = np.searchsorted(self.layout.buckets, self.lengths, "right") - 1
        self.bucket_of = with_bad_ones(bucket_of.astype(np.int32), source.bad)
        self.labels = None
        if folder := self.layout.labels:
            folder = SAMPLES / "speech" / "labels" if folder == "samples" else Path(folder)
            self.labels = FrameLabels(folder.expanduser(), source)

    def load(self, index: int, bucket: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """{'audio': float32 [S]} of the bucket's length, maybe {'labels': int32 [T]}."""
        length, whole = self.layout.buckets[bucket], int(self.lengths[index])
        read, first = max(WHOLE, length), 0
        if whole > read:
            start = self._start(whole - length, rng)
            first = min(max(start - (read - length) // 2, 0), whole - read)
            audio, start = self.source.part(index, first, read)["audio"], start - first
        else:
            audio = self.source[index]["audio"]
            if len(audio) < length:
                text = f"has {len(audio)} samples, needed {length}"
                raise ExampleError(self.source.location(index), "too short", text)
            start = self._start(len(audio) - length, rng)
        check_varies(audio, self.source, index)
        found = {"audio": normalise(audio)[start : start + length]}
        if self.labels:
            count, hop = FBANK.frames(length), FBANK.shift / RATE
            found["labels"] = self.labels.crop(index, (first + start) / RATE, count, hop)
        return found

    def _start(self, spare, rng):
        return spare // 2 if self.fixed else int(rng.integers(spare + 1))

    def check(self, model: Any) -> None:
        """Any crop of at least one frame can be read."""
        samples = self.layout.buckets[0]
        if model.mask_shape(self.layout.shapes[0]) < 1:
            raise UserError(f"config.examples.crops: {samples} samples are less than one frame")
        if not self.labels:
            return
        if (model.frontend.hop, model.frontend.reach) != (FBANK.shift, FBANK.length):
            raise UserError(
                f"config.examples.labels: they are of frames every {FBANK.shift} samples, made of "
                f"{FBANK.length}; the model's are every {model.frontend.hop}"
            )
        known = getattr(model.pretext, "clusters", self.labels.clusters)
        if known != self.labels.clusters:
            raise UserError(
                f"config.objective.clusters: {known}, but {self.layout.labels} has labels of "
                f"{self.labels.clusters} clusters"
            )


def check_labels(source: Any) -> None:
    """Raises UserError unless the examples of a source have aligned phones."""
    first, item = next(source.items())
    if "phones" not in item:
        raise UserError(
            f"{source.uri}: its examples have no labels (aligned phones), so nothing can be probed"
        )
    phones_of(source, first)


def phones_of(source: Any, index: int) -> tuple[np.ndarray, list[str]]:
    """(end of each phone in seconds, its name) of an example, from its field `phones`.

    The field is a list of (start second, end second, name), as the samples have it, or text, as a
    table has it: 'END NAME END NAME ...', each phone from the end of the one before.
    Raises UserError: the text is anything else.
    """
    phones = source.field(index, "phones")
    if not isinstance(phones, str):
        return np.array([end for _, end, _ in phones]), [name for *_, name in phones]
    words = phones.split()
    try:
        ends = np.array([float(word) for word in words[::2]])
    except ValueError:
        ends = np.array([])
    names = words[1::2]
    if not names or len(ends) != len(names) or (np.diff(ends) < 0).any():
        raise UserError(
            f"{source.location(index)}: phones are '{phones[:40]}'; wanted 'END NAME END NAME ...',"
            " with ascending ends in seconds"
        )
    return ends, names


def labelled(source: Any, like: SpeechExamples, **options: Any) -> Labelled:
    """Consecutive pieces of the shortest crop with the phone at the middle of each frame.

    The classes are the source's label names, or if it has none the phones of the training examples
    `like`. Raises UserError: a phone is none of them, or no example is as long as a piece.
    """
    from data2vec_jax.modalities.speech.frontend import frames

    length = CropConfig(**options).buckets[0]
    count = frames(length)
    middle = (np.arange(count) * 320 + 200) / RATE  # seconds from the start of the piece
    names = source.label_names
    if not names:
        train = like.source
        good = (i for i in range(len(train)) if i not in train.bad)
        names = sorted({name for i in good for name in phones_of(train, i)[1]})
    number = {name: i for i, name in enumerate(names)}
    pieces, labels = [], []
    for index, item in source.items():
        audio = normalise(item["audio"])
        ends, phones = phones_of(source, index)
        unknown = set(phones) - set(number)
        if unknown:
            raise UserError(
                f"{source.location(index)}: phone '{min(unknown)}' is none of those of the "
                f"training examples: {', '.join(names)}"
            )
        numbers = np.array([number[phone] for phone in phones] + [-1])
        for start in range(0, len(audio) - length + 1, length):
            pieces.append(audio[start : start + length])
            labels.append(numbers[np.searchsorted(ends, start / RATE + middle, "right")])
    if not pieces:
        raise UserError(
            f"{source.uri}: no example of {source.split} is as long as a crop, "
            f"{length / RATE:g} s (config.examples.crops)"
        )
    return Labelled({"audio": np.stack(pieces)}, np.stack(labels), names)


def stacked_log_mel(
    train: Mapping[str, np.ndarray], inputs: Mapping[str, np.ndarray]
) -> np.ndarray:
    """Hand-made features: audio [N, S] -> log-mel of 80 bins, float32 [N, T, 720].

    A frame of 25 ms at each label, with `CONTEXT` frames before and after, or else an encoder is
    better by its context alone. At the ends the last frame is repeated.
    """
    del train
    frames = np.stack([log_mel(audio, FBANK) for audio in inputs["audio"]])  # [N, T, 80]
    T = frames.shape[1]
    shifts = np.arange(-CONTEXT, CONTEXT + 1)
    places = np.clip(np.arange(T)[:, None] + shifts, 0, T - 1)  # [T, 9]
    return frames[:, places].reshape(len(frames), T, -1)


def picture(inputs: Mapping[str, np.ndarray]) -> np.ndarray:
    """audio [S] -> its log-mel spectrogram, float32 [80, T], low frequencies at the bottom.

    A column is as long as a frame of the encoder.
    """
    return log_mel(inputs["audio"], FBANK).T[::-1]
