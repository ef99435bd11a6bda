"""How time, memory and FLOPs grow with batch, length, depth, width and clones."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from data2vec_jax.bench.measure import peak_bytes, seconds_of
from data2vec_jax.bench.subject import Subject, sized
from data2vec_jax.modalities import contract

SHARES = (0.25, 0.5, 1.0)


def scaled(config: Mapping[str, Any], axis: str, share: float) -> dict[str, Any] | None:
    """`config` with `share` of its batch, length, depth, width or clones; None where it has no such
    thing."""
    config = json.loads(json.dumps(config))
    model, encoder, objective = config["model"], config["model"]["encoder"], config["objective"]
    part = lambda n, multiple=1: max(round(n * share / multiple), 1) * multiple  # noqa: E731
    if axis == "batch":
        config["data"]["batch_size"] = round(config["data"]["batch_size"] / SHARES[0] * share)
    elif axis == "clones":
        if "clones" not in objective:
            return None
        objective["clones"] = part(objective["clones"])
    elif axis == "depth":
        encoder["depth"] = part(encoder["depth"])
        if "top_k" in objective:
            objective["top_k"] = min(objective["top_k"], encoder["depth"])
    elif axis == "width":
        heads = encoder["heads"] = part(encoder["heads"])
        old, multiple = model["width"], math.lcm(16, heads)
        model["width"] = part(old, multiple)
        encoder["mlp"] = round(encoder["mlp"] * model["width"] / old)
    elif axis == "length":
        scale = contract.get(config["modality"]).bench.scale_length
        return scale and scale(config, share)
    return config


def sizes_of(config: Mapping[str, Any]) -> dict[str, float]:
    """What the axes of a sweep are for a config; length in units of the modality (`Bench`)."""
    model, length = config["model"], contract.get(config["modality"]).bench.length
    return {
        "batch": config["data"]["batch_size"],
        "length": length(config) if length else 1,
        "depth": model["encoder"]["depth"],
        "width": model["width"],
        "clones": config["objective"].get("clones", 1),
    }


def sweep(
    config: Mapping[str, Any],
    *,
    rows: int | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Step time, memory, FLOPs and compile time along each axis, and exponents fitted to them.

    A quarter, half and all of the config's length, depth, width and clones; once, twice and four
    times its batch. {axis: {'sizes': [...], name: [...], 'exponents': {name: ...}}}.
    """
    devices = jax.devices()
    if devices[0].platform == "cpu":
        devices = devices[:1]
    base, found = sized(config, rows, devices), {}
    for axis in ("batch", "length", "depth", "width", "clones"):
        points = []
        for share in SHARES:
            changed = scaled(base, axis, share)
            if changed is None:
                break
            size = sizes_of(changed)[axis]
            say(f"{axis} {size:g}")
            subject = Subject(changed, devices)
            (seconds,) = subject.compile(1)
            subject.steps(1)
            points.append(
                {
                    "sizes": size,
                    "step_seconds": min(seconds_of(lambda s=subject: s.steps(1)) for _ in range(3)),
                    "peak_bytes": peak_bytes(subject.program),
                    "flops_per_step": subject.flops,
                    "compile_seconds": seconds,
                }
            )
        if points:
            columns = {name: [p[name] for p in points] for name in points[0]}
            fits = {k: exponent(columns["sizes"], v) for k, v in columns.items() if k != "sizes"}
            found[axis] = columns | {"exponents": fits}
    return found


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """The b of values = a sizes^b, by least squares of logarithms."""
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])
