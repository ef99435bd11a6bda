"""Safetensors files, read lazily and written as a stream.

Such a file is 8 bytes (little-endian length of the header), the header (JSON: name -> type, shape,
place), then the arrays. Both directions hold one tensor in memory at a time.
"""

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from data2vec_jax.core.errors import UserError

TYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
}
HEADER_BYTES = 8 * 2**20  # at most; 80,000 tensors
NAMES = {dtype: name for name, dtype in TYPES.items()}


def dtype_of(name: str) -> np.dtype:
    """numpy's type of that name; bfloat16 is not numpy's own."""
    if name == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)


def mapped(path: Path, dtype: np.dtype, shape: tuple[int, ...], offset: int) -> np.ndarray:
    """An array in a file, whose pages are read when they are used and freed with it."""
    if 0 in shape:
        return np.zeros(shape, dtype)
    return np.memmap(path, dtype, "r", offset, shape or (1,)).reshape(shape)


class SafeTensors(Mapping[str, np.ndarray]):
    """The tensors of a safetensors file, each mapped anew when it is asked for.

    Raises UserError if the file is not one, or is cut short.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        size = self.path.stat().st_size
        try:
            with open(self.path, "rb") as file:
                length = int.from_bytes(file.read(8), "little")
                if not 2 <= length <= size - 8:
                    raise UserError(f"{self.path}: not a whole safetensors file")
                if length > HEADER_BYTES:
                    raise UserError(f"{self.path}: a header of {length:,} bytes; refused")
                header = json.loads(file.read(length))
            self.metadata = header.pop("__metadata__", {})
            self._start = 8 + length
            self._places = {
                name: (dtype_of(TYPES[x["dtype"]]), tuple(x["shape"]), *map(int, x["data_offsets"]))
                for name, x in header.items()
            }
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError):
            raise UserError(f"{self.path}: not a safetensors file") from None
        for name, (dtype, shape, start, end) in self._places.items():
            whole = all(isinstance(n, int) and n >= 0 for n in shape)
            if not whole or end - start != dtype.itemsize * math.prod(shape) or start < 0:
                raise UserError(f"{self.path}: the place of '{name}' does not fit its shape")
            if self._start + end > size:
                raise UserError(
                    f"{self.path}: cut short; '{name}' ends at byte {self._start + end} of {size}"
                )

    def __getitem__(self, name: str) -> np.ndarray:
        dtype, shape, start, _ = self._places[name]
        return mapped(self.path, dtype, shape, self._start + start)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def write_safetensors(
    path: str | os.PathLike, entries: Iterable[Any], metadata: Mapping[str, str]
) -> None:
    """Writes entries one after the other: objects with name, shape, dtype and make() -> array.
    metadata: strings by name."""
    entries, places, offset = list(entries), {}, 0
    for entry in entries:
        size = entry.dtype.itemsize * int(np.prod(entry.shape, dtype=np.int64))
        places[entry.name] = {
            "dtype": NAMES[entry.dtype.name],
            "shape": list(entry.shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    header = json.dumps({"__metadata__": dict(metadata), **places}).encode()
    header += b" " * (-len(header) % 8)  # arrays start at a multiple of 8
    with open(path, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for entry in entries:
            array = entry.make()
            assert array.shape == entry.shape and array.dtype == entry.dtype, entry.name
            file.write(memoryview(np.ascontiguousarray(array).reshape(-1).view(np.uint8)))
