"""Fine-tuning for classes: recorded losses, the way from a checkpoint to scores, adapters alone."""

from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from configs_for_tests import Items, config_of

from data2vec_jax import train
from data2vec_jax.convert import hf, loaded, ours
from data2vec_jax.core import checkpoints, optimizer, sharding
from data2vec_jax.core.errors import UserError
from data2vec_jax.core.run import Run
from data2vec_jax.core.trees import flatten
from data2vec_jax.data.sources import open_source
from data2vec_jax.metrics.writer import FILE, read_lines
from data2vec_jax.modalities.contract import Layout
from data2vec_jax.modalities.speech.inputs import Utterances
from data2vec_jax.modalities.text.codec import CODEC as TEXT
from data2vec_jax.modalities.text.inputs import Rows, row_of
from data2vec_jax.models import heads
from data2vec_jax.tasks import classify, finetune, pretrain
from data2vec_jax.tasks.registry import check_config

pytestmark = pytest.mark.xdist_group("classify")  # its fixtures are made once

GOLDENS = Path(__file__).parent / "goldens/checkpoints"
LOSSES = [
    ("Data2VecTextForSequenceClassification", "nomask"),
    ("Data2VecTextForSequenceClassification", "mask"),
    ("Data2VecTextForSequenceClassification__regression", "nomask"),
    ("Data2VecTextForTokenClassification", "nomask"),
    ("Data2VecVisionForImageClassification", "base"),
    ("Data2VecAudioForSequenceClassification", "nomask"),
]
INPUTS = {"input_values": "audio", "input_ids": "tokens", "pixel_values": "image"}


@pytest.mark.parametrize(("name", "run"), LOSSES)
def test_recorded_losses_through_the_task(name, run):
    with np.load(GOLDENS / name / "golden.npz") as file:
        golden = {
            key.removeprefix(f"in_{run}/"): file[key]
            for key in file.files
            if key.startswith((f"in_{run}/", f"{run}/"))
        }
    checkpoint = loaded.load(GOLDENS / name)
    model, head = ours.model_of(checkpoint.config), heads.make(checkpoint.config["head"])
    batch = {INPUTS[k]: jnp.asarray(v) for k, v in golden.items() if k in INPUTS}
    if "image" in batch:
        batch["image"] = jnp.moveaxis(batch["image"], 1, -1)
    if "attention_mask" in golden:
        tokens, seen = batch["tokens"], golden["attention_mask"] == 1
        batch["tokens"] = jnp.where(seen, tokens, model.embeddings.pad)
    batch["label"] = jnp.asarray(golden["labels"])
    batch["example_id"] = jnp.arange(len(golden["labels"]), dtype=jnp.uint32)
    loss = jax.jit(lambda p: classify.make_loss(model, head)(p, {}, batch, None)[:2])
    total, count = loss(checkpoint.params)
    np.testing.assert_allclose(total / count, golden[f"{run}/loss"], rtol=1e-4)


# From a checkpoint to scores ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory, light_compilation):
    """A workdir of one step of pretraining."""
    folder = tmp_path_factory.mktemp("pretrained")
    config = config_of("text_v1", "smoke", total_steps=1, eval_every=0)
    config.examples.lengths = (32,)
    train.train(config.to_dict(), folder, verbose=False)
    return folder


def leaves(tree):
    return {k: np.asarray(v) for k, v in flatten(jax.device_get(tree)).items()}


