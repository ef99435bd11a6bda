"""fairseq's 2.0 model of images whose patches have another width than the blocks."""

from pathlib import Path

import numpy as np
import pytest

from data2vec_jax.convert import export, loaded, ours, pickles, verify
from data2vec_jax.convert.tables import entries_of

GOLDEN = Path(__file__).parent / "goldens/checkpoints/fairseq_image_v2"
MODE, INNER = "modality_encoders.IMAGE.local_encoder", 40


def nested(state):
    return {
        k: nested(v) if isinstance(v, dict) else entries_of({k: v})[0] for k, v in state.items()
    }


@pytest.fixture
def wider(tmp_path):
    """The recorded model with its patch embedding in two factors, whose product it is."""
    content = pickles.read(GOLDEN / "checkpoint.pt")
    rng = np.random.default_rng(0)
    turn = np.linalg.qr(rng.normal(size=(INNER, INNER)))[0]
    teacher = "_ema" in content["model"]
    assert teacher  # that has a patch embedding of its own
    for state in (content["model"], content["model"]["_ema"]):
        weight, bias = (state.pop(f"{MODE}.proj.{x}") for x in ("weight", "bias"))
        width = len(weight)
        extra = rng.normal(size=(INNER - width, weight[0].size))
        flat = turn @ np.concatenate([weight.reshape(width, -1), extra])
        both = turn @ np.concatenate([bias, rng.normal(size=INNER - width)])
        state[f"{MODE}.0.proj.weight"] = flat.reshape(INNER, *weight.shape[1:]).astype("f4")
        state[f"{MODE}.0.proj.bias"] = both.astype("f4")
        state[f"{MODE}.1.weight"] = turn.T[:width].astype("f4")
        state[f"{MODE}.1.bias"] = np.zeros(width, "f4")
    part = content["cfg"]["model"]["modalities"]["image"]
    part["embed_dim"] = INNER
    tree = {"cfg": pickles.plain(content["cfg"]), "model": nested(dict(content["model"]))}
    pickles.write(tmp_path / "wider.pt", tree)
    return tmp_path / "wider.pt", content


def test_equals_the_recorded_model(wider, tmp_path):
    path, content = wider
    recorded = np.load(GOLDEN / "golden.npz")
    found = loaded.load(path)
    assert found.params["patches"]["kernel"].shape[-1] == INNER
    np.testing.assert_allclose(
        found(recorded["x"]).last_hidden_state, recorded["all_tokens"], atol=1e-4
    )
    export.export(ours.open_checkpoint(path), tmp_path / "jax", "jax")
    export.export(ours.open_checkpoint(tmp_path / "jax"), tmp_path / "again.pt", "fairseq")
    again = pickles.tensors(pickles.read(tmp_path / "again.pt")["model"])
    before = pickles.tensors(content["model"])
    assert {*again} == {*before}
    assert all(again[name].tobytes() == before[name].tobytes() for name in before)


def test_equals_the_model_in_pytorch(wider):
    pytest.importorskip("torch")
    assert verify.verify(ours.open_checkpoint(wider[0]))
