"""The planner: requests that cannot be, arithmetic without libtpu, and one plan made with it."""

import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest
from configs_for_tests import config_of, module_of

from data2vec_jax.core import sharding
from data2vec_jax.core.errors import UserError
from data2vec_jax.core.run import Run
from data2vec_jax.metrics.hardware import PEAK_FLOPS
from data2vec_jax.plan import __main__ as plan_command
from data2vec_jax.plan import advice, gpus, hlo, planner, report, roofline, step, topology
from data2vec_jax.tasks import pretrain

ROOT = Path(__file__).resolve().parent.parent
GIB = topology.GIB


@pytest.fixture
def without_libtpu(monkeypatch):
    monkeypatch.setattr(topology, "compiler_of", lambda topology: None)
    monkeypatch.setattr(plan_command, "prepare_environment", lambda: None)  # of the whole process


def config(name="vision_v2", **sections):
    made = config_of(name).to_dict()
    for section, options in sections.items():
        made[section] |= options
    return made


# Requests -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, slices, message",
    [
        ("v5litepod:16x16", None, "no chip 'v5litepod'; known are v4:.*v5e:16x16.*tpu7x:"),
        ("v5e-256", None, "no chip 'v5e-256'"),
        ("v5e:4", None, "no 'v5e:4'; known are v5e:2x2, .* v5e:16x16"),
        ("v5p:4x4", None, "known are v5p:2x2x1"),
        ("v5e:0x4", None, "no 'v5e:0x4'"),
        ("v5e:2x4", "0", "--slices: '0' is not a number from 1"),
        ("v5e:2x4", "two", "--slices: 'two'"),
        ("h100", None, "no 'h100'; known are h100:1 to h100:8 .* h100:8x4"),
        ("h100:16", None, "no 'h100:16'"),
        ("a100:8x0", None, "no 'a100:8x0'"),
        ("h100:8", "2", "--slices: of TPUs alone; .* h100:8x2"),
    ],
)
def test_topologies_that_do_not_exist(name, slices, message):
    with pytest.raises(UserError, match=message):
        topology.parse_topology(name, slices)


def test_topologies_that_exist():
    pod = topology.parse_topology("v5p:4x8x8", "2")
    assert (pod.name, pod.slices, pod.chips) == ("v5p:4x8x8", 2, 512)
    for kind, chip in topology.CHIPS.items():
        assert PEAK_FLOPS[chip.device_kind] > 0
        for shape in topology.SHAPES[chip.axes]:
            assert topology.parse_topology(f"{kind}:{shape}").chip is chip


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--topology=v5x:4x4"], "error: --topology: no chip 'v5x'; known are v4:"),
        (["--topology=v5e:2x4", "--config.mesh.fsdp=3"], "fsdp=3 does not use the 8 devices"),
        (["--topology=v5e:4x4"], "a batch of 8 rows does not divide over 16 devices"),
        (["--topology=v5e:2x4", "--config.modle.width=3"], "modle"),
        (["--topology=v5e:2x4", "--workdir=x"], "workdir"),
        ([], "--topology=v5e:16x16 is missing"),
        (["--topology=v5e:2x4", "--json=/nowhere/p.json"], "--json=/nowhere/p.json: No such file"),
    ],
)
def test_wrong_requests_are_one_line(arguments, message, without_libtpu, monkeypatch, capsys):
    command = ["plan", f"--config={ROOT}/configs/vision_v2.py:smoke", *arguments]
    monkeypatch.setattr(sys, "argv", command)  # where config_flags looks for what is overridden
    with pytest.raises(SystemExit) as stopped:
        plan_command.main(command)
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ") and message in line


