"""`prepare`: corpora in their authors' layouts -> shards, the same however they are made."""

import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

from data2vec_jax.core import bad_examples
from data2vec_jax.core.errors import ExampleError, UserError
from data2vec_jax.data.sources import open_source, write_array_record
from data2vec_jax.modalities.sound.codec import CODEC as SOUND
from data2vec_jax.modalities.speech.codec import CODEC as SPEECH
from data2vec_jax.modalities.text.codec import CODEC as TEXT
from data2vec_jax.modalities.vision.codec import CODEC as VISION
from data2vec_jax.prepare.__main__ import main
from data2vec_jax.prepare.examples import prepare_example

RATE = 16_000


def prepare(modality, source, target, *options):
    """Runs the command in this process, and returns its manifest."""
    if not any(option.startswith("--workers") for option in options):
        options = (*options, "--workers=1")
    main([modality, f"--source={source}", f"--target={target}", *options])
    return json.loads((target / "manifest.json").read_text())


def opened(target, split="train", codec=SPEECH):
    return open_source(f"array_record:{target}", split, codec=codec)


def refused(message, function, *arguments):
    """It fails with one line that says `message`."""
    with pytest.raises(UserError) as error:
        function(*arguments)
    assert message in str(error.value) and "\n" not in str(error.value)


