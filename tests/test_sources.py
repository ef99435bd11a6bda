"""Sources: the shipped samples as they are, other formats by round trips, and every error."""

import gzip
import io
import json
import os
import pickle
import subprocess
import sys
import warnings
from pathlib import Path

import flax.serialization
import grain
import numpy as np
import pytest
import soundfile
from PIL import Image

from data2vec_jax.core.errors import UserError
from data2vec_jax.data import sources
from data2vec_jax.data.codecs import Codec, audio
from data2vec_jax.data.sources import array_record, open_source
from data2vec_jax.modalities.speech.codec import CODEC as SPEECH
from data2vec_jax.modalities.text.codec import CODEC as TEXT
from data2vec_jax.modalities.vision.codec import CODEC as VISION

ROOT = Path(__file__).resolve().parent.parent
MODALITIES = ROOT / "data2vec_jax" / "modalities"
SAMPLES = {
    "speech": MODALITIES / "speech/sample_data/speech",
    "digits": MODALITIES / "vision/sample_data/digits",
    "glosses": MODALITIES / "text/sample_data/glosses",
}
RATE = 16_000


def tone(samples: int, channels: int = 1) -> np.ndarray:
    """A quiet 440 Hz tone, float32 [n] or [n, channels] with the same energy in all channels."""
    wave = 0.25 * np.sin(2 * np.pi * 440 * np.arange(samples) / RATE).astype(np.float32)
    return wave if channels == 1 else np.repeat(wave[:, None], channels, axis=1)


def write_audio(path: Path, samples: int, rate: int = RATE, channels: int = 1, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, tone(samples, channels), rate, **options)
    return path


def write_image(path: Path, mode: str = "RGB", color=(255, 0, 10), size=(6, 4)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, color).save(path)
    return path


def write_file(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode())
    return path


def encoded(save, *arguments, **options) -> bytes:
    """What `save` writes into a file."""
    file = io.BytesIO()
    save(file, *arguments, **options)
    return file.getvalue()


# The shipped samples.


@pytest.mark.parametrize(
    "name, codec, split, count, classes",
    [
        ("speech", SPEECH, "train", 114, 51),
        ("speech", SPEECH, "test", 12, 51),
        ("digits", VISION, "train", 4_000, 10),
        ("digits", VISION, "test", 1_000, 10),
        ("glosses", TEXT, "train", 8_500, 45),
        ("glosses", TEXT, "test", 1_500, 45),
        ("glosses", TEXT, "extra", 10_000, 45),
        ("glosses", TEXT, "train+extra", 18_500, 45),
    ],
)
def test_samples_counts(name, codec, split, count, classes):
    source = open_source(f"samples:{name}", split, codec=codec)
    assert len(source) == count
    assert len(source.label_names) == len(set(source.label_names)) == classes
    assert f"{count:,} examples" in repr(source)
    copy = pickle.loads(pickle.dumps(source))
    np.testing.assert_equal(copy[count - 1], source[-1])
    with pytest.raises(IndexError):
        source[count]


def test_samples_size_and_licences():
    files = [path for path in MODALITIES.glob("*/sample_data/**/*") if path.is_file()]
    # Of four modalities, and labels of frames.
    assert sum(path.stat().st_size for path in files) < 4_200_000
    for name, owner in (
        ("speech", "Nickolay V. Shmyrev"),
        ("digits", "Yann LeCun"),
        ("glosses", "Princeton University"),
    ):
        assert owner in (SAMPLES[name] / "LICENSE").read_text(encoding="utf-8")
        assert (SAMPLES[name] / "README.md").stat().st_size > 500


def test_samples_speech_decodes_and_aligns():
    seen = {}
    for split in ("train", "test"):
        source = open_source("samples:speech", split, codec=SPEECH)
        lengths = source.lengths()
        assert lengths.dtype == np.int64
        for item, length in zip(source, lengths, strict=True):
            audio, phones = item["audio"], item["phones"]
            assert audio.dtype == np.float32 and audio.shape == (length,)
            assert item["sample_rate"] == RATE and np.abs(audio).max() <= 1
            starts, ends, names = zip(*phones, strict=True)
            assert starts[0] == 0 and starts[1:] == ends[:-1]
            assert all(start < end for start, end in zip(starts, ends, strict=True))
            assert length / RATE - 0.1 < ends[-1] <= length / RATE + 0.1
            assert set(names) <= set(source.label_names)
            # Pauses are far quieter than speech only if the labels stand where the sound is.
            frames = [int(t * RATE) for t in (0, *ends)]
            energy = {
                pause: np.concatenate(
                    [
                        audio[a:b] ** 2
                        for a, b, name in zip(frames, frames[1:], names, strict=False)
                        if (name == "pau") == pause
                    ]
                ).mean()
                for pause in (True, False)
            }
            assert energy[True] < energy[False] / 10
            assert item["transcript"] and "+" not in item["transcript"]
            assert seen.setdefault(item["path"], split) == split  # no sentence in both
    assert sum(soundfile.info(SAMPLES["speech"] / path).frames for path in seen) > 12 * 60 * RATE


