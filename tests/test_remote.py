"""Remote places: fsspec's memory and local file systems, and a real S3 server in another process.

What is read from them is what is read from the files themselves, by other code or by hand.
"""

import contextlib
import functools
import gzip
import hashlib
import io
import json
import os
import pickle
import shutil
import socket
import subprocess
import sys
import tarfile
import time
import urllib.request
import uuid
from pathlib import Path

import fsspec
import numpy as np
import pytest
import soundfile
from fsspec.implementations.memory import MemoryFileSystem
from PIL import Image

from data2vec_jax.configs import speech_v2, vision_v2
from data2vec_jax.core.errors import ExampleError, UserError
from data2vec_jax.data import copies, places
from data2vec_jax.data.batches import HostBatchReader, TrainSampler
from data2vec_jax.data.readers import stream
from data2vec_jax.data.sources import open_source, shards, write_array_record
from data2vec_jax.modalities import contract
from data2vec_jax.modalities.speech.codec import CODEC as SPEECH
from data2vec_jax.modalities.text.codec import CODEC as TEXT
from data2vec_jax.modalities.vision.codec import CODEC as VISION
from data2vec_jax.prepare.__main__ import main

RATE = 16_000
STORES = ("memory", "file", "s3")


def add_to_tar(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def flac(samples: np.ndarray) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, RATE, format="flac", subtype="PCM_16")
    return file.getvalue()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A small corpus of every kind of address, on this machine."""
    top = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(3)
    for split, count in (("train", 8), ("val", 3)):
        for n in range(count):
            path = top / "photos" / split / ("cat", "dog")[n % 2] / f"{n}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 255, (40, 48, 3), np.uint8)).save(path)
    (top / "photos" / "train" / "cat" / ".hidden.png").write_bytes(b"no image")
    (top / "photos" / "train" / "notes.txt").write_text("not read")
    (top / "clips").mkdir()
    rows, texts = ["path\tlabel\ttranscript"], ["text,label"]
    with (
        tarfile.open(top / "train-000.tar", "w") as first,
        tarfile.open(top / "train-001.tar", "w") as second,
    ):
        for n in range(10):
            audio = rng.normal(0, 0.1, 9_000 + 700 * n)
            data = flac(audio)
            (top / "clips" / f"{n}.flac").write_bytes(data)
            rows.append(f"clips/{n}.flac\t{('no', 'yes')[n % 2]}\tTHIS IS {n}")
            texts.append(f'"a text, number {n}",{n % 2}')
            tar = (first, second)[n % 2]
            add_to_tar(tar, f"part/{n}.json", json.dumps({"speaker": n // 2}).encode())
            add_to_tar(tar, f"part/{n}.flac", data)
            add_to_tar(tar, f"part/{n}.cls", ("no", "yes")[n % 2].encode())
            add_to_tar(tar, f"part/{n}.txt", f"THIS IS {n}\n".encode())
    (top / "rows.tsv").write_text("\n".join(rows) + "\n")
    (top / "texts.csv.gz").write_bytes(gzip.compress("\n".join(texts).encode()))
    prepare("speech", f"manifest:{top}/rows.tsv", top / "shards")
    (top / "plain").mkdir()
    for part in range(2):
        examples = [{"text": f"text {part} {n}", "label": n} for n in range(3)]
        write_array_record(top / "plain" / f"train-{part}.array_record", examples)
    return top


KINDS = {
    "folder": ("folder:{}/photos", "train", VISION),
    "other split": ("folder:{}/photos", "val", VISION),
    "manifest": ("manifest:{}/rows.tsv", "train", SPEECH),
    "gz": ("manifest:{}/texts.csv.gz", "train", TEXT),
    "shards": ("array_record:{}/shards", "train", SPEECH),
    "shards by name": ("array_record:{}/plain", "train", TEXT),
    "shards by glob": ("array_record:{}/plain/{{split}}-*.array_record", "train", TEXT),
    "tars": ("webdataset:{}/{{split}}-{{000..001}}.tar", "train", SPEECH),
    "tars by glob": ("webdataset:{}/*-*.tar", "train", SPEECH),
}


def prepare(modality, source, target, *options):
    """Runs the command in this process."""
    if not any(option.startswith("--workers") for option in options):
        options = (*options, "--workers=1")
    main([modality, f"--source={source}", f"--target={target}", *options])


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A server that speaks S3, a process of its own, and the keys to it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
            stdout=file,
            stderr=file,
        )
    url = f"http://127.0.0.1:{port}"
    for _ in range(600):
        with contextlib.suppress(OSError):
            urllib.request.urlopen(f"{url}/moto-api/", timeout=5).read()
            break
        assert process.poll() is None, log.read_text()
        time.sleep(0.1)
    names = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}
    names |= {"AWS_ENDPOINT_URL": url, "AWS_DEFAULT_REGION": "us-east-1"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in names.items():
            patch.setenv(name, value)
        fsspec.filesystem("s3").mkdir("bucket")
        yield url
    process.kill()
    process.wait()


@pytest.fixture(scope="module")
def stored(corpus, server):
    """The name of a store -> the place of a copy of the corpus there."""
    found = {}
    for store in STORES:
        file_system = fsspec.filesystem(store)
        place = str(corpus) if store == "file" else "/bucket" if store == "memory" else "bucket"
        for path in corpus.rglob("*") if store != "file" else ():
            if path.is_file():
                file_system.pipe_file(f"{place}/{path.relative_to(corpus)}", path.read_bytes())
        found[store] = f"{store}://{place.lstrip('/') if store != 'file' else place}"
    return found


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv(copies.VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(places, "WAITS", (0.01, 0.01))
    return tmp_path / "cache"


def opened(kind, top):
    address, split, codec = KINDS[kind]
    return open_source(address.format(top), split, codec=codec)


def refused(message, function, *arguments, **options):
    """It fails with one line that says `message`."""
    with pytest.raises(UserError) as error:
        function(*arguments, **options)
    assert message in str(error.value) and "\n" not in str(error.value), str(error.value)


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("kind", KINDS)
def test_all_is_as_on_this_machine(kind, store, corpus, stored):
    local, remote = opened(kind, corpus), opened(kind, stored[store])
    assert len(local) == len(remote) > 2
    np.testing.assert_equal(list(remote), list(local))
    np.testing.assert_equal(remote.lengths(), local.lengths())
    assert remote.digest() == local.digest() and remote.label_names == local.label_names
    assert [n.split("not read")[1:] for n in remote.notes] == [
        n.split("not read")[1:] for n in local.notes
    ]
    np.testing.assert_equal(pickle.loads(pickle.dumps(remote))[1], local[1])
    if kind not in ("gz", "shards by name", "shards by glob"):
        np.testing.assert_equal(remote.column("label"), local.column("label"))
    if kind in ("manifest", "tars"):
        np.testing.assert_equal(remote.part(2, 100, 50)["audio"], local[2]["audio"][100:150])


def batches(source, name, config, workers):
    examples = contract.get(name).examples(source, **config["examples"])
    sampler = TrainSampler(examples.bucket_of, examples.layout.buckets, 4, 0, None)
    options = {"workers": workers, "prefetch": 2, "place": lambda batch: batch}
    return list(stream(HostBatchReader(sampler, examples), 0, 4, **options))


@pytest.mark.parametrize("kind", ["folder", "manifest", "shards", "tars"])
def test_batches_by_processes_are_bitwise_those_of_local_files(kind, corpus, stored):
    name, module = ("vision", vision_v2) if kind == "folder" else ("speech", speech_v2)
    config = module.get_config("smoke").to_dict()
    if name == "speech":
        config["examples"]["crops"] = (0.5,)
    local = batches(opened(kind, corpus), name, config, 0)
    remote = batches(opened(kind, stored["s3"]), name, config, 2)
    assert len(local) == len(remote) == 4
    for a, b in zip(local, remote, strict=True):
        assert a.keys() == b.keys() and "bad_examples" not in a
        assert all(a[key].tobytes() == b[key].tobytes() for key in a)


def files_of(store, place):
    """Name -> bytes of all below a place, by fsspec alone."""
    file_system = fsspec.filesystem(store)
    path = place.partition("://")[2]
    file_system.invalidate_cache()
    return {Path(name).name: file_system.cat_file(name) for name in file_system.find(path)}


@pytest.mark.parametrize("workers", [1, 2])
def test_prepare_from_and_to_a_bucket(workers, corpus, stored, tmp_path, monkeypatch):
    target = f"s3://bucket/made/{uuid.uuid4().hex}"
    options = ["--shard_mb=0.05", f"--workers={workers}"]
    source = f"manifest:{stored['s3']}/rows.tsv"
    prepare("speech", f"manifest:{corpus}/rows.tsv", tmp_path / "local", *options)
    local = {p.name: p.read_bytes() for p in (tmp_path / "local").iterdir()}
    names = sorted(name for name in local if name.endswith(".array_record"))
    assert len(names) > 2
    with monkeypatch.context() as patch:  # the network is gone for good after two shards
        sent = []
        put = places.written

        def some(folder):
            sent.append(folder)
            if len(sent) > 6:
                raise UserError("no network")
            return put(folder)

        if workers == 1:
            patch.setattr(places, "written", some)
            refused("no network", prepare, "speech", source, target, *options)
            assert "manifest.json" not in files_of("s3", target)
            refused("is not finished", open_source, f"array_record:{target}", codec=SPEECH)
            done = fsspec.filesystem("s3").info(f"{target}/{names[0]}")["LastModified"]
            time.sleep(1.1)  # a store's clock
    prepare("speech", source, target, *options)
    made = files_of("s3", target)
    assert made.keys() == local.keys()
    assert all(made[name] == local[name] for name in local if "array_record" in name)
    if workers == 1:  # what was done before was not made again
        assert fsspec.filesystem("s3").info(f"{target}/{names[0]}")["LastModified"] == done
    source = open_source(f"array_record:{target}", codec=SPEECH)
    expected = open_source(f"array_record:{tmp_path}/local", codec=SPEECH)
    np.testing.assert_equal(list(source), list(expected))
    refused("is finished", prepare, "speech", f"manifest:{corpus}/rows.tsv", target)
    refused("holds other files", prepare, "speech", f"manifest:{corpus}/rows.tsv", stored["s3"])


def test_a_changed_remote_file_is_copied_again(stored, cache, capfd):
    place = "s3://bucket/changing"
    for text in ("one", "two"):  # of the same size
        path = cache.parent / "train-0.array_record"
        write_array_record(path, [{"text": text}])
        fsspec.filesystem("s3").pipe_file(f"{place}/{path.name}", path.read_bytes())
        for _ in range(2):
            source = open_source(f"array_record:{place}", codec=TEXT)
            assert source[0]["text"] == text
        assert capfd.readouterr().err.count("copying 1 files") == 1
    assert len(list(cache.glob("*/*"))) == 2


READER = """
import sys
from data2vec_jax.data.sources import open_source
from data2vec_jax.modalities.speech.codec import CODEC
source = open_source(sys.argv[1], codec=CODEC)
print(sum(float(abs(item["audio"]).sum()) for item in source))
"""


def test_processes_share_a_copy_and_one_that_was_killed_leaves_no_harm(corpus, stored, cache):
    address = f"array_record:{stored['s3']}/shards"
    place = f"{stored['s3']}/shards/train-00000.array_record"
    ends = (".lengths.npy", ".columns.json")
    files = {one: places.stat(one, fresh=True) for one in (place, *(place + end for end in ends))}
    name = hashlib.sha256(repr(files).encode()).hexdigest()[:16]
    (cache / f"{name}.partial").mkdir(parents=True)
    half = cache / f"{name}.partial" / "train-00000.array_record"
    half.write_bytes(b"what a process that was killed had written")
    command = [sys.executable, "-c", READER, address]
    readers = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    found = [reader.communicate(timeout=120) for reader in readers]
    expected = sum(float(abs(item["audio"]).sum()) for item in opened("shards", corpus))
    assert [float(out) for out, _ in found] == [expected] * 3, found
    assert not list(cache.rglob("*.partial"))
    assert {p.parent.name for p in cache.glob("*/*")} == {name}
    assert {p.name for p in cache.glob("*/*")} == {
        p.name for p in (corpus / "shards").glob("train-*")
    }


class Flaky(MemoryFileSystem):
    """A store that fails `left` times, with `error`."""

    protocol = "flaky"
    error: Exception = OSError("busy")
    left = 0
    asked = 0

    def cat_file(self, path, **options):
        Flaky.asked += 1
        if Flaky.left:
            Flaky.left -= 1
            raise Flaky.error
        return b"content"


def test_what_may_pass_is_tried_again(monkeypatch):
    fsspec.register_implementation("flaky", Flaky, clobber=True)
    for error, failures, tries, message in (
        (OSError("busy"), 2, 3, ""),
        (TimeoutError(), 2, 3, ""),
        (OSError("busy\nvery"), 9, 3, "flaky://x/y: the store gives no answer (busy very)"),
        (TimeoutError(), 9, 3, "the store gives no answer (TimeoutError)"),
        (PermissionError("403"), 9, 1, "flaky://x/y: the store permits no access"),
        (FileNotFoundError("404"), 9, 1, "flaky://x/y: no such file"),
    ):
        Flaky.error, Flaky.left, Flaky.asked = error, failures, 0
        if message:
            refused(message, places.read, "flaky://x/y")
        else:
            assert places.read("flaky://x/y") == b"content"
        assert Flaky.asked == tries


def test_errors(corpus, stored, monkeypatch, tmp_path):
    s3 = stored["s3"]
    for address, codec, message in (
        ("folder:s3://bucket/nothing", VISION, "no folder 's3://bucket/nothing'"),
        ("folder:s3://no-bucket-of-this-name/x", VISION, "no folder 's3://no-bucket"),
        (f"folder:{s3}/rows.tsv", VISION, f"did you mean 'manifest:{s3}/rows.tsv'"),
        (f"manifest:{s3}/none.tsv", SPEECH, f"no file '{s3}/none.tsv'"),
        (f"array_record:{s3}/none", SPEECH, "no file or folder"),
        (f"array_record:{s3}/clips", SPEECH, "no *.array_record files"),
        (f"webdataset:{s3}/none.tar", SPEECH, f"{s3}/none.tar: no such file"),
        (f"webdataset:{s3}/none-*.tar", SPEECH, f"no file '{s3}/none-*.tar'"),
        (f"webdataset:{s3}/clips", SPEECH, f"did you mean 'webdataset:{s3}/clips/*.tar'"),
        (f"librispeech:{s3}", SPEECH, "is read from this machine only"),
        ("folder:s4://bucket/x", VISION, "no store is called 's4'; did you mean 's3'?"),
        ("folder:dropbox://x", VISION, "pip install dropboxdrivefs"),
    ):
        refused(message, open_source, address, codec=codec)
    refused("of this machine only", main, ["vision", f"--source=folder:{s3}", "--check=s3://b/x"])
    # A file that is named, but gone, is bad, and one that goes later too.
    table = fsspec.filesystem("s3")
    table.pipe_file("bucket/bad/rows.tsv", b"path\na.flac\nb.flac\nnone.flac\n")
    for name in "ab":
        table.pipe_file(f"bucket/bad/{name}.flac", (corpus / "clips/1.flac").read_bytes())
    source = open_source("manifest:s3://bucket/bad/rows.tsv", codec=SPEECH)
    assert list(source.bad) == [2] and "no file 's3://bucket/bad/none.flac'" in str(source.bad[2])
    table.rm("bucket/bad/b.flac")
    with pytest.raises(ExampleError, match=r"s3://bucket/bad/b.flac: no such file") as error:
        source[1]
    assert error.value.reason == "missing"
    # No server.
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    code = f"""if True:
        import s3fs
        s3fs.S3FileSystem.retries = 1
        from data2vec_jax.data import places
        places.WAITS = ()
        from data2vec_jax.data.sources import open_source
        from data2vec_jax.modalities.vision.codec import CODEC
        open_source("folder:{s3}/photos", codec=CODEC)"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "UserError" in done.stderr or "ExampleError" in done.stderr
    assert "the store gives no answer" in done.stderr.strip().splitlines()[-1]


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "fsspec", None)
    refused("pip install fsspec", open_source, "folder:s3://bucket/x", codec=VISION)


