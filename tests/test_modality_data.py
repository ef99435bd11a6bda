"""Examples of each modality from the real samples: crops, augmentation, labels."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from data2vec_jax.core.errors import UserError
from data2vec_jax.data.sources import open_source
from data2vec_jax.modalities import contract
from data2vec_jax.modalities.speech import data as speech
from data2vec_jax.modalities.speech import samples as speech_samples
from data2vec_jax.modalities.speech.codec import CODEC as SPEECH
from data2vec_jax.modalities.text.codec import CODEC as TEXT
from data2vec_jax.modalities.text.data import TextExamples
from data2vec_jax.modalities.text.data import labelled as text_labelled
from data2vec_jax.modalities.vision import crops
from data2vec_jax.modalities.vision import data as vision
from data2vec_jax.modalities.vision.codec import CODEC as VISION


def rng(i=0):
    return np.random.default_rng(i)


def test_speech_is_normalised_whole_then_cropped():
    source = open_source("samples:speech", "train", codec=SPEECH)
    examples = speech.SpeechExamples(source, crops=(2.0, 5.0))
    index = int(np.argmax(examples.bucket_of == 1))
    whole = source[index]["audio"].astype(np.float64)
    whole = (whole - whole.mean()) / np.sqrt(whole.var() + 1e-5)
    for i in range(3):
        crop = examples.load(index, 1, rng(i))["audio"]
        assert crop.shape == (80_000,) and crop.dtype == np.float32
        starts = [s for s in range(len(whole) - 80_000 + 1) if abs(whole[s] - crop[0]) < 1e-5]
        assert any(np.allclose(whole[s : s + 80_000], crop, atol=1e-4) for s in starts)
    first, second = (examples.load(index, 0, rng(i))["audio"] for i in range(2))
    assert not np.array_equal(first, second)
    fixed = speech.SpeechExamples(source, like=examples, crops=(2.0, 5.0))
    np.testing.assert_array_equal(
        fixed.load(index, 0, rng(0))["audio"], fixed.load(index, 0, rng(1))["audio"]
    )


def test_speech_labels_are_the_phone_at_the_middle_of_a_frame():
    source = open_source("samples:speech", "test", codec=SPEECH)
    examples = speech.SpeechExamples(source, crops=(2.0,))
    found = speech.labelled(source, examples, crops=(2.0,))
    assert found.labels.shape[1] == 99 and found.inputs["audio"].shape[1] == 32_000
    phones = source[0]["phones"]
    for frame in (0, 40, 98):
        moment = (frame * 320 + 200) / 16_000
        name = next(name for start, end, name in phones if start <= moment < end)
        assert source.label_names[found.labels[0, frame]] == name


def test_phones_of_a_table_are_those_of_the_samples(tmp_path):
    """The samples' alignment, written as a user's table, gives the same labels."""
    source = open_source("samples:speech", "test", codec=SPEECH)
    folder = Path(speech_samples.__file__).parent / "sample_data/speech"
    lines = ["path\tphones"]
    for i in range(len(source)):
        text = " ".join(f"{end:g} {name}" for _, end, name in source[i]["phones"])
        lines.append(f"{folder}/{source.field(i, 'path')}\t{text}")
    (tmp_path / "t.tsv").write_text("\n".join(lines) + "\n")
    table = open_source(f"manifest:{tmp_path}/t.tsv", codec=SPEECH)
    found, wanted = (
        speech.labelled(s, speech.SpeechExamples(s, crops=(2.0,)), crops=(2.0,))
        for s in (table, source)
    )
    names = sorted({name for i in range(len(source)) for *_, name in source[i]["phones"]})
    numbers = np.array([names.index(n) if n in names else -1 for n in source.label_names] + [-1])
    np.testing.assert_array_equal(found.labels, numbers[wanted.labels])
    np.testing.assert_array_equal(found.inputs["audio"], wanted.inputs["audio"])

    like = speech.SpeechExamples(table, crops=(2.0,))
    path = folder / source.field(0, "path")
    for phones, message in (
        ("0.5 a b", r"t\.tsv:2: phones are '0\.5 a b'; wanted 'END NAME"),
        ("0.5 a 0.2 b", "ascending ends"),
        ("0.5 qx 0.7 a", "phone 'qx' is none of those of the training examples"),
    ):
        (tmp_path / "t.tsv").write_text(f"path\tphones\n{path}\t{phones}\n")
        with pytest.raises(UserError, match=message):
            speech.labelled(open_source(table.uri, codec=SPEECH), like, crops=(2.0,))


def test_crops_must_ascend():
    with pytest.raises(UserError, match=r"config\.examples\.crops"):
        speech.CropConfig(crops=(4.0, 2.0))


def test_random_boxes_follow_the_recipe():
    boxes = [crops.random_box(120, 80, (0.08, 1.0), (3 / 4, 4 / 3), rng(i)) for i in range(2000)]
    left, top, right, bottom = np.array(boxes).T
    width, height = right - left, bottom - top
    assert (left >= 0).all() and (top >= 0).all() and (right <= 120).all() and (bottom <= 80).all()
    share, aspect = width * height / (120 * 80), width / height
    assert 0.07 < share.min() < 0.1 and share.max() < 0.95  # aspect 3/2 leaves no whole picture
    assert aspect.min() > 0.70 and aspect.max() < 1.42
    assert abs(np.log(aspect).mean()) < 0.05  # log-uniform, not uniform


def test_vision_augments_in_training_only():
    pixels = np.arange(40 * 60 * 3, dtype=np.uint8).reshape(40, 60, 3)
    source = [{"image": pixels, "label": 0}]
    options = dict(image=32, jitter=0.4, flip=0.5, scale=(0.5, 1.0))
    examples = vision.VisionExamples(source, **options)
    one, two = (examples.load(0, 0, rng(i))["image"] for i in range(2))
    assert one.shape == (32, 32, 3) and one.dtype == np.uint8 and not np.array_equal(one, two)
    fixed = vision.VisionExamples(source, like=examples, **options)
    whole = Image.fromarray(pixels).resize((32, 32), Image.Resampling.BICUBIC, box=(10, 0, 50, 40))
    np.testing.assert_array_equal(fixed.load(0, 0, rng())["image"], np.asarray(whole))


@pytest.mark.parametrize("channels", [3, 1])
@pytest.mark.parametrize("jitter", [0.0, 0.4])
def test_augmentation_is_that_of_whole_images(jitter, channels):
    """Jitter by Pillow, then a flip, then the crop, all of whole images (spec 1.2)."""
    source = open_source("samples:digits", "train", codec=VISION)
    digit = np.kron(source[3]["image"], np.ones((9, 7, 3), np.uint8))  # 252 x 196, with edges
    noise = rng().integers(0, 60, digit.shape, dtype=np.uint8)
    pixels = (digit // 2 + noise + 30).astype(np.uint8)[..., :channels]
    options = dict(image=48, jitter=jitter, scale=(0.08, 1.0), channels=channels)
    examples = vision.VisionExamples([{"image": pixels, "label": 0}], **options)
    for seed in range(12):
        found = examples.load(0, 0, rng(seed))["image"]
        draw, picture = rng(seed), Image.fromarray(pixels[..., 0] if channels == 1 else pixels)
        if jitter:
            enhancers = ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color
            for i in draw.permutation(3):
                picture = enhancers[i](picture).enhance(draw.uniform(1 - jitter, 1 + jitter))
        if draw.random() < 0.5:
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        box = crops.random_box(*picture.size, (0.08, 1.0), (3 / 4, 4 / 3), draw)
        wanted = picture.resize((48, 48), Image.Resampling.BICUBIC, box=box)
        # Of the passes over rows and columns Pillow may do the other first, and the mean of a
        # large image is that of a part of its pixels.
        difference = np.abs(np.asarray(wanted, int).reshape(found.shape) - found)
        assert difference.max() <= 2 and difference.mean() < 0.5


@pytest.mark.parametrize("aspect", [(3 / 4, 4 / 3), (8.0, 9.0), (0.1, 0.2), (1.0, 1.0)])
def test_no_crop_is_smaller_than_the_smallest(aspect):
    config = vision.ImageConfig(image=64, scale=(0.1, 1.0), aspect=aspect)
    for seed, (width, height) in enumerate([(100_000, 100_000), (100_000, 5_000)] * 50):
        box = crops.random_box(width, height, config.scale, aspect, rng(seed))
        side = min(box[2] - box[0], box[3] - box[1])
        assert side >= config.image / config.enough * min(width, height) - 1


def test_a_large_jpeg_is_decoded_at_the_part_that_suffices(tmp_path):
    """The smallest crop is sqrt(0.3 x 3/4) of the shorter side, and becomes 48 pixels: 101 do."""
    waves = np.add.outer(np.sin(np.arange(480) / 40), np.cos(np.arange(600) / 50))[..., None]
    pixels = (128 + waves * (20, 40, 60)).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    Image.fromarray(pixels).save(tmp_path / "1.jpg", quality=95, exif=exif)
    Image.fromarray(pixels).resize((250, 203)).save(tmp_path / "2.jpg", quality=95)
    Image.fromarray(pixels).save(tmp_path / "3.png")
    source = open_source(f"folder:{tmp_path}", codec=VISION)
    options = dict(image=48, jitter=0.0, flip=0.0, scale=(0.3, 1.0))
    examples = vision.VisionExamples(source, **options)
    shapes = [examples.source[i]["image"].shape for i in range(3)]
    assert shapes == [(150, 120, 3), (102, 125, 3), (480, 600, 3)]
    whole = vision.VisionExamples([{"image": np.rot90(pixels, -1)}], **options)
    for seed in range(5):
        found, wanted = (e.load(0, 0, rng(seed))["image"].astype(int) for e in (examples, whole))
        assert np.abs(found - wanted).mean() < 3  # a crop's edge lies between other pixels


def test_jitter_changes_colours_within_its_strength():
    grey = Image.fromarray(np.full((8, 8, 3), 100, np.uint8))
    values = []
    for i in range(300):
        factors = crops.random_jitter(0.4, rng(i))
        values.append(np.asarray(crops.jittered(grey, np.array(grey), factors))[0, 0, 0])
    assert 58 <= min(values) < 66 and 134 < max(values) <= 141
    same = crops.jittered(grey, np.array(grey), crops.random_jitter(0.0, rng()))
    np.testing.assert_array_equal(same, grey)


def test_text_rows_and_labels_share_the_tokenizer():
    source = open_source("samples:glosses", "test", codec=TEXT)
    options = dict(lengths=(32, 64), vocab_size=800)
    examples = TextExamples(source, **options)
    tokens = examples.tokenizer
    for bucket, length in enumerate((32, 64)):
        index = int(np.argmax(examples.bucket_of == bucket))
        row = examples.load(index, bucket, rng())["tokens"]
        used = row[row != tokens.pad]
        assert row.shape == (length,) and row.dtype == np.int32
        assert used[0] == tokens.bos and used[-1] == tokens.eos
        assert tokens.decode([int(t) for t in used[1:-1]]) in {
            source[i]["text"] for i in range(len(source))
        }
    found = text_labelled(source, examples, **options)
    assert len(found.labels) == len(source) and found.inputs["tokens"].shape[1] == 64


def test_unknown_modality_names_the_nearest():
    with pytest.raises(UserError, match="did you mean 'speech'"):
        contract.get("speach")


def test_what_can_be_probed_is_the_modality_s_affair(tmp_path):
    """Speech by its phones, which are not classes of an utterance; the others by classes."""
    (tmp_path / "t.csv").write_text("text,label\none,\ntwo,1\n")
    check = {name: contract.get(name).check_labels for name in ("speech", "text", "vision")}
    check["speech"](open_source("samples:speech", codec=SPEECH))
    check["text"](open_source("samples:glosses", codec=TEXT))
    check["vision"](open_source("samples:digits", codec=contract.get("vision").codec))
    for name, message in (("speech", "no labels .aligned phones."), ("text", "t.csv:2: no label")):
        with pytest.raises(UserError, match=message):
            check[name](open_source(f"manifest:{tmp_path}/t.csv", codec=TEXT))
