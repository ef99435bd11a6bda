"""Checkpoints made to do harm: one line for each, at once, with little memory."""

import io
import json
import os
import pickle
import pickletools
import struct
import subprocess
import sys
import textwrap
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest

from data2vec_jax.convert import layouts, ours, pickles
from data2vec_jax.core import safetensors
from data2vec_jax.core.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
SECONDS, MEBIBYTES = 20, 300  # of any of these files; they take a second and 150 MiB
SETTINGS = {"model_type": "data2vec-audio", "architectures": ["Data2VecAudioModel"]}


def in_zip(path, pickled, members=(), compressed=zipfile.ZIP_STORED):
    """A PyTorch file with this pickle, and (name, bytes) beside it."""
    with zipfile.ZipFile(path, "w", compressed) as archive:
        archive.writestr("archive/data.pkl", pickled)
        for name, data in members:
            archive.writestr(f"archive/{name}", data)


def many(path, piece, count, end=b""):
    """A zip whose data.pkl is one piece many times: small on disk, large when it is read."""
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("archive/data.pkl", "w", force_zip64=True) as member,
    ):
        for _ in range(count):
            member.write(piece)
        member.write(end)


def storage(key, count):
    """The instructions that make a storage of float32."""
    return (
        b"(\x8c\x07storagectorch\nFloatStorage\n"
        + pickle.dumps(key, 0)[:-1]
        + b"\x8c\x03cpu"
        + b"\x8a\x08"
        + struct.pack("<q", count)
        + b"tQ"
    )


def tensor(key="0", count=4, offset=0, size=(4,), stride=(1,), more=b""):
    numbers = b"".join(pickle.dumps(x, 0)[:-1] for x in (offset, size, stride))
    made = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage(key, count) + numbers
    made += b"\x89ccollections\nOrderedDict\n)RtRs"
    return b"\x80\x02}" + more + b"\x8c\x05model}\x8c\x01a" + made + b"s."


