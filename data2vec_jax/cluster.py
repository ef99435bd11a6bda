"""Labels of frames, which HuBERT predicts: clusters of MFCC, or of what a block of a checkpoint
makes of the whole input (baselines spec 5).

    python -m data2vec_jax.cluster --source=manifest:/data/librispeech/train.tsv --workdir=LABELS
    python -m data2vec_jax.cluster --source=... --workdir=LABELS2 --checkpoint=RUN --block=6 \
        --clusters=500

Then train with --config.examples.labels=LABELS. Needs scikit-learn. MFCC have 13 numbers with first
and second differences, 100 times a second; frames of a checkpoint are 50 a second, in pieces of up
to 32 s. Centroids are fitted to --share of the examples of the first of --splits, whose frames are
held in memory: a tenth of 960 h is 5 GB of MFCC, and 53 GB of a base model's frames. The same
command goes on where it was stopped, and with other --splits adds them.
"""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from data2vec_jax import evaluate
from data2vec_jax.cli.arguments import Arguments, user_path
from data2vec_jax.cli.output import run_main, say
from data2vec_jax.core import checkpoints, distributed, lock, step_folder
from data2vec_jax.core.errors import ExampleError, UserError
from data2vec_jax.core.files import read_json, write_json
from data2vec_jax.data.fbank import mfcc, with_differences
from data2vec_jax.data.frame_labels import ABOUT, files_of, order_of
from data2vec_jax.data.sources import Source, open_source
from data2vec_jax.modalities.speech.codec import CODEC, RATE
from data2vec_jax.modalities.speech.data import normalise
from data2vec_jax.tasks import pretrain

PART = 500  # examples whose labels are written at once
Features = Callable[[np.ndarray], np.ndarray]  # a waveform [S] -> float32 [T, D]


def of_mfcc(audio: np.ndarray) -> np.ndarray:
    """[S] -> float32 [T, 39]."""
    return with_differences(mfcc(audio))


