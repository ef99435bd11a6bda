"""wav2vec 2.0 and HuBERT: their losses against numpy and transformers, labels, and in the loop."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from configs_for_tests import (
    Items,
    assert_close,
    config_of,
    losses_whole_and_in_parts,
    quiet,
    run_steps,
)

import data2vec_jax
from data2vec_jax import cluster, masking
from data2vec_jax.convert import hf, ours, tables
from data2vec_jax.convert.tables import CONV1D, Change, Row, linear, norm
from data2vec_jax.core.errors import UserError
from data2vec_jax.core.trees import flatten
from data2vec_jax.data import fbank
from data2vec_jax.data.frame_labels import FrameLabels
from data2vec_jax.data.sources import open_source
from data2vec_jax.metrics.collapse import CollapseConfig, CollapseMonitor
from data2vec_jax.modalities.speech.codec import CODEC
from data2vec_jax.modalities.speech.data import SpeechExamples
from data2vec_jax.models import pretext
from data2vec_jax.objectives import mlm, wav2vec2
from data2vec_jax.tasks import pretrain

CONVS = ((16, 10, 5), (16, 3, 2), (16, 3, 2), (16, 3, 2), (16, 3, 2), (16, 2, 2), (16, 2, 2))


# Against numpy ------------------------------------------------------------------------------------


def cosine(a, b):
    return a @ b / max(np.linalg.norm(a) * np.linalg.norm(b), 1e-8)


def test_contrastive_logits_are_numpys():
    random = np.random.default_rng(0)
    c, q = random.normal(size=(2, 2, 6, 8))
    codes = random.integers(2, size=(2, 6, 2))
    negatives = random.integers(6, size=(2, 6, 5))
    found = wav2vec2.contrastive_logits(*map(jnp.asarray, (c, q, codes, negatives)), 0.1)
    left_out = 0
    for b, n in np.ndindex(2, 6):
        expected = [cosine(c[b, n], q[b, n]) / 0.1]
        for k in negatives[b, n]:
            same = (codes[b, n] == codes[b, k]).all()
            left_out += same
            expected.append(-np.inf if same else cosine(c[b, n], q[b, k]) / 0.1)
        np.testing.assert_allclose(found[b, n], expected, rtol=1e-4, atol=1e-5)
    assert 0 < left_out < negatives.size


def test_negatives_are_other_masked_frames_of_the_row():
    weights = np.array([[1.0] * 7, [1.0] * 3 + [0.0] * 4])
    found = np.asarray(wav2vec2.draw_negatives(jax.random.key(1), jnp.asarray(weights), 3_000))
    assert found.shape == (2, 7, 3_000)
    for row, count in enumerate((7, 3)):
        for own in range(count):
            drawn = np.bincount(found[row, own], minlength=7) / 3_000
            assert drawn[own] == 0 and (drawn[count:] == 0).all()
            others = np.delete(drawn[:count], own)
            np.testing.assert_allclose(others, 1 / (count - 1), atol=0.05)


def test_anchors():
    """The numbers of the specification."""
    zero, random = jnp.zeros((1, 200, 8)), np.random.default_rng(0)
    q = jnp.asarray(random.normal(size=(1, 200, 8)), jnp.float32)
    codes = jnp.arange(200).reshape(1, 200, 1)
    negatives = wav2vec2.draw_negatives(jax.random.key(0), jnp.ones((1, 200)), 100)
    logits = wav2vec2.contrastive_logits(zero, q, codes, negatives, 0.1)
    loss = jax.nn.logsumexp(logits, -1) - logits[..., 0]
    np.testing.assert_allclose(loss, 4.61512, atol=1e-5)

    uniform, one = jnp.full((1, 4, 2, 320), 1 / 320), jax.nn.one_hot(jnp.zeros((1, 4, 2)), 320)
    diversity = lambda p: (640 - wav2vec2.perplexity(p, jnp.ones((1, 4)))) / 640  # noqa: E731
    assert float(diversity(uniform)) == pytest.approx(3.2e-5, abs=2e-6)
    assert float(diversity(one)) == pytest.approx(0.996875, abs=1e-6)

    temperature = wav2vec2.Config().temperature
    assert float(temperature(0)) == 2.0
    assert float(temperature(100_000)) == pytest.approx(1.2131, abs=1e-4)
    assert float(temperature(277_258)) > 0.5 and float(temperature(277_259)) == 0.5


def size_of(tree):
    return sum(x.size for x in jax.tree.leaves(tree))


# Recipe -> updates, warm-up, peak, hours, masked frames of 781, parameters: objective's, all.
PAPERS = {
    "speech_wav2vec2": (400_000, 32_000, 5e-4, 93 / 60, 351, 672_896, 95_044_608),
    "speech_hubert": (400_000, 32_000, 5e-4, 47 / 60, 406, 223_488, 94_595_200),
}


@pytest.mark.parametrize("name", PAPERS)
def test_recipes_of_papers(name):
    steps, warmup, peak, hours, masked, of_pretext, of_all = PAPERS[name]
    config = config_of(name, "paper").to_dict()
    assert config["total_steps"] == steps and config["schedule"]["peak"] == peak
    assert round(config["schedule"]["warmup"] * steps) == warmup
    audio = config["data"]["batch_size"] * config["examples"]["crops"][-1] / 3600
    assert 0.95 * hours < audio <= hours
    mask = {k: v for k, v in config["mask"].items() if k != "kind"}
    assert masking.make("spans", 781, **mask).count(781) == masked
    for variant in ("like", "paper"):
        task = pretrain.abstract_task(config_of(name, variant).to_dict())
        params = jax.eval_shape(task.init, jax.random.key(0))
        assert task.averaged == () and "head" not in params
        reserved = 4 if (name, variant) == ("speech_hubert", "like") else 0  # not in `like`
        assert size_of(params["pretext"]) == of_pretext - 256 * reserved
    assert size_of(params) == of_all
    assert task.shapes[-1]["audio"].shape[1] == 250_000
    if name == "speech_hubert":  # the specification's count is with 504 classes
        assert of_all + 400 * 256 == 94_697_600
        assert task.shapes[-1]["labels"].shape[1] == 781


def test_first_positions_are_of_the_paper():
    config = config_of("speech_wav2vec2", "paper").to_dict()
    config["model"]["frontend"]["convs"] = CONVS
    config["model"]["encoder"]["depth"] = 1
    config["examples"]["crops"] = (1.0,)
    params = jax.jit(pretrain.abstract_task(config).init)(jax.random.key(0))
    conv = params["positions"]["conv"]
    assert float(conv["kernel"].std()) == pytest.approx(2 / math.sqrt(128 * 768), rel=0.01)
    assert not conv["bias"].any()
    quantiser = params["pretext"]
    assert float(quantiser["logits"]["kernel"].std()) == pytest.approx(1, rel=0.03)
    assert quantiser["codes"].min() >= 0 and 0.99 < quantiser["codes"].max() < 1


# Against transformers -----------------------------------------------------------------------------


def made(config):
    """(model, objective) of a config."""
    modality, model = pretrain.make_model(config)
    return model, pretrain.make_objective(config, modality, model)[0]


def wav2vec2_rows():
    """Names of transformers' encoder of wav2vec 2.0 and HuBERT, with a group norm."""
    p, g = "feature_extractor.conv_layers", "encoder.pos_conv_embed.conv.parametrizations.weight"
    skipped = ("pos_conv_embed", "conv_layers.{i}.layer_norm")
    rows = [r for r in hf.speech_table({}).rows if not any(s in str(r.theirs) for s in skipped)]
    return [
        *[r for r in rows if not r.ours.startswith(("adapter", "task"))],
        *norm(f"{p}.0.layer_norm", "frontend/time_norm"),
        Row(f"{g}.original0", "positions/conv/gain", CONV1D),
        Row(f"{g}.original1", "positions/conv/kernel", CONV1D),
        Row("encoder.pos_conv_embed.conv.bias", "positions/conv/bias"),
    ]


