"""Peak FLOP/s of devices: from a table by their kind, or measured by a large matrix product; and
their peak memory."""

import contextlib
import math
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# Dense bfloat16 FLOP/s by `device.device_kind`, or by the words in it that name the model; for TPUs
# of a whole chip. float16 where there is no bfloat16 (V100, T4). NVIDIA's sheets often print the
# doubled number "with sparsity"; these are without, and with float32 accumulation.
PEAK_FLOPS = {
    "TPU v2": 46e12,  # cloud.google.com/tpu/docs/v2; 180 TFLOP/s a board of 4 chips
    "TPU v3": 123e12,  # cloud.google.com/tpu/docs/v3
    "TPU v4": 275e12,  # cloud.google.com/tpu/docs/v4
    "TPU v5 lite": 197e12,  # cloud.google.com/tpu/docs/v5e
    "TPU v5": 459e12,  # cloud.google.com/tpu/docs/v5p; 'TPU v5' is what a v5p calls itself
    "TPU v6 lite": 918e12,  # cloud.google.com/tpu/docs/v6e
    "TPU7x": 2307e12,  # cloud.google.com/tpu/docs/tpu7x
    "GB200": 2500e12,  # NVIDIA GB200 NVL72 specification, 5 PFLOP/s with sparsity
    "B200": 2250e12,  # NVIDIA HGX B200 specification, 4.5 PFLOP/s with sparsity
    "H200 NVL": 835e12,  # NVIDIA H200 datasheet, 1,671 with sparsity
    "H200": 989e12,  # NVIDIA H200 datasheet, 1,979 with sparsity
    "GH200": 989e12,  # NVIDIA GH200 datasheet, 1,979 with sparsity
    "H100 NVL": 835e12,  # NVIDIA H100 datasheet (NVL), 1,671 with sparsity
    "H100 PCIe": 756e12,  # NVIDIA H100 datasheet (PCIe), 1,513 with sparsity
    "H100": 989e12,  # NVIDIA H100 datasheet (SXM), 1,979 with sparsity
    "A100": 312e12,  # NVIDIA A100 datasheet, SXM and PCIe alike
    "A10": 125e12,  # NVIDIA A10 datasheet
    "L40S": 362e12,  # NVIDIA L40S datasheet
    "L4": 121e12,  # NVIDIA L4 datasheet, 242 with sparsity
    "V100-SXM2": 125e12,  # NVIDIA V100 datasheet
    "V100-PCIE": 112e12,  # NVIDIA V100 datasheet
    "T4": 65e12,  # NVIDIA T4 datasheet
    "RTX A6000": 155e12,  # NVIDIA GA102 whitepaper, 309.7 with sparsity
    "RTX 3090": 71e12,  # NVIDIA GA102 whitepaper
    "RTX 4090": 165e12,  # NVIDIA Ada GPU architecture whitepaper
}

# A JAX device is a TensorCore, or two of them fused. v4 can be run either way, v5p always fuses
# its two, TPU7x never does: `device.num_cores` tells (seen with libtpu 0.0.42 topologies).
CORES_PER_CHIP = {"TPU v2": 2, "TPU v3": 2, "TPU v4": 2, "TPU v5": 2, "TPU7x": 2}


def peak_of_kind(kind: str) -> float | None:
    """The entry of `PEAK_FLOPS` for a `device_kind`; None if there is none."""
    kind = {"TPU v5e": "TPU v5 lite", "TPU v5p": "TPU v5", "TPU v6e": "TPU v6 lite"}.get(kind, kind)
    for name in sorted(PEAK_FLOPS, key=len, reverse=True):  # 'H100 PCIe' before 'H100'
        if re.search(rf"(?<!\w){re.escape(name)}(?!\w)", kind):
            return PEAK_FLOPS[name]
    return None


def peak_flops(devices: Sequence[Any]) -> float:
    """Peak FLOP/s of all `devices` together; positive and finite for any kind."""
    device = devices[0]
    if device.platform == "cpu":
        # The devices of one process are threads on the same cores: they count once.
        return measured_flops(1024, jnp.float32) * len({d.process_index for d in devices})
    peak = peak_of_kind(device.device_kind)
    if peak is None:
        return measured_flops(8192, jnp.bfloat16) * len(devices)
    if device.platform == "tpu":
        cores = CORES_PER_CHIP.get(device.device_kind, 1)
        peak *= min(getattr(device, "num_cores", cores), cores) / cores
    return peak * len(devices)


def measured_flops(size: int, dtype: Any) -> float:
    """FLOP/s of a [size, size] matrix product on this process's first device: best of five."""
    device, best = jax.local_devices()[0], math.inf
    with jax.set_mesh(jax.make_mesh((1,), ("one",), devices=[device])):  # not the run's mesh
        a = jax.device_put(np.ones((size, size), dtype), device)
        product = jax.jit(lambda a: a @ a)
        product(a).block_until_ready()
        for _ in range(5):
            start = time.perf_counter()
            product(a).block_until_ready()
            best = min(best, time.perf_counter() - start)
    return 2.0 * size**3 / best


def forget_peak() -> None:
    """Begins the peak of this process's memory anew, where the system can (Linux)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> float:
    """The most that was in use so far: of this process's fullest device, or, where devices do not
    tell (CPUs), of this process's memory; 0 where the system does not say."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    if found := [s["peak_bytes_in_use"] for s in stats if "peak_bytes_in_use" in s]:
        return float(max(found))
    return peak_host_bytes()


def peak_host_bytes() -> float:
    """The most memory that this process had so far; 0 where the system does not say."""
    try:  # Linux; what `getrusage` says would begin with the parent's
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024.0 * next(int(x.split()[1]) for x in lines if x.startswith("VmHWM:"))
    except (OSError, StopIteration):
        try:
            import resource  # not on Windows
        except ImportError:
            return 0.0
        return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)  # bytes, on macOS
