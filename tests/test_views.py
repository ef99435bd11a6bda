"""I-JEPA, BYOL and DINO: masks, views, losses and heads against numpy and PyTorch, in the loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from configs_for_tests import assert_close, config_of, quiet, run_steps
from PIL import Image

from data2vec_jax import masking
from data2vec_jax.core.errors import UserError
from data2vec_jax.metrics.collapse import CollapseConfig, CollapseMonitor
from data2vec_jax.modalities.vision.views import Views, with_hue
from data2vec_jax.models import pretext
from data2vec_jax.models.encoder import Encoded
from data2vec_jax.objectives import byol, dino
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


# DINO and BYOL ------------------------------------------------------------------------------------


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def test_the_loss_of_dino_is_numpys():
    """Pairs of a teacher's view and another view of the student's, one at a time."""
    random = np.random.default_rng(0)
    s, t, c = random.normal(size=(3, 6, 9)), random.normal(size=(3, 2, 9)), random.normal(size=9)
    total, slope, pairs = np.zeros(3), np.zeros_like(s), 0
    for i in range(2):
        for j in range(6):
            if i != j:
                q, p = softmax((t[:, i] - c) / 0.04), softmax(s[:, j] / 0.1)
                total += -(q * np.log(p)).sum(-1)
                slope[:, j] += (p - q) / 0.1
                pairs += 1
    assert pairs == 10
    arrays = (jnp.float32(x) for x in (t, c))
    found, back = jax.vjp(lambda s: dino.losses(s, *arrays, (0.1, 0.04)), jnp.float32(s))
    np.testing.assert_allclose(found, total / pairs, rtol=1e-5)
    np.testing.assert_allclose(back(jnp.ones(3))[0], slope / pairs, atol=1e-5)


def test_anchors_of_dino_and_byol():
    """The specification's losses of constants, sizes of heads, recipes and FLOPs."""
    random = np.random.default_rng(0)
    t = jnp.asarray(random.normal(size=(2, 2, 65_536)), jnp.float32)
    found = dino.losses(jnp.zeros((2, 10, 65_536)), t, jnp.zeros(65_536), (0.1, 0.04))
    np.testing.assert_allclose(found, 11.09035, atol=1e-5)
    x = jnp.asarray([[[1.0, 2.0], [3.0, 1.0]]])
    turned = jnp.asarray([[[-2.0, 1.0], [-1.0, 3.0]]])
    for z, wanted in ((3 * x, 0), (turned, 4), (-x, 8)):
        np.testing.assert_allclose(byol.losses(x, z[:, ::-1]), wanted, atol=1e-6)

    def blocks(depth, D, F, T):
        return depth * T * (8 * D**2 + 4 * T * D + 4 * D * F)

    for name, size in (("vision_dino", 23_073_024), ("vision_byol", None)):
        config = config_of(name, "like").to_dict()
        task = pretrain.abstract_task(config)
        params = jax.eval_shape(task.init, jax.random.key(0))["pretext"]
        weights = {k: sum(x.size for x in jax.tree.leaves(v)) for k, v in params.items()}
        front, large = 2 * 196 * 768 * 768, blocks(12, 768, 3072, 197)
        (batch,) = task.shapes
        if name == "vision_dino":
            assert weights.pop("centre") == 65_536 and sum(weights.values()) == size
            assert batch["local"].shape == (256, 8, 96, 96, 3)
            head = 2 * (768 * 2048 + 2048**2 + 2048 * 256 + 256 * 65_536)
            small = 2 * 36 * 768 * 768 + blocks(12, 768, 3072, 37) + head
            student, teacher = 2 * (front + large + head) + 8 * small, 2 * (front + large + head)
        else:
            assert sum(weights.values()) == (768 + 3 * 256) * 4096 + 6 * 4096
            projector, predictor = 2 * 4096 * (768 + 256), 2 * 4096 * 512
            assert "local" not in batch
            teacher = 2 * (front + large + projector)
            student = teacher + 2 * predictor
        assert task.flops(batch) == 256 * (3 * student + teacher)
    paper = config_of("vision_dino", "paper")
    assert round(paper.schedule.warmup * paper.total_steps) == 12_510
    assert (paper.schedule.peak, paper.data.batch_size) == (5e-4 * 1024 / 256, 1024)
    paper = config_of("vision_byol", "paper")
    assert (paper.schedule.peak, paper.data.batch_size) == (0.2 * 4096 / 256, 4096)
    for name in ("vision_dino", "vision_byol"):
        pretrain.abstract_task(config_of(name, "paper").to_dict())


