"""Speech: 16 kHz waveforms, raw or as log-mel frames."""

from data2vec_jax.modalities.contract import Drawing, HandMade, Modality
from data2vec_jax.modalities.speech import data, export, inference, inputs, model, published
from data2vec_jax.modalities.speech.bench import BENCH
from data2vec_jax.modalities.speech.codec import CODEC

MODALITY = Modality(
    name="speech",
    codec=CODEC,
    model=model.SpeechConfig,
    layout=data.CropConfig,
    examples=data.SpeechExamples,
    labelled=data.labelled,
    hand_made=HandMade("log-mel", data.stacked_log_mel),
    drawing=Drawing(data.picture),
    input_layout=inputs.UtteranceConfig,
    inputs=inputs.Utterances,
    learned_mask=True,
    flops=model.flops,
    bench=BENCH,
    check_labels=data.check_labels,
    published_scores=published.published_scores,
    inference=inference.INFERENCE,
    write_processor=export.write_processor,
)
