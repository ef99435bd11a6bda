"""Writes a checkpoint in any layout."""

import re
from dataclasses import dataclass, replace
from pathlib import Path

from data2vec_jax.convert import card, layouts, ours, peft, pickles
from data2vec_jax.convert.layouts import Config, Layout
from data2vec_jax.convert.ours import Checkpoint
from data2vec_jax.convert.tables import Entry, entries_of, plan_write
from data2vec_jax.core import files, safetensors
from data2vec_jax.core.errors import UserError, nearest
from data2vec_jax.modalities import contract

TARGETS = ("jax", "hf", "fairseq", "peft")


@dataclass(frozen=True)
class Written:
    """Result of an export."""

    entries: list[Entry]
    """Tensors of the target, by their names there."""
    dropped: dict[str, str]
    """Our path that the target cannot store -> the reason."""


def layout_for(config: Config, to: str) -> Layout:
    """The layout that a converted config is written in. Raises UserError: there is none."""
    origin = (config.get("origin") or {}).get("layout")
    found = [x for x in layouts.layouts() if x.to == to and x.modality == config["modality"]]
    fitting = [layout for layout in found if layout.holds(config)]
    if not fitting:
        raise UserError(f"--to={to}: there is no layout for this {config['modality']} model")
    return next((layout for layout in fitting if layout.name == origin), fitting[0])


def export(checkpoint: Checkpoint, target: Path, to: str) -> Written:
    """Writes `target`, a folder or (for 'fairseq') a file, complete or not at all.

    Adapters go along to 'jax'; 'peft' is them alone; for the others they are merged.
    """
    if to not in TARGETS:
        raise UserError(f"--to={to}: no such target{nearest(to, TARGETS)}")
    if to == "jax":
        ours.save(checkpoint, target)
        return Written(checkpoint.entries, {})
    if to == "peft":
        return export_adapter(checkpoint, target)
    checkpoint = merged(checkpoint)
    layout = layout_for(checkpoint.config, to)
    described = layout.describe(checkpoint.config)
    written = tensors(checkpoint, layout)
    if layout.kind == "pickle":
        tree = layout.store({x.name: x for x in written.entries}, checkpoint.config)
        with files.new_target(target) as draft:
            pickles.write(draft, tree | described)
        return written
    with files.new_target(target) as draft:
        draft.mkdir()
        files.write_json(draft / "config.json", described)
        safetensors.write_safetensors(
            draft / "model.safetensors", written.entries, {"format": "pt"}
        )
        write_processor(checkpoint, draft)
        if layout.beside:
            layout.beside(checkpoint, draft)
        (draft / "README.md").write_text(card.card(checkpoint, layout, described), "utf-8")
    return written


def write_processor(checkpoint: Checkpoint, folder: Path) -> None:
    """Copies the checkpoint's processor files, and adds those that its modality can derive."""
    ours.copy(checkpoint.processors, folder)
    config = checkpoint.config
    modality = contract.get(config["modality"])
    if modality.write_processor is not None:
        modality.write_processor(config, ours.model_of(config), folder)


def merged(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with its adapters, if it has some, merged into the kernels."""
    config, entries = peft.merge(checkpoint.config, checkpoint.entries)
    return replace(checkpoint, config=config, entries=entries)


def export_adapter(checkpoint: Checkpoint, target: Path) -> Written:
    """Writes a folder of PEFT's: the adapters, and other tensors that were trained with them."""
    if not checkpoint.config.get("adapters"):
        raise UserError(f"--to=peft: {checkpoint.path} has no adapters")
    kept = [x for x in checkpoint.entries if not x.name.startswith(peft.OURS)]
    layout = layout_for(checkpoint.config, "hf")
    base = tensors(replace(checkpoint, entries=kept), layout)
    config, table = checkpoint.config, layout.table(checkpoint.config)
    if "saved" not in config["adapters"]:  # ours: the head was trained beside them
        head = [x.name for x in base.entries if any(s.startswith("task/") for s in x.sources)]
        config = {
            **config,
            "adapters": {**config["adapters"], "saved": dict(zip(head, head, strict=True))},
        }
    entries = peft.tensors(config, checkpoint.entries, base.entries, table)
    (base_class,) = layout.describe(checkpoint.config)["architectures"]
    described = peft.describe(config, table, base_class)
    with files.new_target(target) as draft:
        draft.mkdir()
        files.write_json(draft / peft.CONFIG, described)
        safetensors.write_safetensors(draft / peft.WEIGHTS[0], entries, {"format": "pt"})
    reason = "of the base model, which an adapter leaves as it is"
    used = {name for entry in entries for name in entry.sources}
    return Written(entries, {x.name: reason for x in kept if x.name not in used})


def tensors(checkpoint: Checkpoint, layout: Layout) -> Written:
    """The checkpoint's tensors under the layout's names."""
    kept, dropped, config = [], {}, checkpoint.config
    for entry in layout.fit(checkpoint.entries):
        reasons = [r for pattern, r in layout.drops.items() if re.search(pattern, entry.name)]
        if reasons:
            dropped[entry.name] = reasons[0]
        else:
            kept.append(entry)
    made = {entry.name: entry for entry in plan_write(layout.table(config), kept)}
    made |= {entry.name: entry for entry in entries_of(layout.constants(config))}
    renamed = layout.rename_back(made, config)
    return Written([entry._replace(name=name) for name, entry in renamed.items()], dropped)
