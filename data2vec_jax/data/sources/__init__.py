"""Where examples come from: random access to real files, one small dict per example.

    from data2vec_jax.data.codecs import image
    source = open_source("folder:/data/imagenet", "train", codec=image.codec())
    source[7]  # {'image': uint8 [H, W, 3], 'label': 0, 'path': 'n01440764/x.JPEG'}

| address                        | is                                                            |
| ------------------------------ | ------------------------------------------------------------- |
| `folder:DIR`                   | every audio file, image or *.txt below DIR                    |
| `manifest:FILE`                | a wav2vec manifest, or a TSV, CSV or JSONL table              |
| `array_record:DIR` or `:GLOB`  | ArrayRecord files made by `write_array_record`                |
| `tfds:NAME[/CONFIG][:VERSION]` | a data set that TFDS has prepared on this machine (not more:  |
| or `tfds:DIR`                  | nothing is fetched)                                           |
| `webdataset:TARS`              | the samples of tars: TARS is one, a glob, or `x-{00..99}.tar` |
| `mix:3*ADDRESS;1*ADDRESS`      | several of these, with weights                                |
| `samples:NAME`                 | the real samples shipped with a modality                      |
| `librispeech:DIR`, ...         | sets as their authors ship them                               |

DIR, FILE, GLOB and TARS of the first three and of `webdataset:` may be remote: `gs://bucket/photos`,
`s3://...`, by fsspec (see `data.places`). ArrayRecord and tars are copied to this machine, once.

The last two belong to modalities: `modalities/NAME/samples.py` and `modalities/NAME/published.py`
hold their openers, which the modality's codec names (`Codec.kinds`).

Items hold what the codec decodes (audio, image, text) and, where the data has them: label (an int,
index into `source.label_names`; or a float; None in a row of a table without one), path, and every
other column or feature as it stands (transcript, ...).

Nothing is decoded before it is asked for, nothing is ever resampled, and what is wrong with the
data is a `UserError` that names the file. Sources can be pickled and read from many threads.
"""

import itertools
import os
from collections.abc import Callable, Sequence

from data2vec_jax.core.errors import UserError, nearest
from data2vec_jax.data.codecs.base import Codec
from data2vec_jax.data.places import is_remote
from data2vec_jax.data.sources.array_record import (
    decode_example,
    encode_example,
    open_array_record,
    write_array_record,
)
from data2vec_jax.data.sources.base import Address, Source, Subset, published
from data2vec_jax.data.sources.folder import open_folder, subfolders
from data2vec_jax.data.sources.labels import (
    UNKNOWN,
    by_name,
    check_classes,
    check_field,
    class_of,
    index_labels,
)
from data2vec_jax.data.sources.manifest import open_manifest
from data2vec_jax.data.sources.mixture import Mixture, parts_of
from data2vec_jax.data.sources.table import TableSource, rows_of_split
from data2vec_jax.data.sources.tfds import open_tfds
from data2vec_jax.data.sources.webdataset import open_webdataset

__all__ = [
    "UNKNOWN",
    "Address",
    "Source",
    "Subset",
    "TableSource",
    "by_name",
    "check_classes",
    "check_field",
    "check_held_out",
    "class_of",
    "decode_example",
    "encode_example",
    "index_labels",
    "open_named",
    "open_source",
    "published",
    "rows_of_split",
    "subfolders",
    "write_array_record",
]


def open_mixture(address: Address) -> Mixture:
    """`mix:WEIGHT*ADDRESS;WEIGHT*ADDRESS`: one source of several."""
    options = address.codec, address.label_names, address.key, address.tolerant
    parts = parts_of(address.uri, address.place, address.split)
    opened = [open_named(uri, split, *options) for _, uri, split in parts]
    return Mixture(address.uri, address.split, opened, [weight for weight, *_ in parts])