def test_a_full_disk(stored, monkeypatch):
    usage = shutil.disk_usage("/")._replace(free=10)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    refused("$DATA2VEC_CACHE names another", opened, "shards", stored["s3"])


@pytest.mark.parametrize("store", STORES)
def test_an_empty_file_and_a_part(store, stored, tmp_path):
    place = f"{stored[store]}/rows.tsv"
    assert places.read(place, 2, 3) == b"th\t" and places.read(place, 0, 0) == b""
    with pytest.raises(ExampleError, match="ends after"):
        places.read(place, 0, 10**6)
    place = f"file://{tmp_path}/empty" if store == "file" else f"{store}://bucket/of-none/empty"
    (tmp_path / "empty").touch()
    fsspec.filesystem(store).pipe_file(place, b"")
    assert places.read(place) == b"" and shards.mark_of(place) == shards.mark_of(tmp_path / "empty")
    refused("not JSON", places.read_json, place)


def test_joins():
    assert places.join("s3://b/x", "../y/./z.wav") == "s3://b/y/z.wav"
    assert places.join("s3://b/x", "gs://c/z.wav") == "gs://c/z.wav"
    assert places.join("s3://b/x", "/data/z.wav") == "/data/z.wav"
    assert places.join("/data", "z.wav") == "/data/z.wav"


