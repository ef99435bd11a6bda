"""CTC fine-tuning: PyTorch's losses and gradients, Hugging Face's, masks, what is frozen."""

import dataclasses
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from configs_for_tests import Items, config_of

from data2vec_jax import train
from data2vec_jax.convert import loaded, ours
from data2vec_jax.core import checkpoints, files, optimizer
from data2vec_jax.core.errors import UserError
from data2vec_jax.core.state import path_name
from data2vec_jax.core.train_step import StepKeys
from data2vec_jax.data.characters import SPECIALS, Characters
from data2vec_jax.metrics.writer import FILE, read_lines
from data2vec_jax.modalities.contract import Tokens
from data2vec_jax.modalities.speech.data import normalise
from data2vec_jax.modalities.speech.frontend import CONVS, frames, hop, reach
from data2vec_jax.modalities.speech.inputs import Utterances
from data2vec_jax.models import heads
from data2vec_jax.models.losses import ctc_losses
from data2vec_jax.tasks import decoding, finetune, ngrams, transcribe
from data2vec_jax.tasks.pretrain import make_model
from data2vec_jax.tasks.registry import check_config
from data2vec_jax.tasks.specaugment import SpecAugmentConfig, augment

GOLDENS = Path(__file__).parent / "goldens"


def step_keys(step=0, seed=0):
    keys = jax.random.split(jax.random.key(seed))
    return StepKeys(keys[0], jnp.int32(step), keys[1])


# Losses -----------------------------------------------------------------------------------------


def test_losses_and_gradients_equal_pytorch():
    """Two of the rows have no alignment: infinite, and with zero_infinity 0 without a gradient."""
    with np.load(GOLDENS / "ctc" / "torch.npz") as file:
        given = {name: file[name] for name in file.files}
    logits, lengths, labels = (jnp.asarray(given[n]) for n in ("logits", "lengths", "labels"))
    losses = jax.jit(lambda x: ctc_losses(x, lengths, labels, 0))
    found, wanted = np.asarray(losses(logits)), given["losses"]
    np.testing.assert_array_equal(np.isinf(found), np.isinf(wanted))
    assert np.isinf(wanted).sum() == 2
    np.testing.assert_allclose(found, wanted, rtol=1e-5)

    def weighted(x):
        each = losses(x)
        return jnp.sum(jnp.where(jnp.isfinite(each), each, 0.0) * given["weights"])

    gradient = np.asarray(jax.grad(weighted)(logits))
    np.testing.assert_allclose(gradient, given["gradient"], atol=2e-4)
    assert not gradient[np.isinf(wanted)].any()  # exactly
    half = losses(logits.astype(jnp.bfloat16))
    assert half.dtype == jnp.float32
    np.testing.assert_allclose(half, losses(logits.astype(jnp.bfloat16).astype(jnp.float32)))


@pytest.mark.parametrize("run", ["nomask", "mask"])
@pytest.mark.parametrize("name", ["Data2VecAudioForCTC", "Data2VecAudioForCTC__stdlayout"])
def test_golden_losses_through_the_task(name, run):
    folder = GOLDENS / "checkpoints" / name
    with np.load(folder / "golden.npz") as file:
        golden = {key: file[key] for key in file.files}
    checkpoint = loaded.load(folder)
    model, head = ours.model_of(checkpoint.config), heads.make(checkpoint.config["head"])
    batch = {
        "audio": jnp.asarray(golden[f"in_{run}/input_values"]),
        "labels": jnp.asarray(golden[f"in_{run}/labels"], jnp.int32),
    }
    batch["example_id"] = jnp.arange(len(batch["audio"]), dtype=jnp.uint32)
    if f"in_{run}/attention_mask" in golden:
        batch["length"] = jnp.asarray(golden[f"in_{run}/attention_mask"].sum(-1), jnp.int32)
    loss = jax.jit(lambda params: transcribe.make_loss(model, head)(params, {}, batch, None))
    total, count, metrics = loss(checkpoint.params)
    assert head.reduction == "sum" and count == len(batch["audio"])
    np.testing.assert_allclose(total, golden[f"{run}/loss"], rtol=1e-5)
    assert metrics["infeasible"] == 0


