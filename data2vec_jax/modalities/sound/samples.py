"""`samples:sounds`: 72 seconds of eight instruments (splits train, test)."""

import dataclasses
from pathlib import Path

from data2vec_jax.core.errors import UserError, nearest
from data2vec_jax.data.sources import Address, TableSource
from data2vec_jax.data.sources.manifest import open_manifest

SAMPLES = Path(__file__).parent / "sample_data"


def open_samples(address: Address) -> TableSource:
    """Pieces of 2 s; the class is the instrument."""
    if address.place != "sounds":
        hint = nearest(address.place, ["sounds"])
        raise UserError(f"{address.uri}: no samples '{address.place}'{hint}")
    manifest = SAMPLES / "sounds" / "manifest.tsv"
    return open_manifest(dataclasses.replace(address, place=str(manifest)))
