"""Published data sets, in the folders and files that their authors ship.

| address           | DIR holds                                      | splits                      |
| ----------------- | ---------------------------------------------- | --------------------------- |
| `librispeech:DIR` | the parts of LibriSpeech, Libri-light's sets   | dev-clean, ...; 10m to 960h |
| `imagenet:DIR`    | ILSVRC 2012: torchvision's or Kaggle's folders | train, val                  |
| `glue:DIR/TASK`   | tables of CoLA, SST-2, MRPC, QQP, STS-B, MNLI, | train, dev, test; MNLI:     |
|                   | QNLI or RTE                                    | dev_matched, dev_mismatched |
| `squad:DIR`       | train-v1.1.json, dev-v1.1.json; or a FILE,     | train, dev                  |
|                   | such as `squad:DIR/xquad.{split}.json`         |                             |
| `ag_news:DIR`     | train.csv, test.csv                            | train, test                 |

Items hold what `data.sources` says, and: librispeech: transcript, id, speaker; glue: pair (the
second sentence, of tasks that have one); squad: question, answers (texts), starts (of the answers,
in code points of `text`), id. Splits without labels have none.
"""

import csv
import html
import json
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from data2vec_jax.core.errors import UserError, nearest
from data2vec_jax.data.sources import (
    SUFFIXES,
    TableSource,
    index_labels,
    read_text,
    subfolders,
    unreadable,
)


def lines_of(path: Path, uri: str) -> list[str]:
    """Lines of a UTF-8 file, without their ends. Raises UserError: no such file."""
    if not path.is_file():
        raise UserError(f"{uri}: no file '{path}'")
    try:
        with open(path, encoding="utf-8-sig", newline="\n") as file:  # a cell may hold a lone \r
            return [line.rstrip("\r\n") for line in file]
    except (OSError, UnicodeDecodeError) as error:
        raise unreadable(str(path), "text", error) from error


# LibriSpeech ------------------------------------------------------------------------------------

LIBRISPEECH = {  # our names of training sets -> folders
    "10m": ("1h/0",),
    "1h": ("1h",),
    "10h": ("1h", "9h"),
    "100h": ("train-clean-100",),
    "960h": ("train-clean-100", "train-clean-360", "train-other-500"),
}


def open_librispeech(uri: str, place: str, split: str, sample_rate: int) -> TableSource:
    """`SPLIT/SPEAKER/CHAPTER/*.flac` with `SPEAKER-CHAPTER.trans.txt`, whatever is above.

    DIR may be the folder `LibriSpeech` or hold it, and the same for `librispeech_finetuning`.
    `a+b` joins splits.
    """
    tops = [Path(place, name) for name in ("", "LibriSpeech", "librispeech_finetuning")]
    columns: dict[str, list] = {"path": [], "transcript": [], "id": [], "speaker": []}
    for name in split.split("+"):
        for part in LIBRISPEECH.get(name, (name,)):
            folder = next((top / part for top in tops if (top / part).is_dir()), None)
            if folder is None:
                found = [n for top in tops if top.is_dir() for n in subfolders(top)]
                hint = nearest(part, found) if found else ""
                raise UserError(f"{uri}: no folder '{part}' in '{place}'{hint}")
            tables = sorted(folder.rglob("*.trans.txt"))
            if not tables:
                raise UserError(f"{uri}: no transcripts (*.trans.txt) below '{folder}'")
            for table in tables:
                for number, line in enumerate(lines_of(table, uri), 1):
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
    return TableSource(uri, split, "speech", columns, place, sample_rate)


# ImageNet ---------------------------------------------------------------------------------------


def open_imagenet(uri: str, place: str, split: str, sample_rate: int) -> TableSource:
    """Classes are the folders of `train`, sorted (n01440764 is 0).

    Images of `val` may be in such folders too, or all in one, with their classes in Kaggle's
    `LOC_val_solution.csv` or in the authors' `ILSVRC2012_devkit_t12`, beside it or in DIR.
    """
    if split not in ("train", "val"):
        raise UserError(f"{uri}: no split '{split}'{nearest(split, ('train', 'val'))}")
    tops = Path(place), Path(place, "ILSVRC/Data/CLS-LOC")
    top = next((path for path in tops if (path / split).is_dir()), None)
    if top is None:
        raise UserError(f"{uri}: no folder '{split}' in '{place}'")
    folder = top / split
    names = subfolders(top / "train") if (top / "train").is_dir() else []
    names = names or subfolders(folder)
    images = lambda f: sorted(n for n in os.listdir(f) if n.lower().endswith(SUFFIXES["vision"]))  # noqa: E731
    if subfolders(folder):
        pairs = [(f"{n}/{image}", n) for n in subfolders(folder) for image in images(folder / n)]
    else:
        classes, names = validation_classes((Path(place), top), names, uri)
        pairs = []
        for image in images(folder):
            stem = Path(image).stem
            if stem not in classes:
                raise UserError(f"{folder / image}: no class is known for this image")
            pairs.append((image, classes[stem]))
    if not pairs:
        raise UserError(f"{uri}: no images in '{folder}'")
    labels, names = index_labels([name for _, name in pairs], names, uri)
    columns = {"path": [path for path, _ in pairs], "label": labels}
    return TableSource(uri, split, "vision", columns, str(folder), label_names=names)


