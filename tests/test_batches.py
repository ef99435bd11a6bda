"""Global batches: a pure function of their number, whatever reads them."""

import jax
import numpy as np
import pytest
from threadpoolctl import threadpool_info, threadpool_limits

from data2vec_jax.core.errors import UserError
from data2vec_jax.data.batches import HostBatchReader, TrainSampler, global_shapes
from data2vec_jax.data.readers import stream
from data2vec_jax.modalities.contract import Layout


class Numbers:
    """Examples whose array says which example, bucket and draw it is."""

    layout = Layout([2, 4], [{"x": jax.ShapeDtypeStruct((n,), np.float64)} for n in (2, 4)])

    def __init__(self, lengths):
        self.lengths = np.asarray(lengths)
        self.bucket_of = np.searchsorted(self.layout.buckets, self.lengths, "right") - 1

    def load(self, index, bucket, rng):
        x = np.full(self.layout.buckets[bucket], float(index))
        x[-1] = rng.random()
        return {"x": x}


def sampler_of(lengths, **options):
    return TrainSampler(
        Numbers(lengths).bucket_of,
        [2, 4],
        **{"batch_size": 4, "seed": 0, "rows_multiple_of": 4} | options,
    )


LENGTHS = [1] * 3 + [2] * 30 + [3] * 11 + [4] * 21 + [9] * 4


def test_an_epoch_holds_each_example_at_most_once():
    sampler = sampler_of(LENGTHS)
    assert sampler.rows == [8, 4]
    assert sampler.per_epoch == 41 // 8 + 25 // 4
    seen = np.concatenate([sampler(n)[1] for n in range(sampler.per_epoch)])
    assert len(seen) == len(set(seen.tolist())) == 5 * 8 + 6 * 4
    for n in range(sampler.per_epoch):
        bucket, ids = sampler(n)
        assert (sampler.bucket_of[ids] == bucket).all()
    assert not set(seen.tolist()) & {0, 1, 2}  # too short for any bucket


def test_epochs_and_seeds_differ_and_repeat():
    sampler = sampler_of(LENGTHS)
    ids = [sampler(n)[1].tolist() for n in range(3 * sampler.per_epoch)]
    again = [sampler_of(LENGTHS)(n)[1].tolist() for n in range(3 * sampler.per_epoch)]
    other = [sampler_of(LENGTHS, seed=1)(n)[1].tolist() for n in range(sampler.per_epoch)]
    assert ids == again
    assert ids[: sampler.per_epoch] != ids[sampler.per_epoch : 2 * sampler.per_epoch]
    assert ids[: sampler.per_epoch] != other
    # What one epoch leaves out is not left out for ever.
    assert len({i for batch in ids for i in batch}) > len(
        {i for batch in ids[: sampler.per_epoch] for i in batch}
    )


def test_a_bucket_too_small_for_a_batch_moves_down():
    sampler = sampler_of([2] * 16 + [4] * 3)
    assert sampler.batches == [2, 0]
    assert len(global_shapes(sampler, Numbers([2] * 16 + [4] * 3))) == 1
    with pytest.raises(UserError, match=r"19 examples .* do not fill one batch"):
        sampler_of([2] * 16 + [4] * 3, batch_size=64)


@pytest.mark.parametrize("owners", [[[0, 1, 2, 3]], [[0, 1], [2, 3]], [[0, 2], [1, 3]]])
def test_processes_read_their_own_rows(owners):
    examples, sampler = Numbers(LENGTHS), sampler_of(LENGTHS)
    whole = HostBatchReader(sampler, examples)
    for n in (0, 7, sampler.per_epoch + 1):
        batch = whole(n)
        for own in owners:
            part = HostBatchReader(sampler, examples, own, count=4)(n)
            for key in ("x", "example_id"):
                blocks = np.split(batch[key], 4)
                np.testing.assert_array_equal(np.concatenate([blocks[i] for i in own]), part[key])
        assert batch["example_id"].dtype == np.uint32
        np.testing.assert_array_equal(batch["x"][:, 0], batch["example_id"])


def test_the_digest_tells_orders_apart():
    assert sampler_of(LENGTHS).digest() == sampler_of(list(LENGTHS)).digest()
    others = [
        sampler_of(LENGTHS, seed=1),
        sampler_of(LENGTHS[::-1]),
        sampler_of(LENGTHS, batch_size=8),
    ]
    assert len({sampler.digest() for sampler in (sampler_of(LENGTHS), *others)}) == 4


def test_draws_differ_between_epochs():
    examples = Numbers([2] * 8)
    read = HostBatchReader(sampler_of([2] * 8), examples)
    first, second = (
        {int(i): row[-1] for i, row in zip(batch["example_id"], batch["x"], strict=True)}
        for batch in (read(0), read(1))
    )
    assert first.keys() == second.keys()
    assert all(first[i] != second[i] for i in first)


def test_stream_starts_anywhere():
    read = HostBatchReader(sampler_of(LENGTHS), Numbers(LENGTHS))
    options = dict(workers=0, prefetch=2, place=lambda batch: batch)
    whole = [b["x"] for b in stream(read, 0, 12, **options)]
    tail = [b["x"] for b in stream(read, 5, 12, **options)]
    assert len(whole) == 12 and len(tail) == 7
    for a, b in zip(whole[5:], tail, strict=True):
        np.testing.assert_array_equal(a, b)


def test_too_few_examples_and_none_that_is_long_enough():
    few, short = np.zeros(5, np.int32), np.full(5, -1, np.int32)
    with pytest.raises(UserError, match=r"5 examples \(5 long enough\) do not fill one batch of 8"):
        TrainSampler(few, (100,), 8, seed=0)
    with pytest.raises(UserError, match=r"none of the 5 examples .* shorter than 100,"):
        TrainSampler(short, (100,), 8, seed=0)


def test_products_have_one_thread_until_the_last_reader_ends():
    """Two streams that end in the order in which they began."""

    def threads():
        return {x["num_threads"] for x in threadpool_info() if x["user_api"] == "blas"}

    with threadpool_limits(limits=2, user_api="blas"):
        read = lambda n: {"n": np.array([n, *threads()])}  # noqa: E731
        options = {"workers": 0, "prefetch": 2, "place": lambda x: x}
        first, second = (stream(read, 0, 50, **options) for _ in range(2))
        seen = [next(first)["n"][1], next(second)["n"][1]]
        first.close()
        seen.append(next(second)["n"][1])
        assert seen == [1, 1, 1] and threads() == {1}
        second.close()
        assert threads() == {2}
