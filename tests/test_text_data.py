"""Tokenisers and training rows of text, on CPython's own manual."""

import gzip
import io
import itertools
import json
import logging
import pickle
import random
import re
import subprocess
import sys
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest

from data2vec_jax.core.errors import UserError
from data2vec_jax.modalities.text.blocks import (
    documents_of,
    pad_row,
    text_documents,
    token_blocks,
    valid_lengths,
)
from data2vec_jax.modalities.text.tokenizer import (
    ByteLevelBPE,
    SentencePiece,
    Tokenizer,
    load,
    train_bpe,
    train_sentencepiece,
)

ROOT = Path(__file__).parents[1]
GOLDEN = Path(__file__).parent / "goldens/checkpoints/processor_text"
EXPECTED = json.loads((GOLDEN / "golden.json").read_text())
GLOSSES = ROOT / "data2vec_jax/modalities/text/sample_data/glosses/glosses.tsv.gz"

TEXTS = [topics[name] for name in sorted(topics)]
ODD = [
    "",
    " ",
    " two  blanks ",
    "tab\tand\r\nlines\n\n",
    "héllo ﬁ 日本 😀 \x07",
    "<s> </s><unk><pad>",
]


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def trained(request) -> SentencePiece:
    return train_sentencepiece(TEXTS, 2000, request.param)


@pytest.fixture(scope="module")
def roberta() -> Tokenizer:
    return load(GOLDEN)


def files_of_gpt2(folder: Path, names=("vocab.json", "merges.txt")) -> dict[str, int]:
    """The golden's tokens in GPT-2's layout: no specials, ids from 0."""
    vocab = json.loads((GOLDEN / "vocab.json").read_text())
    vocab = {token: i - 4 for token, i in vocab.items() if i >= 4 and token != "<mask>"}
    (folder / names[0]).write_text(json.dumps(vocab))
    (folder / names[1]).write_bytes((GOLDEN / "merges.txt").read_bytes())
    return vocab


# Sentencepiece ------------------------------------------------------------------------------------


def test_trained_layout(trained):
    assert trained.vocab_size == 2000 and trained.mask == 1999 and trained.special == 4
    assert (trained.bos, trained.pad, trained.eos, trained.unk) == (0, 1, 2, 3)
    used = set(itertools.chain.from_iterable(trained.encode_batch(TEXTS)))
    assert min(used) >= 4 and max(used) < trained.mask
    assert trained.decode([0, *trained.encode("a word"), 2, 1]) == "<s>a word</s><pad>"


def test_trained_round_trip(trained):
    for text in TEXTS + ODD:
        assert trained.decode(trained.encode(text)) == text
    if GLOSSES.exists():
        lines = gzip.decompress(GLOSSES.read_bytes()).decode().splitlines()[:2000]
        assert [trained.decode(ids) for ids in trained.encode_batch(lines)] == lines


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_training_is_deterministic_and_quiet(kind, capfd):
    first, second = (train_sentencepiece(iter(TEXTS), 1000, kind) for _ in range(2))
    assert first.model == second.model
    assert capfd.readouterr() == ("", "")


def test_small_table_without_bytes():
    small = train_sentencepiece(TEXTS, 200, byte_fallback=False)
    assert small.vocab_size == 200
    lines = TEXTS[0].split("\n")
    assert [small.decode(small.encode(line)) for line in lines] == lines
    assert small.unk in small.encode("日") and small.unk in small.encode("\n")


@pytest.mark.parametrize("size", [261, 1000])
def test_trained_bpe_is_that_of_tokenizers(size):
    """The library's own front end learns the same merges, and so do other processes."""
    from tokenizers import ByteLevelBPETokenizer

    trainer = ByteLevelBPETokenizer()
    lines = [line for text in TEXTS for line in text.split("\n")]
    options = {"vocab_size": size - 5, "min_frequency": 0, "show_progress": False}
    trainer.train_from_iterator(lines, **options)
    made = train_bpe(TEXTS, size)
    assert (made.vocab_size, made.mask) == (size, size - 1)
    for text in [*TEXTS[:20], *ODD]:
        assert made.encode(text, literal=True) == [4 + i for i in trainer.encode(text).ids]
        assert made.decode(made.encode(text)) == text


