"""Published data sets: small files laid out exactly as their authors ship them."""

import json
import pickle
import re

import numpy as np
import pytest
import scipy.io
import soundfile
from PIL import Image

from data2vec_jax.core.errors import UserError
from data2vec_jax.data.sources import open_source
from data2vec_jax.modalities.speech.codec import CODEC as SPEECH
from data2vec_jax.modalities.text.codec import CODEC as TEXT
from data2vec_jax.modalities.text.published import GLUE, clean_news
from data2vec_jax.modalities.vision.codec import CODEC as VISION
from data2vec_jax.tasks import scores


def one_line(message, uri, split, codec, **options):
    """Opening fails with one line that says `message`."""
    with pytest.raises(UserError, match=re.escape(message)) as error:
        open_source(str(uri), split, codec=codec, **options)
    assert "\n" not in str(error.value)


# LibriSpeech ------------------------------------------------------------------------------------


def utterances(folder, speaker, chapter, texts, rate=16_000):
    """SPEAKER/CHAPTER with its FLAC files and its table of transcripts."""
    folder = folder / speaker / chapter
    folder.mkdir(parents=True)
    lines = []
    for i, text in enumerate(texts):
        name = f"{speaker}-{chapter}-{i:04}"
        soundfile.write(folder / f"{name}.flac", np.full(800 + 100 * i, 0.1), rate)
        lines.append(f"{name} {text}\n")
    (folder / f"{speaker}-{chapter}.trans.txt").write_text("".join(lines))


@pytest.fixture
def libri(tmp_path):
    top = tmp_path / "LibriSpeech"
    utterances(top / "train-clean-100", "103", "1240", ["CHAPTER ONE", "HE'S HERE"])
    utterances(top / "train-clean-100", "1034", "121119", ["ANOTHER"])
    utterances(top / "train-clean-360", "100", "121669", ["TOM"])
    utterances(top / "train-other-500", "20", "205", ["OTHER"])
    utterances(top / "dev-other", "116", "288045", ["AS I APPROACHED"])
    (top / "SPEAKERS.TXT").write_text("; ID |SEX| SUBSET |MINUTES| NAME\n")
    light = tmp_path / "librispeech_finetuning"
    utterances(light / "1h" / "0" / "clean", "1", "2", ["TEN MINUTES"])
    utterances(light / "1h" / "5" / "other", "3", "4", ["FIFTY"])
    utterances(light / "9h" / "clean", "5", "6", ["NINE HOURS"])
    return tmp_path


@pytest.mark.parametrize("below", ["", "LibriSpeech"])
def test_librispeech(libri, below):
    source = open_source(f"librispeech:{libri / below}", "train-clean-100", codec=SPEECH)
    assert len(source) == 3
    assert list(source.lengths()) == [800, 900, 800]
    item = source[1]
    assert (item["transcript"], item["id"], item["speaker"]) == (
        "HE'S HERE",
        "103-1240-0001",
        "103",
    )
    assert item["audio"].shape == (900,) and item["audio"][0] == pytest.approx(0.1, abs=1e-4)
    assert len(pickle.loads(pickle.dumps(source))) == 3


def test_limited_and_joined_sets(libri):
    texts = {}
    for split in ("10m", "1h", "10h", "100h", "960h", "dev-other+train-clean-360"):
        source = open_source(f"librispeech:{libri}", split, codec=SPEECH)
        texts[split] = [source[i]["transcript"] for i in range(len(source))]
    assert texts["10m"] == ["TEN MINUTES"]
    assert texts["1h"] == ["TEN MINUTES", "FIFTY"]
    assert texts["10h"] == ["TEN MINUTES", "FIFTY", "NINE HOURS"]
    assert texts["100h"] == ["CHAPTER ONE", "HE'S HERE", "ANOTHER"]
    assert len(texts["960h"]) == 5
    assert texts["dev-other+train-clean-360"] == ["AS I APPROACHED", "TOM"]


