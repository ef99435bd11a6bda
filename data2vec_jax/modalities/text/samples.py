"""`samples:glosses`: 20,000 WordNet glosses, 45 classes (splits train, test, extra)."""

import dataclasses
from pathlib import Path

from data2vec_jax.core.errors import UserError, nearest
from data2vec_jax.data.sources import Address, TableSource
from data2vec_jax.data.sources.manifest import open_manifest

SAMPLES = Path(__file__).parent / "sample_data"


def open_samples(address: Address) -> TableSource:
    """`samples:glosses`."""
    if address.place != "glosses":
        hint = nearest(address.place, ["glosses"])
        raise UserError(f"{address.uri}: no samples '{address.place}'{hint}")
    table = SAMPLES / "glosses" / "glosses.tsv.gz"
    return open_manifest(dataclasses.replace(address, place=str(table)))