def test_samples_speech_is_reproducible():
    """make_samples.py replaces the random serial number of each Ogg stream."""
    for path in SAMPLES["speech"].glob("*.ogg"):
        assert int.from_bytes(path.read_bytes()[14:18], "little") == int(path.stem[3:])


def test_samples_digits():
    images = {}
    for split, each in (("train", 400), ("test", 100)):
        source = open_source("samples:digits", split, codec=VISION)
        items = list(source)
        assert source.lengths() is None
        assert all(item["image"].shape == (28, 28, 1) for item in items)
        assert items[0]["image"].dtype == np.uint8
        assert np.bincount([item["label"] for item in items]).tolist() == [each] * 10
        images[split] = {item["image"].tobytes() for item in items}
        items[0]["image"][:] = 7  # a copy: the source stays as it is
        assert source[0]["image"].min() == 0
    assert len(images["train"]) == 4_000 and len(images["test"]) == 1_000
    assert not images["train"] & images["test"]


def test_samples_glosses():
    splits = {s: open_source("samples:glosses", s, codec=TEXT) for s in ("train", "test")}
    splits["extra"] = open_source("samples:glosses", "extra", codec=TEXT)
    texts = {split: {item["text"] for item in source} for split, source in splits.items()}
    assert sum(map(len, texts.values())) == len(set().union(*texts.values())) == 20_000
    assert splits["train"].label_names == splits["test"].label_names
    assert {item["label"] for item in splits["train"]} == set(range(45))
    item = splits["train"][0]
    assert sorted(item) == ["label", "text"] and type(item["label"]) is int
    assert "noun.animal" in splits["train"].label_names


def test_grain_reads_a_source_in_threads():
    source = open_source("samples:speech", "test", codec=SPEECH)
    dataset = grain.MapDataset.source(source).shuffle(seed=1).map(lambda item: len(item["audio"]))
    options = grain.ReadOptions(num_threads=4)
    assert sorted(dataset.to_iter_dataset(options)) == sorted(source.lengths())


# Folders.


@pytest.mark.parametrize(
    "name, options",
    [
        ("a.wav", {}),
        ("a.flac", {}),
        ("a.ogg", {"format": "OGG", "subtype": "VORBIS"}),
        ("a.opus", {"format": "OGG", "subtype": "OPUS"}),
        ("a.mp3", {"format": "MP3"}),
        ("a.WAV", {"subtype": "FLOAT"}),
    ],
)
def test_folder_audio_formats(tmp_path, name, options):
    write_audio(tmp_path / "deep" / name, 16_000, channels=2, **options)
    source = open_source(f"folder:{tmp_path}", codec=SPEECH)
    item = source[0]
    assert item["audio"].dtype == np.float32 and item["audio"].shape == (source.lengths()[0],)
    middle = slice(4_000, 12_000)
    assert np.abs(item["audio"][middle]).max() == pytest.approx(0.25, abs=0.05)
    if name.lower().endswith(("wav", "flac")):
        np.testing.assert_allclose(item["audio"], tone(16_000), atol=1e-4)
    assert item["path"] == os.path.join("deep", name)


def test_folder_audio_averages_channels(tmp_path):
    stereo = np.stack([np.full(100, 0.5), np.full(100, -0.25)], axis=1)
    soundfile.write(tmp_path / "x.flac", stereo, RATE)
    item = open_source(f"folder:{tmp_path}", codec=SPEECH)[0]
    np.testing.assert_allclose(item["audio"], np.full(100, 0.125), atol=1e-4)


def test_folder_audio_lengths_classes_and_order(tmp_path):
    for i, name in enumerate(("b/2.wav", "a/1.flac", "b/1.wav", "a/.hidden.wav", "a/notes.txt")):
        if name.endswith("txt"):
            write_file(tmp_path / name, "not audio")
        else:
            write_audio(tmp_path / name, 100 * (i + 1))
    source = open_source(f"folder:{tmp_path}", codec=SPEECH)
    assert [item["path"].replace(os.sep, "/") for item in source] == [
        "a/1.flac",
        "b/1.wav",
        "b/2.wav",
    ]
    assert source.lengths().tolist() == [len(item["audio"]) for item in source] == [200, 300, 100]
    assert source.label_names == ("a", "b") and [item["label"] for item in source] == [0, 1, 1]


def test_folder_images(tmp_path):
    write_image(tmp_path / "rgb.png")
    write_image(tmp_path / "grey.png", "L", 7)
    write_image(tmp_path / "alpha.webp", "RGBA", (1, 2, 3, 255))
    write_image(tmp_path / "ink.JPEG", "CMYK", (0, 255, 255, 0))
    write_image(tmp_path / "palette.gif", "P", 3)
    Image.fromarray(np.full((4, 6), 0x1234, np.uint16)).save(tmp_path / "sixteen.png")
    source = open_source(f"folder:{tmp_path}", codec=VISION)
    images = {item["path"]: item["image"] for item in source}
    assert len(images) == 6 and source.label_names is None and source.lengths() is None
    assert all(i.shape == (4, 6, 3) and i.dtype == np.uint8 for i in images.values())
    assert images["rgb.png"][0, 0].tolist() == [255, 0, 10]
    assert images["grey.png"][0, 0].tolist() == [7, 7, 7]
    assert images["sixteen.png"][0, 0].tolist() == [0x12] * 3
    assert images["ink.JPEG"][0, 0, 0] > 200


