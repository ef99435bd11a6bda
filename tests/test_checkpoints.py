"""Checkpoints: exact, elastic, atomic; mistakes and full disks end in one line.

Run as a script, this file is the other process of some tests: `python FILE FUNCTION ARGUMENTS`.
"""

import os

if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count=8"

import logging
import pathlib
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import absl.logging
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tensorstore
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from data2vec_jax.core.checkpoints import Checkpoints, load_params
from data2vec_jax.core.config import check_section
from data2vec_jax.core.errors import UserError

ROOT = pathlib.Path(__file__).parents[1]


@flax.struct.dataclass
class TrainState:
    step: jax.Array
    params: dict
    teacher: dict
    opt_state: tuple
    key: jax.Array


def mesh_of(devices, data=1):
    """A mesh (data, fsdp) over the first so many devices."""
    return Mesh(np.array(jax.devices()[:devices]).reshape(data, -1), ("data", "fsdp"))


def tree_of(step, width=16, impl=None):
    """A state whose every number depends on `step`, and on nothing else (no rounding)."""
    key = jax.random.fold_in(jax.random.key(0, impl=impl), step)

    def draw(name, *shape):
        return jax.random.uniform(jax.random.fold_in(key, len(name)), shape)

    params = {
        "encoder": {"kernel": draw("kernel", width, 24), "bias": draw("bias", 3)},
        "head": {"kernel": draw("head/kernel", width, 2).astype(jnp.bfloat16)},
    }
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    clip, (adam, *others) = optimizer.init(params)
    half, minus = jax.tree.map(lambda x: x / 2, params), jax.tree.map(lambda x: -x, params)
    adam = adam._replace(count=step, mu=half, nu=minus)
    return TrainState(
        step=step,
        params=params,
        teacher={"encoder": {"kernel": -params["encoder"]["kernel"]}},
        opt_state=(clip, (adam, *others)),
        key=key,
    )


def abstract(mesh, **options):
    """The state as shapes with shardings: rows of matrices over fsdp, the rest on all devices."""

    def place(leaf):
        spec = PartitionSpec("fsdp") if leaf.ndim == 2 else PartitionSpec()
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(place, jax.eval_shape(lambda: tree_of(jnp.int32(0), **options)))


def make(step, mesh, **options):
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract(mesh, **options))
    return jax.jit(lambda step: tree_of(step, **options), out_shardings=shardings)(jnp.int32(step))


def host(tree):
    """A copy in numpy, keys as (implementation, integers)."""

    def copy(leaf):
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return str(jax.random.key_impl(leaf)), np.array(jax.random.key_data(leaf))
        return np.array(leaf)

    return jax.tree.map(copy, tree)