OF_THEIRS = dict(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=64,
    hidden_dropout=0.0,
    attention_dropout=0.0,
    activation_dropout=0.0,
    feat_proj_dropout=0.0,
    layerdrop=0.0,
    mask_feature_prob=0.0,
    conv_dim=[16] * 7,
    num_conv_pos_embeddings=16,
    num_conv_pos_embedding_groups=4,
)


def of_ours(name):
    """The smoke recipe with the network of `OF_THEIRS`."""
    config = quiet(config_of(name))
    config["model"]["frontend"] |= dict(norm="group")
    config["model"]["positions"] = dict(depth=1, kernel=16, groups=4, norm="weight")
    return config


def randomised(torch, net):
    """Weights and biases at which all of them matter."""
    torch.manual_seed(0)
    for name, weights in net.named_parameters():
        scale = 0.3 if "pos_conv" in name or "feature_extractor" in name else 0.2
        weights.data.normal_(0.0, scale)
        if "norm" in name and name.endswith("weight"):
            weights.data += 1.0
        if name.endswith("original0"):
            weights.data.abs_().add_(0.5)
    return net


def same_gradients(own, expected):
    own, expected = flatten(jax.device_get(own)), flatten(expected)
    assert own.keys() == expected.keys()
    for name in own:
        a, b = own[name], expected[name]
        np.testing.assert_allclose(a, b, atol=1e-4 * max(np.abs(b).max(), 1), err_msg=name)
        assert np.abs(b).max() > 1e-4, name


