"""PyTorch's files (.pt, .pth, .bin), read and written without PyTorch and without running code.

A pickle is a program. This reader knows how to make tensors and plain data; classes of
configuration libraries become `Stub`s, which hold what was stored and can do nothing; anything else
is refused by name. Both containers are read: the zip archive, whose arrays are mapped and not
loaded, and the older single file. Only the zip archive is written.

A small file may ask for much memory, so there are limits: of what is inflated, of the number of a
pickle's instructions, and of the objects that they make.
"""

import io
import math
import mmap
import os
import pickle
import pickletools
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data2vec_jax.convert.tables import Entry
from data2vec_jax.core.errors import UserError
from data2vec_jax.core.safetensors import dtype_of, mapped

MIB = 2**20
PICKLE_BYTES = 64 * MIB  # of a pickle; those of checkpoints have a few at most
INSTRUCTIONS = 2_000_000  # of a pickle
OBJECTS, LEVELS = 2_000_000, 200  # of what a pickle makes, shared ones as often as they are met
INFLATED = 4  # times a file's size (and 64 MiB): what its compressed arrays may inflate to

STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
}
STORAGE_OF = {dtype: name for name, dtype in STORAGES.items()}
# Top-level packages whose classes hold settings. Their objects become stubs.
SETTINGS = ("omegaconf", "argparse", "fairseq", "hydra", "enum", "pathlib", "examples", "timm")
PLAIN = {
    "builtins": (
        "dict",
        "list",
        "tuple",
        "set",
        "frozenset",
        "str",
        "int",
        "float",
        "bool",
        "bytes",
        "bytearray",
        "complex",
        "slice",
        "NoneType",
        "object",
    ),
    "collections": ("OrderedDict", "defaultdict"),
    "typing": ("Any", "Union", "Optional", "List", "Dict", "Tuple"),
}


class Stub:
    """An object of a class that was not loaded: its arguments and its state, and no behaviour."""

    def __init__(self, *args, **kwargs):
        self.args, self.kwargs, self.state = args, kwargs, None

    def __setstate__(self, state):
        self.state = state

    def __setitem__(self, key, value):  # of subclasses of dict
        self.items = {**getattr(self, "items", {}), key: value}

    def append(self, value):  # of subclasses of list
        self.values = [*getattr(self, "values", []), value]

    def extend(self, values):
        for value in values:
            self.append(value)


class _Storage(NamedTuple):
    dtype: np.dtype
    array: Any  # 1-D, or None while the rest of an older file is still to come
    key: str


class _Dtype:
    """numpy's pickled type. A pickle sets the state of what it makes; numpy's own types are shared
    by the whole process, so it gets one of these."""

    def __init__(self, name: Any, *_: Any):
        self.dtype = np.dtype(str(name))
        if self.dtype.hasobject:
            raise UserError("the file holds numpy arrays of Python objects, which is refused")

    def __setstate__(self, state):
        pass


def _scalar(kind: _Dtype, data: bytes = b"") -> Any:
    """numpy's pickled scalar."""
    return np.frombuffer(data, kind.dtype)[0] if data else None


def _of_content(kind: type) -> Callable[..., Any]:
    """bytes or bytearray of what is in the file; of a number they would be as large as it says."""

    def make(content=b"", *encoding):
        if isinstance(content, int):
            raise UserError(f"the file asks for {kind.__name__} of {content} bytes; refused")
        return kind(content, *encoding)

    return make


def _bytes(text: str, _: str = "") -> bytes:
    return text.encode("latin1")


