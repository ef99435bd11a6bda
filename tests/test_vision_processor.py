"""Pre-processing of images against Hugging Face's, and against what was recorded of it."""

import hashlib

import numpy as np
import pytest
from PIL import Image

from data2vec_jax.core.errors import UserError
from data2vec_jax.data.codecs.image import resize
from data2vec_jax.modalities.vision.processor import Processor


def picture(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


CHANGES = {
    "as it is": {},
    "crop": dict(do_center_crop=True, crop_size={"height": 21, "width": 40}),
    "filter": dict(resample=2, size={"height": 17, "width": 30}),
    "number": dict(image_mean=[0.1, 0.2, 0.3], image_std=[0.5, 0.25, 2.0]),
    "raw": dict(do_resize=False, do_normalize=False),
    "unscaled": dict(do_rescale=False, do_resize=False),
}


@pytest.mark.parametrize("change", CHANGES)
def test_equals_hugging_face(change):
    pil = pytest.importorskip("transformers.models.beit.image_processing_pil_beit")
    ours = Processor(size=(32, 24))
    options = ours.to_json() | CHANGES[change]
    theirs = pil.BeitImageProcessorPil(
        **{k: v for k, v in options.items() if k != "image_processor_type"}
    )
    image = picture(37, 50, 3)  # wide: the same pixels with all versions of Pillow
    wanted = theirs(image, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    found = Processor.of(options)(image)
    assert found.shape == wanted.shape and found.dtype == np.float32
    np.testing.assert_allclose(found, wanted, atol=2e-6 * max(1, np.abs(wanted).max()))
    if options["do_normalize"] and options["do_rescale"]:
        assert Processor.of(Processor.of(options).to_json()) == Processor.of(options)


def test_segmentation_maps():
    pil = pytest.importorskip("transformers.models.beit.image_processing_pil_beit")
    theirs = pil.BeitImageProcessorPil(size={"height": 16, "width": 24}, do_reduce_labels=True)
    classes = np.random.default_rng(1).integers(0, 150, (16, 24), dtype=np.uint8)
    classes[0, 0] = 255
    wanted = theirs(picture(16, 24, 3), classes.copy(), return_tensors="np")["labels"][0]
    found = Processor(size=(16, 24), reduce_labels=True).labels(classes)
    np.testing.assert_array_equal(found, wanted)


def test_one_channel_and_older_files():
    old = Processor.of({"feature_extractor_type": "BeitFeatureExtractor", "size": 20})
    assert old.size == (20, 20) and old.reduce_labels is False
    grey = Processor(size=(8, 8), mean=(0.5,), std=(0.5,))
    assert grey(picture(10, 12)).shape == (8, 8, 1)
    np.testing.assert_array_equal(grey(picture(10, 12)), grey(picture(10, 12, 1)))


def test_what_is_unknown_is_named():
    with pytest.raises(UserError, match="ViTImageProcessor"):
        Processor.of({"image_processor_type": "ViTImageProcessor"})
    with pytest.raises(UserError, match="shortest_edge"):
        Processor.of({"size": {"shortest_edge": 224}})


@pytest.mark.parametrize(
    "size, box, digest",
    [
        ((32, 32), None, "29af182c5fca"),  # rows first: 28 fewer, and 8 columns
        ((32, 52), None, "e119036e8bcb"),  # columns first
        ((50, 20), None, "069d86e69358"),  # fewer rows, more columns
        ((20, 16), (3.5, 2.25, 30, 50), "73d6a87d70ed"),
        ((64, 64), None, "2a14222dc6c2"),
    ],
)
def test_pixels_are_those_of_pillow_13(size, box, digest):
    """The digests are those of its `Image.resize`; Pillow 12 has others in three of the cases."""
    noise = np.random.default_rng(0).integers(0, 256, (60, 40, 3), dtype=np.uint8)
    found = resize(Image.fromarray(noise), size, box=box)
    assert hashlib.sha256(found.tobytes()).hexdigest()[:12] == digest