def test_folder_classes_are_the_same_in_every_split(tmp_path):
    for name in ("train/cat/1", "train/dog/1", "train/eel/1", "val/eel/1", "val/cat/1"):
        write_image(tmp_path / f"{name}.png")
    train = open_source(f"folder:{tmp_path}", "train", codec=VISION)
    val = open_source(f"folder:{tmp_path}", "val", codec=VISION)
    assert train.label_names == val.label_names == ("cat", "dog", "eel")
    assert [item["label"] for item in val] == [0, 2]
    swapped = open_source(
        f"folder:{tmp_path}", "val", codec=VISION, label_names=["eel", "dog", "cat"]
    )
    assert [item["label"] for item in swapped] == [2, 0]
    with pytest.raises(UserError, match=r"unknown label 'cat'; choose from dog, eel"):
        open_source(f"folder:{tmp_path}", codec=VISION, label_names=["dog", "eel"])


def test_folder_text_keeps_blank_lines(tmp_path):
    document = "Первая строка\n\n  вторая \n\n\n"
    write_file(tmp_path / "b.txt", document.replace("\n", "\r\n"))
    write_file(tmp_path / "a.txt", "\ufeffone")
    write_file(tmp_path / "c.md", "no")
    source = open_source(f"folder:{tmp_path}", "test", codec=TEXT)
    assert [item["text"] for item in source] == ["one", document]


# Manifests.


def test_manifest_wav2vec(tmp_path):
    write_audio(tmp_path / "audio/x/1.flac", 300)
    write_audio(tmp_path / "audio/2.wav", 200)
    write_file(tmp_path / "train.tsv", f"{tmp_path}/audio\nx/1.flac\t300\n2.wav\t200\n")
    source = open_source(f"manifest:{tmp_path}/{{split}}.tsv", codec=SPEECH)
    assert source.lengths().tolist() == [len(item["audio"]) for item in source] == [300, 200]
    assert source[1]["path"] == "2.wav"
    write_file(tmp_path / "here.tsv", "audio\n2.wav\t199\n")  # a root beside the manifest
    with pytest.raises(UserError, match=r"2\.wav: has 200 samples, but .*here\.tsv says 199"):
        open_source(f"manifest:{tmp_path}/here.tsv", codec=SPEECH)[0]


def test_manifest_tables(tmp_path):
    write_image(tmp_path / "i/1.png")
    rows = 'path\tlabel\tnote\tsplit\ni/1.png\tdog\tgood "boy"\ttrain\ni/1.png\tcat\t\ttest\n'
    write_file(tmp_path / "a.tsv", rows)
    train = open_source(f"manifest:{tmp_path}/a.tsv", codec=VISION)
    assert train.label_names == ("cat", "dog") and len(train) == 1
    item = train[0]
    assert item.pop("image").shape == (4, 6, 3)
    assert item == {"path": "i/1.png", "label": 1, "note": 'good "boy"'}

    write_file(tmp_path / "a.csv", 'label,text\n3,"one, ""two""\n\nthree"\n10,x\n')
    source = open_source(f"manifest:{tmp_path}/a.csv", codec=TEXT)
    assert source.label_names == ("3", "10")  # by value
    assert source[0] == {"text": 'one, "two"\n\nthree', "label": 0}

    write_file(tmp_path / "long.csv", "text\n" + 300_000 * "x" + "\n")
    long = open_source(f"manifest:{tmp_path}/long.csv", codec=TEXT)
    assert len(long[0]["text"]) == 300_000

    write_file(tmp_path / "news.csv", "1,title,story\n2,t,s\n")  # no names, as AG News has it
    source = open_source(
        f"manifest:{tmp_path}/news.csv",
        codec=TEXT,
        columns=["label", "title", "story"],
        key="story",
    )
    assert source[0] == {"label": 0, "title": "title", "text": "story"}

    lines = [{"text": "ab", "label": 2.5, "more": [1]}, {"label": 3, "more": [], "text": "c"}]
    write_file(tmp_path / "a.jsonl", "\n" + "\n\n".join(map(json.dumps, lines)))
    source = open_source(f"manifest:{tmp_path}/a.jsonl", codec=TEXT)
    assert source.label_names is None and list(source) == [lines[0], lines[1]]  # scores

    write_file(tmp_path / "b.jsonl", '{"text": "a", "label": 1}\n{"text": "b", "label": 0}\n')
    source = open_source(f"manifest:{tmp_path}/b.jsonl", codec=TEXT, label_names=["-", "+"])
    assert [item["label"] for item in source] == [1, 0] and source.label_names == ("-", "+")