# A tiny model -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny():
    """Model, head, parameters and a batch with padding; the second row cannot be aligned."""
    config = config_of("speech_v1", "smoke")
    config.model.frontend.norm = "layer"
    _, model = make_model(config)
    rng = np.random.default_rng(0)
    labels = rng.integers(4, 9, (3, 6)).astype(np.int32)
    labels[2, 3:] = -1
    batch = {
        "audio": jnp.asarray(rng.normal(size=(3, 4000)), jnp.float32),
        "length": jnp.array([4000, 1000, 2600], jnp.int32),
        "labels": jnp.asarray(labels),
        "example_id": jnp.array([5, 2, 9], jnp.uint32),
    }
    batch["audio"] = jnp.where(jnp.arange(4000) < batch["length"][:, None], batch["audio"], 0)
    head = heads.Ctc(9)
    params = model.init(jax.random.key(0), batch)["params"]
    features = heads.Features(jnp.zeros((1, 4, model.width)))
    params = {**params, "task": head.init(jax.random.key(1), features)["params"]}
    return model, head, params, batch


def test_batch_mates_and_padding_do_not_change_a_loss(tiny):
    model, head, params, batch = tiny
    loss = transcribe.make_loss(model, head)
    whole = loss(params, {}, batch, None)
    assert whole[2]["infeasible"] == pytest.approx(1 / 3)
    alone = 0.0
    for row, samples in enumerate(batch["length"]):
        one = {k: v[row : row + 1] for k, v in batch.items() if k != "length"}
        one["audio"] = one["audio"][:, :samples]
        alone += loss(params, {}, one, None)[0]
    np.testing.assert_allclose(whole[0], alone, rtol=1e-5)


def test_only_the_head_learns_at_first(tiny):
    model, head, params, batch = tiny
    loss = transcribe.make_loss(model, head, transcribe.LossConfig(freeze_updates=10))
    free = transcribe.make_loss(model, head)
    both = jax.jit(
        lambda step: [
            jax.grad(lambda p, f=f: f(p, {}, batch, step_keys(step))[0])(params)
            for f in (loss, free)
        ]
    )
    for step in (0, 9, 10):
        held, whole = both(step)
        for path, gradient in jax.tree_util.tree_leaves_with_path(held):
            name = path_name(path)
            other = whole
            for key in path:
                other = other[key.key]
            if name.startswith("task/") or step >= 10:
                np.testing.assert_allclose(gradient, other, rtol=1e-3, atol=1e-4)
                assert name.startswith(("head/", "frontend/conv")) or np.any(other), name
            else:
                assert not np.any(gradient), name


def test_frozen_front_end(tiny):
    names = [path_name(p) for p, _ in jax.tree_util.tree_leaves_with_path(tiny[2]["frontend"])]
    names = [f"frontend/{name}" for name in names]
    learning = {name for name in names if not re.search(transcribe.FRONTEND, name)}
    kept = ("norm/scale", "norm/bias", "projection/kernel", "projection/bias")
    assert learning == {f"frontend/{name}" for name in kept}
    assert not re.search(transcribe.FRONTEND, "positions/conv0/kernel")


# Transcriptions -----------------------------------------------------------------------------------


def test_padding_and_batch_mates_do_not_change_a_transcription(tiny):
    """The same utterances together, in another order, alone, and with more padding."""
    model, head, params, batch = tiny
    predict = jax.jit(transcribe.make_predict(model, head))

    def run(rows, size):
        audio = jnp.pad(batch["audio"], ((0, 0), (0, max(size - 4000, 0))))[rows, :size]
        return predict(params, {"audio": audio, "length": batch["length"][rows]})

    def check(found, rows):
        for place, row in enumerate(rows):
            frames = int(whole["frames"][row])
            one, two = (x[:frames] for x in (found["logits"][place], whole["logits"][row]))
            np.testing.assert_allclose(one, two, atol=1e-5)
            labels = [decoding.greedy(np.asarray(x)[None]) for x in (one, two)]
            assert labels[0] == labels[1] and found["frames"][place] == frames

    whole = run(np.arange(3), 4000)
    assert len({tuple(decoding.greedy(np.asarray(x)[None])[0]) for x in whole["logits"]}) == 3
    for rows, size in (
        (np.array([2, 0]), 4000),
        (np.array([1]), 1000),
        (np.array([2, 1, 1]), 6000),
    ):
        check(run(rows, size), rows)


