"""The model card (README.md) of an export."""

import re
from typing import Any

from data2vec_jax.convert import fields
from data2vec_jax.convert.layouts import Config, Layout
from data2vec_jax.convert.ours import Checkpoint
from data2vec_jax.core import files
from data2vec_jax.metrics.writer import FILE, read_lines
from data2vec_jax.models.outputs import head_name

PAPERS = {
    "1.0": "[data2vec](https://arxiv.org/abs/2202.03555)",
    "2.0": "[data2vec 2.0](https://arxiv.org/abs/2212.07525)",
}
AS_THEY_WERE = ("bert", "roberta", "vit", "wav2vec2", "hubert")  # not data2vec
# Classes whose `Auto*` class has a name of its own.
AUTO_CLASSES = {
    "Data2VecAudioForSequenceClassification": "AutoModelForAudioClassification",
    "Data2VecAudioForXVector": "AutoModelForAudioXVector",
}

# What has to be done before the card's first lines work.
EAT = (
    "Neither transformers nor this folder has EAT's class. First put the Python files of one of "
    "its authors' folders into this one, and the `auto_map` of their config.json into that of this "
    "one. `data2vec_jax.load` reads this folder as it is."
)

LOGGED = ("step", "loss", "target_std", "pred_std")


def auto_class(described: Config) -> str:
    """The `Auto*` class that opens an export with its head. described: its config.json."""
    (architecture,) = described["architectures"]
    if "auto_map" in described or architecture.endswith("Model"):
        return "AutoModel"
    head = re.sub(r".*?(?=For)", "", architecture, count=1)
    return AUTO_CLASSES.get(architecture, f"AutoModel{head}")


def card(checkpoint: Checkpoint, layout: Layout, described: Config) -> str:
    """Markdown: kind of model, sizes, source, metrics, and how to load it."""
    config, name = checkpoint.config, auto_class(described)
    others = layout.name in AS_THEY_WERE
    generation = "2.0" if is_eat(described) else fields.generation(config)
    paper = layout.name if others else PAPERS[generation]
    lines = [
        "---",
        "library_name: transformers",
        "tags:",
        f"- {layout.name if others else 'data2vec'}",
        f"- {config['modality']}",
        "---",
        "",
        f"# {layout.name}",
        "",
        f"A {paper} model for {config['modality']}, written by data2vec_jax.",
        "",
        "```python",
        f"from transformers import {name}",
        "",
        f'model = {name}.from_pretrained("THIS_FOLDER"{remote(described)})',
        "```",
        *(["", EAT] if is_eat(described) else []),
        "",
        "| | |",
        "| --- | --- |",
        *rows(checkpoint),
    ]
    found = numbers(checkpoint)
    lines += ["", "## Metrics", ""]
    lines += ["| metric | value |", "| --- | --- |", *found] if found else ["None recorded."]
    return "\n".join(lines) + "\n"


def remote(described: Config) -> str:
    """The argument that lets transformers run the model file beside the weights."""
    return ", trust_remote_code=True" if "auto_map" in described or is_eat(described) else ""


def is_eat(described: Config) -> bool:
    """Whether an export is of a class that neither transformers nor the export has."""
    return described.get("model_type") == "eat"


def rows(checkpoint: Checkpoint) -> list[str]:
    """Sizes, as rows of a table."""
    config = checkpoint.config
    encoder = config["model"]["encoder"]
    count = sum(
        int(_size(entry.shape)) for entry in checkpoint.entries if "teacher/" not in entry.name
    )
    return [
        f"| parameters | {count:,} |",
        f"| layers, width, heads | {encoder['depth']}, {config['model']['width']}, "
        f"{encoder['heads']} |",
        f"| head | {head_name(config) or 'none'} |",
        f"| source | {(config.get('origin') or {}).get('layout', 'trained with data2vec_jax')} |",
    ]


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for n in shape:
        size *= n
    return size


def numbers(checkpoint: Checkpoint) -> list[str]:
    """Rows of metrics.json, if the checkpoint has one: {name: number}, nested or not; of a workdir,
    what it logged last."""
    found = [path for path in checkpoint.processors if path.name == "metrics.json"]
    log = checkpoint.path / FILE
    if not found and log.is_file():
        last = {line["split"]: line for line in read_lines(log)}
        return [
            f"| {split} {name} | {line[name]} |"
            for split, line in last.items()
            for name in LOGGED
            if name in line
        ]
    if not found:
        return []

    def flat(values: Any, prefix: str = "") -> list[str]:
        lines = []
        for key, value in values.items():
            if isinstance(value, dict):
                lines += flat(value, f"{prefix}{key} ")
            else:
                lines.append(f"| {prefix}{key} | {value} |")
        return lines

    return flat(files.read_json(found[0]))
