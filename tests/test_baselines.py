"""Objectives without a teacher: their losses against numpy and transformers, and in the loop."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from configs_for_tests import assert_close, config_of, losses_whole_and_in_parts, quiet, run_steps

import data2vec_jax
from data2vec_jax import masking
from data2vec_jax.convert import hf, ours, tables
from data2vec_jax.convert.tables import CONV2D, FUSED_BIAS, FUSED_LINEAR, LEAD2, Row, linear, norm
from data2vec_jax.core.errors import UserError
from data2vec_jax.core.trees import flatten
from data2vec_jax.metrics.collapse import CollapseConfig, CollapseMonitor
from data2vec_jax.objectives import mae, mlm, simmim
from data2vec_jax.tasks import pretrain

BASELINES = ("text_mlm", "vision_mae", "vision_simmim")


def made(config):
    """(model, objective, sampler) of a config, and parameters, all of them drawn from N(0, 0.1)."""
    modality, model = pretrain.make_model(config)
    objective, sampler = pretrain.make_objective(config, modality, model)
    shapes = jax.tree.map(
        lambda s: jax.ShapeDtypeStruct((1, *s.shape[1:]), s.dtype),
        pretrain.abstract_task(config).shapes[-1],
    )
    init = pretrain.initialiser(model, shapes)
    random = np.random.default_rng(0)
    params = jax.tree.map(
        lambda s: random.normal(0, 0.1, s.shape).astype(np.float32),
        jax.eval_shape(init, jax.random.key(0)),
    )
    return model, objective, sampler, params


# Against numpy ------------------------------------------------------------------------------------


def cross_entropy(z, y):
    p = np.exp(z - z.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    one = np.eye(z.shape[-1])[y]
    return -np.log((p * one).sum(-1)), p - one


def squared_error(z, x):
    t = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, ddof=1, keepdims=True) + 1e-6)
    return ((z - t) ** 2).mean(-1), 2 * (z - t) / z.shape[-1]


def absolute_error(z, x):
    return np.abs(z - x).mean(-1), np.sign(z - x) / z.shape[-1]


def normalised_error(z, x):
    return jnp.mean(jnp.square(z - mae.normalised(x)), -1)


@pytest.mark.parametrize(
    ("losses", "reference"),
    [
        (mlm.losses, cross_entropy),
        (normalised_error, squared_error),
        (simmim.losses, absolute_error),
    ],
    ids=BASELINES,
)
def test_losses_and_gradients_are_numpys(losses, reference):
    random = np.random.default_rng(1)
    z, x = random.normal(size=(2, 3, 5, 48))
    wanted = random.integers(48, size=(3, 5)) if reference is cross_entropy else x
    loss, gradient = reference(z, wanted)
    found, back = jax.vjp(lambda z: losses(z, jnp.asarray(wanted)), jnp.float32(z))
    np.testing.assert_allclose(found, loss, rtol=1e-5)
    np.testing.assert_allclose(back(jnp.ones((3, 5)))[0], gradient, atol=1e-6)


def test_anchors():
    """The numbers of the specification."""
    logits, ids = jnp.zeros((1, 1, 50_265)), jnp.zeros((1, 1), int)
    assert float(mlm.losses(logits, ids)[0, 0]) == pytest.approx(10.82506, abs=1e-5)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 2_000, 768)), jnp.float32)
    zero = jnp.zeros_like(x)
    assert float(jnp.mean(normalised_error(zero, x))) == pytest.approx(0.998698, abs=2e-6)
    assert float(jnp.mean(simmim.losses(zero, x))) == pytest.approx(0.79788, abs=2e-3)


# Recipe -> updates, warm-up, rows, peak, parameters of the objective and of what is left.
PAPERS = {
    "text_mlm": (125_000, 10_000, 2_048, 5e-4, 642_393, None),
    "vision_mae": (249_600, 12_480, 4_096, 2.4e-3, 26_008_320, 85_647_360),
    "vision_simmim": (500_000, 6_250, 2_048, 4e-4, 768 * 769, None),
}


@pytest.mark.parametrize("name", PAPERS)
def test_recipes_of_papers(name):
    steps, warmup, rows, peak, of_pretext, rest = PAPERS[name]
    config = config_of(name, "paper").to_dict()
    assert (config["total_steps"], config["data"]["batch_size"]) == (steps, rows)
    assert round(config["schedule"]["warmup"] * steps) == warmup
    assert config["schedule"]["peak"] == peak
    for variant in ("like", "paper"):
        params = jax.eval_shape(
            pretrain.abstract_task(config_of(name, variant).to_dict()).init, jax.random.key(0)
        )
        assert "head" not in params and "decoder" not in params
        size = sum(x.size for x in jax.tree.leaves(params.pop("pretext")))
        assert size == of_pretext
        if rest:
            assert sum(x.size for x in jax.tree.leaves(params)) == rest


def test_masks_of_papers():
    cells = masking.make("cells", (14, 14), ratio=0.6, side=2)
    masks = masking.sample(cells, jax.random.key(0), 0, jnp.arange(64), 1)[:, 0]
    grids = np.asarray(masks).reshape(64, 7, 2, 7, 2)
    assert cells.count(196) == 120 and (grids.sum((1, 2, 3, 4)) == 120).all()
    assert (grids == grids[:, :, :1, :, :1]).all()  # whole squares
    share = grids[:, :, 0, :, 0].mean(0)
    assert share.min() > 0.35 and share.max() < 0.85  # everywhere
    with pytest.raises(UserError, match=r"config\.mask\.side"):
        masking.make("cells", (7, 7), ratio=0.6, side=2)
    assert masking.make("independent", (14, 14), ratio=0.75).count(196) == 147


# Against transformers -----------------------------------------------------------------------------


def randomised(torch, net):
    """Weights and biases at which all of them matter."""
    torch.manual_seed(0)
    for name, weights in net.named_parameters():
        if weights.requires_grad:
            weights.data.normal_(0.0, 0.1)
            if "norm" in name.lower() and name.endswith("weight"):
                weights.data += 1.0
    return net.eval()


def both(table, net):
    """(parameters, gradients) of a PyTorch module as trees of ours."""
    learned = {n: p for n, p in net.named_parameters() if p.requires_grad}
    weights = {n: p.detach().numpy() for n, p in learned.items()}
    gradients = {n: p.grad.numpy() for n, p in learned.items()}
    return [tables.read(table, state) for state in (weights, gradients)]


def equal(objective, params, arguments, loss, gradients):
    """Compares the objective's loss and gradients with theirs, within 1e-4."""

    def mean(params):
        found = objective.forward_with_masks(params, {}, *arguments, None)
        return found.total / found.count

    found, own = jax.jit(jax.value_and_grad(mean))(params)
    assert float(found) == pytest.approx(loss, rel=1e-5)
    own, theirs = flatten(jax.device_get(own)), flatten(gradients)
    assert own.keys() == theirs.keys()
    for name in own:
        np.testing.assert_allclose(own[name], theirs[name], atol=1e-4, rtol=1e-4, err_msg=name)
    assert max(np.abs(x).max() for x in own.values()) > 0.01