# Tars of samples.


def tar_of(path: Path, *members: tuple[str, bytes], **options) -> Path:
    with tarfile.open(path, "w", **options) as tar:
        for name, data in members:
            add_to_tar(tar, name, data)
    return path


CLIP = flac(np.zeros(400))


def test_a_tar_by_hand(tmp_path):
    """The fields of samples, by a tar of the command `tar`."""
    for name, data in {
        "b/1.flac": CLIP,
        "b/1.json": b'{"label": "x", "speaker": "Ann", "path": "no", "nested": [1, 2]}',
        "a.FLAC": CLIP,
        "a.txt": b"\xef\xbb\xbfWHAT WAS SAID \n",
        "a.cls": b"7\n",
        "b/1.cls": b"3",
        "b/1.info.xml": b"<x/>",
        "b/._1.flac": b"of another system",
    }.items():
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    long = "x" * 150 + ".flac"  # needs an extended header
    (tmp_path / "in" / long).write_bytes(CLIP)
    names = ["b", "a.FLAC", "a.txt", "a.cls", long]
    subprocess.run(["tar", "cf", tmp_path / "x.tar", "-C", tmp_path / "in", *names], check=True)
    source = open_source(f"webdataset:{tmp_path}/x.tar", codec=SPEECH)
    items = {item["path"]: item for item in source}
    assert set(items) == {"x.tar/b/1.flac", "x.tar/a.FLAC", f"x.tar/{long}"}
    one, two = items["x.tar/b/1.flac"], items["x.tar/a.FLAC"]
    assert source.label_names == ("3", "7") and one["label"] == 0 and two["label"] == 1
    assert two["transcript"] == "WHAT WAS SAID" and one["transcript"] is None
    assert one["speaker"] == "Ann" and one["nested"] == [1, 2] and items[f"x.tar/{long}"]
    assert all(len(item["audio"]) == 400 for item in items.values())
    assert ".info.xml 1" in source.notes[0] and source.lengths().tolist() == [400] * 3
    assert source.location(0).startswith(f"{tmp_path}/x.tar/")


