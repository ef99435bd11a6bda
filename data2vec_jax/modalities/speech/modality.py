"""Speech: raw 16 kHz waveforms."""

from data2vec_jax.modalities.contract import Modality
from data2vec_jax.modalities.speech import data, inputs, model
from data2vec_jax.modalities.speech.bench import BENCH

MODALITY = Modality(
    name="speech",
    model=model.make_model,
    layout=data.layout,
    examples=data.SpeechExamples,
    labelled=data.labelled,
    input_layout=inputs.layout,
    inputs=inputs.Utterances,
    flops=model.flops,
    bench=BENCH,
)
