"""Answers as parts of a text: SQuAD 1.1, and XQuAD without training on its languages (spec 3.3).

B batch, T tokens. A batch holds tokens [B, T], and the first and last token of the answer, start
and end int [B], 0 (`<s>`) for rows without it.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from data2vec_jax.core.config import PositiveInt
from data2vec_jax.core.errors import UserError
from data2vec_jax.core.task import Task
from data2vec_jax.modalities.text import windows
from data2vec_jax.models.layers import wide
from data2vec_jax.tasks import finetune, scores

Array = jax.Array
ENDS = ("start", "end")
CONFIG, resolve_config = finetune.FinetuneConfig, finetune.resolve_config


def make_loss(
    model: Any, head: Any, config: finetune.NoOptions | None = None
) -> Callable[..., tuple[Array, Array, dict[str, Array]]]:
    """A task's loss: the mean of the cross-entropies of start and end, summed over rows."""

    def loss(params, teacher, batch, draw):
        del teacher
        keys = (None, None) if draw is None else jax.random.split(draw.noise_key)
        features = finetune.encode(model, head, params, batch, keys[0])
        variables = {"params": params["task"]}
        outputs = {k: wide(v) for k, v in head.apply(variables, features, keys[1]).items()}
        labels = {f"{end}_positions": batch[end] for end in ENDS}
        mean = head.apply(variables, outputs, labels, features, method="loss")
        rows = jnp.float32(len(batch["start"]))
        right = [jnp.argmax(outputs[f"{end}_logits"], -1) == batch[end] for end in ENDS]
        return mean * rows, rows, {"exact": jnp.mean(right[0] & right[1])}

    return loss


def make_predict(model: Any, head: Any) -> Callable[..., dict[str, Array]]:
    """(params, batch) -> start_logits, end_logits [B, T]."""

    def predict(params, batch):
        features = finetune.encode(model, head, params, batch)
        outputs = head.apply({"params": params["task"]}, features)
        return {k: wide(v) for k, v in outputs.items()}

    return predict


def best_span(
    starts: np.ndarray, ends: np.ndarray, allowed: np.ndarray, *, top: int = 20, longest: int = 30
) -> tuple[float, int, int]:
    """(score, first, last): the best pair of the `top` starts and ends of a row.

    starts, ends: logits [T]. allowed: bool [T], tokens of the text. longest: in tokens. The score
    is -inf if no pair fits.
    """
    firsts, lasts = (np.argsort(-x, kind="stable")[:top] for x in (starts, ends))
    best = (float("-inf"), 0, 0)
    for first in firsts[allowed[firsts]]:
        for last in lasts[allowed[lasts]]:
            score = float(starts[first] + ends[last])
            if first <= last < first + longest and score > best[0]:
                best = score, int(first), int(last)
    return best


def answers(
    predictions: Sequence[Any], inputs: windows.Windows, *, top: int = 20, longest: int = 30
) -> dict[str, str]:
    """The answer to each question, by its id: the best of all its windows, as it stands there."""
    best: dict[int, tuple[float, str]] = {}
    for window, found in enumerate(predictions):
        if found is None:
            continue
        spans, owner = inputs.spans[window], int(inputs.owner[window])
        logits = (found[f"{end}_logits"][: len(spans)] for end in ENDS)
        score, first, last = best_span(*logits, spans[:, 0] >= 0, top=top, longest=longest)
        if score > best.get(owner, (float("-inf"), ""))[0]:
            text = inputs.questions.field(owner, "text")
            best[owner] = score, text[spans[first, 0] : spans[last, 1]]
    return {
        inputs.questions.field(i, "id"): best.get(i, (0.0, ""))[1]
        for i in range(len(inputs.questions))
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoringConfig:
    """Config section `scoring`; see `best_span`."""

    top: PositiveInt = 20  # starts and ends that are paired
    longest: PositiveInt = 30  # answer, in tokens


def score(
    predictions: Sequence[Any],
    inputs: windows.Windows,
    config: ScoringConfig = ScoringConfig(),
) -> dict[str, float]:
    """exact and f1, as SQuAD's own script has them; `left_out`, the share that cannot be read."""
    questions = inputs.questions
    good = [i for i in range(len(questions)) if i not in questions.bad]
    right = {questions.field(i, "id"): questions.field(i, "answers") for i in good}
    found = answers(predictions, inputs, top=config.top, longest=config.longest)
    left_out = {"left_out": 1 - len(good) / len(questions)} if questions.bad else {}
    return scores.squad(found, right) | left_out


def targets(config: Mapping[str, Any], head: Any) -> finetune.Targets:
    """Nothing beside the inputs, which know where their answers are."""

    def check(source):
        if not source.field(0, "question") or source.field(0, "answers") is None:
            raise UserError(f"{source.uri}: its examples are no questions with answers")
        return ()

    return finetune.Targets(lambda length: {}, lambda item, length: {}, check)


SPEC = finetune.FinetuneSpec(
    make_loss, make_predict, score, targets, windows, scoring_config=ScoringConfig
)


def make(config: Mapping[str, Any]) -> Task:
    """The task of a config; see `finetune.make`."""
    return finetune.make(config, SPEC)


abstract_task: Callable[[Mapping[str, Any]], Task] = functools.partial(
    finetune.abstract_task, job=SPEC
)
