"""Fine-tuning of sound: published sets, balanced draws, losses (docs/spec/sound.md section 6)."""

import csv
import warnings
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import soundfile

from data2vec_jax.configs import finetune_sound
from data2vec_jax.core.config import check_section
from data2vec_jax.core.errors import UserError
from data2vec_jax.core.train_step import StepKeys
from data2vec_jax.data.batches import TrainSampler, balanced_weights
from data2vec_jax.data.sources import open_source
from data2vec_jax.modalities.contract import get, make_model
from data2vec_jax.models import heads
from data2vec_jax.models.heads import Features
from data2vec_jax.tasks import classify, finetune, mixing

SOUND = get("sound")


@pytest.fixture(scope="module")
def clips():
    """The shipped sounds: waveforms at 16 kHz, by name."""
    source = open_source("samples:sounds", "train", codec=SOUND.codec)
    return [source[i]["audio"] for i in range(len(source))]


def write(path, audio):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, audio, 16_000)


# Published sets ----------------------------------------------------------------------------------


@pytest.fixture
def audioset(tmp_path, clips):
    """Three classes; clips under several names of downloaders; one of six has vanished."""
    (tmp_path / "class_labels_indices.csv").write_text(
        'index,mid,display_name\n0,/m/09x0r,"Speech"\n1,/m/05zppz,"Male speech, man speaking"\n'
        '2,/t/dd00088,"Child speech"\n'
    )
    comment = "# Segments csv created Sun Mar  5 10:54:31 2017\n# num_ytids=4\n# YTID, ...\n"
    (tmp_path / "balanced_train_segments.csv").write_text(
        comment + '--PJHxphWEs, 30.000, 40.000, "/m/09x0r,/t/dd00088"\n'
        '-0DLPzsiXXE, 30.000, 40.000, "/m/05zppz"\nvanished_00, 0.000, 10.000, "/m/09x0r"\n'
    )
    (tmp_path / "unbalanced_train_segments.csv").write_text(
        comment + '---1_cCGK4M, 0.000, 10.000, "/m/09x0r,/m/05zppz,/t/dd00088"\n'
    )
    (tmp_path / "eval_segments.csv").write_text(
        comment + '-0BIyqJj9ZU, 30.000, 40.000, "/t/dd00088"\n'
    )
    write(tmp_path / "balanced_train_segments/Y--PJHxphWEs.wav", clips[0])
    write(tmp_path / "balanced_train_segments/a/-0DLPzsiXXE_30.000.flac", clips[1])
    write(tmp_path / "audio/unbalanced_train/---1_cCGK4M_0.wav", clips[2])
    write(tmp_path / "eval_segments/-0BIyqJj9ZU_30000.wav", clips[3])
    return tmp_path


