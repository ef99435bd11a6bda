"""Files beside an exported speech model that Hugging Face's processors read."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data2vec_jax.core.files import read_json, write_json
from data2vec_jax.data.characters import LIBRISPEECH, SPECIALS
from data2vec_jax.modalities.speech.model import SpeechModel
from data2vec_jax.modalities.speech.processor import Letters, Processor
from data2vec_jax.models.outputs import head_name, head_options

FAIRSEQ_LETTERS = "dict.ltr.txt"


def write_processor(config: Mapping[str, Any], model: SpeechModel, folder: Path) -> None:
    """Adds the feature extractor (16 kHz, zero mean, unit variance) and, for CTC, the tokenizer.

    The characters are those of fairseq's dictionary, if it is in the folder. Without it, a head of
    32 classes can only have LibriSpeech's.
    """
    vocabulary, letters = folder / "vocab.json", folder / FAIRSEQ_LETTERS
    if head_name(config) == "ctc" and not vocabulary.exists():
        names = LIBRISPEECH
        if letters.exists():
            lines = letters.read_text(encoding="utf-8").splitlines()
            names = (*SPECIALS, *(line.split(" ")[0] for line in lines if line.strip()))
        if len(names) == head_options(config)["vocab_size"]:
            write_json(vocabulary, {name: i for i, name in enumerate(names)})
    if vocabulary.exists() and not (folder / "tokenizer_config.json").exists():
        described = Letters.of(read_json(vocabulary), {}).to_json()
        write_json(folder / "tokenizer_config.json", described)
        special = {name: token for name, token in described.items() if token in SPECIALS}
        write_json(folder / "special_tokens_map.json", special)
    if not (folder / "preprocessor_config.json").exists():
        kind = {"processor_class": "Wav2Vec2Processor"} if vocabulary.exists() else {}
        write_json(folder / "preprocessor_config.json", Processor().to_json() | kind)
