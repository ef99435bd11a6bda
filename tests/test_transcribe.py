"""CTC fine-tuning: PyTorch's losses and gradients, Hugging Face's, masks, what is frozen."""

import importlib
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data2vec_jax.convert import loaded, ours
from data2vec_jax.modalities.contract import Tokens
from data2vec_jax.models import heads
from data2vec_jax.models.losses import ctc_losses
from data2vec_jax.objectives.targets import Draw
from data2vec_jax.state import path_name
from data2vec_jax.tasks import transcribe
from data2vec_jax.tasks.pretrain import make_model

GOLDENS = Path(__file__).parent / "goldens"


def draw_of(step=0, seed=0):
    keys = jax.random.split(jax.random.key(seed))
    return Draw(keys[0], jnp.int32(step), keys[1])


# Losses -----------------------------------------------------------------------------------------


def test_losses_and_gradients_equal_pytorch():
    """Two of the rows have no alignment: infinite, and with zero_infinity 0 without a gradient."""
    with np.load(GOLDENS / "ctc" / "torch.npz") as file:
        given = {name: file[name] for name in file.files}
    logits, lengths, labels = (jnp.asarray(given[n]) for n in ("logits", "lengths", "labels"))
    losses = jax.jit(lambda x: ctc_losses(x, lengths, labels, 0))
    found, wanted = np.asarray(losses(logits)), given["losses"]
    np.testing.assert_array_equal(np.isinf(found), np.isinf(wanted))
    assert np.isinf(wanted).sum() == 2
    np.testing.assert_allclose(found, wanted, rtol=1e-5)

    def weighted(x):
        each = losses(x)
        return jnp.sum(jnp.where(jnp.isfinite(each), each, 0.0) * given["weights"])

    gradient = np.asarray(jax.grad(weighted)(logits))
    np.testing.assert_allclose(gradient, given["gradient"], atol=2e-4)
    assert not gradient[np.isinf(wanted)].any()  # exactly
    half = losses(logits.astype(jnp.bfloat16))
    assert half.dtype == jnp.float32
    np.testing.assert_allclose(half, losses(logits.astype(jnp.bfloat16).astype(jnp.float32)))


@pytest.mark.parametrize("run", ["nomask", "mask"])
@pytest.mark.parametrize("name", ["Data2VecAudioForCTC", "Data2VecAudioForCTC__stdlayout"])
def test_golden_losses_through_the_task(name, run):
    folder = GOLDENS / "checkpoints" / name
    with np.load(folder / "golden.npz") as file:
        golden = {key: file[key] for key in file.files}
    checkpoint = loaded.load(folder)
    model, head = ours.model_of(checkpoint.config), heads.make(checkpoint.config["task"])
    batch = {
        "audio": jnp.asarray(golden[f"in_{run}/input_values"]),
        "labels": jnp.asarray(golden[f"in_{run}/labels"], jnp.int32),
    }
    batch["example_id"] = jnp.arange(len(batch["audio"]), dtype=jnp.uint32)
    if f"in_{run}/attention_mask" in golden:
        batch["length"] = jnp.asarray(golden[f"in_{run}/attention_mask"].sum(-1), jnp.int32)
    loss = jax.jit(lambda params: transcribe.make_loss(model, head)(params, {}, batch, None))
    total, count, metrics = loss(checkpoint.params)
    assert head.reduction == "sum" and count == len(batch["audio"])
    np.testing.assert_allclose(total, golden[f"{run}/loss"], rtol=1e-5)
    assert metrics["infeasible"] == 0


# A tiny model -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny():
    """Model, head, parameters and a batch with padding; the second row cannot be aligned."""
    config = importlib.import_module("configs.speech_v1").get_config("smoke")
    config.model.frontend.norm = "layer"
    _, model = make_model(config)
    rng = np.random.default_rng(0)
    labels = rng.integers(4, 9, (3, 6)).astype(np.int32)
    labels[2, 3:] = -1
    batch = {
        "audio": jnp.asarray(rng.normal(size=(3, 4000)), jnp.float32),
        "length": jnp.array([4000, 1000, 2600], jnp.int32),
        "labels": jnp.asarray(labels),
        "example_id": jnp.array([5, 2, 9], jnp.uint32),
    }
    batch["audio"] = jnp.where(jnp.arange(4000) < batch["length"][:, None], batch["audio"], 0)
    head = heads.Ctc(9)
    params = model.init(jax.random.key(0), batch)["params"]
    features = heads.Features(jnp.zeros((1, 4, model.width)))
    params = {**params, "task": head.init(jax.random.key(1), features)["params"]}
    return model, head, params, batch