def test_mlm_is_robertas():
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    V, T = 60, 16
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
    settings = transformers.RobertaConfig(
        **sizes, vocab_size=V, max_position_embeddings=T + 2, type_vocab_size=1, layer_norm_eps=1e-5
    )
    net = randomised(torch, transformers.RobertaForMaskedLM(settings))
    random = np.random.default_rng(0)
    tokens = random.integers(4, V - 1, (3, T)).astype(np.int32)
    tokens[1, 11:] = 1  # padding
    mask = (random.random((3, T)) < 0.4) & (tokens != 1)
    # 80 % show the mask, others themselves or another token; the loss is at all of them.
    shown = np.where(mask & (random.random((3, T)) < 0.7), V - 1, tokens)
    labels = torch.tensor(np.where(mask, tokens, -100)).long()
    theirs = net(
        torch.tensor(shown).long(), attention_mask=torch.tensor(tokens != 1).long(), labels=labels
    )
    theirs.loss.backward()

    config = quiet(config_of("text_mlm"))
    config["model"] |= dict(vocab_size=V, max_length=T, types=1, pad_rows=True)
    model, objective, _, _ = made(config)
    rows = hf.text_table({"model": {"width": 32}}).rows[:-1]  # without a pooler
    places = {"dense": linear, "norm": norm}
    names = {"lm_head.dense": "dense", "lm_head.layer_norm": "norm"}
    rows = [*tables.below(tables.Table(rows, {}), "roberta."), Row("lm_head.bias", "pretext/bias")]
    for their_name, name in names.items():
        rows += places[name](their_name, f"pretext/{name}")
    params, gradients = both(tables.Table(rows, {}), net)
    batch, visible = ({"tokens": jnp.asarray(x)} for x in (tokens, shown))
    equal(
        objective,
        params,
        (batch, visible, jnp.asarray(mask), int(mask.sum(1).max())),
        theirs.loss.item(),
        gradients,
    )
    assert model.sees_masked


