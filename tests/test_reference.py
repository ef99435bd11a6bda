"""Flags that no recorded case has, against plain numpy; flags that we do not honour.

The recorded cases show what the authors' code computes for some values of their flags. Other
values and combinations are compared with `naive_v1`, which follows their code in float64.
"""

import copy
import dataclasses
import itertools
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import naive_v1
import naive_v2
import numpy as np
import pytest
import reference
import reference_v2
from configs_for_tests import config_of
from recorded import Case, Comparison, load, quick_jit
from replay_v1 import check_stages, forward, replay

from data2vec_jax.convert import tables
from data2vec_jax.core import optimizer
from data2vec_jax.core.state import overlay, path_name, select
from data2vec_jax.core.train_step import StepKeys
from data2vec_jax.modalities.text.modality import MODALITY as TEXT_MODALITY
from data2vec_jax.objectives.targets import normaliser
from data2vec_jax.tasks import pretrain

OPTIMIZER = dict(
    lr=1e-3,
    max_update=50,
    sched=dict(kind="cosine", warmup_updates=2),
    betas=[0.9, 0.98],
    eps=1e-6,
    weight_decay=0.01,
    clip_norm=1.0,
)
SPEECH = dict(
    generation="data2vec-1.0 (fairseq data2vec_audio)",
    modality="audio",
    optimizer=OPTIMIZER,
    model=dict(
        conv_feature_layers="[(6, 10, 5)] + [(8, 3, 2)] * 2",
        extractor_mode="layer_norm",
        encoder_layers=3,
        encoder_embed_dim=16,
        encoder_ffn_embed_dim=20,
        encoder_attention_heads=2,
        conv_pos=12,
        conv_pos_groups=4,
        pos_conv_depth=2,
        average_top_k_layers=2,
        mask_prob=0.5,
        mask_length=4,
    ),
)
TEXT = dict(
    generation="data2vec-1.0 (fairseq data2vec_text)",
    modality="text",
    optimizer=OPTIMIZER,
    model=dict(average_top_k_layers=2, head_layers=2, loss_beta=4.0, loss_scale=1.0),
    encoder=dict(layers=3, embed_dim=16, ffn_embed_dim=20, attention_heads=2, learned_pos=True),
    transformer=dict(
        activation_fn="gelu",
        layernorm_embedding=True,
        no_scale_embedding=True,
        max_source_positions=20,
    ),
    masking=dict(mask_prob=0.35, mask_multiple_length=2),
    vocab=dict(vocab_size=30, mask_idx=29, pad_idx=1),
)
VISION = dict(
    generation="data2vec-1.0 (data2vec_vision/beit)",
    modality="image",
    target_layers=[1, 2],
    model=dict(
        img_size=[12, 20],
        patch_size=4,
        embed_dim=16,
        depth=3,
        num_heads=2,
        mlp_ratio=1.5,
        norm_eps=1e-6,
        init_values=0.1,
        use_abs_pos_emb=False,
    ),
    masking=dict(num_masking_patches=7, min_num_patches=2),
    engine=dict(),
    ema=dict(decay=0.9, decay_init=0.8, start_at=3),
    optimizer=dict(
        name="adamw",
        lr=1e-3,
        epochs=2,
        niter_per_ep=4,
        warmup_epochs=1,
        weight_decay=0.05,
        betas=[0.9, 0.999],
        eps=1e-8,
    ),
)


def changed(info, flags):
    """The json with other flags, each given as section__flag."""
    info = copy.deepcopy(info)
    for name, value in flags.items():
        section, flag = name.split("__")
        info.setdefault(section, {})[flag] = value
    return info