def of_head(head, x, rows):
    """(outputs, their gradient of the parameters for a random slope, parameters, slope)."""
    random = np.random.default_rng(1)
    inputs = pretext.Inputs(Encoded(x, class_tokens=x[:, :1]), None, None, views=rows)
    shapes = jax.eval_shape(lambda k: head.init(k, inputs), jax.random.key(0))["params"]
    params = jax.tree.map(lambda s: np.float32(random.normal(0, 0.4, s.shape)), shapes)
    found, back = jax.vjp(lambda p: head.apply({"params": p}, inputs), params)
    slope = random.normal(size=found.shape).astype(np.float32)
    return found, jax.device_get(back(slope)[0]), params, slope


def test_heads_are_pytorchs():
    """Linear layers, BatchNorm1d in training mode and normalised rows: outputs and gradients."""
    torch = pytest.importorskip("torch")
    x = np.random.default_rng(0).normal(size=(10, 4, 6)).astype(np.float32)

    def compare(params, gradients):
        for (path, own), leaf in zip(
            jax.tree.leaves_with_path(gradients), jax.tree.leaves(params), strict=True
        ):
            theirs = 0 if leaf.grad is None else leaf.grad
            np.testing.assert_allclose(own, theirs, atol=1e-4, rtol=1e-4, err_msg=str(path))

    head = pretext.Prototypes(outputs=12, hidden=7, size=5)
    found, gradients, params, slope = of_head(head, x, 1)
    tree = jax.tree.map(lambda p: torch.tensor(p).requires_grad_(), params)
    functional = torch.nn.functional
    z = torch.tensor(x[:, 0])
    for name in ("first", "second", "third"):
        z = functional.linear(z, tree[name]["kernel"].T, tree[name]["bias"])
        z = z if name == "third" else functional.gelu(z)
    z = functional.normalize(z) @ functional.normalize(tree["vectors"]).T
    np.testing.assert_allclose(found, z.detach(), atol=1e-5)
    (z * torch.tensor(slope)).sum().backward()
    compare(tree, gradients)

    head = pretext.ProjectorPredictor(hidden=7, size=5)
    found, gradients, params, slope = of_head(head, x, 2)
    tree = jax.tree.map(lambda p: torch.tensor(p).requires_grad_(), params)
    total = 0.0
    for view in range(2):
        z, made = torch.tensor(x[view::2, 0]), []
        for name in ("project", "predict"):
            z = functional.linear(z, tree[f"{name}_up"]["kernel"].T, tree[f"{name}_up"]["bias"])
            z = functional.batch_norm(
                z, None, None, tree[f"{name}_scale"], tree[f"{name}_bias"], training=True
            )
            z = functional.linear(functional.relu(z), tree[f"{name}_down"]["kernel"].T)
            made.append(z)
        both = torch.stack(made, 1)
        np.testing.assert_allclose(found[view::2], both.detach(), atol=1e-4)
        total = total + (both * torch.tensor(slope[view::2])).sum()
    total.backward()
    compare(tree, gradients)


@pytest.fixture(scope="module")
def dinos():
    config = quiet(config_of("vision_dino"))
    model, objective, _, params = made(config)
    random = np.random.default_rng(1)
    batch = {
        name: jnp.asarray(random.normal(size=size), jnp.float32)
        for name, size in {
            "image": (3, 28, 28, 1),
            "twin": (3, 28, 28, 1),
            "local": (3, 8, 12, 12, 1),
        }.items()
    }
    teacher = jax.tree.map(lambda x: x * 1.2, params)
    del teacher["pretext"]["centre"]
    return model, objective, params, teacher, batch