def test_mae_is_vit_maes():
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
    of_decoder = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
    of_decoder |= dict(intermediate_size=32)
    settings = transformers.ViTMAEConfig(
        **sizes,
        **{f"decoder_{key}": value for key, value in of_decoder.items()},
        image_size=24,
        patch_size=4,
        norm_pix_loss=True,
        layer_norm_eps=1e-6,
        mask_ratio=0.75,
    )
    net = transformers.ViTMAEForPreTraining(settings)
    # Some versions leave positions at 0 unless they believe that this is still to be done.
    net.vit.embeddings.patch_embeddings.projection._is_hf_initialized = False
    net.vit.embeddings.initialize_weights()
    net.decoder.initialize_weights(36)
    for positions in (net.vit.embeddings.position_embeddings, net.decoder.decoder_pos_embed):
        assert float(positions.std()) > 0.5
    net = randomised(torch, net)
    random = np.random.default_rng(0)
    pixels, noise = random.normal(size=(3, 24, 24, 3)), random.random((3, 36))
    theirs = net(
        torch.tensor(pixels.transpose(0, 3, 1, 2)).float(), noise=torch.tensor(noise).float()
    )
    theirs.loss.backward()
    mask = noise.argsort().argsort() >= 9  # the smallest are kept
    np.testing.assert_array_equal(theirs.mask.numpy() > 0, mask)

    config = quiet(config_of("vision_mae"))
    config["model"] |= dict(image=24, mean=(0.5,) * 3, std=(0.5,) * 3)
    config["model"]["encoder"] |= dict(depth=2, norm="pre")
    config["examples"] |= dict(image=24, channels=3)
    config["objective"]["decoder"] = dict(width=16, depth=2, heads=2, mlp=32)
    model, objective, _, _ = made(config)

    def blocks(theirs, ours):
        qkv = [f"{theirs}.{{l}}.attention.{x}_proj" for x in "qkv"]
        return [
            Row(tuple(f"{x}.weight" for x in qkv), f"{ours}/qkv/kernel", FUSED_LINEAR),
            Row(tuple(f"{x}.bias" for x in qkv), f"{ours}/qkv/bias", FUSED_BIAS),
            *linear(f"{theirs}.{{l}}.attention.o_proj", f"{ours}/out"),
            *norm(f"{theirs}.{{l}}.layernorm_before", f"{ours}/norm1"),
            *norm(f"{theirs}.{{l}}.layernorm_after", f"{ours}/norm2"),
            *linear(f"{theirs}.{{l}}.mlp.fc1", f"{ours}/up"),
            *linear(f"{theirs}.{{l}}.mlp.fc2", f"{ours}/down"),
        ]

    patches = "vit.embeddings.patch_embeddings.projection"
    rows = [
        Row("vit.embeddings.cls_token", "class_token", LEAD2),
        Row(f"{patches}.weight", "patches/kernel", CONV2D),
        Row(f"{patches}.bias", "patches/bias"),
        *blocks("vit.layers", "encoder/blocks"),
        *norm("vit.layernorm", "norm"),
        Row("decoder.mask_token", "pretext/mask_token", LEAD2),
        *linear("decoder.decoder_embed", "pretext/embed"),
        *blocks("decoder.decoder_layers", "pretext/encoder/blocks"),
        *norm("decoder.decoder_norm", "pretext/norm"),
        *linear("decoder.decoder_pred", "pretext/output"),
    ]
    params, gradients = both(tables.Table(rows, {}), net)
    batch = {"pixels": jnp.asarray(pixels, jnp.float32)}
    equal(objective, params, (batch, batch, jnp.asarray(mask), 27), theirs.loss.item(), gradients)
    assert not model.sees_masked


