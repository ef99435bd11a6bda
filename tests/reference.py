"""A recorded case of the authors' code -> our configuration. The only file that knows their flags.

Every flag of a case is either translated here or must have the value at which it does nothing
(`NEUTRAL`); otherwise the test fails and names it. What the authors' code does beside its flags is
written down here too, as values of our options: see the comments that start with "Quirk".

Sources: docs/spec/pretraining.md and the README of the goldens.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import pytest
from recorded import Case

from data2vec_jax.convert import beit, fairseq, tables
from data2vec_jax.convert.tables import Table
from data2vec_jax.core import optimizer, state
from data2vec_jax.tasks import pretrain

# Sections of a case's json that hold flags. Everything else in it is a note or a result.
SECTIONS = (
    "model",
    "modality_cfg",
    "decoder",
    "engine",
    "encoder",
    "transformer",
    "masking",
    "optimizer",
    "ema",
    "extra",
    "vocab",
)

ANY = object()  # a flag that has no effect on what is recorded, whatever its value

DROPOUT = dict.fromkeys(
    (
        "dropout",
        "activation_dropout",
        "attention_dropout",
        "dropout_input",
        "dropout_features",
        "encoder_layerdrop",
        "layerdrop",
        "relu_dropout",
    ),
    0,
)
# Masks are recorded, so these would only matter to who draws them anew; we do not have them.
SPANS = dict(mask_dropout=0, mask_selection="static", mask_other=0, no_mask_overlap=False)
CHANNELS = dict(
    mask_channel_prob=0,
    mask_channel_before=ANY,
    mask_channel_selection=ANY,
    mask_channel_other=ANY,
    mask_channel_length=ANY,
    no_mask_channel_overlap=ANY,
    mask_channel_min_space=ANY,
)
# Inherited from wav2vec 2.0 and never read by data2vec, or without effect on numbers.
UNREAD = dict.fromkeys(
    (
        "_name",
        "checkpoint_activations",
        "codebook_negatives",
        "cross_sample_negatives",
        "depthwise_conv_kernel_size",
        "final_dim",
        "fp16",
        "latent_dim",
        "latent_groups",
        "latent_temp",
        "latent_vars",
        "logit_temp",
        "mask_min_space",
        "max_positions",
        "max_update",
        "min_pred_var",
        "min_target_var",
        "negatives_from_everywhere",
        "num_negatives",
        "quantize_input",
        "quantize_targets",
        "quantizer_depth",
        "quantizer_factor",
        "required_seq_len_multiple",
        "same_quantizer",
        "seed",
        "target_glu",
        "load_checkpoint_heads",
        "adp_dim",
        "adp_act_fn",
        "adp_trf_idx",
    ),
    ANY,
)
SPEECH_ONLY = dict(
    activation_fn="gelu",
    layer_type="transformer",
    pos_enc_type="abs",
    attn_type="",
    conv_pos_batch_norm=False,
    crop_seq_to_multiple=1,
    adp_num=-1,
)
NEUTRAL = {
    "speech": {
        "model": DROPOUT | SPANS | CHANNELS | UNREAD | SPEECH_ONLY,
        "optimizer": dict(composite=False),
    },
    "text": {
        "model": UNREAD,
        "encoder": dict(layerdrop=0, learned_pos=True, embed_path=None, xformers_att_config=None),
        "masking": dict(mask_stdev=0, mask_whole_words=False, freq_weighted_replacement=False),
        "transformer": DROPOUT
        | dict(
            activation_fn="gelu",
            layernorm_embedding=True,
            no_token_positional_embeddings=False,
            checkpoint_activations=ANY,
            max_target_positions=ANY,
            adaptive_input=False,
        ),
        "vocab": dict(bos_idx=ANY, eos_idx=ANY, unk_idx=ANY, nspecial=ANY, pad_idx=1),
        "optimizer": dict(composite=False),
    },
    "vision": {
        "model": dict(
            qk_scale=None,
            drop_rate=0,
            attn_drop_rate=0,
            drop_path_rate=0,
            attn_head_dim=None,
            init_std=ANY,
        ),
        "masking": dict(max_aspect=None),
        # The second variance term is commented out in the authors' code.
        "engine": dict(var_w1=ANY, var_margin1=ANY, start_lr_decay_at_step=-1),
        "optimizer": dict(name="adamw", weight_decay_end=None, momentum=ANY, warmup_lr=ANY),
    },
}
# Flags of text whose default is not neutral: they may not be absent.
DEFAULTS = dict(
    transformer=dict(activation_fn="relu", layernorm_embedding=False),
    encoder=dict(learned_pos=False),
)


class Flags:
    """The flags of a case, each to be used once: what nobody took must be neutral.

    neutral: section -> the flags that may be left, and the values at which they do nothing.
    defaults: section -> flags whose default is not neutral, so that they may not be absent.
    """

    def __init__(
        self, info: Mapping[str, Any], neutral: Mapping[str, Any], defaults: Mapping[str, Any] = {}
    ):
        self.neutral, self.defaults = neutral, defaults
        self.left = {section: dict(info.get(section) or {}) for section in SECTIONS}

    def take(self, section: str, name: str, default: Any = None) -> Any:
        """The flag, or the authors' default if it is absent."""
        return self.left[section].pop(name, default)

    def finish(self) -> None:
        """Fails the test for a flag that is unknown or has an effect that we do not have."""
        for section, flags in self.left.items():
            neutral = self.neutral.get(section, {})
            for name, value in (self.defaults.get(section, {}) | flags).items():
                if name not in neutral:
                    pytest.fail(f"flag {section}.{name}={value!r} is unknown to the tests")
                if neutral[name] is not ANY and value != neutral[name]:
                    pytest.fail(f"flag {section}.{name}={value!r} is not implemented")