def test_loss_and_gradients_are_transformers(monkeypatch):
    """wav2vec 2.0 with the same weights, masks, negatives and noise; theirs has no penalty."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    settings = transformers.Wav2Vec2Config(
        **OF_THEIRS,
        feat_quantizer_dropout=0.0,
        num_codevectors_per_group=6,
        num_codevector_groups=2,
        codevector_dim=12,
        proj_codevector_dim=20,
        num_negatives=7,
    )
    net = randomised(torch, transformers.Wav2Vec2ForPreTraining(settings).train())
    net.set_gumbel_temperature(1.5)

    random = np.random.default_rng(0)
    audio = random.normal(size=(2, 8_000)).astype(np.float32)  # 24 frames
    mask = np.array([random.permutation(24) < 11 for _ in range(2)])
    weights = jnp.ones((2, 11))
    negatives = np.asarray(wav2vec2.draw_negatives(jax.random.key(5), weights, 7))
    key = jax.random.key(7)
    noise = np.asarray(jax.random.gumbel(jax.random.split(key, 3)[1], (2, 11, 2, 6)))

    # Theirs: indices into all frames of the batch, and noise for all of them.
    frames = np.stack([np.flatnonzero(row) for row in mask])
    of_frames = np.zeros((2, 24, 7), int)
    of_frames[mask] = np.stack([frames[b][negatives[b]] + 24 * b for b in range(2)]).reshape(-1, 7)
    everywhere = np.zeros((2, 24, 2, 6), np.float32)
    everywhere[mask] = noise.reshape(-1, 2, 6)

    def straight_through(logits, tau, hard):
        assert hard
        noisy = logits + torch.tensor(everywhere).reshape(logits.shape)
        soft = (noisy / tau).softmax(-1)
        one = torch.nn.functional.one_hot(noisy.argmax(-1), logits.shape[-1])
        return one + (soft - soft.detach())

    monkeypatch.setattr(torch.nn.functional, "gumbel_softmax", straight_through)
    theirs = net(
        torch.tensor(audio),
        mask_time_indices=torch.tensor(mask),
        sampled_negative_indices=torch.tensor(of_frames),
    )
    theirs.loss.backward()

    config = of_ours("speech_wav2vec2")
    config["objective"] |= dict(
        quantiser=dict(codes=6, code_size=12, size=20), penalty_weight=0.0, negatives=7
    )
    _, objective = made(config)
    codes = Change(lambda x: x[0].reshape(2, 6, 6), lambda x: [x.reshape(1, 12, 6)])
    rows = [
        *tables.below(tables.Table(wav2vec2_rows(), {}), "wav2vec2."),
        *linear("project_hid", "pretext/output"),
        *linear("project_q", "pretext/target"),
        *linear("quantizer.weight_proj", "pretext/logits"),
        Row("quantizer.codevectors", "pretext/codes", codes),
    ]
    weights = {n: p.detach().numpy() for n, p in net.named_parameters()}
    gradients = {n: p.grad.numpy() for n, p in net.named_parameters()}
    params, expected = (tables.read(tables.Table(rows, {}), x) for x in (weights, gradients))
    batch = {"audio": jnp.asarray(audio)}
    step = round(math.log(1.5 / 2) / math.log(0.999995))  # where the temperature is 1.5

    def total(params):
        given = dict(step=step, negatives=jnp.asarray(negatives))
        found = objective.forward_with_masks(
            params, {}, batch, batch, jnp.asarray(mask), 11, key, **given
        )
        return found.total, found

    (loss, found), own = jax.jit(jax.value_and_grad(total, has_aux=True))(params)
    assert float(found.count) == 22
    assert float(loss) == pytest.approx(theirs.loss.item(), rel=1e-5)
    contrastive, diversity = (float(found.parts[x]) for x in ("contrastive", "diversity"))
    assert contrastive == pytest.approx(theirs.contrastive_loss.item(), rel=1e-5)
    assert diversity == pytest.approx(0.1 * theirs.diversity_loss.item(), rel=1e-5)
    same_gradients(own, expected)


def test_hubert_is_transformers_encoder_with_a_head():
    """The loss written in PyTorch, with the penalty behind the factor on the gradient."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    net = transformers.HubertModel(transformers.HubertConfig(**OF_THEIRS)).train()
    net.head, net.classes = torch.nn.Linear(32, 20), torch.nn.Embedding(10 + 4, 20)
    randomised(torch, net)

    class Extractor(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, audio):
            f = self.inner(audio)
            self.raw = 0.1 * f + 0.9 * f.detach()
            return self.raw

    random = np.random.default_rng(0)
    audio = random.normal(size=(2, 8_000)).astype(np.float32)  # 24 frames
    mask = np.array([random.permutation(24) < 11 for _ in range(2)])
    labels = random.integers(10, size=(2, 24))
    rows = [
        *wav2vec2_rows(),
        *linear("head", "pretext/output"),
        Row("classes.weight", "pretext/classes"),
    ]
    params = tables.read(
        tables.Table(rows, {}), {n: p.detach().numpy() for n, p in net.named_parameters()}
    )
    net.feature_extractor = Extractor(net.feature_extractor)
    h = net(torch.tensor(audio), mask_time_indices=torch.tensor(mask)).last_hidden_state
    z = torch.nn.functional.cosine_similarity(
        net.head(h)[torch.tensor(mask)][:, None], net.classes.weight[None], dim=-1
    )
    entropy = torch.nn.functional.cross_entropy(
        z / 0.1, torch.tensor(labels[mask] + 4), reduction="sum"
    )
    loss = entropy + 22 * 10 * net.feature_extractor.raw.square().mean()
    loss.backward()
    gradients = {
        n.replace("extractor.inner", "extractor"): p.grad.numpy() for n, p in net.named_parameters()
    }

    config = of_ours("speech_hubert")
    config["model"]["frontend"] |= dict(gradient=0.1)
    config["objective"] |= dict(clusters=10, reserved=4, size=20)
    _, objective = made(config)
    batch = {"audio": jnp.asarray(audio), "labels": jnp.asarray(labels)}

    def total(params):
        found = objective.forward_with_masks(params, {}, batch, batch, jnp.asarray(mask), 11, None)
        return found.total, found.parts

    (own, parts), found = jax.jit(jax.value_and_grad(total, has_aux=True))(params)
    assert float(own) == pytest.approx(loss.item(), rel=1e-5)
    assert float(parts["reconstruction"]) == pytest.approx(entropy.item(), rel=1e-5)
    same_gradients(found, tables.read(tables.Table(rows, {}), gradients))


