"""Probes of a frozen encoder: what can be read off its representations.

The same code, budget and split for every encoder, and for the hand-made features of the modality.
N examples (or frames), D width, C classes, L blocks.

What is free (which block is read, how its features are scaled, how strong the classifier's prior
is) is chosen on a dev split, a fifth of the training examples. Then the classifier is fitted to
all training rows, and sees the test rows once (docs/spec/small_scale.md section 6).
"""

import functools
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from data2vec_jax.core.errors import ExampleError, UserError
from data2vec_jax.data.sources import UNKNOWN, Source, check_held_out, open_named, open_source
from data2vec_jax.modalities.contract import Examples, Labelled, Modality


def labelled(
    modality: Modality, config: Mapping[str, Any], splits: Sequence[str]
) -> list[Labelled]:
    """Labelled examples of splits of a pretraining config's source, read as pretraining reads them.

    The classes are those of the first split; labels of others are left out, and `unknown` counts
    them. Raises UserError: a split has no labels that this modality can probe, or none of these.
    """
    like, found = training_examples(modality, config), []
    for split, source in zip(splits, opened(modality, config, splits), strict=True):
        part = of_source(modality, config, source, like)
        found.append(of_known_classes(found[0], part, source) if found else part)
        if source.bad:
            first = source.bad[min(source.bad)]
            warnings.warn(
                f"{len(source.bad)} of {len(source)} examples of {split} are left out: {first}",
                stacklevel=2,
            )
    return found


def opened(modality: Modality, config: Mapping[str, Any], splits: Sequence[str]) -> list[Source]:
    """The sources of `labelled`, whose examples are not read yet. Raises UserError as it does."""
    names, sources = None, []
    for split in splits:
        source = open_named(
            config["data"]["source"], split, modality.codec, names, tolerant=bool(names)
        )
        modality.check_labels(source)
        if sources:
            check_held_out(sources[0], source, "or other data: --set data.source=ADDRESS")
        sources.append(source)
        names = source.label_names
    return sources


def of_known_classes(train: Labelled, part: Labelled, source: Source) -> Labelled:
    """A part of a source without the labels that no training example has; `unknown` counts them.

    Raises UserError: there are no others.
    """
    lost = sum(error.reason == UNKNOWN for error in source.bad.values())
    known = part.labels >= 0
    strange = known & ~np.isin(part.labels, train.labels)
    if (strange == known).all():
        raise UserError(f"{source.uri} {source.split}: training has none of its classes")
    share = float((strange.sum() + lost) / (known.sum() + lost))
    if strange.ndim == 1 and strange.any():
        return part.take(np.flatnonzero(~strange))._replace(unknown=share)
    return part._replace(labels=np.where(strange, -1, part.labels), unknown=share)


def training_examples(modality: Modality, config: Mapping[str, Any]) -> Examples:
    """The examples that a pretraining config learns from."""
    data = config["data"]
    source = open_source(data["source"], data["split"], codec=modality.codec)
    return modality.examples(source, **config["examples"])


def of_source(
    modality: Modality, config: Mapping[str, Any], source: Source, like: Examples
) -> Labelled:
    """Labelled examples of a source, read like the training examples `like`."""
    options = config["examples"]
    if modality.labelled:
        return modality.labelled(source, like, **options)
    return with_classes(modality.examples(source, like, **options), source)


def with_classes(examples: Examples, source: Source) -> Labelled:
    """All examples but those that are left out, each with its class."""
    rng = np.random.default_rng(0)
    used = [int(i) for i in np.flatnonzero(np.asarray(examples.bucket_of) >= 0)]
    if not used:
        raise UserError(f"{source.uri}: none of the {len(source)} examples of {source.split} fits")
    rows = {}
    for i in used:
        try:
            rows[i] = examples.load(i, int(examples.bucket_of[i]), rng)
        except ExampleError as error:
            source.bad[i] = error
    source.check_any()
    names = next(iter(rows.values()))
    inputs = {name: np.stack([row[name] for row in rows.values()]) for name in names}
    labels = np.array([source.field(i, "label") for i in rows])
    return Labelled(inputs, labels, source.label_names or ())


class Encode(NamedTuple):
    """Two jitted functions of (params, inputs), of one frozen encoder.

    output: -> the encoder's output [B, T, D], and valid [B, T] or None.
    candidates: with the further argument `pooled`, -> all features that a probe chooses from by
      name, [B, D] if pooled, else [B, T, D]; in one pass.
    """

    output: Callable[..., Any]
    candidates: Callable[..., Mapping[str, jax.Array]]


