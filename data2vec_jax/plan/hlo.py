"""What a compiled program sends, computes and moves, read from its text (optimised HLO).

XLA's own cost analysis counts the body of a loop once and knows nothing of networks. Here a loop's
body counts as often as it runs, and every number is of one device.
"""

import functools
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

BYTES = {"pred": 1, "token": 0, "opaque": 0, "s4": 0.5, "u4": 0.5}
COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "collective-broadcast",
    "ragged-all-to-all",
)
BETWEEN_SLICES = "between slices"
START = "AsyncCollectiveStart"  # libtpu's mark of the fusion that starts a message beside others
ASYNCHRONOUS = {START, "AsyncCollectiveDone"}
PARTIAL = ("dynamic-slice", "slice", "gather")  # read only the part that they return
# Work of no time: names for parts of other arrays, and the second halves of asynchronous pairs.
FREE = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "after-all",
    "partition-id",
    "replica-id",
    "iota",
    "opt-barrier",
    "domain",
}


class Collective(NamedTuple):
    """One kind of message of all devices, at one place of the program.

    kind: of `COLLECTIVES`, or `BETWEEN_SLICES`: the sum that libtpu hands to the data centre's
    network. bytes: of the whole array: what is gathered, or what each device adds to the sum; of
    `BETWEEN_SLICES`, what a device sends. times: executions a step. group: devices that take part.
    overlaps: it runs beside computation. where: the operation that it came from.
    """

    kind: str
    bytes: float
    times: int
    group: int
    overlaps: bool
    where: str


class Work(NamedTuple):
    """An instruction: floating-point operations of matrix products and convolutions, bytes of main
    memory read and written, executions a step; `overlaps`: a copy beside computation."""

    flops: float
    bytes: float
    times: int
    overlaps: bool


class Program(NamedTuple):
    """What `read` finds. instructions: in the text, a size that the time to compile follows.
    unknown_loops: loops whose number of turns depends on data; their bodies count once."""

    collectives: list[Collective]
    work: list[Work]
    instructions: int
    unknown_loops: int

    def summary(self) -> dict[str, dict[str, float]]:
        """{kind: {'count': executions a step, 'bytes': of all of them}}."""
        kinds: dict[str, dict[str, float]] = {}
        for c in self.collectives:
            found = kinds.setdefault(c.kind, {"count": 0, "bytes": 0})
            found["count"] += c.times
            found["bytes"] += int(c.times * c.bytes)
        return dict(sorted(kinds.items()))

    @property
    def flops(self) -> float:
        return sum(w.flops * w.times for w in self.work)


class Array(NamedTuple):
    """An array of a shape's text; `main` if it lies in main memory (HBM), not in a cache."""

    dtype: str
    dims: tuple[int, ...]
    main: bool

    @property
    def bytes(self) -> float:
        bits = re.search(r"\d+", self.dtype)
        size = BYTES.get(self.dtype) if self.dtype in BYTES else int(bits[0]) / 8 if bits else 0
        return size * math.prod(self.dims)


class Instruction(NamedTuple):
    name: str
    shape: list[Array]
    opcode: str
    operands: list[str]
    attributes: str
    root: bool


