"""How speech is read: 16 kHz audio; the published sets and shipped samples."""

from data2vec_jax.data.codecs import audio
from data2vec_jax.modalities.speech.published import (
    open_common_voice,
    open_fairseq,
    open_librilight,
    open_librispeech,
    open_transcribed,
)
from data2vec_jax.modalities.speech.samples import open_samples

RATE = 16_000  # samples per second; nothing else is accepted, nothing is resampled

CODEC = audio.codec(
    sample_rate=RATE,
    kinds={
        "librispeech": open_librispeech,
        "librilight": open_librilight,
        "common_voice": open_common_voice,
        "fairseq": open_fairseq,
        "transcribed": open_transcribed,
        "samples": open_samples,
    },
)
