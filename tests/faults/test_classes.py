"""Classes by their names: of test sets in another order, of classes that training has not."""

import json

import jax
import numpy as np
import pytest
from configs_for_tests import Items, config_of
from PIL import Image

from data2vec_jax import evaluate, train
from data2vec_jax.convert.ours import entries_of
from data2vec_jax.core import sharding
from data2vec_jax.core.errors import ExampleError, UserError
from data2vec_jax.core.safetensors import write_safetensors
from data2vec_jax.core.trees import flatten
from data2vec_jax.data.sources import UNKNOWN, by_name, open_source
from data2vec_jax.modalities import contract
from data2vec_jax.models.heads import make as make_head
from data2vec_jax.tasks import classify, finetune

VISION, TEXT = (contract.get(name) for name in ("vision", "text"))
WORDS = ["cat", "dog", "eel"]


def picture(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((20, 20, 3), value, np.uint8)).save(path)


def folder(place, labels):
    """Pictures whose colour is the number of their class among `WORDS`."""
    for i, label in enumerate(labels):
        picture(place / label / f"{i}.png", WORDS.index(label) if label in WORDS else 9)
    return f"folder:{place}"


def table(place, labels):
    place.mkdir(parents=True)
    rows = [(f"{i}.png", label) for i, label in enumerate(labels)]
    for name, label in rows:
        picture(place / name, WORDS.index(label) if label in WORDS else 9)
    if place.suffix == ".jsonl":
        lines = [json.dumps({"path": path, "label": label}) for path, label in rows]
    else:
        between = "," if place.suffix == ".csv" else "\t"
        lines = [between.join(row) for row in (("path", "label"), *rows)]
    file = place / f"t{place.suffix}"
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return f"manifest:{file}"


class Named(Items):
    """Pictures of a source with classes of its own."""

    def __init__(self, labels, names, listed=True):
        super().__init__(
            [
                {
                    "image": np.full(
                        (20, 20, 3), WORDS.index(names[x]) if names[x] in WORDS else 9, np.uint8
                    ),
                    "label": x,
                }
                for x in labels
            ],
            split="test",
            field="image",
        )
        self.label_names, self.listed = tuple(names), listed

    def column(self, name):
        known = self.listed and name in self.held[0]
        return [item[name] for item in self.held] if known else None


CONTAINERS = {
    "folder": (folder, ""),
    "tsv": (table, ".tsv"),
    "csv": (table, ".csv"),
    "jsonl": (table, ".jsonl"),
}


def data(source, **options):
    return finetune.DataConfig(source=source, batch_size=2, **options)


@pytest.mark.parametrize("kind", CONTAINERS)
def test_a_test_set_of_its_own_is_scored_by_name(tmp_path, kind):
    write, suffix = CONTAINERS[kind]
    uri = write(tmp_path / f"x{suffix}", ["eel", "dog", "dog", "fox", "eel"])  # no cat; a fox
    source = finetune.open_split(data("x", eval_source=uri), "test", VISION.codec, WORDS)
    assert source.label_names == tuple(WORDS)
    for item in (source[i] for i in range(5) if i not in source.bad):
        assert item["label"] == item["image"][0, 0, 0]
    (error,) = source.bad.values()
    assert error.reason == UNKNOWN and "unknown label 'fox'; choose from cat, dog, eel" in str(
        error
    )
    assert error.where.startswith(str(tmp_path))
    (line,) = finetune.check_known(source, 0.2)
    assert "1 of 5 examples are of classes that training has not" in line and "'fox'" in line
    with pytest.raises(UserError, match=r"1 of 5 .*'fox'.*max_outside_share=0\.19"):
        finetune.check_known(source, 0.19)
    with pytest.raises(UserError, match="unknown label 'fox'"):  # in training
        finetune.open_part(data(uri), VISION.codec, WORDS)


def test_classes_without_a_training_example_are_named(tmp_path):
    folder(tmp_path / "train", ["cat", "dog", "cat", "dog"])
    folder(tmp_path / "test", ["cat", "dgo"])  # misspelt
    options = data(f"folder:{tmp_path}")
    assert finetune.untaught(finetune.open_part(options, VISION.codec)) == [
        "warning: 1 of 3 classes have no training example: dgo"
    ]
    (line,) = finetune.untaught(finetune.open_part(data(options.source, share=0.25), VISION.codec))
    assert "2 of 3 classes have no training example" in line
    other = folder(tmp_path / "alike/train", ["cat", "dog"]).removesuffix("/train")
    assert finetune.untaught(finetune.open_part(data(other), VISION.codec)) == []