def assert_equal(got, want):
    """The same structure, types, dtypes and bits."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert type(a) is type(b)
        if isinstance(a, np.ndarray):
            assert a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
        else:
            assert a == b


def folders(directory):
    return sorted(int(name) for name in os.listdir(directory) if name.isdigit())


def spawn(function, *arguments, **environment):
    return subprocess.Popen(
        [sys.executable, __file__, function, *map(str, arguments)],
        env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def log_everything():
    """Other process: as in a program that shows its own progress."""
    logging.basicConfig(level=logging.INFO, force=True)
    absl.logging.set_verbosity(absl.logging.INFO)


def finish(process, timeout=60):
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        process.kill()
    return process.returncode, out, err


# --- round trips ---------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_round_trip_while_the_state_is_donated(tmp_path, impl):
    """Bit for bit, types included, though the next steps reuse the saved buffers at once."""
    mesh = mesh_of(8)
    state = make(
        3, mesh, width=1 << 16, impl=impl
    )  # 25 MB: to be written after save() has returned
    before = host(state)
    spoil = jax.jit(
        lambda s: s.replace(
            step=s.step + 1,
            **{f: jax.tree.map(lambda x: x * 0, getattr(s, f)) for f in ("params", "teacher")},
            opt_state=jax.tree.map(lambda x: x * 0, s.opt_state),
            key=jax.random.split(s.key)[0],
        ),
        donate_argnums=0,
    )
    with Checkpoints(tmp_path / "checkpoints", every=1) as checkpoints:
        assert checkpoints.save(3, state, {"batch": 3, "plan": [1, {"epoch": 2}]})
        for _ in range(3):
            state = spoil(state)
        jax.block_until_ready(state.params)
        assert checkpoints.latest() == 3
        wanted = abstract(mesh, width=1 << 16, impl=impl)
        restored, position = checkpoints.restore(wanted)
    assert_equal(host(restored), before)
    assert position == {"batch": 3, "plan": [1, {"epoch": 2}]}
    for got, want in zip(jax.tree.leaves(restored), jax.tree.leaves(wanted), strict=True):
        assert got.sharding.is_equivalent_to(want.sharding, got.ndim) and got.committed
    jax.random.bits(restored.key)  # a typed key, ready for use


@pytest.mark.parametrize(("wrote", "reads"), [((8, 1), (1, 1)), ((1, 1), (8, 1)), ((8, 1), (8, 4))])
def test_another_mesh_reads_it(tmp_path, wrote, reads):
    """fsdp 8 to one device and back, and 8 to (4, 2)."""
    state = make(5, mesh_of(*wrote))
    with Checkpoints(tmp_path, every=1) as checkpoints:
        checkpoints.save(5, state, {"batch": 5})
    mesh = mesh_of(*reads)
    with Checkpoints(tmp_path, every=1) as checkpoints:
        restored, _ = checkpoints.restore(abstract(mesh))
    assert_equal(host(restored), host(state))
    kernel = restored.params["encoder"]["kernel"]
    assert kernel.sharding.mesh == mesh
    assert kernel.addressable_shards[0].data.shape == (16 // mesh.shape["fsdp"], 24)


def test_without_a_teacher(tmp_path):
    """Fine-tuning keeps no teacher: an empty subtree is saved, restored, and missed politely."""
    mesh = mesh_of(2)
    state = make(1, mesh).replace(teacher={})
    with Checkpoints(tmp_path, every=1) as checkpoints:
        checkpoints.save(1, state, {"batch": 1})
        restored, position = checkpoints.restore(abstract(mesh).replace(teacher={}))
    assert restored.teacher == {} and position == {"batch": 1}
    assert_equal(host(restored), host(state))
    with pytest.raises(UserError, match=rf"checkpoint {tmp_path}/1 has no teacher"):
        load_params(tmp_path, subtree="teacher")


def test_saves_where_accidental_transfers_are_forbidden(tmp_path, monkeypatch):
    """The copy to the host is allowed. A CPU would not object to it, hence the look inside."""
    state = make(1, mesh_of(8))
    with Checkpoints(tmp_path, every=1) as checkpoints:
        inner, guards = checkpoints._orbax.save_checkpointables_async, []

        def spy(*args, **options):
            guards.append(jax.config.jax_transfer_guard_device_to_host)
            return inner(*args, **options)

        monkeypatch.setattr(checkpoints._orbax, "save_checkpointables_async", spy)
        with jax.transfer_guard("disallow"):
            assert checkpoints.should_save(1)
            assert checkpoints.save(1, state, {"batch": 1})
            assert guards == ["allow"]
            assert jax.config.jax_transfer_guard_device_to_host == "disallow"


# --- which steps ---------------------------------------------------------------------------------


def test_when_to_save_and_what_to_keep(tmp_path):
    def save(step, **options):
        return checkpoints.save(step, make(step, mesh_of(1)), {"batch": step}, **options)

    with Checkpoints(tmp_path, every=2, keep=2, keep_every=6) as checkpoints:
        assert checkpoints.latest() is None
        assert [step for step in range(1, 15) if save(step)] == [2, 4, 6, 8, 10, 12, 14]
        assert save(15, force=True)
        assert not save(15, force=True)  # it is there
        assert not checkpoints.should_save(14)  # behind the newest
    assert folders(tmp_path) == [6, 12, 14, 15]
    with Checkpoints(tmp_path, every=0) as checkpoints:
        assert checkpoints.latest() == 15
        assert not any(checkpoints.should_save(s) for s in range(16, 30))
        restored, position = checkpoints.restore(abstract(mesh_of(1)), step=12)
        assert int(restored.step) == 12 and position == {"batch": 12}
        assert checkpoints.restore(abstract(mesh_of(1)))[1] == {"batch": 15}


def test_options_are_checked(tmp_path):
    check_section("checkpoint", {"every": 1, "keep": 2}, Checkpoints, given=("directory",))
    with pytest.raises(UserError, match=r"config.checkpoint.keeps: no such option.*'keep'"):
        check_section("checkpoint", {"every": 1, "keeps": 2}, Checkpoints, given=("directory",))
    for wrong in ({"every": -1}, {"every": 1, "keep": 0}, {"every": 1, "keep_every": -5}):
        with pytest.raises(UserError, match=rf"config.checkpoint.{list(wrong)[-1]}: "):
            check_section("checkpoint", {"every": 1, **wrong}, Checkpoints, given=("directory",))
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write checkpoints to .*file"):
        Checkpoints(tmp_path / "file", every=1)


# --- parts of a checkpoint -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A workdir with steps 10 and 20, about 200 kB of parameters each."""
    path = tmp_path_factory.mktemp("workdir")
    with Checkpoints(path / "checkpoints", every=10) as checkpoints:
        for step in (10, 20):
            checkpoints.save(step, make(step, mesh_of(8), width=2048), {"batch": step})
    return path


