"""What data2vec needs to know about one kind of signal.

B batch, T tokens, D width.

A modality is one folder with one record, `MODALITY`: a folder beside this file, or a module of your
own. To add EEG, music or video, write one and a config file: nothing else changes
(docs/add_a_modality.md).
"""

import importlib
import importlib.util
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from data2vec_jax.core.config import check_section
from data2vec_jax.core.errors import ExampleError, UserError, nearest
from data2vec_jax.data.codecs.base import Codec
from data2vec_jax.data.sources.base import Source
from data2vec_jax.data.sources.labels import check_classes
from data2vec_jax.models import outputs
from data2vec_jax.models.encoder import Tokens as Tokens  # a part of the contract
from data2vec_jax.models.outputs import Outputs

Batch = Mapping[str, jax.Array]
Options = Mapping[str, Any]
EMBEDDING_PARAMS = r"(^|/)(patches/.*|class_token|mask_embedding|positions)$"


@dataclass(frozen=True)
class Layout:
    """Static shapes of the examples: known from the config alone, without any data.

    buckets: lengths in units (samples, tokens; 1 for images), ascending. shapes: the arrays of one
    example of each bucket. padded: shorter examples are padded to a bucket, longer ones do not fit.
    One whose examples may have several views has `drawn`: None, or what says how many are small
    (`local`).
    """

    buckets: Sequence[int]
    shapes: Sequence[Mapping[str, jax.ShapeDtypeStruct]]
    padded: bool = False