def test_dino_puts_views_together(dinos):
    """The loss from one pass for each view, small ones through a model of their size; and the
    centre is that of the teacher's raw outputs."""
    model, objective, params, teacher, batch = dinos
    small = model.clone(image=(12, 12))

    def said(model, params, image):
        apply, weights = model.apply, {"params": params}
        tokens = apply(weights, {"image": image}, method="features")
        encoded = apply(weights, tokens, method="encode")
        return np.float64(apply(weights, encoded, None, None, method="solve"))

    large = [batch["image"], batch["twin"]]
    s = [said(model, params, x) for x in large]
    s += [said(small, params, batch["local"][:, i]) for i in range(8)]
    average = teacher | {"pretext": params["pretext"] | teacher["pretext"]}
    t = [said(model, average, x) for x in large]
    centre = params["pretext"]["centre"]
    total = -sum(
        (softmax((t[i] - centre) / 0.04) * np.log(softmax(s[j] / 0.1))).sum()
        for i in range(2)
        for j in range(10)
        if i != j
    )
    found = objective.forward_with_masks(params, teacher, batch, 0, None)
    assert float(found.total) == pytest.approx(total / 18, rel=1e-4)
    assert float(found.count) == 3
    keys = pretrain.StepKeys(jax.random.key(0), jnp.int32(0), jax.random.key(1))
    _, _, metrics = objective.loss(params, teacher, batch, keys)
    np.testing.assert_allclose(
        metrics["assigned"]["pretext"]["centre"],
        0.9 * centre + 0.1 * np.mean(t, (0, 1)),
        atol=1e-5,
    )


def test_dino_freezes_and_warms_up(dinos):
    """The last layer of the head in the first updates, and the teacher's temperature."""
    model, _, params, teacher, batch = dinos
    options = dict(outputs=64, hidden=32, size=16, frozen_updates=3)
    options |= dict(first_teacher_temperature=0.09, temperature_updates=10)
    objective = dino.make_loss(dino.Config(**options), model)

    def gradient(step):
        def total(p):
            return objective.forward_with_masks(p, teacher, batch, jnp.int32(step), None).total

        return jax.grad(total)(params)["pretext"]

    first, later = gradient(2), gradient(3)
    assert not np.abs(first["vectors"]).any() and np.abs(later["vectors"]).max() > 1e-3
    assert np.abs(first["third"]["kernel"]).max() > 1e-3
    assert not np.abs(later["centre"]).any()
    spread = [
        float(
            objective.forward_with_masks(
                params, teacher, batch, jnp.int32(n), None
            ).masked_targets.std()
        )
        for n in (0, 5, 10, 20)
    ]
    ratios = [spread[-1] / x for x in spread]
    np.testing.assert_allclose(ratios, [0.09 / 0.04, 0.065 / 0.04, 1, 1], rtol=1e-5)


def test_held_out_images_are_both_views(dinos):
    """There the loss says how much student and teacher agree on one image."""
    _, objective, params, teacher, batch = dinos
    one = {"image": batch["image"]}
    two = one | {"twin": batch["image"]}
    both = [objective.forward_with_masks(params, teacher, b, 0, None).total for b in (one, two)]
    assert float(both[0]) == float(both[1])


def picture(side=64):
    random = np.random.default_rng(0)
    small = Image.fromarray(random.integers(0, 256, (8, 8, 3)).astype(np.uint8))
    return small.resize((side, side))


class Section:
    image, scale, aspect, flip = 32, (0.4, 1.0), (3 / 4, 4 / 3), 0.5


def test_views_differ_and_repeat():
    plain = dict(jitter_prob=0.0, grey=0.0, blur=(0, 0, 0), solarise=(0, 0, 0))
    drawn = Views(local=3, local_image=16).draw(picture(), Section, np.random.default_rng(5))
    again = Views(local=3, local_image=16).draw(picture(), Section, np.random.default_rng(5))
    shapes = Views(local=3, local_image=16).shapes(jax.ShapeDtypeStruct((32, 32, 3), np.uint8))
    assert {k: v.shape for k, v in drawn.items() if k != "image"} == {
        k: s.shape for k, s in shapes.items()
    }
    for name, value in drawn.items():
        assert value.dtype == np.uint8
        np.testing.assert_array_equal(value, again[name])
    assert not np.array_equal(drawn["image"], drawn["twin"])
    assert len({view.tobytes() for view in drawn["local"]}) == 3
    # Each step alone changes what it should, of the views that it is for.
    base = Views(local=1, local_image=16, **plain).draw(
        picture(), Section, np.random.default_rng(5)
    )
    assert "local" not in Views(local=0, **plain).draw(picture(), Section, np.random.default_rng(0))
    grey = Views(local=1, local_image=16, **plain | dict(grey=1.0))
    for view in grey.draw(picture(), Section, np.random.default_rng(5)).values():
        assert (view[..., :1] == view).all()
    inverted = Views(local=1, local_image=16, **plain | dict(solarise=(0, 1, 0)))
    found = inverted.draw(picture(), Section, np.random.default_rng(5))
    wanted = base["twin"]
    np.testing.assert_array_equal(found["twin"], np.where(wanted < 128, wanted, 255 - wanted))
    np.testing.assert_array_equal(found["image"], base["image"])
    # With the same draws a radius of 0 leaves a view as it is.
    sharp, blurred = (
        Views(local=1, local_image=16, **plain | dict(blur=(1, 0, 0), radius=(r, r)))
        for r in (0.0, 2.0)
    )
    one, two = (v.draw(picture(), Section, np.random.default_rng(5)) for v in (sharp, blurred))
    np.testing.assert_array_equal(one["image"], base["image"])
    steps = [np.abs(np.diff(v["image"].astype(int), axis=0)).mean() for v in (one, two)]
    assert steps[1] < 0.8 * steps[0]


