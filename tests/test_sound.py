"""Sound: spectrograms, the model's sizes, and what is refused (docs/spec/sound.md)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import soundfile

from data2vec_jax import masking
from data2vec_jax.configs import sound_v2
from data2vec_jax.core.errors import UserError
from data2vec_jax.data.fbank import log_mel
from data2vec_jax.data.sources import open_source
from data2vec_jax.modalities.contract import get, make_model
from data2vec_jax.modalities.sound import inputs
from data2vec_jax.modalities.sound.spectrogram import (
    FBANK,
    centre,
    device_spectrogram,
    samples_of,
    spectrogram,
)
from data2vec_jax.tasks import pretrain

SOUND = get("sound")
RNG = np.random.default_rng(0)


def samples(split="train"):
    return open_source("samples:sounds", split, codec=SOUND.codec)


def examples(**options):
    return SOUND.examples(samples(), **options)


def test_samples_are_real_sounds_with_classes():
    train, test = samples(), samples("test")
    assert (len(train), len(test), len(train.label_names)) == (28, 8, 8)
    assert sorted(test.column("label")) == list(range(8))
    assert set(train.lengths()) == {32_000}
    assert np.abs(train[3]["audio"]).max() > 0.01


def test_a_short_sound_is_padded_before_it_is_normalised():
    found = examples(frames=256).load(0, 0, RNG)["spectrogram"]
    assert found.shape == (256, 128, 1) and found.dtype == np.float32
    audio = samples()[0]["audio"]
    wanted = log_mel(audio - audio.mean(dtype=np.float64), FBANK)
    assert len(wanted) == 198 and np.array_equal(found[:198, :, 0], wanted)
    assert not found[198:].any()
    model = make_model(SOUND, {"width": 32, "frames": 256, "encoder": SMALL})
    pixels = model.pixels({"spectrogram": np.stack([found, np.full_like(found, -15.942385)])})
    # Section 1: padding is louder than silence.
    assert np.allclose(pixels[0, 198:], 0.4671, atol=5e-5)
    assert np.allclose(pixels[1], -1.2776, atol=5e-5)


def test_a_long_sound_loses_its_end():
    found = examples(frames=64).load(0, 0, RNG)["spectrogram"]
    assert np.array_equal(found, examples(frames=256).load(0, 0, RNG)["spectrogram"][:64])


def test_short_sounds_are_left_out():
    assert examples(frames=64).bucket_of.tolist() == [0] * 28
    assert examples(frames=64, min_samples=32_001).bucket_of.tolist() == [-1] * 28
    assert samples_of(1024) == 164_080 and FBANK.frames(164_080) == 1024


def test_spectrograms_on_the_device():
    source = samples()
    lengths = np.array([32_000, 20_000, 31_999])
    audio = np.zeros((3, 32_000), np.float32)
    for row, n in enumerate(lengths):
        audio[row, :n] = source[row]["audio"][:n]
    for frames in (128, 256):
        found = np.asarray(device_spectrogram(audio + 0.01, jnp.asarray(lengths), frames))
        for row, n in enumerate(lengths):
            wanted = spectrogram(centre(audio[row, :n]), frames)
            error = np.abs(found[row] - wanted)
            assert error.max() < 5e-3 and (error > 1e-4).mean() < 2e-3
            padded = FBANK.frames(int(n))
            assert not found[row, padded:].any()


def test_augmentation_of_fine_tuning():
    source, item = samples(), samples()[2]
    plain = inputs.Sounds(source, frames=128).prepare(2, item, 0, RNG)["spectrogram"]
    training = inputs.Sounds(source, frames=128, roll=True, noise=1.0)
    held_out = inputs.Sounds(source, like=training, frames=128, roll=True, noise=1.0)
    assert np.array_equal(held_out.prepare(2, item, 0, RNG)["spectrogram"], plain)
    one, other = (
        training.prepare(2, item, 0, np.random.default_rng(seed))["spectrogram"] for seed in (1, 1)
    )
    assert np.array_equal(one, other) and not np.allclose(one, plain, atol=0.5)

    rolled = inputs.Sounds(source, frames=208, roll=True)
    rng = np.random.default_rng(5)
    found = rolled.prepare(2, item, 0, np.random.default_rng(5))["spectrogram"]
    offset, gain = int(rng.integers(32_000)), rng.beta(10, 10) + 0.5
    wanted = spectrogram(np.roll(centre(item["audio"]), offset) * gain, 208)
    assert np.array_equal(found, wanted) and 0.5 < gain < 1.5

    noisy = inputs.Sounds(source, frames=128, noise=1.0)
    shifts = set()
    for seed in range(60):
        found = noisy.prepare(2, item, 0, np.random.default_rng(seed))["spectrogram"]
        gaps = [
            np.ptp(found - np.roll(plain, shift, axis=0)) for shift in range(-10, 10)
        ]  # noise is in [0, 1], so the right shift leaves less than 1
        shifts.add(int(np.argmin(gaps)) - 10)
        assert min(gaps) <= 1.0
    assert min(shifts) == -10 and max(shifts) == 9


SMALL = {"depth": 2, "heads": 4, "mlp": 64, "norm": "post"}


@pytest.mark.parametrize(
    "variant,encoder,decoder", [("base", 85_254_144, 2_585_856), ("large", 302_575_616, 5_967_872)]
)
def test_parameters(variant, encoder, decoder):
    """Section 3: EAT's numbers of parameters, without its fixed positions."""
    config = sound_v2.get_config(variant).to_dict()
    task = pretrain.abstract_task(config)
    shapes = jax.eval_shape(task.init, jax.random.key(0))
    count = {k: sum(x.size for x in jax.tree.leaves(v)) for k, v in shapes.items()}
    # Our 'head' is the last layer of their decoder.
    assert count.pop("decoder") + count.pop("head") == decoder
    assert sum(count.values()) == encoder
    model = make_model(SOUND, config["model"])
    assert model.grid == (64, 8)
    assert task.shapes[0]["spectrogram"].shape == (48, 1024, 128, 1)
    # FLOPs: a patch of 256 numbers; the whole clip with its class token.
    parts = SOUND.flops(model, {"spectrogram": jax.ShapeDtypeStruct((1024, 128, 1), float)}, 0, 0)
    assert parts["frontend"] == 2 * 512 * 256 * config["model"]["width"]