# Without libtpu -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, devices", [("v5e:2x4", 8), ("tpu7x:2x2x1", 8), ("v5p:2x2x1", 4)])
def test_arithmetic_without_libtpu(kind, devices, without_libtpu):
    made = config(data={"batch_size": 16})
    result = planner.plan(made, topology.parse_topology(kind))
    assert result["devices"] == devices and result["fits"] is None
    assert "pip install" in result["advice"][0] and jax.__version__ in result["advice"][0]
    task = pretrain.abstract_task(made)
    assert result["flops_per_step"] == task.flops(task.shapes[-1])
    peak = PEAK_FLOPS[topology.CHIPS[kind.split(":")[0]].device_kind] * result["chips"]
    assert result["roofline_seconds"] == {"compute": result["flops_per_step"] / peak}
    json.dumps(result)
    assert "not compiled" in report.report({"config": "c"} | result)


def test_the_state_on_one_device(without_libtpu):
    """Parameters, teacher and two moments in float32; split over fsdp where they are large."""
    large = config(model={"width": 256}, data={"batch_size": 16})
    large["model"]["encoder"] |= {"mlp": 1024}
    whole, split = (
        planner.plan(large | {"mesh": {"data": -1, "fsdp": n}}, topology.parse_topology("v5e:2x4"))
        for n in (1, 8)
    )
    rows = 2 * 28 * 28 + 2 * 4  # two images of bytes and their ids
    teacher = sum(
        x.size
        for path, x in jax.tree.leaves_with_path(_parameters(large))
        if not jax.tree_util.keystr(path).startswith(("['decoder']", "['head']"))
    )
    expected = 4 * (3 * whole["parameters"] + teacher)
    found = whole["bytes_per_device"]["arguments"]
    assert expected <= found - rows <= expected + 100  # and the step, its key and a count
    assert split["bytes_per_device"]["arguments"] < 0.25 * found


def _parameters(config):
    task = pretrain.abstract_task(config)
    return jax.eval_shape(task.init, jax.random.key(0))


def test_a_state_too_large_does_not_fit_even_without_libtpu(without_libtpu):
    large = config(model={"width": 6400}, data={"batch_size": 4})
    large["model"]["encoder"] |= {"mlp": 25600, "heads": 8, "depth": 16}
    result = planner.plan(large, topology.parse_topology("v5e:2x2"))
    assert result["fits"] is False


# What would make it fit ---------------------------------------------------------------------------


class Sizes:
    """Stands in for `Step`: a state of `state` bytes and a program of sizes[options] bytes."""

    state, seen = 0.0, []

    def __init__(self, config, mesh):
        self.config, self.rows = config, 64 * mesh.size
        self.state_bytes = self.state / config["mesh"]["fsdp"]

    def compile(self):
        options = (
            self.config["mesh"]["fsdp"],
            self.config["model"]["encoder"]["remat"],
            self.config["accumulate"],
        )
        Sizes.seen.append(options)
        size = self.state_bytes + 20 * GIB / self.config["accumulate"]
        size -= 8 * GIB * (options[1] == "full") / self.config["accumulate"]
        fits = size < 15.75 * GIB
        return step.Compiled("program" if fits else None, {"total": size}, (1.0, 2.0))


@pytest.mark.parametrize(
    "state, tried, last",
    [
        (1.0, [(1, "full", 1)], "it fits with --config.model.encoder.remat=full (13.00 of 15.75"),
        (
            30.0,
            [(8, "auto", 1), (8, "full", 1)],
            "it fits with --config.mesh.fsdp=8 --config.model.encoder.remat=full (15.75",
        ),
        (
            5.0,
            [(1, "full", 1), (1, "full", 2)],
            "it fits with --config.model.encoder.remat=full --config.accumulate=2 (11.00",
        ),
        (400.0, [(8, "auto", 1), (8, "full", 1), (8, "full", 2)], "try a smaller config.data"),
    ],
)
def test_advice_is_tried(state, tried, last, without_libtpu, monkeypatch):
    monkeypatch.setattr(advice, "Step", Sizes)
    monkeypatch.setattr(Sizes, "state", (state - (state == 30.0) * 0.0001) * GIB)
    monkeypatch.setattr(Sizes, "seen", [])
    made, pod = config(mesh={"data": -1, "fsdp": 1}), topology.parse_topology("v5e:2x4")
    sizes = Sizes(made, sharding.make_mesh(devices=topology.devices_of(pod)))
    lines = advice.advice(made, pod, sizes)
    assert Sizes.seen == tried
    assert lines[-1].startswith(last)