class Call:
    """Pickles as a call of `function` with these arguments."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def doubled(levels):
    """Lists in lists, each twice in the next: 2^levels values to whoever looks at all of them."""
    value = ["x"]
    for _ in range(levels):
        value = [value, value]
    return value


def nested(levels):
    return b"\x80\x02" + b"(" * levels + b"t" * levels + b"."


def in_folder(path, config, header=None, data=b""):
    path.mkdir()
    (path / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    header = b"{}" if header is None else header
    (path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + data)


def header_of(**changes):
    entry = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16], **changes}
    return json.dumps({"a": entry}).encode()


def one(shape):
    return header_of(shape=shape)


def ours_with(**model):
    options = {"width": 32, "encoder": {"depth": 1, "heads": 2, "mlp": 64}, **model}
    return {"modality": "vision", "model": options}


# Name -> function that makes the file or folder at a path.
HARM = {
    # Sizes that a pickle asks for
    "bytearray of a number.pt": lambda p: in_zip(p, pickle.dumps(Call(bytearray, 10**10), 2)),
    "bytes of a number.pt": lambda p: in_zip(p, pickle.dumps(Call(bytes, 10**10), 2)),
    "the same, of an older file.pt": lambda p: p.write_bytes(
        pickle.dumps(pickles.MAGIC, 2) + pickle.dumps(Call(bytearray, 10**10), 2)
    ),
    "bytes that are not there.pt": lambda p: in_zip(p, b"\x80\x04\x8e" + struct.pack("<Q", 10**12)),
    "bytearray that is not there.pt": lambda p: in_zip(
        p, b"\x80\x05\x96" + struct.pack("<Q", 10**17) + b"."
    ),
    "a long number that is not there.pt": lambda p: in_zip(p, b"\x80\x02\x8b\xff\xff\xff\x7f."),
    "a place in a long table.pt": lambda p: in_zip(p, b"\x80\x02]r\xff\xff\xff\xff."),
    "a place in a long table, older.pt": lambda p: p.write_bytes(b"\x80\x02]r\xff\xff\xff\xff."),
    "a frame that is not there.pt": lambda p: in_zip(
        p, b"\x80\x04\x95" + struct.pack("<Q", 1 << 62) + b"N."
    ),
    # What inflates
    "pickle that inflates to 3 GB.pt": lambda p: many(p, b"0" * 2**20, 3000),
    "lists, 60 million.pt": lambda p: many(p, b"\x80\x02(" + b"]" * 2**20, 57),
    "texts, 3 million.pt": lambda p: many(p, b"X\x02\x00\x00\x00aa0" * 2**17, 24, b"N."),
    "arrays that inflate.pt": lambda p: in_zip(
        p, tensor(count=10**8), [("data/0", bytes(4 * 10**8))], zipfile.ZIP_DEFLATED
    ),
    # Objects in each other
    "2^60 lists.pt": lambda p: in_zip(p, pickle.dumps({"cfg": doubled(60), "model": {"a": 1}}, 2)),
    "2^60 lists, older.pt": lambda p: p.write_bytes(
        b"".join(pickle.dumps(x, 2) for x in (pickles.MAGIC, 1001, {}, doubled(60), []))
    ),
    "tuples 100,000 deep.pt": lambda p: in_zip(p, nested(100_000)),
    "tuples 100,000 deep, older.pt": lambda p: p.write_bytes(
        b"".join(pickle.dumps(x, 2) for x in (pickles.MAGIC, 1001, {}))
        + nested(100_000)
        + pickle.dumps([], 2)
    ),
    "dicts 5,000 deep.pt": lambda p: in_zip(
        p, b"\x80\x02" + b"}\x8c\x05model" * 5000 + b"}" + b"s" * 5000 + b"."
    ),
    "a dict in itself.pt": lambda p: in_zip(p, b"\x80\x02}q\x00\x8c\x05modelh\x00s."),
    # Tensors outside of what is there
    "storage missing.pt": lambda p: in_zip(p, tensor()),
    "storage short.pt": lambda p: in_zip(p, tensor(), [("data/0", bytes(8))]),
    "storage of -1.pt": lambda p: in_zip(p, tensor(count=-1), [("data/0", bytes(16))]),
    "tensor outside.pt": lambda p: in_zip(p, tensor(offset=1), [("data/0", bytes(16))]),
    "tensor before.pt": lambda p: in_zip(p, tensor(offset=-4), [("data/0", bytes(16))]),
    "one value 10^12 times.pt": lambda p: in_zip(
        p, tensor(size=(10**12,), stride=(0,)), [("data/0", bytes(16))]
    ),
    "steps forth and back.pt": lambda p: in_zip(
        p, tensor(size=(5, 5), stride=(10, -10)), [("data/0", bytes(16))]
    ),
    "sizes below 0.pt": lambda p: in_zip(
        p, tensor(size=(-2, -2), stride=(1, 1)), [("data/0", bytes(16))]
    ),
    # What is not a pickle, or not one of ours
    "nothing.pt": lambda p: p.write_bytes(b""),
    "only a zip's end.pt": lambda p: p.write_bytes(b"PK\x05\x06" + bytes(18)),
    "a text.pt": lambda p: p.write_bytes(b"hello, world\n" * 100),
    "zeros.pt": lambda p: p.write_bytes(bytes(10**6)),
    "a number.pt": lambda p: in_zip(p, pickle.dumps(5)),
    "type of objects.pt": lambda p: in_zip(p, pickle.dumps(Call(np.dtype, "O"), 2)),
    "state of a type.pt": lambda p: in_zip(
        p, b"\x80\x02ctorch\nFloatStorage\n}\x8c\x08itemsizeK\x40sb."
    ),
    # Headers of safetensors
    "header 100,000 deep": lambda p: in_folder(p, SETTINGS, b"[" * 10**5 + b"]" * 10**5),
    "header of 9 MB": lambda p: in_folder(p, SETTINGS, b"{}" + b" " * (9 * 2**20)),
    "shape of 10^30": lambda p: in_folder(p, SETTINGS, one([10**30]), bytes(16)),
    "shape that wraps to 0": lambda p: in_folder(
        p, SETTINGS, header_of(shape=[2**32, 2**32], data_offsets=[0, 0])
    ),
    "shape below 0": lambda p: in_folder(p, SETTINGS, one([-2, -2]), bytes(16)),
    "shape of text": lambda p: in_folder(p, SETTINGS, one("4"), bytes(16)),
    "shape of halves": lambda p: in_folder(p, SETTINGS, one([0.5, 8]), bytes(16)),
    "offsets of infinity": lambda p: in_folder(
        p, SETTINGS, header_of().replace(b"[0, 16]", b"[0, Infinity]"), bytes(16)
    ),
    "offsets elsewhere": lambda p: in_folder(
        p, SETTINGS, header_of(data_offsets=[-16, 0]), bytes(16)
    ),
    # Settings
    "settings 100,000 deep": lambda p: in_folder(p, "[" * 10**5 + "]" * 10**5),
    "settings of 20 MB": lambda p: in_folder(p, '{"a": "' + "x" * (20 * 2**20) + '"}'),
    "settings that are a list": lambda p: in_folder(p, "[1, 2]"),
    **{
        f"ours, {name}": lambda p, model=model: in_folder(p, ours_with(**model))
        for name, model in {
            "width 10^12": {"width": 10**12},
            "width 10^7": {"width": 10**7},
            "width of a text": {"width": "wide"},
            "depth 10^9": {"encoder": {"depth": 10**9, "heads": 2, "mlp": 64}},
            "heads 0": {"encoder": {"depth": 1, "heads": 0, "mlp": 64}},
            "mlp NaN": {"encoder": {"depth": 1, "heads": 2, "mlp": float("nan")}},
            "image 16,000, patches of 1": {"image": 16_000, "patch": 1},
            "image 10^12": {"image": 10**12},
            "model that is a list": {"encoder": [1]},
        }.items()
    },
    **{
        f"theirs, {name}": lambda p, options=options: in_folder(
            p, SETTINGS | options, header_of(), bytes(16)
        )
        for name, options in {
            "width 10^12": {"hidden_size": 10**12},
            "depth 10^9": {"num_hidden_layers": 10**9},
            "depth -1": {"num_hidden_layers": -1},
            "heads 0": {"num_attention_heads": 0},
            "10^5 convolutions": {
                "conv_dim": [8] * 10**5,
                "conv_kernel": [3] * 10**5,
                "conv_stride": [2] * 10**5,
                "num_feat_extract_layers": 10**5,
            },
            "width NaN": {"hidden_size": float("nan")},
            "dropout of 10^400": {"hidden_dropout": 10**400},
            "null": {"hidden_size": None, "architectures": None},
        }.items()
    },
}

CHILD = """
import json, sys, time
from pathlib import Path
from data2vec_jax import convert
from data2vec_jax.convert.__main__ import main
from data2vec_jax.core.errors import UserError
import jax
jax.eval_shape(lambda: jax.random.key(0))

