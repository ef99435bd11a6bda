"""Texts: UTF-8. Items hold text, a str."""

import io
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from data2vec_jax.core.errors import ExampleError, UserError
from data2vec_jax.data.codecs.base import Codec, Item, Measure, unreadable

MEASURES = (
    Measure("characters", "", 20, 1_000_000, "too short", "too long"),
    Measure("letters", "of the characters", 0.5, below="few letters"),
)


def codec(kinds: Mapping[str, Callable[..., Any]] | None = None) -> Codec:
    """The codec of texts, which a table may hold itself. In records: text (a str, or UTF-8).

    They are not measured: their length in tokens depends on a tokenizer.
    """
    return Codec(
        field="text",
        suffixes=(".txt",),
        read=read_text_file,
        read_record=read_record,
        in_tables=True,
        examine=examine,
        measures=MEASURES,
        kinds=kinds or {},
    )


def read_text_file(file: str | io.BytesIO, name: str) -> Item:
    """A UTF-8 file as it stands -> {'text'}. Raises ExampleError: it is empty, or no text."""
    text = checked(read_text(file, name), name)
    if not text or text.isspace():
        raise ExampleError(name, "empty", "text is empty")
    return {"text": text}


def read_record(value: Any, rest: Item, name: str) -> Item:
    """A record's text, a str or UTF-8 -> {'text'}."""
    if not isinstance(value, bytes | str):
        raise ExampleError(name, "format", f"text is {value!r:.40}, not a string")
    try:
        return {"text": checked(value.decode() if isinstance(value, bytes) else value, name)}
    except UnicodeDecodeError as error:
        raise unreadable(name, "text", error) from error


def checked(text: str, name: str) -> str:
    """`text`. Raises ExampleError: it is of something that holds no text."""
    if "\0" in text:
        raise ExampleError(name, "format", "text with NUL characters, so no text, or not UTF-8")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can spell half a character, which none can encode
        raise ExampleError(name, "format", f"text that is not Unicode ({error.reason})") from error
    return text


def read_text(file: str | io.BytesIO, name: str = "") -> str:
    """A UTF-8 file as it stands, blank lines and all; line ends become \\n."""
    try:
        if not isinstance(file, str):
            return io.TextIOWrapper(file, encoding="utf-8-sig").read()
        return Path(file).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise unreadable(name or str(file), "text", error) from error


def read_lines(path: Path, uri: str) -> list[str]:
    """Lines of a UTF-8 file, without their ends. Raises UserError: no such file."""
    if not path.is_file():
        raise UserError(f"{uri}: no file '{path}'")
    try:
        with open(path, encoding="utf-8-sig", newline="\n") as file:  # a cell may hold a lone \r
            return [line.rstrip("\r\n") for line in file]
    except (OSError, UnicodeDecodeError) as error:
        raise unreadable(str(path), "text", error) from error


def examine(item: Item) -> tuple[float, ...]:
    """The `MEASURES` of a text."""
    text, counts = item["text"], Counter(item["text"])
    letters = sum(n for c, n in counts.items() if unicodedata.category(c)[0] in "LM")
    return len(text), letters / max(len(text), 1)