@pytest.mark.parametrize(("classes", "loss"), [(104, 4.64439), (504, 6.22258)])
def test_anchors_of_hubert(classes, loss):
    config = config_of("speech_hubert").to_dict()
    config["objective"] |= dict(clusters=classes - 4, reserved=4)
    model = pretrain.make_model(config)[1]
    params = {
        "output": {"kernel": jnp.zeros((32, 32)), "bias": jnp.zeros(32)},
        "classes": jax.random.uniform(jax.random.key(0), (classes, 32)),
    }
    encoded, places = type("", (), {"x": jnp.ones((1, 5, 32))}), jnp.arange(5)[None]
    inputs = pretext.Inputs(encoded, None, places)
    logits = model.pretext.apply({"params": params}, inputs)
    found = mlm.losses(logits, jnp.full((1, 5), classes - 1))
    np.testing.assert_allclose(found, loss, atol=1e-5)
    # Cosines: scaled vectors have the same logits.
    params["output"]["bias"] = jax.random.normal(jax.random.key(1), (32,))
    one = model.pretext.apply({"params": params}, inputs)
    params["classes"] *= 3.0
    np.testing.assert_allclose(model.pretext.apply({"params": params}, inputs), one, atol=1e-5)
    assert float(jnp.abs(one).max()) <= 10.001 and float(one.std()) > 0.1


