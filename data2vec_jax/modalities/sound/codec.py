"""How sounds are read: 16 kHz audio; the published sets and shipped samples."""

from data2vec_jax.data.codecs import audio
from data2vec_jax.modalities.sound.published import open_audioset, open_esc50, open_speech_commands
from data2vec_jax.modalities.sound.samples import open_samples

RATE = 16_000  # samples per second; nothing else is accepted, nothing is resampled

CODEC = audio.codec(
    sample_rate=RATE,
    kinds={
        "audioset": open_audioset,
        "esc50": open_esc50,
        "speech_commands": open_speech_commands,
        "samples": open_samples,
    },
)