def mebibytes(name):  # VmRSS: now; VmHWM: the most since `clear_refs` was written
    status = Path("/proc/self/status").read_text()
    return int(status.partition(name)[2].split()[0]) // 1024

for path in sorted(Path(sys.argv[1]).iterdir()):
    Path("/proc/self/clear_refs").write_text("5")
    before, begin = mebibytes("VmRSS:"), time.process_time()
    try:
        main([str(path), sys.argv[2], "--to=jax"])
        said = "converted"
    except UserError as error:
        said = f"UserError: {error}"
    except BaseException as error:
        said = f"{type(error).__name__}: {error}"
    cost = mebibytes("VmHWM:") - before, time.process_time() - begin
    print(json.dumps([path.name, said, *cost]), flush=True)
"""


def test_harm_is_refused_at_once(tmp_path):
    """All in one process, whose memory and time are measured from outside of the code."""
    (tmp_path / "harm").mkdir()
    for name, make in HARM.items():
        make(tmp_path / "harm" / name)
    found = subprocess.run(
        [sys.executable, "-c", CHILD, tmp_path / "harm", tmp_path / "out"],
        capture_output=True,
        text=True,
        timeout=560,
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    assert found.returncode == 0, found.stderr[-2000:]
    results = [json.loads(line) for line in found.stdout.splitlines() if line.startswith("[")]
    assert {name for name, *_ in results} == set(HARM)
    wrong = []
    for name, said, mebibytes, seconds in results:
        good = said.startswith("UserError: ") and "\n" not in said and len(said) < 800
        if not good or mebibytes > MEBIBYTES or seconds > SECONDS:
            wrong.append((name, said[:300], mebibytes, seconds))
    assert not wrong, textwrap.indent("\n".join(map(str, wrong)), "  ")
    assert not (tmp_path / "out").exists()
    worst = max(results, key=lambda x: x[2]), max(results, key=lambda x: x[3])
    print(f"most memory: {worst[0]}; most time: {worst[1]}")


def test_a_good_file_is_not_refused(tmp_path):
    """The limits are far from what weights need: many tensors, shared and compressed ones."""
    arrays = [("data/0", np.arange(4, dtype=np.float32).tobytes())]
    in_zip(tmp_path / "a.pt", tensor(), arrays)
    assert pickles.read(tmp_path / "a.pt")["model"]["a"].tolist() == [0, 1, 2, 3]
    in_zip(tmp_path / "b.pt", tensor(), arrays, zipfile.ZIP_DEFLATED)
    assert pickles.read(tmp_path / "b.pt")["model"]["a"].tolist() == [0, 1, 2, 3]
    in_zip(tmp_path / "c.pt", tensor(size=(2, 2), stride=(0, 1)), arrays)  # a row, twice
    assert pickles.read(tmp_path / "c.pt")["model"]["a"].tolist() == [[0, 1], [0, 1]]
    words = {f"word {i}": i for i in range(100_000)}
    in_zip(tmp_path / "d.pt", pickle.dumps({"vocab": OrderedDict(words)}, 2))
    assert pickles.plain(pickles.read(tmp_path / "d.pt")["vocab"]) == words


def test_a_parent_in_settings_is_no_circle(tmp_path):
    """omegaconf's containers know the one that they are in; that is not looked at."""
    content = io.BytesIO()
    inner = (
        b"comegaconf.listconfig\nListConfig\n)\x81q\x01"
        b"}(\x8c\x08_contentK\x05\x8c\x07_parenth\x01ub"
    )
    content.write(b"\x80\x02}\x8c\x03cfg" + inner + b"s.")
    pickletools.dis(content.getvalue(), out=io.StringIO())  # well formed
    in_zip(tmp_path / "a.pt", content.getvalue())
    assert pickles.plain(pickles.read(tmp_path / "a.pt")["cfg"]) == 5


