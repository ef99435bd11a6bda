"""Probes of a frozen encoder: what can be read off its representations.

The same code, budget and split for every encoder. N examples (or frames), D width, C classes.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from data2vec_jax.core.errors import UserError
from data2vec_jax.data.sources import Source, open_named, open_source
from data2vec_jax.modalities.contract import Examples, Labelled, Modality


def labelled(
    modality: Modality, config: Mapping[str, Any], splits: Sequence[str]
) -> list[Labelled]:
    """Labelled examples of splits of a pretraining config's source, read as pretraining reads them.

    The classes are those of the first split. Raises UserError: a split has no labels that this
    modality can probe, or a class that the first has not.
    """
    data, options = config["data"], config["examples"]
    like = open_source(data["source"], data["split"], codec=modality.codec)
    like, sources, names = modality.examples(like, **options), [], None
    for split in splits:
        source = open_named(data["source"], split, modality.codec, names)
        modality.check_labels(source)
        names = source.label_names
        sources.append(source)
    if modality.labelled:
        return [modality.labelled(source, like, **options) for source in sources]
    return [with_classes(modality.examples(source, like, **options), source) for source in sources]


def with_classes(examples: Examples, source: Source) -> Labelled:
    """All examples but those that are left out, each with its class."""
    rng = np.random.default_rng(0)
    used = [int(i) for i in np.flatnonzero(np.asarray(examples.bucket_of) >= 0)]
    if not used:
        raise UserError(f"{source.uri}: none of the {len(source)} examples of {source.split} fits")
    rows = [examples.load(i, int(examples.bucket_of[i]), rng) for i in used]
    inputs = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    return Labelled(inputs, np.array([source.field(i, "label") for i in used]))


def make_encode(model: Any, layers: Sequence[int] | None = None):
    """A jitted (params, inputs) -> features [B, T, D] and valid [B, T] or None.

    layers: the mean of these layers' outputs (negative from the end); None is the encoder's output.
    """

    @jax.jit
    def encode(params, inputs):
        apply = functools.partial(model.apply, {"params": params})
        tokens = apply(inputs, method="features")
        out = apply(tokens, method="encode", collect=layers is not None)
        if layers is None:
            return out.x, tokens.valid
        x = jnp.mean(out.layers[jnp.asarray(layers)], axis=0)
        return x[:, x.shape[1] - tokens.x.shape[1] :], tokens.valid

    return encode


def features(encode: Any, params: Any, data: Labelled, batch: int = 64) -> tuple[np.ndarray, ...]:
    """Features [N, D] and labels [N] of labelled data.

    Labels of frames [N, T] keep the frames with a label >= 0; labels of examples [N] get the mean
    over the valid positions.
    """
    found, count = [], len(data.labels)
    for start in range(0, count, batch):
        rows = np.arange(start, start + batch) % count  # the last batch is filled up and cut
        x, valid = encode(params, {k: v[rows] for k, v in data.inputs.items()})
        if data.labels.ndim == 1:
            weights = jnp.ones(x.shape[:2]) if valid is None else valid
            x = jnp.sum(x * weights[..., None], 1) / jnp.sum(weights, 1)[:, None]
        found.append(np.asarray(x, np.float32)[: count - start])
    x, labels = np.concatenate(found), data.labels
    chosen = labels.reshape(-1) >= 0
    return x.reshape(-1, x.shape[-1])[chosen], labels.reshape(-1)[chosen]


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


def linear(
    train: tuple[np.ndarray, np.ndarray],
    test: tuple[np.ndarray, np.ndarray],
    *,
    steps: int = 60,
    prior: float = 10.0,
) -> float:
    """Accuracy on `test` of a linear classifier on standardised features (x [N, D], y [N]).

    prior: weight of the squared norm of the classifier beside the *sum* of the losses, so that it
    matters where labels are few.
    """
    (x, y), (x_test, y_test) = train, test
    mean, std = x.mean(0), x.std(0) + 1e-6
    classes = int(max(y.max(), y_test.max())) + 1
    params = _fit((x - mean) / std, y, classes, steps, prior / len(y))
    guess = np.argmax((x_test - mean) / std @ np.asarray(params["w"]) + np.asarray(params["b"]), 1)
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
) -> float:
    """Accuracy of weighted k-nearest neighbours by cosine (the DINO protocol)."""
    (x, y), (x_test, y_test) = train, test
    mean = x.mean(0)
    unit = lambda a: (a - mean) / (np.linalg.norm(a - mean, axis=-1, keepdims=True) + 1e-8)  # noqa: E731
    classes = int(max(y.max(), y_test.max())) + 1
    x, queries = unit(x), unit(x_test)
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
        x, valid = encode(params, {k: v[rows] for k, v in data.inputs.items()})
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


def probe(
    encode: Any, params: Any, train: Labelled, test: Labelled, *, limit: int = 20_000
) -> Mapping[str, float]:
    """{'linear_probe': accuracy, 'knn': accuracy}; `limit` training rows, evenly spaced."""
    sets = []
    for data in (train, test):
        if data.labels.ndim == 1:  # of examples: the others need not be encoded
            rows = np.flatnonzero(data.labels >= 0)
            rows = spaced(rows, limit)
            data = Labelled({k: v[rows] for k, v in data.inputs.items()}, data.labels[rows])
        x, y = features(encode, params, data)
        sets.append((spaced(x, limit), spaced(y, limit)))
    return {"linear_probe": linear(*sets), "knn": knn(*sets)}