class Examples(Protocol):
    """The examples of one split, random access by example id (their index).

    bucket_of: int [N], each example's bucket, -1 for an example that is left out.
    lengths: int [N] in the layout's units.

    Examples that are not those of their source, in order, have `corpora`, as a source has, for
    mixtures; else they are refused with one.
    """

    layout: Layout
    bucket_of: np.ndarray
    lengths: np.ndarray

    def load(self, index: int, bucket: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Arrays of one example, with the shapes of its bucket. Raises ExampleError: there is
        nothing to learn from it; another stands in for it."""

    def check(self, model: nn.Module) -> None:
        """Raises UserError if the model cannot read these examples; those that it cannot read
        alone become `bad` ones of their source. May be left out."""

    def save_assets(self, folder: Path) -> None:
        """Writes what later runs need to read like these examples (a tokenizer). May be left out:
        a class that derives from this one inherits both."""


def measured(source: Source, longest: int, option: str, shortest: int = 1) -> np.ndarray:
    """Lengths of a source's examples, int64 [N], -1 of those that cannot be measured.

    Examples of more than `longest` units are bad from here on; option: where that limit is set. So
    are those of less than `shortest`, in which no model finds anything.
    """
    lengths = np.asarray(source.lengths())
    for i in np.flatnonzero((lengths >= 0) & (lengths < shortest)).tolist():
        text = f"has {lengths[i]:,} {source.codec.units}, needed {shortest:,}"
        reason = "too short" if lengths[i] else "empty"
        source.bad.setdefault(i, ExampleError(source.location(i), reason, text))
    for i in np.flatnonzero(lengths > longest).tolist():
        text = f"has {lengths[i]:,} {source.codec.units}, more than {option} allows"
        source.bad.setdefault(i, ExampleError(source.location(i), "too long", text))
    return lengths


def with_bad_ones(bucket_of: np.ndarray, bad: Collection[int]) -> np.ndarray:
    """`bucket_of` int [N], in which bad examples are in the bucket that most others are in.

    They keep their places in batches, where others stand in for them, so that a file that is
    damaged or mended later changes no other row.
    """
    bad, found = sorted(bad), np.array(bucket_of)
    good = np.delete(found, bad)
    if len(bad):
        found[bad] = np.bincount(good[good >= 0], minlength=1).argmax()
    return found


def check_varies(signal: np.ndarray, source: Source, index: int) -> None:
    """Raises ExampleError: all values of an example are equal, so there is nothing to predict."""
    flat = signal.reshape(-1)
    start = flat[:1000]  # is enough for nearly all
    if len(flat) and (start == flat[0]).all() and (flat == flat[0]).all():
        text = f"all its values are {flat[0]:g}"
        raise ExampleError(source.location(index), "constant", text)


class Inputs(Examples, Protocol):
    """Whole inputs of a source (in `source`), one row each, for fine-tuning."""

    def prepare(
        self, index: int, item: Mapping[str, Any], bucket: int, rng: np.random.Generator
    ) -> dict[str, np.ndarray]:
        """Arrays of the decoded example `item`, number `index` of the source."""


def same_inputs(model: nn.Module, inputs: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
    """The default of `Inference.prepare`: inputs as they are."""
    return inputs


@dataclass(frozen=True)
class Inference:
    """How `data2vec_jax.load` calls a model on a user's arrays."""

    input: str
    """Name of the batch's main array, the one that a user gives: 'audio', 'tokens', ..."""
    example: Callable[[Any], Mapping[str, jax.ShapeDtypeStruct]]
    """model -> the smallest batch that it can be initialised with."""
    forward: Callable[..., Outputs] = outputs.forward
    """(config, model, parameters, inputs) -> Outputs: a pure function, which is compiled. The
    config is a converted one (see `data2vec_jax.convert`); inputs are the main array and the
    optional `padding`, `mask` and others that the modality knows."""
    prepare: Callable[..., Mapping[str, np.ndarray]] = same_inputs
    """(model, inputs) -> inputs in the form that `forward` reads (channels last, ...). Raises
    UserError for arrays that the model cannot read."""
    examples: Callable[[Any, str], dict[str, Any]] = lambda model, folder: {}
    """(model, folder of its checkpoint) -> options of section `examples` that it reads alone: the
    size of images, its tokenizer."""
    random_inputs: Callable[..., Mapping[str, np.ndarray]] | None = None
    """(config, model, random generator) -> a small random batch, for `convert --verify`; None for
    two rows of normal numbers in the shapes of `example`."""


class Labelled(NamedTuple):
    """Examples with labels, for probes: arrays [N, ...], labels int [N] or [N, T], -1 for none.

    names: of the classes, () where they are not known. unknown: share of labels that are left out,
    of classes that no training example has.
    """

    inputs: Mapping[str, np.ndarray]
    labels: np.ndarray
    names: Sequence[str] = ()
    unknown: float = 0.0

    def take(self, rows: np.ndarray) -> "Labelled":
        """These examples, int [n], alone."""
        inputs = {name: x[rows] for name, x in self.inputs.items()}
        return self._replace(inputs=inputs, labels=self.labels[rows])


class HandMade(NamedTuple):
    """Features that need no learning: what a pretrained encoder must beat.

    name: for tables. make: (inputs of the training examples, inputs) -> float32 [N, F], or, where
    labels are of frames, [N, T, F] at those frames. Inputs are those of `Labelled`.
    """

    name: str
    make: Callable[[Mapping[str, np.ndarray], Mapping[str, np.ndarray]], np.ndarray]


class Drawing(NamedTuple):
    """How the report shows an example: as a picture, or as words.

    picture: inputs of an example -> uint8 [height, width, 1 or 3], or float [height, width], which
      is drawn in a scale of colours. The positions of a mask lie over it: a row of T, or a grid.
    turned: time runs down both picture and grid, and is to run to the right.
    words: (examples, inputs of an example) -> the text at each position, '' for padding. Where it
      is given there is no picture.
    """

    picture: Callable[[Mapping[str, np.ndarray]], np.ndarray] | None = None
    turned: bool = False
    words: Callable[[Any, Mapping[str, np.ndarray]], Sequence[str]] | None = None


@dataclass(frozen=True)
class Bench:
    """How the benchmark makes random batches of a modality, and scales their examples.

    Its functions get copies of config sections, which they may change and return.
    """

    # (section `examples`, on a CPU?) -> the section with its longest examples alone; for a CPU no
    # longer than it can do in seconds.
    one_length: Callable[[dict, bool], dict] = lambda examples, cpu: examples
    cpu_rows: int = 2  # of a batch on a CPU
    # Section `model` -> lowest and, exclusive, highest of random integers in a batch.
    integers: Callable[[dict], tuple[int, int]] = lambda model: (4, 255)
    # Config -> length of an example in the modality's units, and (config, share) -> the config with
    # this share of it: the axis 'length' of a sweep. None: there is no such axis.
    length: Callable[[dict], float] | None = None
    scale_length: Callable[[dict, float], dict] | None = None
    # (examples, texts or `FilePart` of each) -> (index, bucket) -> an example as tensors, as users
    # of PyTorch read it, without our code: for `--data-only --peer`. What it returns is pickled.
    peer: Callable[[Any, Sequence[Any]], Callable[[int, int], Any]] | None = None


@dataclass(frozen=True)
class Learned:
    """What `prepare` learns from a corpus for runs to take (a tokenizer), in a folder beside it.

    name: of the folder, and in the manifest. options: a frozen dataclass, as `Codec.conversion`;
    nothing is learned where all are at their defaults. learn: (options, source of a split's shards,
    empty folder) -> what the manifest says. Raises UserError: it cannot be learned.
    """

    name: str
    options: Callable[..., Any]
    learn: Callable[[Any, Source, Path], Mapping[str, Any]]


@dataclass(frozen=True)
class Modality:
    """One kind of signal.

    codec: how it is read from files and records; the published sets and shipped samples.
    model: (**section `model`, dtype) -> a `models.base.Model`, or a frozen dataclass whose fields
      are these options and whose method `make()` returns one. It has the methods
      `features(batch, key)` -> Tokens, `encode(tokens, mask, key, record, collect, keep)` ->
      Encoded and, without parameters, `mask_shape(shapes)`: positions of a mask or sides of their
      grid; with `frontend_params`, the name of the parameters that `features` reads; and, if its
      inputs are padded, with `padding` (see `Padding`) and `valid_lengths(batch)`.
    layout: (**section `examples`) -> Layout, or a frozen dataclass whose fields are these options
      and which has a layout's attributes, too.
    examples: (source, like=None, **section `examples`) -> Examples. With `like`, the training
      examples, nothing is random and what they learned from the data (a tokenizer) is kept.
    labelled: (source, like, **section `examples`) -> Labelled, of a source that has labels; by
      default `examples` as they are in evaluation, with their classes.
    check_labels: of such a source, raises UserError if it has none that `labelled` can use; by
      default every example must have a class.
    hand_made: features that probes put beside the encoder's; None if none are known.
    drawing: how the report shows its examples; None: it does not.
    input_layout, inputs: as `layout` and `examples`, of whole inputs (`Inputs`) for fine-tuning;
      None if it cannot be fine-tuned.
    learned_mask: section `model` has the option `mask_embedding`, a vector for masked positions (in
      1.0); it is turned off where a model of 2.0 loses its decoder, in fine-tuning.
    embedding_params: path pattern of the parameters before the blocks, which learn the slowest
      under `layerwise_lr`, in fine-tuning.
    flops: (model, shapes of one example, masked positions, tokens that the student sees) -> forward
      FLOPs: 'frontend', 'encoder' (of the whole input), 'student' (of one masked input, from the
      front end's output to the predictions).
    corrupt: (model, batch, mask, draw) -> (what the student sees, what the teacher sees, mask of
      the loss), where masks change the *input* (text); None where they change the features.
    bench: how the benchmark scales the examples.
    published_scores: (config, split, metric) -> the paper's score of a fine-tuning config's task in
      per cent, None if it has none.
    inference: how `data2vec_jax.load` calls the model; None if checkpoints cannot be loaded.
    learned: what `prepare` can learn from a corpus; None: nothing.
    write_processor: (converted config, model, folder) adds the files with which Hugging Face
      prepares inputs for an exported model, where the folder does not have them; None for none.
    """

    name: str
    codec: Codec
    model: Callable[..., Any]
    layout: Callable[..., Layout]
    examples: Callable[..., Examples]
    flops: Callable[..., Mapping[str, float]]
    labelled: Callable[..., Labelled] | None = None
    hand_made: HandMade | None = None
    drawing: Drawing | None = None
    input_layout: Callable[..., Layout] | None = None
    inputs: Callable[..., Inputs] | None = None
    learned_mask: bool = False
    embedding_params: str = EMBEDDING_PARAMS
    corrupt: Callable[..., Any] | None = None
    bench: Bench = Bench()
    check_labels: Callable[[Source], None] = check_classes
    published_scores: Callable[[Mapping[str, Any], str, str], float | None] | None = None
    inference: Inference | None = None
    learned: Learned | None = None
    write_processor: Callable[..., None] | None = None


def names() -> list[str]:
    """Modalities that come with the package: the folders beside this file."""
    return sorted(path.parent.name for path in Path(__file__).parent.glob("*/modality.py"))


def get(name: str) -> Modality:
    """The record of the modality `name`, the value of `config.modality`.

    name: a folder beside this file, or the dotted path of an importable module of the user's own
    that holds `MODALITY`, itself or in its submodule `modality`.
    Raises UserError: there is no such folder or module, or no `MODALITY` in it.
    """
    shipped = names()
    if name in shipped:
        return importlib.import_module(f"{__package__}.{name}.modality").MODALITY
    parts = name.split(".")
    known = all(part.isidentifier() for part in parts)
    if not known or (len(parts) == 1 and importlib.util.find_spec(name) is None):
        raise UserError(
            f"config.modality: no modality '{name}'{nearest(name, shipped)}; "
            "one of your own is the dotted path of its module"
        )
    module = _import_own(name)
    if not hasattr(module, "MODALITY") and hasattr(module, "__path__"):
        inner = f"{name}.modality"
        module = _import_own(inner) if importlib.util.find_spec(inner) else module
    found = getattr(module, "MODALITY", None)
    if not isinstance(found, Modality):
        raise UserError(f"config.modality: module {name} has no MODALITY, a contract.Modality")
    return found


def _import_own(name: str) -> Any:
    """A module of the user's own. Raises UserError: it, or one that it imports, is not found."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = error.name
        if name == missing or name.startswith(f"{missing}."):
            raise UserError(
                f"config.modality: cannot import '{name}', there is no module {missing} in the "
                "current folder, in PYTHONPATH, or installed"
            ) from None
        raise UserError(
            f"config.modality: cannot import '{name}', it needs the module {missing}"
        ) from None
    except ImportError as error:
        raise UserError(f"config.modality: cannot import '{name}': {error}") from None


# What padded positions take part in. 'exact': nothing. 'reference', as in the authors' 1.0 code:
# zeroed at the start, and part of all statistics. 'attention', as in their 2.0 code: kept out of
# attention only.
Padding = Literal["exact", "reference", "attention"]


def make_model(modality: Modality, options: Options, dtype: Any = jnp.float32) -> nn.Module:
    """The model of a modality. options: config section `model`. dtype: of the computation."""
    made = build(modality.model, "model", options, dtype=dtype)
    return made if isinstance(made, nn.Module) else made.make()


def build(
    module: Callable[..., Any], section: str, options: Mapping[str, Any] | None, **given: Any
) -> Any:
    """`module(**options, **given)` after checking the keys of the config section; None for None."""
    if options is None:
        return None
    check_section(section, options, module, given=given)
    return module(**options, **given)