@pytest.mark.parametrize(
    "name",
    ["../other.safetensors", "/etc/passwd", "..", "", "x" * 5000, "a\0b", 5],
    ids=["above", "absolute", "dots", "empty", "long", "null", "number"],
)
def test_weights_are_those_beside_the_index(tmp_path, name):
    """A weight map that points elsewhere."""
    folder = tmp_path / "model"
    in_folder(folder, SETTINGS)
    in_folder(tmp_path / "elsewhere", SETTINGS, header_of(), bytes(16))
    (tmp_path / "elsewhere/model.safetensors").rename(tmp_path / "other.safetensors")
    (folder / "model.safetensors").rename(folder / "beside")
    index = {"weight_map": {"a": name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError) as error:
        ours.open_checkpoint(folder)
    assert "\n" not in str(error.value)


def test_settings_of_any_type_are_refused(tmp_path):
    """Every field of theirs, one at a time, of a type or size that it cannot have."""
    in_folder(tmp_path / "model", SETTINGS, header_of(), bytes(16))
    source = layouts.open_source(tmp_path / "model")
    assert isinstance(source.state, safetensors.SafeTensors)
    fields = (
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
        "conv_dim",
        "conv_kernel",
        "conv_stride",
        "num_conv_pos_embeddings",
        "num_conv_pos_embedding_groups",
        "conv_pos_kernel_size",
        "hidden_act",
        "layer_norm_eps",
    )
    for field in fields:
        for value in (-1, 10**30, [[]], {"a": {}}, "text"):
            (tmp_path / "model/config.json").write_text(json.dumps(SETTINGS | {field: value}))
            with pytest.raises(UserError) as error:
                ours.open_checkpoint(tmp_path / "model")
            assert "\n" not in str(error.value) and len(str(error.value)) < 800
