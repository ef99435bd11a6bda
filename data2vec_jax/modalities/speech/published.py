"""Published data sets of speech, in the folders and files that their authors ship, and scores.

| address           | DIR holds                                     | splits                      |
| ----------------- | --------------------------------------------- | --------------------------- |
| `librispeech:DIR` | the parts of LibriSpeech, Libri-light's sets  | dev-clean, ...; 10m to 960h |
| `librilight:DIR`  | Libri-light's unlabelled parts                | small, medium, large        |
| `common_voice:DIR`| a language of Common Voice: SPLIT.tsv, clips/ | train, dev, test, other, ...|
| `fairseq:DIR`     | wav2vec's SPLIT.tsv with SPLIT.ltr or .wrd    | as the files                |
| `transcribed:DIR` | audio files, X.txt or X.lab beside X.wav      | as of `folder:`             |

Items hold what `data.sources` says, transcript (but for `librilight:`) and, where they are known,
id and speaker. Common Voice has MP3 of 32 or 48 kHz, so `prepare` it with --resample.
"""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data2vec_jax.core.errors import ExampleError, UserError, nearest
from data2vec_jax.data.codecs import unreadable
from data2vec_jax.data.codecs.text import read_lines, read_text
from data2vec_jax.data.sources import Address, TableSource, published, subfolders
from data2vec_jax.data.sources.folder import open_folder, walk
from data2vec_jax.data.sources.manifest import missing_files, open_manifest, read_rows

SETS = {  # our names of training sets -> folders
    "10m": ("1h/0",),
    "1h": ("1h",),
    "10h": ("1h", "9h"),
    "100h": ("train-clean-100",),
    "960h": ("train-clean-100", "train-clean-360", "train-other-500"),
}

# The paper's word error rates on test-other with the 4-gram, in per cent, of base and large, by
# training set; as they are known to us, not checked against the paper again.
WORD_ERRORS = {
    768: {"10m": 12.3, "1h": 9.1, "10h": 8.1, "100h": 6.8, "960h": 5.5},
    1024: {"10m": 8.4, "1h": 6.3, "10h": 5.3, "100h": 4.6, "960h": 3.7},
}


@published
def open_librispeech(address: Address) -> TableSource:
    """`SPLIT/SPEAKER/CHAPTER/*.flac` with `SPEAKER-CHAPTER.trans.txt`, whatever is above.

    DIR may be the folder `LibriSpeech` or hold it, and the same for `librispeech_finetuning`.
    `a+b` joins splits.
    """
    uri, place, split = address.uri, address.place, address.split
    tops = [Path(place, name) for name in ("", "LibriSpeech", "librispeech_finetuning")]
    columns: dict[str, list] = {"path": [], "transcript": [], "id": [], "speaker": []}
    for name in split.split("+"):
        for part in SETS.get(name, (name,)):
            folder = next((top / part for top in tops if (top / part).is_dir()), None)
            if folder is None:
                found = [n for top in tops if top.is_dir() for n in subfolders(top)]
                hint = nearest(part, found) if found else ""
                raise UserError(f"{uri}: no folder '{part}' in '{place}'{hint}")
            tables = sorted(folder.rglob("*.trans.txt"))
            if not tables:
                raise UserError(f"{uri}: no transcripts (*.trans.txt) below '{folder}'")
            for table in tables:
                for number, line in enumerate(read_lines(table, uri), 1):
                    if not line.strip():
                        continue
                    utterance, _, words = line.partition(" ")
                    path = table.parent / f"{utterance}.flac"
                    if not path.is_file():
                        raise UserError(f"{table}:{number}: no file '{path}'")
                    columns["path"].append(os.path.relpath(path, place))
                    columns["transcript"].append(words.strip())
                    columns["id"].append(utterance)
                    columns["speaker"].append(utterance.split("-")[0])
    return TableSource(uri, split, address.codec, columns, root=place)


