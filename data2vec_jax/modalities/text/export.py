"""Files beside an exported text model that Hugging Face's tokenizers read."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data2vec_jax.core.errors import UserError
from data2vec_jax.core.files import write_json
from data2vec_jax.modalities.text import tokenizer
from data2vec_jax.modalities.text.model import TextModel

SPECIAL_TOKENS = {
    "bos_token": "<s>",
    "eos_token": "</s>",
    "sep_token": "</s>",
    "cls_token": "<s>",
    "unk_token": "<unk>",
    "pad_token": "<pad>",
}
# Texts that both tokenizers must split alike before the exported one is written.
PROBES = (
    "Two  blanks, 1,234.5 and tabs\t.",
    " \ufb01rst N\u00f8\u00f1-ASCII: \u65e5\u672c \U0001f600",
    "a <mask>b",
)


def write_processor(config: Mapping[str, Any], model: TextModel, folder: Path) -> None:
    """Adds the files from which `AutoTokenizer` makes the tokenizer in `folder`, if it has one."""
    if (folder / "tokenizer_config.json").exists():
        return
    try:
        found = tokenizer.load(folder)
    except UserError:
        return  # the checkpoint came without a tokenizer
    mask = {
        "content": tokenizer.MASK,
        "lstrip": True,
        "rstrip": False,
        "normalized": False,
        "single_word": False,
    }
    described: dict[str, Any] = {
        "model_max_length": model.embeddings.max_length,
        **SPECIAL_TOKENS,
        "mask_token": {**mask, "__type": "AddedToken"},
    }
    if isinstance(found, tokenizer.SentencePiece):
        fast = fast_tokenizer(found)
        if any(fast.encode(x, add_special_tokens=False).ids != found.encode(x) for x in PROBES):
            return  # this model normalises or splits in a way that `tokenizers` does not offer
        fast.save(str(folder / "tokenizer.json"))
        described = {"tokenizer_class": "PreTrainedTokenizerFast"} | described
    else:
        found.save(folder)  # as vocab.json and merges.txt, whichever files it was read from
        described = {
            "tokenizer_class": "RobertaTokenizer",
            "add_prefix_space": False,
            "trim_offsets": True,
            "errors": "replace",
            **described,
        }
    write_json(folder / "tokenizer_config.json", described)
    write_json(folder / "special_tokens_map.json", SPECIAL_TOKENS | {"mask_token": mask})


def fast_tokenizer(found: tokenizer.SentencePiece) -> Any:
    """A sentencepiece model as a tokenizer of the library `tokenizers`.

    A BPE model of sentencepiece stores no merges, only scores, which are ranks. Its merges are all
    pairs of pieces that join to a piece, those with the highest score first.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

    pieces, space = found.pieces(), "\u2581"
    rows = {piece: row for row, (piece, _) in enumerate(pieces)}
    fallback = "<0x00>" in rows
    if all(score == round(score) for _, score in pieces):
        pairs = [
            (-score, piece[:i], piece[i:])
            for piece, score in pieces[found.bos + 4 : -1]
            for i in range(1, len(piece))
            if piece[:i] in rows and piece[i:] in rows
        ]
        merges = [(a, b) for _, a, b in sorted(pairs, key=lambda pair: pair[0])]
        model = models.BPE(rows, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=fallback)
    else:
        model = models.Unigram(pieces, found.unk, byte_fallback=fallback)
    fast = Tokenizer(model)
    fast.normalizer = normalizers.Sequence(
        [normalizers.Prepend(space), normalizers.Replace(" ", space)]
    )
    fast.decoder = decoders.Sequence(
        [
            decoders.Replace(space, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    named = [AddedToken(token, normalized=False, special=True) for token in tokenizer.SPECIALS]
    mask = AddedToken(tokenizer.MASK, lstrip=True, normalized=False, special=True)
    fast.add_special_tokens([*named, mask])
    fast.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> </s> $B </s>",
        special_tokens=[("<s>", found.bos), ("</s>", found.eos)],
    )
    return fast
