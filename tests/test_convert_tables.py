"""Conversion tables: every weight of the recorded states there and back, byte for byte."""

import re
from typing import NamedTuple

import jax
import numpy as np
import pytest
from recorded import NAMES, load

from data2vec_jax.convert import beit, fairseq, tables
from data2vec_jax.convert.tables import FUSED_BIAS, FUSED_LINEAR, LINEAR, Row, Table
from data2vec_jax.core.errors import UserError
from data2vec_jax.modalities import contract


class Layout(NamedTuple):
    """Tables of a student and of a teacher that is one module of it, which stands at `module`."""

    student: Table
    teacher: Table
    module: str


LAYOUTS = {
    "audio": Layout(fairseq.SPEECH, fairseq.SPEECH_TEACHER, "encoder."),
    "text": Layout(fairseq.TEXT, fairseq.TEXT_TEACHER, "encoder.sentence_encoder."),
    "image": Layout(beit.VISION, beit.VISION, ""),
}
CASES = [n for n in NAMES if "data2vec-1.0" in load(n).info.get("generation", "")]


def same(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def check_there_and_back(table, state):
    back = tables.write(table, tables.read(table, state))
    kept = {name for name in state if not any(re.search(p, name) for p in table.ignored)}
    assert set(back) == kept
    assert [name for name in kept if not same(back[name], state[name])] == []


@pytest.mark.parametrize("name", CASES)
def test_recorded_states_go_there_and_back(name):
    case = load(name)
    layout, student = LAYOUTS[case.info["modality"]], case.part("student/")
    for part in ("student/", "final_student/", "grad/"):
        check_there_and_back(layout.student, case.part(part))
    for part in ("teacher/", "final_teacher/"):
        teacher = case.part(part)
        if set(teacher) <= set(student):  # the whole model is averaged
            check_there_and_back(layout.student, teacher)
        else:
            assert {layout.module + name for name in teacher} <= set(student)
            check_there_and_back(layout.teacher, teacher)


MODELS = {
    "speech": (
        fairseq.SPEECH,
        dict(audio=(1, 800)),
        dict(
            frontend=dict(convs=((8, 10, 5), (8, 3, 2)), bias=True),
            positions=dict(depth=2, width=6, groups=2),
            encoder=dict(norm="pre"),
        ),
    ),
    "speech, group and weight norm": (
        fairseq.SPEECH,
        dict(audio=(1, 800)),
        dict(
            frontend=dict(convs=((8, 10, 5), (8, 3, 2)), norm="group"),
            positions=dict(depth=1, width=4, groups=2, norm="weight"),
            encoder={},
        ),
    ),
    "text": (
        fairseq.TEXT,
        dict(tokens=(1, 9)),
        dict(vocab_size=20, max_length=16, head=dict(depth=3), encoder=dict(norm="pre")),
    ),
    "vision": (
        beit.VISION,
        dict(image=(1, 8, 12, 3)),
        dict(
            image=(8, 12),
            patch=4,
            absolute=True,
            encoder=dict(norm="pre", qkv_bias="qv", layer_scale=0.1, relative=(2, 3)),
        ),
    ),
    "vision, no biases": (
        beit.VISION,
        dict(image=(1, 8, 8, 3)),
        dict(
            image=8,
            patch=4,
            encoder=dict(norm="pre", qkv_bias="none"),
        ),
    ),
}


def random_tree(kind):
    """(table, random parameters of a model of ours)."""
    table, shapes, options = MODELS[kind]
    options = options | dict(encoder=options["encoder"] | dict(depth=3, heads=2, mlp=12))
    model = contract.make_model(contract.get(kind.split(",")[0]), dict(width=8, **options))
    batch = {
        k: jax.ShapeDtypeStruct(v, "int32" if k == "tokens" else "float32")
        for k, v in shapes.items()
    }
    shapes = jax.eval_shape(model.init, jax.random.key(0), batch)["params"]
    random = np.random.default_rng(0)
    return table, jax.tree.map(lambda x: random.normal(size=x.shape).astype(np.float32), shapes)


@pytest.mark.parametrize("kind", MODELS)
def test_every_parameter_of_ours_has_a_place(kind):
    table, tree = random_tree(kind)
    there = tables.write(table, tree)
    flat, back = tables.flatten(tree), tables.flatten(tables.read(table, there))
    assert {*flat} == {*back} and all(same(flat[path], back[path]) for path in flat)
    assert sum(x.size for x in there.values()) == sum(x.size for x in flat.values())


def test_layers_are_stacked_and_projections_fused():
    names = tuple(f"layers.{{l}}.{x}_proj" for x in "qkv")
    table = Table(
        [
            Row(tuple(f"{name}.weight" for name in names), "qkv/kernel", FUSED_LINEAR),
            Row(tuple(f"{name}.bias" for name in names), "qkv/bias", FUSED_BIAS),
            Row("layers.{l}.out.weight", "out/kernel", LINEAR),
        ]
    )
    random = np.random.default_rng(0)
    state = {}
    for l in range(12):  # two digits: layers are in the order of numbers, not of names
        state[f"layers.{l}.out.weight"] = random.normal(size=(4, 6))
        for x in "qkv":
            state[f"layers.{l}.{x}_proj.weight"] = random.normal(size=(4, 4))
            state[f"layers.{l}.{x}_proj.bias"] = random.normal(size=4)
    tree = tables.read(table, state)
    assert tree["qkv"]["kernel"].shape == (12, 4, 12) and tree["out"]["kernel"].shape == (12, 6, 4)
    x = random.normal(size=4)
    q, k, v = np.split(x @ tree["qkv"]["kernel"][10] + tree["qkv"]["bias"][10], 3)
    for name, ours in (("q", q), ("k", k), ("v", v)):
        theirs = state[f"layers.10.{name}_proj.weight"] @ x + state[f"layers.10.{name}_proj.bias"]
        np.testing.assert_allclose(ours, theirs)


def test_what_is_missing_or_unknown_is_named():
    state = tables.write(*random_tree("speech"))
    with pytest.raises(UserError, match="novel"):
        tables.read(fairseq.SPEECH, state | {"encoder.novel": np.zeros(2)})
    for lost in ("encoder.layers.1.fc1.weight", "encoder.layers.1.self_attn.k_proj.bias"):
        with pytest.raises(UserError, match=lost):
            tables.read(fairseq.SPEECH, {k: v for k, v in state.items() if k != lost})
    with pytest.raises(UserError, match="decoder/kernel"):
        tables.write(fairseq.SPEECH, {"decoder": {"kernel": np.zeros(2)}})


@pytest.mark.parametrize(
    "kind, names",
    [
        ("speech", {r"^final_proj\.": "final_proj.0."}),
        ("text", {r"^encoder\.": "decoder.", "layernorm_embedding": "emb_layer_norm"}),
    ],
)
def test_names_of_older_files_are_read(kind, names):
    table, tree = random_tree(kind)
    older = tables.write(table, tree)
    for new, old in names.items():
        assert any(re.search(new, key) for key in older)
        older = {re.sub(new, old, key): array for key, array in older.items()}
    back = tables.flatten(tables.read(table, older))
    assert {*back} == {*tables.flatten(tree)}
    assert all(same(array, back[path]) for path, array in tables.flatten(tree).items())
