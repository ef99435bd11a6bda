"""HuBERT (arXiv 2106.07447): predict the cluster of each masked frame (baselines spec 5).

masking     spans of frames; the encoder sees a learned vector there
targets     y: labels of frames that `python -m data2vec_jax.cluster` wrote, `examples.labels`
logits      z_c = cos(W h + b, e_c) / kappa; a vector e_c for each class: `pretext.ClassCosines`
objective   logsumexp(z) - z_y, summed over masked frames, and for each of them
            penalty_weight mean(f^2), f the front end's output before its norm
"""

import dataclasses
from typing import Annotated, Any, ClassVar

from data2vec_jax.core.config import NonNegativeFloat, PositiveFloat, Range, Size
from data2vec_jax.models import pretext
from data2vec_jax.objectives import mlm, reconstruction
from data2vec_jax.objectives.contract import Objective, ObjectiveConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(ObjectiveConfig):
    """Config section `objective` with the name 'hubert'."""

    clusters: Annotated[int, Range(2, 2**15)]  # of the labels
    # Classes before them that are never right; fairseq has four, of its dictionary.
    reserved: Annotated[int, Range(0, 2**10)] = 0
    size: Size = 256  # of the vectors that are compared
    kappa: PositiveFloat = 0.1  # temperature of the cosines
    penalty_weight: NonNegativeFloat = 10.0

    needs_labels: ClassVar[bool] = True

    def pretext(self, model: Any) -> pretext.ClassCosines:
        """The head."""
        return pretext.ClassCosines(
            self.clusters, self.reserved, self.size, self.kappa, model.dtype
        )


def make_loss(config: Config, model: Any, sampler: Any, corrupt: Any) -> Objective:
    """See `reconstruction.objective`."""
    return reconstruction.objective(
        model,
        sampler,
        corrupt,
        mlm.losses,
        mlm.scalars,
        contents=lambda batch: batch["labels"] + config.reserved,
        penalty_weight=config.penalty_weight,
    )
