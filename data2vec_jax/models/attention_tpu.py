"""Attention as one kernel of a TPU: logits and weights never leave the chip's fast memory.

B batch, H heads, T tokens, d width of a head. A program of the kernel has one head of one row, and
as many of its queries as fit beside all T keys; so a softmax is whole, and the backward pass makes
it again from q and k. Forward and gradients are those of `layers.attention`'s own formula.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from data2vec_jax.core import sharding
from data2vec_jax.models.attention_parts import LinearBias, distances, drop_weights

Array = jax.Array
LANES = 128  # of a vector register: T is padded to a multiple
LARGEST = 2**18  # logits of a block; the backward pass holds six such arrays, 1 MiB each
# T at which it pays, and at which a block of 128 queries fits into the 16 MiB of a v4; with a bias
# all queries are one block. d of which that was tried.
LEAST, MOST, MOST_WITH_BIAS, WIDEST = 256, 2048, 512, 128


class Options(NamedTuple):
    """What is known when it is compiled. distance, extra: see `LinearBias`. interpret: run by the
    interpreter of Pallas, on a CPU."""

    dropout_rate: float
    distance: str
    extra: int
    length: int
    interpret: bool


def rule() -> str:
    """For whom it is, in words."""
    longest = f"{MOST:,} tokens, {MOST_WITH_BIAS} with relative positions"
    rows = "where rows divide over the devices"
    return f"a kernel of ours from {LEAST - LANES + 1} to {longest}, {rows}"


def takes(rows: int, length: int, width: int, bias: bool) -> bool:
    """Whether `attend` takes such arrays on this mesh, and it pays.

    Below `LEAST` tokens logits are small, and a program's start costs more than they do. A bias
    needs all queries in one block, for the sum of its gradient over rows.
    """
    divided = rows % sharding.device_count() == 0
    longest = MOST_WITH_BIAS if bias else MOST
    return divided and LEAST <= padded(length) <= longest and width <= WIDEST


def padded(length: int) -> int:
    """The number of tokens with padding to whole registers."""
    return -(-length // LANES) * LANES


def attend(
    q: Array,
    k: Array,
    v: Array,
    bias: Array | None,
    linear: LinearBias | None,
    valid: Array | None,
    dropout_rate: float,
    seeds: Array | None,
    interpret: bool = False,
) -> Array:
    """See `layers.attention`. seeds: int32 [B, H, 2] for dropout, or None."""
    B, _, T, _ = q.shape
    more = padded(T) - T
    options = Options(
        dropout_rate if seeds is not None else 0.0,
        linear.distance if linear else "",
        linear.extra if linear else 0,
        T,
        interpret,
    )

    def pad(x, *axes):
        widths = [(0, more if axis in axes else 0) for axis in range(x.ndim)]
        return jnp.pad(x, widths) if more else x

    q, k, v = (pad(x, 2) for x in (q, k, v))
    places = slopes = None
    if linear is not None:
        places = pad(jnp.broadcast_to(linear.places, (B, *linear.places.shape[1:])), 1)
        slopes = linear.slopes.astype(jnp.float32)
    bias = None if bias is None else pad(bias.astype(jnp.float32), 1, 2)
    valid = None if valid is None else pad(valid.astype(jnp.int32), 1)
    return _attend(options, q, k, v, bias, slopes, places, valid, seeds)[:, :, :T]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(options, q, k, v, bias, slopes, places, valid, seeds):
    return _forward(options, q, k, v, bias, slopes, places, valid, seeds)[0]


def _forward(options, *operands):
    shared, rows = _sorted(operands)
    run = sharding.per_device(functools.partial(_run_forward, options), operands[0].shape[0])
    return run(shared, rows), operands


def _backward(options, operands, gradient):
    shared, rows = _sorted(operands)
    run = sharding.per_device(functools.partial(_run_backward, options), operands[0].shape[0])
    *of_rows, bias, slopes = run(shared, rows, gradient)
    # One part for each device, and for each row.
    sums = (None if parts is None else jnp.sum(parts, 0) for parts in (bias, slopes))
    return *of_rows, *sums, None, None, None  # places, valid and seeds have no gradient


_attend.defvjp(_forward, _backward)


def _sorted(operands):
    """(arrays that all rows share, arrays [B, ...]), by name; places also as the keys need them."""
    q, k, v, bias, slopes, places, valid, seeds = operands
    rows = {"q": q, "k": k, "v": v}
    if places is not None:
        rows |= {"query_places": places, "key_places": jnp.moveaxis(places, 1, 2)}
    if valid is not None:
        rows["valid"] = valid[:, None]
    if seeds is not None:
        rows["seeds"] = seeds
    shared = {"bias": bias, "slopes": slopes}
    return {name: x for name, x in shared.items() if x is not None}, rows


# One device's rows --------------------------------------------------------------------------------


def _run_forward(options, shared, rows):
    q = rows["q"]
    return _call(
        options,
        "attention",
        _forward_kernel,
        {**rows, **shared},
        {"out": (q.shape, q.dtype)},
        scratch=(),
        products=2,
    )[0]


def _run_backward(options, shared, rows, gradient):
    q, k, v = rows["q"], rows["k"], rows["v"]
    B, H, T, d = q.shape
    outputs = {name: (x.shape, x.dtype) for name, x in (("q", q), ("k", k), ("v", v))}
    if "slopes" in shared:
        outputs["slopes"] = (B, H, 1, LANES), jnp.float32
    if "bias" in shared:
        outputs["bias"] = shared["bias"].shape, jnp.float32
    found = _call(
        options,
        "attention_gradient",
        _backward_kernel,
        {**rows, **shared, "gradient": gradient},
        outputs,
        scratch=[pltpu.VMEM((T, d), jnp.float32)] * 2,
        products=5,
    )
    found = dict(zip(outputs, found, strict=True))
    bias = found["bias"][None] if "bias" in found else None
    slopes = found["slopes"][:, :, 0, 0] if "slopes" in found else None
    return found["q"], found["k"], found["v"], bias, slopes


def _call(options, name, kernel, operands, outputs, scratch, products):
    """Runs a kernel for each head, row and block of queries, in this order."""
    B, H, T, d = operands["q"].shape
    if "seeds" in operands:  # flat: the memory of scalars pads the last axis to 128
        operands = operands | {"seeds": operands["seeds"].reshape(-1)}
    sizes = range(T, 0, -LANES)
    queries = next(n for n in sizes if T % n == 0 and (n * T <= LARGEST or n == LANES))
    axes = operands["key_places"].shape[1] if "key_places" in operands else 0
    head = lambda block, index: pl.BlockSpec((None, None, *block), index)  # noqa: E731
    row = lambda block, index: pl.BlockSpec((None, *block), index)  # noqa: E731
    some = head((queries, d), lambda h, b, i: (b, h, i, 0))
    every = head((T, d), lambda h, b, i: (b, h, 0, 0))
    specs = {
        "q": some,
        "k": every,
        "v": every,
        "out": some,
        "gradient": some,
        "query_places": row((queries, axes), lambda h, b, i: (b, i, 0)),
        "key_places": row((axes, T), lambda h, b, i: (b, 0, 0)),
        "valid": row((1, T), lambda h, b, i: (b, 0, 0)),
        "bias": row((queries, T), lambda h, b, i: (h, i, 0)),
        "slopes": pl.BlockSpec(memory_space=pltpu.SMEM),
        "seeds": pl.BlockSpec(memory_space=pltpu.SMEM),
    }
    results = {**specs, "slopes": head((1, LANES), lambda h, b, i: (b, h, 0, 0))}
    kernel = functools.partial(kernel, options, tuple(operands), tuple(outputs))
    weights = float(B * H * T * T)
    call = pl.pallas_call(
        kernel,
        grid=(H, B, T // queries),
        in_specs=[specs[name] for name in operands],
        out_specs=[results[name] for name in outputs],
        out_shape=[jax.ShapeDtypeStruct(*shape) for shape in outputs.values()],
        scratch_shapes=scratch,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary")
        ),
        cost_estimate=pl.CostEstimate(
            flops=int(2 * products * d * weights),
            transcendentals=int(weights),
            bytes_accessed=int(sum(x.nbytes for x in operands.values())),
        ),
        interpret=options.interpret,
    )
    with jax.named_scope(name):  # by which a compiled program's text can be read
        return call(*operands.values())


# One program --------------------------------------------------------------------------------------


def _product(a, b, contract):
    """A matrix product over one axis of each, in float32."""
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)


def _weights(options, refs):
    """(softmax [queries, T] float32, distances or None, bool or None where logits count, what
    dropout makes of weights) of a program."""
    q, k = refs["q"][...], refs["k"][...]
    logits = _product(q, k, (1, 1)) * (q.shape[-1] ** -0.5)
    shape = logits.shape
    query = lax.broadcasted_iota(jnp.int32, shape, 0) + pl.program_id(2) * shape[0]
    key = lax.broadcasted_iota(jnp.int32, shape, 1)
    head, row = pl.program_id(0), pl.program_id(1)
    if "bias" in refs:
        logits = logits + refs["bias"][...]
    apart = counts = None
    if "slopes" in refs:
        apart = distances(options.distance, refs["query_places"][...], refs["key_places"][...])
        if options.extra:
            apart = jnp.where((query >= options.extra) & (key >= options.extra), apart, 0.0)
        logits = logits + refs["slopes"][head] * apart
    if "valid" in refs:
        counts = jnp.broadcast_to(refs["valid"][...] != 0, shape)
        logits = jnp.where(counts, logits, jnp.finfo(jnp.float32).min)
    if options.length < shape[1]:
        logits = jnp.where(key < options.length, logits, -jnp.inf)
    weights = jnp.exp(logits - jnp.max(logits, axis=1, keepdims=True))
    weights = weights / jnp.sum(weights, axis=1, keepdims=True)

    def dropped(x):
        if not options.dropout_rate:
            return x
        place = 2 * (row * pl.num_programs(0) + head)
        seeds = refs["seeds"][place], refs["seeds"][place + 1]
        return drop_weights(x, options.dropout_rate, seeds, query, key)

    return weights, apart, counts, dropped


def _forward_kernel(options, operands, outputs, *refs):
    refs = dict(zip((*operands, *outputs), refs, strict=True))
    weights, _, _, dropped = _weights(options, refs)
    v = refs["v"][...]
    out = _product(dropped(weights.astype(v.dtype)), v, (1, 0))
    refs["out"][...] = out.astype(refs["out"].dtype)


def _backward_kernel(options, operands, outputs, *refs):
    given, made = dict(zip(operands, refs, strict=False)), refs[len(operands) :]
    of, (of_k, of_v) = dict(zip(outputs, made, strict=False)), made[len(outputs) :]
    block, last = pl.program_id(2), pl.num_programs(2) - 1

    @pl.when(block == 0)
    def _():
        of_k[...] = jnp.zeros_like(of_k)
        of_v[...] = jnp.zeros_like(of_v)
        if "slopes" in of:
            of["slopes"][...] = jnp.zeros_like(of["slopes"])

    weights, apart, counts, dropped = _weights(options, given)
    q, k, v, gradient = (given[name][...] for name in ("q", "k", "v", "gradient"))
    of_v[...] += _product(dropped(weights.astype(v.dtype)), gradient, (0, 0))
    of_weights = dropped(_product(gradient, v, (1, 1)))
    mean = jnp.sum(weights * of_weights, axis=1, keepdims=True)
    of_logits = weights * (of_weights - mean)
    if counts is not None:
        of_logits = jnp.where(counts, of_logits, 0.0)
    if "slopes" in of:
        of["slopes"][...] += jnp.sum(of_logits * apart)
    if "bias" in of:
        # Programs of a head follow each other, so that its block stays where it is.
        of["bias"][...] = jnp.where(pl.program_id(1) == 0, 0.0, of["bias"][...]) + of_logits
    scaled = (of_logits * (q.shape[-1] ** -0.5)).astype(q.dtype)
    of["q"][...] = _product(scaled, k, (1, 0)).astype(q.dtype)
    of_k[...] += _product(scaled, q, (0, 0))

    @pl.when(block == last)
    def _():
        of["k"][...] = of_k[...].astype(k.dtype)
        of["v"][...] = of_v[...].astype(v.dtype)
