"""Kaldi's filterbank: numbers of torchaudio, a float64 reference, kaldi-native-fbank, JAX."""

import math
from pathlib import Path

import jax.numpy as jnp
import kaldi_native_fbank as knf
import numpy as np
import pytest
import soundfile

from data2vec_jax.core.errors import UserError
from data2vec_jax.data.fbank import Fbank, device_log_mel, frames, log_mel, mel

ROOT = Path(__file__).resolve().parent.parent
HANN, POVEY = Fbank(bins=128, window="hann"), Fbank()
RECORDED = sorted((ROOT / "data2vec_jax/modalities/speech/sample_data/speech").glob("*.ogg"))[:3]


def signal_z():
    """1 s, of docs/spec/sound.md section 2."""
    i = np.arange(16_000, dtype=np.float64)
    return ((7 * i**2 + 13 * i) % 2001 / 1000 - 1).astype(np.float32) * np.float32(0.1)


def tones():
    """1 s: three loud frequencies, so quiet bins are rounding errors of these in float32."""
    t = np.arange(16_000) / 16_000
    parts = [a * np.sin(2 * np.pi * f * t) for a, f in ((0.5, 440), (0.25, 3_000), (0.1, 50))]
    return sum(parts).astype(np.float32)


def reference(audio, bins, window):
    """Steps (a) to (g) of section 2, one frame at a time, in float64."""
    i = np.arange(400)
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * i / 399)
    shape = {"hann": hann, "povey": hann**0.85, "hamming": 0.54 - 0.46 * (1 - 2 * hann)}[window]
    low, high = (1127 * math.log(1 + f / 700) for f in (20.0, 8_000.0))
    d = (high - low) / (bins + 1)
    rows = []
    for start in range(0, len(audio) - 399, 160):
        x = audio[start : start + 400].astype(np.float64)
        x = x - x.mean()
        x = np.array([x[k] - 0.97 * x[max(k - 1, 0)] for k in range(400)]) * shape
        power = np.abs(np.fft.fft(np.concatenate([x, np.zeros(112)])))[:256] ** 2
        m = 1127 * np.log(1 + 31.25 * np.arange(256) / 700)
        row = []
        for b in range(bins):
            left, right = low + b * d, low + (b + 2) * d
            weights = np.maximum(0, np.minimum(m - left, right - m) / d)
            row.append(math.log(max((weights * power).sum(), 1.1920929e-7)))
        rows.append(row)
    return np.array(rows)


BINS = [0, 3, 15, 31, 63, 95, 127]
# From torchaudio 2.11 in float32 (docs/spec/sound.md section 2): signal, bins, window, tolerance,
# mean and deviation of all numbers, frame -> values of some bins.
ANCHORS = [
    (
        signal_z,
        128,
        "hann",
        1e-3,
        (-1.94142, 3.34352),
        BINS,
        {
            0: (-7.16763, -15.94238, -4.57887, -3.95859, -0.34653, 0.69129, 2.37481),
            97: (-7.30695, -15.94238, -6.44726, -3.25194, -1.91174, 1.12558, 2.86287),
        },
    ),
    (
        signal_z,
        80,
        "povey",
        1e-3,
        (-1.20617, 3.00295),
        [0, 3, 15, 31, 63, 79],
        {
            0: (-7.09646, -7.05743, -4.24360, -1.78597, 1.34822, 3.30001),
        },
    ),
    (tones, 128, "hann", 5e-3, (-11.27087, 5.87193), [], {}),
]


@pytest.mark.parametrize("where", [log_mel, device_log_mel])
@pytest.mark.parametrize("signal,bins,window,tolerance,moments,columns,rows", ANCHORS)
def test_numbers_of_torchaudio(where, signal, bins, window, tolerance, moments, columns, rows):
    found = np.asarray(where(signal(), Fbank(bins=bins, window=window)))
    assert found.shape == (98, bins) and found.dtype == np.float32
    assert np.allclose((found.mean(), found.std()), moments, atol=tolerance)
    for row, values in rows.items():
        assert np.allclose(found[row, columns], values, atol=tolerance)


@pytest.mark.parametrize("bins,window", [(128, "hann"), (80, "povey"), (40, "hamming")])
def test_equals_the_steps_one_by_one(bins, window):
    audio, _ = soundfile.read(RECORDED[0], dtype="float32")
    for x in (signal_z()[:4_000], audio[20_000:26_000]):
        found, wanted = log_mel(x, Fbank(bins=bins, window=window)), reference(x, bins, window)
        assert np.abs(found - wanted).max() <= np.spacing(np.float32(16)) / 2  # of the cast