def files(folder):
    """Name -> bytes of all files below a folder."""
    return {p.name: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def voice():
    """Real speech, float32 [n]."""
    source = open_source("samples:speech", "train", codec=SPEECH)
    return np.concatenate([source[i]["audio"] for i in range(4)])


@pytest.fixture(scope="module")
def libri(tmp_path_factory, voice):
    """A tree like LibriSpeech's, of real speech: 24 training and 6 dev utterances."""
    place = tmp_path_factory.mktemp("libri")
    for split, count in (("train-clean-100", 24), ("dev-clean", 6)):
        for n in range(count):
            speaker, chapter = str(100 + n // 4), str(2000 + n // 2)
            folder = place / "LibriSpeech" / split / speaker / chapter
            folder.mkdir(parents=True, exist_ok=True)
            name = f"{speaker}-{chapter}-{n % 2:04}"
            audio = voice[997 * n :][: 8000 + 800 * n]
            soundfile.write(folder / f"{name}.flac", audio, RATE)
            with (folder / f"{speaker}-{chapter}.trans.txt").open("a") as table:
                table.write(f"{name} UTTERANCE NUMBER {n}\n")
    return place


SPLITS = "--splits=train=train-clean-100,dev=dev-clean"


@pytest.fixture(scope="module")
def shards(libri, tmp_path_factory):
    """The tree above as shards of about 100 kB."""
    target = tmp_path_factory.mktemp("shards") / "libri"
    options = SPLITS, "--shard_mb=0.1", "--licence=CC BY 4.0"
    return target, prepare("speech", f"librispeech:{libri}", target, *options)


def test_librispeech(libri, shards):
    target, manifest = shards
    assert (manifest["modality"], manifest["licence"]) == ("speech", "CC BY 4.0")
    assert manifest["conversion"] is None and manifest["units"] == "samples"
    files_of = sorted((libri / "LibriSpeech" / "train-clean-100").rglob("*.flac"))
    source = opened(target)
    assert len(source) == len(files_of) == manifest["splits"]["train"]["examples"] == 24
    for i, path in enumerate(files_of):
        item = source[i]
        want, _ = soundfile.read(path, dtype="float32")
        np.testing.assert_array_equal(item["audio"], want)
        assert item["id"] == path.stem and item["speaker"] == path.parts[-3]
        number = int(item["transcript"].split()[-1])
        assert item["transcript"] == f"UTTERANCE NUMBER {number}"
        assert source.lengths()[i] == len(want) == 8000 + 800 * number
        assert source.field(i, "transcript") == item["transcript"]
        assert source.column("transcript")[i] == item["transcript"]
    total = sum(8000 + 800 * n for n in range(24))
    assert manifest["splits"]["train"] == {"examples": 24, "length": total, "bad": {}}
    assert len(opened(target, "dev")) == 6
    for shard in manifest["shards"]:
        data = (target / shard["file"]).read_bytes()
        assert len(data) == shard["bytes"]
        assert hashlib.sha256(data).hexdigest() == shard["sha256"]
    assert len(manifest["shards"]) > 4
    assert not (target / "unfinished").exists()


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_any_number_of_processes_makes_the_same(libri, shards, tmp_path, workers):
    options = SPLITS, "--shard_mb=0.1", "--licence=CC BY 4.0", f"--workers={workers}"
    prepare("speech", f"librispeech:{libri}", tmp_path / "again", *options)
    assert files(tmp_path / "again") == files(shards[0])


def test_goes_on_after_a_kill(libri, shards, tmp_path):
    target = tmp_path / "killed"
    options = [SPLITS, "--shard_mb=0.1", "--licence=CC BY 4.0"]
    arguments = ["speech", f"--source=librispeech:{libri}", f"--target={target}", *options]
    slow = (  # so that the kill comes in the middle
        "import sys, time; from data2vec_jax.prepare import __main__, shards\n"
        "make = shards.prepare_example\n"
        "def slower(*x): time.sleep(0.05); return make(*x)\n"
        "shards.prepare_example = slower\n"
        f"__main__.main({[*arguments, '--workers=1']!r})"
    )
    process = subprocess.Popen([sys.executable, "-c", slow], cwd=Path(__file__).parents[1])
    deadline = time.monotonic() + 120
    while len(list(target.glob("unfinished/*.array_record"))) < 2:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = {p.name for p in target.glob("unfinished/*.array_record")}
    assert 2 <= len(done) < len(shards[1]["shards"])
    refused("is not finished", opened, target)
    before = {name: os.stat(target / name).st_mtime_ns for name in done}
    prepare("speech", f"librispeech:{libri}", target, *options)
    assert before == {name: os.stat(target / name).st_mtime_ns for name in done}
    assert files(target) == files(shards[0])
    refused("is finished", prepare, "speech", f"librispeech:{libri}", target, *options)


def test_a_shard_of_an_earlier_state_is_made_again(libri, shards, tmp_path):
    for n in range(4):
        soundfile.write(tmp_path / f"{n}.wav", np.full(2000, 0.1 * n), RATE)
    (tmp_path / "1.wav").write_bytes(b"no audio")
    options = f"folder:{tmp_path}", tmp_path.with_name("state"), "--shard_mb=1e-6"
    refused("1 of 4", prepare, "speech", *options, "--max_bad_share=0")
    assert not (options[1] / "manifest.json").exists()
    soundfile.write(tmp_path / "1.wav", np.full(1000, 0.7), RATE)
    assert prepare("speech", *options)["splits"]["train"]["examples"] == 4
    assert opened(options[1])[1]["audio"][0] == pytest.approx(0.7, abs=1e-4)


def damage(folder, kind):
    one, other = folder / "train-00000.array_record", folder / "train-00001.array_record"
    if kind == "missing":
        one.unlink()
    elif kind == "cut":
        one.write_bytes(one.read_bytes()[:-100])
    elif kind == "other":
        one.write_bytes(other.read_bytes())
    elif kind == "bit":
        data = bytearray(one.read_bytes())
        data[-1] ^= 1
        one.write_bytes(data)
    elif kind == "lengths":
        path = folder / "train-00000.array_record.lengths.npy"
        np.save(path, np.load(path) + 1)
    elif kind == "columns":
        (folder / "train-00000.array_record.columns.json").write_text("{}")
    elif kind == "count":
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["shards"][0]["examples"] += 1
        (folder / "manifest.json").write_text(json.dumps(manifest))
    else:
        (folder / "manifest.json").write_text(kind)


@pytest.mark.parametrize(
    "kind, message",
    [
        ("missing", "missing"),
        ("cut", "damaged"),
        ("other", "train-00000.array_record"),
        ("bit", "damaged"),
        ("lengths", "lengths.npy"),
        ("columns", "columns.json"),
        ("count", "records, but manifest.json says"),
        ('{"version": 2}', "version 2"),
        ('{"version": 1, "shards": [{}]}', "no list of shards"),
        ("[", "not JSON"),
    ],
)
def test_a_manifest_of_other_shards_is_refused(shards, tmp_path, kind, message):
    for name, data in files(shards[0]).items():
        (tmp_path / name).write_bytes(data)
    assert len(opened(tmp_path)) == 24
    damage(tmp_path, kind)
    refused(message, opened, tmp_path)


def test_no_split_of_this_name(shards):
    refused("no split 'test'", opened, shards[0], "test")
    assert len(opened(shards[0], "train+dev")) == 30


def test_a_target_with_other_files_is_left_alone(libri, tmp_path):
    write_array_record(tmp_path / "mine.array_record", [{"text": "kept"}])
    before = files(tmp_path)
    refused("holds other files", prepare, "speech", f"librispeech:{libri}", tmp_path, SPLITS)
    assert files(tmp_path) == before


def test_every_bad_file_has_its_reason(tmp_path, voice):
    good, bad = tmp_path / "good.wav", tmp_path / "bad"
    bad.mkdir()
    soundfile.write(good, voice[:16000], RATE)
    soundfile.write(bad / "rate.wav", voice[:16000], 44_100)
    soundfile.write(bad / "cut.wav", voice[:16000], RATE)
    (bad / "cut.wav").write_bytes((bad / "cut.wav").read_bytes()[:-5000])
    soundfile.write(bad / "nothing.wav", voice[:0], RATE)
    soundfile.write(bad / "nan.wav", np.full(100, np.nan, np.float32), RATE, "FLOAT")
    (bad / "text.wav").write_text("this is a text")
    os.mkfifo(bad / "pipe.wav")
    os.symlink(bad / "nowhere", bad / "link.wav")
    (tmp_path / os.fsdecode(b"\xff.wav")).write_bytes(good.read_bytes())
    target = tmp_path / "shards"
    manifest = prepare("speech", f"folder:{tmp_path}", target, "--max_bad_share=1")
    lines = [json.loads(line) for line in (target / bad_examples.FILE).open()]
    reasons = {Path(line["path"]).name: line["reason"] for line in lines}
    assert reasons == {
        "rate.wav": "sample rate",
        "cut.wav": "damaged",
        "nothing.wav": "empty",
        "nan.wav": "not finite",
        "text.wav": "unreadable",
        "pipe.wav": "not a file",
        "link.wav": "missing",
        "\\udcff.wav": "name",
    }
    assert all(line["split"] == "train" and line["message"] for line in lines)
    assert manifest["splits"]["train"]["examples"] == 1
    assert sum(manifest["splits"]["train"]["bad"].values()) == 8
    other = tmp_path / "refused"
    refused("8 of 9 examples of train", prepare, "speech", f"folder:{tmp_path}", other)
    refused("is not finished", opened, other)


# Conversions ------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [8_000, 44_100, 48_000])
def test_resampled_tones_are_the_tones(tmp_path, rate):
    """Two channels with a tone of 1 kHz each, of sizes 0.6 and 0.2: the mean is a tone of 0.4."""
    pytest.importorskip("soxr")
    time_of = np.arange(rate) / rate
    tone = np.sin(2 * np.pi * 1000 * time_of)
    soundfile.write(tmp_path / "tone.wav", np.stack([0.6 * tone, 0.2 * tone], 1), rate)
    target = tmp_path / "shards"
    manifest = prepare("speech", f"folder:{tmp_path}", target, "--resample")
    audio = opened(target)[0]["audio"]
    want = 0.4 * np.sin(2 * np.pi * 1000 * np.arange(RATE) / RATE)
    assert len(audio) == RATE
    np.testing.assert_allclose(audio[800:-800], want[800:-800], atol=1e-3)
    assert manifest["conversion"]["resample"] is True and manifest["conversion"]["soxr"]


def test_audio_of_the_right_rate_keeps_its_bytes(tmp_path, voice):
    pytest.importorskip("soxr")
    soundfile.write(tmp_path / "a.flac", voice[:8000], RATE, "PCM_24")
    stored = next(open_source(f"folder:{tmp_path}", codec=SPEECH).stored())
    record = prepare_example(stored, SPEECH, SPEECH.conversion(resample=True))
    assert record == {"path": "a.flac", "audio_bytes": (tmp_path / "a.flac").read_bytes()}
    record = prepare_example(stored, SPEECH, SPEECH.conversion(encode="wav"))
    found, rate = soundfile.read(io.BytesIO(record["audio_bytes"]))
    assert rate == RATE and record["audio_bytes"][:4] == b"RIFF"
    np.testing.assert_allclose(found, voice[:8000], atol=2**-15)


def test_nothing_is_left_of_a_sample(tmp_path):
    pytest.importorskip("soxr")
    soundfile.write(tmp_path / "a.wav", np.ones(1), 44_100)
    refused("too short 1", prepare, "speech", f"folder:{tmp_path}", tmp_path / "t", "--resample")


def test_images_are_made_smaller_and_upright(tmp_path):
    pixels = np.zeros((60, 200, 3), np.uint8)
    pixels[:, :100] = 255  # white on the left
    turned = Image.Exif()
    turned[0x0112] = 6  # to be turned by 90 degrees clockwise: then white is at the top
    Image.fromarray(pixels).save(tmp_path / "photo.jpg", exif=turned)
    Image.fromarray(pixels[:20, :20]).save(tmp_path / "small.png")
    target = tmp_path / "shards"
    options = "--short_side=30", "--encode=png"
    manifest = prepare("vision", f"folder:{tmp_path}", target, *options)
    source = opened(target, codec=VISION)
    assert [source[i]["image"].shape for i in range(2)] == [(100, 30, 3), (20, 20, 3)]
    assert source[0]["image"][10].min() > 240 > 15 > source[0]["image"][-10].max()
    said = manifest["conversion"]
    assert (said["short_side"], said["encode"], said["quality"]) == (30, "png", 90)
    source, quality = f"folder:{tmp_path}", tmp_path / "q"
    refused("--quality", prepare, "vision", source, quality, "--quality=101")
    for options in (["--quality=80"], ["--quality=80", "--encode=png", "--short_side=30"]):
        refused("--quality=80: no JPEG is written", prepare, "vision", source, quality, *options)


# Layouts of speech and sound --------------------------------------------------------------------


def transcripts(target, split="train"):
    source = opened(target, split)
    return [source[i]["transcript"] for i in range(len(source))]


def test_common_voice(tmp_path, voice):
    pytest.importorskip("soxr")
    place = tmp_path / "cv" / "tr"
    (place / "clips").mkdir(parents=True)
    head = "client_id\tpath\tsentence\tup_votes\tage\tlocale\n"
    rows = [f'{"ab" * 32}\tcommon_voice_tr_{n}.mp3\t"Işık" {n}\t2\t\ttr\n' for n in range(3)]
    for n in range(2):  # the third is missing
        soundfile.write(place / "clips" / f"common_voice_tr_{n}.mp3", voice[:48000], 32_000)
    (place / "train.tsv").write_text(head + "".join(rows[:2]))
    (place / "test.tsv").write_text(head + "".join(rows[1:]))
    options = "--splits=train,test", "--resample", "--max_bad_share=0.5"
    manifest = prepare("speech", f"common_voice:{place}", tmp_path / "out", *options)
    assert transcripts(tmp_path / "out") == ['"Işık" 0', '"Işık" 1']
    item = opened(tmp_path / "out", "test")[0]
    assert (item["speaker"], item["locale"], item["sample_rate"]) == ("ab" * 32, "tr", RATE)
    assert abs(len(item["audio"]) - 24000) < 1200  # MP3 has whole frames
    assert manifest["splits"]["test"]["bad"] == {"missing": 1}
    options = f"common_voice:{place}", tmp_path / "no", "--splits=tset"
    refused("did you mean 'test'?", prepare, "speech", *options)
    above = f"common_voice:{place.parent}", tmp_path / "no", "--splits=test"
    refused(f"give the folder of a language, such as '{place}'", prepare, "speech", *above)
    (place / "test.tsv").write_bytes(head.encode() + b"\xff\n")
    refused("unreadable table", prepare, "speech", *options[:2], "--splits=test")


@pytest.mark.parametrize("suffix", ["ltr", "wrd"])
def test_fairseq(tmp_path, voice, suffix):
    lines = [f"{tmp_path}"]
    for n in range(3):
        soundfile.write(tmp_path / f"{n}.flac", voice[: 8000 + n], RATE)
        lines.append(f"{n}.flac\t{8000 + n}")
    texts = {"ltr": "H E L L O | Y O U |\nN O |\nI ' M |\n", "wrd": "HELLO YOU\nNO\nI'M\n"}
    (tmp_path / "train.tsv").write_text("\n".join(lines) + "\n")
    (tmp_path / f"train.{suffix}").write_text(texts[suffix])
    prepare("speech", f"fairseq:{tmp_path}", tmp_path / "out")
    assert transcripts(tmp_path / "out") == ["HELLO YOU", "NO", "I'M"]
    (tmp_path / f"train.{suffix}").write_text("ONE\n")
    refused("1 lines for the 3", prepare, "speech", f"fairseq:{tmp_path}", tmp_path / "no")


def test_libri_light(tmp_path, voice):
    folder = tmp_path / "small" / "100" / "sea_fairies"
    folder.mkdir(parents=True)
    soundfile.write(folder / "01_sea.flac", voice[:32000], RATE)
    (folder / "01_sea.json").write_text("{}")
    prepare("speech", f"librilight:{tmp_path}", tmp_path / "out", "--splits=train=small")
    item = opened(tmp_path / "out")[0]
    assert item["speaker"] == "100" and len(item["audio"]) == 32000
    source = f"librilight:{tmp_path}"
    refused("no folder 'smal'", prepare, "speech", source, tmp_path / "x", "--splits=smal")


def test_a_folder_with_transcripts(tmp_path, voice, capsys):
    for name, text in (("a.wav", "Zażółć  gęślą\njaźń\n"), ("b.wav", None), ("c.wav", "b")):
        soundfile.write(tmp_path / name, voice[:8000], RATE)
        if text:
            (tmp_path / name).with_suffix(".lab" if name == "c.wav" else ".txt").write_text(text)
    options = f"transcribed:{tmp_path}", tmp_path / "out", "--max_bad_share=0.4"
    manifest = prepare("speech", *options)
    assert "not read" not in capsys.readouterr().err
    assert transcripts(tmp_path / "out") == ["Zażółć gęślą jaźń", "b"]
    assert manifest["splits"]["train"]["bad"] == {"missing": 1}


def test_esc50_and_audioset(tmp_path, voice):
    pytest.importorskip("soxr")
    esc = tmp_path / "ESC-50"
    (esc / "meta").mkdir(parents=True)
    (esc / "audio").mkdir()
    rows = [("1-1-A-0.wav", 1, 0, "dog"), ("2-1-A-1.wav", 2, 1, "rooster")]
    (esc / "meta" / "esc50.csv").write_text(
        "filename,fold,target,category\n" + "".join(f"{a},{b},{c},{d}\n" for a, b, c, d in rows)
    )
    for name, *_ in rows:
        soundfile.write(esc / "audio" / name, voice[:44100], 44_100)
    options = "--splits=train=fold1,test=fold2", "--resample"
    manifest = prepare("sound", f"esc50:{esc}", tmp_path / "esc", *options)
    assert manifest["label_names"] == ["dog", "rooster"]
    source = opened(tmp_path / "esc", "test", SOUND)
    assert source[0]["label"] == 1 and source.label_names == ("dog", "rooster")
    assert len(source[0]["audio"]) == RATE
    assert source.column("label") == [1] and source.column("labels") is None

    top = tmp_path / "audioset"
    (top / "eval_segments").mkdir(parents=True)
    (top / "class_labels_indices.csv").write_text(
        'index,mid,display_name\n0,/m/a,"Speech"\n1,/m/b,"Dog, barking"\n'
    )
    (top / "eval_segments.csv").write_text('# made\nabc, 30.000, 40.000, "/m/b,/m/a"\n')
    soundfile.write(top / "eval_segments" / "Yabc.wav", voice[:16000], RATE)
    manifest = prepare("sound", f"audioset:{top}", tmp_path / "as", "--splits=eval")
    assert manifest["label_names"] == ["Speech", "Dog, barking"]
    source = opened(tmp_path / "as", "eval", SOUND)
    assert source[0]["labels"] == [1, 0] and source.column("labels") == [[1, 0]]


# ImageNet ---------------------------------------------------------------------------------------

CLASSES = "n01440764", "n01443537"


def jpeg(value):
    file = io.BytesIO()
    Image.fromarray(np.full((40, 50, 3), value, np.uint8)).save(file, "jpeg")
    return file.getvalue()


def add(tar, name, data):
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


@pytest.fixture
def tars(tmp_path):
    """ILSVRC 2012 as its authors ship it, with two classes and Kaggle's table of validation."""
    with tarfile.open(tmp_path / "ILSVRC2012_img_train.tar", "w") as outer:
        for c, name in enumerate(reversed(CLASSES)):
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as tar:
                for n in range(3):
                    add(tar, f"{name}_{n}.JPEG", jpeg(100 * (1 - c) + 10 * n))
            add(outer, f"{name}.tar", inner.getvalue())
    with tarfile.open(tmp_path / "ILSVRC2012_img_val.tar", "w") as tar:
        add(tar, "README.txt", b"no image")
        add(tar, "ILSVRC2012_val_00000001.JPEG", jpeg(100))
        add(tar, "ILSVRC2012_val_00000002.JPEG", jpeg(0))
    rows = f"ImageId,PredictionString\nILSVRC2012_val_00000001,{CLASSES[1]} 1 2 3 4\n"
    rows += f"ILSVRC2012_val_00000002,{CLASSES[0]} 1 2 3 4\n"
    (tmp_path / "LOC_val_solution.csv").write_text(rows)
    return tmp_path


def check_images(source, count):
    """The grey of an image says which class it is of, and its path says so, too."""
    assert len(source) == count and source.label_names == CLASSES
    for i in range(count):
        grey = source[i]["image"].mean()
        assert source[i]["label"] == round(grey // 100)


def test_imagenet_in_tars(tars):
    for split, count in (("train", 6), ("val", 2)):
        check_images(open_source(f"imagenet:{tars}", split, codec=VISION), count)
    manifest = prepare("vision", f"imagenet:{tars}", tars / "out", "--splits=train,val")
    assert manifest["label_names"] == list(CLASSES) and manifest["units"] is None
    for split, count in (("train", 6), ("val", 2)):
        check_images(opened(tars / "out", split, VISION), count)
    raw = open_source(f"imagenet:{tars}", "train", codec=VISION).stored()
    assert prepare_example(next(raw), VISION)["image_bytes"] == jpeg(100)


def test_imagenet_in_folders_gives_the_same_examples(tars):
    """As people unpack them; only the order of the files differs."""
    top = tars / "folders"
    for path, data in (
        (f"{name}/{name}_{n}.JPEG", jpeg(100 * c + 10 * n))
        for c, name in enumerate(CLASSES)
        for n in range(3)
    ):
        (top / "train" / path).parent.mkdir(parents=True, exist_ok=True)
        (top / "train" / path).write_bytes(data)
    prepare("vision", f"imagenet:{top}", tars / "out")
    check_images(opened(tars / "out", codec=VISION), 6)


def test_a_cut_tar(tars):
    path = tars / "ILSVRC2012_img_train.tar"
    path.write_bytes(path.read_bytes()[:6000])
    refused("unreadable tar", prepare, "vision", f"imagenet:{tars}", tars / "out")


def test_a_tar_that_changed_later(tars):
    source = open_source(f"imagenet:{tars}", "val", codec=VISION)
    path = tars / "ILSVRC2012_img_val.tar"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ExampleError, match="ends after"):
        source[1]


def test_class_folders_keep_their_classes_in_every_split(tmp_path):
    for split, name in (("train", "cat"), ("train", "dog"), ("val", "dog")):
        (tmp_path / split / name).mkdir(parents=True)
        (tmp_path / split / name / "1.jpg").write_bytes(jpeg(90))
    manifest = prepare("vision", f"folder:{tmp_path}", tmp_path / "out", "--splits=train,val")
    assert manifest["label_names"] == ["cat", "dog"]
    assert opened(tmp_path / "out", "val", VISION)[0]["label"] == 1


# Texts ------------------------------------------------------------------------------------------


def texts(target, split="train"):
    source = opened(target, split, TEXT)
    return [source[i]["text"] for i in range(len(source))]


def test_jsonl_csv_and_files(tmp_path):
    rows = [{"body": "First.", "id": 1}, {"body": None, "id": 2}, {"body": " ", "id": 3}]
    rows.append({"body": "No record holds its number.", "id": 2**70})
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = "--key=body", "--max_bad_share=0.9"
    manifest = prepare("text", f"manifest:{tmp_path}/a.jsonl", tmp_path / "j", *options)
    assert texts(tmp_path / "j") == ["First."] and opened(tmp_path / "j", codec=TEXT)[0]["id"] == 1
    assert manifest["splits"]["train"]["bad"] == {"empty": 1, "format": 2}
    (tmp_path / "a.csv").write_text('text,label\n"a, ""b""",good\nc,bad\n')
    manifest = prepare("text", f"manifest:{tmp_path}/a.csv", tmp_path / "c")
    assert texts(tmp_path / "c") == ['a, "b"', "c"] and manifest["label_names"] == ["bad", "good"]
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "1.txt").write_text("A line.\n\nAnother.\n")
    prepare("text", f"folder:{tmp_path}/t", tmp_path / "f")
    assert texts(tmp_path / "f") == ["A line.\n\nAnother.\n"]


# Mistakes ---------------------------------------------------------------------------------------


def test_mistakes(libri, tmp_path, shards):
    source, target = f"librispeech:{libri}", tmp_path / "out"
    refused(
        "no folder 'train-clean-10'", prepare, "speech", source, target, "--splits=train-clean-10"
    )
    refused("is there twice", prepare, "speech", source, target, "--splits=a,a=b")
    refused("--workers: 0 is not", prepare, "speech", source, target, "--workers=0")
    refused("unrecognized", prepare, "speech", source, target, "--encodes=flac")
    refused("invalid choice", prepare, "speech", source, target, "--encode=opus")
    refused("neither files nor texts", prepare, "vision", "samples:digits", target)
    refused("neither files nor texts", prepare, "speech", f"array_record:{shards[0]}", target)
    refused("MODALITY", main, [])
    assert not (target / "manifest.json").exists()
