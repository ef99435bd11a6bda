"""Mixtures of corpora: their addresses, classes and shares; and the same batches whoever reads."""

import functools
import itertools
import json
import pickle
import shutil
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from configs_for_tests import Items, config_of
from PIL import Image

from data2vec_jax import train
from data2vec_jax.core import bad_examples
from data2vec_jax.core.errors import UserError
from data2vec_jax.data import sources
from data2vec_jax.data.batches import HostBatchReader, TrainSampler
from data2vec_jax.data.readers import stream
from data2vec_jax.data.sources import check_held_out, open_source
from data2vec_jax.data.sources.base import Corpora
from data2vec_jax.data.sources.mixture import Mixture
from data2vec_jax.modalities import contract
from data2vec_jax.modalities.text.codec import CODEC as TEXT
from data2vec_jax.tasks import classify, pretrain, probe
from data2vec_jax.tasks.finetune import resolve_config

# Addresses and examples ---------------------------------------------------------------------------


def write_texts(folder, classes, split=""):
    """Two texts of each class, as folders."""
    rng = np.random.default_rng(len(classes))
    for name in classes:
        for i in range(2):
            path = folder / split / name / f"{i}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            words = ["".join(rng.choice(list("abcdefg"), 4)) for _ in range(20)]
            path.write_text(f"{name} {i} of {folder.name} {' '.join(words)}\n")
    return f"folder:{folder}"


@pytest.mark.parametrize(
    "place, split, message",
    [
        ("3*folder:{a}", "train", "has one corpus; wanted 'mix:WEIGHT.ADDRESS;WEIGHT.ADDRESS', in"),
        ("folder:{a};1*folder:{b}", "train", "'folder:.*' is no weight above 0 and an address"),
        ("0*folder:{a};1*folder:{b}", "train", "is no weight above 0"),
        ("-1*folder:{a};1*folder:{b}", "train", "is no weight above 0"),
        ("inf*folder:{a};1*folder:{b}", "train", "is no weight above 0"),
        ("1*;1*folder:{b}", "train", "is no weight above 0 and an address"),
        ("1*folder:{a};1*folder:{b};", "train", "'' is no weight"),
        ("1*folder:{a};1*folder:{b}", "x;y;z", "3 splits .* for 2 corpora; name one for all, or"),
        ("1*folder:{a};1*folder:{b}", ";", "no corpus has a split in ';'"),
        ("1*folder:{a};1*foldr:{b}", "train", "unknown kind 'foldr'.*did you mean 'folder'"),
        ("1*folder:{a};1*folder:{b}/none", "train", "no folder '.*/none'"),
        ("1*mix:1*folder:{a};1*folder:{b}", "train", "mix:1.folder:.* has one corpus"),
    ],
)
def test_a_wrong_address_is_one_line(place, split, message, tmp_path):
    for name in "ab":
        write_texts(tmp_path / name, ["x", "y"])
    uri = "mix:" + place.format(a=tmp_path / "a", b=tmp_path / "b")
    with pytest.raises(UserError, match=message) as found:
        open_source(uri, split, codec=TEXT)
    assert len(str(found.value).splitlines()) == 1


