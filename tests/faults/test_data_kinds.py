"""More kinds of bad examples, one among 40: files of every format, rows, records, transcripts.

What a decoder makes of damage inside a file is its own affair, and another version may do it in
another way (`EITHER`). That other rows change, or that something is left out unnamed, is not.
"""

import json
import shutil
import struct
import warnings
import zlib
from pathlib import Path

import msgpack
import numpy as np
import pytest
import test_data as cases
from configs_for_tests import config_of
from PIL import Image
from test_data import AUDIO, BAD, COUNT, IMAGES, RATE, SPEECH, TEXT, VISION, of_bytes, set_field

from data2vec_jax.core.errors import UserError
from data2vec_jax.data.sources import array_record, open_source, write_array_record
from data2vec_jax.models import heads
from data2vec_jax.tasks import finetune, transcribe

corpora = cases.corpora

SAME = "nothing changes"  # it is as if it were sound
TAKEN = "taken as it is"  # no other row changes
EITHER = "taken, or left out and named"


def check(found, bad, wanted, outcome, where):
    """Batches and bad examples are what `outcome`, one of the above or a reason, says."""
    if outcome == EITHER:
        outcome = min((reason for _, reason, _ in bad), default=TAKEN)
    if outcome in (SAME, TAKEN):
        assert not bad
        for batch, sound in zip(found, wanted, strict=True):
            np.testing.assert_array_equal(batch["example_id"], sound["example_id"])
            rows = slice(None) if outcome == SAME else sound["example_id"] != BAD
            for name, array in sound.items():
                assert np.isfinite(batch[name]).all()
                np.testing.assert_array_equal(batch[name][rows], array[rows])
    else:
        assert cases.compare(found, wanted) >= 1
        assert bad == {(BAD, outcome, where)}


# Files --------------------------------------------------------------------------------------------


def folder(path):
    path.unlink()
    path.mkdir()


