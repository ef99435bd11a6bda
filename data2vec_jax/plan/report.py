"""A plan in words."""

from collections.abc import Mapping
from typing import Any

from data2vec_jax.plan.topology import GIB


def report(result: Mapping[str, Any]) -> str:
    """The plan in words, a few lines."""
    gib = lambda n: "?" if n is None else f"{n / GIB:.2f}"  # noqa: E731
    memory, mesh = result["bytes_per_device"], result["mesh"]
    where = f"{result['slices']} x " if result["slices"] > 1 else ""
    lines = [
        f"{result['config']} on {where}{result['topology']}: {result['chips']} chips, "
        f"mesh {' x '.join(f'{k} {v}' for k, v in mesh.items())}",
        f"batch      {result['batch_size']} rows, "
        f"{result['batch_size'] / result['devices']:g} a device; "
        f"{result['parameters'] / 1e6:.1f} M parameters, {result['flops_per_step']:.3g} FLOPs",
    ]
    verdict = {True: "fits", False: "does NOT fit", None: "not compiled"}[result["fits"]]
    parts = ", ".join(f"{k} {gib(memory[k])}" for k in ("arguments", "temporaries", "output"))
    lines.append(
        f"memory     {verdict}: {gib(memory.get('total'))} of {gib(result['hbm_bytes'])} GiB "
        f"a device ({parts})"
    )
    for kind, found in (result["collectives"] or {}).items():
        lines.append(f"{kind:18} {found['count']:5} a step, {found['bytes'] / 2**20:10.1f} MiB")
    if result["kernels"]:
        lines.append("kernels    " + ", ".join(f"{n} {k}" for k, n in result["kernels"].items()))
    if result["mfu_estimate"] is not None:
        parts = ", ".join(f"{k} {1e3 * v:.1f}" for k, v in result["roofline_seconds"].items())
        lines.append(
            f"step       {1e3 * result['step_seconds_estimate']:.1f} ms at best (ms: {parts}), "
            f"MFU {result['mfu_estimate']:.0%}; compiled in {result['compile_seconds']:.0f} s "
            f"({result['compile_cpu_seconds']:.0f} s of CPU)"
        )
    return "\n".join([*lines, *result["advice"]])
