"""The train step on different meshes, and gradient accumulation: real samples, tiny models."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from configs_for_tests import assert_close, config_of, run_steps

from data2vec_jax import masking
from data2vec_jax.core import sharding
from data2vec_jax.core.errors import UserError
from data2vec_jax.core.run import Run
from data2vec_jax.tasks import pretrain

MESHES = {"1": (1, 1), "data=8": (8, 1), "fsdp=8": (1, 8), "data=2 x fsdp=4": (2, 4)}


def smoke(modality):
    """The smoke config with every kind of dropout on, and weights large enough to be split."""
    config = config_of(f"{modality}_v1")
    config.model.encoder.update(dropout=0.1, attention_dropout=0.1, layerdrop=0.2)
    config.schedule.update(warmup=0.0) if config.schedule.kind == "cosine" else None
    config.schedule.peak = 1e-3
    return config.to_dict()


@pytest.mark.usefixtures("light_compilation")
@pytest.mark.parametrize("modality", ["speech", "vision", "text"])
def test_every_mesh_takes_the_same_step(modality):
    config = smoke(modality) | {"sharding": {"min_size": 256}}  # split the tiny weights too
    # All meshes with one modality; with the others that which splits rows and weights.
    names = MESHES if modality == "vision" else ("1", "data=2 x fsdp=4")
    results = {name: run_steps(config, MESHES[name]) for name in names}
    params, scalars, _ = results.pop("1")
    for name, (other, their, run) in results.items():
        for one, two in zip(scalars, their, strict=True):
            for key in ("loss", "grad_norm", "target_std", "masked_fraction"):
                assert one[key] == pytest.approx(two[key], rel=1e-5), (name, key)
        assert_close(params, other, 1e-4)
        if "fsdp" in name:
            specs = {str(s.sharding.spec) for s in jax.tree.leaves(run.abstract.params)}
            assert any("fsdp" in spec for spec in specs)  # something was really split


def test_masks_do_not_depend_on_the_mesh():
    sampler = masking.make("blocks", (7, 7), count=30, min_patches=4)
    ids, key = jnp.arange(16, dtype=jnp.uint32) * 7, jax.random.key(3)
    wanted = jax.device_get(masking.sample(sampler, key, 5, ids, 2))
    for data, fsdp in list(MESHES.values())[1:]:
        mesh = sharding.make_mesh(data, fsdp)
        with jax.set_mesh(mesh):
            rows = sharding.to_global({"ids": np.asarray(ids)}, mesh)["ids"]
            program = jax.jit(lambda ids: masking.sample(sampler, key, 5, ids, 2)).lower(rows)
            program = program.compile()
            assert program(rows).sharding.is_equivalent_to(rows.sharding, 3)
            np.testing.assert_array_equal(jax.device_get(program(rows)), wanted)
            for word in ("all-gather", "all-reduce", "all-to-all", "collective-permute"):
                assert word not in program.as_text()  # masking costs no communication


def test_one_program_serves_fifty_steps_and_all_seeds(monkeypatch):
    compiled = []
    listen = jax.monitoring.register_event_duration_secs_listener
    listen(lambda event, _, **kw: compiled.append(event) if "backend_compile" in event else None)
    config = smoke("vision") | {"total_steps": 60}
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        task = pretrain.make(config)
        run = Run(config, task, mesh)
        state = run.init(0)
        batches = task.data(0)
        batch = next(batches)
        state, _ = run.program(batch)(state, batch)
        assert compiled  # the listener hears compilations
        before = len(compiled)
        for _ in range(50):
            batch = next(batches)
            state, _ = run.program(batch)(state, batch)
        state = run.init(1)
        run.program(batch)(state, batch)
    assert len(compiled) == before
    assert len(run.programs) == 1


def test_programs_are_shared_by_seeds_but_not_by_rates():
    """A program holds its schedule: found by the shapes alone, it would train at another's rate."""
    programs, moved = {}, []
    for seed, peak in ((0, 1e-3), (1, 1e-3), (0, 4e-3)):
        config = smoke("vision") | {"seed": seed}
        config["schedule"] = config["schedule"] | {"kind": "cosine", "peak": peak, "warmup": 0.0}
        config["optim"] = config["optim"] | {"weight_decay": 0.0}
        mesh = sharding.make_mesh(devices=jax.devices()[:1])
        with jax.set_mesh(mesh):
            task = pretrain.make(config)
            run = Run(config, task, mesh, programs)
            state = run.init(0)
            first = jax.tree.map(np.array, state.params)  # a copy: the step reuses the buffers
            batch = next(task.data(0))
            state, _ = run.program(batch)(state, batch)
        change = jax.tree.map(lambda a, b: np.abs(a - b).max(), first, state.params)
        moved.append(max(jax.tree.leaves(change)))
    assert len(programs) == 2
    # Adam's first step is the rate, whatever the gradient is.
    np.testing.assert_allclose(moved, [1e-3, 1e-3, 4e-3], rtol=1e-2)


def test_student_and_teacher_start_equal_in_separate_buffers():
    config = smoke("vision")
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        run = Run(config, pretrain.make(config), mesh)
        state = run.init(0)
    for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(state.teacher), strict=True):
        np.testing.assert_array_equal(a, b)
        assert a.unsafe_buffer_pointer() != b.unsafe_buffer_pointer()


def test_batch_must_divide_over_devices():
    config = smoke("vision")
    config["data"]["batch_size"] = 12
    refused = pytest.raises(UserError, match="12 rows does not divide over 8 devices")
    with jax.set_mesh(sharding.make_mesh()), refused:
        pretrain.make(config)