@pytest.mark.parametrize("dora", [True, False])
def test_adapters_learn_alone_from_a_checkpoint(pretrained, tmp_path, capsys, dora):
    config = config_of("finetune_text", "smoke", total_steps=2)
    config.examples.update(lengths=(32,), vocab_size=2_000)
    config.data.update(share=0.02, eval_split="test" if dora else "")
    config.adapter = dict(targets=("qkv/(query|value)$", "up$"), rank=2, alpha=4, dora=dora)
    state = train.train(config.to_dict(), tmp_path, init_from=str(pretrained))
    said = capsys.readouterr().err
    assert "arrays never change" in said and "parameters of adapters learn" in said
    before, after = leaves(checkpoints.load_params(pretrained)), leaves(state.params)
    kept = [path for path in after if not path.startswith(("adapters/", "task/"))]
    assert kept and not any(path.startswith("head/") for path in after)
    for path in kept:
        np.testing.assert_array_equal(after[path], before[path], err_msg=path)
    learned = [path for path in after if path.startswith("adapters/")]
    assert {path.rpartition("/")[2] for path in learned} == (
        {"a", "b", "magnitude"} if dora else {"a", "b"}
    )
    assert all(np.any(after[p]) for p in learned if p.endswith("/b"))
    moments = {"/".join(map(str, p)) for p, x in jax.tree.leaves_with_path(state.opt_state)}
    assert not any("embeddings" in name for name in moments)  # frozen arrays have none
    if dora:  # lengths of the checkpoint's columns, but for two small steps
        kernel = before["encoder/blocks/up/kernel"]
        found = after["adapters/encoder/blocks/up/magnitude"]
        np.testing.assert_allclose(found, np.linalg.norm(kernel, axis=1), atol=2e-3)
        (line,) = [x for x in read_lines(tmp_path / FILE) if x["split"] == "test"]
        assert line["step"] == 2 and 0 <= line["accuracy"] <= 1 and line["loss"] > 3
        assert (tmp_path / "tokenizer").is_dir() and (tmp_path / "labels.json").is_file()
        names = open_source("samples:glosses", "train", codec=TEXT).label_names
        told = hf.described(ours.open_checkpoint(tmp_path).config, "data2vec-text", {})
        assert told["id2label"] == {str(i): name for i, name in enumerate(names)}
        assert [told["label2id"][name] for name in names] == list(range(len(names)))
        again = train.train(
            config.to_dict(), tmp_path, init_from=str(pretrained)
        )  # nothing is left
        np.testing.assert_array_equal(leaves(again.params)[learned[0]], after[learned[0]])


def test_a_linear_probe_equals_batch_norm_and_a_linear_layer_of_torch():
    torch = pytest.importorskip("torch")
    config = config_of("finetune_imagenet", "demo_mae", total_steps=3, eval_every=0)
    config.model.width = 32
    config.model.encoder.update(depth=1, mlp=32)
    config.data.update(batch_size=16, eval_split="")
    config.head.pooling, config.optim.kind = "class+mean", "sgd"
    config.schedule = dict(kind="constant", peak=0.5)
    config = config.to_dict()
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        task = classify.make(config)
        run = Run(config, task, mesh)
        state = run.init(seed=4)
        first = jax.tree.map(np.asarray, state.params)
        head, (_, model) = heads.make(config["head"]), pretrain.make_model(config)
        encode = jax.jit(lambda p, batch: finetune.encode(model, head, p, batch).x)
        norm, layer = torch.nn.BatchNorm1d(64, eps=1e-6, affine=False), torch.nn.Linear(64, 10)
        with torch.no_grad():
            layer.weight.copy_(torch.tensor(first["task"]["output"]["kernel"].T))
            layer.bias.zero_()
        sgd = torch.optim.SGD(layer.parameters(), lr=0.5, momentum=0.9)

        def vectors(batch):
            x = encode(first, batch)
            return torch.tensor(np.concatenate([x[:, 0], x[:, 1:].mean(1)], -1))

        for _, batch in zip(range(3), task.data(0), strict=False):
            state, scalars = run.program(batch)(state, batch)
            sgd.zero_grad()
            label = torch.tensor(np.asarray(batch["label"])).long()
            loss = torch.nn.functional.cross_entropy(layer(norm(vectors(batch))), label)
            loss.backward()
            sgd.step()
            np.testing.assert_allclose(scalars["loss"], loss.item(), rtol=1e-4)
        found = jax.tree.map(np.asarray, state.params)
        logits = jax.jit(classify.make_predict(model, head))(state.params, batch)["logits"]
    learned = found.pop("task")
    jax.tree.map(np.testing.assert_array_equal, found, {k: first[k] for k in found})
    np.testing.assert_allclose(learned["running_mean"], norm.running_mean, atol=1e-5)
    np.testing.assert_allclose(learned["running_variance"], norm.running_var, rtol=1e-4)
    np.testing.assert_allclose(learned["output"]["kernel"].T, layer.weight.detach(), atol=1e-4)
    with torch.no_grad():
        np.testing.assert_allclose(logits, layer(norm.eval()(vectors(batch))), atol=2e-3)