@dataclasses.dataclass(frozen=True)
class Setup:
    """What a 1.0 case is in our terms.

    config: sections as in configs/. batch, visible: what teacher and student see. mask: bool
    [B, T]. student, teacher: conversion tables of the two states. decay: of the average after
    update n. copied: path patterns of what their teacher copies at each average; ours shares it.
    margin: of the variance penalty. factor: on the total loss; their records of its parts are
    without it. sums: their losses are sums over masked positions, not means.
    """

    config: dict[str, Any]
    model: Any
    objective: Any
    batch: dict[str, jnp.ndarray]
    visible: dict[str, jnp.ndarray]
    mask: jnp.ndarray
    student: Table
    teacher: Table
    decay: Callable[[Any], Any]
    copied: Sequence[str] = ()
    margin: float | None = None
    factor: float = 1.0
    sums: bool = True


def setup(case: Case) -> Setup:
    """Dispatches by what the json says of itself."""
    generation, modality = case.info.get("generation", ""), case.info.get("modality")
    known = {("fairseq", "audio"): speech, ("fairseq", "text"): text, ("beit", "image"): vision}
    for (code, name), translate in known.items():
        if "data2vec-1.0" in generation and code in generation and name == modality:
            return translate(case)
    pytest.fail(f"generation {generation!r}, modality {modality!r} is unknown to the tests")


def build(config: dict[str, Any], flags: Flags, batch: Any) -> dict[str, Any]:
    """Model and objective of a config, made as in training."""
    flags.finish()
    config |= {"dtype": "float32", "accumulate": 1}
    modality, model = pretrain.make_model(config)
    objective, sampler = pretrain.make_objective(config, modality, model)
    sampler(batch)  # refuses options of masks that make no sense
    return dict(config=config, model=model, objective=objective, batch=batch)


# Schedules and optimisers -------------------------------------------------------------------------


def number(value: Any) -> float:
    """fairseq has lists of learning rates, one per epoch; data2vec uses the first."""
    return float(value[0] if isinstance(value, Sequence) else value)


def fairseq_schedule(optimizer: Mapping[str, Any]) -> tuple[int, dict[str, Any]]:
    """(total_steps, section `schedule`) of the flags of a fairseq optimiser."""
    sched, peak = dict(optimizer["sched"]), number(optimizer["lr"])
    total, kind = optimizer["max_update"], sched.pop("kind")
    if kind == "cosine":
        warmup, floor = sched.pop("warmup_updates", 0), min(sched.pop("min_lr", 0.0), peak)
        start = sched.pop("warmup_init_lr", -1)
        period = sched.pop("lr_period_updates", -1)
        neutral = dict(lr_shrink=ANY, t_mult=1)  # of restarts
        total = warmup + period if period > 0 else total
        section = dict(warmup=warmup / total, floor=floor, start=floor if start < 0 else start)
    elif kind == "tri_stage":
        ratio = sched.pop("phase_ratio", None)
        phases = [sched.pop(f"{name}_steps", 0) for name in ("warmup", "hold", "decay")]
        # Quirk: phases are rounded down; as shares of the total ours come out the same.
        phases = [int(total * share) for share in ratio] if ratio else phases
        neutral = {}
        section = dict(
            zip(("warmup", "hold", "decay"), (n / total for n in phases), strict=True),
            start_scale=sched.pop("init_lr_scale", 0.01),
            end_scale=sched.pop("final_lr_scale", 0.01),
        )
    else:
        pytest.fail(f"flag optimizer.sched.kind={kind!r} is unknown to the tests")
    for name, value in sched.items():
        if name not in neutral or neutral[name] not in (ANY, value):
            pytest.fail(f"flag optimizer.sched.{name}={value!r} is not implemented")
    return total, dict(kind=kind, peak=peak) | section