def test_labels_of_tables_that_are_numbers_or_missing(tmp_path):
    write_file(tmp_path / "a.csv", "text,label\na,10\nb,20\nc,100\n")
    source = open_source(f"manifest:{tmp_path}/a.csv", codec=TEXT, label_names=())
    assert [item["label"] for item in source] == [10.0, 20.0, 100.0] and source.label_names == ()
    write_file(tmp_path / "b.csv", "text,label,split\na,dog,x\nb,,train\nc,cat,train\n")
    source = open_source(f"manifest:{tmp_path}/b.csv", codec=TEXT)
    assert list(source.column("label")) == [None, 0] and source.label_names == ("cat", "dog")
    part = sources.Subset(source, [1, 0])
    assert part.column("label") == [0, None] and part.location(1) == f"{tmp_path}/b.csv:3"
    write_file(tmp_path / "c.jsonl", '{"text": "a", "label": null}\n')
    source = open_source(f"manifest:{tmp_path}/c.jsonl", codec=TEXT)
    assert source[0]["label"] is None and source.label_names is None


# ArrayRecord.


def test_array_record_audio(tmp_path):
    whole = tone(800)
    flac = encoded(soundfile.write, whole, RATE, format="FLAC")
    first = [{"audio_bytes": flac, "sample_rate": RATE, "id": "a"}, {"audio": whole[:500]}]
    second = [{"audio": (whole[:300] * 32768).astype(">i2"), "transcript": "да"}]
    for name, examples in (("train-0", first), ("train-1", second), ("test-0", second)):
        path = tmp_path / f"{name}.array_record"
        assert sources.write_array_record(path, examples, codec=SPEECH) == len(examples)
    assert not list(tmp_path.glob("*.partial"))
    source = pickle.loads(pickle.dumps(open_source(f"array_record:{tmp_path}", codec=SPEECH)))
    assert source.lengths().tolist() == [len(item["audio"]) for item in source] == [800, 500, 300]
    for item in source:
        assert item["audio"].dtype == np.float32 and item["sample_rate"] == RATE
        np.testing.assert_allclose(item["audio"], whole[: len(item["audio"])], atol=1e-4)
    assert source[0]["id"] == "a" and source[2]["transcript"] == "да"
    assert len(open_source(f"array_record:{tmp_path}/{{split}}-*", "test", codec=SPEECH)) == 1


def test_lengths_beside_array_records(tmp_path, monkeypatch):
    """Missing lengths are measured once, where they can be kept; stale ones are refused."""
    flac = encoded(soundfile.write, tone(800), RATE, format="FLAC")
    path = tmp_path / "train-0.array_record"
    sources.write_array_record(path, [{"audio_bytes": flac}, {"audio": tone(300)}])
    stored = Path(f"{path}.lengths.npy")
    place = f"array_record:{tmp_path}"

    assert not stored.exists()  # nothing told the writer what the records are
    monkeypatch.setattr(array_record, "save_lengths", refuse)
    with pytest.warns(UserWarning, match=r"measured its 2 records once; not kept"):
        assert open_source(place, codec=SPEECH).lengths().tolist() == [800, 300]
    monkeypatch.undo()
    with pytest.warns(
        UserWarning, match=r"train-0\.array_record: no lengths .* are kept in"
    ) as told:
        assert open_source(place, codec=SPEECH).lengths().tolist() == [800, 300]
    assert len(told) == 1 and "\n" not in str(told[0].message)
    assert sorted(tmp_path.iterdir()) == [path, stored]  # nothing half-written

    monkeypatch.setattr(array_record, "read_record", refuse)
    with warnings.catch_warnings(action="error"):  # neither read nor told of again
        assert open_source(place, codec=SPEECH).lengths().tolist() == [800, 300]
    monkeypatch.undo()
    np.save(stored, np.zeros(7, np.int64))
    with pytest.raises(UserError, match="7 lengths for 2 records; delete it"):
        open_source(place, codec=SPEECH).lengths()
    sources.write_array_record(path, [{"audio": tone(20)}])
    with pytest.warns(UserWarning, match="measured its 1 records once"):
        assert open_source(place, codec=SPEECH).lengths().tolist() == [20]  # not those of before


def refuse(*arguments):
    raise OSError("read-only file system")


def test_array_record_images_and_text(tmp_path):
    png = encoded(Image.new("L", (6, 4), 9).save, "png")
    examples = [
        {"image_bytes": png, "text": "один", "label": np.int64(3)},
        {"image": np.full((4, 6, 1), 9, np.uint8), "text": "", "label": 0},
    ]
    sources.write_array_record(tmp_path / "x.array_record", examples, codec=SPEECH)
    assert not (tmp_path / "x.array_record.lengths.npy").exists()
    place = f"array_record:{tmp_path}/*"
    images = open_source(place, codec=VISION, label_names=["a", "b", "c", "d"])
    assert [item["image"].shape for item in images] == [(4, 6, 3)] * 2
    assert all((item["image"] == 9).all() for item in images)
    assert [item["label"] for item in images] == [3, 0] and len(images.label_names) == 4
    assert [item["text"] for item in open_source(place, codec=TEXT)] == ["один", ""]
    assert images.lengths() is None


