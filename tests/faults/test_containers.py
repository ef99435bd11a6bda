"""Files say more than their samples: turned, transparent, grey, deep, of other rates, of no length;
and what lies beside them."""

import io
import struct

import numpy as np
import pytest
import soundfile
from PIL import Image

from data2vec_jax.core.errors import ExampleError, UserError
from data2vec_jax.data.codecs import audio, image
from data2vec_jax.data.sources import open_source, write_array_record
from data2vec_jax.modalities import contract
from data2vec_jax.modalities.text import tokenizer

SPEECH, VISION, TEXT = (contract.get(name) for name in ("speech", "vision", "text"))
RATE = 16_000


def read(path):
    return image.read_image(str(path), str(path))["image"]


# Images -----------------------------------------------------------------------------------------

PIXELS = np.random.default_rng(0).integers(0, 256, (16, 24, 3), np.uint8)
# What the EXIF standard says of each value: which side of the picture row 0 and column 0 are.
TURNS = {
    1: lambda x: x,
    2: lambda x: x[:, ::-1],  # top, right
    3: lambda x: x[::-1, ::-1],  # bottom, right
    4: lambda x: x[::-1],  # bottom, left
    5: lambda x: x.swapaxes(0, 1),  # left, top
    6: lambda x: x.swapaxes(0, 1)[:, ::-1],  # right, top
    7: lambda x: x.swapaxes(0, 1)[::-1, ::-1],  # right, bottom
    8: lambda x: x.swapaxes(0, 1)[::-1],  # left, bottom
}


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
def test_orientation(tmp_path, suffix):
    options = {"webp": {"lossless": True}, "jpg": {"quality": 95}}.get(suffix, {})
    stored = Image.fromarray(PIXELS)
    stored.save(tmp_path / f"plain.{suffix}", **options)
    plain = read(tmp_path / f"plain.{suffix}")
    for tag, turn in TURNS.items():
        exif = Image.Exif()
        exif[0x0112] = tag
        path = tmp_path / f"{tag}.{suffix}"
        stored.save(path, exif=exif, **options)
        np.testing.assert_array_equal(read(path), turn(plain), err_msg=str(tag))


def sign():
    """A black square on a ground that is black, too, but transparent."""
    found = np.zeros((12, 12, 4), np.uint8)
    found[4:8, 4:8, 3] = 255
    return found


def palette(path):
    indices = Image.fromarray((sign()[..., 3] > 0).astype(np.uint8), "P")
    indices.putpalette([0, 0, 0, 0, 0, 0])
    indices.save(path, transparency=0)


def one_colour(mode, colour):
    def save(path):
        pixels = np.where(sign()[..., 3:] > 0, 0, 9).astype(np.uint8)
        pixels = pixels[..., 0] if mode == "L" else np.repeat(pixels, 3, -1)
        Image.fromarray(pixels).save(path, transparency=colour)

    return save


TRANSPARENT = {
    "gif": palette,
    "png of a palette": palette,
    "png of one grey": one_colour("L", 9),
    "png of one colour": one_colour("RGB", (9, 9, 9)),
    "webp": lambda path: Image.fromarray(sign()).save(path, lossless=True, exact=True),
    "tif": lambda path: Image.fromarray(sign()).save(path),
    "png of greys": lambda path: Image.fromarray(sign()).convert("LA").save(path),
}


@pytest.mark.parametrize("kind", TRANSPARENT)
def test_transparent_ground(tmp_path, kind):
    path = tmp_path / f"a.{kind.split()[0]}"
    TRANSPARENT[kind](path)
    found = read(path)
    wanted = np.where(sign()[..., 3:] > 0, 0, 255)
    np.testing.assert_array_equal(found, np.broadcast_to(wanted, (12, 12, 3)))


def grey(mode):
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    if mode == "I;16":
        return Image.fromarray(ramp.astype(np.uint16) << 8 | 7)
    if mode == "1":
        return Image.fromarray(ramp > 99)
    return Image.fromarray(ramp).convert(mode)


