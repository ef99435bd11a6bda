"""padding='exact': a padded batch is its examples, one by one, without padding.

B examples, M masks of each (1.0: one), T tokens, D width.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from recorded import quick_jit

from data2vec_jax import masking
from data2vec_jax.core.errors import UserError
from data2vec_jax.core.state import path_name
from data2vec_jax.core.train_step import StepKeys
from data2vec_jax.modalities import contract
from data2vec_jax.objectives import data2vec1, data2vec2

D, M = 16, 2
ENCODER = dict(depth=3, heads=2, mlp=24)
# Statistics over time and over everything of an example.
NORMS = dict(layer_norms=("instance", "group"), final_norms=("instance", "layer"))
MODELS = {
    "speech": dict(
        frontend=dict(convs=((8, 10, 5), (8, 3, 2), (8, 2, 2))),
        positions=dict(depth=2, width=8, groups=2),  # an even kernel
    ),
    "mel": dict(frontend=dict(kind="mel"), positions=dict(depth=2, width=8, groups=2)),
    "text": dict(vocab_size=30, max_length=32),
}
ONLY_2 = dict(decoder=dict(layers=3, width=8, kernel=5, groups=2), alibi=dict(scale=0.7))
LENGTHS = {"speech": (700, 431), "mel": (5_000, 2_500), "text": (23, 9)}  # samples, tokens
# Log-mel frames are float32 whatever the rest is.
LIMIT = {"speech": 1e-9, "mel": 1e-5, "text": 1e-9}
CASES = [(name, version) for name in MODELS for version in (1, 2)]


def make(name, version, padding="exact", dtype=jnp.float32, **objective):
    """(model, objective) of 1.0 or 2.0."""
    modality = contract.get("speech" if name == "mel" else name)
    only_2 = ONLY_2 | dict(input_norm=True) if name == "text" else ONLY_2
    model = modality.model(
        width=D,
        encoder=ENCODER,
        padding=padding,
        dtype=dtype,
        **MODELS[name],
        **(only_2 if version == 2 else {}),
    ).make()
    options = dict(top_k=2) | NORMS | objective | (dict(clones=M) if version == 2 else {})
    objective = {1: data2vec1, 2: data2vec2}[version]
    return model, objective.make_loss(
        objective.Config(**options),
        model,
        lambda shapes: masking.make("independent", model.mask_shape(shapes), ratio=0.4),
        modality.corrupt,
    )


def examples(name):
    """(padded batch, the same examples without padding)."""
    random = np.random.default_rng(0)
    longest = max(LENGTHS[name])
    if name != "text":
        rows = [random.normal(size=n).astype(np.float32) for n in LENGTHS[name]]
        whole = np.stack([np.pad(row, (0, longest - len(row))) for row in rows])
        batch = {"audio": whole, "length": np.array(LENGTHS[name])}
        return to_jax(batch), [to_jax({"audio": row[None]}) for row in rows]
    rows = [random.integers(4, 29, size=n) for n in LENGTHS[name]]
    whole = [np.pad(row, (0, longest - len(row)), constant_values=1) for row in rows]
    return to_jax({"tokens": np.stack(whole)}), [to_jax({"tokens": row[None]}) for row in rows]


def to_jax(batch):
    return {name: jnp.asarray(value) for name, value in batch.items()}


def random_params(model, batch, seed):
    random = np.random.default_rng(seed)
    shapes = jax.eval_shape(model.init, jax.random.key(0), batch)["params"]

    def draw(path, x):
        scale = 0.3 if x.ndim > 1 else 0.1
        mean = 1.0 if path_name(path).endswith("scale") else 0.0
        return random.normal(mean, scale, x.shape).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


class Setting(NamedTuple):
    """A model with random weights, a padded batch and draws for it.

    valid: unpadded tokens of each row. mask bool [B, M, T], noise [B * M, T, D]; 1.0 uses the first
    mask of a row and no noise.
    """

    model: Any
    objective: Any
    params: Any
    teacher: Any
    batch: dict[str, jax.Array]
    valid: list[int]
    mask: np.ndarray
    noise: np.ndarray

    def total(self, batch, mask, noise):
        """parameters -> (total loss, (features, targets), both [B, T, D])."""
        most = int(mask.sum(-1).max())
        if self.model.decoder is not None:
            draws = (jnp.asarray(mask), most, jnp.asarray(noise), None)
        else:
            mask, visible = jnp.asarray(mask[:, 0]), batch
            if "tokens" in batch:
                visible = {"tokens": jnp.where(mask, 29, batch["tokens"])}
            draws = (visible, mask, most, None)

        def total(params):
            stages = self.objective.forward_with_masks(params, self.teacher, batch, *draws)
            return stages.total, (stages.tokens.x, stages.targets)

        return total

    def whole(self):
        return self.total(self.batch, self.mask, self.noise)


def setting(name, version, padding="exact", dtype=jnp.float32, **objective):
    model, objective = make(name, version, padding, dtype, **objective)
    batch, _ = examples(name)
    params, teacher = (
        jax.tree.map(lambda x: x.astype(dtype), random_params(model, batch, seed))
        for seed in (0, 1)
    )
    valid = [int(n) for n in model.valid_lengths(batch)]
    random = np.random.default_rng(1)
    mask = np.zeros((len(valid), M, max(valid)), bool)
    for row, length in enumerate(valid):
        for clone in range(M):  # equally many of each of an example's masks
            mask[row, clone, random.permutation(length)[: round(0.4 * length)]] = True
    noise = 0.1 * random.normal(size=(len(valid) * M, max(valid), D)).astype(np.float32)
    return Setting(model, objective, params, teacher, batch, valid, mask, noise)


@jax.enable_x64(True)  # in float32 some sums cancel to the fourth digit
@pytest.mark.parametrize(("name", "version"), CASES)
def test_padded_batch_is_the_sum_of_its_examples(name, version):
    s, limit = setting(name, version, dtype=jnp.float64), LIMIT[name]

    def run(total):
        (value, seen), gradient = quick_jit(jax.value_and_grad(total, has_aux=True))(s.params)
        return value, gradient, seen

    whole, gradient, seen = run(s.whole())
    parts = []
    for row, (single, length) in enumerate(zip(examples(name)[1], s.valid, strict=True)):
        mask, noise = s.mask[row : row + 1, :, :length], s.noise[M * row : M * (row + 1), :length]
        value, part, alone = run(s.total(single, mask, noise))
        parts.append((value, part))
        for ours, theirs in zip(seen, alone, strict=True):  # features, targets
            size = np.abs(theirs).max()
            np.testing.assert_allclose(ours[row, :length], theirs[0], rtol=0, atol=limit * size)
    value, summed = jax.tree.map(lambda *x: sum(x), *parts)
    np.testing.assert_allclose(whole, value, rtol=limit)
    norm = float(np.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves(summed))))
    compared = 0
    for ours, theirs in zip(jax.tree.leaves(gradient), jax.tree.leaves(summed), strict=True):
        size = np.abs(theirs).max()
        if size > 1e-9 * norm:  # not the zero gradient of key biases
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=limit * size)
            compared += 1
    assert compared > 15


@pytest.mark.parametrize(("name", "version"), CASES)
def test_the_authors_padding_differs(name, version):
    ways = "exact", {1: "reference", 2: "attention"}[version]
    settings = [setting(name, version, padding) for padding in ways]
    exact, theirs = (quick_jit(s.whole())(s.params)[0] for s in settings)
    assert abs(theirs / exact - 1) > 1e-4


@pytest.mark.parametrize(("name", "version"), CASES)
def test_padding_is_never_masked(name, version):
    s = setting(name, version)
    batch = s.batch | {"example_id": jnp.arange(len(s.valid), dtype=jnp.uint32)}
    draw = StepKeys(jax.random.key(0), jnp.int32(0), jax.random.key(1))
    count = jax.jit(lambda params: s.objective.loss(params, {}, batch, draw)[1])(s.params)
    sampler = masking.make("independent", max(s.valid), ratio=0.4)
    clones = M if version == 2 else 1
    assert count == clones * sum(sampler.count(n) for n in s.valid)  # of each row's own length


@pytest.mark.parametrize(("name", "version"), CASES)
def test_batch_norm_of_targets_refuses_padding(name, version):
    s = setting(name, version, layer_norms=("batch",))
    with pytest.raises(UserError, match="'batch'"):
        jax.eval_shape(s.whole(), s.params)


@pytest.mark.parametrize("only_2", [{}, ONLY_2], ids=["1.0", "2.0"])
def test_group_norm_of_features_refuses_padding(only_2):
    model = (
        contract.get("speech")
        .model(width=D, encoder=ENCODER, frontend=dict(convs=((8, 10, 5),), norm="group"), **only_2)
        .make()
    )
    batch, singles = examples("speech")
    random_params(model, singles[0], 0)  # without padding it is welcome
    with pytest.raises(UserError, match="'group'"):
        random_params(model, batch, 0)


def test_ways_of_padding_are_named():
    with pytest.raises(UserError, match="did you mean 'exact'"):
        options = dict(width=D, encoder=ENCODER, padding="exat")
        contract.make_model(contract.get("text"), options, jnp.float32)
