"""Files of many texts: documents in order, and what `prepare` makes of them."""

import bz2
import contextlib
import csv
import hashlib
from collections import Counter
from pydoc_data.topics import topics

import pytest
from test_prepare import files, opened, prepare, refused, texts

from data2vec_jax.core.errors import ExampleError
from data2vec_jax.data.sources import open_source, write_array_record
from data2vec_jax.modalities.text import learned
from data2vec_jax.modalities.text.codec import CODEC as TEXT
from data2vec_jax.modalities.text.data import TextExamples
from data2vec_jax.modalities.text.tokenizer import ByteLevelBPE, SentencePiece
from data2vec_jax.prepare.__main__ import main


def test_lines_and_paragraphs(tmp_path):
    data = "\ufeffOne\u2028line.  \nTwo, Straße.\r\n\n\n  Three.\n".encode()
    (tmp_path / "a.txt").write_bytes(data)
    prepare("text", f"lines:{tmp_path}/a.txt", tmp_path / "lines")
    assert texts(tmp_path / "lines") == ["One\u2028line.", "Two, Straße.", "Three."]
    prepare("text", f"paragraphs:{tmp_path}/a.txt", tmp_path / "paragraphs")
    assert texts(tmp_path / "paragraphs") == ["One\u2028line.\nTwo, Straße.", "Three."]
    source = open_source(f"paragraphs:{tmp_path}/a.txt", codec=TEXT)
    assert source[1]["text"] == "Three." and source.location(1).endswith("a.txt:5")
    options = f"lines:{tmp_path}/a.txt", tmp_path / "twice", "--splits=train,dev"
    refused("dev has the examples of train", prepare, "text", *options)
    (tmp_path / "b.txt").write_bytes(data + b"\xff\xfe\n")
    manifest = prepare("text", f"lines:{tmp_path}/b.txt", tmp_path / "b", "--max_bad_share=0.5")
    assert manifest["splits"]["train"] == {"examples": 3, "length": 0, "bad": {"unreadable": 1}}


DUMP = """<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.11/" xml:lang="en">
<siteinfo><sitename>Wikipedia</sitename></siteinfo>
<page><title>Sea</title><ns>0</ns><id>7</id><revision><id>9</id><text bytes="1">{{Infobox|a={{b|c}}
|d=e}}
'''The sea''' is [[water|salt water]]&lt;ref name="x"&gt;A {{cite}}.&lt;/ref&gt; of the
[[Earth]]s &amp;amp; more.&lt;!-- no --&gt;
[[File:sea.jpg|thumb|The [[coast|shore]] of it]]
== History ==
{| class="wikitable"
|-
| a cell
|}
* First [https://example.org a site].
[[Category:Seas]]</text></revision></page>
<page><title>Talk:Sea</title><ns>1</ns><id>8</id><revision><text>Talk.</text></revision></page>
<page><title>Ocean</title><ns>0</ns><id>10</id><redirect title="Sea" />
<revision><text>#REDIRECT [[Sea]]</text></revision></page>
<page><title>Salt</title><ns>0</ns><id>11</id><revision>
<text>Salt is a mineral.</text></revision></page>
</mediawiki>"""


def test_a_dump_of_wikipedia(tmp_path):
    (tmp_path / "x-pages-articles.xml.bz2").write_bytes(bz2.compress(DUMP.encode()))
    source = f"wikipedia:{tmp_path}/x-pages-articles.xml.bz2"
    prepare("text", source, tmp_path / "out")
    sea = "The sea is salt water of the\nEarths & more.\nHistory\nFirst a site."
    assert texts(tmp_path / "out") == [sea, "Salt is a mineral."]
    item = opened(tmp_path / "out", codec=TEXT)[0]
    assert (item["title"], item["id"]) == ("Sea", "7")
    (tmp_path / "cut.xml").write_text(DUMP[:-40])
    refused("unreadable text", prepare, "text", f"wikipedia:{tmp_path}/cut.xml", tmp_path / "cut")


# Tokenizers -------------------------------------------------------------------------------------

MANUAL = [topics[name] for name in sorted(topics)]
HELD_OUT = "qqqq zzzz " * 4_000  # so frequent that a tokenizer that saw it would know the word


@pytest.fixture(scope="module")
def manual(tmp_path_factory):
    """A table of texts: CPython's manual, and of split dev one long text of its own."""
    path = tmp_path_factory.mktemp("manual") / "manual.csv"
    with path.open("w", newline="") as file:
        rows = [*((text, "train") for text in MANUAL), (HELD_OUT, "dev")]
        csv.writer(file).writerows([("text", "split"), *rows])
    return f"manifest:{path}"


OPTIONS = "--splits=train,dev", "--shard_mb=0.1"


