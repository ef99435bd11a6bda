"""Global batches as a pure function of their number.

The order of examples and the buckets of batches come from (seed, epoch) alone, the same on every
host; each process reads the rows that its devices hold. So the position in the data is one number,
and a run resumes on the next unseen batch with any number of processes.
"""

import functools
import hashlib
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from data2vec_jax.core.bad_examples import KEY as BAD
from data2vec_jax.core.bad_examples import BadExample, pack
from data2vec_jax.core.errors import ExampleError, UserError
from data2vec_jax.data.sources.base import Corpora

ATTEMPTS = 100  # to find an example that can be read, before a batch is given up
STAND_IN = 0x57A9D  # tells the generator of stand-ins from those of examples, (seed, n, id)
PASS = 0x9A55  # likewise, the generator of a pass through a corpus of a mixture
NO_EXAMPLE = 2**32 - 1  # example_id of a row of zeros, where an evaluation leaves one out


def rows_of(
    buckets: Sequence[int],
    batch_size: int,
    rows_multiple_of: int | None = None,
    equal_rows: bool = False,
) -> list[int]:
    """Rows per batch of each bucket, so that the total length of a batch stays about constant.

    buckets: static lengths. batch_size: rows of a batch of the longest bucket; a shorter bucket has
    as many more as fit into the same number of units (samples, tokens), rounded down to a multiple
    of `rows_multiple_of` (by default the greatest common divisor of `batch_size` and 8).
    equal_rows: `batch_size` rows of every bucket instead.
    """
    multiple = rows_multiple_of
    if batch_size < 1 or (multiple is not None and multiple < 1):
        raise UserError(
            f"config.data: batch_size={batch_size}, rows_multiple_of={multiple}; use 1 or more"
        )
    if equal_rows:
        return [batch_size] * len(buckets)
    multiple = multiple or math.gcd(batch_size, 8)
    if batch_size % multiple:
        raise UserError(f"config.data.batch_size: {batch_size} is no multiple of {multiple}")
    budget = batch_size * max(buckets)
    return [budget // length // multiple * multiple for length in buckets]


class TrainSampler:
    """The bucket and the examples of global batch n of training.

    bucket_of: int [N], bucket of each example, -1 for one that is left out. buckets, batch_size,
    rows_multiple_of, equal_rows: see `rows_of`.

    Every epoch is a new permutation. The examples that do not fill a last batch of their bucket are
    left out, others in each epoch. Where a bucket has too few examples for a single batch, they are
    cropped to the next shorter bucket, and left out if there is none. Examples that are `padded`
    cannot be cropped: there an underfull bucket absorbs the next shorter bucket.

    weights: float [N] above 0, of examples of one bucket. Then an epoch is `draws` of them without
    replacement, each next one with a probability in proportion to its weight.

    corpora: of a mixture. Then an epoch draws as many examples as there are, and each corpus has
    its share of them in every bucket that it is in. A corpus is read in passes, each a permutation
    of it that goes on in the next epoch: small ones are repeated, and of large ones others are seen
    in each epoch. The corpora lie evenly over the rows of a bucket's batches.

    rows: rows per batch of each bucket. batches: number of batches of each bucket in an epoch;
    per_epoch: of all. passes: float [K], through each corpus in an epoch.
    """

    def __init__(
        self,
        bucket_of: np.ndarray,
        buckets: Sequence[int],
        batch_size: int,
        seed: int,
        rows_multiple_of: int | None = None,
        padded: bool = False,
        equal_rows: bool = False,
        weights: np.ndarray | None = None,
        draws: int = 0,
        corpora: Corpora | None = None,
    ):
        self.rows = rows_of(buckets, batch_size, rows_multiple_of, equal_rows)
        self.seed, self.weights = seed, weights
        self.bucket_of = np.array(bucket_of, np.int32)
        self.corpus_of, shares = corpora or Corpora(np.zeros(len(self.bucket_of), np.int32), (1.0,))
        self.passes = np.ones(1)
        if len(shares) > 1:
            used = np.bincount(self.corpus_of[self.bucket_of >= 0], minlength=len(shares))
            if not used.all():
                raise UserError(
                    f"config.data.source: no example of corpus {np.argmin(used) + 1} of the "
                    f"mixture can be used: each is damaged, or shorter than {min(buckets):,}"
                )
            if weights is not None:
                raise UserError("config.data.balanced_draws: a mixture has weights already; use 0")
            self.passes = np.asarray(shares) * used.sum() / used
        for b in range(len(buckets))[::-1]:
            members = self.bucket_of == b
            if padded and members.any():
                lower = b
                while lower and self._draws(b) < self.rows[b]:
                    lower -= 1
                    self.bucket_of[self.bucket_of == lower] = b
            elif self._draws(b) < self.rows[b]:
                self.bucket_of[members] = b - 1
        sizes = np.array([self._draws(b) for b in range(len(buckets))])
        if weights is not None:
            if np.count_nonzero(sizes) > 1 or not 0 < draws <= sizes.sum():
                raise UserError(
                    f"config.data.balanced_draws: {draws} of {sizes.sum()} examples of "
                    f"{np.count_nonzero(sizes)} lengths; draw at most as many as there are, of one"
                )
            sizes = np.minimum(sizes, draws)
        self.batches = [int(n) // rows for n, rows in zip(sizes, self.rows, strict=True)]
        self.per_epoch = sum(self.batches)
        if not self.per_epoch:
            whole = np.count_nonzero(np.asarray(bucket_of) >= 0)
            if not whole:
                raise UserError(
                    f"none of the {len(self.bucket_of)} examples can be used: each is damaged, or "
                    f"shorter than {min(buckets):,}, the least that config.examples asks for"
                )
            raise UserError(
                f"{len(self.bucket_of)} examples ({whole} long enough) do not fill one "
                f"batch of {min(self.rows)}; lower config.data.batch_size"
            )
        self._epoch = functools.lru_cache(maxsize=2)(self._shuffle)

    def _draws(self, bucket: int) -> int:
        """How many examples of a bucket an epoch draws, at least."""
        members = np.bincount(self.corpus_of[self.bucket_of == bucket], minlength=len(self.passes))
        return int(np.floor(members * self.passes).sum())

    def digest(self) -> str:
        """A hash of everything that determines which examples each batch holds."""
        text = f"{self.seed} {self.rows} {self.batches} {len(self.bucket_of)} "
        data = text.encode() + self.bucket_of.tobytes()
        data += b"" if self.weights is None else self.weights.tobytes()
        if len(self.passes) > 1:
            data += self.corpus_of.tobytes() + self.passes.tobytes()
        return hashlib.sha256(data).hexdigest()[:16]

    def __getstate__(self):  # worker processes get the sampler, not its cache
        return {k: v for k, v in self.__dict__.items() if k != "_epoch"}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._epoch = functools.lru_cache(maxsize=2)(self._shuffle)

    def _shuffle(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The order of the examples, and (bucket, first example) of each batch of an epoch, int
        [batches, 2]."""
        rng = np.random.default_rng((self.seed, epoch))
        if len(self.passes) > 1:
            order = self._mixed(epoch, rng)
        else:
            order = np.arange(len(self.bucket_of), dtype=np.uint32)
            rng.shuffle(order)
        if self.weights is not None:
            # The largest of log-weights with Gumbel noise are such a sample (Efraimidis 2006); the
            # permutation hides that the heaviest come first in it.
            keys = np.log(self.weights) + rng.gumbel(size=len(order))
            keys[self.bucket_of < 0] = -np.inf
            count = sum(n * rows for n, rows in zip(self.batches, self.rows, strict=True))
            drawn = np.zeros(len(order), bool)
            drawn[np.argpartition(-keys, count - 1)[:count]] = True
            order = order[drawn[order]]
        bucket = self.bucket_of[order]
        sizes = np.multiply(self.batches, self.rows)
        chosen, batches, start = np.empty(sizes.sum(), np.uint32), [], 0
        for b, (size, rows) in enumerate(zip(sizes.tolist(), self.rows, strict=True)):
            chosen[start : start + size] = order[bucket == b][:size]
            first = np.arange(start, start + size, rows)
            batches.append(np.stack([np.full_like(first, b), first], axis=1))
            start += size
        batches = np.concatenate(batches)
        return chosen, batches[rng.permutation(len(batches))]

    def _mixed(self, epoch: int, rng: np.random.Generator) -> np.ndarray:
        """The examples of an epoch of a mixture, some more than once: uint32 [draws]."""
        found, places = [], []
        for k, b in itertools.product(range(len(self.passes)), range(len(self.rows))):
            members = np.flatnonzero((self.corpus_of == k) & (self.bucket_of == b))
            size, draws = len(members), float(len(members) * self.passes[k])
            if not size:
                continue
            first, end = math.floor(epoch * draws), math.floor((epoch + 1) * draws)
            count, passes = end - first, range(first // size, -(-end // size))
            rngs = [np.random.default_rng((PASS, self.seed, k, b, each)) for each in passes]
            drawn = [members[:0], *(each.permutation(members) for each in rngs)]
            found.append(np.concatenate(drawn)[first - passes.start * size :][:count])
            places.append((np.arange(count) + rng.random(count)) / count)
        order = np.argsort(np.concatenate(places), kind="stable")
        return np.concatenate(found)[order].astype(np.uint32)

    def __call__(self, n: int) -> tuple[int, np.ndarray]:
        """Bucket and example ids (uint32 [rows]) of global batch `n`, counted from 0."""
        epoch, i = divmod(n, self.per_epoch)
        order, batches = self._epoch(epoch)
        bucket, start = batches[i].tolist()
        return bucket, order[start : start + self.rows[bucket]]

    def stand_in(self, n: int, row: int, attempt: int) -> int:
        """The example in place of one that cannot be read, in a row of global batch `n`.

        attempt: counted from 0. It is of the same bucket and corpus, and not in the batch already
        if that can be. A function of the seed and the arguments, so all other rows and batches stay
        the same.
        """
        bucket, ids = self(n)
        corpus = self.corpus_of[ids[row]]
        members = np.flatnonzero((self.bucket_of == bucket) & (self.corpus_of == corpus))
        others = np.setdiff1d(members, ids)
        rng = np.random.default_rng((STAND_IN, self.seed, n, row, attempt))
        return int(rng.choice(others if len(others) else members))


def balanced_weights(classes: Sequence[Sequence[int]]) -> np.ndarray:
    """Weights [N] that draw rare classes more often: those of AST (arXiv 2104.01778) for AudioSet.

    classes: of each example. A weight is the sum of 1000 / (n + 0.01) over the example's classes,
    where n examples have the class. Raises UserError: an example has no class.
    """
    counts = np.bincount(np.concatenate([np.asarray(c, np.int64) for c in classes]))
    if not all(len(c) for c in classes):
        raise UserError("config.data.balanced_draws: an example has no class, so no weight")
    return np.array([np.sum(1000.0 / (counts[np.asarray(c)] + 0.01)) for c in classes])


class EvalSampler:
    """The bucket and the examples of batch n of an evaluation, in which each example comes once.

    The last batch of a bucket is filled up by repeating its last example. Examples of bucket -1 are
    left out. Arguments as of `TrainSampler`.
    """

    seed = 0

    def __init__(
        self,
        bucket_of: np.ndarray,
        buckets: Sequence[int],
        batch_size: int,
        rows_multiple_of: int | None = None,
        equal_rows: bool = False,
    ):
        self.rows = rows_of(buckets, batch_size, rows_multiple_of, equal_rows)
        self.batches = []
        for b, rows in enumerate(self.rows):
            ids = np.flatnonzero(np.asarray(bucket_of) == b).astype(np.uint32)
            for start in range(0, len(ids), rows):
                part = ids[start : start + rows]
                self.batches.append((b, np.pad(part, (0, rows - len(part)), "edge")))

    def __len__(self) -> int:
        return len(self.batches)

    def __call__(self, n: int) -> tuple[int, np.ndarray]:
        """Bucket and example ids of batch `n`."""
        return self.batches[n]

    def stand_in(self, n: int, row: int, attempt: int) -> None:
        """None: an evaluation leaves out what it cannot read."""


class HostBatchReader:
    """This process's rows of global batch n: {name: array [rows, ...]}. Can be pickled.

    A batch is cut into `count` equal blocks of rows; `own` are the numbers of those to be read.

    An example that cannot be read is replaced by the sampler's stand-in, whose id is then in
    `example_id`; in evaluation by zeros and the id `NO_EXAMPLE`. A batch in which this happened
    has the key `bad_examples` (`bad_examples.KEY`), uint8 [n], which names them.
    """

    def __init__(
        self,
        sampler: TrainSampler | EvalSampler,
        examples: Any,
        own: Sequence[int] = (0,),
        count: int = 1,
    ):
        self.sampler, self.examples = sampler, examples
        self.own, self.count = list(own), count

    def __call__(self, n: int) -> dict[str, np.ndarray]:
        n, bad = int(n), []
        bucket, ids = self.sampler(n)
        rows = np.arange(len(ids)).reshape(self.count, -1)[self.own].ravel()
        found = [self._read(n, bucket, int(row), ids, bad) for row in rows]
        first = found[0][1]
        batch = {name: np.stack([arrays[name] for _, arrays in found]) for name in first}
        batch["example_id"] = np.array([index for index, _ in found], np.uint32)
        return batch | ({BAD: pack(bad)} if bad else {})

    def _read(self, n, bucket, row, ids, bad):
        """(id, arrays) of a row's example, or of the one that stands in for it."""
        index = int(ids[row])
        again = int(np.sum(ids[:row] == index))  # a small corpus of a mixture may be repeated
        for attempt in range(ATTEMPTS):
            try:
                # The draws of an example depend on the batch's number and its id, not on its place.
                key = (self.sampler.seed, n, index)
                rng = np.random.default_rng((*key, again) if again else key)
                return index, self.examples.load(index, bucket, rng)
            except UserError as error:
                found = ExampleError.of(error, f"example {index}")
                bad.append(BadExample(n + 1, index, found.where, found.reason, str(error)))
            index = self.sampler.stand_in(n, row, attempt)
            if index is None:
                shapes = self.examples.layout.shapes[bucket]
                return NO_EXAMPLE, {k: np.zeros(s.shape, s.dtype) for k, s in shapes.items()}
        raise UserError(f"{ATTEMPTS} examples in a row cannot be read; the last: {bad[-1].message}")


def global_shapes(sampler: TrainSampler, examples: Any) -> list[dict[str, jax.ShapeDtypeStruct]]:
    """Shapes of the global batches of each bucket that has any."""
    return [
        batch_shapes(examples.layout.shapes[b], rows)
        for b, (rows, count) in enumerate(zip(sampler.rows, sampler.batches, strict=True))
        if count
    ]


def batch_shapes(
    example: Mapping[str, jax.ShapeDtypeStruct], rows: int
) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of `rows` examples, with their ids."""
    batch = {k: jax.ShapeDtypeStruct((rows, *s.shape), s.dtype) for k, s in example.items()}
    return batch | {"example_id": jax.ShapeDtypeStruct((rows,), np.uint32)}
