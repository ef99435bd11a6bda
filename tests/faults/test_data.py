"""One bad file among 40: it is left out, counted and named, and no other row of a batch changes.

`python tests/faults/test_data.py 4000` damages so many real files at random, and prints what the
decoders made of them, the slowest one, and the memory that one took.
"""

import gzip
import io
import json
import os
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import conftest  # noqa: F401  (its settings, before JAX starts)

import numpy as np
import pytest
import soundfile
from configs_for_tests import config_of
from PIL import Image, ImageOps

from data2vec_jax import train
from data2vec_jax.core import bad_examples
from data2vec_jax.core.errors import ExampleError, UserError
from data2vec_jax.data import batches, readers
from data2vec_jax.data.sources import open_source, write_array_record
from data2vec_jax.modalities import contract
from data2vec_jax.modalities.speech.data import WHOLE, normalise

RATE, COUNT, BAD, BATCHES = 16_000, 40, 17, 9
WORDS = ("the", "cat", "sat", "on", "a", "mat")
PROGRAMS = {}  # compiled once for all runs of this file
SPEECH, VISION, SOUND, TEXT = map(contract.get, ("speech", "vision", "sound", "text"))
OPTIONS = {
    "speech": {"crops": (0.2,)},
    "vision": {"image": 16},
    "sound": {"frames": 16, "min_samples": 2_000},
    "text": {"lengths": (16, 32), "vocab_size": 280},
}
AUDIO, IMAGES = ("wav", "flac", "ogg", "mp3"), ("png", "jpg", "gif", "webp", "tif", "bmp")


def tone(i, seconds=0.5):
    """Samples of example `i`: a tone and noise."""
    t = np.arange(int(seconds * RATE)) / RATE
    noise = np.random.default_rng(i).standard_normal(len(t))
    return (0.3 * np.sin(2 * np.pi * (200 + 20 * i) * t) + 0.02 * noise).astype(np.float32)


def pixels(i):
    return np.random.default_rng(i).integers(0, 255, (32, 24, 3), np.uint8)


def text(i):
    draw = random.Random(i)
    return "\n".join(" ".join(draw.choices(WORDS, k=9)) for _ in range(4))


def write(path, i):
    """Example `i` as a file of the suffix of `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".txt":
        path.write_text(text(i))
    elif path.suffix[1:] in AUDIO:
        soundfile.write(path, tone(i), RATE)
    else:
        Image.fromarray(pixels(i)).save(path)


def file_of(folder, suffix):
    """The file that becomes a bad one."""
    return folder / f"{BAD:02}.{suffix}"


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    """suffix -> a folder of 40 sound files; made once each."""
    made = {}

    def of(suffix):
        if suffix not in made:
            made[suffix] = tmp_path_factory.mktemp(suffix)
            for i in range(COUNT):
                write(made[suffix] / f"{i:02}.{suffix}", i)
        return made[suffix]

    return of


# The data half of a run ---------------------------------------------------------------------------


def reader_of(modality, source):
    """What reads the batches of a pretraining run."""
    examples = modality.examples(source, **OPTIONS[modality.name])
    layout = examples.layout
    plan = batches.TrainSampler(
        examples.bucket_of, layout.buckets, 8, 3, 4, getattr(layout, "padded", False)
    )
    return batches.HostBatchReader(plan, examples)


def read(modality, uri, *, start=0, workers=0):
    """(batches, {(id, reason, path) of bad examples}) of a run that begins with batch `start`."""
    source = open_source(uri, codec=modality.codec)
    reader = reader_of(modality, source)
    found, bad = [], {(i, error.reason, error.where) for i, error in source.bad.items()}
    stream = readers.stream(reader, start, BATCHES, workers=workers, prefetch=2, place=dict)
    for batch in stream:
        packed = batch.pop(bad_examples.KEY, None)
        for one in [] if packed is None else bad_examples.unpack(packed):
            assert one.message.startswith(one.path) and "\n" not in one.message
            bad.add((one.example_id, one.reason, one.path))
        found.append(batch)
    return found, bad


def compare(found, sound, bad=BAD):
    """All rows but those of the bad example are bitwise equal. Returns how many it had."""
    replaced = 0
    for batch, wanted in zip(found, sound, strict=True):
        rows = wanted["example_id"] != bad
        replaced += int((~rows).sum())
        assert not (batch["example_id"] == bad).any()
        for name, array in wanted.items():
            np.testing.assert_array_equal(batch[name][rows], array[rows])
    return replaced


_sound = {}


def sound_batches(modality, uri):
    """The batches of an undamaged corpus, read once."""
    if (modality.name, uri) not in _sound:
        found, bad = read(modality, uri)
        assert not bad and any((b["example_id"] == BAD).any() for b in found)
        _sound[modality.name, uri] = found
    return _sound[modality.name, uri]


# Kinds of bad files: what they do to a path that holds a sound one, and the reason given ----------


def of_bytes(change):
    return lambda path: path.write_bytes(bytes(change(bytearray(path.read_bytes()))))


def empty(path):
    path.write_bytes(b"")


def pipe(path):
    path.unlink()
    os.mkfifo(path)


def loop(path):
    path.unlink()
    path.symlink_to(path.name)


def dangling(path):
    path.unlink()
    path.symlink_to("gone")


def directory_link(path):
    path.unlink()
    path.symlink_to("/dev/zero")


def noise(data):
    return np.random.default_rng(0).bytes(len(data))


def set_field(at, value):
    """Writes bytes over a header."""

    def change(data):
        data[at : at + len(value)] = value
        return data

    return of_bytes(change)


ANY = {
    "empty file": (empty, "unreadable"),
    "head only": (of_bytes(lambda data: data[:20]), "unreadable"),
    "noise": (of_bytes(noise), "unreadable"),
    "a text": (lambda path: path.write_text("no such thing"), "unreadable"),
    "a pipe": (pipe, "not a file"),
    "a device": (directory_link, "not a file"),
    "a link to itself": (loop, "unreadable"),
    "a link to nothing": (dangling, "missing"),
}


def samples(change, **options):
    """Writes the tone's samples, changed."""
    return lambda path: soundfile.write(path, change(tone(BAD)), **({"samplerate": RATE} | options))


