"""Pictures of what a pretrained encoder does with held-out examples: neighbours, features, masks.

N examples or frames, T positions of an example, D width.

A modality says how an example is drawn (`contract.Drawing`); the rest is the same for all.
"""

import base64
import io
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from data2vec_jax import evaluate, masking
from data2vec_jax.core.errors import UserError
from data2vec_jax.data.sources import Subset, open_source
from data2vec_jax.modalities.contract import Drawing, Labelled, Modality
from data2vec_jax.tasks import pretrain, probe

SEED = 0  # of the choice of examples, and of masks
HELD_OUT = 1_000  # examples among which neighbours are sought, at most
FRAMES = 3_000  # the same, where labels are of frames
QUERIES, NEIGHBOURS = 8, 5
EXAMPLES = 6  # with feature maps and masks
FITTED = 192  # examples to which the colours of feature maps are fitted
MASKS = 3  # of each
AROUND = 12  # frames on either side of a frame that is shown as a neighbour
LARGEST = 160  # pixels a side; larger pictures are reduced
WORDS = 24  # of a text among neighbours, at most
LEVELS = 32  # of a scale of colours: fewer compress better


@dataclass(frozen=True)
class Tile:
    """One picture or text, and what is written below it.

    image: a data URI, '' for a text. words: of a text, (word, CSS style, '' for none). same: it has
    the class of the query; None where that is not asked. strip: the image is one row of pixels.
    """

    image: str
    words: Sequence[tuple[str, str]]
    caption: str
    same: bool | None = None
    strip: bool = False


@dataclass(frozen=True)
class Pictures:
    """Rows of tiles. agreement: a sentence on all neighbours, not only on those that are shown.

    wide: tiles of an example are wide, and stand below each other.
    """

    neighbours: Sequence[Sequence[Tile]]
    agreement: str
    maps: Sequence[Sequence[Tile]]
    masks: Sequence[Sequence[Tile]]
    wide: bool


def pictures(
    workdir: Path, step: int, block: str, source: str | None = None, split: str = "test"
) -> Pictures | None:
    """Pictures of a pretraining run's checkpoint; None if its modality has no drawing.

    block: features for neighbours and maps, a name of `probe.make_encode`; a class token's stands
      for its block in maps. source: of examples with labels, whose training split is `train`; None
      for that of pretraining. split: of it.
    Raises UserError: the checkpoint or the data are not there, or the split has no labels.
    """
    place = workdir / "checkpoints" / str(step)
    changes = {"data.source": source, "data.split": "train"} if source else {}
    _, config, mesh = evaluate.open_run(str(place), changes)
    modality, model = pretrain.make_model(config)
    if modality.drawing is None:
        return None
    like = probe.training_examples(modality, config)
    held_out = open_source(config["data"]["source"], split, codec=modality.codec)
    modality.check_labels(held_out)
    held_out = Subset(held_out, probe.spaced(np.arange(len(held_out)), HELD_OUT))
    data = probe.of_source(modality, config, held_out, like)
    encode, artist = probe.make_encode(model), Artist(modality.drawing, like, model, data)
    with jax.set_mesh(mesh):
        task = pretrain.abstract_task(config)
        params = evaluate.load_params(str(place), task, config, mesh)
        rows, agreement = neighbours(encode, params, data, block, artist)
        shown = one_of_each(data.labels.reshape(len(data.labels), -1)[:, 0], EXAMPLES)
        return Pictures(
            rows,
            agreement,
            feature_maps(encode, params, data, shown, block.partition(",")[0], artist),
            masked(config, modality, model, data, shown, artist),
            artist.wide,
        )


# Examples -----------------------------------------------------------------------------------------


