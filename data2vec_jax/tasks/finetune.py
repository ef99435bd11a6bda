"""What all fine-tuning tasks share: an encoder and a head, adapters, labelled examples, evaluation.

B batch, T frames or tokens, D width. Parameters are the encoder's at the top, the head's below
`task/`, and those of adapters below `adapters/`.
"""

import functools
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from data2vec_jax.core import checkpoints
from data2vec_jax.core.bad_examples import KEY, MAX_BAD_SHARE
from data2vec_jax.core.config import (
    DropRate,
    Length,
    NonNegativeInt,
    Pattern,
    PositiveFloat,
    PositiveInt,
    Range,
    Rows,
    RunConfig,
    Share,
    Size,
    check_section,
)
from data2vec_jax.core.errors import ExampleError, UserError
from data2vec_jax.core.state import matches, overlay, path_name, shapes_of
from data2vec_jax.core.task import Task
from data2vec_jax.data import batches, sources
from data2vec_jax.data.codecs import Codec
from data2vec_jax.data.normalise import MAX_OUTSIDE_SHARE
from data2vec_jax.data.readers import READER_TIMEOUT
from data2vec_jax.modalities import contract
from data2vec_jax.models import adapters, heads
from data2vec_jax.models.heads import Features
from data2vec_jax.tasks import layerwise
from data2vec_jax.tasks.pretrain import check_rows, corpus, data_notes, make_model, placed, plan_of

Array = jax.Array
ALONE = r"^(?!adapters/|task/)"  # what adapters leave as it is


@dataclass(frozen=True)
class NoOptions:
    """A section without options."""


@dataclass(frozen=True)
class FinetuneSpec:
    """What one fine-tuning task adds to the others."""

    loss: Callable[..., Any]
    """(model, head, `loss_config`) -> a task's loss."""
    predict: Callable[..., Any]
    """(model, head) -> a function (parameters, batch) -> {name: [B, ...]}."""
    score: Callable[..., Mapping[str, float]]
    """(predictions, inputs, `scoring_config`) -> {name: number}, where predictions are
    {name: array} of each example, by its index, None for one that was left out."""
    targets: Callable[[Mapping[str, Any], Any], "Targets"]
    """(config, head) -> what is learned of an example."""
    inputs: Any = None
    """A module with `layout` and `Windows`, None for the modality's."""
    loss_config: type = NoOptions
    """Config section `loss`, a frozen dataclass."""
    scoring_config: type = NoOptions
    """Config section `scoring`, a frozen dataclass."""