def test_advice_knows_what_the_mesh_is_already(without_libtpu):
    """Eight TPUs share a state without a config's word; `data` gives way to a larger fsdp."""
    pod = topology.parse_topology("v5e:2x4")

    def first(**mesh):
        made = config(mesh={"data": -1, "fsdp": None} | mesh)
        found = SimpleNamespace(state_bytes=10 * GIB, rows=64)
        return next(advice.remedies(made, pod, found))

    assert first() == {"model.encoder.remat": "full"}
    assert first(fsdp=2) == {"mesh.fsdp": 8}
    assert first(data=8) == {"mesh.fsdp": 4, "mesh.data": -1}


@pytest.mark.parametrize(
    "message, gib",
    [
        ("memory required for HLO temporaries (34.32G) exceeds available HBM (15.75G).", 34.32),
        ("Ran out of memory in memory space hbm. Used 22.98G of 15.75G hbm.", 22.98),
        ("temporaries (2.91T) exceeds available HBM (31.25G).", 2.91 * 1024),
    ],
)
def test_sizes_of_refused_programs(message, gib):
    assert step.exhausted(f"RESOURCE_EXHAUSTED: {message}") == pytest.approx(gib * GIB)


# The roofline -------------------------------------------------------------------------------------


def test_roofline():
    chip = topology.CHIPS["v5e"]
    flops, hbm, ring = 197e12, 819e9, 100e9  # a second's worth of each
    work = [
        hlo.Work(flops, 0.5 * hbm, 1, False),  # 1 s, bound by products
        hlo.Work(0.1 * flops, 0.5 * hbm, 2, False),  # 2 x 0.5 s, bound by memory
        hlo.Work(0, 0.25 * hbm, 1, True),  # beside the others
    ]
    collectives = [
        hlo.Collective("all-reduce", ring, 1, 4, False, ""),  # 2 x 3/4 s
        hlo.Collective("all-gather", ring, 2, 4, True, ""),  # 2 x 3/4 s, beside computation
        hlo.Collective("reduce-scatter", ring, 1, 2, False, ""),  # 1/2 s
        hlo.Collective(hlo.BETWEEN_SLICES, chip.dcn, 3, 1, True, ""),
    ]
    parts = roofline.roofline(hlo.Program(collectives, work, 0, 0), chip)
    assert parts == pytest.approx({"core": 4.0, "hbm": 1.75, "ici": 3.5, "dcn": 3.0})
    # Two devices of a chip share its memory and its links.
    twin = roofline.roofline(hlo.Program(collectives, work, 0, 0), topology.CHIPS["tpu7x"])
    assert twin["hbm"] == pytest.approx(1.75 * hbm / (7380e9 / 2))
    assert twin["ici"] == pytest.approx(3.5 * ring / (200e9 / 2))


def test_messages_of_gpus_beyond_a_machine_take_the_network():
    card = gpus.CARDS["h100"]
    collectives = [
        hlo.Collective("all-reduce", 1e9, 1, 8, False, ""),
        hlo.Collective("all-gather", 1e9, 2, 32, False, ""),
    ]
    parts = roofline.roofline(hlo.Program(collectives, [], 0, 0), card, 8)
    assert parts["ici"] == pytest.approx(2 * 1e9 * 7 / 8 / 450e9)
    assert parts["dcn"] == pytest.approx(2 * 1e9 * 31 / 32 / 50e9)
    assert parts["core"] == pytest.approx(parts["ici"] + parts["dcn"])


def test_gpus_without_their_compiler(without_libtpu):
    nodes = topology.parse_topology("h200:8x4")
    assert (nodes.chips, nodes.machine, nodes.slices, nodes.name) == (32, 8, 1, "h200:8x4")
    result = planner.plan(config("vision_v1", data={"batch_size": 32}), nodes)
    assert result["devices"] == 32 and result["fits"] is None
    assert "CUDA plugin is not installed" in report.report({"config": "x"} | result)


