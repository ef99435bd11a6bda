"""docs/your_data.md: its commands, on real speech, sounds and digits laid out as their authors ship
them, from the files to a score."""

import bz2
import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image
from test_prepare_text import DUMP

from data2vec_jax import evaluate, train
from data2vec_jax.cli.arguments import parse
from data2vec_jax.data.sources import open_source
from data2vec_jax.modalities.sound.codec import CODEC as SOUND
from data2vec_jax.modalities.speech.codec import CODEC as SPEECH
from data2vec_jax.modalities.text import tokenizer
from data2vec_jax.modalities.vision.codec import CODEC as VISION
from data2vec_jax.prepare.__main__ import main
from data2vec_jax.tasks.registry import check_config

RATE, WORDNET = 16_000, [f"n{1440764 + digit:08}" for digit in range(10)]
PAGE = (Path(__file__).parents[1] / "docs" / "your_data.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```\n(.*?)```", PAGE.partition("## Examples")[2], re.S)
COMMANDS = [
    shlex.split(line)[2:]  # without `python -m`
    for block in BLOCKS
    for line in block.replace("\\\n", " ").splitlines()
]
PREPARED = [words for words in COMMANDS if words[0] == "data2vec_jax.prepare"]
TRAINED = [words for words in COMMANDS if words[0] == "data2vec_jax.train"]


def libri(place, clips):
    for split, part in (("train-clean-100", clips[:8]), ("dev-clean", clips[8:11])):
        write_chapter(place / split, part)
    write_chapter(place / "test-clean", clips[11:])


def write_chapter(place, clips):
    folder = place / "1" / "2"
    folder.mkdir(parents=True)
    lines = []
    for n, (audio, text) in enumerate(clips):
        soundfile.write(folder / f"1-2-{n:04}.flac", audio, RATE)
        lines.append(f"1-2-{n:04} {text.upper()}\n")
    (folder / "1-2.trans.txt").write_text("".join(lines))


def common_voice(place, clips):
    (place / "clips").mkdir(parents=True)
    for split, part in (("train", clips[:2]), ("dev", clips[2:3]), ("test", clips[3:4])):
        lines = ["client_id\tpath\tsentence\tup_votes\tdown_votes\tage\tgender\tlocale\n"]
        for n, (audio, text) in enumerate(part):
            name = f"common_voice_ru_{split}{n}.mp3"
            soundfile.write(place / "clips" / name, np.repeat(audio, 3), 3 * RATE)
            lines.append(f"{n:064}\t{name}\t{text}\t2\t0\t\t\tru\n")
        (place / f"{split}.tsv").write_text("".join(lines))


def imagenet(place):
    """Ten classes of digits, three images of each for training and two for validation."""
    for split, source, count in (("train", "train", 3), ("val", "test", 2)):
        digits = open_source("samples:digits", source, codec=VISION)
        left = dict.fromkeys(range(10), count)
        for _, item in digits.items():
            if left.get(item["label"]):
                folder = place / split / WORDNET[item["label"]]
                folder.mkdir(parents=True, exist_ok=True)
                image = Image.fromarray(item["image"][..., 0])
                image.save(folder / f"{folder.name}_{left[item['label']]}.JPEG", quality=95)
                left[item["label"]] -= 1


