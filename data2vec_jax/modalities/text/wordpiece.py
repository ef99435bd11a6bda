"""BERT's tokenizer: pieces of words, by the library `tokenizers`."""

import functools
from collections.abc import Mapping
from pathlib import Path

from data2vec_jax.core import files
from data2vec_jax.core.errors import UserError
from data2vec_jax.modalities.text.tokenizer import Tokenizer


def specials(rows: Mapping[str, int]) -> list[int]:
    """Rows of the special tokens. Raises UserError: one is missing."""
    names = [f"[{name}]" for name in ("CLS", "PAD", "SEP", "UNK", "MASK")]
    if missing := [name for name in names if name not in rows]:
        raise UserError(f"WordPiece without the token {missing[0]}")
    return [rows[name] for name in names]


class WordPiece(Tokenizer):
    """BERT's pieces of words with its own ids: `[CLS]` stands for `<s>`, and `[SEP]` for `</s>`.

    Args:
        content: a tokenizer.json of the library `tokenizers`.

    Raises:
        UserError: a special token is missing.
    """

    def __init__(self, content: str):
        self.content = content
        rows = self._engine.get_vocab()
        self.bos, self.pad, self.eos, self.unk, mask = specials(rows)
        super().__init__(max(rows.values()) + 1, mask)

    @functools.cached_property
    def _engine(self):
        from tokenizers import Tokenizer as Engine

        try:
            engine = Engine.from_str(self.content)
        except Exception as error:  # the library knows no other class
            raise UserError(f"not a tokenizer of WordPiece: {error}") from None
        engine.no_padding()
        engine.no_truncation()
        return engine

    def _encode(self, texts: list[str]) -> list[list[int]]:
        return [e.ids for e in self._engine.encode_batch(texts, add_special_tokens=False)]

    def _spans(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        encoding = self._engine.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def _decode(self, ids: list[int]) -> str:
        return self._engine.decode(ids, skip_special_tokens=False)

    def _files(self) -> dict[str, bytes]:
        return {"tokenizer.json": self.content.encode()}


def of_vocabulary(folder: Path) -> WordPiece:
    """Of a folder with BERT's vocab.txt, and maybe a tokenizer_config.json on how it normalises."""
    from tokenizers import BertWordPieceTokenizer

    path = folder / "tokenizer_config.json"
    said = files.read_json(path) if path.exists() else {}
    lines = (folder / "vocab.txt").read_text("utf-8").rstrip("\n").split("\n")
    rows = {line.rstrip("\r"): row for row, line in enumerate(lines)}
    specials(rows)
    engine = BertWordPieceTokenizer(
        rows,
        lowercase=said.get("do_lower_case", True),
        strip_accents=said.get("strip_accents"),
        handle_chinese_chars=said.get("tokenize_chinese_chars", True),
    )
    return WordPiece(engine.to_str())