def test_librispeech_mistakes(libri):
    uri = f"librispeech:{libri}"
    one_line("did you mean 'dev-other'", uri, "dev-othr", SPEECH)
    one_line("no folder", f"librispeech:{libri}/none/x", "10m", SPEECH)
    one_line("unknown kind 'librispeech' for text", uri, "10m", TEXT)
    with pytest.raises(UserError, match=r"no folder '1h/0' in '.*none'$"):
        open_source(f"librispeech:{libri}/none", "10m", codec=SPEECH)
    next((libri / "LibriSpeech" / "dev-other").rglob("*.flac")).unlink()
    one_line("116-288045.trans.txt:1: no file", uri, "dev-other", SPEECH)


# ImageNet ---------------------------------------------------------------------------------------

SYNSETS = ["n01440764", "n01443537", "n01484850"]
VALIDATION = ["n01484850", "n01440764", "n01484850", "n01443537"]


def picture(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 6), (value, 0, 0)).save(path, "JPEG", quality=95)


def images(top):
    for c, name in enumerate(SYNSETS):
        for i in (10026, 293):
            picture(top / "train" / name / f"{name}_{i}.JPEG", 40 * c)


def flat_validation(top):
    for i, name in enumerate(VALIDATION, 1):
        picture(top / "val" / f"ILSVRC2012_val_{i:08}.JPEG", 40 * SYNSETS.index(name))


def check_imagenet(place):
    train = open_source(f"imagenet:{place}", "train", codec=VISION)
    assert len(train) == 6 and train.label_names == tuple(SYNSETS)
    val = open_source(f"imagenet:{place}", "val", codec=VISION)
    assert len(val) == 4 and val.label_names == tuple(SYNSETS)
    for source in (train, val):
        for i in range(len(source)):
            item = source[i]
            assert item["image"].shape == (6, 8, 3)
            assert abs(int(item["image"][0, 0, 0]) - 40 * item["label"]) < 8


def test_imagenet_in_folders(tmp_path):
    images(tmp_path)
    for i, name in enumerate(VALIDATION, 1):
        path = tmp_path / "val" / name / f"ILSVRC2012_val_{i:08}.JPEG"
        picture(path, 40 * SYNSETS.index(name))
    check_imagenet(tmp_path)


def test_imagenet_of_kaggle(tmp_path):
    top = tmp_path / "ILSVRC" / "Data" / "CLS-LOC"
    images(top)
    flat_validation(top)
    lines = ["ImageId,PredictionString"]
    for i, name in reversed(list(enumerate(VALIDATION, 1))):
        lines.append(f"ILSVRC2012_val_{i:08},{name} 85 1 499 272 {name} 1 2 3 4 ")
    (tmp_path / "LOC_val_solution.csv").write_text("\n".join(lines) + "\n")
    check_imagenet(tmp_path)


