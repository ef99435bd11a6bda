"""`prepare --check`: what is wrong with a corpus is found, counted and named."""

import json

import numpy as np
import pytest
import soundfile
from PIL import Image
from test_prepare import prepare, refused

from data2vec_jax.prepare.__main__ import main

RATE = 16_000


def check(modality, source, folder, *options):
    """Runs the command in this process, and returns what check.json holds."""
    main([modality, f"--source={source}", f"--check={folder}", "--workers=1", *options])
    page = (folder / "check.html").read_text()
    found = json.loads((folder / "check.json").read_text())
    assert page.startswith("<!doctype html>") and "<script" not in page
    assert ("No fault was found" in page) == found["fit"] == (not found["faults"])
    return found


def noise(seconds, seed=0, size=0.1):
    return np.random.default_rng(seed).uniform(-size, size, round(seconds * RATE))


def fault(found, *words):
    """The one fault that has all these words."""
    (one,) = [line for line in found["faults"] if all(word in line for word in words)]
    return one


@pytest.fixture
def table(tmp_path):
    """A table of recordings, of which most have something wrong."""
    half = np.concatenate([noise(0.05), np.zeros(RATE)])
    clips = {
        "fine": noise(1.5, 1),
        "again": noise(1.5, 1),
        "short": noise(0.3, 2),
        "faint": noise(1, 3, 0.005),
        "loud": np.clip(noise(1, 4, 3.0), -1, 1),
        "silent": half,
        "test": noise(2, 5),
        "leak": noise(1.5, 1),
    }
    rows = ["path\ttranscript\tlabel\tsplit"]
    for name, audio in clips.items():
        soundfile.write(tmp_path / f"{name}.wav", audio, RATE)
        split = "test" if name in ("test", "leak") else "train"
        rows.append(f"{name}.wav\t{'añb' if name == 'fine' else 'ab'}\t{name[0]}\t{split}")
    soundfile.write(tmp_path / "rate.wav", noise(1), 22_050)
    rows.append("rate.wav\tab\tf\ttrain")
    (tmp_path / "table.tsv").write_text("\n".join(rows) + "\n")
    (tmp_path / "alphabet.txt").write_text("AbC")  # the letters' case is the alphabet's
    return tmp_path


def test_recordings(table):
    options = "--splits=train,test", f"--alphabet={table}/alphabet.txt"
    found = check("speech", f"manifest:{table}/table.tsv", table / "page", *options)
    train = found["splits"]["train"]
    assert train["examples"] == 6 and train["bad"] == {"sample rate": 1}
    assert "22050 Hz" in fault(found, "train", "sample rate", "1 of 7 (14.3 %)")
    for word, name in (
        ("too short", "short"),
        ("faint", "faint"),
        ("clipped", "loud"),
        ("silent", "silent"),
    ):
        line = fault(found, f"are {word}")
        assert "1 of 7" in line and line.endswith(f"table.tsv:{list_of(table).index(name) + 2}")
    assert "table.tsv:3" in fault(found, "repeat others", "1 of 7")
    assert "table.tsv:9" in fault(found, "in both train and test", "1 examples")
    # By hand: 13 characters, of which one is not in the alphabet.
    assert "'ñ'" in fault(found, "train", "1 of 13", "alphabet")
    assert train["repeated"] == 1 and train["scripts"] == {"latin": 13}
    seconds = [1.5, 1.5, 0.3, 1, 1, 1.05]
    length = train["measures"]["length"]
    assert length["sum"] == pytest.approx(sum(seconds))
    assert (length["least"], length["greatest"]) == (0.3, 1.5)
    assert sum(length["histogram"]["counts"]) == 6
    assert train["classes"] == {"f": 2, "s": 2, "a": 1, "l": 1}


def list_of(table):
    """Names of the recordings, in the order of their lines."""
    rows = (table / "table.tsv").read_text().splitlines()[1:]
    return [row.partition(".")[0] for row in rows]


def test_a_sound_corpus_has_no_faults_whoever_checks_it(tmp_path):
    for split in ("train", "test"):
        for name in ("a", "b"):
            (tmp_path / split / name).mkdir(parents=True)
            audio = noise(1, sum(map(ord, split + name)))
            soundfile.write(tmp_path / split / name / "1.wav", audio, RATE)
    source, options = f"folder:{tmp_path}", "--splits=train,test"
    found = check("sound", source, tmp_path / "page", options)
    assert found["fit"]
    prepare("sound", source, tmp_path / "shards", options)
    again = check("sound", f"array_record:{tmp_path}/shards", tmp_path / "page2", options)
    assert again["splits"] == found["splits"]
    many = check("sound", source, tmp_path / "page3", options, "--workers=2")
    assert many == found


def test_pictures(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (300, 300, 3), np.uint8)
    for n, (split, name, image) in enumerate(
        [
            *(("train", "cat", pixels[n:, :100]) for n in range(30)),
            ("train", "dog", pixels[:100, 100:200]),
            ("test", "cat", pixels[:20, :300]),
            ("test", "cow", np.full((64, 64, 3), 7, np.uint8)),
        ]
    ):
        (tmp_path / split / name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(tmp_path / split / name / f"{n}.png")
    found = check("vision", f"folder:{tmp_path}", tmp_path / "page", "--splits=train,test")
    assert "differ in size from 1 to 30" in fault(found, "train: classes")
    assert fault(found, "1 classes of test are not in train").endswith("cow")
    assert "31.png" in fault(found, "test", "are small")
    assert "31.png" in fault(found, "test", "are elongated")
    assert "32.png" in fault(found, "test", "are of one colour")
    assert found["splits"]["train"]["classes"] == {"cat": 30, "dog": 1}


def test_texts(tmp_path):
    good = "The quick brown fox jumps over the lazy dog."
    rows = [good, good, "12345 67890 12345 67890", "Ok.", "Ελληνικά και русский текст, हिन्दी में।"]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    found = check("text", f"manifest:{tmp_path}/a.jsonl", tmp_path / "page")
    assert "1 of 5 (20 %)" in fault(found, "repeat others", "a.jsonl:2")
    assert "a.jsonl:3" in fault(found, "are few letters")
    assert "a.jsonl:4" in fault(found, "are too short")
    scripts = found["splits"]["train"]["scripts"]
    assert set(scripts) == {"latin", "greek", "cyrillic", "devanagari"}
    assert scripts["greek"] == 11 and scripts["cyrillic"] == 12


def test_one_of_two_tasks(tmp_path):
    refused("one of --target", main, ["text", "--source=folder:x"])
    refused("one of --target", main, ["text", "--source=folder:x", "--target=a", "--check=b"])