def validation_classes(
    folders: Sequence[Path], names: Sequence[str], uri: str
) -> tuple[dict[str, str], list[str]]:
    """Stem of each validation image -> its class; and all classes, sorted."""
    for folder in folders:
        solution, kit = folder / "LOC_val_solution.csv", folder / "ILSVRC2012_devkit_t12" / "data"
        if solution.is_file():
            classes = {}
            for number, line in enumerate(lines_of(solution, uri)[1:], 2):
                stem, _, prediction = line.partition(",")
                if line and not prediction.strip():
                    raise UserError(f"{solution}:{number}: not an image and its class")
                if line:
                    classes[stem] = prediction.split()[0]
            return classes, sorted({*names, *classes.values()})
        if kit.is_dir():
            import scipy.io

            try:
                table = scipy.io.loadmat(str(kit / "meta.mat"), squeeze_me=True)["synsets"]
                truth = (kit / "ILSVRC2012_validation_ground_truth.txt").read_text().split()
                by_id = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in table}
                found = [by_id[int(number)] for number in truth]
            except Exception as error:  # scipy's reader raises whatever it stumbles over
                raise unreadable(str(kit), "devkit", error) from error
            classes = {f"ILSVRC2012_val_{i:08}": name for i, name in enumerate(found, 1)}
            return classes, sorted({*names} or {*(by_id[i] for i in by_id if i <= 1000)})
    raise UserError(
        f"{uri}: the images of val are not in folders of classes, and neither LOC_val_solution.csv "
        "nor ILSVRC2012_devkit_t12 is there to tell their classes"
    )


# GLUE -------------------------------------------------------------------------------------------


class Glue(NamedTuple):
    """Columns of a task's tables, from 0. text: one or two. width: of a line that is whole.

    classes: in the order of their ids, None for regression. metrics: names in `tasks.scores`.
    """

    text: tuple[int, ...]
    label: int
    test_text: tuple[int, ...]
    classes: tuple[str, ...] | None
    metrics: tuple[str, ...]
    header: bool = True


ENTAILS = ("entailment", "not_entailment")
GLUE = {
    "CoLA": Glue((3,), 1, (1,), ("0", "1"), ("matthews",), header=False),
    "SST-2": Glue((0,), 1, (1,), ("0", "1"), ("accuracy",)),
    "MRPC": Glue((3, 4), 0, (3, 4), ("0", "1"), ("accuracy", "f1")),
    "QQP": Glue((3, 4), 5, (1, 2), ("0", "1"), ("accuracy", "f1")),
    "STS-B": Glue((7, 8), 9, (7, 8), None, ("pearson", "spearman")),
    "MNLI": Glue((8, 9), -1, (8, 9), ("entailment", "neutral", "contradiction"), ("accuracy",)),
    "QNLI": Glue((1, 2), 3, (1, 2), ENTAILS, ("accuracy",)),
    "RTE": Glue((1, 2), 3, (1, 2), ENTAILS, ("accuracy",)),
}


def open_glue(uri: str, place: str, split: str, sample_rate: int) -> TableSource:
    """`DIR/TASK/SPLIT.tsv`: cells between tabs, nothing quoted. spec 3.1."""
    task = Path(place).name
    if task not in GLUE:
        raise UserError(f"{uri}: '{task}' is no task of GLUE{nearest(task, GLUE)}")
    path = Path(place, f"{split}.tsv")
    if not path.is_file():
        found = [p.stem for p in sorted(Path(place).glob("*.tsv"))]
        raise UserError(f"{uri}: no file '{path}'{nearest(split, found) if found else ''}")
    form, test = GLUE[task], split.startswith("test")
    rows = [line.split("\t") for line in lines_of(path, uri)] or [[""]]
    width = max(*(form.test_text if test else (*form.text, form.label)), 0) + 1
    if form.header or test:
        width = max(width, len(rows[0]) if task == "MNLI" else 0)
    columns: dict[str, list] = {"text": [], "pair": []}
    labels = []
    for number, row in enumerate(rows, 1):
        if row == [""] or (number == 1 and (form.header or test)):
            continue
        if len(row) < width:
            if task == "QQP":
                continue  # some of its lines are cut; the authors leave them out too
            raise UserError(f"{path}:{number}: {len(row)} columns, not {width}")
        for name, c in zip(("text", "pair"), form.test_text if test else form.text, strict=False):
            columns[name].append(row[c])
        if not test:
            labels.append(row[form.label])
    if not columns["text"]:
        raise UserError(f"{path}: has no rows")
    columns = {name: column for name, column in columns.items() if column}
    names = form.classes
    if labels and names:
        columns["label"], names = index_labels(labels, names, str(path))
    elif labels:
        try:
            columns["label"] = [float(label) for label in labels]
        except ValueError as error:
            raise unreadable(str(path), "score", error) from error
    return TableSource(uri, split, "text", columns, label_names=names)