class _Unpickler(pickle.Unpickler):
    """`storage`: (type, key, number of elements) -> _Storage."""

    def __init__(self, file, storage, path):
        super().__init__(file, encoding="utf-8")
        self._storage, self._path = storage, path

    def persistent_load(self, pid):
        if not (isinstance(pid, tuple) and len(pid) >= 5 and pid[0] == "storage"):
            raise UserError(f"{self._path}: an unknown kind of stored object")
        return self._storage(dtype_of(STORAGES[pid[1]]), str(pid[2]), int(pid[4]))

    def find_class(self, module, name):
        known = {
            ("torch._utils", "_rebuild_tensor_v2"): _tensor,
            ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
            ("torch", "Size"): tuple,
            ("torch", "device"): str,
            ("_codecs", "encode"): _bytes,
            ("numpy", "dtype"): _Dtype,
            ("numpy.core.multiarray", "scalar"): _scalar,
            ("numpy._core.multiarray", "scalar"): _scalar,
            ("copyreg", "_reconstructor"): _reconstruct,
            ("collections", "OrderedDict"): OrderedDict,
        }
        if (module, name) in known:
            return known[module, name]
        if module in ("torch", "torch.storage") and name in STORAGES:
            return name
        if module == "torch" and name in _TORCH_TYPES:
            return name
        module = {"__builtin__": "builtins", "copy_reg": "copyreg"}.get(module, module)
        if name in PLAIN.get(module, ()) or module.split(".")[0] in SETTINGS:
            if (module, name) in _REAL:
                return _REAL[module, name]
            return type(name, (Stub,), {"__module__": f"{__name__}.{module}"})
        raise UserError(
            f"{self._path}: the file asks to run '{module}.{name}', which is not weights; refused"
        )


_TORCH_TYPES = (
    "float",
    "float32",
    "float64",
    "float16",
    "half",
    "bfloat16",
    "int",
    "int64",
    "int32",
    "long",
    "bool",
    "uint8",
)
_REAL = {
    ("builtins", kind.__name__): kind
    for kind in (
        dict,
        list,
        tuple,
        set,
        frozenset,
        str,
        int,
        float,
        bool,
        complex,
    )
} | {("builtins", kind.__name__): _of_content(kind) for kind in (bytes, bytearray)}


def _reconstruct(kind: Any, base: Any, state: Any) -> Any:
    """Stands in for `copyreg._reconstructor`, by which old pickles make objects."""
    return kind() if isinstance(kind, type) and issubclass(kind, Stub) else Stub(state)


def _tensor(storage: _Storage, offset: int, size: Any, stride: Any, *_: Any) -> Any:
    """A view of a storage, as an array; of an older file, how to make it later."""
    if storage.array is None:
        return _Later(storage.key, offset, tuple(size), tuple(stride))
    return _view(storage.array, offset, tuple(size), tuple(stride))


class _Later(NamedTuple):
    key: str
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


def _view(array: np.ndarray, offset: int, size: tuple, stride: tuple) -> np.ndarray:
    last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
    inside = 0 <= offset <= last < len(array) and math.prod(size) <= len(array)
    if min((*size, *stride), default=0) < 0 or (0 not in size and not inside):
        raise UserError("a tensor lies outside its storage")
    steps = [s * array.itemsize for s in stride]
    return np.lib.stride_tricks.as_strided(array[offset:], size, steps, writeable=False)


def read(path: str | os.PathLike) -> Any:
    """The object in a PyTorch file; tensors are numpy arrays, unknown objects are `Stub`s.

    Raises UserError: not a PyTorch file, cut short, or it asks to run code.
    """
    path = Path(path)
    try:
        if zipfile.is_zipfile(path):
            return _read_zip(path)
        return _read_single(path)
    except UserError as error:
        raise UserError(str(error) if str(path) in str(error) else f"{path}: {error}") from None
    except (EOFError, pickle.UnpicklingError, zipfile.BadZipFile, struct.error, OSError) as error:
        raise UserError(f"{path}: cut short or not a PyTorch file ({error})") from None
    except Exception as error:  # a pickle can raise anything
        raise UserError(f"{path}: not a PyTorch file of weights ({error!r:.200})") from None


def _load(file: Any, storage: Callable[..., _Storage], path: Path) -> Any:
    """The object of the pickle that begins at the place of `file`, which stands after it then."""
    start = file.tell()
    for count, (instruction, argument, _) in enumerate(pickletools.genops(file)):
        # Python's reader makes a table as long as the largest index that it is told.
        index = argument if "PUT" in instruction.name else 0
        if max(count, index) > INSTRUCTIONS:
            raise UserError(f"{path}: a pickle of more than {INSTRUCTIONS:,} instructions; refused")
    file.seek(start)
    return _Unpickler(file, storage, path).load()