def test_tars_of_texts_and_images(tmp_path):
    tar_of(tmp_path / "t.tar", ("1.txt", b"a text"), ("1.cls", b"0"), ("2.txt", b"more"))
    assert [x["text"] for x in open_source(f"webdataset:{tmp_path}/t.tar", codec=TEXT)] == [
        "a text",
        "more",
    ]
    file = io.BytesIO()
    Image.new("RGB", (5, 4)).save(file, "png")
    tar_of(tmp_path / "i.tar", ("1.png", file.getvalue()), ("1.txt", b"a caption"))
    (item,) = open_source(f"webdataset:{tmp_path}/i.tar", codec=VISION)
    assert item["image"].shape == (4, 5, 3) and item["transcript"] == "a caption"


def test_bad_samples_are_named(tmp_path):
    samples = [("good.flac", CLIP), ("two.flac", CLIP), ("two.wav", CLIP), ("two.cls", b"0")]
    samples += [("same.flac", CLIP), ("same.flac", CLIP), ("none.txt", b"words")]
    samples += [("json.flac", CLIP), ("json.json", b"{"), ("list.flac", CLIP)]
    samples += [("list.json", b"[1]"), ("deep.flac", CLIP), ("deep.json", b"[" * 200_000)]
    samples += [("huge.flac", CLIP), ("huge.txt", b"a" * (2**20 + 1))]
    samples += [("latin.flac", CLIP), ("latin.txt", b"\xe4\xf6"), ("noise.flac", b"no flac")]
    tar_of(tmp_path / "x.tar", *samples)
    source = open_source(f"webdataset:{tmp_path}/x.tar", codec=SPEECH)
    found = {}
    for i in range(len(source)):
        try:
            source[i]
        except ExampleError as error:
            assert "\n" not in str(error) and f"{tmp_path}/x.tar/" in str(error)
            found[error.where.split("/")[-1].split(".")[0]] = error.reason
    assert found == {
        "two": "several",
        "same": "several",
        "none": "missing",
        "json": "format",
        "list": "format",
        "deep": "format",
        "huge": "too large",
        "latin": "format",
        "noise": "unreadable",
    }
    tar_of(tmp_path / "y.tar", ("a.txt", b"words"))
    refused("has no .flac or", open_source, f"webdataset:{tmp_path}/y.tar", codec=SPEECH)