def test_corpora_follow_each_other_and_classes_are_united_by_name(tmp_path):
    a = write_texts(tmp_path / "a", ["dog", "cat"])
    b = write_texts(tmp_path / "b", ["ant", "dog"], "train")
    (tmp_path / "c.csv").write_text("text\nno class\n")
    mixed = open_source(
        f"mix:1*{a}; 2.5*{b};1*manifest:{tmp_path}/c.csv", "train;train;x", codec=TEXT
    )
    alone = [open_source(a, codec=TEXT), open_source(b, codec=TEXT)]
    assert mixed.label_names == ("ant", "cat", "dog") and len(mixed) == 9
    items = [(s, i) for s in alone for i in range(len(s))]
    for index, (source, i) in enumerate(items):
        assert mixed[index]["text"] == source[i]["text"]
        assert mixed.location(index) == source.location(i)
        name = source.label_names[source[i]["label"]]
        assert mixed.label_names[mixed[index]["label"]] == name
        assert mixed.field(index, "label") == mixed.column("label")[index] == mixed[index]["label"]
    assert mixed.column("label")[8] is mixed.field(8, "label") is None
    assert mixed.corpora.corpus_of.tolist() == [0] * 4 + [1] * 4 + [2]
    np.testing.assert_allclose(mixed.corpora.shares, [1 / 4.5, 2.5 / 4.5, 1 / 4.5])
    again = pickle.loads(pickle.dumps(mixed))
    before = mixed.digest()
    assert again[5] == mixed[5] and again.digest() == before
    (tmp_path / "b/train/ant/0.txt").write_text("shorter\n")
    assert open_source(mixed.uri, mixed.split, codec=TEXT).digest() != before
    some = open_source(f"mix:1*{a};2*{b}", ";train", codec=TEXT)  # of one corpus there is no such
    assert len(some) == 4 and list(some.corpora.shares) == [1.0]
    with pytest.raises(UserError, match="prepare each corpus of its own, and mix the shards"):
        next(mixed.stored())


def test_lists_of_classes_are_united_and_numbers_beside_names_are_none():
    def source(names, *items):
        made = Items([{"audio": np.zeros(3), **item} for item in items])
        made.label_names = names
        return made

    clips = source(("Dog", "Cat"), {"labels": [0, 1]}, {"labels": [1]})
    words = source(("Yes", "Dog"), {"label": 1}, {"label": 0})
    numbers = source(None, {"label": 1, "labels": [0]})
    mixed = Mixture("mix:", "train", [clips, words, numbers], [1, 1, 1])
    assert mixed.label_names == ("Cat", "Dog", "Yes")
    assert [mixed[i].get("labels") for i in range(5)] == [[1, 0], [0], None, None, [None]]
    assert [mixed[i].get("label") for i in range(5)] == [None, None, 1, 2, None]
    known = sources.by_name(clips, ("Yes", "Cat"))
    assert known[1]["labels"] == [1]
    with pytest.raises(UserError, match="unknown label 'Dog'") as found:
        known[0]
    assert found.value.reason == sources.UNKNOWN
    plain = Mixture("mix:", "train", [numbers, numbers], [1, 1])  # nobody has names
    assert plain.label_names is None and [x["label"] for _, x in plain.items()] == [1, 1]


# Shares -------------------------------------------------------------------------------------------


def ids_of(sampler, epoch):
    """The ids of each batch of an epoch."""
    first = epoch * sampler.per_epoch
    return [sampler(n)[1] for n in range(first, first + sampler.per_epoch)]


def mixed_sampler(sizes, shares, rows=4, bucket_of=None, **options):
    corpus_of = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)
    bucket_of = np.zeros(len(corpus_of), np.int32) if bucket_of is None else bucket_of
    buckets = range(1, 2 + bucket_of.max())
    options = {"seed": 0, "equal_rows": True} | options
    return TrainSampler(bucket_of, buckets, rows, corpora=Corpora(corpus_of, shares), **options)


def test_a_small_corpus_is_repeated_and_a_large_one_seen_in_part():
    sampler = mixed_sampler([6, 18], (0.5, 0.5))
    assert sampler.per_epoch == 6 and sampler.passes.tolist() == [2.0, 12 / 18]
    large = Counter()
    for epoch in range(3):
        batches = ids_of(sampler, epoch)
        seen = Counter(np.concatenate(batches).tolist())
        assert {i: seen[i] for i in range(6)} == dict.fromkeys(range(6), 2)
        part = Counter({i: n for i, n in seen.items() if i >= 6})
        assert part.total() == 12
        if epoch == 0:
            assert set(part.values()) == {1}
        large += part
        if epoch == 1:
            assert set(large) == set(range(6, 24))  # all, before the second pass is over
    assert set(large.values()) == {2} and len(large) == 18
    orders = [np.concatenate(ids_of(sampler, epoch)).tolist() for epoch in range(3)]
    assert orders[0] != orders[1] != orders[2]
    other = mixed_sampler([6, 18], (0.5, 0.5), seed=1)
    assert orders[0] != np.concatenate(ids_of(other, 0)).tolist()


