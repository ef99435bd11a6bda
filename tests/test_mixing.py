"""What is done to images in fine-tuning: erasing and mixing on the device, RandAugment, crops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from data2vec_jax.modalities.vision import randaugment
from data2vec_jax.modalities.vision.inputs import Images
from data2vec_jax.tasks import mixing

SIDE = 24


@pytest.fixture(scope="module")
def rows():
    """Images whose every pixel is the number of the row, and its class."""
    numbers = jnp.arange(6.0)
    image = jnp.broadcast_to(numbers[:, None, None, None], (6, SIDE, SIDE, 1))
    return image, jnp.eye(6)


def test_mixup_blends_images_and_targets_alike(rows):
    image, targets = rows
    mix = jax.jit(lambda key: mixing.mix(image, targets, key, mixup=0.8, cutmix=0.0))
    shares = []
    for seed in range(40):
        x, y = mix(jax.random.key(seed))
        np.testing.assert_allclose(jnp.sum(y, -1), 1.0, rtol=1e-5)
        share = float(y[0, 0])
        np.testing.assert_allclose(x[0], 5 * (1 - share), atol=1e-5)  # row 0 with row 5
        np.testing.assert_allclose(x[4], 4 * share + 1 * (1 - share), atol=1e-5)
        shares.append(share)
    # Beta(0.8, 0.8): mean 1/2, variance 1/(4 * 2.6)
    assert abs(np.mean(shares) - 0.5) < 0.15 and abs(np.var(shares) - 1 / 10.4) < 0.05


def test_cutmix_targets_are_the_areas_that_are_seen(rows):
    image, targets = rows
    mix = jax.jit(lambda key: mixing.mix(image, targets, key, mixup=0.0, cutmix=1.0))
    seen = []
    for seed in range(40):
        x, y = mix(jax.random.key(seed))
        foreign = np.asarray(x[0, ..., 0] == 5)
        assert np.isin(x[0], [0, 5]).all()
        np.testing.assert_allclose(y[0, 5], foreign.mean(), atol=1e-6)
        if foreign.any():  # one box
            high, wide = foreign.any(1), foreign.any(0)
            assert foreign.sum() == high.sum() * wide.sum()
            assert np.ptp(np.flatnonzero(high)) + 1 == high.sum()
        seen.append(foreign.mean())
    assert 0.15 < np.mean(seen) < 0.5


def test_probability_and_switch(rows):
    image, targets = rows

    def kinds(**options):
        mix = jax.jit(lambda key: mixing.mix(image, targets, key, mixup=0.8, cutmix=1.0, **options))
        found = []
        for seed in range(60):
            x, _ = mix(jax.random.key(seed))
            values = set(np.unique(x[0]).tolist())
            found.append("none" if values == {0.0} else "cut" if values <= {0.0, 5.0} else "up")
        return np.array(found)

    assert (kinds(probability=0.0) == "none").all()
    some = kinds(probability=1.0, switch=0.5)
    assert 15 < (some == "up").sum() < 45 and (some == "cut").sum() > 10
    assert not (kinds(switch=0.0) == "cut").any()


def test_erasing_depends_on_the_row_alone():
    image = jnp.full((8, SIDE, SIDE, 3), 9.0)
    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(0), i))(jnp.arange(8))
    erased = mixing.erase(image, keys, 1.0)
    order = np.array([5, 2])
    np.testing.assert_array_equal(mixing.erase(image[order], keys[order], 1.0), erased[order])
    np.testing.assert_array_equal(mixing.erase(image, keys, 0.0), image)
    shares = np.asarray((erased != 9).any(-1).mean((1, 2)))
    assert (shares > 0.01).all() and (shares < 0.4).all() and len(set(shares)) > 4
    noise = np.asarray(erased)[np.asarray(erased != 9)]
    assert abs(noise.mean()) < 0.1 and abs(noise.std() - 1) < 0.1
    half = mixing.erase(
        jnp.tile(image, (32, 1, 1, 1)), jax.random.split(jax.random.key(1), 256), 0.25
    )
    assert 0.15 < np.mean(np.asarray((half != 9).any((1, 2, 3)))) < 0.35


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("name", randaugment.OPERATIONS)
def test_operations(name, mode):
    """Every operation keeps size and mode; those that grow leave the image alone at strength 0."""
    rng = np.random.default_rng(0)
    shape = (20, 20) if mode == "L" else (20, 20, 3)
    picture = Image.fromarray(rng.integers(0, 256, shape).astype(np.uint8))
    fill = 0 if mode == "L" else (1, 2, 3)
    operation = randaugment.OPERATIONS[name]
    strong = operation(picture, 0.9, fill, rng)
    assert strong.size == picture.size and strong.mode == mode
    # Noise has all its contrast already, and grey pictures have no colour.
    if name not in ("auto_contrast", "equalise", "colour" if mode == "L" else ""):
        assert np.any(np.asarray(strong) != np.asarray(picture))
    if name not in ("auto_contrast", "equalise", "invert", "posterise"):
        np.testing.assert_array_equal(operation(picture, 0.0, fill, rng), picture)


def test_posterise_solarise_and_shift_by_hand():
    rng = np.random.default_rng(0)
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    picture = Image.fromarray(ramp)
    found = np.asarray(randaugment.posterise(picture, 0.5, 0, rng))
    np.testing.assert_array_equal(found, ramp // 64 * 64)  # two bits
    found = np.asarray(randaugment.solarise(picture, 0.5, 0, rng))
    np.testing.assert_array_equal(found, np.where(ramp < 128, ramp, 255 - ramp))
    found = np.asarray(randaugment.solarise_add(picture, 1.0, 0, rng)).astype(int)
    np.testing.assert_array_equal(found, np.where(ramp < 128, ramp.astype(int) + 110, ramp))
    moved = np.asarray(randaugment.translate_x(picture, 1 / 0.45 / 8, 0, rng)).astype(
        int
    )  # 2 pixels
    same = (moved[:, 2:] == ramp[:, :-2]).all() or (moved[:, :-2] == ramp[:, 2:]).all()
    assert same


class Pictures:
    """A source of one picture with a ramp from left to right."""

    uri, label_names = "ramp", None

    def __len__(self):
        return 1

    def __getitem__(self, index):
        ramp = np.broadcast_to(np.arange(200, dtype=np.uint8)[None, :, None], (100, 200, 3))
        return {"image": ramp.copy(), "label": 0}


def test_evaluation_is_a_centre_crop_of_the_resized_image():
    train = Images(Pictures(), image=56)
    fixed = Images(Pictures(), like=train, image=56)  # the shorter side becomes 64, then 56
    one, two = (fixed.load(0, 0, np.random.default_rng(s))["image"] for s in (0, 1))
    np.testing.assert_array_equal(one, two)
    # Of 128 columns the middle 56: centres from 36.5 to 91.5, each of 200 / 128 pixels.
    wanted = (np.arange(36, 92) + 0.5) * 200 / 128 - 0.5
    np.testing.assert_allclose(one[28, :, 0], wanted, atol=1.0)
    draws = [train.load(0, 0, np.random.default_rng(s))["image"] for s in range(4)]
    assert all(d.shape == (56, 56, 3) for d in draws)
    assert len({d.tobytes() for d in draws}) == 4