def make_encode(model: Any) -> Encode:
    """The encoder of a model, for `probe`, `features` and `tokens`.

    Candidates are 'front end', 'block 1' to 'block L', 'mean of blocks' and 'output' (a norm may
    follow the last block). Pooling is the mean over the valid positions. Where there are class
    tokens, pooled candidates are theirs, too: 'block 1, class token' and so on.
    """

    @jax.jit
    def output(params, inputs):
        tokens = model.apply({"params": params}, inputs, method="features")
        return model.apply({"params": params}, tokens, method="encode").x, tokens.valid

    @functools.partial(jax.jit, static_argnames="pooled")
    def candidates(params, inputs, pooled):
        tokens = model.apply({"params": params}, inputs, method="features")
        out = model.apply({"params": params}, tokens, method="encode", collect=True)
        leading = out.layers.shape[2] - tokens.x.shape[1]  # class tokens
        blocks = {f"block {i + 1}": x for i, x in enumerate(out.layers)}
        found = OrderedDict({"front end": tokens.x})  # `jit` would sort a dict
        found.update({k: x[:, leading:] for k, x in blocks.items()})
        found["mean of blocks"] = jnp.mean(out.layers[:, :, leading:], axis=0)
        found["output"] = out.x
        if not pooled:
            return found
        found = OrderedDict((k, mean_of(x, tokens.valid)) for k, x in found.items())
        if leading:
            first = {k: x[:, :leading] for k, x in blocks.items()}
            if out.class_tokens is not None:
                first["output"] = out.class_tokens
            found.update({f"{k}, class token": jnp.mean(x, axis=1) for k, x in first.items()})
        return found

    return Encode(output, candidates)


def mean_of(x: jax.Array, valid: jax.Array | None) -> jax.Array:
    """Mean [B, D] of [B, T, D] over the valid positions [B, T]; None: over all."""
    weights = jnp.ones(x.shape[:2]) if valid is None else valid
    return jnp.sum(x * weights[..., None], 1) / jnp.sum(weights, 1)[:, None]


def features(
    encode: Encode, params: Any, data: Labelled, batch: int = 64
) -> tuple[np.ndarray, np.ndarray]:
    """The encoder's outputs [N, D] and labels [N] of labelled data.

    Labels of frames [N, T] keep the frames with a label >= 0; labels of examples [N] get the mean
    over the valid positions.
    """
    pooled = data.labels.ndim == 1

    def run(inputs):
        x, valid = encode.output(params, inputs)
        return {"output": mean_of(x, valid) if pooled else x}

    found = read(run, data, None, batch)
    return found.x["output"], found.y


class Rows(NamedTuple):
    """Rows for a classifier: features x {name: [N, D]}, labels y [N], example of each row [N]."""

    x: Mapping[str, np.ndarray]
    y: np.ndarray
    example: np.ndarray