def test_imagenet_with_the_devkit(tmp_path):
    images(tmp_path)
    flat_validation(tmp_path)
    kit = tmp_path / "ILSVRC2012_devkit_t12" / "data"
    kit.mkdir(parents=True)
    ids = {"n01484850": 1, "n01440764": 2, "n01443537": 3, "n00001740": 1001}  # not by name
    table = np.zeros(len(ids), [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O")])
    for row, (name, number) in zip(table, ids.items(), strict=True):
        row["ILSVRC2012_ID"], row["WNID"], row["words"] = float(number), name, "fish"
    scipy.io.savemat(kit / "meta.mat", {"synsets": table})
    truth = "".join(f"{ids[name]}\n" for name in VALIDATION)
    (kit / "ILSVRC2012_validation_ground_truth.txt").write_text(truth)
    check_imagenet(tmp_path)


def test_imagenet_mistakes(tmp_path):
    images(tmp_path)
    one_line("no folder 'val'", f"imagenet:{tmp_path}", "val", VISION)
    flat_validation(tmp_path)
    one_line("neither LOC_val_solution.csv", f"imagenet:{tmp_path}", "val", VISION)
    (tmp_path / "LOC_val_solution.csv").write_text("ImageId,PredictionString\n")
    one_line("no class is known", f"imagenet:{tmp_path}", "val", VISION)
    for row in ("ILSVRC2012_val_00000001", "ILSVRC2012_val_00000001, "):
        (tmp_path / "LOC_val_solution.csv").write_text(f"ImageId,PredictionString\n\n{row}\n")
        message = "LOC_val_solution.csv:3: not an image and its class"
        one_line(message, f"imagenet:{tmp_path}", "val", VISION)
    (tmp_path / "LOC_val_solution.csv").unlink()
    kit = tmp_path / "ILSVRC2012_devkit_t12" / "data"
    kit.mkdir(parents=True)
    for damaged in (b"", b"x", b"junk" * 100, bytes(range(256))):
        (kit / "meta.mat").write_bytes(damaged)
        one_line("data: unreadable devkit (", f"imagenet:{tmp_path}", "val", VISION)
    one_line("did you mean 'val'", f"imagenet:{tmp_path}", "vall", VISION)


# GLUE -------------------------------------------------------------------------------------------

TABLES = {  # task -> (file -> lines, expected items of train, of the last file)
    "CoLA": {
        "train": ['gj04\t1\t\tOur friends won\'t "buy" it.', 'gj04\t0\t*\tThem saw "us.'],
        "test": ["index\tsentence", "0\tBill whistled."],
    },
    "SST-2": {
        "train": ["sentence\tlabel", "hide new secretions \t0", "a fine film \t1"],
        "test": ["index\tsentence", "0\tuneasy mishmash ."],
    },
    "MRPC": {
        "train": [
            "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String",
            '1\t702876\t702977\tAmrozi accused "the witness" .\tReferring to him " .',
        ],
        "test": ["index\t#1 ID\t#2 ID\t#1 String\t#2 String", "0\t1\t2\tPCCW 's chief\tCurrent"],
    },
    "QQP": {
        "train": [
            "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate",
            "133273\t213221\t213222\tHow is life?\tIs it?\t0",
            "7\t8\t9\ta line that is cut",
            "402555\t1\t2\tWhy?\tWhy so?\t1",
        ],
        "test": ["id\tquestion1\tquestion2", "0\tWould it?\tWhat if?"],
    },
    "STS-B": {
        "train": [
            "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore",
            "0\tmain-captions\tMSRvid\t2012test\t1\tnone\tnone\tA plane.\tAn air plane.\t5.000",
            "1\tmain-captions\tMSRvid\t2012test\t2\tnone\tnone\tA man.\tA flute.\t3.8",
        ],
        "test": [
            "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2",
            "0\tmain-captions\tMSRvid\t2012test\t24\tnone\tnone\tA girl.\tA woman.",
        ],
    },
    "MNLI": {
        "train": [
            "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse"
            "\tsentence1_parse\tsentence2_parse\tsentence1\tsentence2\tlabel1\tgold_label",
            "0\t3\t3n\tfiction\t( x )\t( y )\t(S)\t(S)\tCream.\tProduct.\tneutral\tneutral",
            "1\t1\t1c\ttelephone\t( x )\t( y )\t(S)\t(S)\tYes.\tNo.\tneutral\tcontradiction",
        ],
        "dev_matched": [
            "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse"
            "\tsentence1_parse\tsentence2_parse\tsentence1\tsentence2\tlabel1\tlabel2\tlabel3"
            "\tlabel4\tlabel5\tgold_label",
            "0\t6\t6e\tslate\tb\tb\tp\tp\tA.\tB.\tneutral\tneutral\tneutral\tneutral\tneutral"
            "\tentailment",
        ],
        "test_matched": [
            "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse"
            "\tsentence1_parse\tsentence2_parse\tsentence1\tsentence2",
            "0\t3\t3\ttravel\tb\tb\tp\tp\tHierbas.\tIs a name.",
        ],
    },
    "QNLI": {
        "train": [
            "index\tquestion\tsentence\tlabel",
            "0\tWhen?\tAs the Metal.\tentailment",
            "1\tWho?\tHe said.\tnot_entailment",
        ],
        "test": ["index\tquestion\tsentence", "0\tWhat?\tBeyoncé."],
    },
    "RTE": {
        "train": ["index\tsentence1\tsentence2\tlabel", "0\tNo weapons.\tWeapons.\tnot_entailment"],
        "test": ["index\tsentence1\tsentence2", "0\tMangla.\tChina."],
    },
}
EXPECTED = {  # (text, pair or None, label) of train; (text, pair) of the last file, without labels
    "CoLA": (
        [('Our friends won\'t "buy" it.', None, 1), ('Them saw "us.', None, 0)],
        ("Bill whistled.", None),
    ),
    "SST-2": (
        [("hide new secretions ", None, 0), ("a fine film ", None, 1)],
        ("uneasy mishmash .", None),
    ),
    "MRPC": (
        [('Amrozi accused "the witness" .', 'Referring to him " .', 1)],
        ("PCCW 's chief", "Current"),
    ),
    "QQP": ([("How is life?", "Is it?", 0), ("Why?", "Why so?", 1)], ("Would it?", "What if?")),
    "STS-B": (
        [("A plane.", "An air plane.", 5.0), ("A man.", "A flute.", 3.8)],
        ("A girl.", "A woman."),
    ),
    "MNLI": ([("Cream.", "Product.", 1), ("Yes.", "No.", 2)], ("Hierbas.", "Is a name.")),
    "QNLI": ([("When?", "As the Metal.", 0), ("Who?", "He said.", 1)], ("What?", "Beyoncé.")),
    "RTE": ([("No weapons.", "Weapons.", 1)], ("Mangla.", "China.")),
}


@pytest.fixture
def glue(tmp_path):
    for task, files in TABLES.items():
        (tmp_path / task).mkdir()
        for name, lines in files.items():
            text = "\n".join(lines) + "\n"
            (tmp_path / task / f"{name}.tsv").write_text(text, encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize("task", TABLES)
def test_glue(glue, task):
    wanted, last = EXPECTED[task]
    source = open_source(f"glue:{glue / task}", "train", codec=TEXT)
    items = [source[i] for i in range(len(source))]
    assert [(x["text"], x.get("pair"), x["label"]) for x in items] == wanted
    assert source.label_names == GLUE[task].classes
    test = open_source(f"glue:{glue / task}", list(TABLES[task])[-1], codec=TEXT)
    assert (test[0]["text"], test[0].get("pair")) == last and "label" not in test[0]
    assert set(GLUE[task].metrics) <= set(scores.BY_NAME)


def test_glue_dev_of_mnli_has_more_columns(glue):
    source = open_source(f"glue:{glue}/MNLI", "dev_matched", codec=TEXT)
    assert source[0] == {"text": "A.", "pair": "B.", "label": 0}


def test_glue_mistakes(glue):
    one_line("'Cola' is no task of GLUE; did you mean 'CoLA'", f"glue:{glue}/Cola", "train", TEXT)
    one_line("did you mean 'dev_matched'", f"glue:{glue}/MNLI", "dev_match", TEXT)
    (glue / "RTE" / "dev.tsv").write_text("index\tsentence1\tsentence2\tlabel\n0\ta\tb\n")
    one_line("dev.tsv:2: 3 columns, not 4", f"glue:{glue}/RTE", "dev", TEXT)
    (glue / "RTE" / "dev.tsv").write_text("index\tsentence1\tsentence2\tlabel\n0\ta\tb\tmaybe\n")
    one_line("unknown label 'maybe'", f"glue:{glue}/RTE", "dev", TEXT)
    (glue / "RTE" / "dev.tsv").write_text("")
    one_line("has no rows", f"glue:{glue}/RTE", "dev", TEXT)


# SQuAD ------------------------------------------------------------------------------------------

CONTEXT = "Архитектура: 🏛 the Main Building's gold dome, 1882."


def squad_file(path, answers):
    question = {"id": "5733be28", "question": " What sits on top? ", "answers": answers}
    paragraph = {"context": CONTEXT, "qas": [question, {**question, "id": "57"}]}
    data = {"data": [{"title": "Notre_Dame", "paragraphs": [paragraph]}], "version": "1.1"}
    path.write_text(json.dumps(data), encoding="utf-8")


def answer(text):
    return {"answer_start": CONTEXT.index(text), "text": text}


def test_squad_and_xquad(tmp_path):
    squad_file(tmp_path / "train-v1.1.json", [answer("gold dome")])
    squad_file(tmp_path / "dev-v1.1.json", [answer("gold dome"), answer("1882")])
    squad_file(tmp_path / "xquad.ru.json", [answer("1882")])
    for uri, split, count in (("", "train", 1), ("", "dev", 2), ("/xquad.{split}.json", "ru", 1)):
        source = open_source(f"squad:{tmp_path}{uri}", split, codec=TEXT)
        assert len(source) == 2
        item = source[0]
        assert (item["id"], item["question"]) == ("5733be28", "What sits on top?")
        assert len(item["answers"]) == len(item["starts"]) == count
        for text, start in zip(item["answers"], item["starts"], strict=True):
            assert item["text"][start : start + len(text)] == text


def test_squad_mistakes(tmp_path):
    one_line("no file", f"squad:{tmp_path}", "train", TEXT)
    squad_file(tmp_path / "train-v1.1.json", [])
    one_line("has no answer; this is not SQuAD 1.1", f"squad:{tmp_path}", "train", TEXT)
    for text in ("{", "[]", '{"data": []}'):
        (tmp_path / "train-v1.1.json").write_text(text)
        one_line("train-v1.1.json", f"squad:{tmp_path}", "train", TEXT)


# AG News ----------------------------------------------------------------------------------------

NEWS = """"3","Wall St. Bears (Reuters)","Reuters - Wall Street's dwindling\\band, ""again""."
"4","Google #36;85","Search &lt;b&gt;firm #39;s IPO&lt;/b&gt;"
"1","Afghan","Votes"
"""


@pytest.mark.parametrize("header", ["", "Class Index,Title,Description\n"])
def test_ag_news(tmp_path, header):
    (tmp_path / "train.csv").write_text(header + NEWS)
    source = open_source(f"ag_news:{tmp_path}", "train", codec=TEXT)
    assert source.label_names == ("World", "Sports", "Business", "Sci/Tech")
    assert [source[i] for i in range(len(source))] == [
        {
            "text": 'Wall St. Bears (Reuters) Reuters - Wall Street\'s dwindling band, "again".',
            "label": 2,
        },
        {"text": "Google $85 Search <b>firm 's IPO</b>", "label": 3},
        {"text": "Afghan Votes", "label": 0},
    ]
    assert clean_news("a&amp;b &#39;c") == "a&b 'c"


def test_ag_news_mistakes(tmp_path):
    (tmp_path / "train.csv").write_text(NEWS + '"5","a","b"\n')
    one_line("train.csv:4: not a class from 1 to 4", f"ag_news:{tmp_path}", "train", TEXT)
    one_line("did you mean 'train'", f"ag_news:{tmp_path}", "trian", TEXT)
    (tmp_path / "test.csv").write_text("")
    one_line("has no rows", f"ag_news:{tmp_path}", "test", TEXT)
    one_line(
        "'label_names' cannot be given", f"ag_news:{tmp_path}", "train", TEXT, label_names=["a"]
    )