def test_audioset(audioset, clips):
    with pytest.warns(UserWarning, match=r"1 of the 3 clips of balanced_train are missing"):
        source = open_source(f"audioset:{audioset}", "balanced_train", codec=SOUND.codec)
    assert source.label_names == ("Speech", "Male speech, man speaking", "Child speech")
    assert [source.field(i, "labels") for i in range(2)] == [[0, 2], [1]]
    assert np.allclose(source[0]["audio"], clips[0], atol=1e-4)
    assert np.allclose(source[1]["audio"], clips[1], atol=1e-4)
    held_out = open_source(f"audioset:{audioset}", "eval", codec=SOUND.codec)
    assert len(held_out) == 1 and np.allclose(held_out[0]["audio"], clips[3], atol=1e-4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        both = "balanced_train+unbalanced_train"
        joined = open_source(f"audioset:{audioset}", both, codec=SOUND.codec)
    assert [joined.field(i, "labels") for i in range(3)] == [[0, 2], [1], [0, 1, 2]]
    with pytest.raises(UserError, match="did you mean 'eval'"):
        open_source(f"audioset:{audioset}", "evals", codec=SOUND.codec)
    (audioset / "eval_segments.csv").write_text('-0BIyqJj9ZU, 30.000, 40.000, "/m/none"\n')
    with pytest.raises(UserError, match="unknown class '/m/none'"):
        open_source(f"audioset:{audioset}", "eval", codec=SOUND.codec)


def small(variant, uri, **data):
    """A fine-tuning config of a published set, with a network of width 32."""
    c = finetune_sound.get_config(variant)
    c.update(total_steps=1, dtype="float32")
    c.model = finetune_sound.get_config("smoke").model
    c.model_overrides = dict(frames=208, encoder=dict(drop_path=0.0))
    c.examples.frames = 208
    c.data.update(source=uri, workers=0, **data)
    return c.to_dict()


def test_audioset_is_trained_with_balanced_draws(audioset):
    uri = f"audioset:{audioset}"
    config = small("as2m", uri, batch_size=2, balanced_draws=2)
    config["head"]["classes"] = 3
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        task = classify.make(finetune.resolve_config(config))
        with jax.set_mesh(
            jax.make_mesh((1, 1, 1), ("slice", "data", "fsdp"), devices=jax.devices()[:1])
        ):
            batch = next(task.data(0))
        config["data"]["balanced_draws"] = 4
        with pytest.raises(UserError, match="balanced_draws: 4 of 3 examples"):
            classify.make(finetune.resolve_config(config))
    assert batch["spectrogram"].shape == (2, 208, 128, 1)
    rows = {(1, 0, 1), (0, 1, 0), (1, 1, 1)}
    assert {tuple(row) for row in np.asarray(batch["label"]).astype(int)} <= rows


@pytest.fixture
def esc50(tmp_path, clips):
    """Three classes in five folds; the columns of the corpus."""
    (tmp_path / "meta").mkdir()
    rows, names = [], ("dog", "rooster", "pig")
    for fold in range(1, 6):
        for target, name in enumerate(names):
            file = f"{fold}-100032-A-{target}.wav"
            rows.append((file, fold, target, name, "False", "100032", "A"))
            write(tmp_path / "audio" / file, clips[(fold * 3 + target) % len(clips)])
    with open(tmp_path / "meta/esc50.csv", "w", newline="") as file:
        head = ("filename", "fold", "target", "category", "esc10", "src_file", "take")
        csv.writer(file).writerows([head, *rows])
    return tmp_path


def test_esc50(esc50):
    uri = f"esc50:{esc50}"
    train = open_source(uri, "fold2+fold3+fold4+fold5", codec=SOUND.codec)
    test = open_source(uri, "fold1", codec=SOUND.codec)
    assert (len(train), len(test)) == (12, 3) and train.label_names == ("dog", "rooster", "pig")
    assert test.column("label") == [0, 1, 2] and set(train.column("fold")) == {2, 3, 4, 5}
    assert not set(train.column("path")) & set(test.column("path"))
    with pytest.raises(UserError, match="no split 'fold6'"):
        open_source(uri, "fold6", codec=SOUND.codec)
    (esc50 / "audio/1-100032-A-0.wav").unlink()
    with pytest.raises(UserError, match="no file"):
        open_source(uri, "fold1", codec=SOUND.codec)
    config = small("esc50", uri, batch_size=4)
    config["head"]["classes"] = 50
    with pytest.raises(UserError, match=r"head.classes: 50, but .* has 3"):
        classify.make(finetune.resolve_config(config))


def test_esc50_as_published_has_another_rate(esc50, clips):
    soundfile.write(esc50 / "audio/2-100032-A-0.wav", clips[0], 44_100)
    source = open_source(f"esc50:{esc50}", "fold2", codec=SOUND.codec)
    assert (source.lengths() < 0).sum() == 1  # it is left out, and told why
    ((index, error),) = source.bad.items()
    assert error.reason == "sample rate" and "44100 Hz, needed 16000 Hz" in str(error)
    with pytest.raises(UserError, match=r"2-100032-A-0\.wav: sample rate is 44100 Hz"):
        source[index]


def test_speech_commands(tmp_path, clips):
    names = {"yes": ["a_nohash_0", "b_nohash_0", "c_nohash_1"], "no": ["a_nohash_0"]}
    for word, files in names.items():
        for number, name in enumerate(files):
            write(tmp_path / word / f"{name}.wav", clips[number][:16_000])
    write(tmp_path / "_background_noise_/running_tap.wav", clips[5])
    (tmp_path / "validation_list.txt").write_text("yes/b_nohash_0.wav\n")
    (tmp_path / "testing_list.txt").write_text("yes/c_nohash_1.wav\n")
    uri = f"speech_commands:{tmp_path}"
    parts = {s: open_source(uri, s, codec=SOUND.codec) for s in ("train", "validation", "test")}
    assert {s: list(p.column("path")) for s, p in parts.items()} == {
        "train": ["no/a_nohash_0.wav", "yes/a_nohash_0.wav"],
        "validation": ["yes/b_nohash_0.wav"],
        "test": ["yes/c_nohash_1.wav"],
    }
    assert parts["test"].label_names == ("no", "yes") and parts["test"].column("label") == [1]
    assert parts["train"].lengths().tolist() == [16_000, 16_000]
    (tmp_path / "testing_list.txt").write_text("yes/lost.wav\n")
    with pytest.raises(UserError, match=r"lost\.wav"):
        open_source(uri, "test", codec=SOUND.codec)


def test_published_scores():
    score = SOUND.published_scores
    for variant, split, metric, wanted in (
        ("as20k", "eval", "mean_average_precision", 40.2),
        ("as2m", "eval", "mean_average_precision", 48.6),
        ("esc50", "fold1", "accuracy", 95.9),
        ("spc2", "test", "accuracy", 98.3),
        ("spc2", "validation", "accuracy", None),
        ("demo", "test", "accuracy", None),
    ):
        assert score(finetune_sound.get_config(variant).to_dict(), split, metric) == wanted


# Numbers of the recipes ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "variant,frames,classes,batch,steps,peak",
    [
        ("as2m", 1024, 527, 96, 300_000, 5e-5),
        ("as20k", 1024, 527, 48, 40_000, 5e-5),
        ("esc50", 512, 50, 48, 4_000, 5e-5),
        ("spc2", 128, 35, 256, 40_000, 2e-4),
    ],
)
def test_recipes(variant, frames, classes, batch, steps, peak):
    """The table of section 6."""
    c = finetune_sound.get_config(variant)
    assert c.examples.frames == c.model.frames == c.model_overrides.frames == frames
    assert (c.head.classes, c.data.batch_size, c.total_steps) == (classes, batch, steps)
    assert (c.schedule.peak, c.schedule.floor, c.schedule.warmup) == (peak, 1e-6, 0.1)
    assert c.data.balanced_draws == (200_000 if variant == "as2m" else 0)
    assert c.loss.get("mixup") == (0.0 if variant == "esc50" else 0.8)
    assert c.loss.mask_frames == c.loss.mask_bins == (0.4 if variant == "esc50" else 0.2)
    binary = {"as2m": "labels", "as20k": "labels", "esc50": None, "spc2": "rows"}
    assert c.loss.get("binary") == binary[variant]
    config = finetune.resolve_config(c.to_dict())
    # Block j of 12 (from 0) at 0.65^(12 - j), all else at 1.
    ((_, rates),) = config["optim"]["rates"]
    assert np.allclose(rates, [0.65 ** (12 - j) for j in range(12)])
    classify.abstract_task(config)


