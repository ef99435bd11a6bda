"""One example of a corpus -> one record of a shard: a plain function of what is stored.

It has no state and needs no machine but this module, so any engine can map it over a corpus.
"""

from typing import Any

from data2vec_jax.core.errors import ExampleError, UserError
from data2vec_jax.data.codecs.base import Codec
from data2vec_jax.data.sources import encode_example
from data2vec_jax.data.sources.stored import FilePart, Stored


def prepare_example(stored: Stored, codec: Codec, conversion: Any = None) -> dict[str, Any]:
    """The record of an example, once it has been decoded whole; files keep their bytes.

    conversion: options of `codec.convert`; None keeps the signal as it is.
    Raises ExampleError: the example cannot be learned from, or not be stored.
    """
    where, signal = stored.where, stored.signal
    if isinstance(signal, ExampleError):
        raise signal
    try:
        record = {codec.field: signal}
        if isinstance(signal, FilePart):
            data = signal.read(where)
            data = data if conversion is None else codec.convert(conversion, data, where)
            record = {(codec.record_fields or (codec.field,))[0]: data}
        item = codec.decode_record(record, where)
        found = item[codec.field]
        if len(found) == 0 or (isinstance(found, str) and found.isspace()):
            raise ExampleError(where, "empty", f"{codec.field} is empty")
        record = {codec.field: found} if isinstance(found, str) else record
        # What the file says itself (its sample rate) holds, whatever a table says beside it.
        record = {n: v for n, v in stored.fields.items() if n not in {*item, *record}} | record
    except UserError as error:
        raise ExampleError.of(error, where) from error
    try:
        encode_example(record)
    except (TypeError, ValueError, OverflowError) as error:
        text = f"cannot be stored ({' '.join(str(error).split()):.200})"
        raise ExampleError(where, "format", text) from error
    return record
