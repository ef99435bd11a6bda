"""What the models of all modalities share.   B batch, T tokens, V of them visible, D, C widths."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax.numpy as jnp

from data2vec_jax.models import decoder, encoder, pretext
from data2vec_jax.models.layers import Array, Key


class Local(NamedTuple):
    """A front end's output, and what it is a projection of: [B, T, C], normed and before that norm.

    None: the front end does not say, or nothing of it is learned.
    """

    tokens: encoder.Tokens
    normed: Array | None = None
    raw: Array | None = None


class ViewBatch(NamedTuple):
    """`count` views of each example, in adjacent rows; options: of `encode`, for them."""

    count: int
    batch: Mapping[str, Array]
    options: Mapping[str, Any]


class Model(nn.Module):
    """Base of a modality's model: what follows the front end and the encoder.

    A subclass has the fields `width`, `encoder`, `head` (of predictions) and `decoder` (None in
    1.0), and the methods of `modalities.contract.Modality.model` that are not here. pretext: an
    objective's own parameters, which take the place of the head; see `models.pretext`.
    """

    pretext: nn.Module | None = dataclasses.field(default=None, kw_only=True)
    padding = "exact"  # see `contract.Padding`; a subclass may make it a field
    # What stands at a position before the front end: 'ids' of tokens, 'numbers' of a patch, or None
    # if a position is no part of the input of its own. With it goes the method `contents`.
    content: ClassVar[str | None] = None
    has_views: ClassVar[bool] = False  # whether there are the methods `views` and `view_models`

    @property
    def sees_masked(self) -> bool:
        """Whether the student's blocks see masked positions, too."""
        if self.pretext is not None:
            return not getattr(self.pretext, "visible_only", False)
        return self.decoder is None

    def contents(self, batch: Mapping[str, Array]) -> Array:
        """What stands at each position: ids int [B, T], or numbers float32 [B, T, P]."""
        raise NotImplementedError

    def views(self, batch: Mapping[str, Array]) -> list[ViewBatch]:
        """Large views of a batch, of the size that the model is for, then small ones if there are
        some. Examples that are held out have one view, which stands for all large ones."""
        raise NotImplementedError

    def view_models(self, shapes: Mapping[str, Any]) -> list[tuple[int, "Model"]]:
        """The same of the shapes of one example: how many, and a model of their size, to count."""
        raise NotImplementedError

    def token_table(self) -> Array | None:
        """Token embeddings [V, D], for an output layer; None without."""
        return None

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

    def local(self, batch: Mapping[str, Array], key: Key = None) -> Local:
        """`features`, and what they are made of if the front end says so."""
        return Local(self.features(batch, key))

    def solve(
        self, encoded: encoder.Encoded, mask: Array | None, places: Array | None, **inputs: Any
    ) -> Any:
        """What `pretext` makes of `pretext.Inputs`: predictions [B, N, ...]."""
        return self.pretext(pretext.Inputs(encoded, mask, places, self.token_table(), **inputs))

    def __call__(self, batch: Mapping[str, Array]) -> Array:
        """Touches every parameter: for initialisation."""
        local = self.local(batch)
        tokens = local.tokens
        mask = jnp.zeros(tokens.x.shape[:2], bool)
        masked = self.decoder is not None or getattr(self, "mask_embedding_used", False)
        encoded = self.encode(tokens, mask if masked else None)
        if self.pretext is not None:
            places = jnp.zeros((len(mask), 1), jnp.int32)
            return self.solve(encoded, mask, places, normed=local.normed)
        x = encoded.x
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
    if model.pretext is None:
        rest = decoder.flops(model.decoder, model.head, width=D, tokens=tokens, masked=masked)
    else:
        rest = model.pretext.flops(width=D, tokens=class_tokens + tokens, masked=masked)
    return {"frontend": frontend, "encoder": whole, "student": part + rest}