def test_kernels_of_a_gpu_program():
    text = """
  %a = f32[8]{0} custom-call(%x), custom_call_target="__cublas$lt$matmul", backend_config={}
  %b = f32[8]{0} fusion(%a), kind=kCustom, calls=%c, backend_config={"operation_queue_id":"0",\
"fusion_backend_config":{"kind":"__triton_gemm","block_level":{}},"force":false}
  %d = f32[8]{0} fusion(%b), kind=kLoop, calls=%e
""".replace("\\\n", "")
    assert hlo.kernels(text) == {"__cublas$lt$matmul": 1, "__triton_gemm": 1}


def test_the_program_does_not_grow_with_depth():
    def size(depth):
        made = config(model={"width": 128})
        made["model"]["encoder"] |= {"mlp": 512, "depth": depth}
        mesh = sharding.make_mesh(2, 4)
        with jax.set_mesh(mesh):
            task = pretrain.abstract_task(made)
            run = Run(made, task, mesh)
            text = run._jit_step.lower(run.abstract, task.shapes[-1]).as_text()
        return len(text.splitlines())

    assert size(12) == size(24) == size(48)


# The tables of launch/README.md -------------------------------------------------------------------


@pytest.fixture
def launch():
    """A fresh launch/experiments/plans.py, as a module."""
    return module_of("launch/experiments/plans.py")


def test_the_readme_holds_the_committed_plans(launch):
    text = launch.README.read_text()
    tables = [(text, *table) for table in launch.tables().items()]
    other, more = launch.PERFORMANCE.read_text(), {"bounds": launch.bounds, "sweep": launch.sweep}
    tables += [(other, name, make()) for name, make in more.items()]
    for page, name, table in tables:
        assert f"<!-- {name} -->\n{table}\n<!-- end of {name} -->\n" in page, (
            "python launch/experiments/plans.py --tables"
        )
    for path in launch.FOLDER.iterdir():
        made, arguments = json.loads(path.read_text()), launch.plans()[path.stem]
        asked = " ".join(a.removeprefix("--") for a in arguments if a.startswith("--config"))
        assert made["config"] == asked.removeprefix("config="), path
        assert f"--topology={made['topology']}" in arguments, path
        assert made["slices"] == 1 or f"--slices={made['slices']}" in arguments, path


def test_every_recipe_is_planned(launch):
    recipes = {name.split("-")[0] for name in launch.plans() if "v5e_16x16" in name}
    sizes = ("base", "large")
    assert recipes == {
        *(f"{m}_v{v}_{s}" for m in ("speech", "vision", "text") for v in (1, 2) for s in sizes),
        "vision_v2_huge",
        "vision_v2_huge14",
    }
    for slices in ("1xv6e_16x16", "1xv5p_8x8x8", "2xv5p_4x8x8"):
        large = {name.split("-")[0] for name in launch.plans() if slices in name}
        assert {"vision_v2_huge", "vision_v1_large", "speech_v1_large"} <= large


def test_cores_that_feed_a_device_are_those_of_the_committed_plans(launch):
    table = module_of("launch/experiments/loaders.py").table()
    page = launch.PERFORMANCE.read_text()
    assert f"<!-- loaders -->\n{table}\n<!-- end of loaders -->\n" in page, (
        "python launch/experiments/loaders.py table"
    )


