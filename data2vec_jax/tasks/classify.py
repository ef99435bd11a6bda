"""Classes, or numbers, of images, texts, pairs of texts and utterances, on a pretrained encoder.

B batch, T tokens, C classes. A batch holds the modality's inputs and label: int [B], float [B] for
regression, float [B, C] for several classes at once, or int [B, T] for one of each token (below 0:
none). The parameters are the encoder's and, under `task`, those of a head of `heads`.
"""

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from data2vec_jax.core.config import (
    DropRate,
    Length,
    PositiveFloat,
    Range,
    Share,
    Span,
)
from data2vec_jax.core.errors import UserError, nearest
from data2vec_jax.core.files import read_json
from data2vec_jax.core.task import Task
from data2vec_jax.data.sources import UNKNOWN, check_field, class_of
from data2vec_jax.models.layers import wide
from data2vec_jax.tasks import finetune, mixing, scores
from data2vec_jax.tasks.specaugment import SpecAugmentConfig, augment

Array = jax.Array
REGRESSION, SINGLE, SEVERAL = (
    "regression",
    "single_label_classification",
    "multi_label_classification",
)

CONFIG, resolve_config = finetune.FinetuneConfig, finetune.resolve_config


def problem_of(head: Any) -> str:
    """One of the three, by the head's own word."""
    problem = getattr(head, "problem", None)
    return problem or (REGRESSION if head.classes == 1 else SINGLE)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Config section `loss` of classification and regression."""

    smoothing: DropRate = 0.0  # share of a target that all classes have alike
    # Binary cross-entropies in place of the softmax's, summed over classes and rows and divided by
    # the sum of labels, 'labels', or by the rows, 'rows'. None: softmax; of examples with several
    # classes, the mean over classes and rows.
    binary: Literal["labels", "rows"] | None = None
    mixup: Annotated[float, Range(0, 100)] = 0.0  # of images and spectrograms, see `mixing.mix`
    cutmix: Annotated[float, Range(0, 100)] = 0.0  # likewise
    mix_probability: Share = 1.0  # see `mixing.mix`
    switch: Share = 0.5  # see `mixing.mix`
    erasing: Share = 0.0  # of images: probability of `mixing.erase`
    # Of spectrograms: largest share of frames, and of mel bins, in a band that is set to 0, see
    # `mixing.mask_bands`.
    mask_frames: Share = 0.0
    mask_bins: Share = 0.0
    scale: PositiveFloat = 1.0  # of the labels of a regression
    time_prob: Share = 0.0  # of speech: masked frames, see `specaugment.augment`
    time_width: Span = 5  # of speech: frames of a mask's span


def make_loss(
    model: Any, head: Any, config: LossConfig = LossConfig()
) -> Callable[..., tuple[Array, Array, dict[str, Array]]]:
    """A task's loss: (params, teacher, batch, draw) -> (sum, count, metrics).

    Without `draw` (None) nothing is dropped, mixed, masked or erased. The count is of rows (tokens)
    with a label. Raises UserError: mixing is not for this model or head.
    """
    problem = problem_of(head)
    mixes = config.mixup > 0 or config.cutmix > 0
    bands = config.mask_frames, config.mask_bins
    masks = SpecAugmentConfig(
        time_prob=config.time_prob,
        time_width=config.time_width,
        channel_prob=0.0,
        channel_width=1,
    )
    changes = mixes or config.erasing or any(bands)
    if changes and not hasattr(model, "pixels"):
        raise UserError(
            "config.loss: mixup, cutmix, erasing and bands are for images and spectrograms"
        )
    if problem == REGRESSION and (mixes or config.binary):
        raise UserError("config.loss: mixup, cutmix and binary are for classes, not for numbers")

    def loss(params, teacher, batch, draw):
        del teacher
        keys, label = (None,) * 3, batch["label"]
        targets = used = None
        if problem == SINGLE:
            used = (label >= 0) & (label < head.classes)
            targets = jax.nn.one_hot(label, head.classes) * (1 - config.smoothing)
            targets = targets + config.smoothing / head.classes
        elif problem == SEVERAL:
            targets = label.astype(jnp.float32)
        if draw is not None:
            keys = jax.random.split(draw.noise_key, 3)
            batch, targets = augmented(batch, targets, draw, keys[2])
        change = lambda tokens: tokens  # noqa: E731
        if draw is not None and config.time_prob:
            change = functools.partial(
                augment,
                embedding=params.get("mask_embedding"),
                key=keys[2],
                draw=draw,
                example_id=batch["example_id"],
                config=masks,
            )
        features = finetune.encode(model, head, params, batch, keys[0], change)
        outputs = head.apply({"params": params["task"]}, features, keys[1])
        logits = wide(outputs["logits"])
        if problem == REGRESSION:
            errors = jnp.square(logits.reshape(label.shape) - config.scale * label).reshape(
                len(label), -1
            )
            return jnp.sum(jnp.mean(errors, -1)), jnp.float32(len(label)), {}
        if problem == SEVERAL or config.binary:
            return binary(logits, targets, used)
        losses = -jnp.sum(targets * jax.nn.log_softmax(logits), -1)
        right = jnp.argmax(logits, -1) == label
        count = jnp.sum(used, dtype=jnp.float32)
        metrics = {} if mixes else {"accuracy": jnp.sum(right & used) / count}
        if "assigned" in outputs:
            metrics["assigned"] = {"task": outputs["assigned"]}
        return jnp.sum(jnp.where(used, losses, 0.0)), count, metrics

    def binary(logits, targets, used):
        losses = optax.sigmoid_binary_cross_entropy(logits, targets)
        used = jnp.ones(logits.shape[:-1], bool) if used is None else used
        if config.binary is None:
            losses = losses / head.classes
        count = jnp.sum(used, dtype=jnp.float32)
        if config.binary == "labels":
            count = jnp.maximum(jnp.sum(jnp.where(used[..., None], targets, 0.0)), 1.0)
        return jnp.sum(jnp.where(used[..., None], losses, 0.0)), count, {}

    def augmented(batch, targets, draw, key):
        if not changes:
            return batch, targets
        pixels = model.pixels(batch)
        step = jax.random.fold_in(draw.mask_key, draw.step)
        rows = jax.vmap(lambda i: jax.random.fold_in(step, i))(batch["example_id"])
        if config.erasing:
            pixels = mixing.erase(pixels, rows, config.erasing)
        if mixes:
            pixels, targets = mixing.mix(
                pixels,
                targets,
                key,
                mixup=config.mixup,
                cutmix=config.cutmix,
                probability=config.mix_probability,
                switch=config.switch,
            )
        if any(bands):
            keys = jax.vmap(lambda key: jax.random.fold_in(key, 1))(rows)
            pixels = mixing.mask_bands(pixels, keys, *bands)
        return {**batch, "pixels": pixels}, targets

    return loss


def make_predict(model: Any, head: Any) -> Callable[..., dict[str, Array]]:
    """(params, batch) -> logits [B, C], or [B, T, C] of tokens, and the batch's label."""

    def predict(params, batch):
        features = finetune.encode(model, head, params, batch)
        logits = head.apply({"params": params["task"]}, features)["logits"]
        return {"logits": wide(logits), "label": batch["label"]}

    return predict


