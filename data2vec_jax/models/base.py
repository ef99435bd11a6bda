"""What the models of all modalities share.   B batch, T tokens, V of them visible, D, C widths."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from data2vec_jax.models import decoder, encoder
from data2vec_jax.models.layers import Array, Key


class Model(nn.Module):
    """Base of a modality's model: what follows the front end and the encoder.

    A subclass has the fields `width`, `encoder`, `head` (of predictions) and `decoder` (None in
    1.0), and the methods of `modalities.contract.Modality.model` that are not here.
    """

    padding = "exact"  # see `contract.Padding`; a subclass may make it a field

    def valid_lengths(self, batch: Mapping[str, Array]) -> Array | None:
        """Tokens of each row that are not padding, int [B]; None if there is no padding."""
        return None

    def decode(
        self, x: Array, mask: Array, noise: Array, valid: Array | None = None, key: Key = None
    ) -> Array:
        """What the student saw [B, V, D] -> features of all positions [B, T, C]; see `Decoder`."""
        return self.decoder(x, mask, noise, valid, key)

    def predict(self, x: Array) -> Array:  # [..., C] -> [..., D]
        return self.head(x)

    def __call__(self, batch: Mapping[str, Array]) -> Array:
        """Touches every parameter: for initialisation."""
        tokens = self.features(batch)
        mask = jnp.zeros(tokens.x.shape[:2], bool)
        masked = self.decoder is not None or getattr(self, "mask_embedding_used", False)
        x = self.encode(tokens, mask if masked else None).x
        return self.predict(x if self.decoder is None else self.decode(x, mask, x))


def flops(
    model: Any, *, frontend: float, tokens: int, masked: int, seen: int, class_tokens: int = 0
) -> dict[str, float]:
    """Forward FLOPs of one example, by part: 2 per multiply-add, matrix products only.

    frontend: of the front end. tokens: of the whole input. masked: positions through the head.
    seen: positions through the student's blocks. class_tokens: in front of either.
    """
    D, e = model.width, model.encoder
    whole, part = (
        encoder.flops(depth=e.depth, width=D, mlp=e.mlp, tokens=class_tokens + n)
        for n in (tokens, seen)
    )
    rest = decoder.flops(model.decoder, model.head, width=D, tokens=tokens, masked=masked)
    return {"frontend": frontend, "encoder": whole, "student": part + rest}
