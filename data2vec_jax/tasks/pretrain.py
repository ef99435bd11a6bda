"""Self-supervised pretraining: a modality and an objective make a task."""

import dataclasses
import functools
import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from data2vec_jax import masking
from data2vec_jax.core import sharding
from data2vec_jax.core.bad_examples import KEY, MAX_BAD_SHARE, BadExample, unpack
from data2vec_jax.core.config import (
    Pattern,
    PositiveFloat,
    PositiveInt,
    Range,
    Rows,
    RunConfig,
    Share,
    check_section,
    choose,
)
from data2vec_jax.core.errors import UserError, nearest
from data2vec_jax.core.state import select, shapes_of
from data2vec_jax.core.task import Task
from data2vec_jax.core.train_step import StepKeys
from data2vec_jax.data import batches, readers
from data2vec_jax.data.sources import Source, check_held_out, open_source
from data2vec_jax.modalities import contract
from data2vec_jax.objectives import contract as objectives
from data2vec_jax.objectives.targets import owns_features

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainConfig(RunConfig):
    """A pretraining config."""

    task: Literal["pretrain"] = "pretrain"
    objective: Mapping  # `Config` of the objective `name`, a module in `objectives`
    collapse: Mapping  # `metrics.collapse.CollapseConfig`
    # `masking.make`; empty for an objective that masks nothing.
    mask: Mapping = dataclasses.field(default_factory=dict)
    averaged: Sequence[Pattern] = ()  # path patterns of the teacher's own parameters; () for none
    # `state.ema_decay`: the teacher's, if the objective has one.
    ema: Mapping = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Config section `data` of pretraining."""

    source: str  # see `data.sources.open_source`
    # Global rows of a batch of the longest bucket; shorter buckets have more rows.
    batch_size: Rows
    split: str = "train"
    workers: Annotated[int, Range(0, 1024)] = 0  # processes that read; 0 for threads
    prefetch: Annotated[int, Range(1, 1024)] = 4  # batches read ahead by each, or by the threads
    # Until a reader that gives no batch is taken for stuck.
    reader_timeout: PositiveFloat = readers.READER_TIMEOUT  # seconds
    # Examples that cannot be read are left out and named. If more than this share of all is bad,
    # rounded up to whole examples, the run stops.
    max_bad_share: Share = MAX_BAD_SHARE
    rows_multiple_of: PositiveInt | None = None  # see `batches.rows_of`
    eval_split: str | None = None  # of held-out examples for the validation loss; None for none
    eval_batches: PositiveInt = 8  # of the validation loss


CONFIG = PretrainConfig


def resolve_config(config: Mapping[str, Any], init_from: str | None = None) -> dict[str, Any]:
    """The config as it is: a checkpoint of another shape is refused when it is read."""
    return dict(config)


def make_model(config: Mapping[str, Any]) -> tuple[contract.Modality, Any]:
    """The modality and its model, from the sections `modality`, `model` and `dtype`; in pretraining
    with the parameters of its `objective`."""
    modality = contract.get(config["modality"])
    if config["dtype"] not in DTYPES:
        hint = nearest(config["dtype"], DTYPES)
        raise UserError(f"config.dtype: no '{config['dtype']}'{hint}")
    dtype = DTYPES[config["dtype"]]
    model = contract.make_model(modality, config["model"], dtype)
    if "objective" in config:
        settings = objective_of(config)[1]
        _check_needs(config["objective"]["name"], settings, model)
        if (pretext := settings.pretext(model)) is not None:
            model = model.clone(pretext=pretext)
    return modality, model


def objective_of(config: Mapping[str, Any]) -> tuple[Any, objectives.ObjectiveConfig]:
    """(module, options) of the objective that the section `objective` names."""
    name = choose("objective", config["objective"], "name", objectives.names())
    options = {key: value for key, value in config["objective"].items() if key != "name"}
    module = importlib.import_module(f"data2vec_jax.objectives.{name}")
    check_section("objective", options, module.Config)
    return module, module.Config(**options)


def _check_needs(name, settings, model):
    """Raises UserError: the model does not have what the objective needs, or more."""
    if settings.needs_decoder != (model.decoder is not None):
        raise UserError(
            f"config.model.decoder: {name} needs "
            + ("one" if model.decoder is None else "none (None): its head reads the encoder")
        )
    if settings.predicts not in (None, model.content):
        raise UserError(
            f"config.objective.name: {name} predicts the {settings.predicts} of the input, and "
            f"this model's positions hold {model.content or 'neither ids nor numbers'}"
        )
    if settings.needs_views and not model.has_views:
        raise UserError(
            f"config.objective.name: {name} compares views of an example, which this modality "
            "does not make"
        )
    settings.check(model)


def check_views(name: str, wanted: str, layout: contract.Layout) -> None:
    """Raises UserError: the examples have no views that an objective needs (see
    `objectives.ObjectiveConfig`), or some that it does not see."""
    views = getattr(layout, "drawn", None)
    if wanted and views is None:
        raise UserError(f"config.examples.views: {name} compares views; give options, or {{}}")
    if views is not None and not wanted:
        raise UserError(f"config.examples.views: {name} sees one view; use None")
    if views is not None and wanted == "large" and views.local:
        raise UserError(f"config.examples.views.local: {name} sees no small views; use 0")


def make_objective(config: Mapping[str, Any], modality: contract.Modality, model: Any):
    """(objective, sampler of a batch's shapes) from the sections `objective` and `mask`.

    The sampler returns None if the objective masks nothing.
    """
    module, settings = objective_of(config)
    statistics = settings.batch_statistics()
    if config["accumulate"] > 1 and statistics:
        raise UserError(
            f"config.accumulate: {statistics} are statistics of the whole batch; use accumulate=1"
        )
    sampler = sampler_of_masks(config, model, settings)
    return module.make_loss(settings, model, sampler, modality.corrupt), sampler


def sampler_of_masks(
    config: Mapping[str, Any], model: Any, settings: objectives.ObjectiveConfig
) -> Callable[[Mapping[str, Any]], masking.Sampler | None]:
    """See `make_objective`."""
    name, section = config["objective"]["name"], config.get("mask", {})
    if settings.masks == "":
        if section:
            raise UserError(f"config.mask: {name} masks nothing; use {{}}")
        return lambda shapes: None
    kind = choose("mask", section, "kind", masking.KINDS)
    if settings.masks not in (None, kind):
        raise UserError(f"config.mask.kind: {name} needs '{settings.masks}', not '{kind}'")
    masked = {key: value for key, value in section.items() if key != "kind"}

    @functools.cache
    def sampler_of(size):
        if not np.all(np.asarray(size) >= 1):
            raise UserError("config.examples: the shortest inputs have no frame for the model")
        made = masking.make(kind, size, **masked)
        if not 0 < made.count(made.length) < made.length:
            raise UserError(
                f"config.mask: {made.count(made.length)} of {made.length} positions are masked; "
                "some must be, and some not"
            )
        return made

    return lambda shapes: sampler_of(model.mask_shape(shapes))


def make(config: Mapping[str, Any]) -> Task:
    """The pretraining task of a config. Reads the source's index, not its data (text: all)."""
    task, options, modality, model = _outline(config)
    source, examples, plan = open_examples(config)
    examples.check(model)
    shapes = batches.global_shapes(plan, examples)
    check_rows(shapes, config)

    evals = {}
    if options.eval_split and config["eval_every"]:
        part = open_source(options.source, options.eval_split, codec=modality.codec)
        check_held_out(source, part, "or none: None")
        held_out = modality.examples(part, like=examples, **config["examples"])
        held_out_plan = plan_of(part, held_out, options, config["seed"])
        evals["validation"] = validation(task.loss, held_out, held_out_plan, options)

    return dataclasses.replace(
        task,
        shapes=shapes,
        shares=[count / plan.per_epoch for count in plan.batches if count],
        data=lambda start: placed(plan, examples, options, start, config["total_steps"]),
        evals=evals,
        **corpus(source, plan, options),
        notes=[*source.notes, *data_notes(plan, examples)],
        save_assets=examples.save_assets,
    )


def plan_of(
    source: Source, examples: Any, options: Any, seed: int, **more: Any
) -> batches.TrainSampler:
    """The batches of a source's examples. options: a task's `DataConfig`; more: of the sampler.

    Raises UserError: the source is a mixture, and the examples do not say of which corpus they are.
    """
    corpora = getattr(examples, "corpora", source.corpora)
    mixed = len(corpora.shares) > 1
    if mixed and len(corpora.corpus_of) != len(examples.bucket_of):
        raise UserError(f"{source.uri}: this modality cannot mix corpora; see contract.Examples")
    return batches.TrainSampler(
        examples.bucket_of,
        examples.layout.buckets,
        options.batch_size,
        seed,
        options.rows_multiple_of,
        examples.layout.padded,
        corpora=corpora if mixed else None,
        **more,
    )


def open_examples(
    config: Mapping[str, Any],
) -> tuple[Source, contract.Examples, batches.TrainSampler]:
    """Source, examples and batches of a config whose sections are checked."""
    modality, options = contract.get(config["modality"]), DataConfig(**config["data"])
    source = open_source(options.source, options.split, codec=modality.codec)
    examples = modality.examples(source, **config["examples"])
    return source, examples, plan_of(source, examples, options, config["seed"])


def corpus(source: Source, plan: batches.TrainSampler, options: Any) -> dict[str, Any]:
    """What a `Task` says of its examples. options: its `DataConfig`."""
    return {
        "size": len(source),
        "bad": [
            BadExample(0, index, error.where, error.reason, str(error))
            for index, error in sorted(source.bad.items())
        ],
        "max_bad_share": options.max_bad_share,
        "order": f"{len(source)} examples, files {source.digest()}, order {plan.digest()}",
    }


def placed(plan: Any, examples: Any, options: Any, start: int, stop: int):
    """Batches `start` to `stop` of a plan on the mesh in use, as of `Task.data`.

    options: a task's `DataConfig`.
    """
    mesh = jax.sharding.get_mesh()
    read = batches.HostBatchReader(plan, examples, sharding.own_blocks(mesh), mesh.size)

    def place(batch):
        bad = {KEY: unpack(batch[KEY])} if KEY in batch else {}
        arrays = {name: array for name, array in batch.items() if name != KEY}
        return sharding.to_global(arrays, mesh) | bad

    return readers.stream(
        read,
        start,
        stop,
        workers=options.workers,
        prefetch=options.prefetch,
        reader_timeout=options.reader_timeout,
        place=place,
    )


def abstract_task(config: Mapping[str, Any]) -> Task:
    """The same task without its data, for programs that are compiled and not run.

    Its shapes are those of all buckets, the longest last.
    """
    task = _outline(config)[0]
    check_rows(task.shapes, config)
    return task


def _outline(config):
    """A task without data, and what it was made of: options of the data, modality, model."""
    modality, model = make_model(config)
    objective, sampler = make_objective(config, modality, model)
    check_teacher(config)
    check_section("data", config["data"], DataConfig)
    options = DataConfig(**config["data"])
    check_section("examples", config["examples"], modality.layout)
    layout = modality.layout(**config["examples"])
    clones, settings = config["objective"].get("clones", 1), objective_of(config)[1]
    if settings.needs_labels and "labels" not in layout.shapes[0]:
        raise UserError(
            f"config.examples.labels: {config['objective']['name']} predicts labels; give the "
            "folder that `python -m data2vec_jax.cluster` has written them to"
        )
    check_views(config["objective"]["name"], settings.needs_views, layout)
    rows = batches.rows_of(layout.buckets, options.batch_size, options.rows_multiple_of)
    shapes = [batches.batch_shapes(s, n) for s, n in zip(layout.shapes, rows, strict=True)]
    for shape in shapes:
        sampler(shape)  # refuses masks that are impossible
    init, averaged = initialiser(model, shapes[0]), tuple(config.get("averaged", ()))
    params = shapes_of(init)
    check_averaged(params, averaged)
    own_front = owns_features(model, select(params, averaged))

    task = Task(
        shapes=shapes,
        shares=[1 / len(shapes)] * len(shapes),
        init=init,
        loss=objective.loss,
        averaged=averaged,
        flops=lambda batch: step_flops(
            modality, model, sampler, batch, own_front, clones, settings
        ),
    )
    return task, options, modality, model


def check_teacher(config: Mapping[str, Any]) -> None:
    """Raises UserError: an objective with a teacher lacks its options, or one without has some."""
    wanted, averaged = objective_of(config)[1].needs_teacher, config.get("averaged", ())
    if wanted and not averaged:
        raise UserError(
            "config.averaged: the objective has a teacher, so path patterns of the parameters that "
            "it averages are needed, such as ('^encoder/',)"
        )
    if wanted and not config.get("ema"):
        raise UserError("config: missing option 'ema'")
    if averaged and not wanted:
        raise UserError("config.averaged: the objective has no teacher; use ()")


def check_averaged(params: Any, averaged: Sequence[str]) -> None:
    """Raises UserError unless each pattern of the teacher's parameters finds some.

    What the teacher does not average is the student's, so with none the student is its own target.
    params: arrays or their shapes.
    """
    for pattern in averaged:
        if not select(params, (pattern,)):
            raise UserError(
                f"config.averaged: '{pattern}' matches no parameter; the first parts of their "
                f"paths are {', '.join(sorted(params))}"
            )


def initialiser(model: Any, shapes: Mapping[str, Any]):
    """key -> parameters, from one row of zeros."""

    def init(key):
        row = {k: jnp.zeros((1, *s.shape[1:]), s.dtype) for k, s in shapes.items()}
        return model.init(key, row)["params"]

    return init


def check_rows(shapes: Any, config: Mapping[str, Any]) -> None:
    """Every bucket's rows must divide over devices and micro-batches."""
    devices, parts = sharding.device_count(), config["accumulate"]
    for shape in shapes:
        rows = shape["example_id"].shape[0]
        if rows % (devices * parts):
            over = f"{devices} devices" + (f" x accumulate {parts}" if parts > 1 else "")
            option = "batch_size" if shape is shapes[-1] else "rows_multiple_of"
            raise UserError(
                f"config.data.{option}: a batch of {rows} rows does not divide over {over}; "
                f"use a multiple of {devices * parts}"
            )


def flops_by_part(
    modality: contract.Modality,
    model: Any,
    sampler: Any,
    batch: Any,
    own_front: bool | None,
    settings: objectives.ObjectiveConfig | None = None,
) -> dict[str, float]:
    """Forward FLOPs of one example: 'frontend', 'student' (of one masked input) and 'teacher'.

    With a decoder, a student sees only what is not masked. The teacher has neither decoder nor
    head, and shares the front end unless it has its own (`own_front`, see `owns_features`; None
    without a teacher). settings: of the objective, which may count otherwise.
    """
    example = {k: jax.ShapeDtypeStruct(s.shape[1:], s.dtype) for k, s in batch.items()}

    def forward(model, masked, seen):
        return modality.flops(model, example, masked, seen)

    settings = settings or objectives.ObjectiveConfig()
    parts = settings.forward_flops(model, example, sampler(batch), forward)
    return {
        "frontend": parts["frontend"],
        "student": parts["student"],
        "teacher": 0.0 if own_front is None else parts["encoder"] + own_front * parts["frontend"],
    }


def step_flops(
    modality: contract.Modality,
    model: Any,
    sampler: Any,
    batch: Any,
    own_front: bool | None,
    clones: int = 1,
    settings: objectives.ObjectiveConfig | None = None,
) -> float:
    """FLOPs of a train step: B (3 (F + M S) + T), see `flops_by_part`.

    B rows; F front end and S each of the M = `clones` students, forward and backward (twice a
    forward); T teacher, forward only.
    """
    parts = flops_by_part(modality, model, sampler, batch, own_front, settings)
    trained = parts["frontend"] + clones * parts["student"]
    return batch["example_id"].shape[0] * (3.0 * trained + parts["teacher"])


def validation(loss: Any, examples: Any, plan: batches.TrainSampler, options: DataConfig):
    """An eval: the pretraining loss of held-out batches, with the same masks at every step.

    `left_out`: the share of examples that could not be read, for which others stood in.
    """
    key = jax.random.key(plan.seed)

    def part(params, teacher, batch, draw, wanted):
        total, count, _ = loss(params, teacher, batch, draw)
        return total, count, jnp.sum(batch["example_id"] != wanted)

    jitted = jax.jit(part)

    def run(state):
        total = count = missing = examples_read = 0.0
        mesh = jax.sharding.get_mesh()
        read = batches.HostBatchReader(plan, examples, sharding.own_blocks(mesh), mesh.size)
        for n in range(min(options.eval_batches, plan.per_epoch)):
            arrays, (_, wanted) = read(n), plan(n)
            arrays.pop(KEY, None)
            batch = sharding.to_global(arrays, mesh)
            draw = StepKeys(key, jnp.int32(n), key)
            found = map(float, jitted(state.params, state.teacher, batch, draw, wanted))
            total, count, missing = map(sum, zip((total, count, missing), found, strict=True))
            examples_read += len(wanted)
        left_out = {"left_out": missing / examples_read} if missing else {}
        return {"loss": total / count} | left_out

    return run


def data_notes(plan: batches.TrainSampler, examples: Any) -> list[str]:
    """What the run will read: examples, batches, programs, and what padding or cropping costs."""
    lengths, buckets = np.asarray(examples.lengths), examples.layout.buckets
    used = plan.bucket_of >= 0
    notes = [f"{used.sum()} of {len(lengths)} examples, {plan.per_epoch} batches an epoch"]
    for length, rows, count in zip(buckets, plan.rows, plan.batches, strict=True):
        if len(buckets) > 1 and count:
            notes.append(f"  {count} batches of {rows} x {length}")
    if len(plan.passes) > 1:
        passes = ", ".join(f"{count:.3g}" for count in plan.passes)
        notes.append(f"  passes through the corpora of the mixture in an epoch: {passes}")
    filled = np.asarray(buckets)[plan.bucket_of[used]]
    cut = np.maximum(lengths[used] - filled, 0).sum() + lengths[~used].sum()
    padding = np.maximum(filled - lengths[used], 0).sum() / filled.sum()
    notes.append(f"  dropped {100 * cut / lengths.sum():.1f} %, padding {100 * padding:.1f} %")
    return notes