def with_value(value):
    def change(x):
        x[100] = value
        return x

    return samples(change, subtype="FLOAT")


def xing(path):
    """An MP3 whose header promises 2^31 frames."""
    data = bytearray(path.read_bytes())
    at = max(data.find(b"Xing"), data.find(b"Info"))
    data[at + 8 : at + 12] = b"\x7f\xff\xff\xff"
    path.write_bytes(bytes(data))


KINDS = {
    **{(suffix, name): kind for suffix in (*AUDIO, *IMAGES) for name, kind in ANY.items()},
    **{(s, "8 kHz"): (samples(lambda x: x, samplerate=8_000), "sample rate") for s in AUDIO},
    **{(s, "silence"): (samples(np.zeros_like), "constant") for s in ("wav", "flac")},
    ("wav", "a constant"): (samples(lambda x: x * 0 + 0.5), "constant"),
    ("wav", "cut"): (of_bytes(lambda data: data[:-4_000]), "damaged"),
    ("flac", "cut"): (of_bytes(lambda data: data[: len(data) // 2]), "unreadable"),
    ("flac", "promises 2^36 samples"): (set_field(22, b"\xff" * 4), "damaged"),
    ("mp3", "promises 2^31 frames"): (xing, "damaged"),
    ("wav", "NaN"): (with_value(np.nan), "not finite"),
    ("wav", "infinity"): (with_value(np.inf), "not finite"),
    ("wav", "two hours"): (lambda path: soundfile.write(path, _two_hours(), RATE), "too long"),
    ("flac", "two hours"): (lambda path: soundfile.write(path, _two_hours(), RATE), "too long"),
    **{(s, "cut"): (of_bytes(lambda d: d[: len(d) // 2]), "unreadable") for s in IMAGES[:1]},
    **{(s, "cut"): (of_bytes(lambda d: d[: len(d) // 2]), "unreadable") for s in IMAGES[1:]},
    **{
        (s, "one colour"): (lambda path: Image.new("RGB", (9, 9), (9, 9, 9)).save(path), "constant")
        for s in IMAGES
    },
    ("png", "wrong checksum"): (set_field(45, b"????"), "unreadable"),
    ("png", "10,000 x 10,000"): (
        lambda path: Image.new("1", (10_000, 10_000)).save(path),
        "too large",
    ),
    ("tif", "32 bits a pixel"): (lambda path: Image.new("F", (9, 9)).save(path), "format"),
}


def _two_hours():
    return np.zeros(2 * 3600 * RATE, np.int16)


BAD_FILES = [(SPEECH if key[0] in AUDIO else VISION, *key) for key in KINDS]
BAD_FILES += [(SOUND, *key) for key in KINDS if key[0] in AUDIO]


@pytest.mark.parametrize(
    "modality,suffix,kind", BAD_FILES, ids=[f"{m.name} {s} {kind}" for m, s, kind in BAD_FILES]
)
def test_one_bad_file_changes_no_other_row(corpora, modality, suffix, kind):
    folder = corpora(suffix)
    path, uri = file_of(folder, suffix), f"folder:{folder}"
    wanted = sound_batches(modality, uri)
    damage, reason = KINDS[suffix, kind]
    try:
        damage(path)
        begun = time.monotonic()
        found, bad = read(modality, uri)
        assert time.monotonic() - begun < 60  # it does not hang; a loaded machine is slow
    finally:
        path.unlink()
        write(path, BAD)
    assert compare(found, wanted) >= 1
    assert bad == {(BAD, reason, str(path))}


def coded(subtype, channels=1, container=None):
    """The same tone, coded otherwise; `container` whatever the name says."""

    def damage(path):
        x = np.stack([tone(BAD)] * channels, 1)
        soundfile.write(path, x, RATE, subtype=subtype, format=container)

    return damage


def painted(mode, **options):
    """The same picture in another mode."""
    return lambda path: Image.fromarray(pixels(BAD)).convert(mode).save(path, **options)


def films(path):
    """Two pictures in one file, of which the first is read."""
    first, second = (Image.fromarray(pixels(i)) for i in (BAD, 0))
    first.save(path, save_all=True, append_images=[second])


# Files that look odd and are sound: nothing is counted, and their example is read.
SOUND_FILES = {
    **{("wav", x): coded(x) for x in ("PCM_U8", "PCM_24", "PCM_32", "FLOAT", "DOUBLE")},
    **{("wav", x): coded(x) for x in ("ULAW", "ALAW", "IMA_ADPCM", "MS_ADPCM")},
    **{("wav", f"{n} channels"): coded("PCM_16", n) for n in (2, 6)},
    **{("wav", x): coded("PCM_16", container=x) for x in ("WAVEX", "RF64", "AIFF", "W64")},
    ("flac", "PCM_24"): coded("PCM_24"),
    ("flac", "2 channels"): coded("PCM_16", 2),
    ("ogg", "OPUS"): coded("OPUS"),
    ("ogg", "2 channels"): coded("VORBIS", 2),
    ("mp3", "2 channels"): coded("MPEG_LAYER_III", 2),
    **{("png", x): painted(x) for x in ("1", "L", "LA", "P", "RGBA")},
    ("png", "16 bits"): lambda path: Image.fromarray(
        (pixels(BAD).mean(-1) * 257).astype(np.uint16)
    ).save(path),
    **{("jpg", x): painted(x) for x in ("L", "CMYK")},
    ("jpg", "progressive"): painted("RGB", progressive=True),
    ("jpg", "a PNG by content"): painted("RGB", format="PNG"),
    ("gif", "two pictures"): films,
    ("webp", "lossless"): painted("RGB", lossless=True),
    ("webp", "two pictures"): films,
    **{("tif", x): painted("RGB", compression=x) for x in ("tiff_lzw", "tiff_adobe_deflate")},
    **{("tif", x): painted(x) for x in ("1", "L", "CMYK")},
    ("tif", "two pictures"): films,
    **{("bmp", x): painted(x) for x in ("1", "L", "P")},
}


@pytest.mark.parametrize("suffix,kind", SOUND_FILES, ids=[" ".join(key) for key in SOUND_FILES])
def test_an_odd_file_that_is_sound_is_read(corpora, suffix, kind):
    modality, folder = SPEECH if suffix in AUDIO else VISION, corpora(suffix)
    path, uri = file_of(folder, suffix), f"folder:{folder}"
    wanted = sound_batches(modality, uri)
    try:
        SOUND_FILES[suffix, kind](path)
        found, bad = read(modality, uri)
        whole = open_source(uri, codec=modality.codec)[BAD]
    finally:
        path.unlink()
        write(path, BAD)
    assert not bad
    for batch, other in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(batch["example_id"], other["example_id"])
        rows = other["example_id"] != BAD
        for name, array in other.items():
            np.testing.assert_array_equal(batch[name][rows], array[rows])
    if suffix in AUDIO:
        size = min(len(whole["audio"]), RATE // 2)
        assert size > 0.4 * RATE
        assert np.corrcoef(whole["audio"][:size], tone(BAD)[:size])[0, 1] > 0.9
    else:
        assert whole["image"].shape == (32, 24, 3)
        grey = pixels(BAD).mean(-1)
        assert np.corrcoef(whole["image"].mean(-1).ravel(), grey.ravel())[0, 1] > 0.5


def test_ten_bad_files_of_forty_and_resumed_in_the_middle(corpora, tmp_path):
    folder = tmp_path / "x"
    shutil.copytree(corpora("wav"), folder)
    wanted = sound_batches(SPEECH, f"folder:{corpora('wav')}")
    kinds = [KINDS["wav", name][0] for name in ("empty file", "noise", "8 kHz", "silence", "NaN")]
    kinds = [*kinds, pipe, loop, dangling, KINDS["wav", "cut"][0], KINDS["wav", "a text"][0]]
    bad_ids = range(3, 33, 3)
    for i, damage in zip(bad_ids, kinds, strict=True):
        path = folder / f"{i:02}.wav"
        damage(path)
    whole, bad = read(SPEECH, f"folder:{folder}")
    assert {i for i, *_ in bad} == {*bad_ids}
    for batch, sound in zip(whole, wanted, strict=True):
        rows = ~np.isin(sound["example_id"], bad_ids)
        assert not np.isin(batch["example_id"], bad_ids).any()
        np.testing.assert_array_equal(batch["audio"][rows], sound["audio"][rows])
    for start, workers in ((4, 0), (0, 2), (5, 2)):
        again, _ = read(SPEECH, f"folder:{folder}", start=start, workers=workers)
        for batch, once in zip(again, whole[start:], strict=True):
            assert batch.keys() == once.keys()
            for name in batch:
                np.testing.assert_array_equal(batch[name], once[name])


def test_a_stand_in_is_of_the_same_bucket_and_not_in_the_batch():
    bucket_of = np.repeat([0, 1], 50)
    sampler = batches.TrainSampler(bucket_of, [2, 4], 4, seed=0, rows_multiple_of=4)
    for n in range(sampler.per_epoch):
        bucket, ids = sampler(n)
        others = [sampler.stand_in(n, 1, attempt) for attempt in range(20)]
        assert (bucket_of[others] == bucket).all() and not set(others) & set(ids.tolist())
        assert len(set(others)) > 5
        assert others == [sampler.stand_in(n, 1, attempt) for attempt in range(20)]


def test_a_corpus_without_a_good_example_is_refused(tmp_path):
    for i in range(COUNT):
        (tmp_path / f"{i}.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"100 examples in a row cannot be read; the last: .*\.png"):
        read(VISION, f"folder:{tmp_path}")
    for i in range(3):
        (tmp_path / f"{i}.wav").write_bytes(b"no sound")
    with pytest.raises(UserError, match=r"0\.wav: unreadable audio .* the other 2"):
        read(SPEECH, f"folder:{tmp_path}")


# Rows of tables, and records ----------------------------------------------------------------------

ROWS = {
    "no such file": ({"path": "gone.wav"}, "missing"),
    "null": ({"path": None}, "format"),
    "a number": ({"path": 7}, "format"),
    "a NUL in the name": ({"path": "a\0b.wav"}, "missing"),
    "the folder itself": ({"path": "."}, "missing"),
    "other length": ({"samples": 9_000}, "length"),
    "a length that is no number": ({"samples": "many"}, "format"),
    "a length of 31 digits": ({"samples": 10**30}, "format"),
    "a negative length": ({"samples": -5}, "format"),
    "no column": ({"samples": ...}, "format"),
    "not JSON": ('{"path": ', "format"),
    "a list": ("[1, 2]", "format"),
    "nested deeply": ("[" * 100_000, "format"),
}


@pytest.fixture(scope="module")
def table(corpora):
    folder = corpora("wav")
    rows = [{"path": f"{i:02}.wav", "samples": RATE // 2} for i in range(COUNT)]
    return folder / "t.jsonl", rows


@pytest.mark.parametrize("kind", ROWS)
def test_one_bad_row_changes_no_other(table, kind):
    place, rows = table
    change, reason = ROWS[kind]
    lines = [json.dumps(row) for row in rows]
    place.write_text("\n".join(lines))
    wanted = sound_batches(SPEECH, f"manifest:{place}")
    row = change
    if isinstance(change, dict):
        row = {k: v for k, v in (rows[BAD] | change).items() if v is not ...}
    lines[BAD] = row if isinstance(row, str) else json.dumps(row)
    place.write_text("\n".join(lines))
    found, bad = read(SPEECH, f"manifest:{place}")
    assert compare(found, wanted) >= 1
    where = f"{place}:{BAD + 1}" if reason != "length" else str(file_of(place.parent, "wav"))
    assert bad == {(BAD, reason, where)}


def encoded(samples, rate):
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format="WAV")
    return file.getvalue()


RECORDS = {
    "another rate": ({"audio_bytes": encoded(tone(BAD), 8_000)}, "sample rate"),
    "a rate that is no number": ({"audio": tone(BAD), "sample_rate": "x"}, "sample rate"),
    "two channels": ({"audio": np.stack([tone(BAD)] * 2, 1)}, "format"),
    "bytes": ({"audio": tone(BAD).astype(np.uint8)}, "format"),
    "no audio": ({"text": "a"}, "unreadable"),
    "NaN": ({"audio": np.full(8_000, np.nan, np.float32)}, "not finite"),
    "silence": ({"audio": np.zeros(8_000, np.int16)}, "constant"),
    "no file": ({"audio_bytes": b"no file"}, "unreadable"),
    "a text": ({"audio": "la"}, "format"),
}


@pytest.mark.parametrize("kind", RECORDS)
def test_one_bad_record_changes_no_other(tmp_path, kind):
    record, reason = RECORDS[kind]
    good = [{"audio": tone(i)} for i in range(COUNT)]
    place = tmp_path / "train.array_record"
    found = {}
    with pytest.warns(UserWarning, match="measured its 40 records"):
        for name, examples in (("good", good), ("bad", [*good[:BAD], record, *good[BAD + 1 :]])):
            write_array_record(place, examples)
            Path(f"{place}.lengths.npy").unlink(missing_ok=True)
            found[name] = read(SPEECH, f"array_record:{tmp_path}")
    assert not found["good"][1]
    assert compare(found["bad"][0], found["good"][0]) >= 1
    bad = found["bad"][1]
    assert bad == {(BAD, reason, f"{place}[{BAD}]")}
    # Lengths that an earlier run has kept say so, too.
    again, bad = read(SPEECH, f"array_record:{tmp_path}")
    compare(again, found["good"][0])
    assert bad


@pytest.mark.parametrize(
    "lengths", [np.zeros((40, 2), np.int64), np.full(40, np.nan), np.array(["a"] * 40)]
)
def test_lengths_that_are_none(tmp_path, lengths):
    place = tmp_path / "train.array_record"
    write_array_record(place, [{"audio": tone(i)} for i in range(COUNT)], codec=SPEECH.codec)
    np.save(f"{place}.lengths.npy", lengths)
    with pytest.raises(UserError, match=r"lengths\.npy: .* not whole numbers"):
        read(SPEECH, f"array_record:{tmp_path}")


def test_lengths_that_promise_more_than_the_file(tmp_path):
    place = tmp_path / "train.array_record"
    write_array_record(place, [{"audio": tone(i)} for i in range(COUNT)], codec=SPEECH.codec)
    path = Path(f"{place}.lengths.npy")
    path.write_bytes(path.read_bytes().replace(b"(40,)", b"(4" + b"0" * 12 + b",)"))
    with pytest.raises(UserError, match=r"lengths\.npy: unreadable array"):
        read(SPEECH, f"array_record:{tmp_path}")


# Texts are read whole at the start ----------------------------------------------------------------

TEXTS = {
    "latin-1": (lambda path: path.write_bytes("é".encode("latin-1") * 99), "unreadable"),
    "UTF-16": (lambda path: path.write_bytes("the cat".encode("utf-16-le")), "format"),
    "NUL": (lambda path: path.write_bytes(b"the\0cat"), "format"),
    "empty": (empty, "empty"),
    "blank": (lambda path: path.write_text(" \n\n"), "empty"),
    "a pipe": (pipe, "not a file"),
    "a link to itself": (loop, "unreadable"),
    "a link to nothing": (dangling, "missing"),
}


@pytest.mark.parametrize("kind", TEXTS)
def test_one_bad_text_of_forty(corpora, tmp_path, kind):
    folder = corpora("txt")
    damage, reason = TEXTS[kind]
    path = file_of(folder, "txt")
    for i in range(COUNT):
        if i != BAD:
            write(tmp_path / f"{i:02}.txt", i)
    wanted, _ = read(TEXT, f"folder:{tmp_path}")
    try:
        damage(path)
        found, bad = read(TEXT, f"folder:{folder}")
    finally:
        path.unlink()
        write(path, BAD)
    assert bad == {(BAD, reason, str(path))}
    for batch, other in zip(found, wanted, strict=True):  # as if it were not there
        np.testing.assert_array_equal(batch["tokens"], other["tokens"])


# Folders ------------------------------------------------------------------------------------------


def test_links_are_followed_but_nothing_is_read_twice(tmp_path):
    folder, other = tmp_path / "x", tmp_path / "y"
    for i in range(4):
        write(folder / f"a/{i}.png", i)
        write(other / f"{i}.png", i)
    (folder / "a/self").symlink_to(folder)
    (folder / "b").symlink_to(folder / "a")
    (folder / "z").symlink_to(other)
    (folder / "proc").symlink_to("/proc")
    (folder / "loop").symlink_to("loop")
    source = open_source(f"folder:{folder}", codec=VISION.codec)
    assert source.column("path") == [f"{name}/{i}.png" for name in "az" for i in range(4)]
    assert source.label_names == ("a", "z")
    with pytest.raises(UserError, match="is the system's"):
        open_source("folder:/proc", codec=VISION.codec)


def test_a_name_that_is_not_utf8_is_left_out(tmp_path):
    for i in range(COUNT - 1):
        write(tmp_path / f"{i:02}.wav", i)
    shutil.copy(tmp_path / "00.wav", os.fsencode(tmp_path) + b"/zz\xff.wav")
    found, bad = read(SPEECH, f"folder:{tmp_path}")
    assert bad == {(COUNT - 1, "name", f"{tmp_path}/zz\\udcff.wav")}
    assert not any((batch["example_id"] == COUNT - 1).any() for batch in found)


@pytest.mark.parametrize(
    "names", [("Train", "Test"), ("training", "testing"), ("Custom_train", "Custom_test")]
)
def test_splits_by_other_names(tmp_path, names):
    for split, count in zip(names, (3, 2), strict=True):
        for i in range(count):
            write(tmp_path / f"{split}/{'ab'[i % 2]}/{i}.png", i)
    for split, count in (("train", 3), ("test", 2)):
        source = open_source(f"folder:{tmp_path}", split, codec=VISION.codec)
        assert len(source) == count and source.label_names == ("a", "b")
    with pytest.raises(UserError, match=f"no split 'val' in .*{names[0]}"):
        open_source(f"folder:{tmp_path}", "val", codec=VISION.codec)


def test_classes_may_be_called_like_splits(tmp_path):
    for name in ("bus", "Train", "test_tube_rack", "tree"):
        write(tmp_path / f"{name}/0.png", 0)
    (tmp_path / "__MACOSX").mkdir()
    with pytest.raises(UserError, match="no split 'val'"):
        open_source(f"folder:{tmp_path}", "val", codec=VISION.codec)
    shutil.rmtree(tmp_path / "test_tube_rack")
    source = open_source(f"folder:{tmp_path}", "train", codec=VISION.codec)
    assert source.label_names == ("Train", "bus", "tree")


def test_a_stray_file_beside_classes_is_named(tmp_path):
    for i in range(8):
        write(tmp_path / f"{i % 2}/{i}.png", i)
    write(tmp_path / "preview.png", 0)
    config = config_of("finetune_imagenet").to_dict()
    config["head"]["classes"] = 2
    config["data"] |= dict(source=f"folder:{tmp_path}", batch_size=2, eval_split="", share=1.0)
    from data2vec_jax.tasks import classify

    with pytest.raises(UserError, match=r"preview\.png: no label"):
        classify.make(classify.resolve_config(config))
    (tmp_path / "preview.png").unlink()
    write(tmp_path / "more/0.png", 0)
    with pytest.raises(UserError, match=r"2, but .* has 3: 0, 1, more"):
        classify.make(classify.resolve_config(config))


# What is read, and how much of it -----------------------------------------------------------------


def test_a_flac_without_a_length_is_read_to_its_end(tmp_path):
    path = tmp_path / "a.flac"
    soundfile.write(path, tone(0, 2.0), RATE)
    whole = open_source(f"folder:{tmp_path}", codec=SPEECH.codec)[0]["audio"]
    data = bytearray(path.read_bytes())
    data[21] &= 0xF0
    data[22:26] = bytes(4)
    path.write_bytes(bytes(data))
    source = open_source(f"folder:{tmp_path}", codec=SPEECH.codec)
    assert source.lengths().tolist() == [2 * RATE]
    np.testing.assert_array_equal(source[0]["audio"], whole)
    part = source.part(0, 12_345, 1_000)["audio"]
    np.testing.assert_array_equal(part, whole[12_345:13_345])


@pytest.mark.parametrize("suffix", AUDIO)
def test_of_long_audio_only_the_crop_is_read(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    with soundfile.SoundFile(path, "w", RATE, 1) as file:
        for i in range(60):
            file.write(tone(i, 5.0))
    source = open_source(f"folder:{tmp_path}", codec=SPEECH.codec)
    whole = source[0]["audio"]
    examples = SPEECH.examples(source, crops=(0.5,))
    for seed in range(3):
        crop = examples.load(0, 0, np.random.default_rng(seed))["audio"]
        start = int(np.random.default_rng(seed).integers(len(whole) - len(crop) + 1))
        first = min(max(start - (WHOLE - len(crop)) // 2, 0), len(whole) - WHOLE)
        wanted = normalise(whole[first : first + WHOLE])[start - first :][: len(crop)]
        np.testing.assert_allclose(crop, wanted, atol=1e-4)
    middle = SPEECH.examples(source, examples, crops=(0.5,)).load(0, 0, None)["audio"]
    start = (len(whole) - len(middle)) // 2
    assert np.corrcoef(middle, whole[start : start + len(middle)])[0, 1] > 0.999


def test_photos_are_turned_as_their_tag_says(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "a.jpg"
    Image.fromarray(pixels(0)).save(path, exif=exif, quality=100)
    with Image.open(path) as image:
        shown = np.asarray(ImageOps.exif_transpose(image))
    found = open_source(f"folder:{tmp_path}", codec=VISION.codec)[0]["image"]
    assert shown.shape == (24, 32, 3)
    np.testing.assert_array_equal(found, shown)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "record"])
@pytest.mark.parametrize("background", [(255, 255, 255), (10, 200, 30)])
def test_transparent_pixels_lie_on_a_background(tmp_path, mode, background):
    sign = np.zeros((8, 8, 4), np.uint8)  # black on black, but for its alpha
    sign[2:6, 2:6, 3] = 255
    if mode == "record":
        write_array_record(tmp_path / "train.array_record", [{"image": sign}])
        uri = f"array_record:{tmp_path}"
    else:
        image = Image.fromarray(sign)
        if mode == "P":
            image = image.quantize(4)
        image.convert(mode if mode != "P" else "P").save(tmp_path / "a.png")
        uri = f"folder:{tmp_path}"
    source = open_source(uri, codec=VISION.codec)
    examples = VISION.examples(source, image=8, background=background)
    found = examples.source[0]["image"]
    assert (found[0, 0] == background).all() and (found[4, 4] == 0).all()


def test_sizes_are_options(tmp_path):
    write(tmp_path / "a.png", 0)
    write(tmp_path / "a.wav", 0)
    image = VISION.examples(
        open_source(f"folder:{tmp_path}", codec=VISION.codec), image=8, max_pixels=700
    )
    with pytest.raises(ExampleError, match="24 x 32 pixels, more than max_pixels=700"):
        image.load(0, 0, np.random.default_rng(0))
    sound = open_source(f"folder:{tmp_path}", codec=SPEECH.codec)
    SPEECH.examples(sound, crops=(0.1,), max_seconds=0.25)
    assert sound.bad[0].reason == "too long" and "config.examples.max_seconds" in str(sound.bad[0])


def test_a_compressed_table_may_not_become_absurdly_large(tmp_path):
    with gzip.open(tmp_path / "t.tsv.gz", "wb") as file:
        file.write(b"text\n")
        for _ in range(2_000):
            file.write(b"a" * 2**16)
    with pytest.raises(UserError, match="inflates to more than"):
        open_source(f"manifest:{tmp_path / 't.tsv.gz'}", codec=TEXT.codec)


def test_a_second_text_that_is_null_is_named(tmp_path):
    place = tmp_path / "t.jsonl"
    rows = [{"text": text(i), "pair": None if i == 3 else "yes", "label": i % 2} for i in range(60)]
    place.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = open_source(f"manifest:{place}", codec=TEXT.codec)
    TEXT.inputs(source, lengths=(16, 64), vocab_size=280)
    assert str(source.bad[3]) == f"{place}:4: pair is None, not a string" and len(source.bad) == 1


# Whole runs ---------------------------------------------------------------------------------------


def tiny(folder, **data):
    """A run of 4 updates on pictures; a checkpoint after each 2."""
    config = config_of("vision_v1").to_dict()
    config["data"] |= dict(source=f"folder:{folder}", eval_split=None, max_bad_share=0.1) | data
    config["checkpoint"] |= dict(every=2, keep=5)
    return config


def outcome(workdir):
    """Losses of all steps, and the file of bad examples."""
    lines = [json.loads(x) for x in (workdir / "metrics.jsonl").read_text().splitlines()]
    numbers = [(line["step"], line["loss"], line["grad_norm"]) for line in lines]
    return numbers, (workdir / bad_examples.FILE).read_text()


def test_a_run_goes_on_resumes_and_notices_a_removed_file(tmp_path, capsys):
    folder = tmp_path / "images"
    for i in range(COUNT):
        write(folder / f"{i:02}.png", i)
    (folder / "07.png").write_bytes(b"")
    (folder / "21.png").write_bytes(b"no image")
    config, whole = tiny(folder), tmp_path / "whole"
    train.train(config, whole, programs=PROGRAMS)
    assert "2 of 40 examples were left out (unreadable 2; the first is" in capsys.readouterr().err
    numbers, lines = outcome(whole)
    assert [step for step, *_ in numbers] == [1, 2, 3, 4]
    rows = [json.loads(line) for line in lines.splitlines()]
    assert {(r["example_id"], r["reason"]) for r in rows} == {(7, "unreadable"), (21, "unreadable")}
    assert all(r.keys() == {"step", "example_id", "path", "reason"} for r in rows)

    again = tmp_path / "again"
    shutil.copytree(whole, again)
    shutil.rmtree(next(again.glob("checkpoints/4*")))
    train.train(config, again, programs=PROGRAMS)
    assert outcome(again) == (numbers, lines)

    shutil.rmtree(next(again.glob("checkpoints/4*")))
    (folder / "30.png").unlink()
    with pytest.raises(UserError, match=r"corpus has changed since step 2: it was 40 .* now 39"):
        train.train(config, again, programs=PROGRAMS)
    train.train(config, again, programs=PROGRAMS, changed_corpus=True)
    assert [step for step, *_ in outcome(again)[0]] == [1, 2, 3, 4]


def test_a_run_with_too_many_bad_examples_saves_and_stops(tmp_path):
    folder = tmp_path / "images"
    for i in range(COUNT):
        write(folder / f"{i:02}.png", i)
    for i in range(0, COUNT, 4):
        (folder / f"{i:02}.png").write_bytes(b"")
    config, workdir = tiny(folder), tmp_path / "run"
    with pytest.raises(UserError, match=r"of 40 examples .* more than config\.data\.max_bad_share"):
        train.train(config, workdir, programs=PROGRAMS)
    saved = [int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit()]
    assert saved
    with pytest.raises(UserError, match=r"max_bad_share=0\.1 allows"):  # at once
        train.train(config, workdir, programs=PROGRAMS)
    config["data"]["max_bad_share"] = 0.25
    train.train(config, workdir, programs=PROGRAMS)
    assert [step for step, *_ in outcome(workdir)[0]] == [1, 2, 3, 4]


def test_an_evaluation_leaves_out_and_says_so(tmp_path):
    from data2vec_jax.tasks import classify, finetune

    for i in range(12):
        write(tmp_path / f"{'ab'[i % 2]}/{i:02}.png", i)
    (tmp_path / "a/04.png").write_bytes(b"")
    source = open_source(f"folder:{tmp_path}", codec=VISION.codec)
    inputs = VISION.inputs(source, like=object(), image=16)
    targets = classify.targets({}, type("Head", (), {"classes": 2, "problem": classify.SINGLE}))
    examples = finetune.Examples(inputs, targets)
    options = finetune.DataConfig(source="", batch_size=4)

    def predict(params, batch):
        return {"logits": batch["label"][:, None] == np.arange(2), "label": batch["label"]}

    run = finetune.evaluation(predict, examples, options, lambda found: found)
    import jax

    from data2vec_jax.core import sharding

    with jax.set_mesh(sharding.make_mesh(devices=jax.devices()[:1])):
        found = run(type("State", (), {"params": {}}))
    missing = [i for i, one in enumerate(found) if one is None]
    assert [source.location(i) for i in missing] == [str(tmp_path / "a/04.png")]
    kept = [one and {k: np.asarray(v, np.float32) for k, v in one.items()} for one in found]
    kept = [one and one | {"label": np.int32(one["label"])} for one in kept]
    scores = classify.score(kept, inputs)
    assert scores["accuracy"] == 1 and scores["left_out"] == 1 / 12


# Random damage ------------------------------------------------------------------------------------

SECONDS, BYTES = 0.5, 200 * 2**20  # of this process's time: others may use the machine


def damaged(data, draw):
    """Bytes, flipped, overwritten, cut, doubled or removed at random."""
    data = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 8))):
        at = (
            draw.randrange(len(data)) if draw.random() < 0.5 else draw.randrange(min(len(data), 99))
        )
        kind = draw.randrange(6)
        if kind == 0:
            data[at] ^= 1 << draw.randrange(8)
        elif kind == 1:
            data[at : at + 4] = draw.choice((b"\xff" * 4, bytes(4), b"\x7f\xff\xff\xff"))
        elif kind == 2:
            data[at : at + 16] = draw.randbytes(16)
        elif kind == 3:
            del data[max(at, 1) :]
        elif kind == 4:
            data[at:at] = data[at : at + 64]
        else:
            del data[at : at + 9]
        if not data:
            return b""
    return bytes(data)


def peak():
    """Resident bytes at their highest since `reset`, from the kernel."""
    return 1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])


def reset():
    Path("/proc/self/clear_refs").write_text("5")
    return peak()


def fuzz(count, folder, seed=0):
    """Decodes `count` damaged files: (decoded, refused, slowest, seconds, most bytes, whose)."""
    draw, decoded, refused, slowest, largest = random.Random(seed), 0, 0, (0.0, ""), (0, "")
    suffixes = (*AUDIO, *IMAGES)
    for suffix in suffixes:
        write(folder / f"sound.{suffix}", BAD)
    sound = {suffix: (folder / f"sound.{suffix}").read_bytes() for suffix in suffixes}
    for i in range(count):
        suffix = suffixes[i % len(suffixes)]
        path = folder / f"{i}.{suffix}"
        path.write_bytes(damaged(sound[suffix], draw))
        codec = SPEECH.codec if suffix in AUDIO else VISION.codec
        before, begun = reset(), time.process_time()
        try:
            if codec.measure:
                codec.measure(str(path), str(path))
            item = codec.read(str(path), str(path))
            decoded += 1
            assert np.isfinite(item[codec.field]).all()
        except ExampleError as error:
            assert "\n" not in str(error) and str(path) in str(error)
            refused += 1
        seconds, taken = time.process_time() - begun, peak() - before - path.stat().st_size
        slowest, largest = max(slowest, (seconds, path.name)), max(largest, (taken, path.name))
        path.unlink()
    return decoded, refused, slowest, largest


def test_damaged_files_are_decoded_or_refused_soon(tmp_path):
    decoded, refused, slowest, largest = fuzz(400, tmp_path)
    assert decoded + refused == 400 and refused > 100
    assert slowest[0] < SECONDS and largest[0] < BYTES, (slowest, largest)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        print(fuzz(int(sys.argv[1]), Path(place), seed=int(sys.argv[2]) if sys.argv[2:] else 0))
