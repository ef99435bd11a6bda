"""Whole utterances for fine-tuning: normalised, then padded to a few fixed lengths."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from data2vec_jax.errors import UserError
from data2vec_jax.modalities.contract import Layout
from data2vec_jax.modalities.speech.data import RATE, normalise


def layout(*, seconds: Sequence[float], cut: bool = False) -> Layout:
    """Config section `examples` of speech.

    seconds: lengths of rows, ascending; an utterance is padded to the shortest that holds it. cut:
    longer ones are cut (training: at random, evaluation: in the middle), else they are left out.
    """
    if not seconds or list(seconds) != sorted(set(seconds)) or seconds[0] <= 0:
        raise UserError(
            f"config.examples.seconds: {tuple(seconds)} is not an ascending list of seconds"
        )
    samples = [round(s * RATE) for s in seconds]
    length = jax.ShapeDtypeStruct((), np.int32)
    shapes = [{"audio": jax.ShapeDtypeStruct((n,), np.float32), "length": length} for n in samples]
    return Layout(samples, shapes, padded=True)


class Utterances:
    """audio float32 [S], zero after `length` samples. With `like` nothing is random."""

    def __init__(self, source: Any, like: "Utterances | None" = None, **options: Any):
        self.source, self.fixed = source, like is not None
        self.layout = layout(**options)
        longest = self.layout.buckets[-1]
        self.lengths = np.asarray(source.lengths())
        held = np.minimum(self.lengths, longest) if options.get("cut") else self.lengths
        self.bucket_of = np.searchsorted(self.layout.buckets, held)
        self.bucket_of[held > longest] = -1

    def load(self, index: int, bucket: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """See `prepare`."""
        return self.prepare(index, self.source[index], bucket, rng)

    def prepare(
        self, index: int, item: Mapping[str, Any], bucket: int, rng: np.random.Generator
    ) -> dict[str, np.ndarray]:
        """{'audio': float32 [S] of the bucket's length, 'length': int32}."""
        audio, size = normalise(item["audio"]), self.layout.buckets[bucket]
        spare = max(len(audio) - size, 0)
        start = spare // 2 if self.fixed else int(rng.integers(spare + 1))
        audio = audio[start : start + size]
        return {
            "audio": np.pad(audio, (0, size - len(audio))), "length": np.int32(len(audio)),
        }  # fmt: skip

    def check(self, model: Any) -> None:
        """The shortest utterance must have a frame; padding must not leak into statistics."""
        if model.frontend.norm == "group" and model.padding == "exact":
            raise UserError(
                "config.model.frontend.norm: 'group' takes statistics over padding too; use "
                "'layer', or config.model_changes.padding='reference'"
            )
        used = self.lengths[self.bucket_of >= 0]
        shape = jax.ShapeDtypeStruct((int(used.min(initial=self.layout.buckets[0])),), np.float32)
        if model.mask_shape({"audio": shape}) < 1:
            raise UserError(f"{self.source.uri}: an utterance of {shape.shape[0]} samples has none")

    def save_assets(self, folder: Path) -> None:
        """Nothing beside the config."""