def test_corpora_lie_evenly_over_the_batches():
    """Of 120 batches drawn at random, some would have fewer than 2 of 8 rows, or more than 6."""
    sampler = mixed_sampler([60, 180], (0.5, 0.5), rows=8)
    counts = [(ids < 60).sum() for epoch in range(4) for ids in ids_of(sampler, epoch)]
    assert len(counts) == 120 and np.mean(counts) == 4 and 2 <= min(counts) <= max(counts) <= 6


@pytest.mark.parametrize("shares", [(0.2, 0.3, 0.5), (0.9, 0.05, 0.05), (1 / 3, 1 / 3, 1 / 3)])
def test_every_bucket_has_the_shares(shares):
    rng, sizes = np.random.default_rng(1), (40, 333, 1000)
    bucket_of = rng.integers(3, size=sum(sizes)).astype(np.int32)
    sampler = mixed_sampler(sizes, shares, rows=8, bucket_of=bucket_of)
    corpus_of = np.repeat(np.arange(3), sizes)
    times = np.zeros(sum(sizes), int)
    for epoch in range(4):
        found = Counter()
        for n in range(epoch * sampler.per_epoch, (epoch + 1) * sampler.per_epoch):
            bucket, ids = sampler(n)
            assert (bucket_of[ids] == bucket).all()
            times += np.bincount(ids, minlength=len(times))
            found.update((bucket, int(c)) for c in corpus_of[ids])
        for bucket, corpus in itertools.product(range(3), range(3)):
            members = ((corpus_of == corpus) & (bucket_of == bucket)).sum()
            wanted = len(bucket_of) * shares[corpus] * members / sizes[corpus]
            # But for a fraction of a draw, and the rows that fill no last batch of a bucket.
            assert wanted - 9 <= found[bucket, corpus] <= wanted + 1
    for corpus in range(3):
        for bucket in range(3):
            own = times[(corpus_of == corpus) & (bucket_of == bucket)]
            assert own.max() - own.min() <= 5, "one is drawn more often than another"


def test_what_is_not_mixed_is_as_it_was():
    """Order and stand-ins of the version before there were mixtures."""
    bucket_of = np.array([-1] * 3 + [0] * 41 + [1] * 25)
    for corpora in (None, Corpora(np.zeros(69, np.int32), (1.0,))):
        sampler = TrainSampler(bucket_of, [2, 4], 4, 7, 4, corpora=corpora)
        assert sampler.digest() == "9e960d1d1212a1a4"
        assert sampler(0)[1].tolist() == [18, 31, 34, 8, 7, 33, 30, 15]
        assert sampler(20)[1].tolist() == [9, 14, 40, 39, 31, 4, 18, 13]
        assert sampler.stand_in(3, 1, 0) == 46


def test_weights_sizes_and_corpora_are_in_the_digest():
    options = [((6, 18), (0.5, 0.5)), ((6, 18), (0.4, 0.6)), ((7, 17), (0.5, 0.5))]
    found = {mixed_sampler(*each).digest() for each in options}
    found.add(TrainSampler(np.zeros(24), [1], 4, 0, equal_rows=True).digest())
    assert len(found) == 4


def test_a_stand_in_is_of_the_same_corpus():
    sampler = mixed_sampler([6, 18], (0.5, 0.5))
    for n, row, attempt in itertools.product(range(8), range(4), range(5)):
        ids = sampler(n)[1]
        found = sampler.stand_in(n, row, attempt)
        assert (found < 6) == (ids[row] < 6) and found not in ids


def test_a_corpus_without_examples_and_weights_of_classes_are_refused():
    with pytest.raises(UserError, match="no example of corpus 2 of the mixture can be used"):
        mixed_sampler([4, 4], (0.5, 0.5), bucket_of=np.array([0] * 4 + [-1] * 4))
    with pytest.raises(UserError, match="balanced_draws: a mixture has weights already; use 0"):
        mixed_sampler([4, 4], (0.5, 0.5), weights=np.ones(8), draws=4)


