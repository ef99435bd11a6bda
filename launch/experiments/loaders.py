"""Files and figures for docs/performance.md, "From files to batches".

    python launch/experiments/loaders.py photos DIR     # 512 JPEGs of 500 x 375 pixels
    python launch/experiments/loaders.py index DIR      # memory of an index of ten million examples
    python launch/experiments/loaders.py epochs [SOURCE [CONFIG]]  # memory after each of ten epochs
    python launch/experiments/loaders.py measure DIR    # all modalities beside PyTorch; DIR: photos
    python launch/experiments/loaders.py table          # of what was measured and is planned

`index` writes a manifest of ten million rows over ten thousand files, and ten ArrayRecord shards of
a million records, once; `--rows=N` makes it smaller. `measure` runs `bench --data-only --peer` five
times, 10 minutes in all, keeps what it says as loaders/NAME.json beside this file, and writes the
table.
"""

import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import plans
from pages import fill

from data2vec_jax.bench import loader
from data2vec_jax.cli.arguments import Arguments, find_config
from data2vec_jax.cli.output import run_main
from data2vec_jax.core.errors import UserError
from data2vec_jax.core.files import read_json, write_json
from data2vec_jax.data import batches, sources
from data2vec_jax.modalities import contract
from data2vec_jax.tasks import pretrain

RESULTS = ROOT / "launch/experiments/loaders"
# Recipe -> options beside `--data-only --peer`; {photos} is a folder.
ROWS = {
    "speech_v2": "--config.data.source=samples:speech",
    "sound_v2": "--config.data.source=samples:sounds --config.data.split=train",
    "vision_v1": "--config.data.source=folder:{photos} --batch=16",
    "vision_v2": "--config.data.source=folder:{photos} --batch=16",
    "text_v2": "--config.data.source=samples:glosses --config.model.vocab_size=4000 "
    "--config.examples.vocab_size=4000 --batch=64",
}
DEVICES = "h100_8", "v5e_16x16"  # as the names of plans have them
PARTS = "read", "decode", "augment", "collate"
CROPS = (4.0, 8.0, 12.0, 15.0)  # of speech_v2:base
SHARDS = 10


def memory() -> dict[str, float]:
    """Megabytes (10^6) that this process holds, and held at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    sizes = dict(line.split(":", 1) for line in lines)
    return {k: 1024 * int(sizes[k].split()[0]) / 1e6 for k in ("VmRSS", "VmHWM")}


def told(name: str) -> None:
    """Prints the memory now."""
    found = memory()
    print(f"{name:24} {found['VmRSS']:7.0f} MB, at most {found['VmHWM']:7.0f} MB", flush=True)


def photos(folder: Path, count: int = 512) -> None:
    """Crops of scikit-learn's two photos at random sizes, resized to 500 x 375, of quality 92."""
    from PIL import Image
    from sklearn.datasets import load_sample_images

    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(image) for image in load_sample_images().images]
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        picture, share = pictures[i % 2], rng.uniform(0.6, 1.0)
        w, h = int(picture.width * share), int(picture.width * share * 0.6)
        left, top = rng.integers(picture.width - w + 1), rng.integers(picture.height - h + 1)
        picture = picture.crop((left, top, left + w, top + h)).resize((500, 375))
        picture.save(folder / f"{i:04}.jpg", quality=92)


def write_manifest(folder: Path, rows: int) -> Path:
    """A table of `rows` rows over ten thousand empty files, as long names as LibriSpeech's."""
    table = folder / f"manifest_{rows}.tsv"
    if table.exists():
        return table
    names = [f"{f:04}/{f:06}/{f:04}-{f:06}-{i:04}.flac" for f in range(100) for i in range(100)]
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    with open(folder / "partial", "w") as file:
        file.write("path\tsamples\n")
        for i in range(rows):
            file.write(f"{names[i % len(names)]}\t{64_000 + i * 7919 % 192_000}\n")
    return (folder / "partial").rename(table)


def write_shards(folder: Path, rows: int) -> None:
    """Shards of records as small as can be, with lengths beside them."""
    for n in range(SHARDS):
        path = folder / f"train-{n}.array_record"
        count = rows // SHARDS
        lengths = Path(f"{path}.lengths.npy")
        if lengths.exists() and len(np.load(lengths, mmap_mode="r")) == count:
            continue
        sources.write_array_record(path, ({"audio_bytes": b""} for _ in range(count)))
        np.save(lengths, 64_000 + np.arange(count) * 7919 % 192_000)


