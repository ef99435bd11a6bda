"""Sound: log-mel spectrograms of audio events, cut into patches."""

from data2vec_jax.modalities.contract import Drawing, HandMade, Modality
from data2vec_jax.modalities.sound import data, inference, inputs, model, published
from data2vec_jax.modalities.sound.bench import BENCH
from data2vec_jax.modalities.sound.codec import CODEC

MODALITY = Modality(
    name="sound",
    codec=CODEC,
    model=model.SoundConfig,
    layout=data.SoundLayout,
    examples=data.SoundExamples,
    hand_made=HandMade("log-mel statistics", data.log_mel_statistics),
    drawing=Drawing(data.picture, turned=True),
    input_layout=inputs.SoundInputLayout,
    inputs=inputs.Sounds,
    learned_mask=True,
    flops=model.flops,
    bench=BENCH,
    published_scores=published.published_scores,
    inference=inference.INFERENCE,
)