_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) (?:\(.*)?\{$")
_CALLED = re.compile(r"\b(?:calls|to_apply|body)=%?([\w.\-]+)")


def read(text: str) -> Program:
    """The program of `compiled.as_text()`."""
    return _Reader(text).program()


def kernels(text: str) -> dict[str, int]:
    """How many instructions of a program are kernels, by name: of a library or of Triton on GPUs
    (`__cublas$lt$matmul`, `__cudnn$fmhaSoftmax`, `__triton_gemm`, ...), our own on TPUs
    (`attention`)."""
    ours = re.findall(
        r'custom_call_target="tpu_custom_call".*op_name="[^"]*/(\w+)/pallas_call"', text
    )
    if ours or "AllocateBuffer" in text:  # libtpu's other calls are names for memory
        return dict(sorted(Counter(ours).items()))
    called = re.findall(r'custom_call_target="([^"]+)"', text)
    fused = re.findall(r'"fusion_backend_config":\{[^{}]*?"kind":"(\w+)"', text)
    return dict(sorted(Counter(called + fused).items()))


def unordered(text: str) -> list[tuple[str, str]]:
    """Pairs of instructions whose messages two processes on CPU may start in different orders.

    XLA's CPU runtime starts the messages of one computation in the order of the text, even if none
    needs another's result. But a loop or a branch it merely begins: a message inside may come
    before or after one outside, unless one of the two instructions needs the other's result.
    """
    reader, found = _Reader(text), []
    bodies = reader.computations

    @functools.cache
    def sends(computation: str) -> bool:
        return any(_kind(i) or sends_inside(i) for i in bodies[computation])

    def sends_inside(i: Instruction) -> bool:
        return any(sends(name) for name in reader.run_by(i) or ())

    for body in bodies.values():
        needs: dict[str, set[str]] = {}  # instruction -> the senders whose results it needs
        senders: dict[str, bool] = {}  # -> whether it sends inside
        for i in body:
            needs[i.name] = {name for o in i.operands for name in needs.get(o, ())}
            needs[i.name].update(o for o in i.operands if o in senders)
            inside = sends_inside(i)
            if inside or _kind(i):
                free = [name for name in senders if name not in needs[i.name]]
                found += [(name, i.name) for name in free if inside or senders[name]]
                senders[i.name] = inside
    return found


def arrays(shape: str) -> list[Array]:
    """The arrays of a shape such as 'bf16[8,128]{1,0:T(8,128)S(1)}', or of a tuple of shapes."""
    found = []
    for dtype, dims, layout in _ARRAY.findall(shape):
        space = re.search(r"S\((\d+)\)", layout)
        dims = tuple(int(d) for d in dims.split(",") if d)
        found.append(Array(dtype, dims, space is None or space[1] == "0"))
    return found


class _Reader:
    def __init__(self, text: str):
        self.computations: dict[str, list[Instruction]] = {}
        self.entry = ""
        current: list[Instruction] = []
        for line in text.splitlines():
            if header := _HEADER.match(line):
                current = self.computations[header[2]] = []
                self.entry = header[2] if header[1] else self.entry
            elif " = " in line and line.startswith("  "):
                current.append(_instruction(line))
        self.collectives: list[Collective] = []
        self.work: list[Work] = []
        self.unknown_loops = 0

    def program(self) -> Program:
        self.walk(self.entry, 1)
        size = sum(len(body) for body in self.computations.values())
        return Program(self.collectives, self.work, size, self.unknown_loops)

    def walk(self, computation: str, times: int) -> None:
        """Counts what `computation` does when it runs `times` times a step."""
        body = self.computations[computation]
        shapes = {i.name: i.shape for i in body}
        for i in body:
            if (inner := self.run_by(i)) is not None:
                turns = self.turns(i) if i.opcode == "while" else 1
                for name in inner:
                    self.walk(name, times * turns)
            elif i.opcode in ("fusion", "fusion-start"):
                if i.opcode == "fusion-start":  # of GPUs, on a stream of its own: (given, results)
                    given = sum(len(shapes[name]) for name in i.operands)
                    i = i._replace(shape=i.shape[given:])
                self.fusion(i, self.computations[_CALLED.findall(i.attributes)[0]], shapes, times)
            elif kind := _kind(i):
                self.send(i, kind, shapes, times, overlaps=i.opcode.endswith("-start"))
            elif i.opcode not in FREE and not i.opcode.endswith(("-done", "-update")):
                copies = i.opcode in ("copy-start", "slice-start", "dynamic-slice-start")
                self.work.append(Work(_products(i, shapes), _moved(i, shapes), times, copies))

    def run_by(self, i: Instruction) -> list[str] | None:
        """Computations that `i` runs, instruction by instruction; None if it is no such thing."""
        called = _CALLED.findall(i.attributes)
        if i.opcode == "while":
            return called[:1]
        if i.opcode in ("call", "async-start"):
            return called
        if i.opcode == "conditional":  # all branches: no less than any of them
            return re.findall(r"%([\w.\-]+)", _braces(i.attributes, "computations="))
        return None

    def turns(self, loop: Instruction) -> int:
        """Executions of a loop's body: a scan counts from 0 to a constant."""
        if known := re.search(r'known_trip_count":\{"n":"(\d+)"', loop.attributes):
            return int(known[1])
        condition = re.search(r"condition=%?([\w.\-]+)", loop.attributes)[1]
        body = self.computations[condition]
        root = next(i for i in body if i.root)
        if root.opcode == "compare" and "direction=LT" in root.attributes:
            limit = next((i for i in body if i.name == root.operands[1]), None)
            if limit is not None and limit.opcode == "constant":
                return int(re.search(r"\d+", limit.operands[0])[0])
        self.unknown_loops += 1
        return 1

    def fusion(self, i: Instruction, body: list[Instruction], shapes: Mapping, times: int) -> None:
        """Several instructions in one: products count, and only its ends touch main memory."""
        inner = {j.name: j.shape for j in body}
        custom = {t for j in body for t in re.findall(r'custom_call_target="(\w+)"', j.attributes)}
        for j in body:
            kind = _kind(j)
            if kind is None:
                continue
            if START in custom:
                self.send(j, kind, inner, times, overlaps=True)
            elif "async_collective_fusion_config" not in j.attributes:
                # libtpu writes a reduce-scatter as a sum whose other parts are thrown away.
                sliced = kind == "all-reduce" and any(k.opcode == "dynamic-slice" for k in body)
                kind = "reduce-scatter" if sliced else kind
                self.send(j, kind, inner, times, overlaps=False, where=i.attributes)
        products = sum(_products(j, inner) for j in body)
        if not products and (custom & ASYNCHRONOUS or any(map(_kind, body))):
            return  # nothing but a message, or a part of one
        self.work.append(Work(products, self.ends(i, body, shapes), times, False))

    def ends(self, i: Instruction, body: list[Instruction], shapes: Mapping) -> float:
        """Bytes of main memory that a fusion reads and writes: parts of arrays, where it is so."""
        given = [shapes.get(name, []) for name in i.operands]
        total = 0.0
        for j in body:
            if j.opcode == "parameter" and (whole := _main(given[int(j.operands[0])])):
                total += self.read_of(j.name, body, whole)
        root = next(j for j in body if j.root)
        results = root.operands if root.opcode == "tuple" else [root.name]
        for name, array in zip(results, i.shape, strict=False):
            total += self.written_of(name, body, array.bytes) if array.main else 0.0
        return total

    def read_of(self, name: str, body: list[Instruction], whole: float) -> float:
        """Bytes that a fused computation reads of its parameter `name` of `whole` bytes."""
        total = 0.0
        uses = [(j, place) for j in body for place, used in enumerate(j.operands) if used == name]
        for j, place in uses:
            if j.opcode == "bitcast":
                total += self.read_of(j.name, body, whole)
            elif j.opcode == "fusion":
                inner = self.computations[_CALLED.findall(j.attributes)[0]]
                total += self.read_of(_parameter(inner, place), inner, whole)
            elif j.opcode in PARTIAL and place == 0:
                total += sum(a.bytes for a in j.shape)
            elif j.opcode != "dynamic-update-slice" or place:  # which writes into operand 0
                return whole
        return min(total, whole)

    def written_of(self, name: str, body: list[Instruction], whole: float) -> float:
        """Bytes that a fused computation writes of its result `name` of `whole` bytes."""
        j = next(j for j in body if j.name == name)
        if j.opcode == "bitcast":
            return self.written_of(j.operands[0], body, whole)
        if j.opcode == "fusion" and len(j.shape) == 1:
            inner = self.computations[_CALLED.findall(j.attributes)[0]]
            return self.written_of(next(k.name for k in inner if k.root), inner, whole)
        if j.opcode == "dynamic-update-slice":
            update = next((k for k in body if k.name == j.operands[1]), None)
            return sum(a.bytes for a in update.shape) if update else whole
        return whole

    def send(
        self,
        i: Instruction,
        kind: str,
        shapes: Mapping,
        times: int,
        overlaps: bool,
        where: str = "",
    ) -> None:
        given = sum(a.bytes for name in i.operands for a in shapes.get(name, ()))
        taken = sum(a.bytes for a in i.shape)
        size = given
        if kind == "all-gather":
            size = taken if not i.opcode.endswith("-start") else taken - given
        name = re.search(r'op_name="([^"]*)"', i.attributes + where)
        self.collectives.append(
            Collective(
                kind, size, times, group_size(i.attributes), overlaps, name[1] if name else ""
            )
        )


def _parameter(body: list[Instruction], number: int) -> str:
    """The name of a computation's parameter."""
    return next(j.name for j in body if j.opcode == "parameter" and j.operands == [str(number)])


def _kind(i: Instruction) -> str | None:
    """The kind of collective that an instruction starts, None if it is none."""
    if i.opcode == "send" and "xla_megascale" in i.attributes:
        return BETWEEN_SLICES
    opcode = i.opcode.removesuffix("-start")
    return opcode if opcode in COLLECTIVES else None


def group_size(attributes: str) -> int:
    """Devices that take part in one collective; 1 if it says nothing.

    Forms of `replica_groups`: {{0,1},{2,3}}, [groups,size]<=[...], and mesh['a'=2,'b'=4] {'b'}.
    """
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", attributes):
        return listed[1].count(",") + 1
    if iota := re.search(r"replica_groups=\[\d+,(\d+)\]<=", attributes):
        return int(iota[1])
    if mesh := re.search(r"replica_groups=(?:@\w+ )?mesh\[([^\]]*)\](.*?)\{([^}]*)\}", attributes):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", mesh[3]))
    return 1


def _instruction(line: str) -> Instruction:
    left, right = line.strip().split(" = ", 1)
    end = _closing(right, 0) + 1 if right.startswith("(") else right.index(" ")
    shape, rest = right[:end], right[end + 1 :]
    open_ = rest.index("(")
    close = _closing(rest, open_)
    inside = rest[open_ + 1 : close]
    names = [part.split()[-1].lstrip("%") for part in _parts(inside)]
    root = left.startswith("ROOT ")
    name = left.removeprefix("ROOT ").lstrip("%")
    return Instruction(name, arrays(shape), rest[:open_], names, rest[close + 1 :], root)


def _parts(text: str) -> list[str]:
    """What stands between the commas outside all brackets; comments are left out."""
    parts, depth = [""], 0
    for character in re.sub(r"/\*.*?\*/", "", text):
        depth += (character in "([{") - (character in ")]}")
        if character == "," and not depth:
            parts.append("")
        else:
            parts[-1] += character
    return [part for part in parts if part.strip()]


def _closing(text: str, start: int) -> int:
    """Index of the bracket that closes the one at `start`."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if not depth:
            return i
    raise ValueError(f"no closing bracket in {text!r}")


def _braces(text: str, after: str) -> str:
    """What stands in {} after `after`; '' if nothing does."""
    found = re.search(re.escape(after) + r"\{([^}]*)\}", text)
    return found[1] if found else ""


# Matrix products ----------------------------------------------------------------------------------

# Which of (first operand, second operand, result) are input, kernel and output.
_ORDERS = {"BackwardFilter": (0, 2, 1), "BackwardInput": (2, 1, 0)}


def _cudnn(i: Instruction) -> str:
    """Which convolution of cuDNN it is: 'Forward', 'BackwardFilter', ...; '' if it is none."""
    target = 'custom_call_target="__cudnn$conv'
    return i.attributes.partition(target)[2].partition('"')[0] if i.opcode == "custom-call" else ""


def _kernel(i: Instruction) -> str:
    """Which kernel of attention it is: 'tpu_custom_call', our own (Pallas), cuDNN's
    '__cudnn$fmhaSoftmax', '__cudnn$fmhaScaleBiasSoftmax' or '...Backward'; '' if it is none."""
    if i.opcode != "custom-call":
        return ""
    found = re.search(r'custom_call_target="(tpu_custom_call|__cudnn\$fmha\w+)"', i.attributes)
    return found[1] if found else ""


def _products(i: Instruction, shapes: Mapping[str, list[Array]]) -> float:
    """FLOPs of a dot, a convolution or a kernel that states them, 2 per multiply-add; 0 for
    anything else."""
    kernel = _kernel(i)
    if kernel == "tpu_custom_call":
        stated = re.search(r'"cost_estimate":\{"flops":"(\d+)"', i.attributes)
        return float(stated[1]) if stated else 0.0
    if kernel:  # logits and weighted values, or logits and four gradients
        config = i.attributes.partition('"intermediate_tensor_shape"')[2]
        weights = re.search(r'"dimensions":\s*\[([^\]]*)\]', config)[1]
        width = shapes[i.operands[0]][0].dims[-1]
        products = 5 if kernel.endswith("Backward") else 2
        return 2.0 * products * width * math.prod(int(n.strip(' "')) for n in weights.split(","))
    if i.opcode == "dot":
        left = shapes[i.operands[0]][0].dims
        contracted = _braces(i.attributes, "lhs_contracting_dims=")
        depth = math.prod(left[int(d)] for d in contracted.split(",") if d)
        return 2.0 * depth * math.prod(i.shape[0].dims)
    kind = _cudnn(i)
    if i.opcode != "convolution" and not kind:
        return 0.0
    names, kernel_names, out_names = re.search(
        r"dim_labels=(\w+)_(\w+)->(\w+)", i.attributes
    ).groups()
    dims = [*(shapes[name][0].dims for name in i.operands[:2]), i.shape[0].dims]
    # cuDNN's gradients have the labels of the convolution whose gradients they are.
    given, kernel, out = (dims[k] for k in _ORDERS.get(kind, (0, 1, 2)))
    window = dict(re.findall(r"(\w+)=([\dx_\-]+)", _braces(i.attributes, "window=")))
    spatial = sorted(set(names) - {"b", "f"})
    taps = 1
    for n, axis in enumerate(spatial):
        taps *= _taps(
            given[names.index(axis)],
            kernel[kernel_names.index(axis)],
            out[out_names.index(axis)],
            *(_option(window, key, n) for key in ("stride", "lhs_dilate", "rhs_dilate")),
            _padding(window, n),
        )
    rows = out[out_names.index("b")] * out[out_names.index("f")]
    per_group = kernel[kernel_names.index("i")]  # features that one output reads
    return 2.0 * taps * rows * per_group


def _option(window: Mapping[str, str], key: str, axis: int) -> int:
    return int(window[key].split("x")[axis]) if key in window else 1


def _padding(window: Mapping[str, str], axis: int) -> int:
    return int(window["pad"].split("x")[axis].split("_")[0]) if "pad" in window else 0


def _taps(
    given: int, kernel: int, out: int, stride: int, spread: int, kernel_spread: int, padding: int
) -> int:
    """Pairs of an output and a kernel position that meet an input, not padding nor a gap.

    TPU programs write the batch of a matrix product as an axis that is spread so far that each
    output meets one input: counting the pairs gives the true number.
    """
    places = np.arange(out)[:, None] * stride + np.arange(kernel) * kernel_spread - padding
    return int(np.sum((places >= 0) & (places <= (given - 1) * spread) & (places % spread == 0)))


# Main memory --------------------------------------------------------------------------------------


def _main(shape: Sequence[Array]) -> float:
    return sum(a.bytes for a in shape if a.main)


def _moved(i: Instruction, shapes: Mapping[str, list[Array]]) -> float:
    """Bytes of main memory that an instruction outside fusions reads and writes."""
    if i.opcode == "copy-start":  # (to, from, flag)
        return _main(i.shape[:2])
    if i.opcode == "slice-start":  # ((from), to, flag)
        source, to = i.shape[0], i.shape[1]
        return to.bytes * (source.main + to.main)
    if i.opcode in PARTIAL:
        return 2 * _main(i.shape)
    if i.opcode == "dynamic-update-slice":
        return 2 * _main(shapes.get(i.operands[1], ()))
    if i.opcode == "custom-call" and not _cudnn(i) and not _kernel(i):  # libtpu's name memory
        return 0.0
    return _main(i.shape) + sum(_main(shapes.get(name, ())) for name in i.operands)