@pytest.mark.parametrize(
    ("variant", "steps", "peak", "rows", "warmup"),
    [
        ("base_mae", 90 * 78, 6.4, 16_384, 780),
        ("large_mae", 50 * 78, 6.4, 16_384, 780),
        ("base_dino", 100 * 1251, 0.004, 1_024, 0),
    ],
)
def test_recipes_of_linear_probes(variant, steps, peak, rows, warmup):
    config = config_of("finetune_imagenet", variant)
    check_config(config.to_dict())
    assert (config.total_steps, config.data.batch_size) == (steps, rows)
    assert config.schedule.peak == pytest.approx(peak)
    assert round(config.schedule.warmup * steps) == warmup
    assert (config.optim.kind, config.head.batch_norm) == (
        ("lars", True) if "mae" in variant else ("sgd", False)
    )
    assert config.examples.operations == 0 and not config.loss and "layerwise_lr" not in config


def test_another_modality_is_refused(pretrained):
    config = config_of("finetune_imagenet", "smoke").to_dict()
    with pytest.raises(UserError, match="this is text, the config vision"):
        finetune.resolve_config(config, str(pretrained))


def test_encoders_of_2_0_lose_their_decoder():
    config = config_of("finetune_imagenet", "smoke").to_dict()
    config["model"] = config_of("vision_v2", "smoke").model.to_dict()
    model = finetune.resolve_config(config)["model"]
    assert model["decoder"] is None and model["mask_embedding"] is False
    assert model["encoder"]["drop_path"] == 0.1 and model["encoder"]["depth"] == 3


@pytest.mark.parametrize(("variant", "blocks"), [("base", 12), ("large", 24)])
def test_the_layer_table_is_printed_at_the_start(variant, blocks):
    config = finetune.resolve_config(config_of("finetune_imagenet", variant).to_dict())
    notes = classify.abstract_task(config).notes
    rows = {line.split()[0]: line.split()[1:] for line in notes}
    lowest, first, last = (0.65 ** (blocks + 1 - i) for i in (0, 1, blocks))
    assert rows["class_token"] == ["0", f"{lowest:.4g}", "no"]
    assert rows["patches/kernel"][:2] == ["0", f"{lowest:.4g}"]
    kernel = rows["encoder/blocks/qkv/kernel"]
    assert kernel[:4] == [f"1-{blocks}", f"{first:.4g}", "...", f"{last:.4g}"]
    assert kernel[4] == ("no" if variant == "base" else "yes")  # base has no decay at all
    assert rows["task/output/kernel"][:2] == [str(blocks + 1), "1"]
    rates = dict(config["optim"]["rates"])
    assert np.allclose(rates[r"(^|/)blocks/"], [0.65 ** (blocks - i) for i in range(blocks)])


def test_the_linear_schedule():
    rate = optimizer.make_schedule(5_336, kind="linear", peak=1e-5, warmup=320 / 5_336)
    for step, value in ((0, 0), (160, 5e-6), (320, 1e-5), (2_828, 5e-6), (5_336, 0)):
        assert float(rate(step)) == pytest.approx(value, abs=1e-12)


# Examples and scores ------------------------------------------------------------------------------


class Tokens:
    """A tokenizer whose tokens are letters."""

    bos, pad, eos, unk, vocab_size = 0, 1, 2, 3, 40

    def encode_batch(self, texts, literal=False):
        return [[ord(c) - 93 for c in text] for text in texts]


def test_rows_of_texts_and_pairs():
    ids = Tokens()
    assert row_of([5, 6], None, ids, 8) == [0, 5, 6, 2]
    assert row_of([5, 6], [7], ids, 8) == [0, 5, 6, 2, 2, 7, 2]
    assert row_of([5, 6, 7, 8, 9], [10, 11], ids, 8) == [0, 5, 6, 2, 2, 10, 11, 2]  # longer first
    assert row_of(list(range(5, 20)), None, ids, 8) == [0, 5, 6, 7, 8, 9, 10, 2]

    texts = [{"text": "abc", "pair": "de"}, {"text": "abcdefghijk", "pair": "z"}]
    source = Items(texts, "texts")
    like = SimpleNamespace(tokenizer=ids, paired=True)
    rows = Rows(source, like=like, lengths=(9, 12))
    np.testing.assert_array_equal(rows.bucket_of, [0, 1])
    found = rows.load(0, 0, None)["tokens"]
    np.testing.assert_array_equal(found, [0, 4, 5, 6, 2, 2, 7, 8, 2])
    assert len(rows.rows[1]) == 12
    single = Items([{"text": "abc"}], "texts")
    with pytest.raises(UserError, match="texts train: its examples have no second text"):
        Rows(single, like=rows, lengths=(9, 12))
    like = SimpleNamespace(tokenizer=ids, paired=False, source=single)
    with pytest.raises(UserError, match="its examples have no second text"):
        Rows(source, like=like, lengths=(9, 12))