def test_bpe_training_errors():
    for size, word in ((60_000, "largest"), (260, "smallest"), (0, "smallest")):
        with pytest.raises(UserError, match=word) as error:
            train_bpe(TEXTS[:5], size)
        possible = int(str(error.value).split()[-1])
        assert train_bpe(TEXTS[:5], possible).vocab_size == possible


def test_long_lines_are_learnt():
    assert (
        train_sentencepiece([" ".join(["abracadabra"] * 1000)], 280).encode("abracadabra")[0] > 260
    )


def test_foreign_model_is_shifted():
    """Sentencepiece's own default keeps <unk> at 0, <s> at 1, </s> at 2 and has no <pad>."""
    from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS[0].split("\n")),
        model_writer=model,
        vocab_size=200,
        model_type="bpe",
        minloglevel=2,
    )
    theirs, ours = (
        SentencePieceProcessor(model_proto=model.getvalue()),
        SentencePiece(model.getvalue()),
    )
    text = "the standard assignment 日"
    expected = [3 if i == 0 else i + 1 for i in theirs.encode(text)]
    assert ours.encode(text) == expected and 3 in expected
    assert ours.vocab_size == 200 - 3 + 4 + 1
    assert ours.decode(expected) == text.replace("日", "<unk>")


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_largest_and_smallest_vocabulary(kind):
    texts = TEXTS[:5]
    for size, word in ((60_000, "largest"), (5, "smallest"), (-1, "smallest")):
        with pytest.raises(UserError, match=word) as error:
            train_sentencepiece(texts, size, kind)
        assert "\n" not in str(error.value) and str(size) in str(error.value)
        possible = int(re.search(r"possible is (\d+)", str(error.value))[1])
        assert train_sentencepiece(texts, possible, kind).vocab_size == possible
        with pytest.raises(UserError, match=str(possible)):
            train_sentencepiece(texts, possible + (1 if word == "largest" else -1), kind)


def test_training_errors():
    with pytest.raises(UserError, match="did you mean 'unigram'"):
        train_sentencepiece(TEXTS, 1000, "unigrams")
    for empty in ([], ["", "\n \n"]):
        with pytest.raises(UserError, match="no text"):
            train_sentencepiece(empty, 1000)


@pytest.mark.parametrize("train", [train_sentencepiece, train_bpe])
@pytest.mark.parametrize("error", [UserError("shard 3 is damaged"), KeyboardInterrupt()])
def test_what_ends_the_corpus_ends_training(train, error):
    def broken():
        yield "a line"
        raise error

    with pytest.raises(type(error)) as found:
        train(broken(), 1000)
    assert str(found.value) == str(error)