@pytest.mark.parametrize("inputs", ["pretraining", "fine-tuning"])
@pytest.mark.parametrize(
    "mode,suffix",
    [
        ("L", "png"),
        ("1", "png"),
        ("I;16", "png"),
        ("I;16", "tif"),
        ("LA", "png"),
        ("P", "gif"),
        ("RGB", "png"),
        ("L", "jpg"),
        ("L", "webp"),
    ],
)
def test_grey_images_of_one_channel(tmp_path, mode, suffix, inputs):
    """They train as such, and say the same as their three equal channels."""
    options = {"jpg": {"quality": 100}, "webp": {"lossless": True}}.get(suffix, {})
    grey(mode).save(tmp_path / f"a.{suffix}", **options)
    source = open_source(f"folder:{tmp_path}", codec=VISION.codec)
    found = {}
    for channels in (1, 3):
        if inputs == "pretraining":
            settings = {"image": 16, "channels": channels}
            made = VISION.examples(source, VISION.examples(source, **settings), **settings)
        else:
            settings = {"image": 16, "channels": channels, "crop": 1.0}
            made = VISION.inputs(source, VISION.inputs(source, **settings), **settings)
        found[channels] = made.load(0, 0, None)["image"]
    assert found[1].shape == (16, 16, 1) and found[1].dtype == np.uint8
    ramp = np.arange(256).reshape(16, 16, 1)
    wanted = np.where(ramp > 99, 255, 0) if mode == "1" else ramp
    np.testing.assert_allclose(found[1], wanted, atol=2 if suffix == "jpg" else 0)
    np.testing.assert_array_equal(found[3], np.repeat(found[1], 3, -1))


@pytest.mark.parametrize("mode", ["F", "I"])
def test_pixels_of_32_bits_are_refused_by_name(tmp_path, mode):
    path = tmp_path / "a.tif"
    Image.new(mode, (8, 8)).save(path)
    with pytest.raises(ExampleError, match=r"a\.tif: image has 32 bits a pixel, needed 8 or 16"):
        read(path)


@pytest.mark.parametrize(
    "pixels", [np.zeros((8, 8), np.uint16), np.zeros((8, 8, 2), np.uint8), np.zeros((8, 8, 3))]
)
def test_records_of_other_pixels_are_refused_by_name(tmp_path, pixels):
    write_array_record(tmp_path / "train.array_record", [{"image": pixels}])
    source = open_source(f"array_record:{tmp_path}", codec=VISION.codec)
    with pytest.raises(ExampleError, match=r"train\.array_record\[0\]: image is .*, needed uint8"):
        source[0]


# Sounds -----------------------------------------------------------------------------------------


def tone(seconds=0.25, rate=RATE):
    return 0.5 * np.sin(2 * np.pi * 440 * np.arange(int(seconds * rate)) / rate)


@pytest.mark.parametrize(
    "suffix,subtype,bits",
    [
        ("wav", "PCM_U8", 8),
        ("wav", "PCM_16", 16),
        ("wav", "PCM_24", 24),
        ("wav", "PCM_32", 24),
        ("wav", "FLOAT", 24),
        ("wav", "DOUBLE", 24),
        ("flac", "PCM_S8", 8),
        ("flac", "PCM_16", 16),
        ("flac", "PCM_24", 24),
    ],
)
@pytest.mark.parametrize("channels", [1, 2, 6])
def test_depths_and_channels(tmp_path, suffix, subtype, bits, channels):
    """Samples are what was written, to the last bit that there is; channels are averaged."""
    weights = np.arange(1, channels + 1) / channels
    path = tmp_path / f"a.{suffix}"
    soundfile.write(path, tone()[:, None] * weights, RATE, subtype=subtype)
    found = audio.read_audio(str(path), str(path), sample_rate=RATE)["audio"]
    np.testing.assert_allclose(found, tone() * weights.mean(), atol=1.5 * 2.0 ** -(bits - 1))
    assert audio.count_samples(str(path), str(path), sample_rate=RATE) == len(tone())


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "mp3"])
@pytest.mark.parametrize("rate", [8_000, 11_025, 22_050, 44_100, 48_000])
def test_other_rates_are_refused_by_name(tmp_path, suffix, rate):
    path = tmp_path / f"a.{suffix}"
    soundfile.write(path, tone(rate=rate), rate)
    data = path.read_bytes()
    message = rf"sample rate is {rate} Hz, needed 16000 Hz"
    for read_one in (audio.read_audio, audio.count_samples):
        with pytest.raises(ExampleError, match=message) as error:
            read_one(str(path), str(path), sample_rate=RATE)
        assert str(error.value).startswith(str(path))
        with pytest.raises(ExampleError, match=message):
            read_one(io.BytesIO(data), "record 3", sample_rate=RATE)
    with pytest.raises(ExampleError, match=rf"record 3: {message}"):
        audio.read_record(tone(), {"sample_rate": rate}, "record 3", sample_rate=RATE)


def no_length(data, suffix):
    """The header of a stream, whose writer could not go back to it."""
    data = bytearray(data)
    if suffix == "flac":  # 36 bits of the number of samples, 0 for unknown
        data[21] &= 0xF0
        data[22:26] = bytes(4)
    else:
        at = data.index(b"data") + 4
        data[4:8] = data[at : at + 4] = struct.pack("<I", 0xFFFFFFFF)
    return bytes(data)


