"""Front ends of speech: log-mel frames against numpy, with padding, trained, converted, refused.

Padded batches of whole models, and their gradients, are in test_padding.py.
"""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from configs_for_tests import config_of

import data2vec_jax
from data2vec_jax import train
from data2vec_jax.convert.__main__ import main as convert
from data2vec_jax.core import sharding
from data2vec_jax.core.errors import UserError
from data2vec_jax.data.fbank import Fbank, log_mel
from data2vec_jax.data.sources import open_source
from data2vec_jax.metrics.writer import FILE, read_lines
from data2vec_jax.modalities import contract
from data2vec_jax.modalities.speech.data import normalise
from data2vec_jax.modalities.speech.frontend import CONVS, ConvFrontend, frames, make_frontend

pytestmark = pytest.mark.xdist_group("mel_frontend")  # its fixtures are made once

D = 16
MEL = dict(kind="mel")


def audio(seconds=(1.3, 0.8)):
    """Pieces of a real utterance, each float32 [S]."""
    source = open_source("samples:speech", "train", codec=contract.get("speech").codec)
    whole = normalise(source[0]["audio"])
    return [whole[16_000 : 16_000 + round(s * 16_000)] for s in seconds]


def padded(rows):
    return np.stack([np.pad(row, (0, max(map(len, rows)) - len(row))) for row in rows])


def by_numpy(wave, counted=None, bins=80):
    """[T, bins], float64: what is projected. counted: frames of the mean, None for all."""
    x = log_mel(wave, Fbank(bins, "povey", length=400, shift=320)).astype(np.float64)
    x = x - x[:counted].mean(0)
    x = x - x.mean(1, keepdims=True)
    return x / np.sqrt(np.square(x).mean(1, keepdims=True) + 1e-5)


def assert_close(found, expected):
    """Bins in the shadow of loud ones are rounded; see `device_log_mel`."""
    error = np.abs(np.asarray(found, np.float64) - expected)
    assert np.quantile(error, 0.99) < 1e-4 and error.max() < 5e-3


def model_of(dtype=jnp.float32, **options):
    encoder, positions = dict(depth=1, heads=2, mlp=24), dict(depth=1, width=5, groups=2)
    model = contract.get("speech").model
    options = dict(frontend=MEL, encoder=encoder, positions=positions) | options
    return model(width=D, dtype=dtype, **options).make()


# The front end ------------------------------------------------------------------------------------


@pytest.mark.parametrize("bins", [80, 40])
def test_it_is_the_filterbank_without_its_mean_normalised_and_projected(bins):
    wave, front = audio()[0], make_frontend(MEL | dict(bins=bins), D)
    (x, inner, raw), variables = front.init_with_output(jax.random.key(0), wave[None])
    assert raw is None  # nothing is learned before the norm
    expected = by_numpy(wave, bins=bins)
    assert_close(inner[0], expected)
    kernel, bias = (variables["params"]["projection"][name] for name in ("kernel", "bias"))
    np.testing.assert_allclose(x[0], expected @ np.asarray(kernel) + bias, atol=5e-3)


def test_it_has_the_frames_of_the_convolutions():
    front, convolutions = make_frontend(MEL, D), make_frontend({}, D)
    lengths = np.arange(20_000)
    np.testing.assert_array_equal(front.frames(lengths), frames(lengths, CONVS))
    assert (front.hop, front.reach) == (convolutions.hop, convolutions.reach) == (320, 400)
    for n in (400, 719, 720, 16_000):
        made = jax.eval_shape(
            front.init_with_output, jax.random.key(0), jax.ShapeDtypeStruct((1, n), jnp.float32)
        )
        assert made[0][0].shape == (1, convolutions.frames(n), D)


def test_its_flops_are_those_of_what_learns():
    """A train step counts three times a forward pass, two of them for gradients."""
    front, wave = make_frontend(MEL, D), jnp.ones((1, 16_000))
    variables = front.init(jax.random.key(0), wave)

    def flops(function):
        return jax.jit(function).lower(variables).compile().cost_analysis()["flops"]

    def forward(variables):
        return front.apply(variables, wave)[0]

    both = flops(jax.grad(lambda variables: jnp.sum(jnp.sin(forward(variables)))))
    # XLA counts what is no matrix product, too.
    assert 2.0 < (both - flops(forward)) / front.flops(16_000) < 2.5


@pytest.mark.parametrize("padding", ["exact", "reference", "attention"])
def test_padding_is_part_of_the_mean_unless_exact(padding):
    rows = audio()
    model, valid = model_of(padding=padding), [frames(len(row)) for row in rows]
    whole = padded(rows)
    batch = {"audio": whole, "length": np.array([len(row) for row in rows])}
    params = model.init(jax.random.key(0), batch)["params"]
    mask = np.arange(max(valid)) < np.array(valid)[:, None]
    _, inner, _ = model.apply({"params": params}, whole, mask, method="extract")
    tokens = model.apply({"params": params}, batch, method="features")
    np.testing.assert_array_equal(tokens.valid, mask)
    for row, (wave, count) in enumerate(zip(whole, valid, strict=True)):
        expected = by_numpy(wave, count if padding == "exact" else None)
        assert_close(inner[row, :count], expected[:count])
        kernel, bias = (params["frontend"]["projection"][name] for name in ("kernel", "bias"))
        projected = expected[:count] @ np.asarray(kernel) + bias
        np.testing.assert_allclose(tokens.x[row, :count], projected, atol=5e-3)