METRICS = {  # that mean something
    REGRESSION: ("pearson", "spearman"),
    SINGLE: ("accuracy", "f1", "macro_f1", "matthews", "top5_accuracy"),
    SEVERAL: ("mean_average_precision",),
}
OF_LOGITS = {  # scores of a number for each class [N, C]; the others are of numbers or classes [N]
    "mean_average_precision": scores.mean_average_precision,
    "top5_accuracy": scores.top_accuracy,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoringConfig:
    """Config section `scoring` of classification and regression."""

    metrics: Annotated[Sequence[str], Length()] = ("accuracy",)  # names in `METRICS`


def score(
    predictions: Sequence[Any], inputs: Any, config: ScoringConfig = ScoringConfig()
) -> dict[str, float]:
    """Scores by name (no top-5 accuracy of five classes or fewer), and `loss` where there are
    classes; `left_out`, the share of examples that were too short or could not be read, if there
    are any, and `unknown_classes`, of them those of classes that the head has not. Raises
    UserError: no such score.
    """
    bad = getattr(getattr(inputs, "source", None), "bad", {})
    unknown = sum(error.reason == UNKNOWN for error in bad.values())
    metrics = config.metrics
    known = {**scores.BY_NAME, **OF_LOGITS}
    for name in metrics:
        if name not in known:
            raise UserError(f"config.scoring.metrics: no '{name}'{nearest(name, known)}")
    kept = [p for p in predictions if p is not None]
    if not kept:
        raise UserError("no examples to score")
    missing = len(predictions) - len(kept)
    join = np.concatenate if kept[0]["logits"].ndim == 2 else np.stack  # of tokens, or of rows
    logits, labels = (join([p[name] for p in kept]) for name in ("logits", "label"))
    found = {}
    if labels.ndim == 1 and labels.dtype.kind == "i":
        used = (labels >= 0) & (labels < logits.shape[-1])
        logits, labels = logits[used], labels[used]
        logs = logits - logits.max(-1, keepdims=True)
        logs = logs - np.log(np.exp(logs).sum(-1, keepdims=True))
        found["loss"] = float(-np.mean(logs[np.arange(len(labels)), labels]))
    for name in metrics:
        if name == "top5_accuracy" and logits.shape[-1] <= 5:
            continue  # every guess is right
        guesses = logits if name in OF_LOGITS else np.argmax(logits, -1)
        guesses = logits[:, 0] if name in METRICS[REGRESSION] else guesses
        found[name] = known[name](labels, guesses)
    lost = {"left_out": missing, "unknown_classes": unknown}
    return found | {name: count / len(predictions) for name, count in lost.items() if count}


def targets(config: Mapping[str, Any], head: Any) -> finetune.Targets:
    """What an example holds: `label`, an int or a float, or `labels`, numbers of its classes.

    Raises UserError: a regression of several numbers, metrics that are not of the problem.
    """
    problem, classes = problem_of(head), head.classes
    column = "labels" if problem == SEVERAL else "label"
    if problem == REGRESSION and classes != 1:
        raise UserError(f"config.head.classes: {classes}, but a regression has 1 number a row")
    for name in ScoringConfig(**config.get("scoring", {})).metrics:
        if name not in METRICS[problem]:
            hint = nearest(name, METRICS[problem])
            raise UserError(f"config.scoring.metrics: no '{name}' of a {problem}{hint}")

    def shapes(length):
        shape = (classes,) if problem == SEVERAL else ()
        dtype = np.int32 if problem == SINGLE else np.float32
        return {"label": jax.ShapeDtypeStruct(shape, dtype)}

    def value(label):
        if problem == SEVERAL:
            return several(label, classes)
        if problem == REGRESSION:
            return np.asarray(number_of(label), np.float32)
        if class_of(label) >= classes:
            raise UserError(f"config.head.classes: {classes}, but a label is {label}")
        return np.asarray(label, np.int32)

    def read(item, length):
        return {"label": value(item[column])}

    def check(source):
        if column not in next(source.items())[1]:
            raise UserError(f"{source.uri}: its examples have no {column} (a column `{column}`)")
        names = source.label_names
        if names and problem == SINGLE and len(names) != classes:
            listed = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
            raise UserError(
                f"config.head.classes: {classes}, but {source.uri} has {len(names)}: {listed}"
            )
        if names and problem == REGRESSION and list(names) != [str(i) for i in range(len(names))]:
            raise UserError(f"{source.uri}: labels are classes ({names[0]}, ...), not numbers")
        check_field(source, column, value)
        seen.setdefault("names", names)
        return ()

    def save(folder):
        if seen.get("names"):
            text = json.dumps(list(seen["names"]), ensure_ascii=False, indent=1)
            (folder / "labels.json").write_text(text + "\n", encoding="utf-8")

    def outputs(stored):
        if stored is None:
            return seen.get("names") or ()
        path = Path(stored["folder"]) / "labels.json"
        return read_json(path, list) if path.is_file() else stored.get("labels") or ()

    def classes_of(source):
        labels = source.column(column)
        if labels is None or problem == REGRESSION:
            raise UserError(
                f"config.data.balanced_draws: {source.uri} does not list the classes of its "
                "examples; use a table or a folder"
            )
        if problem == SINGLE:
            return [[class_of(label)] for label in labels]
        return [np.flatnonzero(several(label, classes)) for label in labels]

    seen: dict[str, Any] = {}
    names = () if problem == REGRESSION else None
    return finetune.Targets(shapes, read, check, save, names, classes_of, outputs)


def number_of(label: Any) -> float:
    """A label of a regression. Raises UserError: it is none."""
    if label is None:
        raise UserError("no label")
    try:
        found = float(label)
    except (TypeError, ValueError):
        found = math.nan
    if not math.isfinite(found):
        raise UserError(f"label {label!r} is not a number")
    return found


def several(label: Any, classes: int) -> np.ndarray:
    """float32 [C], 1 for each class: numbers, or text such as '0 3 17' or '0,3,17'."""
    numbers = label.replace(",", " ").split() if isinstance(label, str) else label
    marks = np.zeros(classes, np.float32)
    try:
        for number in map(int, np.atleast_1d(numbers)):
            if not 0 <= number < classes:
                raise UserError(f"config.head.classes: {classes}, but a label is {number}")
            marks[number] = 1.0
    except (TypeError, ValueError):
        raise UserError(f"labels {label!r} are not a list of numbers of classes") from None
    return marks


SPEC = finetune.FinetuneSpec(
    make_loss,
    make_predict,
    score,
    targets,
    loss_config=LossConfig,
    scoring_config=ScoringConfig,
)


def make(config: Mapping[str, Any]) -> Task:
    """The task of a config; see `finetune.make`."""
    return finetune.make(config, SPEC)


abstract_task: Callable[[Mapping[str, Any]], Task] = functools.partial(
    finetune.abstract_task, job=SPEC
)