def read(
    run: Callable[..., Mapping[str, Any]], data: Labelled, limit: int | None, batch: int = 64
) -> Rows:
    """Features of at most `limit` labelled examples or frames, evenly spaced; None for all.

    run: inputs -> {name: [B, D]}, or [B, T, D] where labels are of frames. It gets batches of one
    size, of the examples that are needed and no others.
    """
    labels = data.labels.reshape(-1)
    rows = np.flatnonzero(labels >= 0)
    rows = rows if limit is None else spaced(rows, limit)
    per_example = labels.size // len(data.labels)
    used, example = np.unique(rows // per_example, return_inverse=True)
    places = example * per_example + rows % per_example  # of rows, among the used examples
    found: dict[str, list[np.ndarray]] = {}
    for start in range(0, len(used), batch):
        some = used[np.arange(start, start + batch) % len(used)]  # the last batch is filled up
        inside = places // per_example // batch == start // batch
        at = places[inside] - start * per_example
        for name, x in run({k: v[some] for k, v in data.inputs.items()}).items():
            x = np.asarray(x, np.float32).reshape(-1, x.shape[-1])
            found.setdefault(name, []).append(x[at])
    x = {name: np.concatenate(parts) for name, parts in found.items()}
    return Rows(x, labels[rows], used[example])


@functools.partial(jax.jit, static_argnames=("classes", "steps"))
def _fit(x, y, classes, steps, decay):
    """Multinomial logistic regression by L-BFGS on all examples at once."""
    params = {"w": jnp.zeros((x.shape[1], classes)), "b": jnp.zeros((classes,))}

    def loss(params):
        logits = x @ params["w"] + params["b"]
        nll = optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
        return nll + decay * jnp.sum(jnp.square(params["w"]))

    solver = optax.lbfgs()
    value_and_grad = optax.value_and_grad_from_state(loss)

    def step(carry, _):
        params, state = carry
        value, grad = value_and_grad(params, state=state)
        updates, state = solver.update(grad, state, params, value=value, grad=grad, value_fn=loss)
        return (optax.apply_updates(params, updates), state), None

    (params, _), _ = jax.lax.scan(step, (params, solver.init(params)), length=steps)
    return params


def scaled(scaling: str, x: np.ndarray, *others: np.ndarray) -> tuple[np.ndarray, ...]:
    """Features [N, D] of training rows and of others, by the training rows' mean and deviation.

    scaling: 'each', every column divided by its own deviation, or 'all', all columns by one, which
    suits columns whose sizes mean something (TF-IDF). Columns that do not vary become 0.
    """
    mean, std = x.mean(0), x.std(0, dtype=np.float64)
    varies = std > 1e-5 * std.max()
    one = np.sqrt(np.mean(np.square(std)))
    factor = np.where(varies, 1 / np.where(varies, std if scaling == "each" else one, 1), 0)
    return tuple(((a - mean) * factor).astype(np.float32) for a in (x, *others))


def linear(
    train: tuple[np.ndarray, np.ndarray],
    test: tuple[np.ndarray, np.ndarray],
    *,
    steps: int = 60,
    prior: float = 10.0,
    scaling: str = "each",
    classes: int | None = None,
) -> float:
    """Accuracy on `test` of a linear classifier on scaled features (x [N, D], y [N]).

    prior: weight of the squared norm of the classifier beside the *sum* of the losses, so that it
    matters where labels are few. scaling: see `scaled`. classes: C; None for those of the labels.
    """
    (x, y), (x_test, y_test) = train, test
    x, x_test = scaled(scaling, x, x_test)
    classes = classes or int(max(y.max(), y_test.max())) + 1
    params = _fit(x, y, classes, steps, prior / len(y))
    guess = np.argmax(x_test @ np.asarray(params["w"]) + np.asarray(params["b"]), 1)
    return float(np.mean(guess == y_test))


@functools.partial(jax.jit, static_argnames=("k", "classes"))
def _vote(x, y, queries, k, classes, temperature):
    similarity, nearest = jax.lax.top_k(queries @ x.T, k)  # [Q, k]
    votes = jax.nn.one_hot(y[nearest], classes) * jnp.exp(similarity / temperature)[..., None]
    return jnp.argmax(votes.sum(1), -1)


def knn(
    train: tuple[np.ndarray, np.ndarray],
    test: tuple[np.ndarray, np.ndarray],
    *,
    k: int = 20,
    temperature: float = 0.07,
    scaling: str = "all",
    classes: int | None = None,
) -> float:
    """Accuracy of weighted k-nearest neighbours by cosine (the DINO protocol) of scaled features.

    scaling, classes: see `linear`.
    """
    (x, y), (x_test, y_test) = train, test
    classes = classes or int(max(y.max(), y_test.max())) + 1
    unit = lambda a: a / (np.linalg.norm(a, axis=-1, keepdims=True) + 1e-8)  # noqa: E731
    x, queries = map(unit, scaled(scaling, x, x_test))
    k = min(k, len(x))
    guesses = [
        np.asarray(_vote(x, y, queries[i : i + 512], k, classes, temperature))
        for i in range(0, len(queries), 512)
    ]
    return float(np.mean(np.concatenate(guesses) == y_test))


class Tokens(NamedTuple):
    """Features before any pooling: x [N, T, D], valid bool [N, T], y int [N]."""

    x: np.ndarray
    valid: np.ndarray
    y: np.ndarray


def tokens(encode: Any, params: Any, data: Labelled, batch: int = 64) -> Tokens:
    """All positions of labelled examples (one label each)."""
    xs, valids, count = [], [], len(data.labels)
    for start in range(0, count, batch):
        rows = np.arange(start, start + batch) % count
        x, valid = encode.output(params, {k: v[rows] for k, v in data.inputs.items()})
        valid = np.ones(x.shape[:2], bool) if valid is None else valid
        xs.append(np.asarray(x, np.float32)[: count - start])
        valids.append(np.asarray(valid)[: count - start])
    return Tokens(np.concatenate(xs), np.concatenate(valids), np.asarray(data.labels))


def _attend(params, x, valid, heads):
    """Logits [N, C]: one learned query over the positions, then a linear layer."""
    N, T, D = x.shape
    split = lambda a: a.reshape(N, T, heads, D // heads)  # noqa: E731
    keys, values = split(x @ params["key"]), split(x @ params["value"])
    scores = jnp.einsum("nthd,hd->nht", keys, params["query"].reshape(heads, -1))
    scores = jnp.where(valid[:, None], scores / np.sqrt(D // heads), -jnp.inf)
    pooled = jnp.einsum("nht,nthd->nhd", jax.nn.softmax(scores), values).reshape(N, D)
    return pooled @ params["w"] + params["b"]


@functools.partial(jax.jit, static_argnames=("classes", "heads", "steps", "batch"))
def _fit_attention(x, valid, y, key, classes, heads, steps, batch, rate, decay):
    D = x.shape[-1]
    keys = jax.random.split(key, 4)
    normal = lambda key, *shape: jax.random.normal(key, shape) / np.sqrt(shape[0])  # noqa: E731
    params = {
        "query": normal(keys[0], D),
        "key": normal(keys[1], D, D),
        "value": normal(keys[2], D, D),
        "w": jnp.zeros((D, classes)),
        "b": jnp.zeros(classes),
    }
    tx = optax.adamw(optax.cosine_decay_schedule(rate, steps), weight_decay=decay)

    def step(carry, key):
        params, state = carry
        rows = jax.random.randint(key, (batch,), 0, len(y))

        def loss(params):
            logits = _attend(params, x[rows], valid[rows], heads)
            return optax.softmax_cross_entropy_with_integer_labels(logits, y[rows]).mean()

        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    carry, _ = jax.lax.scan(step, (params, tx.init(params)), jax.random.split(keys[3], steps))
    return carry[0]


def attentive(
    train: Tokens,
    test: Tokens,
    *,
    heads: int = 4,
    steps: int = 500,
    batch: int = 128,
    rate: float = 1e-3,
    decay: float = 0.1,
    seed: int = 0,
) -> float:
    """Accuracy on `test` of attention pooling (one learned query) and a linear classifier.

    As in the evaluation of I-JEPA and its like: for encoders whose features are not meant to be
    averaged. heads: divides D.
    """
    used = train.x[train.valid]
    mean, std = used.mean(0), used.std(0) + 1e-6
    classes = int(max(train.y.max(), test.y.max())) + 1
    x, x_test = ((part.x - mean) / std for part in (train, test))
    params = _fit_attention(
        x, train.valid, train.y, jax.random.key(seed), classes, heads, steps, batch, rate, decay
    )
    run = jax.jit(functools.partial(_attend, heads=heads))
    guesses = [
        np.argmax(run(params, x_test[i : i + 512], test.valid[i : i + 512]), -1)
        for i in range(0, len(x_test), 512)
    ]
    return float(np.mean(np.concatenate(guesses) == test.y))


def spaced(rows: np.ndarray, limit: int) -> np.ndarray:
    """At most `limit` of the rows [N, ...], evenly spaced."""
    return rows[:: max(1, -(-len(rows) // limit))]


# The protocol -------------------------------------------------------------------------------------

PROBES = ("linear_probe", "knn")
PRIORS = (100.0, 10.0, 1.0, 0.1)  # see `linear`; of equal ones the strongest is taken
MIDDLE = (10.0, 1.0)  # the priors with which candidates are compared: one does not suit all
SCALINGS = ("each", "all")  # see `scaled`
DEV_SHARE = 0.2  # of the training examples
DEV_ROWS = 5_000  # at most, on either side of the dev split: frames are many


def probe(
    encode: Encode, params: Any, train: Labelled, test: Labelled, *, limit: int = 20_000
) -> dict[str, Any]:
    """Scores of a frozen encoder, of the features that are best on the dev split: see `judge`.

    limit: of rows, evenly spaced, for training and for test.
    """
    pooled = train.labels.ndim == 1
    sets = [
        read(lambda inputs: encode.candidates(params, inputs, pooled), part, limit)
        for part in (train, test)
    ]
    x = sets[0].x
    last = [name for name in x if name.startswith("block") and "," not in name][-1]
    if np.allclose(x["output"], x[last], rtol=1e-4, atol=1e-5):  # nothing follows the last block
        sets = [rows._replace(x=without_output(rows.x)) for rows in sets]
    return judge(*sets)


def without_output(x: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The candidates but 'output', and its class token."""
    return {name: values for name, values in x.items() if not name.startswith("output")}


def probe_hand_made(
    modality: Modality, train: Labelled, test: Labelled, *, limit: int = 20_000
) -> dict[str, Any] | None:
    """The same scores of the modality's hand-made features; None if it names none."""
    if modality.hand_made is None:
        return None
    name, make = modality.hand_made
    sets = [
        read(lambda inputs: {name: make(train.inputs, inputs)}, part, limit, batch=256)
        for part in (train, test)
    ]
    return judge(*sets)


def dev_split(example: np.ndarray) -> np.ndarray:
    """bool [N]: rows of the dev split, which are all rows of a fifth of the examples [N]."""
    examples = np.unique(example)
    if len(examples) < 2:
        raise UserError(f"{len(examples)} labelled example cannot be split for a probe")
    count = max(1, round(DEV_SHARE * len(examples)))
    return np.isin(example, np.random.default_rng(0).permutation(examples)[:count])


def judge(train: Rows, test: Rows) -> dict[str, Any]:
    """{'linear_probe': accuracy, 'knn': accuracy} on the test rows, and what was chosen for them.

    'blocks' {probe: name of the features}, 'scaling' {probe: ...} and 'prior' are those that are
    best on the dev split, whose scores are in 'dev' {probe: {name: accuracy}}. The linear probe
    compares the features with few priors, then scalings and priors of the best.
    """
    classes = int(max(train.y.max(), test.y.max())) + 1
    held = dev_split(train.example)
    fit, dev = (spaced(np.flatnonzero(side), DEV_ROWS) for side in (~held, held))

    def on_dev(score: Callable[..., float], name: str, **options: Any) -> float:
        parts = ((train.x[name][rows], train.y[rows]) for rows in (fit, dev))
        return score(*parts, classes=classes, **options)

    by_name = {name: max(on_dev(linear, name, prior=prior) for prior in MIDDLE) for name in train.x}
    best = max(by_name, key=by_name.__getitem__)
    by_option = {
        (scaling, prior): on_dev(linear, best, scaling=scaling, prior=prior)
        for scaling in SCALINGS
        for prior in PRIORS
    }
    scaling, prior = max(by_option, key=by_option.__getitem__)
    nearest = {(name, how): on_dev(knn, name, scaling=how) for name in train.x for how in SCALINGS}
    near, how = max(nearest, key=nearest.__getitem__)
    by_near = {name: max(nearest[name, s] for s in SCALINGS) for name in train.x}

    def on_test(score: Callable[..., float], name: str, **options: Any) -> float:
        return score((train.x[name], train.y), (test.x[name], test.y), classes=classes, **options)

    return {
        "linear_probe": on_test(linear, best, scaling=scaling, prior=prior),
        "knn": on_test(knn, near, scaling=how),
        "blocks": {"linear_probe": best, "knn": near},
        "scaling": {"linear_probe": scaling, "knn": how},
        "prior": prior,
        "dev": {"linear_probe": by_name, "knn": by_near},
    }


def verdict(
    pretrained: Sequence[float], untrained: Sequence[float], hand_made: float | None
) -> str:
    """What pretraining has brought, in words; every seed must be above what it is compared with."""
    if min(pretrained) <= max(untrained):
        return "no gain"
    if hand_made is None:
        return "better than untrained"
    better = min(pretrained) > hand_made
    return "better than hand-made features" if better else "better than untrained only"


def compared(
    untrained: Sequence[Mapping[str, Any]],
    pretrained: Sequence[Mapping[str, Any]],
    hand_made: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Results of `probe`, by seed, and of `probe_hand_made`, as the demo's summary.json has them.

    {probe: {'untrained': scores by seed, 'hand_made': score or None, 'pretrained': scores},
    'verdict': {probe: words}, 'block': that of the linear probe, pretrained, first seed, 'blocks':
    {probe: {'untrained': names by seed, 'pretrained': names}}, 'dev': {probe: {'untrained': {block:
    score}, 'hand_made': ..., 'pretrained': ...}} of the first seed}.
    """
    sides = {"untrained": untrained, "pretrained": pretrained}
    found: dict[str, Any] = {"verdict": {}, "block": pretrained[0]["blocks"]["linear_probe"]}
    blocks: dict[str, Any] = {}
    dev: dict[str, Any] = {}
    for name in PROBES:
        found[name] = {side: [r[name] for r in results] for side, results in sides.items()}
        found[name]["hand_made"] = hand_made and hand_made[name]
        found["verdict"][name] = verdict(**found[name])
        blocks[name] = {side: [r["blocks"][name] for r in rs] for side, rs in sides.items()}
        dev[name] = {side: results[0]["dev"][name] for side, results in sides.items()}
        dev[name]["hand_made"] = hand_made and max(hand_made["dev"][name].values())
    return found | {"blocks": blocks, "dev": dev}
