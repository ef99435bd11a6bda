"""What the demo's glosses hold: word vectors of their co-occurrences, averaged and probed.

    python launch/experiments/word_vectors.py

Positive pointwise mutual information of tokens that share a gloss, and its singular vectors
(Levy and Goldberg, 2014): no labels, a minute of linear algebra. The labels and held-out examples
are those of sweep.py, so its rows of `demo:text,v2` compare with what this prints.
"""

import numpy as np
import sweep  # makes this checkout importable
from scipy.sparse.linalg import svds

from data2vec_jax.cli.arguments import parse
from data2vec_jax.cli.output import run_main
from data2vec_jax.modalities.contract import Labelled
from data2vec_jax.modalities.text.data import SPECIAL, tf_idf
from data2vec_jax.tasks import pretrain, probe

CONFIG = "demo:text,v2"
WIDTHS = 48, 96, 192


def counts(data: Labelled, vocabulary: int) -> np.ndarray:
    """How often each text has each token, special ones left out: float32 [N, V]."""
    found = np.stack([np.bincount(row, minlength=vocabulary) for row in data.inputs["tokens"]])
    found[:, :SPECIAL] = 0
    return found.astype(np.float32)


def shares(x: np.ndarray) -> np.ndarray:
    """Rows [N, V] of sum 1 (or 0)."""
    return x / np.maximum(x.sum(1, keepdims=True), 1)


def word_vectors(x: np.ndarray, width: int) -> np.ndarray:
    """Of counts [N, V]: [V, width], the first singular vectors of the positive PMI, times the
    roots of their singular values."""
    has = (x > 0).astype(np.float32)
    together = has.T @ has
    np.fill_diagonal(together, 0)
    margin = together.sum(1)
    expected = np.maximum(np.outer(margin, margin) / margin.sum(), 1e-9)
    pmi = np.log(np.maximum(together / expected, 1))  # below 1 it would be negative
    vectors, values, _ = svds(pmi, k=width, random_state=0)
    return vectors * np.sqrt(values)


def main() -> None:
    """The command: see the module's docstring."""

    def command():
        config, _ = parse(["word_vectors", f"--config={CONFIG}", "--workdir=-"])
        modality, _ = pretrain.make_model(config)
        whole = probe.labelled(modality, config, ("train",))[0]
        parts = sweep.halves(whole, sweep.LABELS["text"])
        size = config["model"]["vocab_size"]
        both = [shares(counts(part, size)) for part in parts]
        of_all = counts(whole, size)
        vectors = {f"word vectors of {n}": word_vectors(of_all, n) for n in WIDTHS}
        vectors["random vectors of 192"] = np.random.default_rng(0).normal(size=(size, 192))
        features = {"TF-IDF": [tf_idf(parts[0].inputs, part.inputs) for part in parts]}
        features |= {name: [x @ of_words for x in both] for name, of_words in vectors.items()}
        for name, sides in features.items():
            rows = [
                probe.Rows({name: x.astype(np.float32)}, part.labels, np.arange(len(x)))
                for x, part in zip(sides, parts, strict=True)
            ]
            found = probe.judge(*rows)
            print(f"{name}: linear {found['linear_probe']:.1%}, k-NN {found['knn']:.1%}")

    run_main(command)


if __name__ == "__main__":
    main()