def esc50(place):
    (place / "meta").mkdir(parents=True)
    (place / "audio").mkdir()
    sounds = open_source("samples:sounds", "train", codec=SOUND)
    lines = ["filename,fold,target,category,esc10,src_file,take\n"]
    for n in range(10):
        item, name = sounds[n], f"{n % 5 + 1}-{n}-A-{n % 2}.wav"
        audio = np.resize(item["audio"], 44_100)  # one second
        soundfile.write(place / "audio" / name, audio, 44_100)
        lines.append(f"{name},{n % 5 + 1},{n % 2},{('dog', 'rooster')[n % 2]},False,{n},A\n")
    (place / "meta" / "esc50.csv").write_text("".join(lines))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with `data`, as the page names its corpora, and room for `runs`."""
    top = tmp_path_factory.mktemp("your_data")
    voice = open_source("samples:speech", "train", codec=SPEECH)
    clips = [(voice[i]["audio"][: 4 * RATE], voice[i]["transcript"]) for i in range(14)]
    libri(top / "data" / "LibriSpeech", clips)
    common_voice(top / "data" / "cv" / "ru", clips)
    imagenet(top / "data" / "imagenet")
    esc50(top / "data" / "ESC-50")
    dump = top / "data" / "enwiki-latest-pages-articles.xml.bz2"
    dump.write_bytes(bz2.compress(DUMP.encode()))
    return top


def here(words, place):
    """A command of the page with its folders below `place`."""
    names = rf"{place}/data/", rf"{place}/runs/"
    return [re.sub("(^|[=:])runs/", rf"\1{names[1]}", w.replace("/data/", names[0])) for w in words]


def option(words, name):
    """The value of --NAME=... in a command, None if it is not there."""
    return next((w.partition("=")[2] for w in words if w.startswith(f"--{name}=")), None)


COUNTS = {  # by --target: splits of the trees above, and classes
    "libri": ({"train": 8, "dev": 3, "test": 3}, None),
    "cv_ru": ({"train": 2, "dev": 1, "test": 1}, None),
    "imagenet_256": ({"train": 30, "val": 20}, WORDNET),
    "esc50": ({"train": 8, "test": 2}, ["dog", "rooster"]),
    "wikipedia": ({"train": 2}, None),
}


@pytest.fixture(scope="module")
def prepared(place):
    """After all `prepare` commands of the page."""
    pytest.importorskip("soxr")
    for words in PREPARED:  # this dump is too small for a large vocabulary
        words = [re.sub("^--vocab_size=.*", "--vocab_size=280", w) for w in here(words[1:], place)]
        main([*words, "--workers=1"])
    return place


def test_corpora_are_prepared_and_checked(prepared):
    targets = [Path(t).name for words in PREPARED if (t := option(words, "target"))]
    assert targets == list(COUNTS)
    for target, (counts, classes) in COUNTS.items():
        manifest = json.loads((prepared / "data" / target / "manifest.json").read_text())
        found = {split: one["examples"] for split, one in manifest["splits"].items()}
        assert found == counts and manifest["label_names"] == classes
        assert not any(one["bad"] for one in manifest["splits"].values())
    pages = {p.parent.name for p in (prepared / "runs").glob("*/check.html")}
    assert len(pages) == len(COUNTS)
    found = json.loads((prepared / "runs" / "check_libri" / "check.json").read_text())
    assert {split: one["examples"] for split, one in found["splits"].items()} == COUNTS["libri"][0]
    assert set(found["splits"]["train"]["scripts"]) == {"cyrillic"}
    assert tokenizer.load(prepared / "data" / "wikipedia" / "tokenizer").vocab_size == 280


@pytest.mark.parametrize("words", TRAINED, ids=lambda words: option(words, "workdir"))
def test_recipes_take_the_options_of_the_page(words):
    config, found = parse(words)
    check_config(config)
    assert f"array_record:{config['data']['source'].partition(':')[2]}" in "".join(words)
    assert found["workdir"] == option(words, "workdir")


@pytest.mark.usefixtures("light_compilation")
@pytest.mark.parametrize(
    "workdir, raw",
    [
        (
            "runs/asr",
            "data.source=librispeech:{}/data/LibriSpeech data.split=train-clean-100 "
            "data.eval_split=dev-clean",
        ),
        ("runs/images", "data.source=imagenet:{}/data/imagenet"),
    ],
    ids=["speech", "images"],
)
def test_from_shards_to_a_score(prepared, workdir, raw):
    """The page's fine-tuning, tiny and from scratch; shards and files have the same score."""
    (words,) = (words for words in TRAINED if option(words, "workdir") == workdir)
    words = [re.sub("^(--config=.*):.*", r"\1:smoke", word) for word in here(words, prepared)]
    words = [word for word in words if not word.startswith("--init_from=")]
    config, found = parse(words)
    config["data"]["share"] = 1.0
    train.train(config, found["workdir"], verbose=False)
    scores = []
    for options in ((), ("--set", *raw.format(prepared).split())):
        file = prepared / "scores.json"
        evaluate.main([found["workdir"], f"--json={file}", *options])
        (row,) = json.loads(file.read_text())
        scores.append({name.split()[-1]: x["mean"] for name, x in row["scores"].items()})
    assert scores[0].keys() & {"wer", "accuracy"} and "left_out" not in scores[0]
    assert scores[0] == pytest.approx(scores[1], rel=1e-6)
