"""Speech from log-mel frames: against numpy, with padding, trained, converted, refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from configs_for_tests import config_of

import data2vec_jax
from data2vec_jax import train
from data2vec_jax.convert import ours
from data2vec_jax.convert.__main__ import main as convert
from data2vec_jax.core.errors import UserError
from data2vec_jax.data.fbank import Fbank, log_mel
from data2vec_jax.data.sources import open_source
from data2vec_jax.modalities import contract
from data2vec_jax.modalities.speech.data import normalise
from data2vec_jax.modalities.speech.frontend import CONVS, MelFrontend, frames, make_frontend

D = 16
MEL = dict(kind="mel")


def audio(seconds=(1.3, 0.8)):
    """Two pieces of a real utterance, float32 [S]."""
    source = open_source("samples:speech", "train", codec=contract.get("speech").codec)
    whole = normalise(source[0]["audio"])
    return [whole[16_000 : 16_000 + round(s * 16_000)] for s in seconds]


def make_model(**options):
    encoder = dict(depth=2, heads=2, mlp=24)
    positions = dict(depth=2, width=8, groups=2)
    config = contract.get("speech").model(
        width=D, encoder=encoder, positions=positions, frontend=MEL, **options
    )
    return config.make()


def config(name, **frontend):
    found = config_of(name, total_steps=2)
    found.model.frontend = frontend or MEL
    found.checkpoint = dict(every=2, keep=1)
    return found.to_dict()


def test_it_is_the_filterbank_without_its_mean_normalised_and_projected():
    wave, front = audio()[0], MelFrontend(D)
    params = front.init(jax.random.key(0), wave[None])["params"]
    (x, inner), expected = (
        front.apply({"params": params}, wave[None]),
        log_mel(wave, Fbank(bins=80, window="povey", length=400, shift=320)).astype(np.float64),
    )
    expected -= expected.mean(0)
    expected -= expected.mean(1, keepdims=True)
    expected /= np.sqrt((expected**2).mean(1, keepdims=True) + 1e-5)
    # Bins in the shadow of loud ones are rounded; see `device_log_mel`.
    assert np.quantile(np.abs(inner[0] - expected), 0.99) < 1e-4
    assert np.abs(inner[0] - expected).max() < 5e-3
    kernel, bias = (np.asarray(params["projection"][k], np.float64) for k in ("kernel", "bias"))
    np.testing.assert_allclose(x[0], expected @ kernel + bias, atol=5e-3)


def test_it_has_the_frames_of_the_convolutions():
    front = make_frontend(MEL, D)
    lengths = np.arange(400, 20_000, 37)
    np.testing.assert_array_equal(front.frames(lengths), frames(lengths, CONVS))
    waveform = make_frontend({}, D)
    assert (front.hop, front.reach) == (waveform.hop, waveform.reach) == (320, 400)
    for n in (400, 719, 720, 16_000):
        assert front.init_with_output(jax.random.key(0), jnp.ones((1, n)))[0][0].shape[1] == int(
            waveform.frames(n)
        )


def test_its_flops_are_its_matrix_products():
    front = make_frontend(MEL, D)
    steps = 1 + (16_000 - 400) // 320
    transform, triangles, projection = 400 * 514, 257 * 80, 80 * D
    assert front.flops(16_000) == 2 * steps * (transform + triangles + projection)


def test_padding_changes_nothing():
    rows = audio()
    longest = max(map(len, rows))
    batch = {
        "audio": np.stack([np.pad(r, (0, longest - len(r))) for r in rows]),
        "length": np.array([len(r) for r in rows]),
    }
    model = make_model()
    params = model.init(jax.random.key(0), batch)["params"]

    def encode(params, batch):
        tokens = model.apply({"params": params}, batch, method="features")
        return model.apply({"params": params}, tokens, method="encode").x

    def total(params, batch, counts):
        x = encode(params, batch)
        return sum(jnp.sum(jnp.sin(row[:n])) for row, n in zip(x, counts, strict=True))

    counts = [1 + (len(r) - 400) // 320 for r in rows]
    together, gradients = jax.value_and_grad(total)(params, batch, counts)
    alone = [
        jax.value_and_grad(total)(params, {"audio": r[None]}, [n])
        for r, n in zip(rows, counts, strict=True)
    ]
    np.testing.assert_allclose(together, sum(value for value, _ in alone), rtol=1e-4)
    summed = jax.tree.map(lambda a, b: a + b, alone[0][1], alone[1][1])
    for a, b in zip(jax.tree.leaves(gradients), jax.tree.leaves(summed), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-3 * max(1.0, float(jnp.abs(b).max())))


@pytest.mark.parametrize("version", ["speech_v1", "speech_v2"])
def test_it_learns_converts_and_loads(tmp_path, version):
    work, folder = tmp_path / "run", tmp_path / "converted"
    state = train.train(config(version), work, verbose=False)
    assert int(state.step) == 2
    assert set(state.params["frontend"]) == {"norm", "projection"}
    moved = state.params["frontend"]["projection"]["kernel"]
    assert np.isfinite(moved).all() and state.params["frontend"]["norm"]["scale"].shape == (80,)
    convert([str(work), str(folder), "--to=jax"])
    loaded, wave = data2vec_jax.load(folder), audio((1.0,))[0][None]
    model = ours.model_of(loaded.config)
    tokens = model.apply({"params": loaded.params}, {"audio": wave}, method="features")
    expected = model.apply({"params": loaded.params}, tokens, method="encode").x
    np.testing.assert_allclose(loaded(wave).last_hidden_state, expected, atol=1e-4)


def test_transcripts_are_learned_from_it(tmp_path):
    options = config("finetune_librispeech")
    options["model"]["frontend"] = MEL
    state = train.train(options, tmp_path, verbose=False)
    assert int(state.step) == options["total_steps"]


def test_a_wrong_kind_and_an_option_of_the_other_are_named():
    with pytest.raises(UserError, match=r"frontend.kind: no 'mels'.*mel"):
        make_frontend(dict(kind="mels"), D)
    with pytest.raises(UserError, match=r"model.frontend.*convs"):
        make_frontend(dict(kind="mel", convs=CONVS), D)


@pytest.mark.parametrize("layout", ["hf", "fairseq"])
def test_layouts_without_it_refuse(tmp_path, layout):
    options = config("speech_v1")
    work = tmp_path / "run"
    train.train(options, work, verbose=False)
    with pytest.raises(UserError, match=r"frontend.kind"):
        convert([str(work), str(tmp_path / "out"), f"--to={layout}"])