class Artist:
    """Draws examples of `data`, by number, as the modality's `drawing` says.

    examples: training examples, which know how words are written. model: says which positions an
    example has.
    """

    def __init__(self, drawing: Drawing, examples: Any, model: Any, data: Labelled):
        self._drawing, self._examples, self._data = drawing, examples, data
        shape = model.mask_shape(data.inputs)
        self.grid = (1, shape) if isinstance(shape, int) else tuple(shape)
        self.wide = not self.is_text and (self.grid[0] == 1 or self.picture(0).shape[1] > 200)

    @property
    def is_text(self) -> bool:
        return self._drawing.words is not None

    def inputs(self, i: int) -> dict[str, np.ndarray]:
        return {name: x[i] for name, x in self._data.inputs.items()}

    def picture(self, i: int) -> np.ndarray:
        """uint8 [height, width, 3] of example i."""
        x = np.asarray(self._drawing.picture(self.inputs(i)))
        return self._turned(heat(x) if x.dtype.kind == "f" else np.repeat(x, 3 // x.shape[-1], -1))

    def words(self, i: int) -> Sequence[str]:
        """The text at each position of example i."""
        return self._drawing.words(self._examples, self.inputs(i))

    def over(self, values: np.ndarray) -> np.ndarray:
        """Values of positions [T, ...] -> [rows, columns, ...] as they lie over the picture."""
        return self._turned(values.reshape(*self.grid, *values.shape[1:]))

    def _turned(self, x: np.ndarray) -> np.ndarray:
        return np.rot90(x) if self._drawing.turned else x

    def plain(self, i: int, caption: str, same: bool | None = None) -> Tile:
        """Example i as it is."""
        if self.is_text:
            words = [(word, "") for word in self.words(i) if word]
            cut = [("…", "")] if len(words) > WORDS else []
            return Tile("", words[:WORDS] + cut, caption, same)
        return Tile(data_uri(self.picture(i)), (), caption, same)

    def around(self, i: int, frame: int, caption: str, same: bool | None) -> Tile:
        """A part of the picture of example i, with position `frame` of a row of T in its middle."""
        picture, count = self.picture(i), self.grid[1]
        width = picture.shape[1]
        left, right = ((frame + d) * width // count for d in (-AROUND, AROUND + 1))
        before, after = max(-left, 0), max(right - width, 0)  # black, beyond its ends
        part = picture[:, max(left, 0) : right]
        return Tile(data_uri(np.pad(part, ((0, 0), (before, after), (0, 0)))), (), caption, same)

    def coloured(self, i: int, colours: np.ndarray, caption: str) -> Tile:
        """Positions of example i in `colours`, uint8 [T, 3]; words are underlined by them."""
        if self.is_text:
            words = zip(self.words(i), colours, strict=True)
            style = "border-bottom: .25em solid rgb({}, {}, {})"
            return Tile("", [(word, style.format(*c)) for word, c in words if word], caption)
        return Tile(data_uri(self.over(colours)), (), caption, strip=self.grid[0] == 1)

    def hidden(self, i: int, mask: np.ndarray, caption: str) -> Tile:
        """Example i with the masked positions, bool [T], covered."""
        if self.is_text:
            style = "background: var(--muted); color: var(--muted)"
            words = zip(self.words(i), mask, strict=True)
            return Tile("", [(word, style if m else "") for word, m in words if word], caption)
        picture = self.picture(i)
        cover = resized(self.over(mask), picture.shape[:2])
        return Tile(data_uri(np.where(cover[..., None], COVER, picture)), (), caption)


COVER = np.uint8((150, 158, 168))  # the colour of masked positions


def caption_of(data: Labelled, i: int) -> str:
    """The class of example i, or those of its frames, each once in a row."""
    labels = np.atleast_1d(data.labels[i])
    found = [name_of(data, label) for label, _ in itertools.groupby(labels) if label >= 0]
    return " ".join(found)


def name_of(data: Labelled, label: int) -> str:
    return str(data.names[label]) if len(data.names) else str(label)


def one_of_each(labels: np.ndarray, count: int) -> np.ndarray:
    """Random rows of labels [N], of `count` different classes in order, or of all and others."""
    order = np.random.default_rng(SEED).permutation(len(labels))
    _, first = np.unique(labels[order], return_index=True)
    others = np.setdiff1d(np.arange(len(labels)), first)
    first = first[np.linspace(0, len(first) - 1, min(count, len(first))).astype(int)]
    return order[np.concatenate([first, others])[:count]]


# Neighbours ---------------------------------------------------------------------------------------


def neighbours(
    encode: probe.Encode, params: Any, data: Labelled, block: str, artist: Artist
) -> tuple[list[list[Tile]], str]:
    """Rows of a query and its nearest neighbours by cosine, from other examples; and a sentence.

    Where labels are of frames, so are queries and neighbours.
    """
    pooled = data.labels.ndim == 1
    rows = probe.read(
        lambda inputs: {"x": encode.candidates(params, inputs, pooled)[block]}, data, FRAMES
    )
    labels = data.labels.reshape(-1)
    place = probe.spaced(np.flatnonzero(labels >= 0), FRAMES)  # of the rows, as `read` takes them
    frame = place % (labels.size // len(data.labels))
    nearest = nearest_of(rows.x["x"], rows.example, NEIGHBOURS)
    same = rows.y[nearest] == rows.y[:, None]  # [N, NEIGHBOURS]

    def tile(row: int, same: bool | None = None) -> Tile:
        caption = name_of(data, rows.y[row])
        if pooled:
            return artist.plain(rows.example[row], caption, same)
        return artist.around(rows.example[row], frame[row], caption, same)

    found = [
        [tile(query), *(tile(n, bool(s)) for n, s in zip(nearest[query], same[query], strict=True))]
        for query in one_of_each(rows.y, QUERIES)
    ]
    chance = np.square(np.bincount(rows.y) / len(rows.y)).sum()
    what = "examples" if pooled else "frames (in the middle of what is shown)"
    return found, (
        f"{100 * same.mean():.1f} % of the {NEIGHBOURS} nearest of all {len(rows.y):,} {what} have"
        f" the class of the query (by chance {100 * chance:.1f} %)."
    )


def nearest_of(x: np.ndarray, example: np.ndarray, count: int) -> np.ndarray:
    """Rows nearest to each row of features [N, D] by cosine, of other examples: int [N, count].

    Raises UserError: there are too few examples.
    """
    if len(np.unique(example)) <= count:
        raise UserError(f"{len(np.unique(example))} held-out examples are too few for neighbours")
    (x,) = probe.scaled("all", x)
    x /= np.linalg.norm(x, axis=1, keepdims=True) + 1e-8
    similarity = x @ x.T
    similarity[example[:, None] == example] = -np.inf
    return np.argsort(-similarity, axis=1)[:, :count]


# Feature maps and masks ---------------------------------------------------------------------------


def feature_maps(
    encode: probe.Encode,
    params: Any,
    data: Labelled,
    shown: np.ndarray,
    block: str,
    artist: Artist,
) -> list[list[Tile]]:
    """The examples `shown`, and the principal components of their positions' features as colours.

    Of the front end, which sees no neighbours, and of `block`.
    """
    others = np.setdiff1d(probe.spaced(np.arange(len(data.labels)), FITTED), shown)
    inputs = data.take(np.concatenate([shown, others])).inputs
    found = encode.candidates(params, inputs, False)
    valid = encode.output(params, inputs)[1]
    valid = np.ones(found[block].shape[:2], bool) if valid is None else np.asarray(valid)
    colours = {name: components(np.asarray(found[name]), valid) for name in ("front end", block)}
    return [
        [
            artist.plain(i, caption_of(data, i)),
            *(artist.coloured(i, colour[n], name) for name, colour in colours.items()),
        ]
        for n, i in enumerate(shown)
    ]


def components(x: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """Features [N, T, D], valid [N, T] -> their three greatest principal components, uint8
    [N, T, 3], from the 2nd to the 98th percentile; grey where not valid.

    The mean over the examples at each position is subtracted, or else the colours say where a
    position is rather than what is there.
    """
    inside = valid[..., None]
    mean = (x * inside).sum(0, dtype=np.float64) / np.maximum(inside.sum(0), 1)  # [T, D]
    used = (x - mean)[valid]
    _, axes = np.linalg.eigh(used.T @ used)  # ascending
    axes = axes[:, ::-1].T
    scores = used @ axes[:3].T
    low, high = np.percentile(scores, (2, 98), axis=0)
    share = np.clip((scores - low) / np.maximum(high - low, 1e-12), 0, 1)
    colours = np.full((*valid.shape, 3), 128, np.uint8)
    colours[valid] = np.round(255 * share)
    return colours


def masked(
    config: Mapping[str, Any],
    modality: Modality,
    model: Any,
    data: Labelled,
    shown: np.ndarray,
    artist: Artist,
) -> list[list[Tile]]:
    """The examples `shown`, as they are and with masks of the config, drawn as in training; none if
    nothing is masked."""
    sampler = pretrain.make_objective(config, modality, model)[1](data.inputs)
    if sampler is None:
        return []
    count = len(shown)
    valid = model.valid_lengths({k: jnp.asarray(x[shown]) for k, x in data.inputs.items()})
    lengths = np.full(count, sampler.length) if valid is None else np.asarray(valid)
    ids = jnp.arange(count, dtype=jnp.uint32)
    masks = masking.sample(sampler, jax.random.key(SEED), 0, ids, MASKS, valid)
    masks = np.asarray(masks).reshape(count, MASKS, -1)  # [N, M, T]
    return [
        [
            artist.plain(i, caption_of(data, i)),
            *(
                artist.hidden(i, mask, f"{100 * mask.sum() / lengths[n]:.0f} % masked")
                for mask in masks[n]
            ),
        ]
        for n, i in enumerate(shown)
    ]


# Pixels -------------------------------------------------------------------------------------------


def heat(x: np.ndarray) -> np.ndarray:
    """float [height, width] -> uint8 [height, width, 3]: a scale from dark to light."""
    import matplotlib

    low, high = np.percentile(x, (1, 99))
    share = np.clip((x - low) / max(high - low, 1e-12), 0, 1)
    scale = np.uint8(255 * matplotlib.colormaps["magma"](np.linspace(0, 1, LEVELS))[:, :3])
    return scale[np.round(share * (LEVELS - 1)).astype(int)]


def resized(x: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """[rows, columns, ...] -> [*size, ...]; each value becomes a rectangle."""
    rows, columns = (np.arange(n) * old // n for n, old in zip(size, x.shape, strict=False))
    return x[rows[:, None], columns]


def data_uri(picture: np.ndarray) -> str:
    """uint8 [height, width, 3] -> a WebP file inside a page, at most `LARGEST` pixels a side."""
    from PIL import Image

    image = Image.fromarray(np.ascontiguousarray(picture))
    image.thumbnail((LARGEST, LARGEST))  # never larger
    small, file = image.width * image.height <= 64 * 64, io.BytesIO()
    image.save(file, "WEBP", lossless=small, quality=80, method=6)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()
