"""Files of tensors against the libraries that they belong to, and against files made to do harm."""

import os
import pickle
import sys
import types

import numpy as np
import pytest

from data2vec_jax.convert import pickles
from data2vec_jax.convert.tables import Entry, entries_of
from data2vec_jax.core import files, safetensors
from data2vec_jax.core.errors import UserError

torch = pytest.importorskip("torch")
safetensors_torch = pytest.importorskip("safetensors.torch")

TENSORS = {
    "wide": torch.arange(6, dtype=torch.float64).reshape(2, 3) / 7,
    "half": torch.randn(3, 1, generator=torch.Generator().manual_seed(0)).half(),
    "brain": torch.tensor([[1.5, -2.0]], dtype=torch.bfloat16),
    "count": torch.tensor(7),
    "transposed": torch.arange(12, dtype=torch.float32).reshape(3, 4).T,
    "flags": torch.tensor([True, False]),
    "empty": torch.zeros(0, 3),
}


def as_numpy(tensor):
    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.int16).numpy().view(safetensors.dtype_of("bfloat16"))
    return tensor.numpy()


def same(ours, theirs):
    theirs = as_numpy(theirs)
    return (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape) and np.array_equal(ours, theirs)


def test_safetensors_both_ways(tmp_path):
    tensors = {name: tensor.contiguous() for name, tensor in TENSORS.items()}
    safetensors_torch.save_file(tensors, tmp_path / "theirs", {"format": "pt"})
    read = safetensors.SafeTensors(tmp_path / "theirs")
    assert read.metadata == {"format": "pt"} and {*read} == {*tensors}
    assert all(same(read[name], tensor) for name, tensor in tensors.items())
    safetensors.write_safetensors(tmp_path / "ours", entries_of(read), {"format": "pt"})
    back = safetensors_torch.load_file(tmp_path / "ours")
    assert all(torch.equal(back[name], tensor) for name, tensor in tensors.items())


def test_damaged_safetensors_are_named(tmp_path):
    safetensors_torch.save_file({"a": torch.ones(100)}, tmp_path / "whole")
    data = (tmp_path / "whole").read_bytes()
    for cut, message in (
        (len(data) - 1, "cut short; 'a' ends at byte"),
        (30, "not a whole"),
        (3, "not a whole"),
        (0, "not a whole"),
    ):
        (tmp_path / "cut").write_bytes(data[:cut])
        with pytest.raises(UserError, match=message):
            safetensors.SafeTensors(tmp_path / "cut")
    (tmp_path / "cut").write_bytes((50).to_bytes(8, "little") + b"no JSON" * 20)
    with pytest.raises(UserError, match="not a safetensors file"):
        safetensors.SafeTensors(tmp_path / "cut")


def equal(ours, theirs):
    if isinstance(theirs, torch.Tensor):
        return same(ours, theirs)
    if isinstance(theirs, dict):
        return list(ours) == list(theirs) and all(equal(ours[k], theirs[k]) for k in theirs)
    return type(ours) is type(theirs) and ours == theirs


CONTENT = {
    "model": TENSORS | {"_ema": {"0.weight": torch.ones(2)}, "big": torch.zeros(70_000)},
    "extra_state": {"epoch": 3, "name": "é", "rates": [1e-3, -2.5], "large": -(1 << 70)},
    "flags": (True, None, 0, 255, 256, -128),
}


@pytest.mark.parametrize("zipped", [True, False])
def test_pytorch_files_are_read_without_it(zipped, tmp_path):
    torch.save(CONTENT, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    assert equal(pickles.read(tmp_path / "a.pt"), CONTENT)


def to_entries(value):
    if isinstance(value, torch.Tensor):
        array = as_numpy(value)
        return Entry("", (), array.shape, array.dtype, lambda: array, False)
    if isinstance(value, dict):
        return {name: to_entries(x) for name, x in value.items()}
    return value


def test_pytorch_reads_what_we_write(tmp_path):
    pickles.write(tmp_path / "a.pt", to_entries(CONTENT))
    back = torch.load(tmp_path / "a.pt", weights_only=True)
    assert equal(pickles.read(tmp_path / "a.pt"), CONTENT)
    assert all(torch.equal(back["model"][name], tensor) for name, tensor in TENSORS.items())
    assert back["extra_state"] == CONTENT["extra_state"] and back["flags"] == CONTENT["flags"]


class Harm:
    def __reduce__(self):
        return os.mkdir, ("harm",)


@pytest.mark.parametrize("how", ["zip", "single", "pickle"])
def test_code_in_a_pickle_is_not_run(how, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content = {"model": {"a": torch.ones(1)}, "cfg": Harm()}
    if how == "pickle":
        (tmp_path / "a.pt").write_bytes(pickle.dumps(Harm()))
    else:
        torch.save(content, "a.pt", _use_new_zipfile_serialization=how == "zip")
    with pytest.raises(UserError, match=r"asks to run '\w+.mkdir', which is not weights; refused"):
        pickles.read("a.pt")
    assert os.listdir(tmp_path) == ["a.pt"]


@pytest.mark.parametrize("zipped", [True, False])
def test_cut_pickles_are_named(zipped, tmp_path):
    path = tmp_path / "a.pt"
    torch.save(CONTENT, path, _use_new_zipfile_serialization=zipped)
    data = path.read_bytes()
    for cut in (0, 10, 200, len(data) // 2, len(data) - 100):
        path.write_bytes(data[:cut])
        with pytest.raises(UserError, match=r"a\.pt"):
            pickles.read(path)


class Node:
    """Stands for a class of omegaconf's, which pickles its attributes."""

    def __init__(self, **state):
        self.__dict__.update(state)


def test_settings_of_unknown_libraries_are_read_as_plain_data(tmp_path, monkeypatch):
    module = types.ModuleType("omegaconf.dictconfig")
    module.Node, Node.__module__, Node.__qualname__ = Node, module.__name__, "Node"
    monkeypatch.setitem(sys.modules, "omegaconf", types.ModuleType("omegaconf"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    leaves = {"_name": Node(_val="data2vec_audio"), "layers": Node(_val=12), "empty": None}
    inner = Node(_content={"model": Node(_content=leaves, _parent=None)}, _metadata=Node(key="x"))
    torch.save({"cfg": inner, "model": {"a": torch.ones(2)}}, tmp_path / "a.pt")
    read = pickles.read(tmp_path / "a.pt")
    wanted = {"model": {"_name": "data2vec_audio", "layers": 12, "empty": None}}
    assert pickles.plain(read["cfg"]) == wanted


def test_a_target_is_complete_or_absent(tmp_path):
    with files.new_target(tmp_path / "new/file") as draft:
        draft.write_text("whole")
    assert (tmp_path / "new/file").read_text() == "whole"
    with pytest.raises(ZeroDivisionError), files.new_target(tmp_path / "folder") as draft:
        draft.mkdir()
        (draft / "half").write_text("half")
        1 / 0  # noqa: B018
    with pytest.raises(UserError, match="exists"), files.new_target(tmp_path / "new/file"):
        pass
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["file", "new"]