def check_device(device, host):
    """Rounding in float32 is as large in every bin of a frame: a few eps of the loudest amplitude.

    So the error of a log power grows with exp(half the difference to the loudest log power).
    Measured on a CPU without AVX-512: at most 6.4 eps; 16 are allowed.
    """
    error, below = np.abs(np.asarray(device) - host), host.max(-1, keepdims=True) - host
    assert (error <= 1e-5 + 16 * np.finfo(np.float32).eps * np.exp(below / 2)).all()
    assert (error > 1e-4).mean() < 2e-3 and error.max() < 5e-3


@pytest.mark.parametrize("options", [HANN, POVEY], ids=["hann", "povey"])
@pytest.mark.parametrize("path", RECORDED, ids=lambda path: path.stem)
def test_device_equals_host_on_recordings(path, options):
    audio, _ = soundfile.read(path, dtype="float32")
    check_device(device_log_mel(audio, options), log_mel(audio, options))
    # Rows of a batch are independent of each other.
    batch = np.stack([audio[:32_000], audio[1_000:33_000]])
    for row, x in zip(device_log_mel(batch, options), batch, strict=True):
        check_device(row, log_mel(x, options))


@pytest.mark.parametrize("bins,window", [(80, "povey"), (40, "hamming")])
@pytest.mark.parametrize(
    "signal,tolerance",
    [(signal_z, 1e-3), (tones, 5e-3), (RECORDED[0], 5e-3)],
    ids=["z", "tones", "recording"],
)
def test_kaldi_native_fbank(signal, tolerance, bins, window):
    """Another implementation of Kaldi's. It computes in float32, FFT included, whose errors are
    relative to the loudest bin of a frame: where the spectrum is steep, the quiet bins differ by
    a few thousandths. (It refuses 128 bins, as bin 3 is empty.)
    """
    audio = signal() if callable(signal) else soundfile.read(signal, dtype="float32")[0][:48_000]
    options = knf.FbankOptions()
    options.frame_opts.dither, options.frame_opts.window_type = 0.0, window
    options.frame_opts.snip_edges, options.mel_opts.num_bins = True, bins
    options.energy_floor, options.use_energy = 0.0, False
    theirs = knf.OnlineFbank(options)
    theirs.accept_waveform(16_000, audio.tolist())
    theirs.input_finished()
    wanted = np.stack([theirs.get_frame(i) for i in range(theirs.num_frames_ready)])
    assert np.abs(log_mel(audio, Fbank(bins=bins, window=window)) - wanted).max() < tolerance


def test_constants():
    assert np.allclose((mel(20), mel(8_000)), (31.748578, 2840.037712), atol=5e-7)
    assert (mel(8_000) - mel(20)) / 129 == pytest.approx(21.769683, abs=5e-7)
    empty = np.flatnonzero(HANN.weights.sum(0) == 0)
    assert empty.tolist() == [3]  # and released weights expect it
    assert ((HANN.weights > 0).sum(0) == 1).sum() == 24
    assert not (POVEY.weights.sum(0) == 0).any()
    assert HANN.weights.shape == (257, 128) and HANN.matrix.shape == (400, 514)
    silence = log_mel(np.zeros(1_000, np.float32), HANN)
    assert np.allclose(silence, -15.942385, atol=1e-6)


@pytest.mark.parametrize("samples", [0, 399, 400, 559, 560, 160_000])
def test_number_of_frames(samples):
    count = max(0, 1 + (samples - 400) // 160)
    assert frames(samples) == count and frames(np.array([samples])).tolist() == [count]
    if samples < 1_000:
        audio = np.zeros(samples, np.float32)
        assert log_mel(audio, POVEY).shape == device_log_mel(audio, POVEY).shape == (count, 80)
    assert samples != 160_000 or count == 998  # 10 s


def test_other_shifts_and_rates():
    audio, _ = soundfile.read(RECORDED[0], dtype="float32")
    for options in (
        Fbank(bins=40, shift=320),
        Fbank(bins=20, length=200, shift=80, sample_rate=8_000),
    ):
        host = log_mel(audio[:20_000], options)
        assert len(host) == options.frames(20_000)
        check_device(device_log_mel(audio[:20_000], options), host)


def test_impossible_options():
    for options, words in (
        ({"window": "han"}, "did you mean 'hann'"),
        ({"bins": 0}, "fbank.bins: 0"),
        ({"high": 9_000.0}, "at most 8000 Hz"),
        ({"low": 8_000.0}, "below 8000 Hz"),
        ({"floor": 0.0}, "fbank.floor"),
        ({"shift": 0}, "fbank.shift"),
    ):
        with pytest.raises(UserError, match=words):
            Fbank(**options)
    with pytest.raises(UserError, match="shape"):
        log_mel(jnp.zeros((2, 400)), POVEY)