def test_plans_are_made_once(launch, tmp_path, monkeypatch):
    calls = []
    example = json.loads((launch.FOLDER / "speech_v2_base-1xv5e_16x16.json").read_text())

    def plan_command(command, **_):
        calls.append(command)
        fails = "text_v1" in command[3]
        if not fails:
            Path(command[-1].removeprefix("--json=")).write_text(json.dumps(example))
        return subprocess.CompletedProcess(command, 2 * fails, stderr=b"error: no")

    monkeypatch.setattr(launch, "FOLDER", tmp_path / "plans")
    monkeypatch.setattr(launch, "README", tmp_path / "README.md")
    monkeypatch.setattr(launch.subprocess, "run", plan_command)
    monkeypatch.setattr(launch, "PERFORMANCE", tmp_path / "performance.md")
    pages = {"README": ("plans", "GPU plans", "depths"), "PERFORMANCE": ("bounds", "sweep")}
    for page, tables in pages.items():
        marks = "".join(f"<!-- {n} -->\nold\n<!-- end of {n} -->\n" for n in tables)
        getattr(launch, page).write_text(f"before\n{marks}after\n")
    monkeypatch.setattr(sys, "argv", ["plans.py"])
    failing = [name for name in launch.plans() if "text_v1" in name]
    message = rf"{len(failing)} of \d+ plans failed: text_v1_base"
    for expected in (len(launch.plans()), len(failing)):  # the second time, those that failed
        calls.clear()
        with pytest.raises(SystemExit, match=message):
            launch.main()
        assert len(calls) == expected
    for page in (launch.README, launch.PERFORMANCE):
        text = page.read_text()
        assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    text = launch.README.read_text()
    shown = [n for n in launch.plans() if not n.startswith(("depth", "rows")) and n not in failing]
    assert text.count("| speech_v2:base |") == len(shown)


# With libtpu --------------------------------------------------------------------------------------

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is for Linux only"
)


def run(*arguments, paths=()):
    """A command in a process of its own, where no other backend is. paths: of further packages."""
    places = os.pathsep.join(map(str, (ROOT, *paths)))
    environment = os.environ | {"PYTHONPATH": places, "XLA_FLAGS": ""}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def v5e8(tmp_path_factory):
    """A plan for eight chips, as a user asks for it: (what is printed, the JSON)."""
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    out = run(
        "-m",
        "data2vec_jax.plan",
        "--config=configs/vision_v2.py:smoke",
        "--topology=v5e:2x4",
        "--config.mesh.fsdp=4",
        "--config.data.batch_size=16",
        "--config.dtype=bfloat16",
        "--config.model.width=256",
        "--config.model.encoder.mlp=1024",
        "--config.model.decoder.width=256",
        f"--json={path}",
    )
    return out, json.loads(path.read_text())


# One process at a time may hold libtpu on a machine with chips; here it only takes many cores.
libtpu = pytest.mark.xdist_group("libtpu")


@needs_libtpu
@libtpu
def test_a_plan(v5e8):
    out, result = v5e8
    assert result["fits"] is True and result["hbm_bytes"] == int(15.75 * GIB)
    assert result["chips"] == result["devices"] == 8
    assert result["mesh"] == {"slice": 1, "data": 2, "fsdp": 4}
    memory = result["bytes_per_device"]
    assert 0 < memory["arguments"] <= memory["total"] < result["hbm_bytes"]
    assert memory["temporaries"] > 0 and memory["output"] > 0
    assert result["compile_seconds"] > 0
    assert result["step_seconds_estimate"] == max(result["roofline_seconds"].values())
    assert 0 < result["mfu_estimate"] < 1
    # The analytic count against the products of the compiled program; with fsdp, the backward pass
    # computes attention again.
    assert result["compiled_flops"] == pytest.approx(result["flops_per_step"], rel=0.05)
    assert "fits: " in out and "all-gather" in out


@needs_libtpu
@libtpu
def test_fine_tuning_is_planned_too():
    """With adapters: what is made of shapes alone must run on none of the planned devices."""
    out = run("-m", "data2vec_jax.plan", "--config=finetune_text:demo_dora", "--topology=v5e:2x4")
    assert "fits: " in out and "all-reduce" in out