def test_an_example_that_is_twice_in_a_batch_is_drawn_anew():
    """A corpus of one example, which fills half of each batch."""
    sampler = mixed_sampler([1, 7], (0.5, 0.5))
    load = lambda index, bucket, rng: {"x": rng.random(2)}  # noqa: E731
    batch = HostBatchReader(sampler, SimpleNamespace(load=load))(0)
    rows = batch["x"][batch["example_id"] == 0]
    assert len(rows) == 2 and not np.array_equal(*rows)
    half = HostBatchReader(sampler, SimpleNamespace(load=load), own=[1], count=2)(0)
    np.testing.assert_array_equal(half["x"], batch["x"][2:])  # whoever reads the rows before


# Who reads ----------------------------------------------------------------------------------------

RECIPES = {"speech": "speech_v1", "vision": "vision_v1", "text": "text_v1", "sound": "sound_v2"}
OPTIONS = {"speech": {"crops": (1.0, 2.0)}, "vision": {"jitter": 0.4, "flip": 0.5}}
COUNT, BLOCKS = 4, 4  # batches, and blocks of their rows


@pytest.fixture(scope="module")
def plans():
    """(modality, whether it is a mixture) -> (sampler, examples) of the shipped samples."""
    found = {}
    for name, mixed in itertools.product(RECIPES, (False, True)):
        config, modality = config_of(RECIPES[name]).to_dict(), contract.get(name)
        data = pretrain.DataConfig(**config["data"] | {"batch_size": 4, "rows_multiple_of": 4})
        uri, split = data.source, data.split
        if mixed:
            uri = f"mix:1*{uri};3*{uri}"
            split = "train" if name == "sound" else "train;test"
        source = open_source(uri, split, codec=modality.codec)
        examples = modality.examples(source, **config["examples"] | OPTIONS.get(name, {}))
        found[name, mixed] = pretrain.plan_of(source, examples, data, 3), examples
    return found


@pytest.fixture(scope="module")
def read(plans):
    """own blocks -> batch n of all plans, in one dict."""

    def reader(own=range(BLOCKS)):
        readers = {key: HostBatchReader(*plan, own, BLOCKS) for key, plan in plans.items()}
        return lambda n: {
            (*key, name): array for key, each in readers.items() for name, array in each(n).items()
        }

    return reader


@pytest.fixture(scope="module")
def batches(read):
    return [read()(n) for n in range(2, 2 + COUNT)]


@pytest.mark.parametrize("workers", [0, 1, 4])
def test_batches_are_the_same_for_any_workers(workers, read, batches):
    """Bit for bit, of every modality, with and without a mixture, from the middle of a run on."""
    options = dict(workers=workers, prefetch=2, place=lambda batch: batch)
    for batch, wanted in zip(stream(read(), 2, 2 + COUNT, **options), batches, strict=True):
        assert batch.keys() == wanted.keys() and len(RECIPES) * 2 * 2 <= len(batch)
        for key, array in wanted.items():
            np.testing.assert_array_equal(batch[key], array, str(key))


@pytest.mark.parametrize("hosts", [[[0, 1, 2, 3]], [[0, 1], [2, 3]], [[0], [1], [2], [3]]])
def test_batches_are_the_same_for_any_hosts(hosts, plans, batches):
    """Each host opens the corpora for itself; together their rows are the batch."""
    plans = pickle.loads(pickle.dumps(plans))
    for key, plan in plans.items():
        parts = [HostBatchReader(*plan, own, BLOCKS)(2) for own in hosts]
        for name in parts[0]:
            whole = np.concatenate([part[name] for part in parts])
            np.testing.assert_array_equal(whole, batches[0][*key, name], f"{key} {name}")