def test_utterances_are_padded_cut_or_left_out():
    lengths, options = (8_000, 20_000, 60_000), dict(seconds=(1.0, 2.0))
    source = Items([{"audio": np.arange(n, dtype=np.float32)} for n in lengths])
    kept = Utterances(source, **options)
    np.testing.assert_array_equal(kept.bucket_of, [0, 1, -1])
    found = kept.load(0, 0, np.random.default_rng(0))
    assert found["length"] == 8_000 and not found["audio"][8_000:].any()
    assert abs(found["audio"][:8_000].mean()) < 1e-6  # of the utterance, not of the padding
    assert abs(found["audio"][:8_000].std() - 1) < 1e-4
    cut = Utterances(source, like=kept, cut=True, **options)
    np.testing.assert_array_equal(cut.bucket_of, [0, 1, 1])
    middle = cut.load(2, 1, None)["audio"]
    assert abs(middle.mean()) < 1e-3 and len(middle) == 32_000


@pytest.mark.parametrize("rows", [8, 16])
def test_every_example_is_evaluated_once(rows):
    """Of two buckets, neither of which fills its last batch."""
    rng = np.random.default_rng(0)

    class Numbers:
        layout = Layout(
            [2, 4], [{"x": jax.ShapeDtypeStruct((n,), np.float32)} for n in (2, 4)], padded=True
        )
        bucket_of, lengths = rng.integers(-1, 2, 37), np.ones(37)

        def load(self, index, bucket, rng):
            return {"x": np.full(self.layout.buckets[bucket], index, np.float32)}

    examples = Numbers()
    options = finetune.DataConfig(source="", batch_size=rows)
    predict = lambda params, batch: {"sum": batch["x"].sum(-1) + params}  # noqa: E731
    run = finetune.evaluation(predict, examples, options, lambda found: found)
    mesh = jax.make_mesh((8, 1, 1), ("slice", "data", "fsdp"))

    class State:
        params = 0.5

    with jax.set_mesh(mesh):
        found = run(State)
    for index, bucket in enumerate(examples.bucket_of):
        if bucket < 0:
            assert found[index] is None
        else:
            assert found[index]["sum"] == index * [2, 4][bucket] + 0.5


def test_scores_of_classes_numbers_and_several_classes():
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(30, 4)).astype(np.float32), rng.integers(0, 4, 30)
    rows = [{"logits": a, "label": b} for a, b in zip(logits, labels.astype(np.int32), strict=True)]
    found = classify.score(
        [*rows, None],
        None,
        classify.ScoringConfig(metrics=("accuracy", "macro_f1", "top5_accuracy")),
    )
    assert found["accuracy"] == np.mean(logits.argmax(1) == labels)
    assert "top5_accuracy" not in found  # of four classes it is always 1
    wanted = np.mean(np.log(np.exp(logits).sum(1)) - logits[np.arange(30), labels])
    assert found["loss"] == pytest.approx(wanted, rel=1e-5)
    numbers = [{"logits": a[:1], "label": np.float32(a[0] * 3 + 1)} for a in logits]
    assert classify.score(numbers, None, classify.ScoringConfig(metrics=("pearson",)))[
        "pearson"
    ] == pytest.approx(1.0)
    marks = [{"logits": a, "label": (a > 0.5).astype(np.float32)} for a in logits]
    assert classify.score(
        marks, None, classify.ScoringConfig(metrics=("mean_average_precision",))
    ) == {"mean_average_precision": 1.0}
    with pytest.raises(UserError, match="did you mean 'accuracy'"):
        classify.score(rows, None, classify.ScoringConfig(metrics=("acuracy",)))
    np.testing.assert_array_equal(classify.several("0, 2", 4), [1, 0, 1, 0])
    with pytest.raises(UserError, match="classes: 4, but a label is 7"):
        classify.several("7", 4)