@pytest.mark.parametrize("listed", [True, False])
def test_classes_in_an_order_of_their_own(listed):
    source = by_name(Named([0, 1, 2, 0], ["eel", "fox", "cat"], listed), WORDS)
    assert source.label_names == tuple(WORDS)
    good = [0, 2, 3]
    assert [source[i]["label"] for i in good] == [2, 0, 2]
    assert [source[i]["image"][0, 0, 0] for i in good] == [2, 0, 2]
    assert [source.field(i, "label") for i in good] == [2, 0, 2]
    with pytest.raises(ExampleError, match="unknown label 'fox'"):
        source[1]
    if listed:
        assert source.column("label") == [2, None, 0, 2] and source.bad[1].reason == UNKNOWN
    same = Named([1], WORDS)
    assert (
        by_name(same, WORDS) is same and by_name(same, None) is same and by_name(same, ()) is same
    )


def test_numbers_of_classes_are_still_taken_for_named_ones(tmp_path):
    uri = table(tmp_path / "x.csv", ["2", "0"])
    source = finetune.open_split(data("x", eval_source=uri), "test", VISION.codec, WORDS)
    assert source.column("label") == [2, 0] and not source.bad


def test_a_score_counts_unknown_classes(tmp_path):
    uri = folder(tmp_path, ["eel", "dog", "fox", "dog"])
    source = finetune.open_split(data("x", eval_source=uri), "test", VISION.codec, WORDS)
    inputs = VISION.inputs(source, like=object(), image=16)
    logits = np.eye(3, dtype=np.float32)
    labels = source.column("label")
    predictions = [
        None if i in source.bad else {"logits": logits[1], "label": np.int32(labels[i])}
        for i in range(4)
    ]
    found = classify.score(predictions, inputs)
    assert found["accuracy"] == pytest.approx(2 / 3)
    assert found["left_out"] == found["unknown_classes"] == 0.25
    sound = folder(tmp_path / "y", ["eel", "dog"])
    source = finetune.open_split(data("x", eval_source=sound), "test", VISION.codec, WORDS)
    inputs = VISION.inputs(source, like=object(), image=16)
    assert classify.score(predictions[:2], inputs).keys() == {"accuracy", "loss"}


def config_on(place, **options):
    config = config_of("finetune_imagenet", "smoke").to_dict()
    config["head"]["classes"] = 3
    config["data"] |= dict(source=f"folder:{place}", batch_size=2, eval_split="", share=1.0)
    return config | options


def test_the_names_of_a_run_travel_with_it(tmp_path):
    """Evaluated on other data, whose classes sort in another way and are fewer."""
    folder(tmp_path / "old", [*WORDS, *WORDS])
    config, run = config_on(tmp_path / "old", labels=["eel", "cat", "dog"]), tmp_path / "run"
    run.mkdir()
    classify.make(classify.resolve_config(config)).save_assets(run)
    assert json.loads((run / "labels.json").read_text()) == ["eel", "cat", "dog"]
    config["labels"] = ()  # as in a run that took them from its data
    (run / "config.json").write_text(json.dumps(config))
    folder(tmp_path / "new/test", ["dog", "eel", "dog", "dog"])
    folder(tmp_path / "new/train", ["dog", "eel"])
    _, found, _ = evaluate.open_run(str(run), {"data.source": f"folder:{tmp_path / 'new'}"})
    assert found["labels"] == ["eel", "cat", "dog"]
    source = finetune.open_part(data(found["data"]["source"]), VISION.codec, found["labels"])
    assert source.column("label") == [2, 0] and source.label_names == ("eel", "cat", "dog")
    classify.make(found)
    (run / "labels.json").write_text("{")
    with pytest.raises(UserError, match=r"labels\.json: not JSON"):
        evaluate.open_run(str(run), {})


