"""Changes to a config that make its step fit."""

from collections.abc import Iterator, Mapping
from typing import Any

from data2vec_jax.core import sharding
from data2vec_jax.core.config import with_options
from data2vec_jax.core.errors import UserError
from data2vec_jax.plan.step import Step
from data2vec_jax.plan.topology import GIB, Topology, devices_of

TRIES = 3  # programs compiled in search of one that fits


def advice(config: Mapping[str, Any], topology: Topology, step: Step) -> list[str]:
    """Lines for the user: the first of a few changes that fits, each compiled."""
    lines = []
    for options in remedies(config, topology, step):
        changed = with_options(config, options)
        flags = " ".join(f"--config.{k}={v}" for k, v in options.items())
        try:
            mesh = sharding.make_mesh(**changed["mesh"], devices=devices_of(topology))
            compiled = Step(changed, mesh).compile()
        except UserError:  # devices or a batch, perhaps of shorter examples, do not divide so
            continue
        size = f"{compiled.total / GIB:.2f} of {topology.chip.hbm / GIB:.2f} GiB"
        if compiled.fits(topology.room):
            return [*lines, f"it fits with {flags} ({size}, compiled)"]
        lines = [f"it does not fit even with {flags} ({size}, compiled)"]
    smaller = "a smaller config.data.batch_size, or more chips"
    return [*lines, f"try {smaller}"]


def remedies(config: Mapping[str, Any], topology: Topology, step: Step) -> Iterator[dict[str, Any]]:
    """Changes to a config that make its step smaller, each on top of the one before."""
    options: dict[str, Any] = {}
    per_slice = topology.chip.devices * topology.chips // topology.slices
    mesh = sharding.make_mesh(**config["mesh"], devices=devices_of(topology))
    before = fsdp = mesh.shape["fsdp"]
    room, found = topology.chip.hbm, 0
    if step.state_bytes > room / 3:  # parameters, teacher and moments: the copies are the problem
        while step.state_bytes * before / fsdp > room / 4 and 2 * fsdp <= per_slice:
            fsdp *= 2
        if fsdp > before:
            options["mesh.fsdp"] = fsdp
            if config["mesh"]["data"] != -1:
                options["mesh.data"] = -1
            found += 1
            yield dict(options)
    if config["model"]["encoder"].get("remat", "none") != "full":
        options["model.encoder.remat"] = "full"
        found += 1
        yield dict(options)
    parts = config["accumulate"]
    rows = step.rows // (per_slice * topology.slices)
    while found < TRIES and 2 * parts <= rows and rows % (2 * parts) == 0:
        parts *= 2
        options["accumulate"] = parts
        found += 1
        yield dict(options)