# In the loop --------------------------------------------------------------------------------------


def test_the_loss_of_mlm_is_at_all_chosen_tokens():
    """Also where a chosen token shows itself or another one (baselines spec 1)."""
    config = config_of("text_mlm").to_dict()
    _, objective, _, params = made(config)
    tokens = np.random.default_rng(0).integers(4, 900, (4, 64)).astype(np.int32)
    tokens[1, 40:] = 1
    batch = {"tokens": jnp.asarray(tokens), "example_id": jnp.arange(4, dtype=jnp.uint32)}
    keys = jax.random.split(jax.random.key(0))
    draw = pretrain.StepKeys(keys[0], jnp.int32(0), keys[1])
    found = jax.jit(lambda p: objective.forward(p, {}, batch, draw))(params)
    chosen, shown = np.asarray(found.mask), np.asarray(found.visible["tokens"])
    assert chosen.sum(1).tolist() == [9, 6, 9, 9] and float(found.count) == 33
    hidden = (shown == 999) & chosen
    assert 0 < hidden.sum() < 33 and (shown == tokens)[~chosen].all()
    assert ((shown == tokens) & chosen).any() and (~hidden & (shown != tokens)).any()
    wanted = np.concatenate([tokens[row][chosen[row]] for row in range(4)])
    assert np.array_equal(np.asarray(found.masked_targets)[np.asarray(found.weights) > 0], wanted)


def test_simmim_hides_what_it_predicts():
    """Masked pixels do not reach the predictions, and the loss is at no others."""
    config = quiet(config_of("vision_simmim"))
    _, objective, _, params = made(config)
    random = np.random.default_rng(0)
    pixels, other = random.normal(size=(2, 2, 28, 28, 1)).astype(np.float32)
    mask = random.permutation(np.arange(49) < 30)[None].repeat(2, 0)
    big = np.kron(mask[0].reshape(7, 7), np.ones((4, 4)))[None, :, :, None] > 0
    mixed = np.where(big, other, pixels)

    def run(pixels):
        batch = {"pixels": jnp.asarray(pixels)}
        return objective.forward_with_masks(params, {}, batch, batch, mask, 30, None)

    one, two = run(pixels), run(mixed)
    np.testing.assert_array_equal(one.prediction, two.prediction)
    x = mixed.reshape(2, 7, 4, 7, 4, 1).swapaxes(2, 3).reshape(2, 49, 16)
    expected = np.abs(np.asarray(two.prediction).reshape(60, 16) - x[mask]).mean(-1).sum()
    assert float(two.total) == pytest.approx(expected, rel=1e-5) and float(two.count) == 60


@pytest.mark.usefixtures("light_compilation")
@pytest.mark.parametrize("name", BASELINES)
def test_devices_and_micro_batches_change_nothing(name):
    config = quiet(config_of(name))
    params, scalars, run = run_steps(config, (1, 1))
    other, found, _ = run_steps(config | {"accumulate": 2}, (2, 2))
    for one, two in zip(scalars, found, strict=True):
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-5)
    assert_close(params, other, 2e-4)
    assert run.abstract.teacher == {} and "pretext" in params
    assert not {"ema_decay", "target_std"} & scalars[0].keys()
    assert {"pred_std", "masked_fraction", "feature_std", "feature_rank"} <= scalars[0].keys()
    warnings = CollapseMonitor(CollapseConfig(**config["collapse"])).check(2, scalars[1])
    assert not warnings, warnings
    if "accuracy" in scalars[0]:
        assert 0 <= scalars[0]["accuracy"] <= 1