def test_a_run_says_what_it_leaves_out_of_its_scores(tmp_path):
    folder(tmp_path / "train", [*WORDS, *WORDS])
    uri = table(tmp_path / "test.csv", ["dog", "fox", *["eel"] * 38])
    config = config_on(tmp_path / "train")
    config["data"] |= dict(eval_split="test", eval_source=uri)
    task = classify.make(classify.resolve_config(config))
    assert any("1 of 40 examples are of classes that training has not" in x for x in task.notes)
    config["data"]["max_outside_share"] = 0.02
    with pytest.raises(UserError, match=r"1 of 40 examples .*'fox'"):
        classify.make(classify.resolve_config(config))


def test_texts_of_unknown_classes_are_left_out(tmp_path):
    place = tmp_path / "t.jsonl"
    rows = [{"text": f"a text {i}", "label": "fox" if i == 2 else WORDS[i % 3]} for i in range(6)]
    place.write_text("\n".join(map(json.dumps, rows)))
    options = data("x", eval_source=f"manifest:{place}")
    source = finetune.open_split(options, "test", TEXT.codec, WORDS)
    inputs = TEXT.inputs(source, lengths=(16,), vocab_size=280)
    assert len(inputs.rows) == 6 and set(source.bad) == {2}
    with pytest.raises(ExampleError, match="unknown label 'fox'"):
        inputs.load(2, 0, None)
    with pytest.raises(UserError, match="unknown label 'fox'"):
        open_source(options.eval_source, codec=TEXT.codec, label_names=WORDS)


@pytest.fixture(scope="module")
def fine_tuned(tmp_path_factory):
    """A converted checkpoint with the classes `WORDS`, its config, and all its parameters."""
    place = tmp_path_factory.mktemp("start")
    folder(place / "data/train", [*WORDS, *WORDS])
    config = config_on(place / "data")
    task = classify.make(classify.resolve_config(config))
    params = flatten(jax.device_get(jax.jit(task.init)(jax.random.key(5))))
    write_safetensors(place / "model.safetensors", entries_of(params), {})
    kept = {"modality": "vision", "model": config["model"], "head": config["head"]}
    (place / "config.json").write_text(json.dumps(kept | {"labels": WORDS}))
    return place, config, params


def begun(place, config, capfd):
    """The first parameters of a run from the checkpoint `place`, and what it says of the head."""
    task = classify.make(classify.resolve_config(config, str(place)))
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        state = train.begun(train.Run(config, task, mesh), str(place), True)
    said = [line for line in capfd.readouterr().err.splitlines() if "begins anew" in line]
    return flatten(jax.device_get(state.params)), said


def test_a_head_of_the_same_classes_is_kept(fine_tuned, capfd):
    place, config, params = fine_tuned
    found, said = begun(place, config, capfd)
    assert not said and found.keys() == params.keys()
    for name, value in params.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


@pytest.mark.parametrize(
    ("labels", "first"),
    [
        (["cat", "eel", "dog"], "output 1 of {} is 'dog', and of this run 'eel'"),
        (["cat", "dog"], "output 2 of {} is 'eel', and of this run None"),
    ],
)
def test_a_head_of_other_classes_begins_anew(fine_tuned, tmp_path, capfd, labels, first):
    """By name, whether or not there are as many."""
    place, config, params = fine_tuned
    config = json.loads(json.dumps(config))
    config["data"]["source"] = folder(tmp_path, labels * 3)
    config["head"]["classes"], config["labels"] = len(labels), labels
    found, said = begun(place, config, capfd)
    assert len(said) == 1 and said[0].endswith("task begins anew: " + first.format(place))
    heads = [name for name in params if name.startswith("task/")]
    kernels = [name for name in heads if name.endswith("kernel")]
    assert heads and kernels and len(params) > len(heads)
    for name, value in params.items():
        if name not in heads:
            np.testing.assert_array_equal(found[name], value, err_msg=name)
    for name in kernels:
        assert found[name].shape != params[name].shape or np.any(found[name] != params[name])


def test_names_of_a_run_are_those_that_it_found_in_its_data(fine_tuned, tmp_path):
    place, config, _ = fine_tuned
    targets = classify.targets(config, make_head(config["head"]))
    stored = {"folder": str(tmp_path), "labels": []}
    assert not targets.outputs(stored) and not targets.outputs(None)
    (tmp_path / "labels.json").write_text(json.dumps(WORDS))
    assert targets.outputs(stored) == WORDS
    targets.check(open_source(config["data"]["source"], codec=VISION.codec))
    assert targets.outputs(None) == tuple(WORDS)
    assert finetune.renewed(targets, str(place)) == {}
