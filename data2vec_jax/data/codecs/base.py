"""The record `Codec`: all that `data.sources` needs to know about a kind of signal."""

import io
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from data2vec_jax.core.errors import ExampleError, UserError, nearest

Item = dict[str, Any]


@dataclass(frozen=True)
class Measure:
    """A number that `Codec.examine` finds in an example, and the range beyond which an example is
    unfit: too long, silent, ..."""

    name: str
    unit: str
    least: float = -math.inf
    most: float = math.inf
    below: str = ""  # what an example below `least` is called
    above: str = ""


@dataclass(frozen=True)
class Codec:
    """How one kind of signal is found, decoded and measured in files and in records.

    Sources are pickled for the processes that read, so the functions must be importable: those of
    a module, or `functools.partial` of them.
    """

    # Name of the decoded signal in an item: 'audio', 'image', 'text', ... Messages use it too.
    field: str
    # Suffixes of its files, in lower case, with the dot.
    suffixes: tuple[str, ...]
    # (file, name) -> {field: array, ...}, the part of an item that a file holds. file: a path, or
    # the bytes of a file as BytesIO; name: what messages call it. Raises ExampleError: missing,
    # damaged.
    read: Callable[[str | io.BytesIO, str], Item]
    # Where records of ArrayRecord and TFDS keep the signal, in order of preference; by default in
    # the field of the same name.
    record_fields: tuple[str, ...] = ()
    # (value, rest, name) -> as `read`, from a record's field and its other fields, of which those
    # that describe the signal (a sample rate) may be popped. By default bytes are a file, and
    # anything else is an array, taken as it is.
    read_record: Callable[[Any, Item, str], Item] | None = None
    # (file, name) -> length of the signal in `units`, that of the array's first axis, without
    # decoding it. None: the lengths are not measured (images of one size, texts to be tokenised).
    measure: Callable[[str | io.BytesIO, str], int] | None = None
    # (file, name, start, count) -> as `read`, of that part of the signal alone, in `units`. None:
    # it is cut out of the whole.
    read_part: Callable[[str | io.BytesIO, str, int, int], Item] | None = None
    # (value, rest, name) -> length of a record's signal; by default `measure` of bytes, `len` of
    # arrays.
    measure_record: Callable[[Any, Mapping[str, Any], str], int] | None = None
    # What lengths count, and the column of a table that may hold them.
    units: str = "samples"
    # Whether a column `field` of a table may hold the signal itself (a text), in place of a `path`.
    in_tables: bool = False
    # For `prepare`: a frozen dataclass of the options of a conversion (resampling, ...), each with
    # its `help` in the field's metadata, and (options, bytes of a file, name) -> bytes of a file
    # that `read` takes.
    conversion: Callable[..., Any] | None = None
    convert: Callable[[Any, bytes, str], bytes] | None = None
    # For `prepare --check`: item -> its `measures`, in order.
    examine: Callable[[Item], tuple[float, ...]] | None = None
    measures: tuple[Measure, ...] = ()
    # Further kinds of addresses, `KIND:PLACE`, for the published data sets and the shipped samples
    # of a modality -> their openers, see `data.sources.Address`.
    kinds: Mapping[str, Callable[..., Any]] = field(default_factory=dict)

    def decode_record(self, record: Item, name: str, key: str | None = None) -> Item:
        """A record -> an item: the decoded signal and the record's other fields, bytes as text.

        key: the field that holds the signal, by default the first of `record_fields` that is there.
        Raises UserError: there is none, or it is damaged.
        """
        rest = dict(record)
        value = rest.pop(self._field_of(record, name, key))
        rest = {
            n: v.decode("utf-8", "replace") if isinstance(v, bytes) else v for n, v in rest.items()
        }
        if self.read_record is not None:
            decoded = self.read_record(value, rest, name)
        elif isinstance(value, bytes):
            decoded = self.read(io.BytesIO(value), name)
        else:
            decoded = {self.field: np.asarray(value)}
        return {**rest, **decoded}

    def length_of_record(self, record: Mapping[str, Any], name: str, key: str | None = None) -> int:
        """Length of a record's signal in `units`. Raises UserError as `decode_record`."""
        value = record[self._field_of(record, name, key)]
        if self.measure_record is not None:
            return self.measure_record(value, record, name)
        if isinstance(value, bytes):
            return self.measure(io.BytesIO(value), name)
        return len(value)

    def is_in(self, record: Mapping[str, Any]) -> bool:
        """Whether a record holds such a signal."""
        return any(name in record for name in self.record_fields or (self.field,))

    def _field_of(self, record, name, key):
        fields = (self.record_fields or (self.field,)) if key is None else (key,)
        found = next((f for f in fields if f in record), None)
        if found is None:
            wanted = " or ".join(f"'{f}'" for f in fields)
            raise UserError(f"{name}: no {wanted} (option key){nearest(fields[-1], record)}")
        return found


def unreadable(name: str, what: str, error: Exception) -> ExampleError:
    """The error, of one line, that names a file which its decoder refused."""
    reason = " ".join(str(getattr(error, "error_string", error)).split())
    return ExampleError(name, "unreadable", f"unreadable {what} ({reason or type(error).__name__})")