# Byte-level BPE -----------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["roberta", "roberta.json", "gpt2", "fairseq"])
def test_golden(layout, tmp_path):
    """Hugging Face's numbers, from each kind of file that says the same."""
    folder = tmp_path
    if layout == "roberta":
        folder = GOLDEN
    elif layout == "roberta.json":
        merges = (GOLDEN / "merges.txt").read_text().splitlines()[1:]
        content = {
            "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False},
            "model": {
                "type": "BPE",
                "vocab": json.loads((GOLDEN / "vocab.json").read_text()),
                "merges": [merge.split() for merge in merges],
            },
        }
        (folder / "tokenizer.json").write_text(json.dumps(content))
    else:
        files_of_gpt2(
            folder,
            ("encoder.json", "vocab.bpe") if layout == "fairseq" else ("vocab.json", "merges.txt"),
        )
    tokenizer = load(folder)
    config = json.loads((GOLDEN / "config.json").read_text())
    assert tokenizer.vocab_size == config["vocab_size"] == tokenizer.mask + 1
    rows = [[tokenizer.bos, *tokenizer.encode(text), tokenizer.eos] for text in EXPECTED["text"]]
    assert rows == EXPECTED["input_ids"]
    assert [tokenizer.decode(row) for row in rows] == EXPECTED["decoded"]
    length = max(map(len, rows))
    padded = np.stack([pad_row(row, length, tokenizer.pad) for row in rows])
    assert padded.tolist() == EXPECTED["padded"] and padded.dtype == np.int32
    assert (
        valid_lengths(padded, tokenizer.pad).tolist() == np.sum(EXPECTED["padded_mask"], 1).tolist()
    )
    first, second = (tokenizer.encode(text) for text in EXPECTED["pair"])
    assert [0, *first, 2, 2, *second, 2] == EXPECTED["pair_ids"]
    for text, offsets in zip(EXPECTED["text"], EXPECTED["offsets"], strict=True):
        ids, spans = tokenizer.encode_with_offsets(text)
        assert ids == tokenizer.encode(text)
        assert [list(span) for span in spans] == offsets[1:-1]


def gpt2_bpe(text: str, vocab: dict[str, int], merges: list[str]) -> list[int]:
    """The published algorithm, one merge at a time; ASCII only."""
    rank = {tuple(merge.split(" ")): i for i, merge in enumerate(merges)}
    ids = []
    for word in re.findall(
        r"'(?:[sdmt]|ll|ve|re)| ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+", text
    ):
        parts = [{" ": "Ġ", "\n": "Ċ", "\t": "ĉ"}.get(c, c) for c in word]
        while pairs := [p for p in itertools.pairwise(parts) if p in rank]:
            best, merged = min(pairs, key=rank.get), []
            while parts:
                taken = 2 if tuple(parts[:2]) == best else 1
                merged.append("".join(parts[:taken]))
                parts = parts[taken:]
            parts = merged
        ids += [vocab[part] for part in parts]
    return ids


def test_gpt2_files_against_a_plain_implementation(tmp_path):
    from tokenizers import ByteLevelBPETokenizer

    trainer = ByteLevelBPETokenizer()
    trainer.train_from_iterator(TEXTS, vocab_size=1000, show_progress=False)
    trainer.save_model(str(tmp_path))
    vocab = json.loads((tmp_path / "vocab.json").read_text())
    merges = (tmp_path / "merges.txt").read_text().splitlines()[1:]
    tokenizer = load(tmp_path)
    assert tokenizer.vocab_size == 1000 + 4 + 1
    for text in [text for text in TEXTS if text.isascii()][:20]:
        ids = tokenizer.encode(text)
        assert ids == [4 + i for i in gpt2_bpe(text, vocab, merges)]
        assert tokenizer.decode(ids) == text
    for text in ODD:
        assert tokenizer.decode(tokenizer.encode(text)) == text


HARD = [
    *ODD,
    "नमस्ते दुनिया, यह क्षत्रिय है। ज़",
    "👩‍👩‍👧 🇩🇪👍🏽 ok",
    "I'll DON'T we've 12,345.67 A_B\u0301é",
    "\u00a0hard\u2003wide \u200b none",
    "<|endoftext|><mask> [MASK]",
]