def test_records_are_those_of_flax():
    example = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "n": {"t": "é", "b": b"\0"}}
    ours, theirs = sources.encode_example(example), flax.serialization.msgpack_serialize(example)
    np.testing.assert_equal(flax.serialization.msgpack_restore(ours), example)
    np.testing.assert_equal(sources.decode_example(theirs), example)
    with pytest.raises(TypeError, match="set cannot be stored"):
        sources.encode_example({"a": {1}})


def test_unfinished_array_record_leaves_nothing(tmp_path):
    def examples():
        yield {"audio": tone(100)}
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        sources.write_array_record(tmp_path / "x.array_record", examples(), codec=SPEECH)
    with pytest.raises(UserError, match=r"x\.array_record\[1\]: has no audio, but others have"):
        sources.write_array_record(
            tmp_path / "x.array_record", [{"audio": tone(9)}, {"text": "a"}], codec=SPEECH
        )
    assert not list(tmp_path.iterdir())


# A codec that the package does not have.


def read_series(file, name: str) -> dict:
    """[n, 3] from an .npy file."""
    return {"series": np.load(file).astype(np.float32)}


def count_steps(file, name: str) -> int:
    return np.load(file, mmap_mode="r" if isinstance(file, str) else None).shape[0]


SERIES = Codec("series", (".npy",), read_series, measure=count_steps, units="steps")


def test_a_codec_of_ones_own_reads_every_container(tmp_path):
    values = [np.arange(3 * n, dtype=np.float32).reshape(n, 3) for n in (5, 7)]
    for name, value in zip(("walk/1.npy", "run/2.npy"), values, strict=True):
        (tmp_path / "data" / name).parent.mkdir(parents=True)
        np.save(tmp_path / "data" / name, value)
    write_file(tmp_path / "wav2vec.tsv", f"{tmp_path}/data\nwalk/1.npy\t5\nrun/2.npy\t7\n")
    write_file(tmp_path / "data/t.csv", "path,steps,label\nwalk/1.npy,5,walk\nrun/2.npy,7,run\n")
    write_file(tmp_path / "data/wrong.csv", "path,steps\nwalk/1.npy,4\n")
    records = [{"series": values[0]}, {"series": encoded(np.save, values[1]), "place": "left"}]
    sources.write_array_record(tmp_path / "x.array_record", records, codec=SERIES)

    uris = ("manifest:{}/wav2vec.tsv", "manifest:{}/data/t.csv", "array_record:{}/x.array_record")
    for uri in uris:
        source = open_source(uri.format(tmp_path), codec=SERIES)
        source = pickle.loads(pickle.dumps(source))
        assert source.lengths().tolist() == [5, 7]
        for item, value in zip(source, values, strict=True):
            np.testing.assert_array_equal(item["series"], value)
    assert source[1]["place"] == "left"
    folder = open_source(f"folder:{tmp_path}/data", codec=SERIES)
    assert folder.label_names == ("run", "walk") and folder.lengths().tolist() == [7, 5]
    one_line("has 5 steps, but .* says 4", f"manifest:{tmp_path}/data/wrong.csv", codec=SERIES)
    one_line(r"no series files \(\.npy\)", f"folder:{SAMPLES['digits']}", codec=SERIES)


def test_the_decoded_signal_stands_before_a_field_of_the_same_name(tmp_path):
    record = {"text": "of the picture", "caption": "the right one", "label": 0}
    sources.write_array_record(tmp_path / "x.array_record", [record])
    item = open_source(f"array_record:{tmp_path}/*", codec=TEXT, key="caption")[0]
    assert item["text"] == "the right one"


# TFDS.


def test_many_records_at_a_time_are_those_of_one_at_a_time(tmp_path):
    """Whatever of them is damaged: a record without a text, or bytes of a file."""
    for shard in range(3):
        examples = [{"text": f"Text {i} of {shard}. " * 40, "id": i} for i in range(150)]
        examples[7] = {"no text": 1}
        sources.write_array_record(tmp_path / f"train-{shard}.array_record", examples)
    path = tmp_path / "train-1.array_record"
    data = bytearray(path.read_bytes())
    data[9_000] ^= 0xFF  # in one of its records
    path.write_bytes(data)
    source = open_source(f"array_record:{tmp_path}", codec=TEXT)

    def alone(i):
        try:
            return source[i]
        except UserError as error:
            return str(error)

    wanted = [alone(i) for i in range(450)]
    assert sum(isinstance(one, str) for one in wanted) == 4
    for rows in (range(450), range(140, 320), range(7, 8), range(0), [3, 300, 2]):
        found = [str(x) if isinstance(x, UserError) else x for x in source.results(rows)]
        assert found == [wanted[i] for i in rows]
    assert [i for i, _ in source.items()] == [i for i in range(450) if isinstance(wanted[i], dict)]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """A real TFDS data set, tiny_source, prepared as ArrayRecord without TensorFlow."""
    import tensorflow_datasets as tfds

    class TinySource(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {
                "image": tfds.features.Image(),
                "label": tfds.features.ClassLabel(names=["even", "odd"]),
                "caption": tfds.features.Text(),
                "audio": tfds.features.Tensor(shape=(None,), dtype=np.int16),
            }
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, manager):
            return {"train": self._generate_examples(5), "test": self._generate_examples(2)}

        def _generate_examples(self, count):
            for i in range(count):
                png = io.BytesIO(encoded(Image.new("RGB", (6, 4), (i, 0, 0)).save, "png"))
                audio = np.full(10 * (i + 1), 2**14, np.int16)
                example = {"image": png, "label": i % 2, "caption": f"é{i}", "audio": audio}
                yield i, example

    folder = tmp_path_factory.mktemp("tfds")
    TinySource(data_dir=folder, file_format="array_record").download_and_prepare()
    return folder


