"""Processor and tokenizer files of an export: what came with the checkpoint, or what it implies."""

from pathlib import Path
from typing import Any

from data2vec_jax.convert import files, ours
from data2vec_jax.convert.ours import Checkpoint
from data2vec_jax.core.errors import UserError
from data2vec_jax.modalities.speech.processor import SPECIALS, Letters
from data2vec_jax.modalities.speech.processor import Processor as SpeechProcessor
from data2vec_jax.modalities.text import tokenizer
from data2vec_jax.modalities.vision.processor import Processor as VisionProcessor
from data2vec_jax.tasks import characters


def write(checkpoint: Checkpoint, folder: Path) -> None:
    """Copies the checkpoint's files, and adds those that can be derived."""
    ours.copy(checkpoint.processors, folder)
    missing = ADDED.get(checkpoint.config["modality"])
    if missing:
        missing(checkpoint, folder)


def speech(checkpoint: Checkpoint, folder: Path) -> None:
    """16 kHz, zero mean, unit variance; for CTC the characters, if they are known.

    They are in the dictionary that lies beside a fairseq checkpoint; without it, 32 classes can
    only be those of LibriSpeech.
    """
    task = checkpoint.config.get("task") or {}
    vocabulary, letters = folder / "vocab.json", folder / DICTIONARY
    if task.get("name") == "ctc" and not vocabulary.exists():
        names = characters.LIBRISPEECH
        if letters.exists():
            lines = letters.read_text(encoding="utf-8").splitlines()
            names = (*SPECIALS, *(line.split(" ")[0] for line in lines if line.strip()))
        if len(names) == task["vocab_size"]:
            files.write_json(vocabulary, {name: i for i, name in enumerate(names)})
    if vocabulary.exists() and not (folder / "tokenizer_config.json").exists():
        described = Letters.of(files.read_json(vocabulary), {}).to_json()
        files.write_json(folder / "tokenizer_config.json", described)
        special = {name: token for name, token in described.items() if token in SPECIALS}
        files.write_json(folder / "special_tokens_map.json", special)
    if not (folder / "preprocessor_config.json").exists():
        kind = {"processor_class": "Wav2Vec2Processor"} if vocabulary.exists() else {}
        files.write_json(folder / "preprocessor_config.json", SpeechProcessor().to_json() | kind)


DICTIONARY = "dict.ltr.txt"  # fairseq's


def text(checkpoint: Checkpoint, folder: Path) -> None:
    """The tokenizer that came with the checkpoint, in files that `AutoTokenizer` reads."""
    if (folder / "tokenizer_config.json").exists():
        return
    try:
        found = tokenizer.load(folder)
    except UserError:
        return  # none came with it
    length = checkpoint.config["model"].get("max_length", 512)
    mask = {"content": tokenizer.MASK, "lstrip": True, "rstrip": False, "normalized": False,
            "single_word": False}  # fmt: skip
    described = (
        {"model_max_length": length} | NAMES | {"mask_token": {**mask, "__type": "AddedToken"}}
    )
    if isinstance(found, tokenizer.SentencePiece):
        engine = engine_of(found)
        if any(engine.encode(x, add_special_tokens=False).ids != found.encode(x) for x in PROBES):
            return  # it normalises or splits in a way of its own
        engine.save(str(folder / "tokenizer.json"))
        described = {"tokenizer_class": "PreTrainedTokenizerFast"} | described
    else:
        found.save(folder)  # vocab.json and merges.txt, whichever files they came from
        described = {
            "tokenizer_class": "RobertaTokenizer", "add_prefix_space": False, "trim_offsets": True,
            "errors": "replace", **described,
        }  # fmt: skip
    files.write_json(folder / "tokenizer_config.json", described)
    files.write_json(folder / "special_tokens_map.json", NAMES | {"mask_token": mask})


NAMES = {"bos_token": "<s>", "eos_token": "</s>", "sep_token": "</s>", "cls_token": "<s>",
         "unk_token": "<unk>", "pad_token": "<pad>"}  # fmt: skip


PROBES = (
    "Two  blanks, 1,234.5 and tabs\t.",
    " \ufb01rst N\u00f8\u00f1-ASCII: \u65e5\u672c \U0001f600",
    "a <mask>b",
)


def engine_of(found: tokenizer.SentencePiece) -> Any:
    """A sentencepiece model as one of the library `tokenizers`.

    Merges are not stored in such a model: a piece is merged from any two pieces that make it, the
    one with the highest score first. A model of that kind has ranks for scores.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

    pieces, space = found.pieces(), "\u2581"
    rows = {piece: row for row, (piece, _) in enumerate(pieces)}
    if all(score == round(score) for _, score in pieces):
        pairs = [
            (-score, piece[:i], piece[i:])
            for piece, score in pieces[found.bos + 4 : -1] for i in range(1, len(piece))
            if piece[:i] in rows and piece[i:] in rows
        ]  # fmt: skip
        merges = [(a, b) for _, a, b in sorted(pairs, key=lambda pair: pair[0])]
        model = models.BPE(
            rows, merges, unk_token="<unk>", fuse_unk=True, byte_fallback="<0x00>" in rows
        )
    else:
        model = models.Unigram(pieces, found.unk, byte_fallback="<0x00>" in rows)
    engine = Tokenizer(model)
    engine.normalizer = normalizers.Sequence(
        [normalizers.Prepend(space), normalizers.Replace(" ", space)]
    )
    engine.decoder = decoders.Sequence(
        [decoders.Replace(space, " "), decoders.ByteFallback(), decoders.Fuse(),
         decoders.Strip(" ", 1, 0)]
    )  # fmt: skip
    named = [AddedToken(token, normalized=False, special=True) for token in tokenizer.SPECIALS]
    mask = AddedToken(tokenizer.MASK, lstrip=True, normalized=False, special=True)
    engine.add_special_tokens([*named, mask])
    engine.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>",
        special_tokens=[("<s>", found.bos), ("</s>", found.eos)],
    )  # fmt: skip
    return engine


def vision(checkpoint: Checkpoint, folder: Path) -> None:
    """The whole image squashed to the model's size, bicubic; the model's mean and deviation."""
    path = folder / "preprocessor_config.json"
    if not path.exists():
        model = ours.model_of(checkpoint.config)
        processor = VisionProcessor(size=model.image, mean=model.mean, std=model.std)
        files.write_json(path, processor.to_json())


ADDED = {"speech": speech, "text": text, "vision": vision}
