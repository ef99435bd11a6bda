"""Published data sets of texts, in the folders and files that their authors ship, and scores.

| address         | DIR holds                                       | splits                      |
| --------------- | ----------------------------------------------- | --------------------------- |
| `glue:DIR/TASK` | tables of CoLA, SST-2, MRPC, QQP, STS-B, MNLI,  | train, dev, test; MNLI:     |
|                 | QNLI or RTE                                     | dev_matched, dev_mismatched |
| `squad:DIR`     | train-v1.1.json, dev-v1.1.json; or a FILE, such | train, dev                  |
|                 | as `squad:DIR/xquad.{split}.json`               |                             |
| `ag_news:DIR`   | train.csv, test.csv                             | train, test                 |

Items hold what `data.sources` says, and: glue: pair (the second sentence, of tasks that have one);
squad: question, answers (texts), starts (of the answers, in code points of `text`), id. Splits
without labels have none.
"""

import csv
import html
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from data2vec_jax.core.errors import UserError, nearest
from data2vec_jax.data.codecs import unreadable
from data2vec_jax.data.codecs.text import read_lines, read_text
from data2vec_jax.data.sources import Address, TableSource, index_labels, published

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


@published
def open_glue(address: Address) -> TableSource:
    """`DIR/TASK/SPLIT.tsv`: cells between tabs, nothing quoted. spec 3.1."""
    uri, place, split = address.uri, address.place, address.split
    task = Path(place).name
    if task not in GLUE:
        raise UserError(f"{uri}: '{task}' is no task of GLUE{nearest(task, GLUE)}")
    path = Path(place, f"{split}.tsv")
    if not path.is_file():
        found = [p.stem for p in sorted(Path(place).glob("*.tsv"))]
        raise UserError(f"{uri}: no file '{path}'{nearest(split, found) if found else ''}")
    form, test = GLUE[task], split.startswith("test")
    rows = [line.split("\t") for line in read_lines(path, uri)] or [[""]]
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
    return TableSource(uri, split, address.codec, columns, label_names=names)


# SQuAD ------------------------------------------------------------------------------------------


@published
def open_squad(address: Address) -> TableSource:
    """SQuAD 1.1 and XQuAD: a question of a paragraph is an example, the paragraph its text."""
    uri, place, split = address.uri, address.place, address.split
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
    return TableSource(uri, split, address.codec, columns)


# AG News ----------------------------------------------------------------------------------------

AG_NEWS = ("World", "Sports", "Business", "Sci/Tech")


@published
def open_ag_news(address: Address) -> TableSource:
    """`SPLIT.csv`: "class, from 1","title","description", maybe below a line of names."""
    uri, place, split = address.uri, address.place, address.split
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
    return TableSource(
        uri, split, address.codec, {"text": texts, "label": labels}, label_names=AG_NEWS
    )


def clean_news(text: str) -> str:
    """Backslashes (lost line ends) become spaces, entities characters, also those without `&`."""
    text = re.sub(r"(?<!&)#(\d+);", r"&#\1;", text.replace("\\", " "))
    return " ".join(html.unescape(text).split())


# Scores -----------------------------------------------------------------------------------------

# The paper's on GLUE's dev sets, base, in per cent; as they are known to us, not checked against
# the paper again.
SCORES = {
    "MNLI": 83.2,
    "QNLI": 90.9,
    "RTE": 67.0,
    "MRPC": 90.2,
    "QQP": 89.1,
    "STS-B": 87.2,
    "CoLA": 62.2,
    "SST-2": 91.8,
}


def published_scores(config: Mapping[str, Any], split: str, metric: str) -> float | None:
    """The paper's score of a fine-tuning config's task in per cent, None if it has none."""
    kind, _, place = config["data"]["source"].partition(":")
    if kind != "glue" or config["model"]["width"] != 768:
        return None
    task = Path(place).name
    wanted = {"CoLA": "matthews", "STS-B": "pearson"}.get(task, "accuracy")
    held_out = split in ("dev", "dev_matched")
    return SCORES.get(task) if metric == wanted and held_out else None