def fairseq_optimizer(flags: Flags) -> dict[str, Any]:
    """Sections `total_steps`, `schedule` and `optim` of a fairseq run."""
    names = ("lr", "max_update", "sched")
    total, schedule = fairseq_schedule({n: flags.take("optimizer", n) for n in names})
    return dict(
        total_steps=total,
        schedule=schedule,
        optim=dict(
            betas=flags.take("optimizer", "betas", (0.9, 0.999)),
            eps=flags.take("optimizer", "eps", 1e-8),
            eps_on="raw",
            # Quirk: everything decays, biases and norms too.
            weight_decay=flags.take("optimizer", "weight_decay", 0.0),
            clip=flags.take("optimizer", "clip_norm", 0.0) or None,
        ),
    )


def fairseq_decay(start: float, end: float, anneal: int) -> Callable[[Any], Any]:
    """The decay of the n-th average."""
    return state.ema_decay(anneal, start=start, end=end, anneal=1.0)


def fairseq_ema(case: Case, flags: Flags) -> Callable[[Any], Any]:
    """The same, from the flags of a model."""
    start = flags.take("model", "ema_decay", 0.999)
    end = flags.take("model", "ema_end_decay", 0.9999)
    anneal = flags.take("model", "ema_anneal_end_step", case.info["optimizer"]["max_update"])
    return fairseq_decay(start, end, anneal)


def beit_schedule(optimizer: Mapping[str, Any]) -> tuple[int, dict[str, Any]]:
    """(total_steps, section `schedule`) of the flags of a BEiT run."""
    per_epoch = optimizer["niter_per_ep"]
    total = optimizer.get("epochs", 300) * per_epoch
    steps = optimizer.get("warmup_steps", -1)
    warmup = steps if steps > 0 else optimizer.get("warmup_epochs", 5) * per_epoch
    return total, dict(
        kind="cosine",
        peak=optimizer.get("lr", 5e-4),
        warmup=warmup / total,
        inclusive=True,
        floor=optimizer.get("min_lr", 1e-5),
    )


def beit_decay(start: float, end: float, anneal: int, per_epoch: int) -> Callable[[Any], Any]:
    """Decay of the average after update n, which is iteration n - 1.

    Quirk: the end value is only set when an epoch begins, so that the last annealed value stays to
    the end of the epoch in which annealing ends.
    """
    decay = state.ema_decay(anneal, start=start, end=end, anneal=1.0, lag=1)
    epoch_ends = math.ceil(anneal / per_epoch) * per_epoch

    def held(n):
        late = (n - 1 >= anneal) & (n - 1 < epoch_ends)
        return decay(jnp.where(late, anneal, n))

    return held


# Speech -------------------------------------------------------------------------------------------


def fairseq_norms(flags: Flags, speech1: bool = False) -> dict[str, Sequence[Any]]:
    """Sections `layer_norms` and `final_norms` of a fairseq model, in the order of its code.

    speech1: it is 1.0 for speech, the only one with a group norm and with the quirk below.
    """

    def on(name):
        return flags.take("model", name, False)

    batch, instance = on("batch_norm_target_layer"), on("instance_norm_target_layer")
    # Quirk: speech 1.0 keeps [T, B, D] unless one of these two norms turns it to [B, T, D]; then
    # the other norms that should run over time run over the rows of the batch.
    rows_inside = speech1 and not (batch or instance)
    group, over_time = ((0, 2), (0,)) if rows_inside else ("group", "instance")
    layer = [
        ("batch", batch),
        ("instance", instance),
        (group, speech1 and on("group_norm_target_layer")),
        ("layer", on("layer_norm_target_layer")),
    ]
    final = [("layer", on("layer_norm_targets")), (over_time, on("instance_norm_targets"))]
    return dict(
        layer_norms=tuple(norm for norm, used in layer if used),
        final_norms=tuple(norm for norm, used in final if used),
    )