def test_hues_are_torchvisions():
    transforms = pytest.importorskip("torchvision.transforms.functional")
    for share in (-0.3, 0.1, 0.5):
        theirs = np.asarray(transforms.adjust_hue(picture(), share), int)
        off = np.abs(np.asarray(with_hue(picture(), share), int) - theirs)
        assert off.max() <= 6  # theirs rounds the move down
    grey = picture().convert("L")
    assert with_hue(grey, 0.3) is grey


# In the loop --------------------------------------------------------------------------------------

# (data, fsdp), micro-batches
SPLITS = {
    "vision_ijepa": ((2, 2), 2),
    "vision_dino": ((2, 2), 2),
    "vision_byol": ((4, 2), 1),
}


@pytest.mark.usefixtures("light_compilation")
@pytest.mark.parametrize("name", SPLITS)
def test_devices_and_micro_batches_change_nothing(name):
    config = quiet(config_of(name))
    if name == "vision_byol":  # Adam makes steps of the rounding that batch norms make larger
        config["optim"] = dict(kind="sgd")
    params, scalars, run = run_steps(config, (1, 1))
    shape, parts = SPLITS[name]
    other, found, _ = run_steps(config | {"accumulate": parts}, shape)
    for one, two in zip(scalars, found, strict=True):
        # Batch norms make rounding larger where examples hardly differ, as they do at first.
        limit = 2e-5 if name == "vision_byol" else 1e-5
        assert one["loss"] == pytest.approx(two["loss"], rel=limit)
    if name == "vision_byol":
        # A batch norm takes away what is the same in all rows: biases before it learn nothing.
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), params, other)
    else:
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
        ("vision_byol", dict(accumulate=2), "config.accumulate: batch norms of the projector"),
        ("vision_dino", dict(mask=dict(kind="blocks", count=9)), "config.mask: dino masks nothing"),
        (
            "vision_dino",
            dict(examples=dict(image=28, channels=1)),
            "config.examples.views: dino compares views; give options",
        ),
        (
            "vision_ijepa",
            dict(examples=dict(image=28, channels=1, views={})),
            "config.examples.views: ijepa sees one view; use None",
        ),
        (
            "vision_dino",
            dict(examples=dict(image=28, channels=1, views=dict(lokal=2))),
            "config.examples.views.lokal: no such option; did you mean 'local'",
        ),
        (
            "vision_dino",
            dict(examples=dict(image=28, channels=1, views=dict(radius=(2.0, 1.0)))),
            "config.examples.views.radius: 2.0 is more than 1.0",
        ),
        ("vision_mae", dict(mask={}), "config.mask"),
        (
            "vision_byol",
            dict(examples=dict(image=28, channels=1, views=dict(local=2))),
            "config.examples.views.local: byol sees no small views; use 0",
        ),
        (
            "text_v1",
            dict(objective=dict(name="dino"), mask={}),
            "dino compares views of an example, which this modality does not make",
        ),
    ],
)
def test_mistakes_are_named(name, changes, message):
    config = config_of(name).to_dict() | changes
    with pytest.raises(UserError, match=message) as refusal:
        pretrain.abstract_task(config)
    assert "\n" not in str(refusal.value)
