"""How images are read; the published sets and shipped samples."""

from data2vec_jax.data.codecs import image
from data2vec_jax.modalities.vision.published import open_imagenet
from data2vec_jax.modalities.vision.samples import open_samples

CODEC = image.codec(kinds={"imagenet": open_imagenet, "samples": open_samples})
