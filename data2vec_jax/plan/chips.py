"""What a plan knows of a kind of accelerator."""

from typing import NamedTuple


class Chip(NamedTuple):
    """A kind of TPU or GPU. Numbers are of a chip, except `hbm`: bytes that a program may use on a
    device.

    device_kind: JAX's name of its devices, of which a chip is `devices`, or a word in it. axes: of
    a TPU's network. hbm_bandwidth, ring, dcn: bytes a second from main memory; to the next chips of
    a ring (TPU: both ways; GPU: to one over NVLink); and to the data centre's network.
    """

    device_kind: str
    devices: int
    axes: int
    hbm: float
    hbm_bandwidth: float
    ring: float
    dcn: float