@pytest.mark.parametrize("name", BASELINES)
def test_flops_have_no_teacher(name):
    config = config_of(name).to_dict()
    modality, model = pretrain.make_model(config)
    _, sampler = pretrain.make_objective(config, modality, model)
    task = pretrain.abstract_task(config)
    (batch,) = task.shapes[-1:]
    parts = pretrain.flops_by_part(modality, model, sampler, batch, None)
    assert parts["teacher"] == 0.0
    rows = batch["example_id"].shape[0]
    assert task.flops(batch) == 3 * rows * (parts["frontend"] + parts["student"])
    if name == "vision_mae":  # 49 patches of 16 numbers; depth 3, width 32; decoder 16
        assert sampler(batch).count(49) == 37
        decoder = 50 * (8 * 16**2 + 4 * 50 * 16 + 4 * 16 * 32)
        blocks = 3 * 13 * (8 * 32**2 + 4 * 13 * 32 + 4 * 32 * 64)
        ends = 2 * 13 * 32 * 16 + 2 * 37 * 16 * 16
        assert parts["student"] == blocks + decoder + ends


@pytest.mark.parametrize("name", ["vision_mae", "vision_ijepa", "vision_dino", "vision_byol"])
def test_a_run_resumes_and_is_left_behind(name, tmp_path, monkeypatch):
    """A run in two parts equals one; conversion and `load` leave decoder or predictor behind."""
    config = config_of(name).to_dict()
    losses = losses_whole_and_in_parts(config, tmp_path, monkeypatch)
    assert losses[0] == losses[1] and [step for step, _ in losses[0]] == [1, 2, 3, 4]
    assert all(math.isfinite(loss) for _, loss in losses[0])
    checkpoint = ours.open_checkpoint(tmp_path / "whole")
    assert not ours.missing(checkpoint)
    assert any(name.startswith("pretext/") for name in checkpoint.unused)
    assert not any(entry.name.startswith("pretext/") for entry in checkpoint.entries)
    loaded = data2vec_jax.load(tmp_path / "whole")
    assert loaded(np.zeros((1, 28, 28, 1), np.float32)).last_hidden_state.shape == (1, 50, 32)


# What users meet ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("text_mlm", dict(averaged=("^encoder/",)), "config.averaged: the objective has no teach"),
        ("vision_v1", dict(averaged=()), "config.averaged: the objective has a teacher"),
        ("vision_v1", dict(ema={}), "missing option 'ema'"),
        ("vision_v1", dict(objective=dict(name="mlm")), "mlm predicts the ids .* hold numbers"),
        ("text_v1", dict(objective=dict(name="simmim")), "predicts the numbers .* hold ids"),
        ("speech_v1", dict(objective=dict(name="simmim")), "hold neither ids nor numbers"),
        ("vision_v2", dict(objective=dict(name="mae")), "config.model.decoder: mae needs none"),
        ("vision_v1", dict(objective=dict(name="mae")), "config.model.shared_relative"),
        ("vision_mae", dict(objective=dict(name="simmim")), "config.model.mask_embedding: .* True"),
        (
            "vision_mae",
            dict(model=dict(mask_embedding=True)),
            "config.model.mask_embedding: .* Fal",
        ),
        (
            "vision_mae",
            dict(objective=dict(name="mae", decoder=dict(widht=4))),
            "config.objective.decoder.widht: no such option; did you mean 'width'",
        ),
        ("text_mlm", dict(objective=dict(name="mlmm")), "did you mean 'mlm'"),
    ],
)
def test_mistakes_are_named(name, changes, message):
    config = config_of(name).to_dict()
    for key, value in changes.items():
        config[key] = config[key] | value if key == "model" else value
    with pytest.raises(UserError, match=message) as refusal:
        pretrain.abstract_task(config)
    assert "\n" not in str(refusal.value)