@pytest.mark.parametrize("kind", ["gpt2", "roberta"])
def test_ids_are_those_of_transformers(kind, tmp_path):
    """Tables laid out as those of OpenAI and fairseq, with special tokens at the same ends."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import AddedToken, ByteLevelBPETokenizer

    first, last = {
        "gpt2": ([], "<|endoftext|>"),
        "roberta": (["<s>", "<pad>", "</s>", "<unk>"], "<mask>"),
    }[kind]
    trainer = ByteLevelBPETokenizer()
    options = {"vocab_size": 1000, "special_tokens": first, "show_progress": False}
    trainer.train_from_iterator(TEXTS + 20 * HARD, **options)
    trainer.save_model(str(tmp_path))
    vocab = json.loads((tmp_path / "vocab.json").read_text())
    (tmp_path / "vocab.json").write_text(json.dumps({**vocab, last: len(vocab)}))
    if kind == "roberta":
        mask = AddedToken("<mask>", lstrip=True)  # as its published files say
        theirs = transformers.RobertaTokenizerFast.from_pretrained(tmp_path, mask_token=mask)
    else:
        theirs = transformers.GPT2TokenizerFast.from_pretrained(tmp_path)
    ours, moved = load(tmp_path), 4 - len(first)
    assert ours.vocab_size == len(theirs) + (5 if kind == "gpt2" else 0)
    for text in [*HARD, *TEXTS[:30]]:
        as_text = theirs(text, split_special_tokens=True, add_special_tokens=False)["input_ids"]
        assert ours.encode(text, literal=True) == [moved + i for i in as_text]
    if kind == "roberta":
        for text in ("the <mask> of  it<mask>", "  <mask> नमस्ते <mask><mask>😀", *TEXTS[:5]):
            assert [ours.bos, *ours.encode(text), ours.eos] == theirs(text)["input_ids"]


def test_fairseq_dictionary_order(tmp_path):
    """Row 4 + k for the id on line k; ids without a line are <unk>; fillers, then <mask>."""
    vocab = files_of_gpt2(tmp_path, ("encoder.json", "vocab.bpe"))
    ids = list(vocab.values())
    random.Random(0).shuffle(ids)
    missing = vocab["hello"]
    ids.remove(missing)
    lines = [*map(str, ids), "madeupword0000", "madeupword0001", "madeupword0002"]
    (tmp_path / "dict.txt").write_text("".join(f"{line} {9}\n" for line in lines))
    tokenizer = load(tmp_path)
    assert tokenizer.mask == 4 + len(lines) and tokenizer.vocab_size == tokenizer.mask + 1
    for text, golden in zip(EXPECTED["text"], EXPECTED["input_ids"], strict=True):
        expected = []
        for row in golden[1:-1]:
            if row == 273:
                expected.append(tokenizer.mask)
            else:
                expected.append(3 if row - 4 == missing else 4 + ids.index(row - 4))
        assert tokenizer.encode(text) == expected
    tokenizer.save(tmp_path / "again")
    again = load(tmp_path / "again")
    assert sorted(path.name for path in (tmp_path / "again").iterdir()) == [
        "dict.txt",
        "encoder.json",
        "vocab.bpe",
    ]
    for text in [*EXPECTED["text"], *TEXTS[:5], *ODD]:
        assert again.encode(text) == tokenizer.encode(text)
    assert again.vocab_size == tokenizer.vocab_size
    with pytest.raises(UserError, match="another tokenizer"):
        load(GOLDEN).save(tmp_path / "again")


def test_complete_dictionary_is_saved_in_hugging_face_rows(tmp_path):
    vocab = files_of_gpt2(tmp_path)
    order = sorted(vocab.values(), reverse=True)
    lines = [*map(str, order), "madeupword0000"]
    (tmp_path / "dict.txt").write_text("".join(f"{line} 1\n" for line in lines))
    tokenizer = load(tmp_path)
    tokenizer.save(tmp_path / "hf")
    table = json.loads((tmp_path / "hf" / "vocab.json").read_text())
    assert list(table)[:4] == ["<s>", "<pad>", "</s>", "<unk>"]
    assert list(table)[-2:] == ["madeupword0000", "<mask>"]
    assert list(table.values()) == list(range(tokenizer.vocab_size))
    assert all(table[token] == 4 + order.index(i) for token, i in vocab.items())
    assert load(tmp_path / "hf").encode("hello the world") == tokenizer.encode("hello the world")


def test_mask_in_the_middle_keeps_its_row(tmp_path):
    """Tables made with Hugging Face's trainer have `<mask>` as row 4; rows must not move."""
    vocab = json.loads((GOLDEN / "vocab.json").read_text())
    vocab = {token: i + 1 if 4 <= i < 273 else i for token, i in vocab.items()} | {"<mask>": 4}
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    (tmp_path / "merges.txt").write_bytes((GOLDEN / "merges.txt").read_bytes())
    tokenizer = load(tmp_path)
    assert (tokenizer.mask, tokenizer.special, tokenizer.vocab_size) == (4, 5, 274)
    assert tokenizer.encode("hello <mask>") == [264, 4]