def check_loss_kind(section: str, flags: Flags, beta: float) -> None:
    """`loss_kind` repeats what beta says."""
    kind = "smooth_l1" if beta else "mse"
    if flags.take(section, "loss_kind", kind) != kind:
        pytest.fail(f"flag {section}.loss_kind disagrees with model.loss_beta={beta}")


def check_copied(flags: Flags, section: str, case: Case, table: Table, copied: Sequence[str]):
    """`ema_copied_not_averaged` lists what is in the teacher's state and is not averaged."""
    owned = tables.read(table, case.part("teacher/"))
    ours = sorted(tables.write(table, state.select(owned, copied)))
    listed = flags.take(section, "ema_copied_not_averaged", ours)
    if sorted(listed) != ours:
        pytest.fail(f"flag {section}.ema_copied_not_averaged: {listed}, ours {ours}")


def conv_stack(spec: str) -> list[tuple[int, int, int]]:
    """'[(512, 10, 5)] + [(512, 3, 2)] * 4' -> [(channels, kernel, stride), ...], as in fairseq."""
    return eval(spec, {"__builtins__": {}})


def speech(case: Case) -> Setup:
    """fairseq's data2vec_audio."""
    flags = Flags(case.info, NEUTRAL["speech"])

    def model(name, default):
        return flags.take("model", name, default)

    default = "[(512, 10, 5)] + [(512, 3, 2)] * 4 + [(512,2,2)] + [(512,2,2)]"
    convs = conv_stack(model("conv_feature_layers", default))
    depth, width = model("encoder_layers", 12), model("encoder_embed_dim", 768)
    position_depth = model("pos_conv_depth", 1)
    gradient = model("feature_grad_mult", 1.0)
    extractor = model("extractor_mode", "default")
    if extractor not in ("default", "layer_norm"):
        pytest.fail(f"flag model.extractor_mode={extractor!r} is unknown to the tests")
    whole = not model("ema_transformer_only", True)
    layers_only = model("ema_layers_only", True)
    whole = whole and not layers_only  # the second flag switches the first one on
    beta, scale = model("loss_beta", 0.0), model("loss_scale", None)
    check_loss_kind("extra", flags, beta)
    top_k = min(model("average_top_k_layers", 8), depth)
    masked = case.arrays["batch/mask_indices"]
    model("require_same_masks", True)  # the recorded masks are what it led to
    training = fairseq_optimizer(flags)
    if gradient <= 0:  # no gradient, so no update and no decay either
        training["optim"]["frozen"] = (r"^frontend/(conv\d|norm\d|time_norm)",)
    copied = ("^positions/",) if layers_only else ()
    averaged = ("",) if whole else ("^encoder/", "^norm/", *(() if copied else ("^positions/",)))
    teacher = fairseq.SPEECH if whole else fairseq.SPEECH_TEACHER
    check_copied(flags, "extra", case, teacher, copied)
    config = dict(
        modality="speech",
        averaged=averaged,
        model=dict(
            width=width,
            padding="reference",
            frontend=dict(
                convs=convs,
                norm="layer" if extractor == "layer_norm" else "group",
                bias=model("conv_bias", False),
                gradient=max(gradient, 0.0),
            ),
            positions=dict(
                depth=position_depth,
                width=model("conv_pos", 128),
                groups=model("conv_pos_groups", 16),
                norm="layer" if position_depth > 1 else "weight",
            ),
            encoder=dict(
                depth=depth,
                heads=model("encoder_attention_heads", 12),
                mlp=model("encoder_ffn_embed_dim", 3072),
                norm="pre" if model("layer_norm_first", False) else "post",
            ),
        ),
        mask=dict(
            kind="spans",
            prob=model("mask_prob", 0.65),
            width=model("mask_length", 10),
            masked=float(masked.mean()),
        ),
        objective=dict(
            name="data2vec1",
            target="ffn",
            beta=beta,
            # Quirk: a teacher that is the whole model averages all layers.
            top_k=depth if whole else top_k,
            scale="rsqrt_width" if scale is None else scale,
            **fairseq_norms(flags, speech1=True),
        ),
        **training,
    )
    decay = fairseq_ema(case, flags)
    batch = {"audio": jnp.asarray(case.arrays["batch/source"])}
    padding = case.arrays.get("batch/padding_mask")
    if padding is not None and padding.any():
        batch["length"] = jnp.asarray((padding == 0).sum(-1))
    return Setup(
        **build(config, flags, batch),
        visible=batch,
        mask=jnp.asarray(masked == 1),
        student=fairseq.SPEECH,
        teacher=teacher,
        decay=decay,
        copied=copied,
    )