# SQuAD ------------------------------------------------------------------------------------------


def open_squad(uri: str, place: str, split: str, sample_rate: int) -> TableSource:
    """SQuAD 1.1 and XQuAD: a question of a paragraph is an example, the paragraph its text."""
    path = Path(place.replace("{split}", split))
    path = path / f"{split}-v1.1.json" if path.is_dir() else path
    if not path.is_file():
        raise UserError(f"{uri}: no file '{path}'")
    columns: dict[str, list] = {n: [] for n in ("text", "question", "answers", "starts", "id")}
    try:
        for article in json.loads(read_text(str(path)))["data"]:
            for paragraph in article["paragraphs"]:
                for qa in paragraph["qas"]:
                    if not qa["answers"]:
                        raise UserError(
                            f"{path}: question '{qa['id']}' has no answer; this is not SQuAD 1.1"
                        )
                    columns["text"].append(paragraph["context"])
                    columns["question"].append(qa["question"].strip())
                    columns["answers"].append([answer["text"] for answer in qa["answers"]])
                    columns["starts"].append([int(a["answer_start"]) for a in qa["answers"]])
                    columns["id"].append(str(qa["id"]))
    except (ValueError, KeyError, TypeError) as error:
        raise unreadable(str(path), "SQuAD file", error) from error
    if not columns["id"]:
        raise UserError(f"{path}: has no questions")
    return TableSource(uri, split, "text", columns)


# AG News ----------------------------------------------------------------------------------------

AG_NEWS = ("World", "Sports", "Business", "Sci/Tech")


def open_ag_news(uri: str, place: str, split: str, sample_rate: int) -> TableSource:
    """`SPLIT.csv`: "class, from 1","title","description", maybe below a line of names."""
    path = Path(place, f"{split}.csv")
    if not path.is_file():
        found = [p.stem for p in sorted(Path(place).glob("*.csv"))]
        raise UserError(f"{uri}: no file '{path}'{nearest(split, found) if found else ''}")
    texts, labels = [], []
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file)
            for row in reader:
                if not row or row[0] == "Class Index":
                    continue
                if len(row) != 3 or row[0] not in ("1", "2", "3", "4"):
                    where = f"{path}:{reader.line_num}"
                    raise UserError(f"{where}: not a class from 1 to 4, a title, a description")
                texts.append(f"{clean_news(row[1])} {clean_news(row[2])}")
                labels.append(int(row[0]) - 1)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise unreadable(str(path), "table", error) from error
    if not texts:
        raise UserError(f"{path}: has no rows")
    return TableSource(uri, split, "text", {"text": texts, "label": labels}, label_names=AG_NEWS)


def clean_news(text: str) -> str:
    """Backslashes (lost line ends) become spaces, entities characters, also those without `&`."""
    text = re.sub(r"(?<!&)#(\d+);", r"&#\1;", text.replace("\\", " "))
    return " ".join(html.unescape(text).split())


OPENERS: dict[str, tuple[str, Callable[..., TableSource]]] = {
    "librispeech": ("speech", open_librispeech),
    "imagenet": ("vision", open_imagenet),
    "glue": ("text", open_glue),
    "squad": ("text", open_squad),
    "ag_news": ("text", open_ag_news),
}


def open_published(
    uri: str, place: str, split: str, modality: str, *, sample_rate: int,
    label_names: Sequence[str] | None,
) -> Any:  # fmt: skip
    """The source at an address of the table above. Raises UserError: of another modality, ..."""
    own, opener = OPENERS[uri.partition(":")[0]]
    if modality != own:
        raise UserError(f"{uri}: this is {own}, not {modality}")
    if label_names is not None:
        raise UserError(f"{uri}: has classes of its own, 'label_names' cannot be given")
    if not Path(place).exists() and not Path(place).parent.is_dir():
        raise UserError(f"{uri}: no folder '{place}'")
    return opener(uri, place, split, sample_rate)