# Both kinds ---------------------------------------------------------------------------------------


def test_special_names_in_a_text(trained, roberta):
    for tokenizer in (trained, roberta):
        a, b = tokenizer.encode("hello"), tokenizer.encode(" world")
        assert tokenizer.encode("hello  <mask> world") == [*a, tokenizer.mask, *b]
        assert tokenizer.encode_batch(["hello", "<mask>", " world"]) == [a, [tokenizer.mask], b]
        literal = tokenizer.encode("hello <mask> </s>", literal=True)
        assert min(literal) > 3 and tokenizer.mask not in literal
        assert tokenizer.decode(literal) == "hello <mask> </s>"
        for wrong in (-1, tokenizer.vocab_size):
            with pytest.raises(ValueError, match=str(wrong)):
                tokenizer.decode([wrong])


def test_offsets_are_code_points(trained, roberta):
    for tokenizer in (trained, roberta):
        for text in [*TEXTS[:10], *ODD, "日本<mask> é  x"]:
            ids, spans = tokenizer.encode_with_offsets(text)
            assert ids == tokenizer.encode(text) and len(ids) == len(spans)
            covered = {i for start, end in spans for i in range(start, end)}
            assert covered >= {i for i, c in enumerate(text) if not c.isspace()}
            assert all(0 <= start <= end <= len(text) for start, end in spans)
            assert spans == sorted(spans)
        ids, spans = tokenizer.encode_with_offsets("the 日本 method")
        assert spans[-1][1] == len("the 日本 method")


def test_offsets_need_a_model_that_keeps_its_text():
    from sentencepiece import SentencePieceTrainer

    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS[0].split("\n")),
        model_writer=model,
        vocab_size=200,
        model_type="bpe",
        minloglevel=2,
    )
    with pytest.raises(UserError, match="rewrites"):
        SentencePiece(model.getvalue()).encode_with_offsets("so   many    blanks")


def test_save_load_pickle(trained, roberta, tmp_path):
    for tokenizer, name in ((trained, "a"), (roberta, "b")):
        tokenizer.save(tmp_path / name)
        tokenizer.save(tmp_path / name)  # over itself
        for again in (load(tmp_path / name), pickle.loads(pickle.dumps(tokenizer))):
            assert type(again) is type(tokenizer)
            assert again.vocab_size == tokenizer.vocab_size and again.mask == tokenizer.mask
            assert again.encode_batch(TEXTS[:5]) == tokenizer.encode_batch(TEXTS[:5])
    assert load(tmp_path / "a" / "sentencepiece.model").model == trained.model
    with pytest.raises(UserError, match="another tokenizer"):
        trained.save(tmp_path / "b")


