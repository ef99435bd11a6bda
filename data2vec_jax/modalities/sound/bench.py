"""The benchmark's sounds."""

import functools
from collections.abc import Sequence
from typing import Any

from data2vec_jax.modalities.contract import Bench
from data2vec_jax.modalities.sound.spectrogram import BINS


def length(config: dict[str, Any]) -> float:
    """Frames of 10 ms."""
    return config["examples"]["frames"]


def scale_length(config: dict[str, Any], share: float) -> dict[str, Any]:
    """`share` of the frames, in whole patches."""
    frames = max(round(length(config) * share / 16), 1) * 16
    config["model"]["frames"] = config["examples"]["frames"] = frames
    return config


def peer(examples: Any, files: Sequence[Any]) -> Any:
    """As EAT reads: soundfile and torchaudio's filterbank of the centred sound, padded or cut."""
    import torchaudio.compliance.kaldi  # noqa: F401  # said to be missing before anything is read

    return functools.partial(read_fbank, files=files, frames=examples.layout.frames)


def read_fbank(index: int, bucket: int, *, files: Sequence[Any], frames: int) -> Any:
    """{'spectrogram': float32 tensor [F, 128]}."""
    import soundfile
    import torch
    from torchaudio.compliance import kaldi

    audio, rate = soundfile.read(files[index].path, dtype="float32", always_2d=True)
    audio = torch.from_numpy(audio).mean(-1)
    options = {"window_type": "hanning", "dither": 0.0, "htk_compat": True, "use_energy": False}
    found = kaldi.fbank(
        (audio - audio.mean())[None], sample_frequency=rate, num_mel_bins=BINS, **options
    )[:frames]
    return {"spectrogram": torch.nn.functional.pad(found, (0, 0, 0, frames - len(found)))}


BENCH = Bench(length=length, scale_length=scale_length, peer=peer)