@dataclass(frozen=True)
class Targets:
    """shapes: bucket's length -> {name: shape}. read: (item, bucket's length) -> {name: array}.

    check: of a source -> lines for the user; raises UserError. save: writes what gives the numbers
    names. names: of the classes, for `open_source`. classes: of a source -> numbers of the classes
    of each example. outputs: what each output of the head stands for, of a checkpoint's config or,
    for None, of this run; () where that is not known.
    """

    shapes: Callable[[int], Mapping[str, jax.ShapeDtypeStruct]]
    read: Callable[[Mapping[str, Any], int], Mapping[str, np.ndarray]]
    check: Callable[[Any], Sequence[str]] = lambda source: ()
    save: Callable[[Path], None] = lambda folder: None
    names: Sequence[str] | None = None
    classes: Callable[[Any], Sequence[Sequence[int]]] | None = None
    outputs: Callable[[Mapping[str, Any] | None], Sequence[str]] = lambda stored: ()


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(RunConfig):
    """A fine-tuning config. The last step is always evaluated.

    `model` is that of a run from scratch; with `--init_from` it is the checkpoint's.
    """

    task: str  # a module of `data2vec_jax.tasks`
    head: Mapping  # `heads.make`
    model_overrides: Mapping = field(default_factory=dict)  # options of `model`, such as dropouts
    loss: Mapping = field(default_factory=dict)  # `FinetuneSpec.loss_config` of the task
    scoring: Mapping = field(default_factory=dict)  # `FinetuneSpec.scoring_config` of the task
    layerwise_lr: Mapping | None = None  # `layerwise.layer_rates`; None for one rate
    adapter: Mapping | None = None  # `AdapterConfig`; without its `targets` all is trained
    characters: str = ""  # of transcripts, most frequent first
    # Names of the classes in the order of the head; (): those of the training examples, sorted.
    labels: Annotated[Sequence[str], Length(0, 2**20)] = ()
    init_from: str = ""  # for the record: the checkpoint that `--init_from` named


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Config section `data` of fine-tuning."""

    source: str  # see `data.sources.open_source`
    batch_size: Rows  # global rows of a batch of the longest bucket
    split: str = "train"
    eval_split: str = "test"  # of held-out examples; several as 'a,b', '' for none
    eval_source: str | None = None  # None for `source`
    # Of the training examples that are used, always the same ones.
    share: Annotated[float, Range(above=0, most=1)] = 1.0
    key: str | None = None  # see `data.sources.open_named`
    workers: Annotated[int, Range(0, 1024)] = 0  # processes that read; 0 for threads
    prefetch: Annotated[int, Range(1, 1024)] = 4  # batches read ahead by each, or by the threads
    reader_timeout: PositiveFloat = READER_TIMEOUT  # see `pretrain.DataConfig`
    max_bad_share: Share = MAX_BAD_SHARE  # see `pretrain.DataConfig`
    # Of transcripts: `normalise.NormaliseConfig`. The steps are told, and kept in normalise.json.
    normalise: Mapping = field(default_factory=dict)
    # Letters that the alphabet cannot spell, units of a language model with such letters, or
    # held-out examples of classes that training has not: if it is more than this share, the run
    # does not start.
    max_outside_share: Share = MAX_OUTSIDE_SHARE
    rows_multiple_of: PositiveInt | None = None  # see `batches.rows_of`
    equal_rows: bool = False  # as many rows of short examples as of long ones
    # How often an example is in an epoch, for sets smaller than a batch.
    repeat: Annotated[int, Range(1, 10_000)] = 1
    # Examples of an epoch, drawn without replacement, more often where their classes are rare, see
    # `batches.balanced_weights`; 0 for all, once each.
    balanced_draws: NonNegativeInt = 0


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """Config section `adapter`: LoRA or DoRA, see `adapters.find`."""

    targets: Sequence[Pattern] = ()  # path patterns of the kernels that have adapters
    rank: Size = 8
    alpha: PositiveFloat | None = None  # numerator of the scale
    dora: bool = False
    rank_stabilised: bool = False  # scale by the root of the rank
    dropout: DropRate = 0.0  # of what adapters read


# The config ---------------------------------------------------------------------------------------


def resolve_config(config: Mapping[str, Any], init_from: str | None = None) -> dict[str, Any]:
    """The config with what it says in other words spelled out: model, rates, what is frozen.

    init_from: a checkpoint; its config gives `model`, and the tokenizer unless one is named.
    Raises UserError: it is of another modality.
    """
    config = dict(config)
    if init_from:
        stored = checkpoints.load_config(init_from)
        if stored["modality"] != config["modality"]:
            raise UserError(
                f"--init_from={init_from}: this is {stored['modality']}, the config "
                f"{config['modality']}"
            )
        theirs, own = stored.get("adapter"), json.loads(json.dumps(config.get("adapter")))
        if stored.get("adapters") or (adapters.switched_on(theirs) and theirs != own):
            raise UserError(
                f"--init_from={init_from}: this run would lose its adapters; merge them first: "
                f"python -m data2vec_jax.convert {init_from} FOLDER --to=jax --merge"
            )
        config["model"], config["init_from"] = stored["model"], str(init_from)
        if "tokenizer" in config["examples"] and not config["examples"]["tokenizer"]:
            own = Path(stored["folder"]) / "tokenizer"
            own = str(own if own.is_dir() else own.parent)
            config["examples"] = {**config["examples"], "tokenizer": own}
    model = changed(config["model"], config.get("model_overrides", {}))
    if model.get("decoder") is not None:  # 2.0: whose encoder knows no learned mask
        model["decoder"] = None
        if contract.get(config["modality"]).learned_mask:
            model["mask_embedding"] = False
    config["model"], optim = model, dict(config["optim"])
    if config.get("layerwise_lr") is not None:
        options = config["layerwise_lr"]
        given = {
            "depth": model["encoder"]["depth"],
            "embeddings": contract.get(config["modality"]).embedding_params,
        }
        check_section("layerwise_lr", options, layerwise.layer_rates, given=given)
        optim["rates"] = layerwise.layer_rates(**given, **options)
    if config.get("adapter"):
        check_section("adapter", config["adapter"], AdapterConfig)
    if adapters.switched_on(config.get("adapter")):
        optim["frozen"] = (*optim.get("frozen", ()), ALONE)
    config["optim"] = optim
    return config


def changed(options: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Nested options with those of `changes` in place of their own."""
    merged = dict(options)
    for key, value in changes.items():
        nested = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = changed(merged[key], value) if nested else value
    return merged


