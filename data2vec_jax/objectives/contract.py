"""What an objective is: one module of this folder, with `Config` and `make_loss`.

    Config      options of the config section `objective` with the module's name, and what the
                objective needs: a subclass of `ObjectiveConfig`
    make_loss   (config, model, sampler, corrupt) -> Objective. model: a modality's, with the
                objective's `pretext` if it has one, see `modalities.contract.Modality`. sampler:
                shapes of a batch -> `masking.Sampler`; None if nothing is masked. corrupt: the
                modality's, which masks the input rather than the features (text); or None

B batch, M masks of an example, T tokens, N masked positions of a row, D width.
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from data2vec_jax import masking
from data2vec_jax.core.errors import UserError
from data2vec_jax.metrics.statistics import effective_rank, mean_std

Array = jax.Array


def names() -> list[str]:
    """Names of objectives: the modules beside this one that make a loss."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return [path.stem for path in files if "\ndef make_loss(" in path.read_text(encoding="utf-8")]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """Base of the `Config` of an objective. Class variables are no options: they say what it needs.

    needs_teacher: a moving average of the student, by the sections `averaged` and `ema`.
    needs_decoder: the model's own, which fills in what the student did not see (2.0). predicts:
    the model's `content` must be this ('ids' or 'numbers', see `models.base.Model`); None for any.
    needs_labels: a label of each position, the array `labels` of an example. masks: the kind of the
    section `mask`; None for any, '' if nothing is masked and there is no such section. needs_views:
    several views of an example (section `examples.views`): 'large' ones alone, or 'all' that there
    are; '' for none.
    """

    needs_teacher: ClassVar[bool] = False
    needs_decoder: ClassVar[bool] = False
    predicts: ClassVar[str | None] = None
    needs_labels: ClassVar[bool] = False
    masks: ClassVar[str | None] = None
    needs_views: ClassVar[str] = ""

    def check(self, model: Any) -> None:
        """Raises UserError: options that do not fit the model."""

    def batch_statistics(self) -> str:
        """What of it, in words, is a statistic of the whole batch, so that micro-batches would
        change the loss; '' for nothing."""
        return ""

    def pretext(self, model: Any) -> Any:
        """The module of its own parameters (`models.pretext`), which takes the place of the head;
        None for none. model: a modality's."""
        return None

    def forward_flops(
        self,
        model: Any,
        shapes: Mapping[str, Any],
        sample: masking.Sampler | None,
        forward: Callable[..., Mapping[str, float]],
    ) -> Mapping[str, float]:
        """Forward FLOPs of one example, as of `contract.Modality.flops`, of which 'encoder' is what
        a teacher computes. shapes: of its arrays. sample: None without masks. forward: (model,
        masked positions, tokens that the student sees) -> these FLOPs of one pass."""
        masked = sample.count(sample.length)
        return forward(model, masked, sample.length - (0 if model.sees_masked else masked))


@dataclasses.dataclass(frozen=True, kw_only=True)
class FewPatchesConfig(ObjectiveConfig):
    """Base of the `Config` of an objective whose encoder sees some of the patches only."""

    predicts: ClassVar[str | None] = "numbers"

    def check(self, model: Any) -> None:
        """Raises UserError: the model has parts that need all patches, or a vector of no use."""
        if model.shared_relative or model.encoder.relative:
            raise UserError(
                "config.model.shared_relative: the encoder sees few patches, and relative position "
                "biases are of all; use shared_relative=False, encoder.relative=None, sincos=True"
            )
        if model.mask_embedding_used:
            raise UserError("config.model.mask_embedding: masked patches are not seen; use False")


class Intermediates(NamedTuple):
    """What an objective computes on its way, for the loss, the monitor and the golden tests.

    total, count: sum of the loss over masked positions, their number. tokens: the front end's
    output. prediction, masked_targets [rows, N, ...] and weights [rows, N]: what entered the loss.
    targets [B, T, D]: at every position; None without a teacher. student, teacher: what their
    encoders returned, with every layer's output if `collect` was asked for. parts: the loss's
    terms. mask: bool [rows, T], where the student sees nothing. visible: the batch that it sees.
    metrics: what is logged beside the monitor's scalars, and 'assigned', see `train_step`.
    """

    total: Array
    count: Array
    tokens: Any
    prediction: Array
    masked_targets: Array
    weights: Array
    targets: Array | None = None
    student: Any = None
    teacher: Any = None
    parts: Mapping[str, Array] = MappingProxyType({})
    mask: Array | None = None
    visible: Mapping[str, Array] | None = None
    metrics: Mapping[str, Any] | None = None


class Objective(NamedTuple):
    """A loss, and what it computes on its way.

    forward: (params, teacher, batch, draw) -> Intermediates. forward_with_masks: what is random,
    such as masks, is given instead of drawn. monitor: what `forward` returns -> scalars to log.
    """

    forward_with_masks: Callable[..., Intermediates]
    forward: Callable[..., Intermediates]
    monitor: Callable[[Intermediates], dict[str, Array]]

    def loss(self, *given: Any) -> tuple[Array, Array, dict[str, Any]]:
        """Arguments of `forward` -> (total, count, metrics); the batch's loss is total / count."""
        found = self.forward(*given)
        return found.total, found.count, self.monitor(found) | dict(found.metrics or {})


def present_positions(found: Intermediates) -> Array:
    """float32 [B, T]: 1 where a position of the front end's output is not padding."""
    valid = found.tokens.valid
    return jnp.ones(found.tokens.x.shape[:2]) if valid is None else valid.astype(jnp.float32)


def monitor(found: Intermediates) -> dict[str, Array]:
    """Scalars that tell learning from collapse without a teacher; see `metrics.collapse`."""
    tokens, weights, present = found.tokens, found.weights, present_positions(found)
    clones = weights.shape[0] // present.shape[0]
    scalars = {
        "pred_std": mean_std(found.prediction, weights),
        "masked_fraction": jnp.sum(weights) / (clones * jnp.sum(present)),
        "feature_std": mean_std(tokens.x, present),
        "feature_rank": effective_rank(tokens.x, present),
    }
    return jax.lax.stop_gradient(scalars)