# Balanced draws -----------------------------------------------------------------------------------


def test_balanced_weights():
    """AST's: the sum over a clip's labels of 1000 / (count + 0.01)."""
    found = balanced_weights([[0, 2], [0], [0, 1], [2]])
    wanted = [1000 / 3.01 + 1000 / 2.01, 1000 / 3.01, 1000 / 3.01 + 1000 / 1.01, 1000 / 2.01]
    assert np.allclose(found, wanted)
    with pytest.raises(UserError, match="no class"):
        balanced_weights([[0], []])


def test_balanced_draws():
    weights = np.array([1.0] * 50 + [8.0] * 10)
    bucket = np.zeros(60, int)
    bucket[3] = -1

    def sampler(seed=0):
        return TrainSampler(bucket, [1], 6, seed, 1, True, False, weights, 20)

    plan, drawn = sampler(), Counter()
    assert plan.per_epoch == 3  # 18 of the 20 draws
    for epoch in range(400):
        ids = np.concatenate([plan(3 * epoch + n)[1] for n in range(3)])
        assert len(set(ids.tolist())) == 18 and 3 not in ids  # without replacement
        drawn.update(ids.tolist())
    heavy = np.mean([drawn[i] for i in range(50, 60)]) / 400
    light = np.mean([drawn[i] for i in range(50) if i != 3]) / 400

    # Another way to draw the same: one by one, in proportion to what is left.
    rng, found = np.random.default_rng(1), Counter()
    left = np.flatnonzero(bucket == 0)
    for _ in range(400):
        p = weights[left] / weights[left].sum()
        found.update(rng.choice(left, 18, replace=False, p=p).tolist())
    assert heavy == pytest.approx(np.mean([found[i] for i in range(50, 60)]) / 400, abs=0.03)
    assert light == pytest.approx(np.mean([found[i] for i in range(50) if i != 3]) / 400, abs=0.02)

    # A function of (seed, epoch) alone; heavy ones are not first.
    assert np.array_equal(sampler()(700)[1], plan(700)[1])
    assert not np.array_equal(sampler(1)(700)[1], plan(700)[1])
    assert sampler().digest() == plan.digest() != sampler(1).digest()
    first = np.mean([np.isin(plan(3 * e)[1], range(50, 60)).mean() for e in range(200)])
    last = np.mean([np.isin(plan(3 * e + 2)[1], range(50, 60)).mean() for e in range(200)])
    assert first == pytest.approx(last, abs=0.05)
    with pytest.raises(UserError, match="balanced_draws: 20 of 60 examples of 2 lengths"):
        TrainSampler(np.arange(60) % 2, [1, 2], 6, 0, 1, False, True, weights, 20)


