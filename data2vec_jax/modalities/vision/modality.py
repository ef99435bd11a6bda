"""Vision: images cut into patches."""

from data2vec_jax.modalities.contract import Drawing, HandMade, Modality
from data2vec_jax.modalities.vision import data, export, inference, inputs, model, published
from data2vec_jax.modalities.vision.bench import BENCH
from data2vec_jax.modalities.vision.codec import CODEC

MODALITY = Modality(
    name="vision",
    codec=CODEC,
    model=model.VisionConfig,
    layout=data.ImageConfig,
    examples=data.VisionExamples,
    hand_made=HandMade("pixels", data.pixels),
    drawing=Drawing(lambda inputs: inputs["image"]),
    input_layout=inputs.ImageInputConfig,
    inputs=inputs.Images,
    learned_mask=True,
    flops=model.flops,
    bench=BENCH,
    published_scores=published.published_scores,
    inference=inference.INFERENCE,
    write_processor=export.write_processor,
)