def test_patches_are_time_major():
    """Patch n holds frames of 16 (n // 8) and bands of 16 (n % 8), flattened row by row."""
    model = make_model(SOUND, {"width": 32, "frames": 64, "encoder": SMALL})
    x = np.random.default_rng(0).normal(size=(1, 64, 128, 1)).astype(np.float32)
    params = model.init(jax.random.key(0), {"spectrogram": x})["params"]
    tokens = model.apply({"params": params}, {"spectrogram": x}, method="features").x
    pixels = (x[0, :, :, 0] + 4.268) / (2 * 4.569)
    for n in (0, 7, 8, 31):
        row, column = divmod(n, 8)
        patch = pixels[16 * row : 16 * row + 16, 16 * column : 16 * column + 16]
        kernel = params["patches"]["kernel"][:, :, 0]
        wanted = np.einsum("pq,pqd->d", patch, kernel) + params["patches"]["bias"]
        assert np.allclose(tokens[0, n], wanted, atol=1e-4)


def test_a_grid_without_a_kept_square_is_refused():
    options = {"ratio": 0.8, "adjust": 0.07, "width": 5}
    with pytest.raises(UserError, match=r"mask.width: of 8 x 8 .* not one square of 5 x 5"):
        masking.make("inverse_blocks", (8, 8), **options)
    assert masking.make("inverse_blocks", (64, 8), **options).count(512) == 410
    assert masking.make("inverse_blocks", (8, 8), **{**options, "width": 3}).count(64) == 52


def test_kept_squares_of_base():
    """Section 3: the five squares cover 95.8 +- 11.6 cells, before the count is made exact."""
    sampler = masking.make("inverse_blocks", (64, 8), ratio=0.8, adjust=0.07, width=5)
    keys = jax.random.split(jax.random.key(0), 2_000)
    kept = np.asarray(jax.jit(jax.vmap(lambda k: 512 - sampler.propose(k, 512).sum()))(keys))
    assert abs(kept.mean() - 95.8) < 1.0 and abs(kept.std() - 11.6) < 1.0


def test_what_is_refused(tmp_path):
    for options, words in (
        ({"frames": 1000}, "examples.frames: 1000 is not a multiple of 16"),
        ({"frames": 64, "min_samples": 100}, "examples.min_samples"),
    ):
        with pytest.raises(UserError, match=words):
            examples(**options)
    for options, words in (
        ({"frames": 100}, "model.frames"),
        ({"std": 0.0}, "model.std: 0.0"),
        ({"encoder": {**SMALL, "relative": (4, 8)}}, "relative"),
    ):
        with pytest.raises(UserError, match=words):
            make_model(SOUND, {"width": 32, "encoder": SMALL, **options})
    with pytest.raises(UserError, match="frames is 64, config"):
        examples(frames=128).check(make_model(SOUND, {"width": 32, "frames": 64, "encoder": SMALL}))
    (tmp_path / "horn").mkdir()
    soundfile.write(tmp_path / "horn/a.wav", samples()[0]["audio"], 44_100)
    source = open_source(f"folder:{tmp_path}", codec=SOUND.codec)
    with pytest.raises(UserError, match="44100 Hz, needed 16000 Hz"):
        SOUND.examples(source, frames=64)