def test_a_row_without_a_frame_is_finite():
    batch = {"audio": padded(audio()), "length": np.array([20_800, 300])}
    model = model_of()
    tokens, _ = model.init_with_output(jax.random.key(0), batch, method="features")
    assert not tokens.valid[1].any() and np.isfinite(tokens.x).all()


def test_frames_are_float32_until_they_are_normalised():
    wave = audio()[0][None]
    half, whole = (
        model_of(dtype).init_with_output(jax.random.key(0), wave, method="extract")[0][1]
        for dtype in (jnp.bfloat16, jnp.float32)
    )
    assert half.dtype == jnp.bfloat16
    np.testing.assert_array_equal(half, whole.astype(jnp.bfloat16))


# Runs ---------------------------------------------------------------------------------------------


def config(name, **changes):
    made = config_of(name, total_steps=2, **changes)
    made.model.frontend = MEL
    made.checkpoint = dict(every=1, keep=2)
    return made.to_dict()


@pytest.fixture(scope="module", params=["speech_v1", "speech_v2"])
def run(request, tmp_path_factory, light_compilation):
    """(config, workdir, last state) of two steps."""
    options, workdir = config(request.param), tmp_path_factory.mktemp(request.param) / "run"
    return options, workdir, train.train(options, workdir, verbose=False)


def test_it_learns(run):
    _, workdir, state = run
    front = state.params["frontend"]
    assert set(front) == {"norm", "projection"} and front["norm"]["scale"].shape == (80,)
    assert np.ptp(front["norm"]["scale"]) > 0  # ones at the start: it has gradients
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state.params))
    assert len(read_lines(workdir / FILE)) == 2


def test_it_resumes(run, tmp_path):
    options, workdir, state = run
    shutil.copytree(workdir, again := tmp_path / "run")
    shutil.rmtree(again / "checkpoints" / "2")
    resumed = train.train(options, again, verbose=False)
    jax.tree.map(np.testing.assert_array_equal, state.params, resumed.params)


def test_it_converts_and_loads(run, tmp_path):
    _, workdir, state = run
    convert([str(workdir), str(tmp_path / "jax"), "--to=jax"])
    loaded, direct = data2vec_jax.load(tmp_path / "jax"), data2vec_jax.load(workdir)
    norm = state.params["frontend"]["norm"]
    rows = audio()
    whole, padding = padded(rows), np.arange(max(map(len, rows))) >= [[len(row)] for row in rows]
    together = loaded(whole, padding)
    np.testing.assert_array_equal(
        together.last_hidden_state, direct(whole, padding).last_hidden_state
    )
    for row, wave in enumerate(rows):
        alone = loaded(wave[None])
        expected = by_numpy(wave) * np.asarray(norm["scale"]) + np.asarray(norm["bias"])
        assert_close(alone.extract_features[0], expected)
        np.testing.assert_allclose(
            together.last_hidden_state[row, : frames(len(wave))],
            alone.last_hidden_state[0],
            atol=1e-4,
        )


def test_transcripts_are_learned_from_it(run, tmp_path):
    _, workdir, state = run
    options = config("finetune_librispeech", eval_every=0)
    # Of the recipes of LibriSpeech: what is said of convolutions has no effect.
    options["model_overrides"]["frontend"]["gradient"] = 0.0
    options["optim"]["frozen"] = (r"^frontend/(conv\d+/|norm\d+/|time_norm/)",)
    options["loss"]["freeze_updates"] = 0
    tuned = train.train(options, tmp_path / "run", init_from=str(workdir), verbose=False)
    before, after = (s.params["frontend"]["norm"]["scale"] for s in (state, tuned))
    assert 0 < np.abs(after - before).max() < 0.1
    last = read_lines(tmp_path / "run" / FILE)[-1]
    assert np.isfinite([last["wer"], last["cer"]]).all()


# Refusals -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(kind="mels"), r"config\.model\.frontend\.kind: no 'mels'; did you mean 'mel'\?"),
        (MEL | dict(convs=CONVS), r"frontend\.convs: an option of kind='waveform', .* 'mel'"),
        (dict(bins=40), r"frontend\.bins: an option of kind='mel', .* 'waveform'"),
        (MEL | dict(bin=40), r"frontend\.bin: no such option; did you mean 'bins'"),
        (MEL | dict(bins=0), r"config\.model\.frontend\.bins: 0 is not a whole number"),
    ],
)
def test_impossible_options_are_named(options, message):
    with pytest.raises(UserError, match=message) as raised:
        model_of(frontend=options)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("layout", ["hf", "fairseq"])
def test_layouts_without_it_refuse(run, tmp_path, layout, capsys):
    with pytest.raises((UserError, SystemExit), match=r"frontend\.kind: .* no place for 'mel'"):
        convert([str(run[1]), str(tmp_path / "out"), f"--to={layout}"])
    assert not (tmp_path / "out").exists()


def test_convolutions_are_the_same_where_norms_are_computed_again(monkeypatch):
    """On accelerators the backward pass keeps what convolutions give, and nothing of the norms."""
    frontend = ConvFrontend(16, convs=((8, 10, 5), (8, 3, 2)))
    audio = np.random.default_rng(0).normal(size=(2, 900)).astype(np.float32)
    variables = frontend.init(jax.random.key(0), audio)

    def gradient(variables, audio):
        return jax.grad(lambda *a: jnp.sum(jnp.sin(frontend.apply(*a)[0])), (0, 1))(
            variables, audio
        )

    expected = frontend.apply(variables, audio), gradient(variables, audio)
    monkeypatch.setattr(sharding, "platform", lambda: "tpu")
    assert "remat" in str(jax.make_jaxpr(gradient)(variables, audio))
    found = frontend.apply(variables, audio), gradient(variables, audio)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