@pytest.mark.parametrize("suffix", ["flac", "wav"])
@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("subtype", ["PCM_16", "PCM_24"])
def test_unknown_length(tmp_path, suffix, channels, subtype):
    path, samples = tmp_path / f"a.{suffix}", tone(2.0)
    soundfile.write(path, np.repeat(samples[:, None], channels, 1), RATE, subtype=subtype)
    data = no_length(path.read_bytes(), suffix)
    path.write_bytes(data)
    (tmp_path / "r").mkdir()
    write_array_record(tmp_path / "r/train.array_record", [{"audio_bytes": data}])
    for uri in (f"folder:{tmp_path}", f"array_record:{tmp_path}/r"):
        source = open_source(uri, codec=SPEECH.codec)
        assert source.lengths().tolist() == [len(samples)]
        np.testing.assert_allclose(source[0]["audio"], samples, atol=1e-4)
        part = source.part(0, 20_000, 3_000)["audio"]
        np.testing.assert_allclose(part, samples[20_000:23_000], atol=1e-4)


# What lies beside them --------------------------------------------------------------------------


def picture(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(PIXELS).save(path)


def test_what_is_not_read_is_named(tmp_path):
    for name in ("cat/0.png", "cat/1.png", "dog/0.png", "dog/1.png"):
        picture(tmp_path / name)
    source = open_source(f"folder:{tmp_path}", codec=VISION.codec)
    assert not source.notes
    for name in (
        "cat/2.HEIC",
        "dog/3.heic",
        "README.txt",
        "LICENSE",
        ".DS_Store",
        "dog/._0.png",
        "__MACOSX/cat/._0.png",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "dog/loop").symlink_to(tmp_path)
    source = open_source(f"folder:{tmp_path}", codec=VISION.codec)
    assert len(source) == 4 and source.label_names == ("cat", "dog")
    (note,) = source.notes
    assert note.startswith(f"folder:{tmp_path} train: not read: .heic 2 (")
    for words in (".txt 1 (README.txt)", "no suffix 1 (LICENSE)", "read already", "(dog/loop)"):
        assert words in note
    assert "._0" not in note and "DS_Store" not in note


@pytest.mark.parametrize(
    "names",
    [("train", "test"), ("Train", "Test"), ("training", "testing"), ("my_train", "my_test")],
)
def test_folders_beside_the_splits_are_named(tmp_path, names):
    for name in names:
        for i in range(4):
            picture(tmp_path / name / f"{'ab'[i % 2]}/{i}.png")
    picture(tmp_path / "unlabeled/0.png")
    source = open_source(f"folder:{tmp_path}", codec=VISION.codec)
    assert len(source) == 4
    (note,) = source.notes
    assert note.endswith("not read: the folder unlabeled, which is no split")


def test_only_a_few_kinds_are_named(tmp_path):
    picture(tmp_path / "a.png")
    for i in range(9):
        for j in range(10 - i):
            (tmp_path / f"{j}.x{i}").write_bytes(b"")
    (note,) = open_source(f"folder:{tmp_path}", codec=VISION.codec).notes
    assert ".x0 10 (" in note and ".x4 6 (" in note and ".x5" not in note
    assert note.endswith(", and 4 more kinds")


# Texts ------------------------------------------------------------------------------------------

LINES = [f"the {a} sat on the {b} and saw a {a}" for a in ("cat", "dog") for b in ("mat", "log")]


@pytest.mark.parametrize("part", ["examples", "inputs"])
def test_characters_that_a_tokenizer_does_not_know(tmp_path, part):
    made = tokenizer.train_sentencepiece(LINES * 5, 40, byte_fallback=False)
    made.save(tmp_path / "tokenizer")
    options = {"lengths": (64,), "tokenizer": str(tmp_path / "tokenizer")}

    def texts(lines):
        place = tmp_path / "t.tsv"
        place.write_text("\n".join(["text", *lines]), encoding="utf-8")
        source = open_source(f"manifest:{place}", codec=TEXT.codec)
        getattr(TEXT, part)(source, **options)
        return source.notes

    assert not texts(LINES)
    (note,) = texts([*LINES * 3, "the cat sat on the κ"])
    assert "1 of" in note and "tokens are <unk>" in note
    for words in ("η γάτα κάθισε στο χαλί", "кот сел на коврик", "고양이가 앉았다", "猫坐在垫子上"):
        with pytest.raises(UserError, match=r"tokens are <unk>, more than config\.examples"):
            texts([words, words])
    options["max_unknown_share"] = 1.0
    assert texts([words, words])
