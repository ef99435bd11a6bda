"""Published data sets of images, in the folders and files that their authors ship, and scores.

| address        | DIR holds                                      | splits     |
| -------------- | ---------------------------------------------- | ---------- |
| `imagenet:DIR` | ILSVRC 2012: torchvision's or Kaggle's folders | train, val |
|                | or the authors' ILSVRC2012_img_*.tar           |            |
"""

import os
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data2vec_jax.core.errors import UserError, nearest
from data2vec_jax.data.codecs import unreadable
from data2vec_jax.data.codecs.text import read_lines
from data2vec_jax.data.sources import Address, TableSource, index_labels, published, subfolders
from data2vec_jax.data.sources.stored import FilePart

# Accuracies of the papers on ImageNet's validation images, in per cent, by version and width (base,
# large); as they are known to us, not checked against the papers again.
ACCURACIES = {("1.0", 768): 84.2, ("1.0", 1024): 86.6, ("2.0", 768): 84.5, ("2.0", 1024): 86.8}


@published
def open_imagenet(address: Address) -> TableSource:
    """Classes are the folders of `train`, sorted (n01440764 is 0).

    Images of `val` may be in such folders too, or all in one, with their classes in Kaggle's
    `LOC_val_solution.csv` or in the authors' `ILSVRC2012_devkit_t12`, beside it or in DIR.
    """
    uri, place, split = address.uri, address.place, address.split
    if split not in ("train", "val"):
        raise UserError(f"{uri}: no split '{split}'{nearest(split, ('train', 'val'))}")
    tops = Path(place), Path(place, "ILSVRC/Data/CLS-LOC")
    if (tar := Path(place, f"ILSVRC2012_img_{split}.tar")).is_file():
        return open_tar(address, tar)
    top = next((path for path in tops if (path / split).is_dir()), None)
    if top is None:
        raise UserError(f"{uri}: no folder '{split}' in '{place}'")
    folder = top / split
    names = subfolders(top / "train") if (top / "train").is_dir() else []
    names = names or subfolders(folder)
    if subfolders(folder):
        pairs = [
            (f"{name}/{image}", name)
            for name in subfolders(folder)
            for image in images_in(folder / name, address.codec.suffixes)
        ]
    else:
        classes, names = validation_classes((Path(place), top), names, uri)
        pairs = []
        for image in images_in(folder, address.codec.suffixes):
            stem = Path(image).stem
            if stem not in classes:
                raise UserError(f"{folder / image}: no class is known for this image")
            pairs.append((image, classes[stem]))
    if not pairs:
        raise UserError(f"{uri}: no images in '{folder}'")
    labels, names = index_labels([name for _, name in pairs], names, uri)
    columns = {"path": [path for path, _ in pairs], "label": labels}
    return TableSource(uri, split, address.codec, columns, root=str(folder), label_names=names)


def open_tar(address: Address, tar: Path) -> TableSource:
    """The authors' tar of `val`, or that of `train`, which holds a tar of each class. Images stay
    in it, and are read from their places."""
    paths, parts, classes = [], [], []
    try:
        with tarfile.open(tar, "r:") as outer:
            for member in outer:
                inner, start = [member], 0
                if member.isfile() and member.name.endswith(".tar"):
                    start = member.offset_data
                    with tarfile.open(fileobj=outer.extractfile(member), mode="r:") as of_class:
                        inner = list(of_class)
                for one in inner:
                    if not one.isfile() or not one.name.lower().endswith(address.codec.suffixes):
                        continue
                    paths.append(one.name)
                    parts.append(FilePart(str(tar), start + one.offset_data, one.size))
                    classes.append(Path(member.name).stem)
    except (tarfile.TarError, OSError) as error:
        raise unreadable(str(tar), "tar", error) from error
    names = sorted(set(classes))
    if address.split == "val":
        known, names = validation_classes((tar.parent,), (), address.uri)
        unknown = next((stem for stem in classes if stem not in known), None)
        if unknown:
            raise UserError(f"{tar}/{unknown}: no class is known for this image")
        classes = [known[stem] for stem in classes]
    labels, names = index_labels(classes, names, address.uri)
    return TableSource(
        address.uri,
        address.split,
        address.codec,
        {"path": paths, "label": labels},
        root=str(tar),
        parts=parts,
        label_names=names,
    )


def images_in(folder: Path, suffixes: tuple[str, ...]) -> list[str]:
    """Names of the images in a folder, sorted."""
    return sorted(name for name in os.listdir(folder) if name.lower().endswith(suffixes))


def validation_classes(
    folders: Sequence[Path], names: Sequence[str], uri: str
) -> tuple[dict[str, str], list[str]]:
    """Stem of each validation image -> its class; and all classes, sorted."""
    for folder in folders:
        solution, kit = folder / "LOC_val_solution.csv", folder / "ILSVRC2012_devkit_t12" / "data"
        if solution.is_file():
            classes = {}
            for number, line in enumerate(read_lines(solution, uri)[1:], 2):
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


def published_scores(config: Mapping[str, Any], split: str, metric: str) -> float | None:
    """The paper's score of a fine-tuning config's task in per cent, None if it has none."""
    model = config["model"]
    if config["data"]["source"].startswith("imagenet:") and metric == "accuracy":
        version = "2.0" if model.get("sincos") else "1.0"  # which positions tell apart
        return ACCURACIES.get((version, model["width"]))
    return None
