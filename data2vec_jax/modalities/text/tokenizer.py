"""Text to token ids and back, in the row order of fairseq's dictionary.

Row 0 is `<s>`, 1 `<pad>`, 2 `</s>`, 3 `<unk>`; the vocabulary follows and `<mask>` is the last row
(spec 1.3). Two kinds share that layout: sentencepiece, trained on the user's own
corpus, and the byte-level BPE of GPT-2 and RoBERTa, read from the user's files. Neither adds
`<s>` or `</s>`: that belongs to whoever builds a row.

Letters: N tokens of one text.
"""

import abc
import contextlib
import functools
import io
import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from data2vec_jax.core.errors import UserError, nearest

SPECIALS = ("<s>", "<pad>", "</s>", "<unk>")
MASK = "<mask>"
# As Hugging Face's mask token does, it swallows the blanks before it but not those after.
_MASK_IN_TEXT = re.compile(r"\s*" + MASK)

_MODEL = "sentencepiece.model"
# (token -> id, merges) as named by Hugging Face, then as named by fairseq and GPT-2.
_PAIRS = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))
_DICT = "dict.txt"
_NEEDED = (
    f"needs a sentencepiece *.model, or vocab.json + merges.txt, or encoder.json + vocab.bpe "
    f"[+ {_DICT}], or tokenizer.json, or BERT's vocab.txt"
)