def of_block(workdir: str, block: int) -> tuple[Features, float]:
    """What block `block` (from 1) of a run's newest checkpoint makes of a waveform, and frames a
    second. Raises UserError: the run has no such block, or another modality.

    A program is compiled for each length of a piece; lengths are 1/2, 1, 2, ... 32 seconds.
    """
    _, config, mesh = evaluate.open_run(workdir, {})
    if config["modality"] != "speech":
        raise UserError(f"--checkpoint={workdir}: its modality is {config['modality']}, not speech")
    model = pretrain.make_model(config)[1]
    if not 1 <= block <= model.encoder.depth:
        raise UserError(f"--block={block}: the encoder has {model.encoder.depth} blocks")
    with jax.set_mesh(mesh):
        params = evaluate.load_params(workdir, pretrain.abstract_task(config), config, mesh)
    hop = model.frontend.hop
    lengths = [round(RATE * 2.0**n) // hop * hop for n in range(-1, 6)]

    @jax.jit
    def run(params, audio):
        tokens = model.apply({"params": params}, {"audio": audio}, method="features")
        out = model.apply({"params": params}, tokens, method="encode", collect=True)
        return out.layers[block - 1][0]

    def features(audio):
        frames, audio = model.frontend.frames(len(audio)), normalise(audio)
        size = max((n for n in lengths if n <= len(audio)), default=len(audio))
        found: list[np.ndarray] = []  # of each frame
        # Pieces share as much as the first and the next frame: none is left out between them.
        starts = range(0, len(audio) - size, max(size - hop, 1))
        for start in (*starts, (len(audio) - size) // hop * hop) if frames > 0 else ():
            piece = np.asarray(run(params, audio[None, start : start + size]), np.float32)
            found += list(piece[len(found) - start // hop :])
        found += found[-1:] * (frames - len(found))  # the last samples may be one more frame
        return np.array(found, np.float32)

    return features, RATE / hop


def newest(workdir: str) -> str:
    """What tells a run's newest checkpoint, or the one that `workdir` is, from all others."""
    folder = checkpoints.newest(workdir)
    return f"{workdir}, update {folder.name}, {step_folder.identity(folder)}"


def fit(source: Source, features: Features, clusters: int, share: float, seed: int) -> np.ndarray:
    """Centroids, float32 [clusters, D], of a random share of the examples. Settings: HuBERT's."""
    try:
        from sklearn.cluster import MiniBatchKMeans
    except ImportError:
        raise UserError("clusters need scikit-learn: pip install scikit-learn") from None
    chosen = np.random.default_rng(seed).permutation(len(source))
    found = [of_example(source, int(i), features) for i in chosen[: math.ceil(share * len(source))]]
    found = [x for x in found if len(x)]
    if sum(map(len, found)) < clusters:
        raise UserError(
            f"--clusters={clusters}: more than the {sum(map(len, found))} frames; use fewer, or a "
            "larger --share"
        )
    means = MiniBatchKMeans(
        clusters,
        n_init=20,
        max_iter=100,
        batch_size=10_000,
        tol=0.0,
        max_no_improvement=100,
        reassignment_ratio=0.0,
        compute_labels=False,
        random_state=seed,
    )
    return means.fit(np.concatenate(found)).cluster_centers_.astype(np.float32)


def of_example(source: Source, index: int, features: Features) -> np.ndarray:
    """Features [T, D] of an example, none ([0, 0]) if it cannot be read or has no frame."""
    try:
        return features(np.asarray(source[index][source.codec.field]))
    except ExampleError as error:
        source.bad[index] = error
        return np.zeros((0, 0), np.float32)


def nearest_centroid(x: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """int16 [T]: the number of the centroid [C, D] nearest to each of x [T, D]."""
    if not len(x):
        return np.zeros(0, np.int16)
    return np.argmin(np.sum(centroids**2, 1) - 2 * x @ centroids.T, 1).astype(np.int16)


def save(path: Path, array: np.ndarray) -> None:
    """Writes an array to a file that is complete or absent."""
    draft = path.with_name(f".{path.name}.partial.npy")
    np.save(draft, array)
    os.replace(draft, path)


def label(source: Source, features: Features, centroids: np.ndarray, folder: Path) -> int:
    """Writes the labels of a split, in parts, of which those that are there stay; returns their
    number."""
    file, offsets = files_of(folder, source.split)
    order = hashlib.sha256(order_of(source).encode()).hexdigest()[:12]
    parts = file.with_suffix(f".{order}.parts")  # those of other examples stay apart
    parts.mkdir(exist_ok=True)
    starts = range(0, len(source), PART)
    for start in starts:
        path = parts / f"{start}.npy"
        if path.exists():
            continue
        rows = range(start, min(start + PART, len(source)))
        found = [nearest_centroid(of_example(source, i, features), centroids) for i in rows]
        # One array, for a part is complete or absent: the counts of its examples, then labels.
        counts = np.array([len(x) for x in found], np.int32)
        save(path, np.concatenate([counts, *found], dtype=np.int32))
        say(f"{source.split}: {rows.stop} of {len(source)} examples")
    whole = [np.load(parts / f"{start}.npy") for start in starts]
    sizes = [min(PART, len(source) - start) for start in starts]
    counts = np.concatenate([x[:n] for x, n in zip(whole, sizes, strict=True)])
    labels = [x[n:].astype(np.int16) for x, n in zip(whole, sizes, strict=True)]
    save(file, np.concatenate(labels))
    save(offsets, np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]))
    shutil.rmtree(parts)
    return int(counts.sum())


def cluster(
    folder: Path, sources: Sequence[Source], made: Mapping[str, Any], features: Any
) -> None:
    """Fits centroids and writes labels of all sources, but for what is there already.

    made: what the labels depend on, for `labels.json`. Raises UserError: the folder has others, or
    centroids that were fitted to other examples.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with lock.exclusive(folder):
        about = folder / ABOUT
        orders = {source.split: order_of(source) for source in sources}
        held = read_json(about) if about.exists() else dict(made)
        splits = held.pop("splits", {})
        first = sources[0].split
        # Folders from before there was an entry 'fitted' are taken as they are.
        fitted = held.pop("fitted", {}) if about.exists() else {first: orders[first]}
        if held != made:
            raise UserError(f"--workdir={folder}: holds labels that were made otherwise: {about}")
        for split, order in fitted.items():
            if orders.get(split, order) != order:
                raise UserError(
                    f"--workdir={folder}: its centroids were fitted to other examples of '{split}' "
                    f"than those of {sources[0].uri}; choose another folder"
                )
        made = {**made, "fitted": fitted}
        options = {key: made[key] for key in ("clusters", "share", "seed")}
        if not (folder / "centroids.npy").exists():
            write_json(about, {**made, "splits": {}})
            save(folder / "centroids.npy", fit(sources[0], features, **options))
        centroids = np.load(folder / "centroids.npy")
        for source in sources:
            order = orders[source.split]
            if splits.get(source.split, {}).get("order") != order:
                number = label(source, features, centroids, folder)
                splits[source.split] = dict(order=order, labels=number, without=len(source.bad))
                write_json(about, {**made, "splits": splits})
            say(f"{source.split}: {json.dumps(splits[source.split])}")


def main(argv: Sequence[str] | None = None) -> None:
    """The command: see the module's docstring."""
    parser = Arguments(prog="python -m data2vec_jax.cluster", description="Labels of frames.")
    parser.add_argument("--source", required=True, metavar="KIND:PLACE", help="of data.source")
    parser.add_argument("--workdir", required=True, metavar="DIR", type=user_path)
    parser.add_argument("--splits", default="train", help="a,b: the first is fitted")
    parser.add_argument("--clusters", type=int, default=100)
    parser.add_argument("--share", type=float, default=0.1, help="of examples that are fitted")
    parser.add_argument("--checkpoint", metavar="RUN", help="a pretraining run; without: MFCC")
    parser.add_argument("--block", type=int, default=6, help="of its encoder, from 1")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    if not (2 <= options.clusters <= 2**15 and 0 < options.share <= 1 and options.seed >= 0):
        raise UserError("--clusters is from 2 to 32,768, --share above 0 to 1, --seed 0 or more")
    features, rate, of = of_mfcc, 100.0, {"features": "mfcc"}
    if options.checkpoint:
        features, rate = of_block(options.checkpoint, options.block)
        identity = newest(options.checkpoint)
        of = {"features": "block", "checkpoint": identity, "block": options.block}
    sources = [open_source(options.source, s, codec=CODEC) for s in options.splits.split(",")]
    fitted = {"clusters": options.clusters, "share": options.share, "seed": options.seed}
    cluster(options.workdir, sources, {"rate": rate, **fitted, **of}, features)


if __name__ == "__main__":
    with distributed.failing_together():
        run_main(main)
