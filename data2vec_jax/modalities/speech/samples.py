"""`samples:speech`: 16 minutes of read Russian with aligned phones (splits train, test)."""

import dataclasses
from pathlib import Path

from data2vec_jax.core.errors import UserError, nearest
from data2vec_jax.data.sources import Address, TableSource
from data2vec_jax.data.sources.manifest import open_manifest

SAMPLES = Path(__file__).parent / "sample_data"


def open_samples(address: Address) -> TableSource:
    """Items hold transcript, and phones: a list of (start second, end second, name).

    `label_names` are the phones.
    """
    if address.place != "speech":
        hint = nearest(address.place, ["speech"])
        raise UserError(f"{address.uri}: no samples '{address.place}'{hint}")
    folder = SAMPLES / "speech"
    source = open_manifest(dataclasses.replace(address, place=str(folder / "manifest.tsv")))
    alignment = {}
    lines = (folder / "phones.tsv").read_text(encoding="utf-8").splitlines()
    for path, ends, phones in (line.split("\t") for line in lines[1:]):
        times = [0.0, *map(float, ends.split())]
        alignment[path] = list(zip(times, times[1:], phones.split(), strict=False))
    names = sorted({phone for rows in alignment.values() for _, _, phone in rows})
    return source.with_columns({"phones": [alignment[p] for p in source.column("path")]}, names)