def test_a_wrong_number_of_classes_is_refused():
    config = finetune.resolve_config(config_of("finetune_text", "smoke").to_dict())
    config["head"]["classes"] = 44
    with pytest.raises(UserError, match=r"head.classes: 44, but samples:glosses has 45"):
        classify.make(config)


def targets_of(metrics=("accuracy",), **head):
    head = heads.make(dict(name="sequence") | head, "head")
    return classify.targets({"scoring": {"metrics": metrics}}, head)


@pytest.mark.parametrize(
    ("metrics", "head", "message"),
    [
        ("acuracy", dict(classes=2), "no 'acuracy' of a single.*; did you mean 'accuracy'"),
        ("mean_average_precision", dict(classes=2), "no 'mean_average_precision'"),
        ("wer", dict(classes=2), "no 'wer'"),
        ("macro_f1", dict(classes=1), "of a regression; choose from pearson, spearman"),
        ("accuracy", dict(classes=2, problem=classify.SEVERAL), "mean_average_precision"),
        ("pearson", dict(classes=2, problem=classify.REGRESSION), "classes: 2, but a regression"),
    ],
)
def test_metrics_and_classes_that_are_not_of_the_problem_are_refused(metrics, head, message):
    with pytest.raises(UserError, match=message):
        targets_of((metrics,), **head)


@pytest.mark.parametrize(
    ("rows", "head", "message"),
    [
        ("label\na,1\nb,\nc,0", dict(classes=2), r"t\.csv:3: no label"),
        ("label\na,1\nb,2.5", dict(classes=2), r"t\.csv:2: label 1.0 is not a class"),
        ("label\na,1\nb,", dict(classes=1), r"t\.csv:3: no label"),
        ("label\na,1\nb,x", dict(classes=1), r"t\.csv:3: label 'x' is not a number"),
        ("labels\na,1\nb,x", dict(classes=2, problem=classify.SEVERAL), r"t\.csv:3: labels 'x'"),
    ],
)
def test_labels_of_tables_are_checked_row_by_row(tmp_path, rows, head, message):
    (tmp_path / "t.csv").write_text(f"text,{rows}\n")
    metrics = {1: "pearson"}.get(head["classes"], "accuracy")
    metrics = "mean_average_precision" if "problem" in head else metrics
    targets = targets_of((metrics,), **head)
    with pytest.raises(UserError, match=message):
        targets.check(
            open_source(f"manifest:{tmp_path}/t.csv", codec=TEXT, label_names=targets.names)
        )


def test_missing_and_unknown_classes_of_other_sources_are_refused():
    targets = targets_of(classes=3)
    with pytest.raises(UserError, match="classes: 3, but a label is 7"):
        targets.read({"label": 7}, 8)
    with pytest.raises(UserError, match="labels None are not"):
        classify.several(None, 4)
    with pytest.raises(UserError, match=r"labels are classes \(adj.all, ...\), not numbers"):
        targets_of(("pearson",), classes=1).check(open_source("samples:glosses", codec=TEXT))
    rows = [{"logits": np.eye(3)[i], "label": np.int32(i + 1)} for i in range(3)]  # 3 is no class
    assert classify.score(rows, None)["accuracy"] == 0.0


def test_a_regression_learns_whole_numbers_as_they_are(tmp_path):
    for name, labels in (("train", (10, 20, 100)), ("test", (15, 3))):
        rows = "".join(f"text {label},{label}\n" for label in labels)
        (tmp_path / f"{name}.csv").write_text(f"text,label\n{rows}")
    targets = targets_of(("pearson",), classes=1)
    options = finetune.DataConfig(source=f"manifest:{tmp_path}/{{split}}.csv", batch_size=2)
    train_set = finetune.open_part(options, TEXT, targets.names)
    test_set = finetune.open_split(options, "test", TEXT, train_set.label_names)
    for source, wanted in ((train_set, [10, 20, 100]), (test_set, [15, 3])):
        targets.check(source)
        assert [float(targets.read(item, 8)["label"]) for item in source] == wanted