# Encoder and head ---------------------------------------------------------------------------------


def encode(
    model: Any,
    head: Any,
    params: Any,
    batch: Mapping[str, Array],
    key: Any = None,
    change: Callable[[contract.Tokens], contract.Tokens] = lambda tokens: tokens,
) -> Features:
    """What the encoder makes of a batch, for the head. key: dropout, None for none.

    change: of the front end's output. A head that `freezes` the encoder has neither dropout nor
    gradients in it.
    """
    frozen = getattr(head, "freezes", False)
    if frozen:
        key, params = None, jax.lax.stop_gradient(params)
    keys = (None, None) if key is None else jax.random.split(key)
    apply = functools.partial(model.apply, {"params": params})
    tokens = change(apply(batch, keys[0], method="features"))
    weighted = getattr(head, "weighted", False)
    out = apply(tokens, None, keys[1], method="encode", collect=weighted)
    states = jnp.concatenate([out.first[None], out.layers]) if weighted else None
    return Features(heads.all_tokens(out), states, model.valid_lengths(batch))


def initialiser(model: Any, head: Any, sites: Sequence[adapters.Site], shapes: Mapping[str, Any]):
    """key -> parameters of encoder, head and adapters; nothing that only pretraining needs."""

    def touch(module, batch):
        return module.encode(module.features(batch)).x

    def init(key):
        keys = jax.random.split(key, 3)
        row = {k: jnp.zeros((1, *s.shape[1:]), s.dtype) for k, s in shapes.items()}
        params = dict(model.init(keys[0], row, method=touch)["params"])
        features = jax.eval_shape(functools.partial(encode, model, head), params, row)
        features = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), features)
        params["task"] = head.init(keys[1], features).get("params", {})
        if sites:
            params["adapters"] = adapters.init(keys[2], sites, params)
        return params

    return init


def adapted(function: Callable, sites: Sequence[adapters.Site]) -> Callable:
    """`function(params, ...)` that reads adapters as part of the kernels, and trains them alone."""

    def run(params, *rest, key=None, dropout=0.0):
        base = {k: v for k, v in params.items() if k not in ("adapters", "task")}
        base = adapters.merged(jax.lax.stop_gradient(base), sites, params["adapters"], key, dropout)
        return function({**base, "task": params["task"]}, *rest)

    return run


# The task -----------------------------------------------------------------------------------------


