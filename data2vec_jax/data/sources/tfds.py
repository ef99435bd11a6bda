"""`tfds:NAME`: data sets prepared as ArrayRecord. TensorFlow is not needed, and never imported."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data2vec_jax.core.errors import UserError, nearest
from data2vec_jax.data.codecs.base import Codec, Item, unreadable
from data2vec_jax.data.sources.base import Address, Source
from data2vec_jax.data.sources.folder import subfolders


class TfdsSource(Source):
    """A split of a prepared TFDS data set. Raw audio carries no rate: the codec's is believed."""

    def __init__(
        self,
        uri: str,
        split: str,
        codec: Codec,
        data: Any,
        label_names: Sequence[str] | None = None,
        key: str | None = None,
    ):
        super().__init__(uri, split, codec, label_names)
        self._data, self._key = data, key

    def __len__(self) -> int:
        return len(self._data)

    def _load(self, i: int) -> Item:
        name = self.location(i)
        try:
            item = dict(self._data[i])
        except Exception as error:  # whatever TFDS's decoders stumble over
            raise unreadable(name, "example", error) from error
        item = {
            n: v.item() if np.ndim(v) == 0 and hasattr(v, "item") else v for n, v in item.items()
        }
        return self.codec.decode_record(item, name, self._key)


def open_tfds(address: Address) -> TfdsSource:
    """`tfds:NAME` below `data_dir`, or `tfds:DIR`."""
    import tensorflow_datasets as tfds

    uri, place, split = address.uri, address.place, address.split
    if os.path.isabs(place) or place.startswith("."):
        folder = Path(place)
    else:
        default = os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")
        parent = Path(address.data_dir or default).expanduser()
        folder = parent / place.replace(":", "/")
        if not folder.is_dir():
            prepared = subfolders(parent) if parent.is_dir() else []
            hint = nearest(place, prepared) if prepared else ""
            raise UserError(
                f"{uri}: no data set '{place}' is prepared in '{parent}', and none is fetched{hint}"
            )
    builder = tfds.builder_from_directory(prepared_folder(folder, uri))
    try:
        data = builder.as_data_source(split)
    except RuntimeError as error:  # not implemented for this format
        form = builder.info.file_format
        raise UserError(
            f"{uri}: is stored as {form and form.value}, which has no random access; "
            "prepare it with file_format='array_record'"
        ) from error
    except (ValueError, KeyError) as error:
        raise UserError(
            f"{uri}: no split '{split}'{nearest(split, builder.info.splits)}"
        ) from error
    label_names = address.label_names
    if label_names is None:
        features = builder.info.features
        label_names = getattr(features["label"], "names", None) if "label" in features else None
    return TfdsSource(uri, split, address.codec, data, label_names, address.key)


def prepared_folder(folder: Path, uri: str) -> Path:
    """The folder with dataset_info.json in or below `folder`: the only config, newest version."""
    if not folder.is_dir():
        raise UserError(f"{uri}: no folder '{folder}'")
    if (folder / "dataset_info.json").is_file():
        return folder
    versions = [path.parent for path in folder.glob("*/dataset_info.json")]
    if versions:
        return max(versions, key=lambda path: [int(n) for n in re.findall(r"\d+", path.name)])
    configs = sorted({path.parent.parent for path in folder.glob("*/*/dataset_info.json")})
    if len(configs) > 1:
        names = ", ".join(path.name for path in configs)
        raise UserError(f"{uri}: '{folder}' has several configs, name one of {names}")
    if not configs:
        raise UserError(f"{uri}: no prepared data set (dataset_info.json) in '{folder}'")
    return prepared_folder(configs[0], uri)
