"""padding='exact': a padded batch of data2vec 1.0 is its examples, one by one, without padding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from recorded import quick_jit

from data2vec_jax.errors import UserError
from data2vec_jax.modalities import contract
from data2vec_jax.objectives import data2vec1
from data2vec_jax.state import path_name

ENCODER = dict(depth=3, heads=2, mlp=24)
# Statistics over time and over everything of an example.
NORMS = dict(layer_norms=("instance", "group"), final_norms=("instance", "layer"))
MODELS = {
    "speech": dict(
        frontend=dict(convs=((8, 10, 5), (8, 3, 2), (8, 2, 2))),
        positions=dict(depth=2, width=8, groups=2),  # an even kernel
    ),
    "text": dict(vocab_size=30, max_length=32),
}  # fmt: skip
LENGTHS = {"speech": (700, 431), "text": (23, 9)}  # samples, tokens


def make(name, padding="exact", **objective):
    modality = contract.get(name)
    model = modality.model(width=16, encoder=ENCODER, padding=padding, **MODELS[name])
    loss = data2vec1.make_loss(
        model, None, modality.corrupt, modality.shares_features, top_k=2, **(NORMS | objective)
    )
    return model, loss


def examples(name):
    random = np.random.default_rng(0)
    if name == "speech":
        rows = [random.normal(size=n).astype(np.float32) for n in LENGTHS[name]]
        whole = np.stack([np.pad(row, (0, max(LENGTHS[name]) - len(row))) for row in rows])
        batch = {"audio": whole, "length": np.array(LENGTHS[name])}
        return batch, [{"audio": row[None]} for row in rows]
    rows = [random.integers(4, 30, size=n) for n in LENGTHS[name]]
    whole = [np.pad(row, (0, max(LENGTHS[name]) - len(row)), constant_values=1) for row in rows]
    return {"tokens": np.stack(whole)}, [{"tokens": row[None]} for row in rows]


def random_params(model, batch, seed):
    random = np.random.default_rng(seed)
    batch = jax.tree.map(jnp.asarray, batch)
    shapes = jax.eval_shape(model.init, jax.random.key(0), batch)["params"]

    def draw(path, x):
        scale = 0.3 if x.ndim > 1 else 0.1
        mean = 1.0 if path_name(path).endswith("scale") else 0.0
        return random.normal(mean, scale, x.shape).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def total_of(model, loss, teacher, batch, mask):
    """parameters -> (total loss, (features [B, T, D], targets [B, T, D]))."""
    batch = jax.tree.map(jnp.asarray, batch)
    visible = batch
    if "tokens" in batch:
        visible = {"tokens": jnp.where(mask, model.embeddings.vocab_size - 1, batch["tokens"])}

    def total(params):
        most = int(mask.sum(-1).max())
        stages = loss.given(params, teacher, batch, visible, jnp.asarray(mask), most, None)
        return stages.total, (stages.tokens.x, stages.targets)

    return total


@pytest.mark.parametrize("name", MODELS)
def test_padded_batch_is_the_sum_of_its_examples(name):
    model, loss = make(name)
    batch, singles = examples(name)
    params, teacher = random_params(model, batch, 0), random_params(model, batch, 1)
    valid = np.asarray(model.valid_lengths(jax.tree.map(jnp.asarray, batch)))
    mask = np.random.default_rng(1).uniform(size=(2, int(valid.max()))) < 0.4
    mask &= np.arange(mask.shape[1]) < valid[:, None]

    def run(batch, mask):
        total = total_of(model, loss, teacher, batch, mask)
        (value, seen), gradient = quick_jit(jax.value_and_grad(total, has_aux=True))(params)
        return value, gradient, seen

    whole, gradient, seen = run(batch, mask)
    parts = []
    for row, single in enumerate(singles):
        value, part, alone = run(single, mask[row : row + 1, : valid[row]])
        parts.append((value, part))
        for ours, theirs in zip(seen, alone, strict=True):  # features, targets
            size = np.abs(theirs).max()
            np.testing.assert_allclose(ours[row, : valid[row]], theirs[0], atol=1e-5 * size)
    value, summed = jax.tree.map(lambda *x: sum(x), *parts)
    np.testing.assert_allclose(whole, value, rtol=1e-5)
    length = float(np.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves(summed))))
    for ours, theirs in zip(jax.tree.leaves(gradient), jax.tree.leaves(summed), strict=True):
        size = np.abs(theirs).max()
        if size > 1e-6 * length:  # not the zero gradient of key biases
            np.testing.assert_allclose(ours, theirs, atol=1e-5 * size)


@pytest.mark.parametrize("name", MODELS)
def test_the_authors_padding_differs(name):
    model, loss = make(name)
    batch, _ = examples(name)
    params = random_params(model, batch, 0)
    valid = np.asarray(model.valid_lengths(jax.tree.map(jnp.asarray, batch)))
    mask = np.arange(int(valid.max())) < np.full((2, 1), 4)
    exact, _ = quick_jit(total_of(model, loss, params, batch, mask))(params)
    theirs, _ = quick_jit(total_of(*make(name, "reference"), params, batch, mask))(params)
    assert abs(theirs / exact - 1) > 1e-4


def test_what_mixes_rows_refuses_padding():
    for name in MODELS:
        model, loss = make(name, layer_norms=("batch",))
        batch, singles = examples(name)
        batch = jax.tree.map(jnp.asarray, batch)
        params = random_params(model, batch, 0)
        mask = np.arange(int(model.valid_lengths(batch).max())) < np.full((2, 1), 4)
        with pytest.raises(UserError, match="'batch'"):
            jax.eval_shape(total_of(model, loss, params, batch, mask), params)
    model = contract.get("speech").model(
        width=16, encoder=ENCODER, frontend=dict(convs=((8, 10, 5),), norm="group")
    )
    batch, singles = examples("speech")
    random_params(model, singles[0], 0)  # without padding it is welcome
    with pytest.raises(UserError, match="'group'"):
        random_params(model, batch, 0)
    with pytest.raises(UserError, match="did you mean 'exact'"):
        contract.get("text").model(width=16, encoder=ENCODER, padding="exat")