@published
def open_librilight(address: Address) -> TableSource:
    """`SPLIT/SPEAKER/BOOK/*.flac`, recordings without transcripts. `a+b` joins splits."""
    uri, place = address.uri, address.place
    paths = []
    for split in address.split.split("+"):
        if not Path(place, split).is_dir():
            hint = nearest(split, subfolders(Path(place))) if Path(place).is_dir() else ""
            raise UserError(f"{uri}: no folder '{split}' in '{place}'{hint}")
        found = walk(os.path.join(place, split), address.codec.suffixes)
        paths += sorted(os.path.relpath(path, place) for path in found)
    if not paths:
        raise UserError(f"{uri}: no audio files in '{place}/{address.split}'")
    columns = {"path": paths, "speaker": [path.split(os.sep)[1] for path in paths]}
    return TableSource(uri, address.split, address.codec, columns, root=place)


@published
def open_common_voice(address: Address) -> TableSource:
    """`SPLIT.tsv` and `clips/`, of one language. Cells are between tabs, nothing is quoted."""
    uri, place, split = address.uri, address.place, address.split
    table = os.path.join(place, f"{split}.tsv")
    if not os.path.isfile(table):
        found = [path.stem for path in Path(place).glob("*.tsv")]
        hint = nearest(split, found) if found else ""
        if languages := sorted(path.parent.name for path in Path(place).glob(f"*/{split}.tsv")):
            hint = f"; give the folder of a language, such as '{os.path.join(place, languages[0])}'"
        raise UserError(f"{uri}: no file '{table}'{hint}")
    try:
        _, columns, lines, bad = read_rows(table, address.codec, None)
    except (OSError, UnicodeDecodeError) as error:
        raise unreadable(table, "table", error) from error
    renamed = {"client_id": "speaker", "sentence": "transcript"}
    for name in ("path", *renamed):
        if name not in columns:
            raise UserError(f"{table}: no column '{name}'{nearest(name, columns)}")
    columns = {renamed.get(name, name): column for name, column in columns.items()}
    suffixes = address.codec.suffixes
    columns["path"] = [  # early versions leave out the suffix
        path and f"clips/{path}{'' if path.endswith(suffixes) else '.mp3'}"
        for path in columns["path"]
    ]
    for i, path in missing_files(place, columns["path"], skip=bad):
        bad[i] = ExampleError(f"{table}:{lines[i]}", "missing", f"no file '{path}'")
    return TableSource(
        uri, split, address.codec, columns, root=place, file=table, lines=lines, bad=bad
    )


@published
def open_fairseq(address: Address) -> TableSource:
    """`SPLIT.tsv`, a wav2vec manifest, and its transcripts, a line for each of its lines: words in
    `SPLIT.wrd`, or letters in `SPLIT.ltr`, where `|` ends a word."""
    stem = os.path.join(address.place, address.split)
    source = open_manifest(dataclasses.replace(address, place=f"{stem}.tsv"))
    table = next((t for t in (f"{stem}.wrd", f"{stem}.ltr") if os.path.isfile(t)), f"{stem}.ltr")
    texts = read_lines(Path(table), address.uri)
    if len(texts) != len(source):
        raise UserError(f"{table}: {len(texts)} lines for the {len(source)} of {stem}.tsv")
    if table.endswith(".ltr"):
        texts = [" ".join("".join(text.split()).replace("|", " ").split()) for text in texts]
    return source.with_columns({"transcript": texts})


@published
def open_transcribed(address: Address) -> TableSource:
    """As `folder:`, with the transcript of each file in X.txt or X.lab beside it; a file without
    one is bad."""
    source = open_folder(address, beside=(".txt", ".lab"))
    texts: list[str | None] = []
    for i in range(len(source)):
        path = source.location(i)
        stem = os.path.splitext(path)[0]
        beside = next((t for t in (f"{stem}.txt", f"{stem}.lab") if os.path.isfile(t)), None)
        texts.append(None)
        try:
            if beside is None:
                raise ExampleError(path, "missing", f"no transcript, '{stem}.txt' or '{stem}.lab'")
            texts[i] = " ".join(read_text(beside).split())
        except ExampleError as error:
            source.bad.setdefault(i, error)
    source.check_any()
    return source.with_columns({"transcript": texts})


def published_scores(config: Mapping[str, Any], split: str, metric: str) -> float | None:
    """The paper's score of a fine-tuning config's task in per cent, None if it has none."""
    data, width = config["data"], config["model"]["width"]
    if data["source"].startswith("librispeech:") and (split, metric) == ("test-other", "wer_lm"):
        return WORD_ERRORS.get(width, {}).get(data["split"])
    return None