class Tokenizer(abc.ABC):
    """Text to ids and back; made by `load` or `train_sentencepiece`, picklable.

    Attributes: `vocab_size`, the rows of the embedding table, `<mask>` included; `mask`, the row of
    `<mask>`; `special`, the number of leading rows that a random replacement token must avoid.
    """

    bos, pad, eos, unk = range(len(SPECIALS))

    def __init__(self, vocab_size: int, mask: int):
        self.vocab_size = vocab_size
        self.mask = mask
        self.special = len(SPECIALS) + (mask == len(SPECIALS))

    def __getstate__(self) -> dict[str, Any]:
        # The library's object is cheap to remake and not everywhere safe to carry to a worker.
        return {name: value for name, value in vars(self).items() if name != "_engine"}

    def encode(self, text: str, *, literal: bool = False) -> list[int]:
        """The ids [N] of `text`, without `<s>` and `</s>`.

        The word `<mask>` in a text becomes the mask's id and takes the blanks before it with it;
        with `literal` it is six characters like any others, as a corpus needs. The names of the
        other special tokens are always plain text.
        """
        return self.encode_batch([text], literal=literal)[0]

    def encode_batch(self, texts: Iterable[str], *, literal: bool = False) -> list[list[int]]:
        """`encode` of many texts at once, on all cores."""
        texts = list(texts)
        if literal or not any(MASK in text for text in texts):
            return self._encode(texts)
        parts = [_MASK_IN_TEXT.split(text) for text in texts]
        encoded = iter(self._encode(list(itertools.chain.from_iterable(parts))))
        rows = []
        for split in parts:
            row = next(encoded)
            for _ in split[1:]:
                row += [self.mask, *next(encoded)]
            rows.append(row)
        return rows

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """`encode(text)` [N], and for each token its [start, end) in `text`, in code points.

        Leading blanks are outside a token's span, as in RoBERTa's tokenizer; tokens that share one
        code point (its bytes) share its span.

        Raises:
            UserError: for a sentencepiece model that rewrites its text before it splits it.
        """
        ids, spans, start = [], [], 0
        for found in [*_MASK_IN_TEXT.finditer(text), None]:
            end = found.start() if found else len(text)
            part_ids, part_spans = self._spans(text[start:end])
            ids += part_ids
            for first, last in part_spans:
                first += start
                word = text[first : last + start]
                spans.append((first + len(word) - len(word.lstrip(" ")), last + start))
            if found:
                ids.append(self.mask)
                spans.append((found.end() - len(MASK), found.end()))
                start = found.end()
        return ids, spans

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids` [N]; special tokens show as their names. Undoes `encode`.

        Bytes that are no UTF-8 show as U+FFFD; sentencepiece cannot tell U+2581 from a blank.

        Raises:
            ValueError: for an id outside the table.
        """
        ids = [int(i) for i in ids]
        wrong = [i for i in ids if not 0 <= i < self.vocab_size]
        if wrong:
            raise ValueError(f"token id {wrong[0]} is outside 0..{self.vocab_size - 1}")
        return self._decode(ids)

    def save(self, folder: str | Path) -> None:
        """Writes what `load(folder)` reads.

        Raises:
            UserError: the folder already holds a tokenizer of another kind, which `load` might
                take for this one.
        """
        folder, files = Path(folder), self._files()
        folder.mkdir(parents=True, exist_ok=True)
        ours = {_MODEL, _DICT, *itertools.chain.from_iterable(_PAIRS)}
        others = sorted(name for name in ours - set(files) if (folder / name).exists())
        if others:
            raise UserError(f"{folder}: holds another tokenizer ({', '.join(others)})")
        for name, data in files.items():
            (folder / name).write_bytes(data)

    @abc.abstractmethod
    def _encode(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text, without special tokens."""

    @abc.abstractmethod
    def _spans(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids of a text, and the code points that each covers."""

    @abc.abstractmethod
    def _decode(self, ids: list[int]) -> str:
        """The text of ids that are all in the table."""

    @abc.abstractmethod
    def _files(self) -> dict[str, bytes]:
        """Names and contents of the files that `save` writes."""


class SentencePiece(Tokenizer):
    """A sentencepiece model; its pieces that stand for text follow the four special rows, in order.

    Args:
        model: the serialised model, ours or anyone's.

    Raises:
        UserError: it is not a sentencepiece model.
    """

    def __init__(self, model: bytes):
        self.model = model
        if not model:
            raise UserError("the sentencepiece model is empty")
        try:
            engine = self._engine
        except RuntimeError as error:
            raise UserError("not a sentencepiece model, or a damaged one") from error
        size = engine.get_piece_size()
        # A stranger's model may keep its own specials anywhere; only pieces of text get a row.
        self._pieces = [
            piece
            for piece in range(size)
            if not (engine.is_control(piece) or engine.is_unknown(piece) or engine.is_unused(piece))
        ]
        first = len(SPECIALS)
        super().__init__(first + len(self._pieces) + 1, first + len(self._pieces))
        self._rows = None
        if self._pieces != list(range(first, size)):
            self._rows = [self.unk] * size
            for row, piece in enumerate(self._pieces, start=first):
                self._rows[piece] = row

    @functools.cached_property
    def _engine(self):
        from sentencepiece import SentencePieceProcessor

        return SentencePieceProcessor(model_proto=self.model)

    def pieces(self) -> list[tuple[str, float]]:
        """(text, score) of each row; sentencepiece prefers high scores. Special rows have 0."""
        special = [(name, 0.0) for name in SPECIALS]
        found = [(self._engine.id_to_piece(i), self._engine.get_score(i)) for i in self._pieces]
        return [*special, *found, (MASK, 0.0)]

    def _encode(self, texts: list[str]) -> list[list[int]]:
        encoded = self._engine.encode(texts, out_type=int)
        if self._rows is None:
            return encoded
        return [[self._rows[piece] for piece in pieces] for pieces in encoded]

    def _spans(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        # Rebuilt from the lengths of the pieces: the library's own offsets change with its version.
        ids = self._encode([text])[0]
        pieces = self._engine.encode(text, out_type=int)
        words = self._engine.encode(text, out_type=str)
        sizes = [
            1 if self._engine.is_byte(piece) else len(word.replace("▁", " ").encode())
            for piece, word in zip(pieces, words, strict=True)
        ]
        owner = [i for i, character in enumerate(text) for _ in character.encode()]  # byte -> char
        at = len(owner) - sum(sizes)  # -1: the blank that most models put before the text
        if at not in (-1, 0):
            raise UserError("this sentencepiece model rewrites its text; tokens have no positions")
        owner.append(len(text))
        spans = []
        for size in sizes:
            start, end = max(at, 0), max(at + size, 0)
            spans.append((owner[start], owner[end - 1] + 1 if end > start else owner[start]))
            at += size
        return ids, spans

    def _decode(self, ids: list[int]) -> str:
        names = {**dict(enumerate(SPECIALS)), self.mask: MASK}
        texts = []
        # Each run between special tokens was encoded, and so is decoded, as a text of its own.
        for special, run in itertools.groupby(ids, key=names.__contains__):
            if special:
                texts += [names[i] for i in run]
            else:
                texts.append(self._engine.decode([self._pieces[i - len(SPECIALS)] for i in run]))
        return "".join(texts)

    def _files(self) -> dict[str, bytes]:
        return {_MODEL: self.model}


class ByteLevelBPE(Tokenizer):
    """GPT-2's byte-level BPE over a table in fairseq's order.

    Args:
        rows: token (in GPT-2's printable alphabet of bytes, or a special's name) -> row; holds the
            four specials, and `<mask>`, unless it is to be appended.
        merges: pairs of tokens, the first merged first.
        absent: tokens that merges may form but that have no row; they become `<unk>`, as a GPT-2
            token does that is missing in fairseq's dictionary.

    Raises:
        UserError: merges and tokens do not belong together.
    """

    def __init__(
        self,
        rows: Mapping[str, int],
        merges: Sequence[tuple[str, str]],
        absent: Sequence[str] = (),
    ):
        self._rows = dict(rows)
        self._rows.setdefault(MASK, max(self._rows.values()) + 1)
        super().__init__(max(self._rows.values()) + 1, self._rows[MASK])
        self._merges = list(merges)
        self._absent = list(absent)
        try:
            _ = self._engine
        except Exception as error:  # the library raises bare Exceptions
            reason = str(error).splitlines()[0]
            raise UserError(f"merges and vocabulary do not match: {reason}") from error

    @functools.cached_property
    def _engine(self):
        from tokenizers import Tokenizer as Engine
        from tokenizers import decoders, models, pre_tokenizers

        beyond = {token: self.vocab_size + i for i, token in enumerate(self._absent)}
        vocab = {**self._rows, **beyond}
        engine = Engine(models.BPE(vocab=vocab, merges=self._merges, unk_token=SPECIALS[self.unk]))
        engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        engine.decoder = decoders.ByteLevel()
        return engine

    def _known(self, ids: list[int]) -> list[int]:
        return [i if i < self.vocab_size else self.unk for i in ids] if self._absent else ids

    def _encode(self, texts: list[str]) -> list[list[int]]:
        return [self._known(e.ids) for e in self._engine.encode_batch_fast(texts)]

    def _spans(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        encoding = self._engine.encode(text)
        return self._known(encoding.ids), encoding.offsets

    def _decode(self, ids: list[int]) -> str:
        return self._engine.decode(ids, skip_special_tokens=False)

    def _files(self) -> dict[str, bytes]:
        """RoBERTa's files; where tokens lack a row, which those cannot say, fairseq's."""
        merges = "".join(f"{a} {b}\n" for a, b in [("#version:", "0.2"), *self._merges])
        if not self._absent:
            return {"vocab.json": _dump(self._rows), "merges.txt": merges.encode()}
        named = {*SPECIALS, MASK}
        order = sorted(self._rows, key=self._rows.get)
        units = [token for token in order if token not in named] + self._absent
        encoder = {token: i for i, token in enumerate(units)}
        lines = [str(encoder.get(token, token)) for token in order if token not in SPECIALS]
        if lines[-1] == MASK:
            lines.pop()  # reading it appends it again
        return {
            "encoder.json": _dump(encoder),
            "vocab.bpe": merges.encode(),
            _DICT: "".join(f"{line} 1\n" for line in lines).encode(),
        }


def train_sentencepiece(
    texts: Iterable[str],
    vocab_size: int,
    model_type: str = "bpe",
    *,
    byte_fallback: bool = True,
) -> SentencePiece:
    """A tokenizer learnt from `texts`: the same texts give the same bytes.

    Nothing is normalised, so decoding gives back the very text.

    Args:
        texts: the corpus, all of it held in memory while training; lines are learnt one by one.
        vocab_size: rows of the embedding table, the four specials and `<mask>` included.
        model_type: `bpe`, fast, or `unigram`, which gives likelier splits.
        byte_fallback: spend 256 rows on bytes, in which rare and unseen characters are spelt. For
            tables of a few hundred rows: without, every character of the corpus's lines has a
            row, and all others, the newline too, are `<unk>`.

    Raises:
        UserError: an unknown kind, an empty corpus, or a `vocab_size` too large for the corpus or
            too small for its characters; the message says the nearest that would do.
    """
    from sentencepiece import SentencePieceTrainer

    if model_type not in ("bpe", "unigram"):
        raise UserError(
            f"tokenizer model_type '{model_type}': no such kind"
            + nearest(model_type, ["bpe", "unigram"])
        )
    seen = 0
    failure = None

    def lines() -> Iterator[str]:
        nonlocal seen, failure
        try:
            for text in texts:
                for line in text.split("\n"):
                    if line.strip():
                        seen += 1
                        yield line
        except BaseException as error:  # Ctrl-C, too
            failure = error  # sentencepiece would only hand on its text
            raise

    model = io.BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=lines(),
            model_writer=model,
            model_type=model_type,
            vocab_size=max(vocab_size, 6) - 1,  # `<mask>` is a row of ours, not a piece of text
            bos_id=Tokenizer.bos,
            pad_id=Tokenizer.pad,
            eos_id=Tokenizer.eos,
            unk_id=Tokenizer.unk,
            pad_piece=SPECIALS[Tokenizer.pad],
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            byte_fallback=byte_fallback,
            character_coverage=0.9995 if byte_fallback else 1.0,
            max_sentence_length=2**30,  # the default drops lines beyond 4,192 bytes
            num_threads=4,  # part of the sums' order: not the machine's number of cores
            minloglevel=2,
        )
    except Exception as error:
        if failure is not None:
            raise failure from None
        raise UserError(_training_problem(str(error), seen, vocab_size)) from error
    return SentencePiece(model.getvalue())


def train_bpe(texts: Iterable[str], vocab_size: int) -> ByteLevelBPE:
    """GPT-2's byte-level BPE in RoBERTa's rows, learnt from `texts`: the same give the same table.

    Args:
        texts: the corpus, of which the distinct words are held in memory.
        vocab_size: as of `train_sentencepiece`; at least the bytes and special tokens, 261.

    Raises:
        UserError: `vocab_size` is too large for the corpus or too small for the bytes; the message
            says the nearest that would do.
    """
    from tokenizers import Tokenizer as Engine
    from tokenizers import models, pre_tokenizers, trainers

    engine = Engine(models.BPE())
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=max(vocab_size - 1, 0),  # `<mask>` is appended
        special_tokens=list(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    engine.train_from_iterator((line for text in texts for line in text.split("\n")), trainer)
    learnt = json.loads(engine.to_str())["model"]
    made = ByteLevelBPE(learnt["vocab"], [tuple(pair) for pair in learnt["merges"]])
    if made.vocab_size != vocab_size:
        problem = "too large for this corpus; the largest"
        if vocab_size < made.vocab_size:
            problem = "too small for all bytes; the smallest"
        raise UserError(f"tokenizer vocab_size {vocab_size}: {problem} is {made.vocab_size}")
    return made


def _training_problem(message: str, seen: int, vocab_size: int) -> str:
    """One line for what sentencepiece's trainer says of a corpus of `seen` lines."""
    if not seen:
        return "tokenizer: the corpus has no text to learn from"
    if high := re.search(r"too high.*<= (\d+)", message):
        return (
            f"tokenizer vocab_size {vocab_size}: too large for this corpus of {seen} lines; "
            f"the largest possible is {int(high[1]) + 1}"
        )
    if low := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        return (
            f"tokenizer vocab_size {vocab_size}: too small for the characters of this corpus; "
            f"the smallest possible is {int(low[1]) + 1}"
        )
    return f"tokenizer: sentencepiece could not be trained: {' '.join(message.split())[:300]}"


def load(path: str | Path) -> Tokenizer:
    """The tokenizer at `path`, recognised by what is there.

    A file must be a sentencepiece model. A folder holds a sentencepiece `*.model`, or
    byte-level BPE: `vocab.json` + `merges.txt` (or `tokenizer.json`), with RoBERTa's ids, which are
    kept, or GPT-2's, which move up by four; or `encoder.json` + `vocab.bpe`. For GPT-2's ids a
    `dict.txt` gives fairseq's order: the id on line k (from 0) is row 4 + k. BERT's WordPiece is a
    `tokenizer.json` or `vocab.txt`.

    Raises:
        UserError: files are missing, damaged, or do not belong together.
    """
    path = Path(os.path.expanduser(path))
    if path.is_file():
        with _naming(path):
            return SentencePiece(path.read_bytes())
    if not path.is_dir():
        raise UserError(f"{path}: no such tokenizer file or folder")
    for pair in _PAIRS:
        vocab, merges = (path / name for name in pair)
        if vocab.exists() and merges.exists():
            pairs = _pairs(merges, _text(merges).rstrip("\n").split("\n"))
            with _naming(path):
                return _byte_level(_table(vocab, _json(vocab)), pairs, path / _DICT)
    models = sorted(path.glob("*.model"))
    if len(models) == 1:
        return load(models[0])
    if models:
        names = ", ".join(model.name for model in models)
        raise UserError(f"{path}: holds several sentencepiece models ({names}); name one of them")
    if (path / "tokenizer.json").exists():
        with _naming(path):
            return _from_tokenizer_json(path / "tokenizer.json")
    if (path / "vocab.txt").exists():
        from data2vec_jax.modalities.text import wordpiece  # which knows this file

        with _naming(path):
            return wordpiece.of_vocabulary(path)
    for pair in _PAIRS:
        for there, missing in (pair, pair[::-1]):
            if (path / there).exists():
                raise UserError(f"{path}: has {there} but no {missing}; byte-level BPE needs both")
    raise UserError(f"{path}: no tokenizer here; {_NEEDED}")


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Puts `path` in front of a user's error that does not name it yet."""
    try:
        yield
    except UserError as error:
        text = str(error)
        raise UserError(text if str(path) in text else f"{path}: {text}") from error


def _byte_level(vocab: dict[str, int], merges: list[tuple[str, str]], order: Path) -> ByteLevelBPE:
    """Puts a table of RoBERTa's or of GPT-2's kind into our rows."""
    there = [token for token in SPECIALS if token in vocab]
    if len(there) == len(SPECIALS):
        wrong = [token for row, token in enumerate(SPECIALS) if vocab[token] != row]
        if wrong:
            raise UserError(
                f"{wrong[0]} has id {vocab[wrong[0]]}, not {SPECIALS.index(wrong[0])}: "
                f"the first ids must be {', '.join(SPECIALS)}"
            )
        return ByteLevelBPE(vocab, merges)
    if there:
        missing = next(token for token in SPECIALS if token not in vocab)
        raise UserError(
            f"the vocabulary has {there[0]} but no {missing}: neither RoBERTa's nor GPT-2's"
        )
    rows = {token: row for row, token in enumerate(SPECIALS)}
    first = len(rows)
    if not order.exists():
        return ByteLevelBPE(rows | {token: first + i for token, i in vocab.items()}, merges)
    tokens = {str(i): token for token, i in vocab.items()}
    for number, line in enumerate(_text(order).rstrip("\n").split("\n")):
        word = line.split(" ")[0].strip()
        # Fillers that fairseq adds to round the table up, and `<mask>`, are rows without a text.
        filler = word.startswith("madeupword") or word == MASK
        token = tokens.get(word, word if filler else None)
        if token is None or token in rows:
            problem = "twice" if token else "not an id of the vocabulary"
            raise UserError(f"{order}: line {number + 1}: '{word[:40]}' is {problem}")
        rows[token] = first + number
    return ByteLevelBPE(rows, merges, [token for token in vocab if token not in rows])


def _from_tokenizer_json(path: Path) -> Tokenizer:
    """Hugging Face's single file: WordPiece, or what the pair of files of BPE would say."""
    content = _json(path)
    model = content.get("model") if isinstance(content, dict) else None
    if isinstance(model, dict) and model.get("type") == "WordPiece":
        from data2vec_jax.modalities.text import wordpiece

        return wordpiece.WordPiece(_text(path))
    splitter = content.get("pre_tokenizer") if isinstance(content, dict) else None
    if (
        not isinstance(model, dict)
        or not isinstance(splitter, dict)
        or (model.get("type"), splitter.get("type")) != ("BPE", "ByteLevel")
        or splitter.get("add_prefix_space")
    ):
        raise UserError(f"{path}: not the byte-level BPE of GPT-2 or RoBERTa")
    vocab = _table(path, model.get("vocab"))
    for added in content.get("added_tokens") or []:
        vocab.setdefault(added["content"], added["id"])
    lines = [pair if isinstance(pair, str) else " ".join(pair) for pair in model.get("merges", [])]
    return _byte_level(vocab, _pairs(path, lines), path.parent / _DICT)


def _pairs(path: Path, lines: list[str]) -> list[tuple[str, str]]:
    """The merges, less the version line; only "\\n" ends a line, as tokens may hold odd blanks."""
    pairs = [tuple(line.rstrip("\r").split(" ")) for line in lines]
    start = 1 if pairs and pairs[0][0] == "#version:" else 0
    for number, pair in enumerate(pairs[start:], start=start + 1):
        if len(pair) != 2 or not all(pair):
            raise UserError(f"{path}: line {number} is not a pair of tokens")
    return pairs[start:]


def _table(path: Path, content: Any) -> dict[str, int]:
    """Checks that `content` maps tokens to distinct ids."""
    if not isinstance(content, dict) or not content:
        raise UserError(f"{path}: not a table of tokens and ids")
    for token, i in content.items():
        if not isinstance(i, int) or isinstance(i, bool) or i < 0:
            raise UserError(f"{path}: token '{token}' has id {i!r}")
    if len(set(content.values())) != len(content):
        raise UserError(f"{path}: two tokens share one id")
    return dict(content)


def _json(path: Path) -> Any:
    try:
        return json.loads(_text(path))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not JSON: {error}") from error


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text") from error


def _dump(table: Mapping[str, int]) -> bytes:
    return json.dumps(
        dict(sorted(table.items(), key=lambda item: item[1])), ensure_ascii=False
    ).encode()