def test_batch_mates_and_padding_do_not_change_a_loss(tiny):
    model, head, params, batch = tiny
    loss = transcribe.make_loss(model, head)
    whole = loss(params, {}, batch, None)
    assert whole[2]["infeasible"] == pytest.approx(1 / 3)
    alone = 0.0
    for row, samples in enumerate(batch["length"]):
        one = {k: v[row : row + 1] for k, v in batch.items() if k != "length"}
        one["audio"] = one["audio"][:, :samples]
        alone += loss(params, {}, one, None)[0]
    np.testing.assert_allclose(whole[0], alone, rtol=1e-5)


def test_only_the_head_learns_at_first(tiny):
    model, head, params, batch = tiny
    loss = transcribe.make_loss(model, head, freeze_updates=10)
    free = transcribe.make_loss(model, head)
    both = jax.jit(
        lambda step: [
            jax.grad(lambda p, f=f: f(p, {}, batch, draw_of(step))[0])(params) for f in (loss, free)
        ]
    )
    for step in (0, 9, 10):
        held, whole = both(step)
        for path, gradient in jax.tree_util.tree_leaves_with_path(held):
            name = path_name(path)
            other = whole
            for key in path:
                other = other[key.key]
            if name.startswith("task/") or step >= 10:
                np.testing.assert_allclose(gradient, other, rtol=1e-3, atol=1e-4)
                assert name.startswith(("head/", "frontend/conv")) or np.any(other), name
            else:
                assert not np.any(gradient), name


def test_frozen_front_end(tiny):
    names = [path_name(p) for p, _ in jax.tree_util.tree_leaves_with_path(tiny[2]["frontend"])]
    names = [f"frontend/{name}" for name in names]
    learning = {name for name in names if not re.search(transcribe.FRONTEND, name)}
    kept = ("norm/scale", "norm/bias", "projection/kernel", "projection/bias")
    assert learning == {f"frontend/{name}" for name in kept}
    assert not re.search(transcribe.FRONTEND, "positions/conv0/kernel")


# Masks ------------------------------------------------------------------------------------------

OPTIONS = dict(time_prob=0.65, time_width=10, channel_prob=0.25, channel_width=16)


def test_masks_depend_on_the_example_and_the_step_alone():
    ids = jnp.array([3, 8, 5], jnp.uint32)
    valid = jnp.arange(50) < jnp.array([50, 20, 35])[:, None]
    tokens = Tokens(jnp.ones((3, 50, 32)), valid)
    fill = jnp.full(32, 7.0)

    def masked(rows, step=0, seed=0):
        part = Tokens(tokens.x[rows], valid[rows])
        key = jax.random.key(1)
        return transcribe.augment(part, fill, key, draw_of(step, seed), ids[rows], **OPTIONS).x

    whole = masked(np.array([0, 1, 2]))
    order = np.array([2, 1])
    np.testing.assert_array_equal(masked(order), whole[order])
    assert (masked(order, step=1) != whole[order]).any()
    assert (masked(order, seed=1) != whole[order]).any()
    assert not ((whole == 7).any(-1) & ~valid).any()  # padding is never masked
    assert ((whole == 7).any(-1)).any(1).all()  # at least one span


def test_encoders_without_an_embedding_get_noise_or_zeros():
    tokens, ids = Tokens(jnp.ones((20, 60, 32)), None), jnp.arange(20, dtype=jnp.uint32)
    options = OPTIONS | {"channel_prob": 0.0}
    noisy, zeros = (
        transcribe.augment(
            tokens, None, jax.random.key(2), draw_of(), ids, zero_mask=z, **options
        ).x
        for z in (False, True)
    )
    changed = np.asarray(noisy != 1)
    assert np.std(np.asarray(noisy)[changed]) == pytest.approx(0.01, rel=0.05)
    np.testing.assert_array_equal(zeros, jnp.where(changed, 0, 1))
    options |= {"time_prob": 0.0}
    same = transcribe.augment(tokens, None, jax.random.key(2), draw_of(), ids, **options)
    assert same.x is tokens.x