def test_tfds(prepared):
    images = open_source("tfds:tiny_source", codec=VISION, data_dir=str(prepared))
    assert images.label_names == ("even", "odd") and len(images) == 5
    assert sorted(int(item["image"][0, 0, 0]) for item in images) == [0, 1, 2, 3, 4]
    item = pickle.loads(pickle.dumps(images))[0]
    assert item["image"].shape == (4, 6, 3) and item["image"].dtype == np.uint8
    assert item["label"] == item["image"][0, 0, 0] % 2
    assert item["caption"] == f"é{item['image'][0, 0, 0]}"

    place = f"tfds:{prepared}/tiny_source/1.0.0"
    texts = open_source(place, "train[:2]+test", codec=TEXT, key="caption")
    assert len(texts) == 4 and all(item["text"][0] == "é" for item in texts)
    speech = open_source("tfds:tiny_source:1.0.0", codec=SPEECH, data_dir=str(prepared))
    assert sorted(len(item["audio"]) for item in speech) == [10, 20, 30, 40, 50]
    assert speech[0]["audio"].dtype == np.float32 and (speech[0]["audio"] == 0.5).all()
    assert speech.lengths() is None


def test_tfds_errors(prepared, tmp_path):
    def fails(message: str, place: str, split: str = "train", codec: Codec = VISION, **options):
        with pytest.raises(UserError, match=message):
            open_source(f"tfds:{place}", split, codec=codec, **options)[0]

    fails("no split 'tset'; did you mean 'test'", f"{prepared}/tiny_source", "tset")
    fails(
        "'tiny_sorce'.*none is fetched; did you mean 'tiny_source'",
        "tiny_sorce",
        data_dir=str(prepared),
    )
    fails("no folder '/nowhere'", "/nowhere")
    fails("no prepared data set", f"{tmp_path}")
    fails(
        "no 'text' .option key.; choose from audio, caption", f"{prepared}/tiny_source", codec=TEXT
    )
    for config in ("one", "two"):
        write_file(tmp_path / f"set/{config}/1.0.0/dataset_info.json", "{}")
    fails("several configs, name one of one, two", f"{tmp_path}/set")


def test_import_is_light():
    """A data worker needs no jax, TensorFlow or TFDS to read."""
    check = """
import sys
from data2vec_jax.data.sources import open_source
from data2vec_jax.modalities.vision.codec import CODEC
open_source("samples:digits", codec=CODEC)[0]
sys.exit(bool({"jax", "flax", "tensorflow", "tensorflow_datasets"} & set(sys.modules)))
"""
    assert subprocess.run([sys.executable, "-c", check], cwd=ROOT).returncode == 0


# What users get wrong: one line that names the place.


def one_line(message: str, uri: str, split: str = "train", *, codec: Codec, **options) -> None:
    """Opening `uri`, its lengths and its items together raise a UserError of one line."""
    with pytest.raises(UserError, match=message) as error:
        source = open_source(uri, split, codec=codec, **options)
        list(source)
        source.lengths()
    assert "\n" not in str(error.value)


def test_errors_of_the_address(tmp_path):
    one_line("unknown kind 'foldr' for image; did you mean 'folder'", "foldr:/x", codec=VISION)
    one_line("did you mean 'folder:/", str(tmp_path), codec=VISION)
    one_line(
        "unknown kind 'librispeech' for text; choose from ag_news, array_record, folder",
        "librispeech:/x",
        codec=TEXT,
    )
    one_line("no samples 'digit'; did you mean 'digits'", "samples:digit", codec=VISION)
    one_line("no samples 'digits'; choose from glosses", "samples:digits", codec=TEXT)
    one_line("no split 'trian'; did you mean 'train'", "samples:digits", "trian", codec=VISION)
    one_line("no split 'val'; choose from", "samples:glosses", "train+val", codec=TEXT)
    one_line("'key' is not an option of folder:", "folder:/x", codec=TEXT, key="y")
    slow = audio.codec(sample_rate=8_000, kinds=SPEECH.kinds)
    one_line("sample rate is 16000 Hz, needed 8000", "samples:speech", codec=slow)


