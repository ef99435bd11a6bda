"""A corpus cut into training rows, as fairseq cuts it for data2vec's text models.

Every line (a sentence) is terminated with `</s>`; an empty line separates documents; every row
starts with `<s>` (spec 1.3, whose [C] facts these are). Rows have their own
lengths here: padding to a batch's shape is `pad_row`, positions and masks are the model's.

Letters: N blocks, S tokens of a row, B rows of a batch.
"""

import dataclasses
import logging
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from data2vec_jax.core.errors import UserError, nearest
from data2vec_jax.modalities.text.tokenizer import Tokenizer

MODES = ("complete_doc", "none")


@dataclasses.dataclass(frozen=True, eq=False)
class Blocks:
    """Training rows in one flat array; a random-access source that can be pickled.

    Attributes:
        tokens: the corpus tokens of all blocks, one after the other, uint16 where the ids allow it,
            otherwise int32.
        offsets: where each block starts and the last one ends, int64 [N + 1].
        bos: the id put before each block.
        overlong: lines left out because they alone exceed a block.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    bos: int
    overlong: int = 0

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        """Row `index`: `<s>` and its tokens, int32 [S]."""
        index = range(len(self))[index]  # counts from the end below 0, and refuses what is outside
        start, end = self.offsets[index], self.offsets[index + 1]
        row = np.empty(end - start + 1, np.int32)  # [S]
        row[0] = self.bos
        row[1:] = self.tokens[start:end]
        return row

    def lengths(self) -> np.ndarray:
        """The length S of every row, `<s>` included, int32 [N]."""
        return (np.diff(self.offsets) + 1).astype(np.int32)


def token_blocks(
    documents: Iterable[Sequence[Sequence[int]]],
    *,
    length: int = 512,
    mode: str = "complete_doc",
    bos: int = Tokenizer.bos,
    eos: int = Tokenizer.eos,
) -> Blocks:
    """Cuts documents into blocks of at most `length` tokens, `<s>` included.

    `complete_doc` (1.0) appends whole lines to a block while it fits and closes it where the
    document ends; the separator is in no block, nor is a block of one token. A line that exceeds a
    block on its own is left out, counted in `overlong` and logged, as fairseq's length filter does.
    `none` (2.0) cuts the stream of all lines into equal pieces, whatever they cross; only the last
    may be shorter. The empty line between two documents is a line of that stream: one more `</s>`.

    Args:
        documents: one after the other, each a sequence of lines, each line the ids of a sentence
            without `</s>`. A line without ids separates documents, as the end of a document does.
        length: longest row.
        mode: `complete_doc` or `none`.
        bos: id of `<s>`.
        eos: id of `</s>`.

    Raises:
        UserError: an unknown mode, or no room for a token and its `</s>`.
    """
    if mode not in MODES:
        raise UserError(f"text block mode '{mode}': no such mode{nearest(mode, MODES)}")
    if length < 3:
        raise UserError(f"text block length {length}: at least 3 (<s>, a token and </s>)")
    room = length - 1
    cut = _complete_documents if mode == "complete_doc" else _stream
    tokens, offsets, overlong = cut(documents, room, eos)
    if overlong:
        logging.getLogger(__name__).warning(
            "text blocks: left out %d lines of more than %d tokens; %d blocks remain "
            "(mode 'none' cuts lines instead)",
            overlong,
            room - 1,
            len(offsets) - 1,
        )
    ids = np.array(tokens, np.int32)
    if not len(ids) or (ids.min() >= 0 and ids.max() <= np.iinfo(np.uint16).max):
        ids = ids.astype(np.uint16)
    return Blocks(ids, np.array(offsets, np.int64), bos, overlong)


def _complete_documents(
    documents: Iterable[Sequence[Sequence[int]]], room: int, eos: int
) -> tuple[array, array, int]:
    """Tokens, offsets and the number of over-long lines of mode `complete_doc`."""
    tokens, offsets, overlong = array("i"), array("q", [0]), 0

    def close() -> None:
        nonlocal overlong
        size = len(tokens) - offsets[-1]
        if 1 < size <= room:
            offsets.append(len(tokens))
        else:
            overlong += size > room
            del tokens[offsets[-1] :]

    for document in documents:
        for line in document:
            if not len(line):
                close()
                continue
            if len(tokens) - offsets[-1] + len(line) + 1 > room:
                close()
            tokens.extend(line)
            tokens.append(eos)
        close()
    return tokens, offsets, overlong


def _stream(
    documents: Iterable[Sequence[Sequence[int]]], room: int, eos: int
) -> tuple[array, array, int]:
    """Tokens, offsets and 0 over-long lines of mode `none`."""
    tokens = array("i")
    for document in documents:
        if tokens and len(document):
            tokens.append(eos)  # the empty line between two documents
        for line in document:
            tokens.extend(line)
            tokens.append(eos)
    return tokens, array("q", [*range(0, len(tokens), room), len(tokens)]), 0


def joined(parts: Sequence[Blocks], bos: int) -> Blocks:
    """The blocks of several corpora, one after the other; those of one as they are."""
    if len(parts) == 1:
        return parts[0]
    sizes = [np.zeros(1, np.int64), *(np.diff(part.offsets) for part in parts)]
    tokens = [np.zeros(0, np.uint16), *(part.tokens for part in parts)]
    overlong = sum(part.overlong for part in parts)
    return Blocks(np.concatenate(tokens), np.cumsum(np.concatenate(sizes)), bos, overlong)


def documents_of(
    items: Iterable[Mapping[str, Any]],
    tokenizer: Tokenizer,
    *,
    item_is_line: bool = False,
    batch: int = 4096,
) -> Iterator[list[list[int]]]:
    """The documents of `{'text': str}` items as `token_blocks` takes them: lines of ids.

    What looks like a special token in a corpus is text. About `batch` lines are tokenised at a
    time, on all cores; see `text_documents` for the rest.
    """
    waiting, lines = [], 0
    for document in text_documents(items, item_is_line=item_is_line):
        waiting.append(document)
        lines += len(document)
        if lines >= batch:
            yield from _encode(waiting, tokenizer)
            waiting, lines = [], 0
    yield from _encode(waiting, tokenizer)


def text_documents(
    items: Iterable[Mapping[str, Any]], *, item_is_line: bool = False
) -> Iterator[list[str]]:
    """The documents of `{'text': str}` items, each the list of its non-blank lines.

    A blank line ends a document, and so does the end of an item, unless `item_is_line`: then the
    items are the lines of one corpus, and only blank ones separate. Lines lose the blanks at both
    ends, as in fairseq's preparation of its corpus.
    """
    document = []
    for item in items:
        # A newline at the end ends a line; it does not start a blank one.
        for line in item["text"].removesuffix("\n").split("\n"):
            line = line.strip()
            if line:
                document.append(line)
            elif document:
                yield document
                document = []
        if document and not item_is_line:
            yield document
            document = []
    if document:
        yield document


def _encode(documents: list[list[str]], tokenizer: Tokenizer) -> Iterator[list[list[int]]]:
    texts = [line for document in documents for line in document]
    encoded = iter(tokenizer.encode_batch(texts, literal=True))
    for document in documents:
        yield [next(encoded) for _ in document]


def pad_row(ids: Sequence[int] | np.ndarray, length: int, pad: int = Tokenizer.pad) -> np.ndarray:
    """`ids` [S] padded on the right to int32 [length].

    Raises:
        ValueError: the row is longer than `length`.
    """
    if len(ids) > length:
        raise ValueError(f"a row of {len(ids)} tokens does not fit into {length}")
    row = np.full(length, pad, np.int32)
    row[: len(ids)] = ids
    return row


def valid_lengths(rows: np.ndarray, pad: int = Tokenizer.pad) -> np.ndarray:
    """The number of tokens before the padding, int32 [B], of padded rows [B, S]."""
    return (rows != pad).sum(axis=-1, dtype=np.int32)