@needs_libtpu
@libtpu
def test_messages_of_a_plan(v5e8):
    """Weights are gathered layer by layer and gradients summed by shards; all else are small sums.

    Three layers of width 256 in bfloat16: qkv, out, up and down are split over fsdp = 4, and so is
    the head; everything smaller is on every device.
    """
    messages = v5e8[1]["messages"]
    assert {m["kind"] for m in messages} == {"all-gather", "reduce-scatter", "all-reduce"}
    layers, width, passes = 3, 256, 3  # student forward, student backward, teacher
    weights = [2 * n * width * width for n in (3, 1, 4, 4)]  # bytes
    head = 2 * width * width

    # One layer at a time, be it in the loop over layers or, ahead of it, for its first turn.
    gathers = [m for m in messages if m["kind"] == "all-gather"]
    of_layers, others = (
        [m for m in gathers if ("/encoder/" in m["where"]) is w] for w in (True, False)
    )
    assert all(m["group"] == 4 for m in gathers)
    assert max(m["bytes"] for m in of_layers) <= sum(weights)
    assert sum(m["times"] for m in of_layers) <= passes * layers * len(weights)
    assert sum(m["times"] * m["bytes"] for m in of_layers) == passes * layers * sum(weights)
    assert [m["bytes"] for m in others] == [head]

    scatters = [m for m in messages if m["kind"] == "reduce-scatter"]
    assert all(m["group"] == 4 for m in scatters)
    total = sum(m["times"] * m["bytes"] for m in scatters)
    assert total == layers * sum(weights) + head
    # Each shard of a gradient is then summed over the two rows of the mesh.
    sums = [m for m in messages if m["kind"] == "all-reduce"]
    shards = sum(m["times"] * m["bytes"] for m in sums if m["group"] == 2)
    assert shards == total / 4
    # The gradients' norm over shards: scalars. On all devices: gradients of what is not split, and
    # the statistics of the monitor, the largest of which are the covariances, width x width, of
    # the front end's output and of the targets.
    assert sum(m["bytes"] for m in sums if m["group"] == 4) <= 4 * 64
    rest = sum(m["times"] * m["bytes"] for m in sums if m["group"] == 8)
    parameters = v5e8[1]["parameters"] - (layers * sum(weights) + head) // 2
    statistics = 2 * width * width + 49 * width + 64 * width  # 49 positions
    assert rest <= 4 * (parameters + statistics)
    assert not [m for m in messages if "sample" in m["where"]]  # the module that draws masks


@needs_libtpu
@libtpu
def test_masks_send_nothing():
    """The masking module alone, for eight chips: no message of any kind."""
    code = """if True:
        import jax, jax.numpy as jnp
        from data2vec_jax import masking
        from data2vec_jax.core.sharding import BATCH, make_mesh
        from data2vec_jax.plan import hlo, topology
        topology.prepare_environment()
        devices = topology.devices_of(topology.parse_topology("v5e:2x4"))
        mesh = make_mesh(fsdp=4, devices=devices)
        blocks = masking.make("blocks", (14, 14), count=120)
        inverse = masking.make("inverse_blocks", (14, 14), ratio=0.8, adjust=0.07, width=3)
        spans = masking.make("spans", 749, prob=0.65, width=10, masked=0.45)
        sharding = lambda spec: jax.sharding.NamedSharding(mesh, spec)
        key = jax.eval_shape(lambda: jax.random.key(0))
        key = jax.ShapeDtypeStruct((), key.dtype, sharding=sharding(jax.sharding.PartitionSpec()))
        ids = jax.ShapeDtypeStruct((64,), jnp.uint32, sharding=sharding(BATCH))
        def draw(key, ids):
            return [masking.sample(s, key, 3, ids, 2) for s in (blocks, inverse, spans)]
        with jax.set_mesh(mesh):
            compiled = jax.jit(draw).lower(key, ids).compile()
        program = hlo.read(compiled.as_text())
        print(program.instructions > 500, program.summary())
    """
    assert run("-c", code).strip() == "True {}"