def test_errors_of_folders(tmp_path):
    folder = f"folder:{tmp_path}"
    one_line("no folder '/nowhere/x'", "folder:/nowhere/x", codec=VISION)
    one_line("no audio files .*wav.* in", folder, codec=SPEECH)
    file = write_file(tmp_path / "a/train/x.txt", "x")
    one_line("no split 'tran' in .*; did you mean 'train'", f"{folder}/a", "tran", codec=TEXT)
    one_line("it is a file: did you mean 'manifest:", f"folder:{file}", codec=TEXT)


def test_errors_of_audio(tmp_path):
    folder = f"folder:{tmp_path}"
    path = write_audio(tmp_path / "x.wav", 100, rate=44_100)
    one_line(r"x\.wav: sample rate is 44100 Hz, needed 16000 Hz.*ffmpeg", folder, codec=SPEECH)
    with pytest.raises(UserError, match=r"x\.wav: sample rate is 44100"):
        open_source(folder, codec=SPEECH).lengths()
    assert len(open_source(folder, codec=audio.codec(sample_rate=44_100))[0]["audio"]) == 100
    path.write_bytes(b"RIFF, but nothing else")
    one_line(r"x\.wav: unreadable audio \(", folder, codec=SPEECH)
    path.unlink()

    path = write_audio(tmp_path / "x.flac", 16_000)
    path.write_bytes(path.read_bytes()[:-2_000])
    one_line(r"x\.flac: (unreadable|damaged) audio", folder, codec=SPEECH)
    path.unlink()

    path = write_audio(tmp_path / "x.wav", 1_000, subtype="PCM_16")
    whole = path.read_bytes()
    path.write_bytes(whole[:-1_000])
    one_line(r"x\.wav: damaged audio, ends after 1000 of 2000 bytes", folder, codec=SPEECH)
    at = whole.index(b"data") + 4
    for size in (0xFFFFFFFF, 0x80000000, 0x7FFFF000):  # of streams
        path.write_bytes(whole[:at] + size.to_bytes(4, "little") + whole[at + 4 :])
        assert len(open_source(folder, codec=SPEECH)[0]["audio"]) == 1_000
    path.unlink()

    source = open_source(f"folder:{write_audio(tmp_path / 'y.wav', 9).parent}", codec=SPEECH)
    (tmp_path / "y.wav").unlink()
    with pytest.raises(UserError, match=r"y\.wav: no such file"):
        source[0]
    soundfile.write(tmp_path / "y.wav", np.array([0, np.nan, 0]), RATE, subtype="FLOAT")
    one_line(r"y\.wav: damaged audio, has samples that are not finite", folder, codec=SPEECH)


def test_errors_of_images_and_texts(tmp_path):
    path = write_image(tmp_path / "x.png", size=(64, 64))
    whole = path.read_bytes()
    for broken in (b"", b"GIF89a", whole[:50], whole[:-30], whole[:40] + b"junk" + whole[44:]):
        path.write_bytes(broken)
        one_line(r"x\.png: unreadable image \(", f"folder:{tmp_path}", codec=VISION)
    Image.new("F", (4, 4)).save(tmp_path / "x.tiff")
    path.unlink()
    one_line(r"x\.tiff: image has 32 bits a pixel", f"folder:{tmp_path}", codec=VISION)
    (tmp_path / "x.txt").write_bytes("é".encode("latin1"))
    one_line(r"x\.txt: unreadable text \('utf-8' codec", f"folder:{tmp_path}", codec=TEXT)