def hole(data):
    del data[len(data) // 2 : len(data) // 2 + 400]
    return data


def zeros(data):
    data[len(data) // 2 : len(data) // 2 + 64] = bytes(64)
    return data


def tone(change=lambda x: x, **options):
    return cases.samples(change, **options)


def values(value):
    return tone(lambda x: np.full_like(x, value), subtype="FLOAT")


def image(mode, size=(24, 32), **options):
    def save(path):
        draw = np.random.default_rng(1).integers(0, 255, (size[1], size[0], 3), np.uint8)
        Image.fromarray(draw).convert(mode).save(path, **options)

    return save


def in_format(name):
    return lambda path: Image.fromarray(cases.pixels(BAD)).save(path, format=name)


def pages(path):
    first, second = (Image.fromarray(cases.pixels(i)) for i in (1, 2))
    first.save(path, save_all=True, append_images=[second])


def turned(path):
    exif = Image.Exif()
    exif[0x0112] = 99
    Image.fromarray(cases.pixels(BAD)).save(path, exif=exif)


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height, depth=8, colour=2, more=b""):
    """Another header, with a checksum that is right."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)

    def change(data):
        return data[:8] + chunk(b"IHDR", header) + more + data[33:]

    return of_bytes(change)


INFLATING = chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(50_000_000), 1))
PAGE = "<html>404</html>" * 30

ANY = {
    "a folder": (folder, "not a file"),
    "without its first byte": (of_bytes(lambda data: data[1:]), "unreadable"),
    "zeros for a head": (set_field(0, bytes(16)), "unreadable"),
    "a page of the web": (lambda path: path.write_text(PAGE), "unreadable"),
    "zeros in the middle": (of_bytes(zeros), EITHER),
    "a hole in the middle": (of_bytes(hole), EITHER),
    "more at its end": (of_bytes(lambda data: data + b"\0garbage" * 50), SAME),
}
OF_AUDIO = {
    "one sample": (tone(lambda x: x[:1]), "too short"),
    "300 samples": (tone(lambda x: x[:300]), "too short"),
    "clipped": (tone(lambda x: np.clip(1000 * x, -1, 1)), TAKEN),
    "two channels": (tone(lambda x: np.stack([x, x], 1)), TAKEN),
}
OF_IMAGES = {
    "without its end": (of_bytes(lambda data: data[: len(data) * 9 // 10]), "unreadable"),
    "60 bytes of it": (of_bytes(lambda data: data[:60]), "unreadable"),
    "1 x 1": (image("RGB", (1, 1)), TAKEN),
    "2 x 3": (image("RGB", (2, 3)), TAKEN),
    "9,000 x 1": (image("RGB", (9_000, 1)), TAKEN),
    "grey": (image("L"), TAKEN),
    "a drawing": (lambda path: path.write_text("<svg/>"), "unreadable"),
    "a sound": (cases.samples(lambda x: x, format="WAV"), "unreadable"),
}
WAV = {
    "no samples": (tone(lambda x: x[:0]), "empty"),
    "without its end": (of_bytes(lambda data: data[: len(data) * 9 // 10]), "damaged"),
    "0 channels": (set_field(22, b"\0\0"), "unreadable"),
    "65,535 channels": (set_field(22, b"\xff\xff"), "unreadable"),
    "0 Hz": (set_field(24, bytes(4)), "unreadable"),
    "2^32 - 1 Hz": (set_field(24, b"\xff" * 4), "unreadable"),
    "0 bits": (set_field(34, b"\0\0"), "unreadable"),
    "7 bits": (set_field(34, b"\7\0"), EITHER),
    "a format that none has": (set_field(20, b"\x0f\x27"), "unreadable"),
    "a header of 4 GiB": (set_field(16, b"\xff" * 4), "unreadable"),
    "2 GiB of samples": (set_field(40, b"\xff\xff\xff\x7f"), SAME),
    "4 GiB of samples": (set_field(40, b"\xff" * 4), SAME),
    "0 bytes of samples": (set_field(40, bytes(4)), "empty"),
    "1 byte of samples": (set_field(40, b"\1\0\0\0"), "empty"),
    "RIFF of 0 bytes": (set_field(4, bytes(4)), SAME),
    "big endian by name": (set_field(0, b"RIFX"), "unreadable"),
    **{f"{name} inside": (tone(format=name), TAKEN) for name in ("FLAC", "OGG", "MP3")},
    **{name: (tone(subtype=name), TAKEN) for name in ("PCM_24", "ULAW", "PCM_U8", "DOUBLE")},
    "NaN alone": (values(np.nan), "not finite"),
    "minus infinity": (cases.with_value(-np.inf), "not finite"),
    "3e38": (cases.with_value(3e38), TAKEN),
    "1e-45": (values(1e-45), "constant"),
    "almost silent": (tone(lambda x: 1e-30 * x, subtype="FLOAT"), TAKEN),
    "one impulse": (tone(lambda x: np.eye(1, len(x), 5, np.float32)[0]), TAKEN),
}
FLAC = {
    "no samples": (tone(lambda x: x[:0]), "unreadable"),
    "without its end": (of_bytes(lambda data: data[: len(data) * 9 // 10]), "unreadable"),
    "0 Hz": (set_field(18, bytes(3)), "unreadable"),
    "a checksum of another": (set_field(26, b"\x55" * 16), SAME),
    "its header": (of_bytes(lambda data: data[:42]), "damaged"),
    "metadata of 16 MiB": (set_field(5, b"\xff" * 3), "unreadable"),
}
OGG = {
    "no samples": (tone(lambda x: x[:0]), "empty"),
    "silence": (tone(np.zeros_like), "constant"),
    "its header": (of_bytes(lambda data: data[:58]), "unreadable"),
    "twice": (of_bytes(lambda data: data + data), SAME),
    "a wrong checksum": (set_field(22, b"\1\2\3\4"), "unreadable"),
}
MP3 = {
    "no samples": (tone(lambda x: x[:0]), "unreadable"),
    "silence": (tone(np.zeros_like), "constant"),
    "without its end": (of_bytes(lambda data: data[: len(data) * 9 // 10]), "damaged"),
    "half": (of_bytes(lambda data: data[: len(data) // 2]), "damaged"),
    "a tag of 256 MiB": (of_bytes(lambda data: b"ID3\3\0\0\x7f\x7f\x7f\x7f" + data), "unreadable"),
}
PNG = {
    "JPEG inside": (in_format("JPEG"), TAKEN),
    "0 wide": (png(0, 32), "unreadable"),
    "2^31 - 1 wide": (png(2**31 - 1, 1), "too large"),
    "2^31 - 1 square": (png(2**31 - 1, 2**31 - 1), "too large"),
    "taller than its rows": (png(24, 64), EITHER),
    "depth 3": (png(24, 32, 3), "unreadable"),
    "a palette that is not there": (png(24, 32, 8, 3), "unreadable"),
    "a text that inflates": (png(24, 32, more=INFLATING), "unreadable"),
    "no pixels": (of_bytes(lambda data: data[:33] + data[-12:]), "unreadable"),
    "no end": (of_bytes(lambda data: data[:-12]), SAME),
    "invisible": (lambda path: Image.new("RGBA", (9, 9), (9, 99, 200, 0)).save(path), "constant"),
    "one bit": (image("1"), TAKEN),
    "a palette": (image("P"), TAKEN),
}
JPG = {
    "PNG inside": (in_format("PNG"), TAKEN),
    "CMYK": (image("CMYK"), TAKEN),
    "EXIF without end": (image("RGB", exif=b"Exif\0\0II*\0\xff\xff\xff\xff"), TAKEN),
    "turned by 99": (turned, SAME),
    "no end": (of_bytes(lambda data: data[:-2]), EITHER),
    "a colour profile of noise": (image("RGB", icc_profile=b"x" * 200), TAKEN),
}
OTHER = {
    ("gif", "65,535 square"): (set_field(6, b"\xff" * 4), "too large"),
    ("bmp", "2^31 - 1 wide"): (set_field(18, b"\xff\xff\xff\x7f"), "too large"),
    ("bmp", "0 wide"): (set_field(18, bytes(4)), "unreadable"),
    ("bmp", "7 bits"): (set_field(28, b"\7\0"), "unreadable"),
    ("tif", "an offset behind its end"): (set_field(4, b"\xff\xff\xff\x7f"), "unreadable"),
    ("tif", "an offset to itself"): (set_field(4, b"\4\0\0\0"), "unreadable"),
    ("tif", "9,000 square, deflated"): (
        lambda path: Image.new("L", (9_000, 9_000)).save(path, compression="tiff_deflate"),
        "too large",
    ),
    **{(suffix, "pages"): (pages, TAKEN) for suffix in ("gif", "webp", "tif")},
    **{(suffix, "PNG inside"): (in_format("PNG"), TAKEN) for suffix in ("gif", "webp")},
    **{(suffix, "PNG inside"): (in_format("PNG"), SAME) for suffix in ("bmp", "tif")},
}
PER_SUFFIX = {"wav": WAV, "flac": FLAC, "ogg": OGG, "mp3": MP3, "png": PNG, "jpg": JPG}
FILES = {
    (suffix, name): kind
    for suffix in (*AUDIO, *IMAGES)
    for group in (ANY, OF_AUDIO if suffix in AUDIO else OF_IMAGES, PER_SUFFIX.get(suffix, {}))
    for name, kind in group.items()
} | OTHER


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, of damaged tags
@pytest.mark.parametrize("suffix,kind", FILES, ids=[" ".join(key) for key in FILES])
def test_one_file(corpora, suffix, kind):
    modality = SPEECH if suffix in AUDIO else VISION
    place, (damage, outcome) = corpora(suffix), FILES[suffix, kind]
    path, uri = cases.file_of(place, suffix), f"folder:{place}"
    wanted = cases.sound_batches(modality, uri)
    try:
        damage(path)
        found, bad = cases.read(modality, uri)
    finally:
        path.rmdir() if path.is_dir() else path.unlink()
        cases.write(path, BAD)
    check(found, bad, wanted, outcome, str(path))


def test_a_folder_called_like_a_file_may_hold_files(tmp_path):
    for i in range(4):
        cases.write(tmp_path / f"{'ab'[i % 2]}.png/{i}.png", i)
    source = open_source(f"folder:{tmp_path}", codec=VISION.codec)
    assert len(source) == 4 and source.label_names == ("a.png", "b.png")


# Rows of tables -----------------------------------------------------------------------------------

LENGTH = RATE // 2
CELLS = {  # path, samples
    "no path": (("", LENGTH), "missing"),
    "no length": (("{path}", ""), "format"),
    "0 samples": (("{path}", 0), "empty"),
    "1 sample": (("{path}", 1), "too short"),
    "-5 samples": (("{path}", -5), "format"),
    "8000.0 samples": (("{path}", "8000.0"), "format"),
    "8e3 samples": (("{path}", "8e3"), "format"),
    "inf samples": (("{path}", "inf"), "format"),
    "10^12 samples": (("{path}", 10**12), "too long"),
    "a raised digit": (("{path}", "800²"), "format"),
    "blanks": ((" {path} ", f" {LENGTH} "), "format"),
    "no such file": (("gone.wav", LENGTH), "missing"),
    "the folder": ((".", LENGTH), "missing"),
    "a NUL": (("17\0.wav", LENGTH), "missing"),
    "another line end": (("17\u2028.wav", LENGTH), "missing"),
    "1 MB": (("a" * 2**20, LENGTH), "missing"),
    "an absolute path": (("{root}/{path}", LENGTH), SAME),
    "a way round": (("../{name}/{path}", LENGTH), SAME),
    "another's path": (("16.wav", LENGTH), TAKEN),
}
LINES = {"one column": "17.wav", "three columns": "17.wav{sep}8000{sep}1", "no cell": "{sep}"}
TABLES = {  # name -> (first line, separator)
    "t.tsv": ("path\tsamples", "\t"),
    "wav2vec.tsv": ("{root}", "\t"),
    "t.csv": ("path,samples", ","),
}


def read_table(place, lines):
    place.write_text("\n".join(lines) + "\n")
    return cases.read(SPEECH, f"manifest:{place}")


@pytest.mark.parametrize("kind", [*CELLS, *LINES])
@pytest.mark.parametrize("table", TABLES)
def test_one_line(corpora, table, kind):
    root, (head, sep) = corpora("wav"), TABLES[table]
    place, words = root / table, {"path": f"{BAD}.wav", "root": root, "name": root.name}
    rows = [f"{i:02}.wav{sep}{LENGTH}" for i in range(COUNT)]
    lines = [head.format(root=root), *rows]
    wanted, none = read_table(place, lines)
    assert not none
    if kind in LINES:
        lines[BAD + 1], outcome = LINES[kind].format(sep=sep), "format"
    else:
        cells, outcome = CELLS[kind]
        lines[BAD + 1] = sep.join(str(cell).format(**words) for cell in cells)
    found, bad = read_table(place, lines)
    check(found, bad, wanted, outcome, f"{place}:{BAD + 2}")


def test_a_quote_that_is_not_closed(corpora):
    place = corpora("wav") / "t.csv"
    lines = ["path,samples", *(f"{i:02}.wav,{LENGTH}" for i in range(COUNT))]
    lines[BAD + 1] = f'"{lines[BAD + 1]}'  # a cell of all that follows: no row after it is left
    with pytest.raises(UserError, match=rf"t\.csv:{BAD + 2}: a quote .* is not closed"):
        read_table(place, lines)
    lines[BAD + 1] = f'"{BAD}.wav","{LENGTH}"'
    assert not read_table(place, lines)[1]


def test_a_cell_of_several_lines_is_one(tmp_path):
    place = tmp_path / "t.csv"
    place.write_text('text\n"a cat\nand ""a"" dog"\n"a\nb"')  # no line end at the end
    source = open_source(f"manifest:{place}", codec=TEXT.codec)
    assert [source[i]["text"] for i in range(2)] == ['a cat\nand "a" dog', "a\nb"]


OBJECTS = {
    "true": ("true", "format"),
    "a string": ('"a"', "format"),
    "null": ("null", "format"),
    "an object of nothing": ("{}", "format"),
    "a list of paths": ('{"path": ["a"], "samples": 8000}', "format"),
    "an object of paths": ('{"path": {}, "samples": 8000}', "format"),
    "no length": ('{"path": "17.wav", "samples": null}', "format"),
    "a length that is true": ('{"path": "17.wav", "samples": true}', "format"),
    "a length with a point": ('{"path": "17.wav", "samples": 8000.0}', "format"),
    "NaN": ('{"path": "17.wav", "samples": NaN}', "format"),
    "1e999": ('{"path": "17.wav", "samples": 1e999}', "format"),
    "10,000 digits": ('{"path": "17.wav", "samples": ' + "9" * 10_000 + "}", "format"),
    "half a character": ('{"path": "\\ud800.wav", "samples": 8000}', "missing"),
    "two objects": ('{"path": "17.wav", "samples": 8000}{}', "format"),
    "a comma": ('{"path": "17.wav", "samples": 8000},', "format"),
    "single quotes": ("{'path': '17.wav', 'samples': 8000}", "format"),
    "no name": ('{"path": "", "samples": 8000}', "missing"),
    "the same key twice": ('{"path": "16.wav", "path": "17.wav", "samples": 8000}', SAME),
    "more keys": ('{"path": "17.wav", "samples": 8000, "x": 1}', SAME),
}


@pytest.mark.parametrize("kind", OBJECTS)
def test_one_object(corpora, kind):
    place = corpora("wav") / "t.jsonl"
    lines = [json.dumps({"path": f"{i:02}.wav", "samples": LENGTH}) for i in range(COUNT)]
    wanted, _ = read_table(place, lines)
    lines[BAD], outcome = OBJECTS[kind]
    found, bad = read_table(place, lines)
    check(found, bad, wanted, outcome, f"{place}:{BAD + 1}")


# Records ------------------------------------------------------------------------------------------


def packed(shape, dtype):
    return msgpack.ExtType(1, msgpack.packb((shape, dtype, b"12345678")))


RAW = {
    "nothing": b"",
    "noise": bytes(range(200)),
    "a list": msgpack.packb([1]),
    "a number": msgpack.packb(3),
    "cut": msgpack.packb({"text": "b" * 50})[:-9],
    "nested": b"\x91" * 5_000,
    "an array of 2^31": msgpack.packb({"audio": packed((2**31,), "float32")}),
    "an array of objects": msgpack.packb({"audio": packed((1,), "object")}),
    "a negative shape": msgpack.packb({"image": packed((-1, -1), "uint8")}),
    "a type of its own": msgpack.packb({"audio": msgpack.ExtType(42, b"x")}),
    "2^32 fields": b"\xdf\xff\xff\xff\xff",
}
SOUND, PICTURE = cases.tone(BAD), cases.pixels(BAD)
RECORDS = {
    **{(m, kind): (raw, "unreadable") for m in ("speech", "vision") for kind, raw in RAW.items()},
    ("speech", "no samples"): ({"audio": SOUND[:0]}, "empty"),
    ("speech", "300 samples"): ({"audio": SOUND[:300]}, "too short"),
    ("speech", "null"): ({"audio": None}, "format"),
    ("speech", "a dict"): ({"audio": {"a": 1}}, "format"),
    ("speech", "texts"): ({"audio": ["a"] * LENGTH}, "format"),
    ("speech", "uint16"): ({"audio": SOUND.astype(np.uint16)}, "format"),
    ("speech", "bool"): ({"audio": SOUND > 0}, "format"),
    ("speech", "infinity"): ({"audio": np.full(LENGTH, np.inf, np.float32)}, "not finite"),
    ("speech", "no rate"): ({"audio": SOUND, "sample_rate": None}, "sample rate"),
    ("speech", "a list of rates"): ({"audio": SOUND, "sample_rate": [RATE]}, "sample rate"),
    ("speech", "an image"): ({"image": PICTURE}, "unreadable"),
    ("speech", "float64"): ({"audio": SOUND.astype(np.float64)}, SAME),
    ("speech", "float16"): ({"audio": SOUND.astype(np.float16)}, TAKEN),
    ("speech", "a list of numbers"): ({"audio": [0.1, 0.2] * (LENGTH // 2)}, TAKEN),
    ("speech", "too loud"): ({"audio": 1000 * SOUND}, TAKEN),
    ("vision", "0 x 0"): ({"image": PICTURE[:0, :0]}, "empty"),
    ("vision", "numbers from 0 to 1"): ({"image": PICTURE / 255}, "format"),
    ("vision", "2 channels"): ({"image": PICTURE[..., :2]}, "format"),
    ("vision", "channels first"): ({"image": PICTURE.transpose(2, 0, 1)}, "format"),
    ("vision", "one axis"): ({"image": PICTURE.ravel()}, "format"),
    ("vision", "four axes"): ({"image": PICTURE[None]}, "format"),
    ("vision", "int64"): ({"image": PICTURE.astype(np.int64)}, "format"),
    ("vision", "one colour"): ({"image": np.full((9, 9, 3), 7, np.uint8)}, "constant"),
    ("vision", "null"): ({"image": None}, "format"),
    ("vision", "a text"): ({"image": "cat"}, "format"),
    ("vision", "no file"): ({"image_bytes": b"cat"}, "unreadable"),
    ("vision", "an empty file"): ({"image_bytes": b""}, "unreadable"),
    ("vision", "a sound"): ({"audio": SOUND}, "unreadable"),
    ("vision", "8,000 square"): ({"image": np.ones((8_000, 8_000, 1), np.uint8)}, "too large"),
    ("vision", "grey"): ({"image": PICTURE[..., 0]}, TAKEN),
}


def written(tmp_path, monkeypatch, examples):
    """The address of records, of which those that are bytes are written as they are."""
    encode = array_record.encode_example
    monkeypatch.setattr(
        array_record, "encode_example", lambda x: x if isinstance(x, bytes) else encode(x)
    )
    shutil.rmtree(tmp_path / "records", ignore_errors=True)
    (tmp_path / "records").mkdir()
    write_array_record(tmp_path / "records/train.array_record", examples)
    return f"array_record:{tmp_path / 'records'}"


def one_record(tmp_path, monkeypatch, modality, good, record):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that it measured the records
        wanted, _ = cases.read(modality, written(tmp_path, monkeypatch, good))
        uri = written(tmp_path, monkeypatch, [*good[:BAD], record, *good[BAD + 1 :]])
        return wanted, *cases.read(modality, uri), f"{uri[13:]}/train.array_record[{BAD}]"


@pytest.mark.parametrize("name,kind", RECORDS, ids=[" ".join(key) for key in RECORDS])
def test_one_record(tmp_path, monkeypatch, name, kind):
    modality, field, make = {
        "speech": (SPEECH, "audio", cases.tone),
        "vision": (VISION, "image", cases.pixels),
    }[name]
    good = [{field: make(i)} for i in range(COUNT)]
    record, outcome = RECORDS[name, kind]
    wanted, found, bad, where = one_record(tmp_path, monkeypatch, modality, good, record)
    check(found, bad, wanted, outcome, where)


# Texts, which are read at the start: a bad one is named, the others are as without it -------------

TEXT_RECORDS = {
    **{kind: (raw, "unreadable") for kind, raw in RAW.items()},
    "null": ({"text": None}, "format"),
    "an array": ({"text": np.zeros(3)}, "format"),
    "latin-1": ({"text": b"\xe9\xe9"}, "unreadable"),
    "NUL": ({"text": "a\0b"}, "format"),
    "an image": ({"image": PICTURE}, "unreadable"),
}
TEXT_OBJECTS = {
    "null": ({"text": None}, "format"),
    "a number": ({"text": 3}, "format"),
    "a list": ({"text": ["a"]}, "format"),
    "true": ({"text": True}, "format"),
    "NUL": ({"text": "a\0b"}, "format"),
    "half a character": ({"text": "the \ud800 cat"}, "format"),
}


def same_tokens(found, others):
    for batch, other in zip(found, others, strict=True):
        np.testing.assert_array_equal(batch["tokens"], other["tokens"])


@pytest.mark.parametrize("kind", TEXT_RECORDS)
def test_one_record_of_text(tmp_path, monkeypatch, kind):
    good = [{"text": cases.text(i)} for i in range(COUNT)]
    record, reason = TEXT_RECORDS[kind]
    _, found, bad, where = one_record(tmp_path, monkeypatch, TEXT, good, record)
    assert bad == {(BAD, reason, where)}
    uri = written(tmp_path, monkeypatch, [*good[:BAD], *good[BAD + 1 :]])
    same_tokens(found, cases.read(TEXT, uri)[0])


@pytest.mark.parametrize("kind", TEXT_OBJECTS)
def test_one_object_of_text(tmp_path, kind):
    place = tmp_path / "t.jsonl"
    lines = [json.dumps({"text": cases.text(i)}) for i in range(COUNT)]
    row, reason = TEXT_OBJECTS[kind]
    place.write_text("\n".join([*lines[:BAD], json.dumps(row), *lines[BAD + 1 :]]))
    found, bad = cases.read(TEXT, f"manifest:{place}")
    assert bad == {(BAD, reason, f"{place}:{BAD + 1}")}
    place.write_text("\n".join([*lines[:BAD], *lines[BAD + 1 :]]))
    same_tokens(found, cases.read(TEXT, f"manifest:{place}")[0])


@pytest.mark.parametrize("pair", [None, 3, "a\0b", "\ud800"])
def test_one_second_text(tmp_path, pair):
    place = tmp_path / "t.jsonl"
    rows = [{"text": cases.text(i), "pair": "yes"} for i in range(COUNT)]
    place.write_text("\n".join(map(json.dumps, rows)))
    rows[BAD]["pair"] = pair
    (tmp_path / "bad.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = open_source(f"manifest:{tmp_path / 'bad.jsonl'}", codec=TEXT.codec)
    inputs = TEXT.inputs(source, lengths=(64,), vocab_size=280)
    assert {i: error.reason for i, error in source.bad.items()} == {BAD: "format"}
    assert len(inputs.rows) == COUNT


# Transcripts --------------------------------------------------------------------------------------

TRANSCRIPTS = {"null": None, "a number": 7, "a list": ["КОТ ТОТ"]}


def utterances(place, rows):
    place.write_text("\n".join(map(json.dumps, rows)))
    config = config_of("finetune_librispeech").to_dict()
    targets = transcribe.targets(config, heads.make(config["head"], "head"))
    source = open_source(f"manifest:{place}", codec=SPEECH.codec)
    targets.check(source)
    inputs = SPEECH.inputs(source, seconds=(1.0,), overlap=0.5)
    return finetune.Examples(inputs, targets), transcribe.characters_of(config)


def read_targets(examples):
    plan = cases.batches.TrainSampler(examples.bucket_of, examples.layout.buckets, 8, 3, 4)
    reader, bad, found = cases.batches.HostBatchReader(plan, examples), set(), []
    for n in range(6):
        batch = reader(n)
        packed_ones = batch.pop(cases.bad_examples.KEY, None)
        for one in [] if packed_ones is None else cases.bad_examples.unpack(packed_ones):
            bad.add((one.example_id, one.reason, one.path))
        found.append(batch)
    return found, bad


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("kind", TRANSCRIPTS)
def test_one_transcript(corpora, kind, first):
    place, at = corpora("wav") / "t.jsonl", 0 if first else BAD
    rows = [{"path": f"{i:02}.wav", "transcript": "КОТ ТОТ"} for i in range(COUNT)]
    wanted, none = read_targets(utterances(place, rows)[0])
    assert not none
    rows[at]["transcript"] = TRANSCRIPTS[kind]
    examples, characters = utterances(place, rows)
    found, bad = read_targets(examples)
    assert cases.compare(found, wanted, bad=at) >= 1
    assert bad == {(at, "label", f"{place}:{at + 1}")}

    logits = np.zeros((40, len(characters)), np.float32)
    predictions = [{"logits": logits, "frames": 40}] * COUNT
    predictions[at] = None
    scores = transcribe.score(predictions, examples.inputs, characters=characters, step=320)
    assert scores["left_out"] == 1 / COUNT and scores["wer"] == 1


def test_no_transcripts_at_all_are_said(corpora):
    rows = [{"path": f"{i:02}.wav"} for i in range(COUNT)]
    with pytest.raises(UserError, match="have no transcript"):
        utterances(corpora("wav") / "t.jsonl", rows)


if __name__ == "__main__":
    here = [FILES, OBJECTS, RECORDS, TEXT_RECORDS, TEXT_OBJECTS]
    counts = [*map(len, here), len(TABLES) * (len(CELLS) + len(LINES)), 4, 2 * len(TRANSCRIPTS)]
    print(sum(counts), counts, Path(__file__).name)