def inputs(info, padded):
    """The arrays `batch/...` of two rows."""
    random = np.random.default_rng(0)
    if info["modality"] == "audio":
        lengths = np.array([[611], [450 if padded else 611]])  # 29 frames, and 21
        pads = np.arange(611) >= lengths
        audio = np.where(pads, 0, random.normal(size=pads.shape)).astype(np.float32)
        mask = random.uniform(size=(2, 29)) < 0.4
        mask[:, 20:] = False
        arrays = dict(source=audio, mask_indices=mask.astype(np.uint8))
        return arrays | (dict(padding_mask=pads.astype(np.uint8)) if padded else {})
    if info["modality"] == "text":
        tokens = random.integers(4, 29, size=(2, 15))
        tokens[1, 9 if padded else 15 :] = 1
        mask = (random.uniform(size=tokens.shape) < 0.4) & (tokens != 1)
        source = np.where(mask, 29, tokens)
        return dict(src_tokens=source, target_tokens=tokens, mask_indices=mask.astype(np.uint8))
    high, wide = info["model"]["img_size"]
    patch = info["model"]["patch_size"]
    mask = random.uniform(size=(2, high // patch, wide // patch)) < 0.5
    mask[:, 0, 0] = True
    image = random.normal(size=(2, 3, high, wide)).astype(np.float32)
    return dict(image=image, bool_masked_pos=mask.astype(np.uint8))


def lively(path, x, random):
    """Random weights that show a swapped axis: gains around 1, matrices that keep sizes."""
    name = path_name(path)
    if name.endswith(("scale", "gain")):
        return random.normal(1.0, 0.2, x.shape).astype(np.float32)
    fan = np.prod(x.shape[:-1]) / (x.shape[0] if "blocks" in name else 1)
    size = 1.0 / np.sqrt(max(fan, 1)) if name.endswith("kernel") else 0.3
    return random.normal(0.0, size, x.shape).astype(np.float32)


def make(info, padded=False, batch=None):
    """(case, setup, student, teacher): random weights, with what `naive_v1` computes from them."""
    arrays = {f"batch/{k}": v for k, v in (batch or inputs(info, padded)).items()}
    setup = reference.setup(Case("made up", info, arrays))
    shapes = jax.eval_shape(setup.model.init, jax.random.key(0), setup.batch)["params"]
    random = np.random.default_rng(1)
    student = jax.tree_util.tree_map_with_path(lambda p, x: lively(p, x, random), shapes)
    averaged = select(student, setup.config["averaged"])
    teacher = jax.tree_util.tree_map_with_path(
        lambda p, x: 0.9 * x + np.float32(0.1) * lively(p, x, random), averaged
    )
    owned = overlay(select(student, (*setup.config["averaged"], *setup.copied)), teacher)
    there = tables.write(setup.student, student), tables.write(setup.teacher, owned)
    expected = naive_v1.forward(info, arrays, *there)
    arrays |= {f"fwd/{k}": np.asarray(v, np.float32) for k, v in expected.items()}
    return Case("made up", info, arrays), setup, student, teacher


def on(*names):
    return dict.fromkeys((f"model__{name}" for name in names), True)


L, I, B, G = (f"{name}_norm_target_layer" for name in ("layer", "instance", "batch", "group"))
FORWARD = {
    # Without `permuted` (no instance or batch norm of layers) two norms mix rows in their code.
    "speech, group of rows": (SPEECH, on(G, "instance_norm_targets")),
    "speech, all norms": (SPEECH, on(B, I, G, L, "layer_norm_targets", "instance_norm_targets")),
    "speech, padded, pre": (SPEECH, on(I, G, "layer_norm_first") | dict(model__loss_beta=0.3)),
    "speech, padded, whole": (
        SPEECH,
        on(B)
        | dict(
            model__ema_transformer_only=False,
            model__ema_layers_only=False,
            model__average_top_k_layers=1,
            model__extractor_mode="default",
            model__conv_bias=True,
        ),
    ),
    "speech, wav2vec positions": (
        SPEECH,
        on(L, "layer_norm_targets", "layer_norm_first")
        | dict(
            model__pos_conv_depth=1,
            model__conv_pos=8,
            model__ema_layers_only=False,
            model__feature_grad_mult=0.0,
            model__loss_scale=0.25,
        ),
    ),
    "speech, odd positions": (SPEECH, on(I) | dict(model__pos_conv_depth=4, model__conv_pos=22)),
    "text, pre": (
        TEXT,
        on(B, L, "layer_norm_targets", "instance_norm_targets")
        | dict(
            encoder__normalize_before=True,
            model__head_layers=3,
        ),
    ),
    "text, padded, pre": (
        TEXT,
        on(I, "instance_norm_targets")
        | dict(
            encoder__normalize_before=True,
            model__ema_transformer_layers_only=False,
            transformer__no_scale_embedding=False,
            model__loss_scale=0,
            model__head_layers=1,
        ),
    ),
    "vision, both biases": (
        VISION,
        dict(
            model__use_rel_pos_bias=True,
            model__use_shared_rel_pos_bias=True,
            model__use_abs_pos_emb=True,
            engine__target_batch_norm=True,
            engine__target_instance_norm=True,
            engine__post_target_instance_norm=True,
            engine__post_target_layer_norm=True,
            engine__loss_scale=2.0,
            engine__var_w0=0.5,
            engine__var_margin0=3.0,
        ),
    ),
    "vision, no biases, L1": (
        VISION,
        dict(
            model__qkv_bias=False,
            model__init_values=0,
            engine__l1_beta=0,
            engine__layer_results="fc",
            engine__target_layer_norm_last=False,
            engine__post_target_instance_norm=True,
        ),
    ),
}

# Parameters that differ by half a rounding step change the targets of this case by 1.5e-4, and its
# layers, before their norms, by 1e-6.
SLACK = {"speech, group of rows": 10.0}


@pytest.mark.parametrize("name", FORWARD)
def test_other_flags_agree_with_plain_numpy(name):
    info, flags = FORWARD[name]
    compare_forward(*make(changed(info, flags), "padded" in name), slack=SLACK.get(name, 2.0))


def compare_forward(case, setup, student, teacher, slack=2.0):
    # Norms after norms of little variance raise the rounding, which differs between XLA's versions.
    compare = Comparison(case, slack=slack)
    compare.skip("batch/")
    _, (stages, seen) = quick_jit(forward(setup))(*jax.tree.map(jnp.asarray, (student, teacher)))
    check_stages(setup, compare, stages, seen)
    compare.finish()


@pytest.mark.parametrize("others", [0.0, 0.3])
def test_a_texts_teacher_that_sees_targets_only(others):
    """The authors' code, trap 2: chosen tokens, whatever the student sees there, and else <pad>."""
    info = changed(TEXT, on("instance_norm_target_layer"))
    info["masking"] |= dict(leave_unmasked_prob=others, random_token_prob=others)
    batch = inputs(info, padded=True)
    tokens, chosen = batch["target_tokens"], batch["mask_indices"] == 1
    model = make(info, batch=batch)[1].model.clone(teacher_sees="targets")
    draw = StepKeys(jax.random.key(0), jnp.int32(0), jax.random.key(0))
    rows = {"tokens": jnp.asarray(tokens), "example_id": jnp.arange(2, dtype=jnp.uint32)}
    visible, whole, mask = TEXT_MODALITY.corrupt(model, rows, jnp.asarray(chosen), draw)
    np.testing.assert_array_equal(whole["tokens"], np.where(chosen, tokens, 1))
    assert (mask.sum() < chosen.sum()) == (others > 0)
    batch = dict(
        src_tokens=np.array(visible["tokens"]),
        target_tokens=np.array(whole["tokens"]),
        mask_indices=np.array(mask, np.uint8),
    )
    compare_forward(*make(info, batch=batch))


@pytest.mark.parametrize("sees", ["all", "targets"])
def test_the_loss_gives_the_texts_teacher_what_it_sees(sees):
    config = config_of("text_v1").to_dict()
    config["model"] |= dict(teacher_sees=sees, keep_prob=0.2)
    modality, model = pretrain.make_model(config)
    tokens = np.random.default_rng(0).integers(4, 999, (2, 32))
    rows = {"tokens": jnp.asarray(tokens), "example_id": jnp.arange(2, dtype=jnp.uint32)}
    seen, chosen = [], []

    def corrupt(net, batch, mask, draw):
        chosen.append(mask)
        return modality.corrupt(net, batch, mask, draw)

    def features(method, args, kwargs, context):
        if context.method_name == "features":
            seen.append(args[0]["tokens"])
        return method(*args, **kwargs)

    spied = dataclasses.replace(modality, corrupt=corrupt)
    objective, _ = pretrain.make_objective(config, spied, model)
    params = model.init(jax.random.key(0), rows)["params"]
    draw = StepKeys(jax.random.key(1), jnp.int32(0), jax.random.key(2))
    with nn.intercept_methods(features):
        seen.clear()
        objective.loss(params, {}, rows, draw)
    student, teacher = map(np.asarray, seen)
    assert (student != tokens).any()
    np.testing.assert_array_equal(
        teacher, tokens if sees == "all" else np.where(chosen[0], tokens, 1)
    )


LAYER_NORMS = "batch", "instance", "layer"
FAIRSEQ = (
    *(f"{name}_norm_target_layer" for name in LAYER_NORMS),
    "layer_norm_targets",
    "instance_norm_targets",
)
BEIT = (
    "target_batch_norm",
    "target_instance_norm",
    "target_layer_norm_last",
    "post_target_instance_norm",
    "post_target_layer_norm",
)
TARGETS = {  # section and names of the flags, translation, plain numpy
    "speech 1.0": (
        "model",
        ("group_norm_target_layer", *FAIRSEQ),
        lambda flags: reference.fairseq_norms(flags, speech1=True),
        lambda results, m: naive_v1.fairseq_targets(results, m, turn_early=False),
    ),
    "text 1.0": (
        "model",
        FAIRSEQ,
        reference.fairseq_norms,
        lambda results, m: naive_v1.fairseq_targets(results, m, turn_early=True),
    ),
    "vision 1.0": ("engine", BEIT, reference.beit_norms, naive_v1.beit_targets),
    "2.0": (
        "model",
        FAIRSEQ,
        reference.fairseq_norms,
        lambda results, m: dict(
            target_full=naive_v2.Naive.targets(
                types.SimpleNamespace(model=m | dict(average_top_k_layers=2), extra=0), results
            )[-1]
        ),
    ),
}


@pytest.mark.parametrize("name", TARGETS)
def test_every_combination_of_target_norms(name):
    section, names, translate, plain = TARGETS[name]
    results = np.random.default_rng(0).normal(1.0, 2.0, (2, 3, 7, 5))  # K, B, T, D
    for values in itertools.product((False, True), repeat=len(names)):
        on = dict(zip(names, values, strict=True))
        flags = reference.Flags({section: on}, {})
        norms = translate(flags)
        flags.finish()  # took all of them
        each = [normaliser(norms["layer_norms"])(jnp.asarray(y, jnp.float32)) for y in results]
        ours = normaliser(norms["final_norms"])(sum(each) / 2)
        np.testing.assert_allclose(
            ours, plain(list(results), on)["target_full"], atol=2e-4, err_msg=str(on)
        )


def test_cosine_from_another_start_to_another_end():
    sched = dict(kind="cosine", warmup_updates=10, min_lr=1e-4, warmup_init_lr=3e-4, lr_shrink=0.5)
    flags = dict(lr=[2e-3], max_update=50, sched=sched)
    total, schedule = reference.fairseq_schedule(flags)
    rate = optimizer.make_schedule(total, **schedule)
    steps = np.arange(50)
    waves = 1e-4 + 0.5 * (2e-3 - 1e-4) * (1 + np.cos(np.pi * (steps - 10) / 40))
    wanted = np.where(steps < 10, 3e-4 + (2e-3 - 3e-4) * steps / 10, waves)
    np.testing.assert_allclose([rate(n) for n in steps], wanted, rtol=1e-6)
    del sched["warmup_init_lr"]  # starts at min_lr then
    sched["lr_period_updates"] = 20  # shorter than the run
    total, schedule = reference.fairseq_schedule(flags)
    rate = optimizer.make_schedule(total, **schedule)
    assert float(rate(0)) == pytest.approx(1e-4) and float(rate(20)) == pytest.approx(1.05e-3)


@pytest.mark.parametrize(
    "info, flags",
    [
        (SPEECH, dict(model__dropout=0.1)),
        (SPEECH, dict(model__mask_channel_prob=0.1)),
        (SPEECH, dict(model__extractor_mode="conformer")),
        (SPEECH, dict(model__novel_flag=False)),
        (SPEECH, dict(modality_cfg__novel=1)),
        (SPEECH, dict(optimizer__sched={"kind": "polynomial_decay"})),
        (SPEECH, dict(extra__loss_kind="smooth_l1")),
        (TEXT, dict(transformer__activation_fn="relu")),
        (TEXT, dict(vocab__ema_copied_not_averaged=["embed_tokens.weight"])),
        (TEXT, dict(encoder__novel=0)),
        (TEXT, dict(model__group_norm_target_layer=True)),
        (VISION, dict(engine__layer_results="qkv")),
        (VISION, dict(optimizer__weight_decay_end=0.2)),
        (VISION, dict(optimizer__name="sgd")),
        (VISION, dict(ema__novel=None)),
    ],
    ids=lambda value: ",".join(value) if "modality" not in value else value["modality"],
)
def test_flags_that_we_do_not_honour_fail(info, flags):
    section, flag = next(iter(flags)).split("__")
    with pytest.raises(pytest.fail.Exception, match=rf"flag {section}\.{flag}"):
        make(changed(info, flags))


def test_absent_flags_have_the_authors_defaults():
    info = copy.deepcopy(TEXT)
    del info["transformer"]["activation_fn"]  # relu
    with pytest.raises(pytest.fail.Exception, match="activation_fn='relu'"):
        make(info)
    info = copy.deepcopy(SPEECH)
    del info["model"]["extractor_mode"], info["model"]["pos_conv_depth"]
    config = make(info)[1].config["model"]
    assert config["frontend"]["norm"] == "group" and config["positions"]["norm"] == "weight"
    info = copy.deepcopy(VISION)
    del info["model"]["use_abs_pos_emb"]
    assert make(info)[1].config["model"]["absolute"]


AUTHORS = dict(  # the defaults of 2.0, in our terms
    width=768,
    clones=1,
    top_k=8,
    target="ffn",
    beta=0,
    scale=768**-0.5,
    class_weight=0,
    depth=4 + 8,
    heads=12,
    mlp=4 * 768,
    eps=1e-6,
    norm="post",
    averaged=("^encoder/",),
    decoder=dict(layers=5, width=384, kernel=5, groups=16, residual=True),
    alibi=None,
    layer_norms=(),
    final_norms=(),
    clip=None,
    weight_decay=0.0,
    betas=(0.9, 0.999),
    adam_eps=1e-8,
)


def test_absent_flags_of_2_have_the_authors_defaults():
    mask = (np.arange(196) < 100)[None].repeat(2, 0).astype(np.uint8)
    arrays = {
        "batch/image": np.zeros((2, 3, 224, 224), np.float32),
        "batch/mask": mask,
        "batch/decoder_noise": np.zeros((2, 196, 768), np.float32),
    }
    info = dict(
        generation="data2vec-2.0",
        modality="image",
        optimizer=dict(lr=1e-3, max_update=10, sched=dict(kind="cosine")),
    )
    setup = reference_v2.setup(Case("made up", info, arrays))
    sections = setup.config, *(setup.config[name] for name in ("model", "objective"))
    found = {k: v for section in sections for k, v in section.items()}
    found |= (
        setup.config["model"]["encoder"]
        | setup.config["optim"]
        | dict(adam_eps=setup.config["optim"]["eps"], eps=setup.config["model"]["encoder"]["eps"])
    )
    assert {k: found[k] for k in AUTHORS} == AUTHORS
    assert (setup.model.grid, setup.prenet, setup.shared) == ((14, 14), 4, 4)
    assert setup.model.sincos and setup.model.class_tokens == 0
    decays = [float(setup.decay(n).value) for n in (0, 5, 10, 11)]  # anneals until max_update
    assert decays == pytest.approx([0.999, 0.99945, 0.9999, 0.9999], rel=1e-6)


@pytest.mark.parametrize(
    "section, flag, value",
    [
        ("model", "layer_norm_first", True),
        ("model", "d2v_loss", 0),
        ("model", "recon_loss", 1),
        ("model", "novel", 0),
        ("modality_cfg", "alibi_dims", 1),
        ("modality_cfg", "novel", None),
        ("modality_cfg", "keep_masked_pct", 0.1),
        ("decoder", "add_positions_all", True),
        ("extra", "loss_kind", "smooth_l1"),
        ("optimizer", "novel", False),
    ],
)
def test_flags_of_2_that_we_do_not_honour_fail(section, flag, value):
    golden = load("MV_image_v2")
    info = copy.deepcopy(golden.info)
    info["modality_cfg"]["use_alibi_encoder"] = True
    reference_v2.setup(Case("made up", info, golden.arrays))
    info[section][flag] = value
    with pytest.raises(pytest.fail.Exception, match=rf"flag {section}\.{flag}"):
        reference_v2.setup(Case("made up", info, golden.arrays))


def test_cases_of_other_kinds_fail():
    with pytest.raises(pytest.fail.Exception, match="generation"):
        reference.setup(Case("made up", TEXT | dict(generation="data2vec-3.0 (fairseq)"), {}))
    with pytest.raises(pytest.fail.Exception, match="modality 'video'"):
        reference.setup(Case("made up", SPEECH | dict(modality="video"), {}))


def test_what_a_frozen_teacher_copied_stays_behind():
    freeze = dict(model__ema_decay=0.5, model__ema_end_decay=1.0, model__ema_anneal_end_step=2)
    _, setup, student, teacher = make(changed(SPEECH, freeze))
    owned = overlay(select(student, (*setup.config["averaged"], *setup.copied)), teacher)
    states = [state for state, _ in replay(setup, *jax.tree.map(jnp.asarray, (student, owned)), 3)]
    kernel = lambda tree: np.asarray(tree["positions"]["conv0"]["kernel"])  # noqa: E731
    seen = [kernel(state.teacher) for state in states]
    np.testing.assert_array_equal(seen[1], kernel(states[1].params))  # decay 0.75
    for n in (2, 3):  # decay 1
        np.testing.assert_array_equal(seen[n], seen[1])
        assert (kernel(states[n].params) != seen[n]).any()
    scales = [np.asarray(state.teacher["norm"]["scale"]) for state in states]
    assert (scales[1] != scales[0]).any()
    np.testing.assert_array_equal(scales[3], scales[1])


def test_decay_stays_to_the_end_of_the_epoch():
    decay = reference.beit_decay(0.8, 0.9, anneal=3, per_epoch=4)
    ramp = [0.8, 0.8 + 0.1 / 3, 0.8 + 0.2 / 3]
    assert [float(decay(n).value) for n in range(1, 7)] == pytest.approx(
        [*ramp, ramp[-1], 0.9, 0.9]
    )