# Losses and augmentation --------------------------------------------------------------------------


def test_bands():
    x = np.ones((400, 64, 32, 2), np.float32)
    keys = jax.random.split(jax.random.key(0), 400)
    found = np.asarray(mixing.mask_bands(jnp.asarray(x), keys, 0.5, 0.25))
    assert np.array_equal(found[..., 0], found[..., 1])
    rows = (found[..., 0] == 0).all(2)  # [400, 64]
    columns = (found[..., 0] == 0).all(1)
    crossed = rows[:, :, None] | columns[:, None]
    assert np.array_equal(found[..., 0] == 0, crossed)
    for marks, most in ((rows, 32), (columns, 8)):
        width = marks.sum(1)
        runs = np.abs(np.diff(np.pad(marks, ((0, 0), (1, 1))).astype(int), axis=1)).sum(1)
        assert (runs == 2 * (width > 0)).all()  # one band
        assert width.max() == most - 1 and width.min() == 0
        assert width.mean() == pytest.approx((most - 1) / 2, rel=0.1)
        places = marks.mean(0)  # anywhere but at the last place, as both ends are rounded down
        assert (
            places[:-1].min() > 0 and abs(places[: len(places) // 2].mean() - places.mean()) < 0.03
        )
    assert np.array_equal(mixing.mask_bands(jnp.asarray(x[:3]), keys[:3], 0.0, 0.0), x[:3])


def test_head_of_eat():
    """Class token -> LN(1e-6) -> linear."""
    options = dict(name="image", classes=5, pooling="class", class_norm=True)
    head = heads.make(options, "head")
    x = jax.random.normal(jax.random.key(0), (3, 7, 16)) * 3 + 1
    params = head.init(jax.random.key(1), Features(x))["params"]
    assert set(params) == {"norm", "output"}
    params["norm"]["scale"] = jnp.linspace(0.5, 2, 16)
    token = np.asarray(x[:, 0], np.float64)
    normed = (token - token.mean(1, keepdims=True)) / np.sqrt(token.var(1, keepdims=True) + 1e-6)
    normed = normed * np.linspace(0.5, 2, 16)
    wanted = normed @ np.asarray(params["output"]["kernel"]) + np.asarray(params["output"]["bias"])
    found = head.apply({"params": params}, Features(x))["logits"]
    assert np.allclose(found, wanted, atol=1e-5)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


@pytest.mark.parametrize("several", [True, False], ids=["several", "single"])
@pytest.mark.parametrize("binary", ["labels", "rows"])
def test_a_step_of_fine_tuning(binary, several, monkeypatch):
    """Loss and the head's gradients with mixup and bands, against numpy."""
    rng = np.random.default_rng(0)
    encoder = dict(depth=1, heads=2, mlp=32, norm="post", eps=1e-6)
    options = dict(width=16, frames=32, mask_embedding=False, encoder=encoder)
    model = make_model(SOUND, options)
    problem = "multi_label_classification" if several else "single_label_classification"
    head = heads.make(dict(name="image", classes=4, class_norm=True, problem=problem), "head")
    labels = (rng.random((6, 4)) < 0.4).astype(np.float32)
    labels[:, 0] = 1
    if not several:
        labels = np.eye(4, dtype=np.float32)[[0, 3, 1, 2, 2, -1]]
    spectrograms = rng.normal(-4, 4, size=(6, 32, 128, 1)).astype(np.float32)
    batch = {
        "spectrogram": jnp.asarray(spectrograms),
        "label": jnp.asarray(labels if several else labels.argmax(1)),
        "example_id": jnp.arange(6, dtype=jnp.uint32),
    }
    share, band = 0.3, (slice(3, 9), slice(40, 50))
    monkeypatch.setattr(jax.random, "beta", lambda *a, **k: jnp.float32(share))

    def bands(x, keys, rows, columns):
        assert len(keys) == 6 and (rows, columns) == (0.2, 0.1)
        x = x.at[:, band[0]].set(0.0)
        return x.at[:, :, band[1]].set(0.0)

    monkeypatch.setattr(mixing, "mask_bands", bands)
    config = classify.LossConfig(
        binary=binary, mixup=0.8, mix_probability=1.0, mask_frames=0.2, mask_bins=0.1
    )
    init = finetune.initialiser(model, head, (), {k: v for k, v in batch.items()})
    params = init(jax.random.key(0))
    params["task"]["output"]["kernel"] = jax.random.normal(jax.random.key(3), (16, 4)) * 0.3
    draw = StepKeys(jax.random.key(1), jnp.int32(0), jax.random.key(2))
    loss = classify.make_loss(model, head, config)

    def mean(params):
        total, count, _ = loss(params, {}, batch, draw)
        return total / count

    found, grads = jax.value_and_grad(mean)(params)

    # Mixed with the reversed batch, then two bands of 0; (x - mean) / (2 std) comes before.
    pixels = (spectrograms + 4.268) / (2 * 4.569)
    pixels = share * pixels + (1 - share) * pixels[::-1]
    pixels[:, band[0]], pixels[:, :, band[1]] = 0, 0
    mixed = share * labels + (1 - share) * labels[::-1]
    features = finetune.encode(model, head, params, {**batch, "pixels": jnp.asarray(pixels)})
    token = np.asarray(features.x[:, 0], np.float64)
    normed = (token - token.mean(1, keepdims=True)) / np.sqrt(token.var(1, keepdims=True) + 1e-6)
    kernel, bias = (np.asarray(params["task"]["output"][k], np.float64) for k in ("kernel", "bias"))
    p = sigmoid(normed @ kernel + bias)
    losses = -(mixed * np.log(p) + (1 - mixed) * np.log(1 - p))
    count = mixed.sum() if binary == "labels" else len(mixed)
    assert found == pytest.approx(losses.sum() / count, rel=1e-5)
    slopes = (p - mixed) / count
    assert np.allclose(grads["task"]["output"]["bias"], slopes.sum(0), atol=1e-5)
    assert np.allclose(grads["task"]["output"]["kernel"], normed.T @ slopes, atol=1e-5)

    # Without draw nothing is mixed or masked.
    plain = loss(params, {}, batch, None)
    logits = classify.make_predict(model, head)(params, batch)["logits"]
    p = sigmoid(np.asarray(logits, np.float64))
    wanted = -(labels * np.log(p) + (1 - labels) * np.log(1 - p)).sum()
    assert float(plain[0]) == pytest.approx(wanted, rel=1e-5)
    assert float(plain[1]) == (labels.sum() if binary == "labels" else 6)


def test_impossible_losses():
    model = make_model(SOUND, finetune_sound.get_config("smoke").model.to_dict())
    number = heads.make(dict(name="image", classes=1), "head")
    for options in ({"binary": "rows"}, {"mixup": 0.8}):
        with pytest.raises(UserError, match="not for numbers"):
            classify.make_loss(model, number, classify.LossConfig(**options))
    with pytest.raises(UserError, match="did you mean 'rows'"):
        check_section("loss", {"binary": "row"}, classify.LossConfig)