@pytest.mark.parametrize("name", RECIPES)
def test_each_modality_draws_the_shares(name, plans):
    sampler, examples = plans[name, True]
    corpus_of = examples.corpora.corpus_of if name == "text" else examples.source.corpora.corpus_of
    drawn = np.concatenate([sampler(n)[1] for n in range(4 * sampler.per_epoch)])
    rows = max(sampler.rows) * len(sampler.rows) / len(drawn)
    assert abs((corpus_of[drawn] == 1).mean() - 0.75) < rows


@pytest.mark.parametrize("name", RECIPES)
def test_the_draws_of_a_row_are_of_its_batch_and_id(name, plans, batches):
    """So of nothing else: not of rows that are read before, nor of the process that reads them."""
    sampler, examples = plans[name, True]
    batch = {k[2]: array for k, array in batches[0].items() if k[:2] == (name, True)}
    (field,) = batch.keys() - {"example_id"}
    bucket, ids = sampler(2)
    np.testing.assert_array_equal(batch["example_id"], ids)
    others = []
    for row, i in zip(batch[field], ids.tolist(), strict=True):
        (found, other) = (
            examples.load(i, bucket, np.random.default_rng((3, n, i)))[field] for n in (2, 3)
        )
        np.testing.assert_array_equal(found, row)
        others.append(np.array_equal(found, other))
    assert not any(others) if name in OPTIONS else all(others)


# Whole runs ---------------------------------------------------------------------------------------


def write_images(folder, count, seed):
    rng = np.random.default_rng(seed)
    folder.mkdir()
    for i in range(count):
        Image.fromarray(rng.integers(256, size=(28, 28), dtype=np.uint8)).save(
            folder / f"{i:02}.png"
        )
    return f"folder:{folder}"


def vision_run(tmp_path, **data):
    """A config of four steps on a mixture of two folders, of 12 and 5 images, one of them bad."""
    a, b = (write_images(tmp_path / name, n, n) for name, n in (("a", 12), ("b", 5)))
    (tmp_path / "b/03.png").write_bytes(b"no image")
    config = config_of("vision_v1", total_steps=4, eval_every=4, log_every=1)
    options = {"source": f"mix:1*{a};1*{b}", "eval_split": None, "max_bad_share": 0.2}
    config.data.update(options | data)
    config.checkpoint.every = 2
    return config.to_dict()


@pytest.mark.usefixtures("light_compilation")
def test_a_run_on_a_mixture_resumes_names_bad_examples_and_notices_changes(tmp_path):
    config, whole, again = vision_run(tmp_path), tmp_path / "whole", tmp_path / "again"
    run = functools.partial(train.train, programs={}, verbose=False)

    def outcome(workdir):
        lines = [json.loads(x) for x in (workdir / "metrics.jsonl").read_text().splitlines()]
        numbers = [(line["step"], line["loss"]) for line in lines if line["split"] == "train"]
        return numbers, (workdir / bad_examples.FILE).read_text()

    run(config, whole)
    numbers, lines = outcome(whole)
    assert [step for step, _ in numbers] == [1, 2, 3, 4]
    (row,) = [json.loads(line) for line in lines.splitlines()]
    assert (row["example_id"], row["path"]) == (12 + 3, str(tmp_path / "b/03.png"))

    shutil.copytree(whole, again)
    shutil.rmtree(next(again.glob("checkpoints/4*")))
    run(config, again)
    assert outcome(again) == (numbers, lines)

    shutil.rmtree(next(again.glob("checkpoints/4*")))
    (tmp_path / "b/04.png").unlink()
    with pytest.raises(UserError, match=r"corpus has changed since step 2: it was 17 .* now 16"):
        run(config, again)
    config["data"]["source"] = config["data"]["source"].replace("mix:1*", "mix:2*")
    with pytest.raises(UserError, match=r"another config \(config.data.source differs\)"):
        run(config, again)


def test_notes_say_what_is_drawn(tmp_path):
    notes = "\n".join(pretrain.make(vision_run(tmp_path)).notes)
    assert f"50 % of what is drawn is of folder:{tmp_path}/a train, 12 examples" in notes
    assert f"50 % of what is drawn is of folder:{tmp_path}/b train, 5 examples" in notes
    assert "passes through the corpora of the mixture in an epoch: 0.708, 1.7" in notes


