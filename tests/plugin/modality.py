"""Three-channel sensor series, such as an accelerometer's. B batch, T patches in time, D width."""

from typing import Any

import jax
import numpy as np

from data2vec_jax.core.config import with_options
from data2vec_jax.data.codecs.base import Codec
from data2vec_jax.modalities import contract
from data2vec_jax.models import base, layers
from data2vec_jax.models.decoder import Decoder
from data2vec_jax.models.encoder import Encoder
from data2vec_jax.models.positions import sincos

CHANNELS = 3


def read(file, name):
    """A .npy file of [samples, 3] -> {'series': float32 [samples, 3]}."""
    return {"series": np.load(file).astype(np.float32)}


def layout(*, samples: int) -> contract.Layout:
    """Config section `examples`. samples: length of a window."""
    shape = jax.ShapeDtypeStruct((samples, CHANNELS), np.float32)
    return contract.Layout([samples], [{"series": shape}])


class Windows(contract.Examples):
    """A random window of each recording; in evaluation (`like`), the first."""

    def __init__(self, source, like=None, **options):
        self.source, self.fixed, self.layout = source, like is not None, layout(**options)
        self.lengths = np.full(len(source), self.layout.buckets[0])
        self.bucket_of = np.zeros(len(source), np.int32)

    def load(self, index, bucket, rng):
        series, samples = self.source[index]["series"], self.layout.buckets[0]
        start = 0 if self.fixed else rng.integers(len(series) - samples + 1)
        return {"series": series[start : start + samples]}


class SensorModel(base.Model):
    """Series [B, patch * T, 3] in, [B, T, D] out."""

    width: int
    patch: int
    encoder: Encoder
    decoder: Decoder
    head: layers.Mlp
    dtype: Any = np.float32
    frontend_params = "patches"

    def setup(self):
        self.patches = layers.dense(self.width, self.patch * CHANNELS, "torch", self.dtype, None)
        self.norm = layers.LayerNorm(dtype=self.dtype)

    def mask_shape(self, shapes):
        return shapes["series"].shape[1] // self.patch

    def features(self, batch, key=None):
        x = batch["series"].astype(self.dtype)
        return contract.Tokens(self.patches(x.reshape(len(x), -1, self.patch * CHANNELS)))

    def encode(self, tokens, mask=None, key=None, record=None, collect=False, keep=None):
        x = tokens.x + sincos((1, tokens.x.shape[1]), self.width).astype(self.dtype)
        x = self.norm(layers.gather_tokens(x, keep))  # what a student sees, [B * M, V, D]
        return self.encoder(x, key=key, record=record, collect=collect)


def make_model(*, width: int, patch: int, encoder: dict, decoder: dict, dtype: Any):
    """Config section `model`. width: D. patch: samples."""
    encoder = contract.build(Encoder, "model.encoder", encoder, width=width, dtype=dtype)
    decoder = contract.build(Decoder, "model.decoder", decoder, dtype=dtype)
    return SensorModel(width, patch, encoder, decoder, layers.Mlp(width, dtype=dtype), dtype)


def flops(model, shapes, masked, seen):
    T = shapes["series"].shape[0] // model.patch
    front = 2.0 * T * model.patch * CHANNELS * model.width
    return base.flops(model, frontend=front, tokens=T, masked=masked, seen=seen)


def scale_length(config, share):
    return with_options(config, {"examples.samples": int(config["examples"]["samples"] * share)})


def smallest_batch(model):
    return {"series": jax.ShapeDtypeStruct((1, model.patch, CHANNELS), np.float32)}


MODALITY = contract.Modality(
    name="sensors",
    codec=Codec(field="series", suffixes=(".npy",), read=read),
    model=make_model,
    layout=layout,
    examples=Windows,
    flops=flops,
    bench=contract.Bench(length=lambda c: c["examples"]["samples"], scale_length=scale_length),
    inference=contract.Inference("series", smallest_batch),
)