@pytest.mark.parametrize(
    "kind, of, file", [("bpe", ByteLevelBPE, "merges.txt"), ("sentencepiece", SentencePiece, "*")]
)
def test_a_tokenizer_beside_the_shards(manual, tmp_path, kind, of, file):
    options = *OPTIONS, f"--train-tokenizer={kind}", "--vocab_size=1000"
    manifest = prepare("text", manual, tmp_path / "one", *options)
    prepare("text", manual, tmp_path / "two", *options, "--workers=2")
    assert files(tmp_path / "one") == files(tmp_path / "two")
    said = manifest["tokenizer"]
    characters = sum(map(len, MANUAL))
    wanted = {"split": "train", "kind": kind, "vocab_size": 1000, "texts": len(MANUAL)}
    assert said == wanted | {"characters": characters, "sha256": said["sha256"]}
    place = tmp_path / "one" / "tokenizer"
    hashes = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in place.iterdir()}
    assert said["sha256"] == hashes and len(list(place.glob(file)))
    examples = TextExamples(opened(tmp_path / "one", codec=TEXT), tokenizer=str(place))
    ids = examples.tokenizer
    assert isinstance(ids, of) and ids.vocab_size == 1000 and len(examples.blocks) > 100
    assert len(ids.encode("assignment statement")) <= 4 and len(ids.encode("qqqq zzzz")) >= 8


def test_a_tokenizer_is_learned_last_and_again(manual, tmp_path):
    """Another size needs no other shards; what an interruption left does not matter."""
    target, kind = tmp_path / "shards", "--train-tokenizer=bpe"
    large = *OPTIONS, kind, "--vocab_size=900000"
    refused("the largest is", prepare, "text", manual, target, *large)
    refused("is not finished", opened, target, "train", TEXT)
    made = {p.name: p.stat().st_mtime_ns for p in target.glob("*.array_record")}
    for place in (target, target / "unfinished"):
        (place / "tokenizer").mkdir(exist_ok=True)
        (place / "tokenizer" / "sentencepiece.model").write_text("cut")
    options = *OPTIONS, kind, "--vocab_size=300"
    prepare("text", manual, target, *options)
    assert {p.name: p.stat().st_mtime_ns for p in target.glob("*.array_record")} == made
    prepare("text", manual, tmp_path / "whole", *options)
    assert files(target) == files(tmp_path / "whole")


def test_the_sample_is_bounded(tmp_path, monkeypatch):
    for shard in range(2):
        rows = ({"text": f"{n:010}"} for n in range(500 * shard, 500 * (shard + 1)))
        write_array_record(tmp_path / f"train-{shard}.array_record", rows)

    def sample():
        counts = Counter()
        return list(learned.sample(opened(tmp_path, codec=TEXT), counts)), counts

    found, counts = sample()
    assert sorted(found) == [f"{n:010}" for n in range(1_000)] and counts["texts"] == 1_000
    monkeypatch.setattr(learned, "TEXTS", 200)
    found, counts = sample()
    assert len(set(found)) == 200 and counts == {"texts": 200, "characters": 2_000}
    assert 400 < sum(map(int, found)) / 200 < 600  # of all of the source
    monkeypatch.setattr(learned, "CHARACTERS", 95)
    cut, counts = sample()
    assert cut == [*found[:9], found[9][:5]] and counts == {"texts": 10, "characters": 95}


def test_wrong_options_of_a_tokenizer(manual, tmp_path):
    command = "text", f"--source={manual}", f"--target={tmp_path / 'x'}"
    for option, message in (
        ("--vocab_size=500", "--vocab_size=500: needs --train-tokenizer"),
        ("--train-tokenizer=wordpiece", "invalid choice: 'wordpiece'"),
        ("--vocab_size=0", "0 is not a whole number from 1"),
    ):
        refused(message, main, [*command, option])
    check = "text", f"--source={manual}", f"--check={tmp_path / 'x'}", "--train-tokenizer=bpe"
    refused("--check changes and learns nothing", main, check)
    refused("unrecognized", main, ["vision", *command[1:], "--train-tokenizer=bpe"])
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("damaged", [False, True])
def test_many_records_at_a_time_are_those_of_each(tmp_path, damaged):
    for shard in range(2):
        rows = ({"text": f"{n} " * 99} for n in range(150 * shard, 150 * (shard + 1)))
        write_array_record(tmp_path / f"train-{shard}.array_record", rows)
    source = opened(tmp_path, codec=TEXT)
    order = [*range(299, -1, -1), 7, 7]
    if damaged:
        path = tmp_path / "train-0.array_record"
        data = bytearray(path.read_bytes())
        data[3_000] ^= 255  # in record 34, in the middle of those that are read at once
        path.write_bytes(data)
        source = opened(tmp_path, codec=TEXT)
    found = list(source.items(order))
    wanted = []
    for i in order:
        with contextlib.suppress(ExampleError):
            wanted.append((i, source[i]))
    assert found == wanted and len(found) == 302 - damaged
    assert list(source.bad) == [34] * damaged
