"""I-JEPA, BYOL and DINO: masks, views, losses and heads against numpy and PyTorch, in the loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from configs_for_tests import assert_close, config_of, quiet, run_steps

from data2vec_jax import masking
from data2vec_jax.core.errors import UserError
from data2vec_jax.metrics.collapse import CollapseConfig, CollapseMonitor
from data2vec_jax.tasks import pretrain


def made(config):
    """(model, objective, sampler) of a config, and parameters, all of them drawn from N(0, 0.1)."""
    modality, model = pretrain.make_model(config)
    objective, sampler = pretrain.make_objective(config, modality, model)
    shapes = pretrain.abstract_task(config).shapes[-1]
    init = pretrain.initialiser(model, shapes)
    random = np.random.default_rng(0)
    params = jax.tree.map(
        lambda s: random.normal(0, 0.1, s.shape).astype(np.float32),
        jax.eval_shape(init, jax.random.key(0)),
    )
    return model, objective, sampler, params


def normal(x, eps=1e-5):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps)


# I-JEPA -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("side", "sizes", "share"), [(14, (30, 40, 33.4), 0.45), (16, (35, 54, 44.2), 0.45)]
)
def test_blocks_are_the_authors(side, sizes, share):
    """The specification's counts of 3,000 draws, and its traps."""
    sampler = masking.make("multiblock", (side, side), kept=0.3, corners="authors")
    drawn = masking.sample(sampler.parts, jax.random.key(0), 0, jnp.arange(3_000), 1)[:, 0]
    hidden, targets = np.asarray(drawn[:, 0]), np.asarray(drawn[:, 1:])
    if side == 14:  # as all others see it
        again = masking.sample(sampler, jax.random.key(0), 0, jnp.arange(9), 1)[:, 0]
        np.testing.assert_array_equal(hidden[:9], again)
    assert (hidden.sum(1) == sampler.count(side**2)).all() and not (
        targets & ~hidden[:, None]
    ).any()
    counts = targets.sum(-1)
    # Where a target lost patches because too few others were left, the spec's counts do not hold.
    whole = (counts == counts[:, :1]).all(1)
    assert whole.mean() > 0.99
    low, high, mean = sizes
    assert (counts[whole].min(), counts[whole].max()) == (low, high) == (low, sampler.largest)
    assert counts[whole].mean() == pytest.approx(mean, abs=0.3)
    assert targets.any(1).mean() == pytest.approx(share, abs=0.01)
    # Each is a rectangle, those of an example have one shape, none reaches the last row or column.
    grids = targets[whole].reshape(-1, 4, side, side)
    rows, columns = grids.any(3).sum(2), grids.any(2).sum(2)
    np.testing.assert_array_equal(rows * columns, counts[whole])
    assert (rows == rows[:, :1]).all() and (columns == columns[:, :1]).all()
    assert len({*zip(rows.flat, columns.flat, strict=True)}) == {14: 5, 16: 6}[side]
    assert not grids[:, :, -1].any() and not grids[..., -1].any()
    # The context is the square at the top left, unless it is too small.
    outside = np.ones((side, side), bool)
    outside[:-1, :-1] = False
    free = (~outside.ravel() & ~targets.any(1)).sum(1)
    enough = free >= side**2 - sampler.count(side**2)
    seen = ~hidden.reshape(-1, side, side)
    assert not (seen & outside)[enough].any() and (seen & outside)[~enough].any()
    assert 0.5 < enough.mean() < 1
    if side == 16:
        return
    # With all corners every patch is in targets and is seen.
    every = masking.make("multiblock", (side, side), kept=0.4)
    drawn = masking.sample(every.parts, jax.random.key(0), 0, jnp.arange(3_000), 1)[:, 0]
    assert np.asarray(drawn[:, 1:].any((0, 1))).all() and np.asarray(~drawn[:, 0]).any(0).all()


@pytest.fixture(scope="module")
def ijepa():
    config = quiet(config_of("vision_ijepa"))
    model, objective, _, params = made(config)
    image = np.random.default_rng(1).normal(size=(2, 28, 28, 1)).astype(np.float32)
    batch = {"pixels": jnp.asarray(image), "example_id": jnp.arange(2, dtype=jnp.uint32)}
    keys = jax.random.split(jax.random.key(0))
    draw = pretrain.StepKeys(keys[0], jnp.int32(3), keys[1])
    teacher = jax.tree.map(lambda x: x * 1.1, {k: v for k, v in params.items() if k != "pretext"})

    def total(predictor, params):
        found = objective.forward(params | {"pretext": predictor}, teacher, batch, draw)
        return found.total, found

    run = jax.jit(jax.value_and_grad(total, has_aux=True))
    (loss, found), gradients = run(params["pretext"], params)
    return model, params, teacher, batch, float(loss), found, jax.device_get(gradients)