def _read_zip(path: Path) -> Any:
    with zipfile.ZipFile(path) as archive, open(path, "rb") as raw:
        members = {info.filename: info for info in archive.infolist()}
        pickles = [name for name in members if name.endswith("data.pkl")]
        if not pickles:
            raise UserError(f"{path}: a zip archive, but not PyTorch's")
        root = pickles[0].removesuffix("data.pkl")
        room = INFLATED * path.stat().st_size + PICKLE_BYTES  # of compressed arrays

        def inflated(info, size):
            with archive.open(info) as member:
                return member.read(size)

        def storage(dtype, key, count):
            info = members.get(f"{root}data/{key}")
            if info is None or info.file_size < count * dtype.itemsize:
                raise UserError(f"{path}: storage {key} is missing or cut short")
            if info.compress_type != zipfile.ZIP_STORED:
                nonlocal room
                room -= count * dtype.itemsize
                if count < 0 or room < 0:
                    raise UserError(f"{path}: its arrays inflate to more than weights do; refused")
                data = inflated(info, count * dtype.itemsize)
                return _Storage(dtype, np.frombuffer(data, dtype, count), key)
            raw.seek(info.header_offset + 26)  # lengths of name and extra field follow
            name, extra = struct.unpack("<HH", raw.read(4))
            offset = info.header_offset + 30 + name + extra
            return _Storage(dtype, mapped(path, dtype, (count,), offset), key)

        content = inflated(members[pickles[0]], PICKLE_BYTES + 1)
        if len(content) > PICKLE_BYTES:
            raise UserError(f"{path}: {pickles[0]} is more than {PICKLE_BYTES // MIB} MiB; refused")
        return _load(io.BytesIO(content), storage, path)


MAGIC = 0x1950A86A20F9469CFC6C  # of the older container


def _read_single(path: Path) -> Any:
    kinds: dict[str, tuple[np.dtype, int]] = {}

    def storage(dtype, key, count):
        kinds[key] = dtype, count
        return _Storage(dtype, None, key)

    with (
        open(path, "rb") as opened,
        mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as file,  # reads as far as it goes
    ):

        def load():
            return _load(file, storage, path)

        if load() != MAGIC:
            raise UserError(f"{path}: not a PyTorch file")
        load(), load()  # protocol, sizes of types
        content, keys, arrays = load(), load(), {}
        for key in map(str, keys):
            (count,) = struct.unpack("<q", file.read(8))
            dtype, expected = kinds[key]
            if count != expected or count < 0 or file.tell() + count * dtype.itemsize > len(file):
                raise UserError(f"{path}: cut short")
            arrays[key] = mapped(path, dtype, (count,), file.tell())
            file.seek(count * dtype.itemsize, os.SEEK_CUR)

    def resolve(value):
        if isinstance(value, _Later):
            return _view(arrays[value.key], value.offset, value.size, value.stride)
        if isinstance(value, dict):
            return {k: resolve(v) for k, v in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(map(resolve, value))
        return value

    _check_objects(content, _in_containers)
    return resolve(content)


def plain(value: Any) -> Any:
    """Settings as dicts, lists and scalars, whatever library they were stored with.

    Objects that stand for nothing of that kind become None.
    """
    _check_objects(value, _in_settings)
    return _plain(value)


def _plain(value: Any) -> Any:
    if isinstance(value, Stub):
        return _plain(_stands_for(value))
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(v) for v in value]
    if isinstance(value, np.generic):
        return value.item()
    return value if isinstance(value, (str, int, float, bool)) else None


def _stands_for(stub: Stub) -> Any:
    """What an object of a library of settings holds."""
    state = stub.state[0] if isinstance(stub.state, tuple) and stub.state else stub.state
    if isinstance(state, Mapping):
        for key in ("_content", "_val"):  # omegaconf's containers, and its leaves
            if key in state:
                return state[key]
        return {str(k): v for k, v in state.items() if not str(k).startswith("_")}
    if hasattr(stub, "items"):
        return stub.items
    if len(stub.args) == 1:  # enumerations and paths
        return stub.args[0]
    return None


def _in_mappings(value: Any) -> Collection[Any]:
    return value.values() if isinstance(value, Mapping) else ()


def _in_containers(value: Any) -> Collection[Any]:
    return value if isinstance(value, list | tuple | set | frozenset) else _in_mappings(value)


