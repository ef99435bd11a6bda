"""NVIDIA GPUs in machines of eight, and XLA as a compiler for those that are not there.

JAX's CUDA plugin compiles without a card if it is told what the card is like: a text of XLA's
GpuTargetConfigProto. Nothing is tried out, so that matrix products are Triton's, with default
tiles, where a real card may choose cuBLAS.
"""

import importlib.util
from collections.abc import Sequence
from typing import Any

from data2vec_jax.plan.chips import Chip

PLUGINS = ("jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12")
# What JAX takes of a card's memory, unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise.
FRACTION = 0.75

# hbm: `FRACTION` of what the driver shows (XLA's descriptions of the cards). hbm_bandwidth, ring
# (NVLink, one way, half of the printed sum of both) and memory: NVIDIA's datasheets of H100 SXM,
# H200 SXM and A100 SXM 80 GB. dcn: a network card for each GPU, 400 Gb/s in DGX H100 and H200,
# 200 Gb/s in DGX A100 (their user guides).
CARDS = {
    "a100": Chip("A100", 1, 0, FRACTION * 85_100_068_864, 2039e9, 300e9, 200e9 / 8),
    "h100": Chip("H100", 1, 0, FRACTION * 84_942_979_072, 3352e9, 450e9, 400e9 / 8),
    "h200": Chip("H200", 1, 0, FRACTION * 151_397_597_184, 4800e9, 450e9, 400e9 / 8),
}
# Numbers of the CUDA programming guide for compute capabilities 8.0 and 9.0, and of the datasheets.
HOPPER = dict(
    major=9, cores=132, fpus=128, ghz=1.98, cache=52_428_800, shared=233_472, most_shared=232_448
)
AMPERE = dict(
    major=8, cores=108, fpus=64, ghz=1.41, cache=41_943_040, shared=167_936, most_shared=166_912
)
DESCRIPTIONS = {
    "a100": AMPERE | dict(name="NVIDIA A100-SXM4-80GB"),
    "h100": HOPPER | dict(name="NVIDIA H100 80GB HBM3"),
    "h200": HOPPER | dict(name="NVIDIA H200"),
}
TARGET = """
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {shared}
  threads_per_core_limit: 2048
  core_count: {cores}
  fpus_per_core: {fpus}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth}
  l2_cache_size: {cache}
  clock_rate_ghz: {ghz}
  device_memory_size: {memory}
  shared_memory_per_block_optin: {most_shared}
  cuda_compute_capability {{ major: {major} }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
runtime_version {{ major: 13 }}
device_description_str: "{name}"
"""


def target(kind: str) -> str:
    """The text that describes a card to XLA."""
    card = CARDS[kind]
    sizes = dict(bandwidth=int(card.hbm_bandwidth), memory=round(card.hbm / FRACTION))
    return TARGET.format(**DESCRIPTIONS[kind], **sizes)


def plugin() -> str | None:
    """The installed CUDA plugin, as a module's name; None without it, or without cuDNN, which JAX
    asks for its version where attention is computed by it."""
    if not all(map(_installed, ("jax_plugins", "nvidia.cudnn"))):
        return None
    return next((name for name in PLUGINS if _installed(name)), None)


def _installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # nor is the package that it is a part of
        return False


def described(kind: str, each: int, machines: int) -> Sequence[Any]:
    """XLA's description of the devices of `machines` machines of `each` cards."""
    from jax.experimental import topologies

    sizes = f"1x{machines}x{each}"
    return topologies.get_topology_desc(
        platform="cuda", topology_name=sizes, topology=sizes, target_config=target(kind)
    ).devices
