"""What a train step needs on a TPU slice or on GPUs: memory, messages and time."""

import importlib.metadata
from collections.abc import Mapping
from typing import Any

import jax

from data2vec_jax.core import sharding
from data2vec_jax.metrics.hardware import PEAK_FLOPS
from data2vec_jax.plan import hlo
from data2vec_jax.plan import topology as topologies
from data2vec_jax.plan.advice import advice
from data2vec_jax.plan.roofline import roofline
from data2vec_jax.plan.step import Step
from data2vec_jax.plan.topology import Topology, devices_of
from data2vec_jax.tasks.registry import check_config


def plan(config: Mapping[str, Any], topology: Topology) -> dict[str, Any]:
    """What a train step of `config` on `topology` needs: see the README of `launch` for each key.

    The batch is the one of the longest examples. Numbers are of one device, but `flops_per_step` is
    of the global step on all chips.
    """
    check_config(config)
    mesh = sharding.make_mesh(**config["mesh"], devices=devices_of(topology))
    step = Step(config, mesh)
    chip, chips = topology.chip, topology.chips
    peak = PEAK_FLOPS[chip.device_kind] * chips
    result = {
        "topology": topology.name,
        "slices": topology.slices,
        "chips": chips,
        "devices": mesh.size,
        "mesh": dict(mesh.shape),
        "batch_size": step.rows,
        "shapes": {k: list(v.shape) for k, v in step.batch.items()},
        "parameters": step.parameters,
        "flops_per_step": step.flops,
        "hbm_bytes": int(chip.hbm),
        "fits": None if step.state_bytes < chip.hbm else False,
        "bytes_per_device": {"arguments": step.state_bytes, "temporaries": None, "output": None},
        "collectives": None,
        "kernels": None,
        "compile_seconds": None,
        "compile_cpu_seconds": None,
        "step_seconds_estimate": step.flops / peak,
        "mfu_estimate": None,
        "roofline_seconds": {"compute": step.flops / peak},
        "versions": {"jax": jax.__version__},
    }
    compiler = topologies.compiler_of(topology)
    if not compiler:
        name, extra = ("JAX's CUDA plugin", "cuda13") if topology.machine else ("libtpu", "tpu")
        result["advice"] = [
            f"{name} is not installed, so nothing was compiled: "
            f"pip install 'jax[{extra}]=={jax.__version__}'"
        ]
        return result
    result["versions"][compiler] = importlib.metadata.version(compiler)
    compiled = step.compile()
    result["compile_seconds"], result["compile_cpu_seconds"] = compiled.seconds
    result["fits"] = compiled.fits(topology.room)
    result["bytes_per_device"] = compiled.memory
    if not result["fits"]:
        result["step_seconds_estimate"] = None
        result["advice"] = advice(config, topology, step)
        return result
    text = compiled.program.as_text()
    program = hlo.read(text)
    parts = roofline(program, chip, topology.machine)
    slowest = max(parts.values())
    result |= {
        "collectives": program.summary(),
        "messages": [c._asdict() for c in program.collectives],
        "instructions": program.instructions,
        "kernels": hlo.kernels(text),
        "loops_of_unknown_length": program.unknown_loops,
        "compiled_flops": program.flops * mesh.size,
        "roofline_seconds": parts,
        "step_seconds_estimate": slowest,
        "mfu_estimate": step.flops / peak / slowest,
        "advice": [],
    }
    return result