@pytest.mark.parametrize(
    ("path", "step"),
    [("", 20), ("checkpoints", 20), ("checkpoints/10", 10), ("checkpoints/20", 20)],
)
def test_load_params(workdir, path, step):
    want = host(make(step, mesh_of(1), width=2048))
    loaded = load_params(workdir / path)
    assert_equal(loaded, want.params)
    assert type(loaded["encoder"]["kernel"]) is np.ndarray
    assert_equal(load_params(str(workdir / path), subtree="teacher"), want.teacher)


def test_load_params_into_shapes(workdir, monkeypatch):
    """A subset, each leaf where and in which dtype it is wanted; relative paths work."""
    monkeypatch.chdir(workdir.parent)
    sharding = NamedSharding(mesh_of(4), PartitionSpec("fsdp"))
    wanted = {
        "encoder": {
            "kernel": jax.ShapeDtypeStruct((2048, 24), jnp.bfloat16, sharding=sharding),
            "bias": jax.ShapeDtypeStruct((3,), jnp.float16),
        }
    }
    loaded = load_params(workdir.name, wanted)
    params = make(20, mesh_of(1), width=2048).params["encoder"]
    assert loaded["encoder"]["kernel"].sharding == sharding
    assert type(loaded["encoder"]["bias"]) is np.ndarray
    params = {
        "kernel": params["kernel"].astype("bfloat16"),
        "bias": params["bias"].astype("float16"),
    }
    assert_equal(host(loaded), {"encoder": host(params)})


def test_load_params_reads_no_optimiser_state(workdir):
    """The files' bytes that are read stay near the parameters' size; the moments are twice that."""

    def bytes_read():
        name = "/tensorstore/kvstore/file/bytes_read"
        metrics = tensorstore.experimental_collect_matching_metrics(name)
        return sum(value["value"] for metric in metrics for value in metric["values"])

    folder = workdir / "checkpoints" / "20"
    data = [f.stat().st_size for f in folder.rglob("*") if f.is_file()]
    before = bytes_read()
    size = sum(x.nbytes for x in jax.tree.leaves(load_params(folder)))
    read = bytes_read() - before
    assert 0.8 * size < read < 1.3 * size < sum(data) / 2


# --- mistakes ------------------------------------------------------------------------------------


def test_no_checkpoint(tmp_path, workdir):
    checkpoints = Checkpoints(tmp_path / "empty", every=1)
    with checkpoints, pytest.raises(UserError, match=rf"^no checkpoint in {tmp_path}/empty$"):
        checkpoints.restore(abstract(mesh_of(1)))
    for path in (tmp_path / "empty", tmp_path / "missing"):
        with pytest.raises(UserError, match=f"^no checkpoint at {path}$"):
            load_params(path)
    checkpoints = Checkpoints(workdir / "checkpoints", every=1)
    with checkpoints, pytest.raises(UserError, match=r"of step 15 in .*; it holds 10, 20$"):
        checkpoints.restore(abstract(mesh_of(1)), step=15)


def test_a_checkpoint_of_another_config(workdir):
    """The first path that differs, with both shapes; nothing is cut, padded, or left out."""
    mesh = mesh_of(1)
    fits = abstract(mesh, width=2048)
    kernel = fits.params["encoder"]["kernel"]
    spare = jax.ShapeDtypeStruct((3,), jnp.float32, sharding=kernel.sharding)
    floating = jax.ShapeDtypeStruct((), jnp.float32, sharding=fits.step.sharding)
    encoder = "encoder/kernel is float32[2048, 24] in the checkpoint"
    cases = {
        f"params/{encoder}, float32[16, 24] by the config": abstract(mesh),
        f"teacher/{encoder}, nothing by the config": fits.replace(teacher={}),
        "params/tail is nothing in the checkpoint, float32[3] by the config": fits.replace(
            params={**fits.params, "tail": spare}
        ),
        "step is int32[] in the checkpoint, float32[] by the config": fits.replace(step=floating),
        "key is uint32[2] in the checkpoint, uint32[4] by the config": abstract(
            mesh, width=2048, impl="rbg"
        ),
    }
    with Checkpoints(workdir / "checkpoints", every=1) as checkpoints:
        for message, wanted in cases.items():
            with pytest.raises(UserError) as caught:
                checkpoints.restore(wanted)
            where = f"checkpoint {workdir}/checkpoints/20 does not fit the config: "
            assert str(caught.value) == where + message
    for wrong in ({"bias": kernel}, {"missing": spare}):
        with pytest.raises(UserError, match=f"params/encoder/{next(iter(wrong))} is .* in the"):
            load_params(workdir, {"encoder": wrong})