def index(address: str) -> None:
    """Opens a corpus as `train` does, and draws the order of two epochs."""
    modality = contract.get("speech")
    told("imports")
    source = sources.open_source(address, codec=modality.codec)
    told("source")
    examples = modality.examples(source, crops=CROPS)
    plan = batches.TrainSampler(examples.bucket_of, examples.layout.buckets, 32, 1, 8)
    plan(0)
    told("first epoch")
    plan(plan.per_epoch)
    told("second epoch")
    print(f"{len(source):,} examples, digest {source.digest()} {plan.digest()}")
    told("digest")


def epochs(address: str, name: str, count: int = 10) -> None:
    """Reads all batches of ten epochs by two processes, and says what is held after each."""
    import jax
    from absl import flags
    from ml_collections import config_flags

    from data2vec_jax.core import sharding

    values = flags.FlagValues()
    argument = f"--config={find_config(name)}"
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=["", argument])
    values(["", argument])
    config = values.config.to_dict()
    config["data"] |= {"source": address, "workers": 2}
    with jax.set_mesh(sharding.make_mesh(devices=jax.devices()[:1])):
        _, examples, plan = pretrain.open_examples(config)
        options = pretrain.DataConfig(**config["data"])
        stop = count * plan.per_epoch
        for n, _ in enumerate(pretrain.placed(plan, examples, options, 0, stop), 1):
            if n % plan.per_epoch == 0:
                told(f"epoch {n // plan.per_epoch}, {len(examples.bucket_of)} examples")


def measure(photos: str) -> None:
    """Runs the benchmark of each row, on this machine."""
    RESULTS.mkdir(exist_ok=True)
    for name, options in ROWS.items():
        path = RESULTS / f"{name}.json"
        words = [word.format(photos=Path(photos).resolve()) for word in options.split()]
        words = [f"--config={name}:base", *words]
        command = [sys.executable, "-m", "data2vec_jax.bench", *words, f"--json={path}"]
        subprocess.run([*command, "--data-only", "--peer"], cwd=ROOT, check=True)
        write_json(path, read_json(path) | {"date": time.strftime("%Y-%m-%d")})


def feeding(result: Mapping[str, Any], plan: Mapping[str, Any] | None) -> str:
    """How many of the measured cores feed a device at the planned step."""
    if plan is None:
        return "no plan"
    rows = plan["batch_size"] / plan["devices"]
    return f"{loader.feeding(result, plan['step_seconds_estimate'], rows)['cores']:.2g}"


def table() -> str:
    """The rows of docs/performance.md."""
    lines = [
        "| data, and options beside `--data-only --peer` | measured on "
        "| ms: read, decode, augment, collate | examples/s of one core, PyTorch's, ratio "
        "| of 2 cores, PyTorch's | cores for an H100, a v5e |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    planned = plans.known()
    for name, options in ROWS.items():
        if not (RESULTS / f"{name}.json").exists():
            continue
        found = read_json(RESULTS / f"{name}.json")
        peer, both = found["peer"], [found, found["peer"]]
        parts = (found["seconds_of_parts"][part] for part in PARTS)
        one = ", ".join(f"{side['examples_per_second_of_a_core']:,.0f}" for side in both)
        blocks = peer["ratio_of_blocks"]
        cells = (
            f"`--config={name}:base {options.format(photos='/tmp/photos')}`",
            found["date"],
            ", ".join(f"{1e3 * x:.2g}" for x in parts),
            f"{one}, {peer['ratio']:.2f} ({min(blocks):.2f} to {max(blocks):.2f})",
            ", ".join(f"{max(side['examples_per_second'].values()):,.0f}" for side in both),
            ", ".join(feeding(found, planned.get(f"{name}_base-1x{t}")) for t in DEVICES),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = Arguments(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("photos", "index", "epochs", "measure", "table"))
    parser.add_argument("rest", nargs="*")
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--kind", choices=("manifest", "array_record"), default="manifest")
    a = parser.parse_args()
    if a.what not in ("epochs", "table") and not a.rest:
        raise UserError(f"{a.what}: DIR is missing")
    if a.what == "photos":
        photos(Path(a.rest[0]))
    elif a.what in ("measure", "table"):
        if a.what == "measure":
            measure(a.rest[0])
        fill(plans.PERFORMANCE, {"loaders": table()})
    elif a.what == "epochs":
        source, config, *_ = [*a.rest, *("samples:speech", "speech_v2:smoke")[len(a.rest) :]]
        epochs(source, config)
    else:
        folder = Path(a.rest[0])
        folder.mkdir(parents=True, exist_ok=True)
        if a.kind == "manifest":
            index(f"manifest:{write_manifest(folder, a.rows)}")
        else:
            write_shards(folder, a.rows)
            index(f"array_record:{folder}")


if __name__ == "__main__":
    run_main(main)