def _in_settings(value: Any) -> Collection[Any]:
    return (_stands_for(value),) if isinstance(value, Stub) else _in_containers(value)


def _check_objects(made: Any, inside: Callable[[Any], Collection[Any]]) -> None:
    """Raises UserError: what a pickle made is too large or too deep to be looked through, or goes
    in a circle. inside: the values in a value."""
    waiting, count = [(made, 0)], 0
    while waiting:
        value, level = waiting.pop()
        found = inside(value)
        count += 1 + len(found)
        if count > OBJECTS or level > LEVELS:
            raise UserError("the file holds more objects in each other than weights have; refused")
        waiting += [(each, level + 1) for each in found]


# Writing ------------------------------------------------------------------------------------------


class _Writer:
    """Emits the pickle of nested dicts, lists, plain scalars and entries."""

    def __init__(self):
        self.out, self.storages = io.BytesIO(), []

    def emit(self, value: Any) -> None:
        out = self.out.write
        if value is None:
            out(b"N")
        elif isinstance(value, bool):
            out(b"\x88" if value else b"\x89")
        elif isinstance(value, int):
            data = value.to_bytes((value.bit_length() // 8) + 1, "little", signed=True)
            out(b"\x8a" + bytes([len(data)]) + data)
        elif isinstance(value, float):
            out(b"G" + struct.pack(">d", value))
        elif isinstance(value, str):
            data = value.encode("utf-8", "surrogatepass")
            out(b"X" + struct.pack("<I", len(data)) + data)
        elif isinstance(value, Entry):
            self._tensor(value)
        elif isinstance(value, Mapping):
            out(b"}(")
            for key, item in value.items():
                self.emit(key)
                self.emit(item)
            out(b"u")
        elif isinstance(value, list):
            out(b"](")
            for item in value:
                self.emit(item)
            out(b"e")
        elif isinstance(value, tuple):
            out(b"(")
            for item in value:
                self.emit(item)
            out(b"t")
        else:
            raise TypeError(f"cannot store a {type(value).__name__}")

    def _tensor(self, entry: Entry) -> None:
        out = self.out.write
        strides = np.cumprod([1, *entry.shape[:0:-1]])[::-1] if entry.shape else ()
        out(b"ctorch._utils\n_rebuild_tensor_v2\n((")
        self.emit("storage")
        out(b"ctorch\n" + STORAGE_OF[entry.dtype.name].encode() + b"\n")
        self.emit(str(len(self.storages)))
        self.emit("cpu")
        self.emit(int(np.prod(entry.shape, dtype=np.int64)))
        out(b"tQ")  # a persistent id
        self.emit(0)
        self.emit(tuple(map(int, entry.shape)))
        self.emit(tuple(map(int, strides)))
        self.emit(False)
        out(b"ccollections\nOrderedDict\n)RtR")
        self.storages.append(entry)


def write(path: str | os.PathLike, content: Mapping[str, Any]) -> None:
    """Writes a file that `torch.load(path, weights_only=True)` reads.

    content: nested dicts, lists and tuples of scalars, strings, None and `Entry`s (tensors).
    """
    writer = _Writer()
    writer.out.write(b"\x80\x02")
    writer.emit(content)
    writer.out.write(b".")
    data = writer.out.getvalue()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        archive.writestr("archive/data.pkl", data)
        archive.writestr("archive/byteorder", "little")
        for number, entry in enumerate(writer.storages):
            with archive.open(f"archive/data/{number}", "w", force_zip64=True) as file:
                array = np.ascontiguousarray(entry.make()).reshape(-1)
                file.write(memoryview(array.view(np.uint8)))
        archive.writestr("archive/version", "3\n")


def tensors(tree: Mapping[str, Any], prefix: str = "") -> dict[str, np.ndarray]:
    """The arrays of a nested dict of them, by dotted name; other values are left out."""
    _check_objects(tree, _in_mappings)
    found: dict[str, np.ndarray] = {}

    def collect(node, start):
        for key, value in node.items():
            if isinstance(value, np.ndarray):
                found[f"{start}{key}"] = value
            elif isinstance(value, Mapping):
                collect(value, f"{start}{key}.")

    collect(tree, prefix)
    return found