DAMAGE = {
    "position/data.json": "remove",
    "state/_METADATA": "halve",
    "state/manifest.ocdbt": "halve",
    "state/d/*": "remove",
    "state/ocdbt.process_0/d/*": "halve",
    "_CHECKPOINT_METADATA": "remove",
    "manifest/data.json": "remove",
    "": "empty",
}


def read_damaged(*paths):
    """Other process: tries to resume from each directory and prints what the user would see."""
    log_everything()
    for path in paths:
        try:
            load_params(path)
            print("not a parameter")
        except UserError as error:
            print(error)
        with Checkpoints(path, every=1) as checkpoints:
            checkpoints.tell = print
            _, position = checkpoints.restore(abstract(mesh_of(1), width=2048))
            assert position == {"batch": 10}


def test_a_damaged_checkpoint_is_set_aside(workdir, tmp_path):
    """Whatever is cut or lost: a line with the reason, the next one is used, no straying lines."""
    for number, (pattern, how) in enumerate(DAMAGE.items()):
        copy = shutil.copytree(workdir / "checkpoints", tmp_path / str(number))
        if how == "empty":  # as a copy leaves it that was interrupted early
            shutil.rmtree(copy / "20")
            (copy / "20").mkdir()
        for file in (copy / "20").glob(pattern) if pattern else ():
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
            if how == "remove":
                file.unlink()
    paths = [tmp_path / str(number) for number in range(len(DAMAGE))]
    code, out, err = finish(spawn("read_damaged", *paths))
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert len(lines) == 2 * len(DAMAGE), out
    for path, damage, refused, told in zip(paths, DAMAGE, lines[::2], lines[1::2], strict=True):
        start = f"checkpoint {path}/20 is damaged ("
        if damage == "position/data.json":  # nothing that load_params reads
            assert refused == "not a parameter"
        else:
            assert refused.startswith(start), refused
            assert refused.endswith(f"; the one before it is {path}/10"), refused
        end = f"): set aside as damaged-20 in {path}; going on from step 10, 10 steps are lost"
        assert told.startswith("checkpoint 20 is damaged (") and told.endswith(end), told
        assert sorted(os.listdir(path)) == ["10", "damaged-20"]


# --- full disks, kills, other processes ----------------------------------------------------------


def fill_the_disk(directory):
    """Other process: a limit on file sizes stands in for a full disk, which needs root to make."""
    log_everything()
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # writes fail (EFBIG) instead of killing us
    mesh = mesh_of(8)
    states = [make(step, mesh, width=4096) for step in range(4)]
    _, unlimited = limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Checkpoints(directory, every=1, keep=1) as checkpoints:
        checkpoints.tell = print
        for room in (0, 1_000, 100_000):  # none at all; for some metadata; for some of the arrays
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, unlimited))
            checkpoints.save(2, states[2], {"batch": 2})
            checkpoints.wait()
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            if room == 0:
                assert checkpoints.latest() is None
                checkpoints.save(1, states[1], {"batch": 1})
            assert checkpoints.latest() == 1
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, unlimited))
        checkpoints.save(3, states[3], {"batch": 3})
        try:  # an error of the save before surfaces now; once more, and that is the end
            checkpoints.finish(3, states[3], {"batch": 3})
        except UserError as error:
            print(error)
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert folders(directory) == [1] == [int(name) for name in os.listdir(directory)]
        restored, _ = checkpoints.restore(abstract(mesh, width=4096))
        assert_equal(host(restored), host(states[1]))
        checkpoints.finish(3, states[3], {"batch": 3})
        assert folders(directory) == [3]


