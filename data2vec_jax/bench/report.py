"""The numbers of a benchmark in words."""

from collections.abc import Mapping, Sequence
from typing import Any


def report(result: Mapping[str, Any]) -> str:
    """The numbers in words, a few lines."""
    shapes = ", ".join(f"{k} {v}" for k, v in result["shapes"].items() if k != "example_id")
    step = result["step_seconds"]
    parts = ", ".join(f"{k} {v / step:.0%}" for k, v in (result["seconds_of_parts"] or {}).items())
    late, wait = "not measured (no time left)", result["data_wait"]
    if wait is None and "waiting for data" not in result["left_out"]:
        wait = "not measured (no data at config.data.source)"
    elif wait is not None:
        wait = f"{wait:.1%}"
    lines = [
        f"{result['config']}: {result['devices']} x {result['device']}, {result['dtype']}, "
        f"{shapes}",
        f"step     {1e3 * step:.1f} ms ({spread(result['step_seconds_of_blocks'])}), "
        f"{result['examples_per_second']:.3g} examples/s, "
        f"{1e3 * result['seconds_per_masked_view']:.1f} ms a masked view",
        f"FLOPs    {result['flops_per_step']:.4g} = {result['flops_formula']}",
        f"MFU      {result['mfu']:.1%} of the device's peak, "
        f"{result['mfu_of_measured_matmul']:.1%} of a large matrix product "
        f"({result['matmul_flops_per_second'] / 1e9:.0f} GFLOP/s)",
        f"shares   {parts or late}; waiting for data {wait or late}",
        f"memory   {result['peak_bytes'] / 2**20:.0f} MiB a device at most",
        f"compile  {result['compile_seconds']:.1f} s, {result['compile_seconds_from_cache']:.1f} s "
        "from the cache",
    ]
    if peer := result["peer"]:
        lines.append(
            f"peer     {1e3 * peer['step_seconds']:.1f} ms "
            f"({spread(peer['step_seconds_of_blocks'])}): PyTorch {peer['torch']}, Hugging "
            f"Face {peer['transformers']}, {peer['mode']}; ratio {peer['ratio']:.2f} "
            f"(above 1: ours is faster; of the best blocks {peer['ratio_of_best']:.2f})"
        )
    for axis, rows in result.get("sweep", {}).items():
        lines.append(
            f"{axis:8} {'size':>10} {'ms':>10} {'MiB':>10} {'GFLOPs':>10} {'compile s':>10}"
        )
        for i, size in enumerate(rows["sizes"]):
            lines.append(
                f"{'':8} {size:10g} {1e3 * rows['step_seconds'][i]:10.1f} "
                f"{rows['peak_bytes'][i] / 2**20:10.0f} {rows['flops_per_step'][i] / 1e9:10.4g} "
                f"{rows['compile_seconds'][i]:10.1f}"
            )
        names = "step_seconds", "peak_bytes", "flops_per_step", "compile_seconds"
        fits = " ".join(f"{rows['exponents'][name]:10.2f}" for name in names)
        lines.append(f"{'':8} {'exponent':>10} {fits}")
    return "\n".join(lines)


def spread(seconds: Sequence[float]) -> str:
    """How many blocks there were, and how far apart."""
    least, most = 1e3 * min(seconds), 1e3 * max(seconds)
    return f"median of {len(seconds)} blocks, {least:.1f} to {most:.1f}"