def test_labels_of_a_transcript():
    config = config_of("finetune_librispeech", "smoke").to_dict()
    head = heads.make(config["head"])
    targets = transcribe.targets(config, head)
    names = transcribe.characters_of(config)
    samples = 16_000
    labels = targets.read({"transcript": "Да, «по-русски»!"}, samples)["labels"]
    assert labels.shape == targets.shapes(samples)["labels"].shape == (26,)
    assert names.decode(labels[labels >= 0]) == "ДА ПОРУССКИ"
    long = targets.read({"transcript": "щ" * 27}, samples)["labels"]
    logits = jnp.zeros((1, 49, len(names)))
    assert jnp.isinf(ctc_losses(logits, jnp.array([49]), jnp.asarray(long)[None], 0))[0]
    with pytest.raises(UserError, match="no transcript"):
        targets.read({"path": "a.wav"}, samples)
    with pytest.raises(UserError, match=f"vocab_size: 9, but .* {len(names)} characters"):
        transcribe.targets(config, heads.Ctc(9))


class Said(list):
    """Transcripts as a source, and as the inputs made of it."""

    uri, bad = "said", {}

    @property
    def utterances(self):
        return self

    @property
    def owner(self):
        return np.arange(len(self))

    @property
    def starts(self):
        return np.zeros(len(self), int)

    def field(self, index, name):
        return {"transcript": self[index]}[name]


def test_error_rates_of_the_best_path_and_of_a_beam_search(tmp_path):
    characters = Characters((*SPECIALS, "|", *"ABC"))
    texts = ["ab c", "cab", "b"]

    def frames_of(text, doubt=()):
        """Logits whose best path is `text`, or nearly so where B is as likely as A."""
        labels = [x for label in characters.encode(text) for x in (label, 0)]
        logits = 8.0 * np.eye(len(characters))[labels]
        for frame in doubt:
            logits[frame, characters.encode("B")[0]] = 8.1
        return {"logits": np.pad(logits, ((0, 3), (0, 0))), "frames": len(labels)}

    said = [frames_of("AB C"), frames_of("CAB", doubt=(2,)), None]
    found = transcribe.score(said, Said(texts), characters=characters, step=320)
    assert found == {"wer": 2 / 4, "cer": 2 / 8, "left_out": 1 / 3}  # CBB for CAB, and nothing
    model = ngrams.train([["AB", "C"], ["CAB"], ["CAB", "C"]] * 3, 2)
    ngrams.write_arpa(model, tmp_path / "lm.arpa")
    found = transcribe.score(
        said[:2],
        Said(texts[:2]),
        transcribe.ScoringConfig(lm=str(tmp_path / "lm.arpa")),
        characters=characters,
        step=320,
    )
    assert found["wer"] == 1 / 3 and found["wer_lm"] == found["cer_lm"] == 0.0
    found = transcribe.score(  # of the weights that are tried, 0 leaves CBB as it is
        said,
        Said(texts),
        transcribe.ScoringConfig(
            lm=str(tmp_path / "lm.arpa"), lm_weight=[0.0, 2.0], word_score=-1.0
        ),
        characters=characters,
        step=320,
    )
    assert (found["lm_weight"], found["word_score"], found["wer_lm"]) == (2.0, -1.0, 1 / 4)


def sounds(*lengths):
    rng = np.random.default_rng(0)
    return Items([{"audio": rng.normal(size=n).astype(np.float32)} for n in lengths])