ATTENTION = """
from data2vec_jax.plan import hlo, topology
topology.prepare_environment()
import jax, jax.numpy as jnp
from data2vec_jax.core import sharding
from data2vec_jax.models import attention_parts, layers
from jax.sharding import NamedSharding, PartitionSpec as P

for name, T, biased in (("v5e:2x4", 197, True), ("v5e:2x4", 500, False), ("v4:2x2x1", 2048, False)):
    mesh = sharding.make_mesh(devices=topology.devices_of(topology.parse_topology(name)))
    def described(spec, *shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    rows, all = sharding.BATCH, P()
    B = 1024 if T == 500 else 8  # whose seeds of dropout fill the memory of scalars
    q = described(rows, B, 12, T, 64, dtype=jnp.bfloat16)
    learned = {"q": q, "k": q, "v": q, "slopes": described(all, 12)}
    learned |= {"bias": described(all, 12, T, T)} if biased else {}
    rest = described(rows, B, T, 2), described(rows, B, T, dtype=bool)

    def loss(learned, places, valid):
        linear = attention_parts.LinearBias(places, learned["slopes"], "euclidean", 1)
        return jnp.sum(layers.attention(
            *(learned[name] for name in "qkv"), bias=learned.get("bias"), linear=linear,
            valid=valid, dropout_rate=0.1, key=jax.random.key(0)).astype(jnp.float32))

    with jax.set_mesh(mesh):
        both = jax.jit(jax.value_and_grad(loss)).lower(learned, *rest).compile()
    print(hlo.kernels(both.as_text()))
"""


@libtpu
@needs_libtpu
def test_libtpu_compiles_attention_with_all_its_parts():
    found = run("-c", ATTENTION).strip().splitlines()
    assert found == ["{'attention': 1, 'attention_gradient': 1}"] * 3


# With JAX's CUDA plugin ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cuda():
    """A folder with the plugin and NVIDIA's compiler; beside the other tests, JAX would use it."""
    folder = Path(sys.prefix) / f"cuda13-{jax.__version__}"
    if not folder.exists():
        packages = [f"jax-cuda13-{part}=={jax.__version__}" for part in ("plugin", "pjrt")]
        packages += ["nvidia-cublas", "nvidia-cuda-nvcc", "nvidia-cuda-crt", "nvidia-nvvm"]
        packages += ["nvidia-cudnn-cu13"]
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
        with tempfile.TemporaryDirectory(dir=folder.parent) as partial:
            subprocess.run([*command, f"--target={partial}/all", *packages], check=True)
            os.replace(f"{partial}/all", folder)
    return folder


@pytest.mark.skipif(
    (sys.platform, platform.machine()) != ("linux", "x86_64"),
    reason="the plugin is for Linux on x86-64 only",
)
@libtpu
def test_a_plan_for_gpus(cuda, tmp_path):
    path = tmp_path / "plan.json"
    out = run(
        "-m",
        "data2vec_jax.plan",
        "--config=vision_v2:base",
        "--topology=h100:8",
        f"--json={path}",
        paths=[cuda],
    )
    result = json.loads(path.read_text())
    assert "fits: " in out and result["fits"] is True and result["devices"] == 8
    # Gradients are summed in bfloat16, all else is small. No rows are sent: each device convolves
    # its own.
    assert set(result["collectives"]) == {"all-reduce"}
    gradients = 2 * result["parameters"]
    assert gradients < result["collectives"]["all-reduce"]["bytes"] < 1.1 * gradients
    assert any("__cudnn$conv" in name for name in result["kernels"])
    # Teacher and student have neither a bias nor dropout.
    assert {"__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"} <= result["kernels"].keys()
    # cuDNN's convolutions and Triton's products are all of our count, and attention's, which are
    # computed again for the gradients, are a small part of it.
    assert result["compiled_flops"] == pytest.approx(result["flops_per_step"], rel=0.05)
    # Outputs of all linear layers, in bfloat16: 12 blocks for each clone, 6 of the decoder; what
    # else is kept (float32 norms, GELUs) is much more.
    assert result["bytes_per_device"]["total"] < 16 * GIB
