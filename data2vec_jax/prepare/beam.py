"""The shards of a corpus by Apache Beam: `--runner=direct`, `prism`, `dataflow`, `flink`, ...

The elements of the pipeline are names of shards. Their blocks lie in the target, so none is too
large for a runner, and nothing but the target and the corpus must be seen by all workers. A worker
makes a shard as a local process does, and leaves its report in the target, too.
"""

import contextlib
import io
import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from data2vec_jax.cli.output import one_line
from data2vec_jax.core.errors import ExampleError, UserError
from data2vec_jax.data import places
from data2vec_jax.data.sources import shards
from data2vec_jax.prepare.corpus import Block
from data2vec_jax.prepare.shards import ShardMaker

# Beam's `DirectRunner` would first download a program, and takes this runner if it cannot. Threads,
# as Ctrl-C in the command's own is a fault of the pipeline to it.
DIRECT = "--runner=FnApiRunner", "--direct_running_mode=multi_threading"


def beam_map(
    runner: str, options: Sequence[str]
) -> Callable[[ShardMaker, Iterable[Block]], Iterator[dict[str, Any]]]:
    """The `map` of `make_shards` by a runner of Beam; its reports come when all are made.

    options: Beam's own, such as --project=NAME. Raises UserError: Beam is not installed, or does
    not know the runner or an option's value.
    """
    try:
        import apache_beam
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError:
        raise UserError("--runner needs a package: pip install apache-beam") from None
    direct = runner.lower() in ("direct", "directrunner")
    chosen, usage = DIRECT if direct else (f"--runner={runner}",), io.StringIO()
    try:
        with contextlib.redirect_stderr(usage):  # argparse writes all options, and exits
            given = PipelineOptions([*chosen, *options])
            given.get_all_options()  # reads them
        pipeline = apache_beam.Pipeline(options=given)
    except (Exception, SystemExit) as error:
        text = usage.getvalue().strip().rpartition("error: ")[2] or " ".join(str(error).split())
        raise UserError(f"--runner={' '.join((runner, *options))}: {text}") from None

    def mapped(make: ShardMaker, work: Iterable[Block]) -> Iterator[dict[str, Any]]:
        names = [store(make, block) for block in work]
        make_all = apache_beam.Map(make_stored, make)
        _ = pipeline | apache_beam.Create(names) | "make shards" >> make_all
        try:
            result = pipeline.run()
            try:
                result.wait_until_finish()
            except KeyboardInterrupt:
                result.cancel()  # workers elsewhere would go on
                raise
        except Exception as error:
            raise UserError(f"--runner={runner}: {one_line(error)}") from error
        for name in names:
            if places.stat(block_place(make, name), fresh=True):  # as other machines see it
                text = f"no worker has made {name}; do they all see {make.folder}?"
                raise UserError(f"--runner={runner}: {text}")
            yield places.read_json(places.join(reports_of(make), name))

    return mapped


def reports_of(make: ShardMaker) -> str:
    """The folder of the target in which reports lie, and blocks until a worker has made them."""
    return places.join(make.folder, shards.UNFINISHED)


def block_place(make: ShardMaker, name: str) -> str:
    """Where the block of a shard lies."""
    return places.join(reports_of(make), f"{name}.block")


def store(make: ShardMaker, block: Block) -> str:
    """Stores a block for the workers; the name of its shard."""
    with places.written(reports_of(make)) as folder:
        (folder / f"{block.name}.block").write_bytes(pickle.dumps(block))
    return block.name


def make_stored(name: str, make: ShardMaker) -> None:
    """In a worker: makes the shard `name`. Beam may ask for one again, or twice at a time."""
    place = block_place(make, name)
    try:
        block = pickle.loads(places.read(place))
    except ExampleError as error:
        if error.reason == "missing":  # another worker has made it
            return
        raise
    make(block)
    with contextlib.suppress(UserError, FileNotFoundError):  # another was faster
        places.remove(place)