# Text ---------------------------------------------------------------------------------------------


def text(case: Case) -> Setup:
    """fairseq's data2vec_text."""
    flags = Flags(case.info, NEUTRAL["text"], DEFAULTS)

    def model(name, default):
        return flags.take("model", name, default)

    def encoder(name, default):
        return flags.take("encoder", name, default)

    depth, width = encoder("layers", 6), encoder("embed_dim", 512)
    beta, scale = model("loss_beta", 0.0), model("loss_scale", None)
    check_loss_kind("vocab", flags, beta)
    # Quirk: with pre-norm the final norm is averaged too, though it is not a layer.
    copied = ("^embeddings/",) if model("ema_transformer_layers_only", True) else ()
    averaged = ("^encoder/", "^norm/", *(() if copied else ("^embeddings/",)))
    check_copied(flags, "vocab", case, fairseq.TEXT_TEACHER, copied)
    training = fairseq_optimizer(flags)
    vocab_size = flags.take("vocab", "vocab_size")
    if flags.take("vocab", "mask_idx", vocab_size - 1) != vocab_size - 1:
        pytest.fail("flag vocab.mask_idx: ours is the last of the vocabulary")
    masked = case.arrays["batch/mask_indices"]
    head = model("head_layers", 1)
    config = dict(
        modality="text",
        averaged=averaged,
        model=dict(
            width=width,
            padding="reference",
            vocab_size=vocab_size,
            max_length=flags.take("transformer", "max_source_positions", 1024),
            scale=not flags.take("transformer", "no_scale_embedding", False),
            keep_prob=flags.take("masking", "leave_unmasked_prob", 0.1),
            replace_prob=flags.take("masking", "random_token_prob", 0.1),
            encoder=dict(
                depth=depth,
                heads=encoder("attention_heads", 8),
                mlp=encoder("ffn_embed_dim", 2048),
                norm="pre" if encoder("normalize_before", False) else "post",
            ),
            head=dict(depth=head, hidden=2 * width),
        ),
        mask=dict(
            kind="token_spans",
            prob=flags.take("masking", "mask_prob", 0.15),
            width=flags.take("masking", "mask_multiple_length", 1),
            masked=float(masked.mean()),
        ),
        objective=dict(
            name="data2vec1",
            target="ffn",
            beta=beta,
            top_k=min(model("average_top_k_layers", 8), depth),
            scale=scale if scale is not None and scale > 0 else "rsqrt_width",
            **fairseq_norms(flags),
        ),
        **training,
    )
    decay = fairseq_ema(case, flags)
    return Setup(
        **build(config, flags, {"tokens": jnp.asarray(case.arrays["batch/target_tokens"])}),
        visible={"tokens": jnp.asarray(case.arrays["batch/src_tokens"])},
        mask=jnp.asarray(masked == 1),
        student=fairseq.TEXT,
        teacher=fairseq.TEXT_TEACHER,
        decay=decay,
        copied=copied,
    )


# Vision -------------------------------------------------------------------------------------------


def beit_norms(flags: Flags) -> dict[str, Sequence[str]]:
    """Sections `layer_norms` and `final_norms` of a BEiT run, in the order of its code."""

    def on(name, default=False):
        return flags.take("engine", name, default)

    layer = [
        ("batch", on("target_batch_norm")),
        ("instance", on("target_instance_norm")),
        ("layer", on("target_layer_norm_last", True)),
    ]
    final = [("instance", on("post_target_instance_norm")), ("layer", on("post_target_layer_norm"))]
    return dict(
        layer_norms=tuple(norm for norm, used in layer if used),
        final_norms=tuple(norm for norm, used in final if used),
    )


