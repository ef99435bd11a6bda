"""LoRA (Hu 2022) and DoRA (Liu 2024) on any model: small matrices beside frozen kernels.

Adapters are a tree of parameters of their own. `merged(params, sites, adapters)` is the model's
parameters with every adapted kernel in place of its base, so `apply(merged(...), ...)` runs the
adapted model, a gradient with respect to `adapters` trains them alone, and storing the result
merges them for good. No model knows of them.

    LoRA  V = W + s A B
    DoRA  V = (W + s A B) * m / n,   n = the length of each column of W + s A B, held constant

(finetuning_and_conversion 3.5, whose matrices are transposed.)   L layers, I inputs, O outputs,
r rank.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from data2vec_jax.core.errors import UserError
from data2vec_jax.models.layers import Array, Key

Tree = Mapping[str, Any]
PARTS = ("query", "key", "value")  # thirds of a fused kernel's outputs
LARGEST = 4096  # rank


class Site(NamedTuple):
    """Position of adapters: a kernel, or a third of a fused one, in all layers."""

    name: str
    """Path of its parameters a [L, I, r], b [L, r, O] and, of DoRA, magnitude [L, O]; without the
    axis L for the kernel of one layer."""
    kernel: str
    """Path of the kernel."""
    part: int | None
    """Third of a fused kernel; None for all of it."""
    ranks: tuple[int, ...]
    """r of each layer; 0 for no adapter. Matrices of smaller ranks than the largest are padded with
    zeros, which stay zero in training."""
    scales: tuple[float, ...]
    """s of each layer."""
    dora: bool = False
    """DoRA, not LoRA."""

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> "Site":
        """From JSON (the inverse of `_asdict`)."""
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in options.items()})


def places(kernel: str) -> dict[str, int | None]:
    """The sites of a kernel, by name: 'encoder/blocks/up', or '.../qkv/query' and so on."""
    name = kernel.removesuffix("/kernel")
    if name.endswith("/qkv"):
        return {f"{name}/{part}": i for i, part in enumerate(PARTS)}
    return {name: None}


def switched_on(section: Mapping[str, Any] | None) -> bool:
    """Whether a config section `adapter` names targets; without, all parameters are trained."""
    return bool(section and section.get("targets"))


def find(
    params: Tree,
    *,
    targets: Sequence[str],
    rank: int,
    alpha: float | None = None,
    dora: bool = False,
    rank_stabilised: bool = False,
) -> list[Site]:
    """Sites for the kernels of `params` (arrays or shapes).

    Config section `adapter`. targets: regular expressions, found in names of sites, such as
    'qkv/(query|value)$' or 'blocks/'. rank: r. alpha: s = alpha / r, or alpha / sqrt(r) with
    rank_stabilised (rsLoRA); the default is s = 1. dora: learned lengths of columns as well.

    Raises UserError for a target that no linear layer has.
    """
    if not 1 <= rank <= LARGEST:
        raise UserError(f"config.adapter.rank: {rank}; choose from 1 to {LARGEST}")
    root = math.sqrt(rank) if rank_stabilised else rank
    scale, sites, used = 1.0 if alpha is None else alpha / root, [], set()
    names = []
    for target in targets:
        try:
            re.compile(target)
        except re.error as error:
            raise UserError(f"config.adapter.targets: '{target}': {error}") from None
    for kernel, shape in kernels(params):
        for name, part in places(kernel).items():
            found = [t for t in targets if re.search(t, name)]
            names.append(name)
            if found:
                used.update(found)
                layers = shape[0] if len(shape) == 3 else 1
                sites.append(Site(name, kernel, part, (rank,) * layers, (scale,) * layers, dora))
    for target in targets:
        if target not in used:
            raise UserError(
                f"config.adapter.targets: no linear layer matches '{target}'; "
                f"there are {', '.join(names)}"
            )
    return sites


def kernels(params: Tree, prefix: str = "") -> list[tuple[str, tuple[int, ...]]]:
    """(path, shape) of the kernels of linear layers; those in `blocks` are stacked."""
    found = []
    for name, value in params.items():
        path = f"{prefix}{name}"
        if isinstance(value, Mapping):
            found += kernels(value, f"{path}/")
        elif name == "kernel" and len(value.shape) == (3 if "blocks/" in path else 2):
            found.append((path, tuple(value.shape)))
    return found


def init(key: Array, sites: Sequence[Site], params: Tree) -> dict[str, Any]:
    """Adapters that change nothing yet: a uniform within 1 / sqrt(I), b zero, lengths of W."""
    tree: dict[str, Any] = {}
    for site, site_key in zip(sites, jax.random.split(key, max(len(sites), 1)), strict=False):
        W = base(params, site)
        *stack, inputs, outputs = W.shape
        r, bound = max(site.ranks), 1 / math.sqrt(inputs)
        a = jax.random.uniform(site_key, (*stack, inputs, r), jnp.float32, -bound, bound)
        used = jnp.arange(r) < jnp.asarray(site.ranks)[:, None, None]  # [L, 1, r]
        leaves = {"a": jnp.where(used.reshape(*stack, 1, r), a, 0)}
        leaves["b"] = jnp.zeros((*stack, r, outputs), jnp.float32)
        if site.dora:
            leaves["magnitude"] = lengths(jnp.asarray(W, jnp.float32))
        put(tree, site.name, leaves)
    return tree


def merged(
    params: Tree, sites: Sequence[Site], adapters: Tree, key: Key = None, dropout: float = 0.0
) -> dict[str, Any]:
    """`params` with the adapted kernels in place of their bases.

    dropout, with a key: share of each adapter's inputs that it does not see. (PEFT draws them for
    every token; here they are drawn once a call, as a kernel cannot differ between tokens.)
    """
    found = jax.tree.map(lambda x: x, dict(params))  # a copy of the dicts, not of the arrays
    for number, site in enumerate(sites):
        leaves, W = get(adapters, site.name), base(found, site)
        mask = None
        if key is not None and dropout:
            keep = jax.random.bernoulli(
                jax.random.fold_in(key, number), 1 - dropout, (*W.shape[:-1], 1)
            )
            mask = keep / (1 - dropout)
        V = adapted(W, site, leaves, mask)
        if site.part is not None:
            whole = jnp.split(get(found, site.kernel), 3, axis=-1)
            whole[site.part] = V
            V = jnp.concatenate(whole, axis=-1)
        put(found, site.kernel, V)
    return found


def adapted(W: Array, site: Site, leaves: Tree, mask: Array | None = None) -> Array:
    """The kernel that runs: W [(L,) I, O] with its adapter; mask [(L,) I, 1] on its inputs."""
    stack = W.shape[:-2]
    scale, active = (
        jnp.asarray(x, W.dtype).reshape(*stack, 1, 1) for x in (site.scales, site.ranks)
    )
    a, b = leaves["a"], leaves["b"]
    product = lambda a: scale * jnp.matmul(a, b, precision="highest")  # noqa: E731
    if not site.dora:
        return W + product(a if mask is None else a * mask)
    V = W + product(a)
    factor = (leaves["magnitude"] / jax.lax.stop_gradient(lengths(V)))[..., None, :]
    V = factor * V if mask is None else _masked(W, factor, product(a * mask), mask)
    return jnp.where(active > 0, V, W)


def _masked(W, factor, product, mask):
    """DoRA with inputs left out, as PEFT has it: the base itself sees all of them."""
    return W + (factor - 1) * (mask * W) + factor * product


def lengths(W: Array) -> Array:
    """The length of each column: [(L,) I, O] -> [(L,) O]."""
    return jnp.sqrt(jnp.sum(jnp.square(W), axis=-2))


def base(params: Tree, site: Site) -> Array:
    """The kernel of a site, [(L,) I, O]."""
    W = get(params, site.kernel)
    return W if site.part is None else jnp.split(W, 3, axis=-1)[site.part]


def get(tree: Tree, path: str) -> Any:
    """The node at 'a/b/c'."""
    for name in path.split("/"):
        tree = tree[name]
    return tree


def put(tree: dict[str, Any], path: str, value: Any) -> None:
    """Sets the node at 'a/b/c', making dicts on the way."""
    *folders, name = path.split("/")
    for folder in folders:
        tree = tree.setdefault(folder, {})
    tree[name] = value