def test_damaged_tars_are_refused(tmp_path):
    whole = tar_of(tmp_path / "x.tar", *((f"{n}.flac", CLIP) for n in range(4)))
    data, place = whole.read_bytes(), tmp_path / "y.tar"
    opening = functools.partial(open_source, f"webdataset:{place}", codec=SPEECH)
    member = 512 + -(-len(CLIP) // 512) * 512
    for end in (0, 100, 512, 700, member, member + 511, 2 * member, 4 * member - 1, 4 * member):
        place.write_bytes(data[:end])
        refused(str(place), opening)
    lying = bytearray(data)
    lying[124:136] = b"77777777777\0"  # the size of the first
    header = lying[:148] + b" " * 8 + lying[156:512]
    lying[148:156] = f"{sum(header):06o}\0 ".encode()
    place.write_bytes(lying)
    refused("is said to end beyond it", opening)
    place.write_bytes(data[:member] + b"garbage" * 100 + data[member:])
    refused("damaged", opening)
    for mode in ("gz", "bz2", "xz"):
        with tarfile.open(place, f"w:{mode}") as tar:
            add_to_tar(tar, "a.flac", CLIP)
        refused("is compressed", opening)
    place.unlink()
    os.mkfifo(place)
    refused("no file", opening)


def test_braces(tmp_path):
    for name in ("a-08", "a-09", "a-10", "b-10", "a[1]"):
        tar_of(tmp_path / f"{name}.tar", (f"{name}.flac", CLIP))
    for pattern, expected in {
        "a-{08..10}.tar": ["a-08", "a-09", "a-10"],
        "{a,b}-{10..10}.tar": ["a-10", "b-10"],
        "{split}-{08,10}.tar": ["a-08", "a-10"],
        "?-{09,10}.tar": ["a-09", "a-10", "b-10"],
        "a[1].tar": ["a[1]"],  # a file's name, though it is a pattern, too
    }.items():
        source = open_source(f"webdataset:{tmp_path}/{pattern}", "a", codec=SPEECH)
        assert [item["path"].split(".")[0] for item in source] == expected
    for pattern, message in {
        "a-{08..11}.tar": "no file",
        "{0..99999999999}.tar": "more than",
        "{0..9999}{0..9999}.tar": "more than",
    }.items():
        refused(message, open_source, f"webdataset:{tmp_path}/{pattern}", codec=SPEECH)