def vision(case: Case) -> Setup:
    """The authors' fork of BEiT."""
    flags = Flags(case.info, NEUTRAL["vision"])

    def model(name, default):
        return flags.take("model", name, default)

    def engine(name, default):
        return flags.take("engine", name, default)

    def optimizer(name, default):
        return flags.take("optimizer", name, default)

    size, patch = model("img_size", 224), model("patch_size", 16)
    patch = patch if isinstance(patch, int) else patch[0]
    image = (size, size) if isinstance(size, int) else tuple(size)
    grid = (image[0] // patch, image[1] // patch)
    width, depth = model("embed_dim", 768), model("depth", 12)
    if model("in_chans", 3) != case.arrays["batch/image"].shape[1]:
        pytest.fail("flag model.in_chans: the images have other channels")
    results = engine("layer_results", "end")
    if results not in ("end", "fc"):
        pytest.fail(f"flag engine.layer_results={results!r} is unknown to the tests")
    scale = engine("loss_scale", -1)
    scale = 1.0 if scale == -1 else scale
    beta, squared = engine("l1_beta", 0.12), engine("l2_loss", False)
    if engine("mask_dropout_prob", -1.0) > 0:
        pytest.fail("flag engine.mask_dropout_prob is not implemented")
    margin, penalty = engine("var_margin0", 0.5), engine("var_w0", 0.0)
    names = ("epochs", "niter_per_ep", "lr", "min_lr", "warmup_epochs", "warmup_steps")
    given = {name: optimizer(name, None) for name in names}
    given = {name: value for name, value in given.items() if value is not None}
    total, schedule = beit_schedule(given)
    count = flags.take("masking", "num_masking_patches", 75)
    config = dict(
        modality="vision",
        averaged=("",),
        total_steps=total,
        schedule=schedule,
        model=dict(
            width=width,
            image=image,
            patch=patch,
            shared_relative=model("use_shared_rel_pos_bias", False),
            absolute=model("use_abs_pos_emb", True),
            encoder=dict(
                depth=depth,
                heads=model("num_heads", 12),
                norm="pre",
                mlp=int(width * model("mlp_ratio", 4.0)),
                eps=model("norm_eps", 1e-6),
                qkv_bias="qv" if model("qkv_bias", True) else "none",
                layer_scale=model("init_values", None) or None,
                relative=grid if model("use_rel_pos_bias", False) else None,
            ),
        ),
        mask=dict(
            kind="blocks",
            count=count,
            min_patches=flags.take("masking", "min_num_patches", 4),
            max_patches=flags.take("masking", "max_num_patches", None),
            min_aspect=flags.take("masking", "min_aspect", 0.3),
        ),
        objective=dict(
            name="data2vec1",
            top_k=tuple(case.info["target_layers"]),
            target="block" if results == "end" else "ffn",
            # Smooth L1 with beta 0 is L1; ours is squared at 0, and L1 for a tiny beta.
            beta=0.0 if squared else beta or 1e-12,
            scale=scale / width,
            variance_weight=penalty * scale,
            variance_margin=margin,
            **beit_norms(flags),
        ),
        optim=dict(
            betas=optimizer("betas", None) or (0.9, 0.999),
            eps=optimizer("eps", 1e-8),
            weight_decay=optimizer("weight_decay", 0.05),
            clip=optimizer("clip_grad", None),
            # 1-D tensors, biases, the class token and absolute positions.
            no_decay=(r"(/|q_|v_)bias$", "scale", "^class_token$", "^positions$"),
        ),
    )
    decay = beit_decay(
        flags.take("ema", "decay_init", 0.999),
        flags.take("ema", "decay", 0.9998),
        flags.take("ema", "start_at", 25000),
        given["niter_per_ep"],
    )
    masked = case.arrays["batch/bool_masked_pos"].reshape(len(case.arrays["batch/image"]), -1)
    batch = {"image": jnp.asarray(case.arrays["batch/image"].transpose(0, 2, 3, 1))}
    return Setup(
        **build(config, flags, batch),
        visible=batch,
        mask=jnp.asarray(masked == 1),
        student=beit.VISION,
        teacher=beit.VISION,
        decay=decay,
        margin=margin,
        factor=scale,
        sums=False,
    )


def make_optimizer(setup: Setup) -> tuple[Any, Callable]:
    """(optimiser, schedule), as the loop makes them."""
    schedule = optimizer.make_schedule(setup.config["total_steps"], **setup.config["schedule"])
    return optimizer.make_optimizer(
        schedule, optimizer.OptimizerConfig(**setup.config["optim"])
    ), schedule