# Labels -------------------------------------------------------------------------------------------


def waves(count=5, seconds=1.0):
    random = np.random.default_rng(0)
    sizes = [round(16_000 * seconds) + 3_000 * i + 17 * i for i in range(count)]
    return [{"audio": random.normal(0, 0.1, n).astype(np.float32)} for n in sizes]


def test_mfcc_are_kaldis():
    knf = pytest.importorskip("kaldi_native_fbank")
    options = knf.MfccOptions()
    options.frame_opts.dither = 0.0
    options.frame_opts.snip_edges = True
    options.use_energy = False
    source = open_source("samples:speech", "test", codec=CODEC)
    audio = source[0]["audio"][:32_000]
    theirs = knf.OnlineMfcc(options)
    theirs.accept_waveform(16_000, audio.tolist())
    theirs.input_finished()
    theirs = np.stack([theirs.get_frame(i) for i in range(theirs.num_frames_ready)])
    found = fbank.mfcc(audio)
    assert found.shape == theirs.shape == (198, 13)
    np.testing.assert_allclose(found, theirs, atol=2e-2)
    assert np.abs(found - theirs).mean() < 1e-3 and theirs.std() > 5


def test_differences():
    x = np.random.default_rng(0).normal(size=(9, 3))
    y = fbank.with_differences(x)
    assert y.shape == (9, 9)
    np.testing.assert_array_equal(y[:, :3], x)
    for column in (0, 3):
        for t in range(9):
            at = lambda k: y[np.clip(t + k, 0, 8), column : column + 3]  # noqa: B023, E731
            slope = sum(k * (at(k) - at(-k)) for k in (1, 2)) / 10
            np.testing.assert_allclose(y[t, column + 3 : column + 6], slope, atol=1e-12)
    line = fbank.with_differences(np.arange(9.0)[:, None])
    np.testing.assert_allclose(line[2:-2, 1], 1)


def written(folder, labels, rate, source, clusters=50):
    """A folder of labels of a source."""
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "train.labels.npy", np.concatenate(labels).astype(np.int16))
    np.save(folder / "train.offsets.npy", np.cumsum([0, *map(len, labels)]))
    order = f"{len(source)} {source.digest()}"
    about = dict(rate=rate, clusters=clusters, splits={"train": dict(order=order)})
    (folder / "labels.json").write_text(json.dumps(about))
    return folder