@pytest.mark.parametrize("convs", [CONVS, CONVS[:-1], (*CONVS, (512, 2, 2))])
def test_long_utterances_are_windows_whose_frames_fit_together(convs):
    """Frames that say where they begin: stitched windows are those of the whole utterance."""
    step = hop(convs)
    assert step in (160, 320, 640)
    source = sounds(9_000, 50_123, 1_000)
    options = dict(seconds=(0.5, 1.0), overlap=0.4)
    train = Utterances(source, **options)
    np.testing.assert_array_equal(train.bucket_of, [1, -1, 0])
    held_out = Utterances(source, like=train, **options)
    rows = np.flatnonzero(held_out.owner == 1)
    assert (held_out.bucket_of >= 0).all() and len(rows) == 5
    assert (held_out.starts % 320 == 0).all() and held_out.lengths[rows].max() == 16_000
    parts, whole = [], normalise(source[1]["audio"])
    for row in rows:
        found = held_out.load(row, held_out.bucket_of[row], None)
        audio, start = found["audio"][: found["length"]], held_out.starts[row]
        np.testing.assert_array_equal(audio, whole[start : start + len(audio)])
        count = frames(len(audio), convs)
        parts.append((start // step, audio[: step * count : step, None]))  # first sample of each
    found = transcribe.stitch(parts)
    np.testing.assert_array_equal(found[:, 0], whole[: step * frames(50_123, convs) : step])


def test_windows_must_fit_the_frames_of_the_model():
    config = config_of("finetune_librispeech", "smoke").to_dict()
    convs = (*CONVS, (16, 2, 2))  # a frame every 640 samples, made of 720
    config["model"]["frontend"] = dict(convs=convs)
    assert transcribe.job(config).score.keywords["step"] == 640
    assert (hop(convs), reach(convs), reach()) == (640, 720, 400)
    _, net = make_model(transcribe.resolve_config(config))
    Utterances(sounds(9_000), seconds=(1.0,), overlap=0.12).check(net)
    for overlap in (0.1, 0.0):  # 14,400 samples apart; no shared frames
        with pytest.raises(UserError, match="a frame every 640 and needs 80"):
            Utterances(sounds(9_000), seconds=(1.0,), overlap=overlap).check(net)


def test_an_utterance_without_a_frame_is_an_empty_transcript():
    config = transcribe.resolve_config(config_of("finetune_librispeech", "smoke").to_dict())
    _, net = make_model(config)
    head = heads.make(config["head"], "head")
    batch = {"audio": jnp.zeros((2, 8_000)), "length": jnp.array([8_000, 5])}
    params = finetune.initialiser(
        net,
        head,
        (),
        {
            "audio": jax.ShapeDtypeStruct((1, 8_000), jnp.float32),
            "length": jax.ShapeDtypeStruct((1,), jnp.int32),
        },
    )(jax.random.key(0))
    found = transcribe.make_predict(net, head)(params, batch)
    np.testing.assert_array_equal(found["frames"], [24, 0])


@pytest.mark.usefixtures("light_compilation")
def test_smoke_run_from_a_pretrained_encoder(tmp_path):
    pretraining = config_of("speech_v2", "smoke")
    pretraining.total_steps = 1
    pretraining.data.eval_split = None
    train.train(pretraining.to_dict(), tmp_path / "a", verbose=False)
    config = config_of("finetune_librispeech", "smoke")
    config.update(total_steps=3, seed=5)
    config.optim.frozen = (transcribe.FRONTEND,)
    state = train.train(
        config.to_dict(), tmp_path / "b", init_from=str(tmp_path / "a"), verbose=False
    )
    lines = read_lines(tmp_path / "b" / FILE)
    assert [line["split"] for line in lines] == ["train"] * 3 + ["test"]
    assert lines[-1]["wer"] >= 0 and lines[-1]["cer"] > 0 and "left_out" not in lines[-1]
    stored = checkpoints.load_params(tmp_path / "a")
    for name in ("conv0", "norm3"):
        for leaf, value in state.params["frontend"][name].items():
            np.testing.assert_array_equal(value, stored["frontend"][name][leaf])
    moved = np.asarray(state.params["encoder"]["blocks"]["up"]["kernel"])
    assert np.any(moved != stored["encoder"]["blocks"]["up"]["kernel"])  # after two of the head
    assert "alibi" in state.params and "mask_embedding" not in state.params  # it is a 2.0 encoder
    vocabulary = Characters.load(tmp_path / "b" / "vocab.json")
    assert vocabulary.names == transcribe.characters_of(config.to_dict()).names


# Updates, peak, time, channels, layerdrop, head alone; conversion spec 1.4, typed from its tables.
RECIPES = {
    "10m": (13e3, 5e-5, 0.65, 0.25, 0.1, 10e3),
    "1h": (13e3, 5e-5, 0.65, 0.25, 0.1, 10e3),
    "10h": (20e3, 5e-5, 0.65, 0.5, 0.05, 10e3),
    "100h": (80e3, 3e-5, 0.65, 0.5, 0.1, 0),
    "960h": (320e3, 1e-4, 0.5, 0.1, 0.1, 0),
    "10m,large": (13e3, 1e-4, 0.65, 0.25, 0.1, 10e3),
    "1h,large": (13e3, 3e-4, 0.75, 0.25, 0.1, 10e3),
    "10h,large": (20e3, 1e-4, 0.75, 0.25, 0.1, 10e3),
    "100h,large": (80e3, 3e-5, 0.5, 0.5, 0.1, 10e3),
    "960h,large": (320e3, 3e-5, 0.5, 0.25, 0.1, 10e3),
}


@pytest.mark.parametrize("variant", RECIPES)
def test_recipes(variant):
    config = config_of("finetune_librispeech", variant)
    check_config(config.to_dict())
    loss = config.loss
    found = (
        config.total_steps,
        config.schedule.peak,
        loss.time_prob,
        loss.channel_prob,
        config.model_overrides.encoder.layerdrop,
        loss.freeze_updates,
    )
    assert found == RECIPES[variant]
    rate = optimizer.make_schedule(20_000, **{**config.schedule.to_dict(), "peak": 5e-5})
    for step, value in (
        (0, 5.0e-7),
        (1000, 2.525e-5),
        (2000, 5e-5),
        (10_000, 5e-5),
        (12_500, 2.364354e-5),
        (15_000, 1.118034e-5),
        (20_000, 2.5e-6),
    ):
        assert float(rate(step)) == pytest.approx(value, rel=1e-5)
    assert config.optim.frozen == (transcribe.FRONTEND,)


# Masks ------------------------------------------------------------------------------------------

OPTIONS = SpecAugmentConfig(time_prob=0.65, time_width=10, channel_prob=0.25, channel_width=16)


def test_masks_depend_on_the_example_and_the_step_alone():
    ids = jnp.array([3, 8, 5], jnp.uint32)
    valid = jnp.arange(50) < jnp.array([50, 20, 35])[:, None]
    tokens = Tokens(jnp.ones((3, 50, 32)), valid)
    fill = jnp.full(32, 7.0)

    def masked(rows, step=0, seed=0):
        part = Tokens(tokens.x[rows], valid[rows])
        key = jax.random.key(1)
        return augment(part, fill, key, step_keys(step, seed), ids[rows], OPTIONS).x

    whole = masked(np.array([0, 1, 2]))
    order = np.array([2, 1])
    np.testing.assert_array_equal(masked(order), whole[order])
    assert (masked(order, step=1) != whole[order]).any()
    assert (masked(order, seed=1) != whole[order]).any()
    assert not ((whole == 7).any(-1) & ~valid).any()  # padding is never masked
    assert ((whole == 7).any(-1)).any(1).all()  # at least one span


def test_encoders_without_an_embedding_get_noise_or_zeros():
    tokens, ids = Tokens(jnp.ones((20, 60, 32)), None), jnp.arange(20, dtype=jnp.uint32)
    options = dataclasses.replace(OPTIONS, channel_prob=0.0)
    noisy, zeros = (
        augment(
            tokens,
            None,
            jax.random.key(2),
            step_keys(),
            ids,
            dataclasses.replace(options, zero_mask=z),
        ).x
        for z in (False, True)
    )
    changed = np.asarray(noisy != 1)
    assert np.std(np.asarray(noisy)[changed]) == pytest.approx(0.01, rel=0.05)
    np.testing.assert_array_equal(zeros, jnp.where(changed, 0, 1))
    options = dataclasses.replace(options, time_prob=0.0)
    same = augment(tokens, None, jax.random.key(2), step_keys(), ids, options)
    assert same.x is tokens.x


def test_a_head_of_another_alphabet_begins_anew(tmp_path):
    """Of the same size or not; checkpoints that do not say their characters keep their heads."""
    config = config_of("finetune_librispeech", "smoke").to_dict()
    targets = transcribe.targets(config, heads.make(config["head"], "head"))
    own = transcribe.characters_of(config).names
    files.write_json(tmp_path / "config.json", {"modality": "speech", "model": config["model"]})
    assert finetune.renewed(targets, str(tmp_path)) == {}
    Characters(own).save(tmp_path / "vocab.json")
    assert finetune.renewed(targets, str(tmp_path)) == {}
    at = len(own) - 1
    Characters([*own[:-1], "Ä"]).save(tmp_path / "vocab.json")
    assert finetune.renewed(targets, str(tmp_path)) == {
        "task": f"output {at} of {tmp_path} is 'Ä', and of this run {own[at]!r}"
    }
    Characters([*own, "Ä"]).save(tmp_path / "vocab.json")
    assert finetune.renewed(targets, str(tmp_path)) == {
        "task": f"output {at + 1} of {tmp_path} is 'Ä', and of this run None"
    }