def test_errors_of_manifests(tmp_path):
    place = tmp_path / "m.tsv"
    one_line(r"no file '.*m\.tsv'", f"manifest:{place}", codec=SPEECH)
    write_audio(tmp_path / "1.wav", 100)

    def fails(message: str, text: str, codec: Codec, **options) -> None:
        write_file(place, text)
        one_line(message, f"manifest:{place}", codec=codec, **options)

    fails(r"m\.tsv: has no rows", "", SPEECH)
    fails(r"m\.tsv: has no rows", f"{tmp_path}\n", SPEECH)
    fails(r"m\.tsv:3: no file '.*2\.wav'", f"{tmp_path}\n1.wav\t100\n2.wav\t100\n", SPEECH)
    fails(r"m\.tsv:2: no file '/gone/1\.wav'", "/gone\n1.wav\t100\n", SPEECH)
    fails(r"m\.tsv:2: 1 columns, not 2 \(path, samples\)", f"{tmp_path}\n1.wav\n", SPEECH)
    fails(r"m\.tsv:2: '1e3' is not a number of samples", f"{tmp_path}\n1.wav\t1e3\n", SPEECH)
    fails("m.tsv: two columns have the name 'text'", "text\tlabel\ttext\na\t0\tb\n", TEXT)
    write_file(tmp_path / "m.csv", "path;transcript\n1.wav;a\n")
    message = "one column, 'path;transcript'; columns end with a comma"
    one_line(message, f"manifest:{tmp_path}/m.csv", codec=SPEECH)
    fails("no column 'path'; its first line is '1.png, cat'", "1.png\tcat\n2.png\tdog\n", VISION)
    fails("no column 'txt'; did you mean 'text'", "text\na\n", TEXT, key="txt")
    fails("no split 'train'; choose from test", "text\tsplit\na\ttest\n", TEXT)
    fails(
        "unknown label 'hot'; did you mean 'not'",
        "text\tlabel\na\thot\n",
        TEXT,
        label_names=["not", "is"],
    )
    place.write_bytes(b"text\n\xff\n")
    one_line(r"m\.tsv: unreadable table", f"manifest:{place}", codec=TEXT)
    fails(
        r"m\.tsv:3: unknown label '2'",
        "text\tlabel\na\t0\nb\t2\n",
        TEXT,
        label_names=["0", "1", "3"],
    )
    fails(r"m\.tsv:2: unknown label '0'", "text\tlabel\na\t0\n", TEXT, label_names=["1", "2", "3"])
    fails(r"m\.tsv:3: label 'x' is not a number", "text\tlabel\na\t1\nb\tx\n", TEXT, label_names=())
    place = tmp_path / "m.jsonl"
    fails(r"m\.jsonl:2: not JSON \(", '{"text": "a"}\n{"text"\n', TEXT)
    fails(r"m\.jsonl:2: no 'text'", '{"text": "a"}\n{"txt": "b"}\n', TEXT)
    fails(r"m\.jsonl:2: text is None, not a string", '{"text": "a"}\n{"text": null}\n', TEXT)
    fails(r"m\.jsonl:1: not a JSON object", "[1]\n", TEXT)
    place = tmp_path / "m.tsv.gz"
    damaged = bytearray(gzip.compress(b"text\n" + bytes(range(97, 123)) * 9))
    damaged[10] = 0xFF  # a kind of block that there is not
    for content in (b"not gzip", bytes(damaged)):
        place.write_bytes(content)
        one_line(r"m\.tsv\.gz: unreadable table", f"manifest:{place}", codec=TEXT)


def test_errors_of_array_records(tmp_path):
    folder = f"array_record:{tmp_path}"
    one_line(r"no \*\.array_record files in", folder, codec=TEXT)
    one_line(r"no file or folder '.*x\*'", f"{folder}/x*", codec=TEXT)
    path = tmp_path / "train-0.array_record"
    sources.write_array_record(path, [{"text": "a"}, {"text": "b"}])
    one_line("no split 'trian'; did you mean 'train'", folder, "trian", codec=TEXT)
    one_line(r"train-0\.array_record\[0\]: no 'image_bytes' or 'image'", folder, codec=VISION)
    path.write_bytes(b"x" * 100_000)
    one_line(r"train-0\.array_record: unreadable ArrayRecord file", folder, codec=TEXT)

    def fails(message: str, example: dict, codec: Codec) -> None:
        sources.write_array_record(path, [example])
        one_line(r"train-0\.array_record\[0\]: " + message, folder, codec=codec)

    slow = encoded(soundfile.write, tone(50), 8_000, format="WAV")
    with pytest.raises(UserError, match=r"array_record\[0\]: sample rate is 8000 Hz"):
        sources.write_array_record(path, [{"audio_bytes": slow}], codec=SPEECH)
    with pytest.raises(UserError, match=r"array_record\[0\]: sample rate is 8000 Hz"):
        sources.write_array_record(path, [{"audio": tone(9), "sample_rate": 8_000}], codec=SPEECH)
    fails(r"audio is float32 \[9, 2\], needed int16 or float", {"audio": tone(9, 2)}, SPEECH)
    fails(r"image is float32 \[9, 9, 1\], needed uint8", {"image": tone(9, 9)}, VISION)
    fails(r"unreadable image", {"image_bytes": b"?"}, VISION)


def test_a_class_that_is_called_like_a_split(tmp_path):
    """Of vehicles, 'train' is one: to read it alone would lose all the others silently."""
    for name in ("bus/1", "car/1", "train/1"):
        write_image(tmp_path / f"{name}.png")
    one_line(
        "is 'train' a split, or a class like 'bus' and 'car'", f"folder:{tmp_path}", codec=VISION
    )
    (tmp_path / "notes").mkdir()  # nothing to learn from
    for name in ("bus", "car"):
        (tmp_path / name).rename(tmp_path / "train" / name)
    assert len(open_source(f"folder:{tmp_path}", codec=VISION)) == 3


def test_a_split_without_examples_of_its_own(tmp_path):
    for name in ("cat/1", "dog/1"):
        write_image(tmp_path / f"{name}.png")
    train = open_source(f"folder:{tmp_path}", codec=VISION)
    test = open_source(f"folder:{tmp_path}", "test", codec=VISION)
    with pytest.raises(UserError, match=r"'test' of .* is the training examples themselves"):
        sources.check_held_out(train, test, "or none: None")
    sources.check_held_out(train, train, "")  # asked for


def test_a_kind_without_a_place():
    one_line("colon and a place: folder:PLACE", "folder", codec=VISION)
    one_line("unknown kind 'aaa", "a" * 5000, codec=VISION)