# Kinds of addresses of every codec -> opener, and the options that it takes.
OPENERS: dict[str, tuple[Callable[[Address], Source], tuple[str, ...]]] = {
    "folder": (open_folder, ()),
    "manifest": (open_manifest, ("key", "columns")),
    "array_record": (open_array_record, ("key",)),
    "tfds": (open_tfds, ("key", "data_dir")),
    "webdataset": (open_webdataset, ()),
    "mix": (open_mixture, ("key",)),
}
REMOTE = "folder", "manifest", "array_record", "webdataset", "mix"  # their places may be so
FOUND = "folder", "manifest", "webdataset", "mix"  # classes are those found, unless given


def open_source(
    uri: str,
    split: str = "train",
    *,
    codec: Codec,
    label_names: Sequence[str] | None = None,
    key: str | None = None,
    columns: Sequence[str] | None = None,
    data_dir: str | None = None,
    tolerant: bool = False,
) -> Source:
    """The examples at an address.

    uri: see the table at the top of this file.
    split: folder: the subfolder of that name, or DIR itself if it has none of train, val, valid,
      validation, dev, test. manifest: rows whose column `split` says so, or all if there is no
      such column; `a+b` joins (samples too). array_record: files of DIR whose names start with
      it. FILE, GLOB and TARS may hold `{split}`. tfds: also `train[:10%]` and `a+b`. mix: of all,
      or `a;b`, one for each, empty where there is none.
    codec: how the signal is decoded, such as a modality's `codec`.
    label_names: order of the classes; by default as found. Give a test set those of the train set
      if it is a file of its own. Empty, (): the labels are numbers, not classes.
    key: column or feature that holds the signal (for tables: its path, or the text).
    columns: manifest: names of the columns, for tables without a first line of names.
    data_dir: tfds: where NAME was prepared; default $TFDS_DATA_DIR or ~/tensorflow_datasets.
    tolerant: folder, manifest, webdataset: examples of classes that are not in `label_names` are
      bad, see `UNKNOWN`, rather than an error.
    Raises UserError: the kind, folder, file, split, option or label does not exist, a folder is
      empty, or a line of a manifest is malformed or points to a missing file.
    """
    kind, colon, place = uri.partition(":")
    openers = {**OPENERS, **{name: (opener, ()) for name, opener in codec.kinds.items()}}
    if kind not in openers or not colon:
        hint = nearest(kind, openers)
        if kind in openers:
            hint = f"; it is followed by a colon and a place: {kind}:PLACE"
        elif not colon and os.path.exists(os.path.expanduser(uri)):
            hint = f"; did you mean 'folder:{uri}' or 'manifest:{uri}'?"
        raise UserError(f"data source '{uri}': unknown kind '{kind}' for {codec.field}{hint}")
    opener, takes = openers[kind]
    options = {"key": key, "columns": columns, "data_dir": data_dir}
    for name, value in options.items():
        if name not in takes and value is not None:
            raise UserError(f"{uri}: '{name}' is not an option of {kind}:")
    if is_remote(place) and kind not in REMOTE:
        raise UserError(f"{uri}: is read from this machine only; remote are {', '.join(REMOTE)}")
    place = os.path.expanduser(place)
    return opener(Address(uri, place, split, codec, label_names, **options, tolerant=tolerant))


def open_named(
    uri: str,
    split: str,
    codec: Codec,
    names: Sequence[str] | None,
    key: str | None = None,
    tolerant: bool = False,
) -> Source:
    """`open_source` with classes that are known already, unless the data has its own."""
    own = uri.partition(":")[0] not in FOUND
    names = None if own else names
    return open_source(uri, split, codec=codec, key=key, label_names=names, tolerant=tolerant)


def check_held_out(source: Source, held_out: Source, otherwise: str) -> None:
    """Refuses a split of another name that has the examples of `source`, as it has where a folder
    or a table knows no splits.

    otherwise: what else the user can do, '' or 'or ...'. Raises UserError.
    """
    for part, train in itertools.product(held_out.parts, source.parts):
        if part.split != train.split and train.rows and part.rows == train.rows:
            raise UserError(
                f"config.data.eval_split: '{part.split}' of {part.uri} is the training "
                "examples themselves; name others (a folder, a file or a column `split` for each "
                f"split), {otherwise}"
            )