def test_targets_are_the_normalised_output_of_the_teacher(ijepa):
    model, _, teacher, batch, loss, found, _ = ijepa
    tokens = model.apply({"params": teacher}, batch, method="features")
    output = model.apply({"params": teacher}, tokens, method="encode").x
    np.testing.assert_allclose(found.targets, normal(np.float64(output)), atol=1e-4)
    h = np.float64(found.masked_targets)
    d = np.abs(np.float64(found.prediction) - h)
    s = np.where(d < 1, d**2 / 2, d - 0.5).mean(-1)
    assert loss == pytest.approx((s * np.asarray(found.weights)).sum(), rel=1e-5)
    assert float(found.count) == np.asarray(found.weights).sum() > 40
    assert (d < 1).any() and (d > 1).any()


def test_the_predictor_is_pytorchs(ijepa):
    """Blocks of torch.nn with the same weights, one target at a time: loss and gradients."""
    torch = pytest.importorskip("torch")
    _, params, _, _, loss, found, gradients = ijepa
    C = 16
    tree = jax.tree.map(lambda x: torch.tensor(x).requires_grad_(), params["pretext"])
    grid = torch.arange(7)
    rate = 10_000.0 ** (-torch.arange(C // 4) / (C // 4))
    x, y = (torch.outer(v.flatten(), rate) for v in (grid.repeat(7), grid.repeat_interleave(7)))
    positions = torch.cat([x.sin(), x.cos(), y.sin(), y.cos()], 1)
    b = {k: {n: v[0] for n, v in part.items()} for k, part in tree["encoder"]["blocks"].items()}
    names = {
        "self_attn.in_proj_weight": b["qkv"]["kernel"].T,
        "self_attn.in_proj_bias": b["qkv"]["bias"],
        "self_attn.out_proj.weight": b["out"]["kernel"].T,
        "self_attn.out_proj.bias": b["out"]["bias"],
        "linear1.weight": b["up"]["kernel"].T,
        "linear1.bias": b["up"]["bias"],
        "linear2.weight": b["down"]["kernel"].T,
        "linear2.bias": b["down"]["bias"],
    }
    for n in ("norm1", "norm2"):
        names |= {f"{n}.weight": b[n]["scale"], f"{n}.bias": b[n]["bias"]}
    options = dict(activation="gelu", norm_first=True, batch_first=True, layer_norm_eps=1e-6)
    block = torch.nn.TransformerEncoderLayer(C, 2, 32, 0.0, **options)
    hidden, seen = np.asarray(found.mask), torch.tensor(np.asarray(found.student.x))
    places, total = np.asarray(found.weights), 0.0
    drawn = np.asarray(found.masked_targets)
    whole = np.asarray(found.targets)
    for row, target in enumerate(drawn):
        example, count = row // 4, int(places[row].sum())
        here = [
            int(np.abs(whole[example] - h).sum(-1).argmin()) for h in target[:count]
        ]  # where the target's tokens are
        assert here == sorted(set(here)) and hidden[example][here].all()
        known = seen[example] @ tree["embed"]["kernel"] + tree["embed"]["bias"]
        known = known + positions[np.flatnonzero(~hidden[example])]
        z = torch.cat([known, tree["mask_token"] + positions[here]])[None]
        z = torch.func.functional_call(block, names, (z,))[0, len(known) :]
        z = torch.nn.functional.layer_norm(
            z, (C,), tree["norm"]["scale"], tree["norm"]["bias"], eps=1e-6
        )
        z = z @ tree["output"]["kernel"] + tree["output"]["bias"]
        h = torch.tensor(target[:count])
        total = total + torch.nn.functional.smooth_l1_loss(z, h, reduction="none").mean(-1).sum()
    total.backward()
    assert loss == pytest.approx(total.item(), rel=1e-5)
    for (path, own), theirs in zip(
        jax.tree.leaves_with_path(gradients), jax.tree.leaves(tree), strict=True
    ):
        np.testing.assert_allclose(own, theirs.grad, atol=1e-4, rtol=1e-4, err_msg=str(path))
    assert max(np.abs(x).max() for x in jax.tree.leaves(gradients)) > 0.1


def test_anchors_of_ijepa():
    """The specification's loss of a prediction of 0, size of the predictor, recipe and FLOPs."""
    from data2vec_jax.objectives.targets import regression

    h = jnp.asarray(np.random.default_rng(0).normal(size=(4_000, 768)), jnp.float32)
    mean = float(jnp.mean(regression(jnp.zeros_like(h), h, 1.0)) / 768)
    assert mean == pytest.approx(0.42466, abs=1e-3)
    config = config_of("vision_ijepa", "like").to_dict()
    modality, model = pretrain.make_model(config)
    task = pretrain.abstract_task(config)
    params = jax.eval_shape(task.init, jax.random.key(0))
    assert sum(x.size for x in jax.tree.leaves(params["pretext"])) == 11_238_912
    (batch,), (_, sampler) = task.shapes, pretrain.make_objective(config, modality, model)

    def blocks(depth, D, F, T):
        return depth * T * (8 * D**2 + 4 * T * D + 4 * D * F)

    front, teacher = 2 * 196 * 768 * 768, blocks(12, 768, 3072, 197)
    student = blocks(12, 768, 3072, 79) + 2 * 78 * 768 * 384
    student += 4 * (blocks(6, 384, 1536, 78 + 40) + 2 * 40 * 384 * 768)
    assert task.flops(batch) == 256 * (3 * (front + student) + teacher + front)
    assert sampler(batch).count(196) == 196 - 78
    paper = config_of("vision_ijepa", "paper")
    assert (paper.total_steps, paper.data.batch_size) == (187_500, 2_048)
    assert round(paper.schedule.warmup * paper.total_steps) == 25_000


def test_heads_read_all_patches_of_a_model_without_a_class_token():
    """As `paper` is: the mean of the patches stands where others have a class token."""
    from data2vec_jax.models import heads
    from data2vec_jax.models.encoder import Encoded

    x = np.random.default_rng(0).normal(size=(2, 5, 8)).astype(np.float32)
    found = heads.all_tokens(Encoded(x, class_tokens=x[:, :0]))
    np.testing.assert_allclose(found[:, 0], x.mean(1), rtol=1e-5)
    np.testing.assert_array_equal(found[:, 1:], x)
    probe = heads.LinearProbe(classes=3)
    variables = probe.init(jax.random.key(0), heads.Features(found))
    kernel = variables["params"]["output"]["kernel"]
    logits = probe.apply(variables, heads.Features(found))["logits"]
    np.testing.assert_allclose(logits, x.mean(1) @ kernel, rtol=1e-4, atol=1e-5)
    one = heads.all_tokens(Encoded(x, class_tokens=x[:, :1]))
    np.testing.assert_array_equal(one, np.concatenate([x[:, :1], x], 1))


# In the loop --------------------------------------------------------------------------------------

SPLITS = {"vision_ijepa": (((4, 2), 1), ((1, 1), 2))}


@pytest.mark.parametrize("name", SPLITS)
def test_devices_and_micro_batches_change_nothing(name):
    config = quiet(config_of(name))
    params, scalars, run = run_steps(config, (1, 1))
    for shape, parts in SPLITS[name]:
        other, found, _ = run_steps(config | {"accumulate": parts}, shape)
        for one, two in zip(scalars, found, strict=True):
            assert one["loss"] == pytest.approx(two["loss"], rel=1e-5)
        assert_close(params, other, 2e-4)
    assert run.abstract.teacher and "pretext" in params
    assert {"ema_decay", "target_std", "pred_std", "feature_rank"} <= scalars[0].keys()
    warnings = CollapseMonitor(CollapseConfig(**config["collapse"])).check(2, scalars[1])
    assert not warnings, warnings


# What users meet ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (
            "vision_ijepa",
            dict(mask=dict(kind="independent", ratio=0.5)),
            "config.mask.kind: ijepa needs 'multiblock', not 'independent'",
        ),
        ("vision_ijepa", dict(averaged=()), "config.averaged: the objective has a teacher"),
        ("vision_v1", dict(objective=dict(name="ijepa")), "config.model.shared_relative"),
    ],
)
def test_mistakes_are_named(name, changes, message):
    config = config_of(name).to_dict() | changes
    with pytest.raises(UserError, match=message) as refusal:
        pretrain.abstract_task(config)
    assert "\n" not in str(refusal.value)
