"""Gradient accumulation, on two devices that split the weights, equals the large batch on one: in
float32, and to rounding in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from configs_for_tests import config_of, quiet
from recorded import quick_jit

from data2vec_jax import masking
from data2vec_jax.core import sharding
from data2vec_jax.core.errors import UserError
from data2vec_jax.core.run import Run
from data2vec_jax.core.state import path_name
from data2vec_jax.tasks import pretrain

# Relative: of the loss, and in L2 of each tensor.
LIMITS = {"float32": (1e-6, 2e-4), "float64": (1e-9, 1e-9)}
UPDATES = 3
VERSIONS = "v1", "v2"


def first_state(config):
    """Of all runs of a config: another program may round the initial values in another way."""
    mesh = sharding.make_mesh(1, 1, devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        state = Run(config, pretrain.make(config), mesh).init(0)
    wide = jnp.float64 if jax.config.jax_enable_x64 else jnp.float32
    return jax.device_get(jax.tree.map(lambda x: x.astype(wide) if is_real(x) else x, state))


def is_real(x):
    return jnp.issubdtype(x.dtype, jnp.floating)


def run(config, state, fsdp, monkeypatch):
    """(losses, {(step, example): masks}, {what: its tensors by path}) of three updates."""
    masks, sample = {}, masking.sample

    def note(step, ids, drawn):
        masks.update({(int(step), int(i)): m for i, m in zip(ids, drawn, strict=True)})

    def noted(sampler, key, step, ids, clones, valid=None):
        drawn = sample(sampler, key, step, ids, clones, valid)
        jax.debug.callback(note, step, ids, drawn)
        return drawn

    monkeypatch.setattr(masking, "sample", noted)
    mesh = sharding.make_mesh(1, fsdp, devices=jax.devices()[:fsdp])
    with jax.set_mesh(mesh):
        job = Run(config, pretrain.make(config), mesh)
        places = sharding.shardings(state, mesh, min_size=256)
        state = jax.device_put(state, places)
        split = {x.sharding.is_fully_replicated for x in jax.tree.leaves(state.params)}
        assert (False in split) == (fsdp > 1)
        # In float32 the program that trains: a quickly compiled one rounds its sums more coarsely.
        wide = jax.config.jax_enable_x64
        jit = quick_jit if wide else jax.jit
        step = jit(job.train_step, out_shardings=(places, None))  # one program for all updates
        losses, rows = [], 0
        for _, batch in zip(range(UPDATES), job.task.data(0), strict=False):
            rows += len(batch["example_id"])
            state, metrics = step(state, batch)
            losses.append(float(metrics["loss"]))
        jax.effects_barrier()
    assert len(masks) == rows
    # Adam's first moments are a weighted sum of the gradients.
    (adam,) = (s for s in jax.tree.leaves(state.opt_state, is_leaf=has_mu) if has_mu(s))
    trees = dict(params=state.params, teacher=state.teacher, gradients=adam.mu)
    return (
        losses,
        masks,
        {
            what: {path_name(p): np.asarray(x) for p, x in jax.tree.leaves_with_path(tree)}
            for what, tree in trees.items()
        },
    )


def has_mu(state):
    return hasattr(state, "mu")


def without_key_biases(name, *arrays):
    """The true gradient of key biases is zero, and Adam turns its rounding noise into steps."""
    if not name.endswith("qkv/bias"):
        return arrays
    parts = [np.split(a, 3, axis=-1) for a in arrays]
    return [np.concatenate([q, v], axis=-1) for q, _, v in parts]


@pytest.mark.parametrize(
    "recipe, dtype",
    [(f"{modality}_{v}", "float64") for modality in ("speech", "vision", "text") for v in VERSIONS]
    + [("vision_v1", "float32")],
)
def test_four_parts_equal_the_large_batch(recipe, dtype, monkeypatch):
    config = quiet(config_of(recipe))
    with jax.enable_x64(dtype == "float64"):
        monkeypatch.setitem(pretrain.DTYPES, "float32", jnp.dtype(dtype))
        state = first_state(config)
        losses, masks, whole = run(config, state, 1, monkeypatch)
        split = config | {"accumulate": 4}
        their_losses, their_masks, parts = run(split, state, 2, monkeypatch)
    assert masks.keys() == their_masks.keys()
    for key, drawn in masks.items():
        np.testing.assert_array_equal(drawn, their_masks[key])
    of_loss, of_tensor = LIMITS[dtype]
    assert their_losses == pytest.approx(losses, rel=of_loss)
    assert np.ptp(losses) > 0.01 * losses[0]  # something was learned
    for what, tensors in whole.items():
        assert len(tensors) > 10
        for name, ours in tensors.items():
            assert ours.dtype == dtype
            ours, theirs = without_key_biases(name, ours, parts[what][name])
            error = np.linalg.norm(ours - theirs) / (np.linalg.norm(ours) + 1e-12)
            assert error < of_tensor, f"{what} {name}"


@pytest.mark.parametrize(
    "objective",
    [dict(layer_norms=("batch",)), dict(final_norms=((0, 2),)), dict(variance_weight=0.1)],
    ids=["layer_norms", "final_norms", "variance_weight"],
)
def test_batch_statistics_are_refused(objective):
    config = quiet(config_of("vision_v1"))
    config["objective"] |= objective
    modality, model = pretrain.make_model(config)
    pretrain.make_objective(config, modality, model)  # the large batch may have them
    with pytest.raises(UserError) as refusal:
        pretrain.make_objective(config | {"accumulate": 4}, modality, model)
    line = str(refusal.value)
    assert "config.accumulate" in line and "accumulate=1" in line and "\n" not in line
