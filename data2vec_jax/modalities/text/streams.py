"""Files of many documents, which need not fit into memory: *.txt, *.gz, *.bz2.

| address           | a document is                                                               |
| ----------------- | --------------------------------------------------------------------------- |
| `lines:FILE`      | a line                                                                      |
| `paragraphs:FILE` | the lines between two empty ones                                            |
| `wikipedia:FILE`  | an article of a dump, `*-pages-articles.xml.bz2`; it has title and id, too  |

FILE may hold `{split}`. To train on it without holding it in memory, `prepare` it first.
"""

import bz2
import gzip
import html
import re
import zlib
from collections.abc import Callable, Iterator
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO
from xml.etree import ElementTree

from data2vec_jax.core.errors import ExampleError, UserError
from data2vec_jax.data.codecs.base import Item, unreadable
from data2vec_jax.data.sources import Address, Source, published
from data2vec_jax.data.sources.stored import Stored

Reader = Callable[[BinaryIO, str], Iterator[Stored]]


class TextStream(Source):
    """The documents that `read` finds in a file, in order."""

    def __init__(self, address: Address, read: Reader):
        super().__init__(address.uri, address.split, address.codec)
        self._place, self._reader = address.place.replace("{split}", address.split), read
        self.rows = self._place  # of whatever split
        if not Path(self._place).is_file():
            raise UserError(f"{address.uri}: no file '{self._place}'")

    def stored(self) -> Iterator[Stored]:
        openers = {".gz": gzip.open, ".bz2": bz2.open}
        try:
            with openers.get(Path(self._place).suffix, open)(self._place, "rb") as file:
                yield from self._reader(file, self._place)
        except (OSError, EOFError, zlib.error, ElementTree.ParseError) as error:
            raise unreadable(self._place, "text", error) from error

    @cached_property
    def _rows(self) -> list[Stored]:
        return list(self.stored())

    def __len__(self) -> int:
        return len(self._rows)

    def _load(self, i: int) -> Item:
        row = self._rows[i]
        if isinstance(row.signal, ExampleError):
            raise row.signal
        return {**row.fields, **self.codec.read_record(row.signal, {}, row.where)}

    def location(self, index: int) -> str:
        return self._rows[index].where


def read_lines(file: BinaryIO, place: str, blank: bool = False) -> Iterator[Stored]:
    """A document a line, without blanks at its ends; a lone \\r or U+2028 ends none.

    blank: gives those without text, too.
    """
    for number, raw in enumerate(file, 1):
        where = f"{place}:{number}"
        try:
            text = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
        except UnicodeDecodeError as error:
            text = unreadable(where, "text", error)
        if text or blank:
            yield Stored(where, {}, text)


def read_paragraphs(file: BinaryIO, place: str) -> Iterator[Stored]:
    """Documents between empty lines; one with a line that is no text is bad as a whole."""
    lines: list[Stored] = []
    for line in chain(read_lines(file, place, blank=True), [Stored("", {}, "")]):
        if line.signal:
            lines.append(line)
        elif lines:
            texts = [each.signal for each in lines]
            bad = next((text for text in texts if isinstance(text, ExampleError)), None)
            yield Stored(lines[0].where, {}, bad or "\n".join(texts))
            lines = []


def read_wikipedia(file: BinaryIO, place: str) -> Iterator[Stored]:
    """Articles (namespace 0, no redirects) as plain text, a paragraph a line."""
    root = None
    for event, element in ElementTree.iterparse(file, ("start", "end")):
        root = element if root is None else root
        if event == "start" or (not element.tag.endswith("}page") and element.tag != "page"):
            continue
        found = {child.tag.rpartition("}")[2]: child for child in element}
        text = next((e.text for e in element.iter() if e.tag.endswith("text")), None)
        if found["ns"].text == "0" and "redirect" not in found and text:
            fields: dict[str, Any] = {"title": found["title"].text, "id": found["id"].text}
            yield Stored(f"{place}:{fields['title']}", fields, plain_text(text))
        root.clear()  # else the whole dump stays in memory


def plain_text(markup: str) -> str:
    """Wikipedia's markup -> its text, a paragraph, heading or item of a list a line.

    Templates, tables, references, files and categories are dropped; of a link its words stay.
    """
    text = re.sub(
        r"<!--.*?-->|<(ref|math|gallery|nowiki)\b[^>]*?(/>|>.*?</\1>)",
        "",
        markup,
        flags=re.S | re.I,
    )
    for pattern in (r"\{\{[^{}]*\}\}", r"\{\|(?:(?!\{\|).)*?\|\}"):  # from the innermost outwards
        count = 1
        while count:
            text, count = re.subn(pattern, "", text, flags=re.S)
    count = 1
    while count:  # a file's caption may hold links
        text, count = re.subn(r"\[\[([^\[\]]*)\]\]", _words_of_link, text)
    text = re.sub(r"\[\w+:[^\s\]]+ ?([^\]]*)\]", r"\1", text)
    text = html.unescape(re.sub(r"<[^>]+>|'{2,}|__[A-Z]+__", "", text))
    lines = (line.strip("=*#:; \t\xa0") for line in text.split("\n"))
    return "\n".join(filter(None, lines))


def _words_of_link(match: re.Match) -> str:
    target, _, words = match[1].partition("|")
    if ":" in target.lstrip(":")[:24] and not target.startswith(":"):
        return ""  # a file, a category, another language
    return (words or target).lstrip(":")


@published
def open_lines(address: Address) -> TextStream:
    """`lines:FILE`."""
    return TextStream(address, read_lines)


@published
def open_paragraphs(address: Address) -> TextStream:
    """`paragraphs:FILE`."""
    return TextStream(address, read_paragraphs)


@published
def open_wikipedia(address: Address) -> TextStream:
    """`wikipedia:FILE`."""
    return TextStream(address, read_wikipedia)