def test_no_space_left(tmp_path):
    environment = {"JAX_ENABLE_COMPILATION_CACHE": "0"}  # another file that cannot be written
    code, out, err = finish(spawn("fill_the_disk", tmp_path, **environment))
    assert (code, err) == (0, "")
    lost = "CHECKPOINT %d IS NOT SAVED: no space left; %s; training goes on"
    one = "the newest on disk is of step 1"
    assert out.splitlines() == [
        lost % (2, "there is none on disk"),
        lost % (2, one),
        lost % (2, one),
        lost % (3, one),
        lost % (3, one),
        f"the state of step 3 is not on disk in {tmp_path} (no space left); "
        "once that is mended, the same command goes on from step 1",
    ]


LARGE = 1 << 19  # 50 MB a copy of the kernel, 200 MB with teacher and moments


def save_forever(directory):
    """Other process: checkpoint after checkpoint, as fast as it goes."""
    mesh = mesh_of(8)
    with Checkpoints(directory, every=1, keep=2) as checkpoints:
        for step in range((checkpoints.latest() or 0) + 1, 1000):
            checkpoints.save(step, make(step, mesh, width=LARGE), {"batch": step})
            print(step, flush=True)


def test_kill_in_the_middle_of_a_save(tmp_path):
    """Twice: kill -9 while arrays are being written; what is left is whole, and the run goes on."""
    for least in (2, 4):
        process = spawn("save_forever", tmp_path)
        watchdog = threading.Timer(60, process.kill)
        watchdog.start()
        try:
            for line in process.stdout:  # save() has returned; the writing has just begun
                unfinished = tmp_path / f"{int(line)}.orbax-checkpoint-tmp"
                while int(line) >= least and not (tmp_path / line.strip()).exists():
                    if sum(f.stat().st_size for f in unfinished.rglob("ocdbt*/d/*")) > 1e6:
                        break
                    time.sleep(0.001)
                else:
                    continue  # it was quicker than we; the next one will do
                break
        finally:
            watchdog.cancel()
            process.kill()
            _, _, err = finish(process)
        assert process.returncode == -signal.SIGKILL, err
        assert unfinished.exists() and not (tmp_path / line.strip()).exists()
        with Checkpoints(tmp_path, every=1) as checkpoints:
            assert checkpoints.latest() == int(line) - 1
            restored, position = checkpoints.restore(abstract(mesh_of(1), width=LARGE))
        assert position == {"batch": int(line) - 1}
        assert_equal(host(restored), host(make(int(line) - 1, mesh_of(1), width=LARGE)))
        assert not unfinished.exists()  # the next start has swept


def train_together(directory, port, process):
    """Other process: one of two, with two devices each."""
    jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=int(process))
    mesh = mesh_of(4)
    with Checkpoints(directory, every=2) as checkpoints:
        for step in range(1, 5):
            checkpoints.save(step, make(step, mesh), {"batch": step})
    with Checkpoints(directory, every=2) as checkpoints:
        restored, position = checkpoints.restore(abstract(mesh))
        assert position == {"batch": 4}
        mine = restored.params["encoder"]["kernel"].addressable_shards
        whole = load_params(directory)["encoder"]["kernel"]
        assert len(mine) == 2 and all((whole[s.index] == s.data).all() for s in mine)
    print("done")


def test_two_processes_save_and_one_restores(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    leftover = tmp_path / "2.orbax-checkpoint-tmp"
    leftover.mkdir()
    devices = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    pair = [spawn("train_together", tmp_path, port, p, **devices) for p in range(2)]
    for process in pair:
        code, out, err = finish(process)
        assert code == 0 and out.endswith("done\n"), err
    assert len(list((tmp_path / "4" / "state").glob("ocdbt.process_*"))) == 2
    assert folders(tmp_path) == [2, 4] and not leftover.exists()
    with Checkpoints(tmp_path, every=2) as checkpoints:
        restored, position = checkpoints.restore(abstract(mesh_of(1)))
    assert position == {"batch": 4}
    assert_equal(host(restored), host(make(4, mesh_of(1))))


def be_quiet(directory):
    """Other process: an ordinary run whose own logs go to stderr."""
    log_everything()
    mesh = mesh_of(8)
    for step in (1, 2):
        with Checkpoints(directory, every=1, keep=1) as checkpoints:
            if checkpoints.latest():
                checkpoints.restore(abstract(mesh))
            checkpoints.save(step, make(step, mesh), {"batch": step})
    load_params(directory)
    logging.getLogger("ours").info("saved")


def test_orbax_says_nothing(tmp_path):
    code, _, err = finish(spawn("be_quiet", tmp_path, PYTHONWARNINGS="default"))
    assert (code, err) == (0, "INFO:ours:saved\n")


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