class Examples:
    """Inputs and what is to be learned of them, of the same item."""

    def __init__(self, inputs: Any, targets: Targets):
        self.inputs, self.targets = inputs, targets
        self.bucket_of, self.lengths = inputs.bucket_of, inputs.lengths
        self.layout = with_targets(inputs.layout, targets)

    def load(self, index: int, bucket: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Arrays of one example."""
        item, length = self.inputs.source[index], self.layout.buckets[bucket]
        arrays = self.inputs.prepare(index, item, bucket, rng)
        try:
            return {**arrays, **self.targets.read(item, length)}
        except ExampleError:
            raise
        except UserError as error:
            where = self.inputs.source.location(index)
            raise ExampleError(where, "label", str(error)) from error


def with_targets(layout: contract.Layout, targets: Targets) -> contract.Layout:
    """A layout of inputs with the targets' arrays."""
    pairs = zip(layout.buckets, layout.shapes, strict=True)
    shapes = [{**s, **targets.shapes(length)} for length, s in pairs]
    return contract.Layout(layout.buckets, shapes, layout.padded)


def abstract_task(config: Mapping[str, Any], job: FinetuneSpec) -> Task:
    """The task of a config without its data; its shapes are those of all buckets."""
    task = _outline(config, job)[0]
    check_rows(task.shapes, config)
    return task


def _outline(config, job):
    modality, model = make_model(config)
    head = heads.make(config["head"], "head")
    layout = job.inputs.layout if job.inputs else modality.input_layout
    if layout is None:
        raise UserError(f"config.modality: {modality.name} has no inputs for fine-tuning")
    check_section("data", config["data"], DataConfig)
    check_section("examples", config["examples"], layout)
    check_section("loss", config.get("loss", {}), job.loss_config)
    check_section("scoring", config.get("scoring", {}), job.scoring_config)
    data = DataConfig(**config["data"])
    targets = job.targets(config, head)
    layout = with_targets(layout(**config["examples"]), targets)
    rows = batches.rows_of(layout.buckets, data.batch_size, data.rows_multiple_of, data.equal_rows)
    shapes = [batches.batch_shapes(s, n) for s, n in zip(layout.shapes, rows, strict=True)]
    for shape in shapes:
        if not np.all(np.asarray(model.mask_shape(shape)) >= 1):
            raise UserError("config.examples: the shortest inputs have no frame for the model")
    loss = job.loss(model, head, job.loss_config(**config.get("loss", {})))
    predict = job.predict(model, head)
    sites = []
    if adapters.switched_on(config.get("adapter")):
        options = asdict(AdapterConfig(**config["adapter"]))
        dropout = options.pop("dropout")
        base = shapes_of(initialiser(model, head, (), shapes[0]))
        sites = adapters.find({k: v for k, v in base.items() if k != "task"}, **options)
        loss, predict = _with_adapters(loss, sites, dropout), adapted(predict, sites)
    init = initialiser(model, head, sites, shapes[0])
    task = Task(
        shapes=shapes,
        shares=[1 / len(shapes)] * len(shapes),
        init=init,
        loss=loss,
        flops=functools.partial(step_flops, modality, model),
        notes=layer_notes(config, init, model.encoder.depth),
        init_from=functools.partial(_init_dependent, sites),
    )
    return task, data, modality, predict, targets


def _with_adapters(loss, sites, dropout):
    def run(params, teacher, batch, draw):
        key = None if draw is None else jax.random.fold_in(draw.noise_key, 1 << 16)
        whole = adapted(lambda p: loss(p, teacher, batch, draw), sites)
        return whole(params, key=key, dropout=dropout)

    return run


BIAS = "relative_bias"  # the name of a table of relative positions, shared or of each block


def _init_dependent(sites, params, new, path):
    """Blocks that have tables of relative positions of their own begin with the one that they
    shared in pretraining (conversion spec 2.1). DoRA magnitudes are recomputed from the loaded
    kernels.
    """
    if f"encoder/blocks/{BIAS}" in new and BIAS in checkpoints.held_paths(path, "params"):
        own = params["encoder"]["blocks"][BIAS]
        shared = {BIAS: jax.ShapeDtypeStruct(own.shape[1:], own.dtype)}
        shared = checkpoints.load_params(path, shared)[BIAS]
        own = jax.device_put(np.broadcast_to(shared, own.shape), own.sharding)
        params = overlay(params, {"encoder": {"blocks": {BIAS: own}}})
    if not any(path.startswith("adapters/") and path.endswith("/magnitude") for path in new):
        return params
    lengths = jax.jit(lambda p: adapters.init(jax.random.key(0), sites, p))(params)

    def choose(key_path, old, made):
        return made if path_name(key_path).endswith("magnitude") else old

    found = jax.tree_util.tree_map_with_path(choose, params["adapters"], lengths)
    places = jax.tree.map(lambda x: x.sharding, params["adapters"])
    return {**params, "adapters": jax.device_put(found, places)}


def step_flops(modality: Any, model: Any, batch: Any) -> float:
    """FLOPs of a train step: three times a forward pass through front end and encoder."""
    example = {k: jax.ShapeDtypeStruct(s.shape[1:], s.dtype) for k, s in batch.items()}
    parts = modality.flops(model, example, 0, 0)
    return batch["example_id"].shape[0] * 3.0 * (parts["frontend"] + parts["encoder"])


def layer_notes(config: Mapping[str, Any], init: Callable, depth: int) -> list[str]:
    """Layer, rate and decay of every parameter that learns; nothing if all learn alike."""
    rates, optim = config.get("layerwise_lr"), config["optim"]
    if not rates and not optim.get("frozen"):
        return []
    shapes = shapes_of(init)
    rows = layerwise.table(
        {k: v for k, v in shapes.items() if k != "adapters"},
        depth,
        **(rates or {"decay": 1.0}),
        no_decay=optim.get("no_decay", ()) if optim.get("weight_decay") else ("",),
        embeddings=contract.get(config["modality"]).embedding_params,
    )
    frozen = [row for row in rows if matches(optim.get("frozen", ()), row.path)]
    lines = layerwise.notes(row for row in rows if row not in frozen)
    if frozen:
        count = len({row.path for row in frozen})
        lines.append(f"{count} arrays never change ({frozen[0].path}, ...)")
    if "adapters" in shapes:
        count = sum(x.size for x in jax.tree.leaves(shapes["adapters"]))
        lines.append(f"{count:,} parameters of adapters learn")
    return lines


def make(config: Mapping[str, Any], job: FinetuneSpec) -> Task:
    """The fine-tuning task of a config. Reads the source's index, not its data (text: all)."""
    task, options, modality, predict, targets = _outline(config, job)
    inputs_of = job.inputs.Windows if job.inputs else modality.inputs
    names = targets.names if targets.names is not None else config.get("labels") or None
    source = open_part(options, modality.codec, names)
    lines = [*untaught(source), *targets.check(source)]
    inputs = inputs_of(source, **config["examples"])
    model = make_model(config)[1]
    inputs.check(model)
    examples = Examples(inputs, targets)
    plan = plan_of(
        inputs.source,
        examples,
        options,
        config["seed"],
        equal_rows=options.equal_rows,
        weights=balanced(source, examples, targets) if options.balanced_draws else None,
        draws=options.balanced_draws,
    )
    shapes = batches.global_shapes(plan, examples)
    check_rows(shapes, config)

    evals = {}
    for split in filter(None, options.eval_split.split(",")):
        part = open_split(options, split, modality.codec, source.label_names)
        if split != options.split:
            sources.check_held_out(source, part, "or config.data.eval_source, or none: ''")
        lines += [*check_known(part, options.max_outside_share), *targets.check(part)]
        held_out = Examples(inputs_of(part, like=inputs, **config["examples"]), targets)
        held_out.inputs.check(model)
        lines += part.notes
        scoring = functools.partial(
            job.score,
            inputs=held_out.inputs,
            config=job.scoring_config(**config.get("scoring", {})),
        )
        evals[split] = evaluation(predict, held_out, options, scoring)

    def save_assets(folder):
        inputs.save_assets(folder)
        targets.save(folder)

    return replace(
        task,
        shapes=shapes,
        shares=[count / plan.per_epoch for count in plan.batches if count],
        data=lambda start: placed(plan, examples, options, start, config["total_steps"]),
        evals=evals,
        **corpus(source, plan, options),
        notes=[*task.notes, *source.notes, *data_notes(plan, examples), *lines],
        save_assets=save_assets,
        renewed=functools.partial(renewed, targets),
    )


def renewed(targets: Targets, path: str) -> dict[str, str]:
    """{'task': why} if the head of the checkpoint `path` has other classes or characters."""
    own, theirs = (targets.outputs(x) for x in (None, checkpoints.load_config(path)))
    if not own or not theirs or list(own) == list(theirs):
        return {}
    first, (ours, other) = next(
        (i, pair) for i, pair in enumerate(itertools.zip_longest(own, theirs)) if len(set(pair)) > 1
    )
    return {"task": f"output {first} of {path} is {other!r}, and of this run {ours!r}"}


def untaught(source: sources.Source) -> list[str]:
    """A line on the classes that have no training example, as far as the source lists its labels:
    one that only a test folder has, or that a small share of the labels misses."""
    names, labels = source.label_names or (), source.column("label")
    have = set() if labels is None else {x for x in labels if x is not None}
    missing = [name for i, name in enumerate(names) if i not in have]
    if labels is None or not missing:
        return []
    more = ", ..." if len(missing) > 5 else ""
    return [
        f"warning: {len(missing):,} of {len(names):,} classes have no training example: "
        f"{', '.join(map(str, missing[:5]))}{more}"
    ]


def balanced(source: sources.Source, examples: Examples, targets: Targets) -> np.ndarray:
    """Weights of the training examples. Raises UserError: they have no classes."""
    if targets.classes is None or len(source) != len(examples.bucket_of):
        raise UserError("config.data.balanced_draws: of this task, examples have no classes")
    return batches.balanced_weights(targets.classes(source))


def open_part(
    options: DataConfig, codec: Codec, names: Sequence[str] | None = None
) -> sources.Source:
    """The training examples of the section `data`, or a share of them."""
    source = sources.open_named(options.source, options.split, codec, names, options.key)
    source = sources.by_name(source, names)
    share, repeat = options.share, options.repeat
    if not 0 < share <= 1 or repeat < 1:
        raise UserError(
            f"config.data: share={share}, repeat={repeat}; a share is above 0 and at most 1, and "
            "an example is repeated at least once"
        )
    if share == 1 and repeat == 1:
        return source
    chosen = np.random.default_rng(0).permutation(len(source))
    chosen = np.sort(chosen[: max(1, round(share * len(source)))])
    return sources.Subset(source, np.tile(chosen, repeat))


def open_split(
    options: DataConfig, split: str, codec: Codec, names: Sequence[str] | None
) -> sources.Source:
    """Held-out examples of the section `data`, with the classes of the training examples.

    Those of other classes are bad.
    """
    uri = options.eval_source or options.source
    source = sources.open_named(uri, split, codec, names, options.key, tolerant=True)
    return sources.by_name(source, names)


def check_known(source: sources.Source, most: float) -> list[str]:
    """How many examples are of classes that training has not, in a line; none if there are none.

    Raises UserError: more than the share `most`.
    """
    found = [error for _, error in sorted(source.bad.items()) if error.reason == sources.UNKNOWN]
    if not found:
        return []
    line = f"{len(found):,} of {len(source):,} examples are of classes that training has not"
    line = f"{source.uri} {source.split}: {line} (the first: {found[0]})"
    if len(found) > most * len(source):
        raise UserError(f"{line}; config.data.max_outside_share={most:g}")
    return [line]


def evaluation(predict: Callable, examples: Any, options: DataConfig, score: Callable):
    """An eval: the scores of a state's predictions for every example, each once.

    `score` gets None for those that were left out or could not be read.
    """
    plan = batches.EvalSampler(
        examples.bucket_of,
        examples.layout.buckets,
        options.batch_size,
        options.rows_multiple_of,
        options.equal_rows,
    )
    compiled: dict[Any, Callable] = {}

    def run(state):
        mesh = jax.sharding.get_mesh()
        if mesh not in compiled:
            everywhere = NamedSharding(mesh, PartitionSpec())
            compiled[mesh] = jax.jit(
                lambda params, batch: (predict(params, batch), batch["example_id"]),
                out_shardings=everywhere,
            )
        found: list[Any] = [None] * len(examples.bucket_of)
        for batch in placed(plan, examples, options, 0, len(plan)):
            batch.pop(KEY, None)
            out, ids = jax.tree.map(np.asarray, compiled[mesh](state.params, batch))
            for row, index in enumerate(ids):
                if index != batches.NO_EXAMPLE:
                    found[index] = {name: array[row] for name, array in out.items()}
        return score(found)

    return run