@pytest.mark.parametrize("rate", [50, 100])
def test_labels_are_cut_with_the_crop(tmp_path, rate):
    """Audio that tells where it is from: each sample is its number."""
    sizes = (40_000, 33_333, 20_000)
    source = Items([{"audio": np.arange(n, dtype=np.float32)} for n in sizes])
    shift = 16_000 // rate
    labels = [np.arange((n - 400) // shift + 1) + 200 * i for i, n in enumerate(sizes)]
    folder = written(tmp_path / "labels", labels, rate, source)
    examples = SpeechExamples(source, crops=(1.0,), labels=str(folder))
    assert examples.layout.shapes[0]["labels"].shape == (49,)
    rng = np.random.default_rng(1)
    for index in (0, 1, 2):
        for _ in range(5):
            found = examples.load(index, 0, rng)
            # The crop's first sample, by its place in the normalised ramp.
            x, n = found["audio"], sizes[index]
            start = round(x[0] * math.sqrt((n**2 - 1) / 12) + (n - 1) / 2)
            first = round(start / 16_000 * rate)
            expected = first + np.arange(49) * (rate // 50)
            expected = np.minimum(expected, len(labels[index]) - 1) + 200 * index
            np.testing.assert_array_equal(found["labels"], expected)


def test_wrong_labels_are_named(tmp_path):
    source = Items(waves())
    labels = [np.zeros(50)] * 5
    folder = written(tmp_path / "labels", labels, 50, source)
    assert FrameLabels(folder, source).crop(1, 0.0, 3, 0.02).tolist() == [0, 0, 0]
    with pytest.raises(UserError, match="of other examples"):
        FrameLabels(folder, Items(waves(4)))
    with pytest.raises(UserError, match="no labels of the split 'test'"):
        FrameLabels(folder, Items(waves(), split="test"))
    np.save(folder / "train.labels.npy", np.zeros(249, np.int16))
    with pytest.raises(UserError, match="249 labels of 'train' are not all"):
        FrameLabels(folder, source)
    with pytest.raises(UserError, match=r"nowhere: no labels; `python -m data2vec_jax\.cluster`"):
        FrameLabels(tmp_path / "nowhere", source)


def test_clusters_go_on_where_they_stopped(tmp_path, monkeypatch):
    """Nearest centroids by brute force; a stopped command's labels are those of a whole one."""
    pytest.importorskip("sklearn")
    sources = [Items(waves(7)), Items(waves(3), split="dev")]
    for source in sources:
        source.codec = CODEC
    made = dict(rate=100.0, clusters=4, share=0.6, seed=0, features="mfcc")
    monkeypatch.setattr(cluster, "PART", 2)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    cluster.cluster(whole, sources, made, cluster.of_mfcc)

    saved, save = [], cluster.save

    def stopping(path, array):
        if len(saved) == 3:
            raise KeyboardInterrupt
        saved.append(path.name)
        save(path, array)

    monkeypatch.setattr(cluster, "save", stopping)
    with pytest.raises(KeyboardInterrupt):
        cluster.cluster(parts, sources[:1], made, cluster.of_mfcc)
    assert saved == ["centroids.npy", "0.npy", "2.npy"]
    monkeypatch.setattr(cluster, "save", save)
    monkeypatch.setattr(cluster, "fit", None)  # is not done again
    read = []
    counting = lambda audio: read.append(1) or cluster.of_mfcc(audio)  # noqa: E731
    cluster.cluster(parts, sources, made, counting)
    assert len(read) == 3 + 3  # of the first split those of the parts that were missing
    for name in ("train.labels.npy", "dev.labels.npy", "dev.offsets.npy", "labels.json"):
        assert (parts / name).read_bytes() == (whole / name).read_bytes(), name
    assert not list(parts.glob("*.parts"))

    labels = FrameLabels(whole, sources[0])
    centroids = np.load(whole / "centroids.npy")
    for index in (0, 6):
        x = cluster.of_mfcc(sources[0][index]["audio"])
        nearest = ((x[:, None] - centroids) ** 2).sum(-1).argmin(-1)
        np.testing.assert_array_equal(labels.crop(index, 0.0, len(x), 0.01), nearest)
    assert len(np.unique(nearest)) > 1
    other = Items(waves(6))  # of the same split, and other examples
    other.codec = CODEC
    with pytest.raises(UserError, match="its centroids were fitted to other examples of 'train'"):
        cluster.cluster(whole, [other], made, cluster.of_mfcc)
    with pytest.raises(UserError, match="made otherwise"):
        cluster.cluster(whole, sources, made | dict(clusters=5), cluster.of_mfcc)


def test_shipped_labels_are_of_the_samples():
    source = open_source("samples:speech", "train", codec=CODEC)
    examples = SpeechExamples(source, crops=(2.0,), labels="samples")
    assert (examples.labels.rate, examples.labels.clusters) == (100, 32)
    audio = source[3]["audio"]
    centroids = np.load(examples.labels.file.with_name("centroids.npy"))
    expected = cluster.nearest_centroid(cluster.of_mfcc(audio), centroids)
    found = examples.labels.crop(3, 0.0, len(expected), 0.01)
    assert (found == expected).mean() > 0.999 and len(np.unique(found)) > 20


# In the loop --------------------------------------------------------------------------------------


def small(name):
    """The smoke recipe on log-mel frames, which compiles sooner: short rows, one block."""
    config = quiet(config_of(name))
    config["model"]["frontend"] = dict(kind="mel")
    config["model"]["positions"] = dict(depth=1, width=10, groups=8)
    config["model"]["encoder"]["depth"] = 1
    config["examples"]["crops"] = (1.0,)
    return config


@pytest.mark.usefixtures("light_compilation")
@pytest.mark.parametrize(
    ("name", "shape", "parts"), [("speech_wav2vec2", (2, 1), 1), ("speech_hubert", (2, 2), 2)]
)
def test_devices_and_micro_batches_change_nothing(name, shape, parts):
    config = small(name)
    params, scalars, run = run_steps(config, (1, 1))
    other, found, _ = run_steps(config | {"accumulate": parts}, shape)
    for one, two in zip(scalars, found, strict=True):
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-5)
    assert_close(params, other, 2e-4)
    assert run.abstract.teacher == {} and "pretext" in params
    last = scalars[1]
    assert {"accuracy", "pred_std", "masked_fraction", "feature_rank"} <= last.keys()
    assert not {"ema_decay", "target_std"} & last.keys() and 0 <= last["accuracy"] <= 1
    if name == "speech_wav2vec2":
        assert 1 < last["code_perplexity"] <= 32 and 1 < last["prob_perplexity"] <= 32
        assert last["temperature"] == pytest.approx(2 * 0.999995)
        # Log-mel frames are not learned, so that there is no penalty.
        diversity = 0.1 * (32 - last["prob_perplexity"]) / 32
        assert last["loss"] == pytest.approx(last["contrastive"] + diversity, rel=1e-5)
    warnings = CollapseMonitor(CollapseConfig(**config["collapse"])).check(2, last)
    assert not warnings, warnings


def test_a_run_resumes_and_is_left_behind(tmp_path, monkeypatch):
    """A run in two parts equals one; its blocks have labels; `load` leaves the quantiser behind."""
    config = small("speech_wav2vec2")
    losses = losses_whole_and_in_parts(config, tmp_path, monkeypatch)
    assert losses[0] == losses[1] and [step for step, _ in losses[0]] == [1, 2, 3, 4]
    checkpoint = ours.open_checkpoint(tmp_path / "whole")
    assert any(name.startswith("pretext/") for name in checkpoint.unused)
    loaded = data2vec_jax.load(tmp_path / "whole")
    audio = np.random.default_rng(0).normal(size=8_000 + 480).astype(np.float32)
    audio = (audio - audio.mean()) / audio.std()
    states = loaded(audio[None, :8_000]).hidden_states

    features, rate = cluster.of_block(str(tmp_path / "whole"), 1)
    assert rate == 50
    found = features(audio[:8_000])  # one piece
    whole = np.asarray(states[-1][0])
    assert found.shape == whole.shape
    # The waveform is normalised again; log-mel frames without their mean know nothing of its scale.
    np.testing.assert_allclose(found, whole, atol=1e-3)
    longer = features(audio)  # two pieces, and a frame more
    assert longer.shape == (26, 32) and np.isfinite(longer).all()
    newest = tmp_path / "whole/checkpoints/4/manifest/data.json"
    for place in ("whole", "whole/checkpoints/4"):
        assert cluster.newest(f"{tmp_path}/{place}").endswith(
            f", update 4, {json.loads(newest.read_text())['sha256']}"
        )
    with pytest.raises(UserError, match="--block=2: the encoder has 1 blocks"):
        cluster.of_block(str(tmp_path / "whole"), 2)


# What users meet ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("speech_wav2vec2", dict(accumulate=2), "config.accumulate: .*diversity_weight.* are stat"),
        ("speech_wav2vec2", dict(averaged=("^encoder/",)), "config.averaged: the objective has no"),
        ("vision_v1", dict(objective=dict(name="wav2vec2")), "wav2vec2 quantises frames"),
        (
            "speech_v1",
            dict(objective=dict(name="hubert", clusters=9)),
            "config.examples.labels: hu",
        ),
        (
            "speech_wav2vec2",
            dict(objective=dict(name="wav2vec2", quantiser=dict(code_size=5))),
            "config.objective.quantiser.code_size: 5 is no multiple",
        ),
        (
            "speech_wav2vec2",
            dict(objective=dict(name="wav2vec2", quantiser=dict(cods=5))),
            "config.objective.quantiser.cods: no such option; did you mean 'codes'",
        ),
        ("speech_hubert", dict(objective=dict(name="hubert", clusters=9)), "clusters: 9, but"),
    ],
)
def test_mistakes_are_named(name, changes, message):
    config = config_of(name).to_dict()
    config |= changes
    if name in ("vision_v1", "speech_v1"):
        config |= dict(averaged=(), ema={})
    with pytest.raises(UserError, match=message) as refusal:
        pretrain.make(config) if "but" in message else pretrain.abstract_task(config)
    assert "\n" not in str(refusal.value)