# Recipes, typed from conversion spec 2.1, 2.2 and 3.2 ---------------------------------------------

IMAGENET = {  # steps, peak, floor, warm-up, rows, layer decay, decay, drop path, mixup, probability
    "base": (125_100, 4e-3, 1e-6, 12_510, 1024, 0.65, 0.0, 0.2, 0.8, 1.0),
    "large": (62_550, 5e-3, 1e-6, 6_255, 1024, 0.65, 0.05, 0.25, 0.8, 1.0),
    "base_v2": (250_200, 1e-3, 1e-6, 16_000, 512, 0.65, 0.05, 0.1, 0.7, 0.9),
    "large_v2": (125_200, 5e-4, 1e-7, 16_000, 512, 0.75, 0.05, 0.2, 0.7, 0.9),
    "huge_v2": (125_200, 5e-4, 1e-20, 16_000, 512, 0.75, 0.05, 0.2, 0.7, 0.9),
}
RATES = {  # of the authors' schedules
    "base": (
        (0, 0),
        (1, 3.197698e-7),
        (6255, 2.000160e-3),
        (12509, 4e-3),
        (68805, 2.0005e-3),
        (125099, 1.00000078e-6),
    ),
    "base_v2": ((8_000, 5.005e-4), (133_100, 5.005e-4), (250_199, 1.00000004e-6)),
}


@pytest.mark.parametrize("variant", IMAGENET)
def test_recipes_of_images(variant):
    config = config_of("finetune_imagenet", variant)
    check_config(config.to_dict())
    found = (
        config.total_steps,
        config.schedule.peak,
        config.schedule.floor,
        round(config.schedule.warmup * config.total_steps),
        config.data.batch_size,
        config.layerwise_lr.decay,
        config.optim.weight_decay,
        config.model_overrides.encoder.drop_path,
        config.loss.mixup,
        config.loss.mix_probability,
    )
    assert found == IMAGENET[variant]
    assert (config.loss.cutmix, config.loss.smoothing, config.loss.erasing) == (1.0, 0.1, 0.25)
    assert config.layerwise_lr.slow_embeddings == ("v2" not in variant)
    assert ("mean" in config.model_overrides) == ("v2" not in variant)  # 1.0: 0.5, 2.0: ImageNet's
    rate = optimizer.make_schedule(config.total_steps, **config.schedule.to_dict())
    for step, value in RATES.get(variant, ()):
        assert float(rate(step)) == pytest.approx(value, rel=2e-5)


GLUE = {  # rows, warm-up, steps, peak of 1.0 and 2.0, metrics
    "cola": (16, 320, 5336, 1e-5, 2e-5, "matthews"),
    "sst2": (32, 1256, 20935, 1e-5, 2e-5, "accuracy"),
    "mrpc": (16, 137, 2296, 1e-5, 2e-5, "accuracy f1"),
    "qqp": (32, 28318, 113272, 1e-5, 2e-5, "accuracy f1"),
    "stsb": (16, 214, 3598, 2e-5, 4e-5, "pearson spearman"),
    "mnli": (32, 7432, 123873, 1e-5, 2e-5, "accuracy"),
    "qnli": (32, 1986, 33112, 1e-5, 2e-5, "accuracy"),
    "rte": (16, 122, 2036, 2e-5, 2e-5, "accuracy"),
}


@pytest.mark.parametrize("task", GLUE)
def test_recipes_of_glue(task):
    rows, warmup, steps, peak, peak2, names = GLUE[task]
    config = config_of("finetune_glue", task)
    check_config(config.to_dict())
    assert config.schedule.peak == peak
    assert config_of("finetune_glue", f"{task},v2").schedule.peak == peak2
    assert (config.total_steps, config.data.batch_size) == (steps, rows)
    assert round(config.schedule.warmup * steps) == warmup
    assert " ".join(config.scoring.metrics) == names
    assert config.optim.weight_decay == 0.1 and config.optim.eps == 1e-6
    shapes = classify.abstract_task(finetune.resolve_config(config.to_dict())).shapes
    assert {s["tokens"].shape[0] for s in shapes} == {rows}  # whatever the length