def test_held_out_examples_of_a_mixture(tmp_path):
    """Those of a folder without splits are its training examples, in a mixture too."""
    with pytest.raises(UserError, match=r"eval_split: 'test' of .*/b is the training examples"):
        pretrain.make(vision_run(tmp_path, split="train", eval_split=";test"))


def text_run(tmp_path, **data):
    for name, classes in (("a", ["dog", "cat"]), ("b", ["ant", "dog"])):
        for split in ("train", "test"):
            write_texts(tmp_path / name, classes, split)
    config = config_of("finetune_text").to_dict()
    config["head"]["classes"], config["model"]["vocab_size"] = 3, 290
    config["examples"]["vocab_size"] = 290
    uri = f"mix:3*folder:{tmp_path}/a;1*folder:{tmp_path}/b"
    config["data"] |= {"source": uri, "share": 1.0, "batch_size": 8} | data
    return config


def test_fine_tuning_on_a_mixture(tmp_path):
    config = text_run(tmp_path, eval_split="test;,;test", rows_multiple_of=8)
    task = classify.make(resolve_config(config))
    assert list(task.evals) == ["test;", ";test"]
    task.save_assets(tmp_path)
    assert json.loads((tmp_path / "labels.json").read_text()) == ["ant", "cat", "dog"]
    config["data"]["balanced_draws"] = 4
    with pytest.raises(UserError, match="balanced_draws: a mixture has weights already"):
        classify.make(resolve_config(config))
    config["data"]["balanced_draws"] = 0
    (tmp_path / "c.csv").write_text("text\nno class\n")
    config["data"]["source"] += f";1*manifest:{tmp_path}/c.csv"
    with pytest.raises(UserError, match=r"c.csv:2: no label"):
        classify.make(resolve_config(config))


def test_probes_of_a_mixture_know_the_classes_of_all(tmp_path):
    config = config_of("text_v1").to_dict()
    data = text_run(tmp_path)["data"]
    config["data"] |= {"source": data["source"]}
    config["examples"] = {"lengths": (32,), "vocab_size": 290}
    train_part, test_part = probe.labelled(contract.get("text"), config, ("train", "test"))
    assert train_part.names == test_part.names == ("ant", "cat", "dog")
    assert Counter(test_part.labels.tolist()) == {0: 2, 1: 2, 2: 4}


@pytest.mark.parametrize("mode", ["complete_doc", "none"])
def test_no_row_of_text_has_documents_of_two_corpora(mode):
    texts = [["one two three"] * 5, ["four five"] * 9]
    parts = [Items([{"text": text} for text in each], field="text") for each in texts]
    options = {"lengths": (16,), "mode": mode, "vocab_size": 280}
    modality = contract.get("text")
    mixed = modality.examples(Mixture("mix:", "train", parts, [1, 1]), **options)
    rows = []
    for part in parts:
        alone = modality.examples(part, like=mixed, **options)
        rows += [alone.blocks[i].tolist() for i in range(len(alone.blocks))]
    assert [mixed.blocks[i].tolist() for i in range(len(mixed.blocks))] == rows
    counts = np.bincount(mixed.corpora.corpus_of)
    assert counts.sum() == len(rows) and len(counts) == 2


def test_pairs_and_single_texts_are_not_mixed(tmp_path):
    (tmp_path / "pairs.csv").write_text("text,pair,label\n" + "a,b,x\n" * 4)
    (tmp_path / "single.csv").write_text("text,label\n" + "a,x\n" * 4)
    uri = f"mix:1*manifest:{tmp_path}/single.csv;1*manifest:{tmp_path}/pairs.csv"
    source = sources.open_source(uri, codec=TEXT)
    contract.get("text").inputs(source, lengths=(16,), vocab_size=264)
    assert sorted(source.bad) == [0, 1, 2, 3]
    assert "single.csv:2: has no second text (a column `pair`)" in str(source.bad[0])
    check_held_out(source, source, "")