def test_import_loads_neither_library():
    code = (
        "import sys, data2vec_jax.modalities.text.blocks;"
        "assert not {'sentencepiece', 'tokenizers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def put(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)
    return folder


VOCAB = '{"a": 0, "b": 1, "ab": 2}'


@pytest.mark.parametrize(
    "files, message",
    [
        ({}, r"no tokenizer here; needs a sentencepiece \*.model, or vocab.json \+ merges.txt"),
        ({"vocab__json": VOCAB}, "has vocab.json but no merges.txt"),
        ({"vocab__bpe": "a b"}, "has vocab.bpe but no encoder.json"),
        ({"vocab__json": "{", "merges__txt": "a b"}, "vocab.json: not JSON"),
        ({"vocab__json": "[1]", "merges__txt": "a b"}, "not a table of tokens"),
        ({"vocab__json": '{"a": "x"}', "merges__txt": "a b"}, "token 'a' has id 'x'"),
        ({"vocab__json": '{"a": 0, "b": 0}', "merges__txt": "a b"}, "two tokens share one id"),
        ({"vocab__json": VOCAB, "merges__txt": "#version: 0.2\na b\nab\n"}, "merges.txt: line 3"),
        ({"vocab__json": VOCAB, "merges__txt": "a c"}, "do not match: .*`c`"),
        ({"vocab__json": '{"<s>": 0, "a": 1}', "merges__txt": "#version: 0.2"}, "<s> but no <pad>"),
        (
            {
                "vocab__json": '{"<s>": 1, "<pad>": 0, "</s>": 2, "<unk>": 3, "a": 4}',
                "merges__txt": "#version: 0.2",
            },
            "<s> has id 1, not 0",
        ),
        (
            {"encoder__json": VOCAB, "vocab__bpe": "a b", "dict__txt": "0 1\n7 1\n"},
            "dict.txt: line 2: '7' is not an id",
        ),
        ({"encoder__json": VOCAB, "vocab__bpe": "a b", "dict__txt": "0 1\n0 1\n"}, "'0' is twice"),
        ({"vocab__json": VOCAB, "merges__txt": ""}, "merges.txt: line 1 is not a pair"),
        ({"tokenizer__json": '{"model": {"type": "Unigram"}}'}, "not the byte-level BPE"),
        ({"tokenizer__json": '{"model": {"type": "WordPiece"}}'}, "not a tokenizer of WordPiece"),
        ({"spiece__model": "not a model"}, r"spiece.model: not a sentencepiece model"),
        ({"spiece__model": ""}, r"spiece.model: the sentencepiece model is empty"),
        ({"a__model": "", "b__model": ""}, r"several sentencepiece models \(a.model, b.model\)"),
    ],
)
def test_load_errors(files, message, tmp_path):
    with pytest.raises(UserError, match=message) as error:
        load(put(tmp_path, **files))
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


def test_more_load_errors(trained, tmp_path):
    with pytest.raises(UserError, match="no such tokenizer"):
        load(tmp_path / "nowhere")
    (tmp_path / "cut.model").write_bytes(trained.model[: len(trained.model) // 2])
    with pytest.raises(UserError, match=r"cut\.model: not a sentencepiece model, or a damaged one"):
        load(tmp_path / "cut.model")
    put(tmp_path, vocab__json=VOCAB)
    (tmp_path / "merges.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"merges\.txt: not UTF-8"):
        load(tmp_path)


# Documents ----------------------------------------------------------------------------------------


def test_documents():
    items = [{"text": " one\r\n  two \n\n \n three"}, {"text": ""}, {"text": "four\n"}]
    assert list(text_documents(items)) == [["one", "two"], ["three"], ["four"]]
    lines = [{"text": text} for text in ("one\n", "two", "", "\n", "three", "four")]
    assert list(text_documents(lines, item_is_line=True)) == [["one", "two"], ["three", "four"]]


def test_documents_of_ids(roberta):
    items = [{"text": text} for text in TEXTS] + [{"text": "a <mask>\nb <s>"}]
    expected = [[roberta.encode(line, literal=True) for line in d] for d in text_documents(items)]
    for batch in (1, 7, 4096):
        assert list(documents_of(items, roberta, batch=batch)) == expected
    assert roberta.mask not in expected[-1][0]


# Blocks -------------------------------------------------------------------------------------------


def reference(documents, length: int, eos: int) -> tuple[list[list[int]], int]:
    """Whole lines per document, packed greedily; then what is too short or too long is dropped."""
    pieces = []
    for document in documents:
        pieces.append([])
        for line in document:
            if line:
                pieces[-1].append([*line, eos])
            else:
                pieces.append([])
    blocks = []
    for piece in pieces:
        while piece:
            count = 1
            while count < len(piece) and sum(map(len, piece[: count + 1])) <= length - 1:
                count += 1
            blocks.append([token for line in piece[:count] for token in line])
            piece = piece[count:]
    return [b for b in blocks if 1 < len(b) < length], sum(len(b) >= length for b in blocks)


def rows_of(blocks) -> list[list[int]]:
    return [blocks[i].tolist() for i in range(len(blocks))]


@pytest.mark.parametrize("length", [3, 8, 64, 512])
def test_complete_doc(length, roberta):
    documents = list(documents_of([{"text": text} for text in TEXTS[:30]], roberta))
    chance = random.Random(length)
    documents += [
        [
            [chance.randrange(4, 99) for _ in range(chance.randrange(0, 12))]
            for _ in range(chance.randrange(0, 9))
        ]
        for _ in range(300)
    ]
    blocks = token_blocks(documents, length=length, bos=0, eos=2)
    expected, overlong = reference(documents, length, 2)
    assert rows_of(blocks) == [[0, *block] for block in expected]
    assert blocks.overlong == overlong
    assert blocks.lengths().tolist() == [len(block) + 1 for block in expected]
    assert blocks.lengths().dtype == np.int32 and max(blocks.lengths()) <= length
    assert blocks.tokens.dtype == np.uint16 and blocks.offsets.dtype == np.int64


def test_complete_doc_by_hand(caplog):
    documents = [[[5, 6], [7], [8, 9]], [[10]], [[11], [], [], [12]]]
    with caplog.at_level(logging.WARNING):
        blocks = token_blocks(documents, length=6, bos=0, eos=2)
    assert rows_of(blocks) == [[0, 5, 6, 2, 7, 2], [0, 8, 9, 2], [0, 10, 2], [0, 11, 2], [0, 12, 2]]
    assert blocks.overlong == 0 and not caplog.records


def test_over_long_line_is_left_out_and_reported(caplog):
    """It closes the block before it and opens a new one after it, but is in none."""
    documents = [[[5], [6, 6, 6, 6, 6], [7, 7, 7, 7], [8]], [[9, 9, 9, 9, 9, 9]]]
    with caplog.at_level(logging.WARNING):
        blocks = token_blocks(documents, length=6, bos=0, eos=2)
    assert rows_of(blocks) == [[0, 5, 2], [0, 7, 7, 7, 7, 2], [0, 8, 2]]
    assert blocks.overlong == 2
    wanted = "left out 2 lines of more than 4 tokens; 3 blocks remain (mode 'none' cuts lines"
    assert wanted in caplog.text


@pytest.mark.parametrize("length", [3, 7, 512])
def test_none_is_the_stream_cut(length, roberta):
    documents = list(documents_of([{"text": text} for text in TEXTS[:20]], roberta))
    # The corpus as a file: each line ends with </s>, and so does the empty line between documents.
    stream = []
    for number, document in enumerate(documents):
        stream += [2] if number else []
        for line in document:
            stream += [*line, 2]
    blocks = token_blocks(documents, length=length, mode="none", bos=0, eos=2)
    assert blocks.tokens.tolist() == stream
    rows = rows_of(blocks)
    assert all(row[0] == 0 for row in rows)
    assert [token for row in rows for token in row[1:]] == stream
    assert set(map(len, rows[:-1])) == {length} and 2 <= len(rows[-1]) <= length


def test_none_by_hand():
    blocks = token_blocks([[[5, 6], [7]], [], [[8]]], length=4, mode="none", bos=0, eos=2)
    assert rows_of(blocks) == [[0, 5, 6, 2], [0, 7, 2, 2], [0, 8, 2]]
    assert len(token_blocks([], mode="none", bos=0, eos=2)) == 0
    exact = token_blocks([[[5]], [[6, 7]]], length=4, mode="none", bos=0, eos=2)
    assert rows_of(exact) == [[0, 5, 2, 2], [0, 6, 7, 2]]


def test_blocks_are_a_source():
    blocks = token_blocks([[[5, 70_000]], [[6]]], length=8, bos=0, eos=2)
    assert blocks.tokens.dtype == np.int32 and len(blocks) == 2
    assert blocks[0].dtype == np.int32 and blocks[-1].tolist() == [0, 6, 2]
    for outside in (2, -3):
        with pytest.raises(IndexError):
            blocks[outside]
    again = pickle.loads(pickle.dumps(blocks))
    assert rows_of(again) == rows_of(blocks) and again.overlong == 0
    blocks[0][1] = 9  # a row is a copy
    assert blocks[0].tolist() == [0, 5, 70_000, 2]
    assert len(token_blocks([], bos=0, eos=2)) == 0 and token_blocks([[[]]]).lengths().shape == (0,)


def test_block_errors():
    with pytest.raises(UserError, match="did you mean 'complete_doc'"):
        token_blocks([], mode="complete")
    with pytest.raises(UserError, match="at least 3"):
        token_blocks([], length=2)
    with pytest.raises(ValueError, match="does not fit"):
        pad_row([1, 2, 3], 2, 1)


def test_padding():
    rows = np.stack([pad_row([0, 5, 2], 5, 1), pad_row(np.array([0, 2], np.uint16), 5, 1)])
    assert rows.tolist() == [[0, 5, 2, 1, 1], [0, 2, 1, 1, 1]]
    assert valid_lengths(rows, 1).tolist() == [3, 2] and valid_lengths(rows, 1).dtype == np.int32


def test_kinds(trained, roberta):
    assert isinstance(trained, SentencePiece) and isinstance(roberta, ByteLevelBPE)
    assert isinstance(trained, Tokenizer) and isinstance(roberta, Tokenizer)


@pytest.mark.parametrize("lower", [True, False])
def test_wordpiece_is_that_of_bert(lower, tmp_path):
    transformers = pytest.importorskip("transformers")
    letters = sorted({c for text in ODD + TEXTS[:3] for c in text.lower() + text if c > " "})
    words = ["the", "two", "blank", "##s", "##ing", *letters, *(f"##{c}" for c in letters)]
    vocabulary = ["[PAD]", "unused", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    (tmp_path / "vocab.txt").write_text("\n".join(vocabulary) + "\n", "utf-8")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": lower}))
    theirs = transformers.BertTokenizerFast(
        vocab={word: row for row, word in enumerate(vocabulary)}, do_lower_case=lower
    )
    theirs.save_pretrained(tmp_path / "single")
    (tmp_path / "single/vocab.txt").unlink(missing_ok=True)
    load(tmp_path).save(tmp_path / "saved")
    for folder in (tmp_path, tmp_path / "single", tmp_path / "saved"):
        tokenizer = pickle.loads(pickle.dumps(load(folder)))
        assert (tokenizer.pad, tokenizer.unk, tokenizer.mask) == (0, 2, 5)
        assert tokenizer.vocab_size == len(vocabulary)
        for text in ODD + TEXTS[:3]:
            row = [tokenizer.bos, *tokenizer.encode(text, literal=True), tokenizer.eos]
            assert row == theirs(text)["input_ids"]
        ids, spans = tokenizer.encode_with_offsets("The blanks")
        assert len(ids) == len(spans) and spans[-1] == (9, 10)
    (tmp_path / "vocab.txt").write_text("[PAD]\n[CLS]\nword\n")
    with pytest.raises(UserError, match="WordPiece without the token"):
        load(tmp_path)
