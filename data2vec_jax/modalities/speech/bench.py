"""The benchmark's utterances."""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from data2vec_jax.modalities.contract import Bench

CPU_SECONDS = 10.0


def one_length(examples: dict[str, Any], cpu: bool) -> dict[str, Any]:
    """The longest crop, on a CPU no more than `CPU_SECONDS`."""
    longest = examples["crops"][-1]
    return examples | {"crops": [min(longest, CPU_SECONDS) if cpu else longest]}


def length(config: dict[str, Any]) -> float:
    """Seconds."""
    return config["examples"]["crops"][-1]


def scale_length(config: dict[str, Any], share: float) -> dict[str, Any]:
    """`share` of the seconds."""
    config["examples"]["crops"] = [length(config) * share]
    return config


def peer(examples: Any, files: Sequence[Any]) -> Any:
    """As fairseq reads: soundfile, layer norm of the whole, a random crop."""
    return functools.partial(read_crop, files=files, lengths=examples.layout.buckets)


def read_crop(index: int, bucket: int, *, files: Sequence[Any], lengths: Sequence[int]) -> Any:
    """{'audio': float32 tensor [S]}."""
    import soundfile
    import torch

    audio = torch.from_numpy(soundfile.read(files[index].path, dtype="float32")[0])
    audio = audio.mean(-1) if audio.ndim == 2 else audio
    audio = torch.nn.functional.layer_norm(audio, audio.shape)
    start = np.random.randint(len(audio) - lengths[bucket] + 1)
    return {"audio": audio[start : start + lengths[bucket]]}


BENCH = Bench(
    one_length=one_length,
    integers=lambda model: (0, 2),  # labels, of which there are two clusters at least
    length=length,
    scale_length=scale_length,
    peer=peer,
)
