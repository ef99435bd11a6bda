"""Many processes, one run: join, agree, stop together, fail together.

All processes call the same functions in the same order. In a run of one process they do nothing.
"""

import contextlib
import hashlib
import json
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from data2vec_jax.core.config import differences
from data2vec_jax.core.errors import UserError

SHUTDOWN_SECONDS = 15  # for all processes to end, after they have met
MEETING_SECONDS = 3600  # a process that died ends the run long before
GRACE_SECONDS = 2  # for all processes to print why they end


def start() -> None:
    """Joins the run that the environment names; a run of one process if it names none.

    COORDINATOR_ADDRESS is `host:port` of process 0, with NUM_PROCESSES and PROCESS_ID beside it, or
    `auto` where JAX finds all three itself: TPU pods, Slurm, Kubernetes, Open MPI.
    """
    address = os.environ.get("COORDINATOR_ADDRESS")
    if not address:
        return
    options: dict[str, Any] = {}
    if address != "auto":
        options["coordinator_address"] = address
        for option, name in (("num_processes", "NUM_PROCESSES"), ("process_id", "PROCESS_ID")):
            value = os.environ.get(name, "")
            if not value.isdecimal():
                raise UserError(f"COORDINATOR_ADDRESS is set, but {name} is '{value}', no number")
            options[option] = int(value)
    try:
        jax.distributed.initialize(**options, shutdown_timeout_seconds=SHUTDOWN_SECONDS)
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"cannot join the run at COORDINATOR_ADDRESS={address}: {reason}") from None


def is_main_process() -> bool:
    """Whether this process is the one that writes logs and speaks to the user."""
    return jax.process_index() == 0


def check_agreement(what: Mapping[str, Any]) -> None:
    """Refuses to go on if the processes do not hold the same `what`, a JSON object.

    Raises:
      UserError: on every process, naming the first key that differs.
    """
    if jax.process_count() == 1:
        return
    own = json.dumps(what, sort_keys=True)
    digest = np.frombuffer(hashlib.sha256(own.encode()).digest(), np.uint8)
    digests = multihost_utils.process_allgather(digest)  # [P, 32]
    others = np.flatnonzero((digests != digests[0]).any(axis=1))
    if not others.size:
        return
    texts = gather_texts(own)
    first_json, other_json = (json.loads(texts[i]) for i in (0, others[0]))
    path = differences(first_json, other_json)[0]
    raise UserError(
        f"the processes disagree: {path} is {_at(first_json, path)} in process 0 and "
        f"{_at(other_json, path)} in process {others[0]}; start all with the same command"
    )


def on_first(function: Callable[[], None]) -> None:
    """Runs `function` on process 0 while the others wait; its `UserError` is raised on all."""
    problem = ""
    if is_main_process():
        try:
            function()
        except UserError as error:
            problem = str(error)
    if jax.process_count() > 1:
        problem = gather_texts(problem)[0]
    if problem:
        raise UserError(problem)


def first_problem(problem: str, consequence: str = "") -> str:
    """The text of the first process that has one, on every process; '' if none has.

    consequence: a text that one process has because of another, and that says least.
    """
    if jax.process_count() == 1:
        return problem
    texts = [text for text in gather_texts(problem) if text]
    return next((text for text in texts if text != consequence), texts[0] if texts else "")


def barrier() -> None:
    """Waits until all processes are here, however late one is.

    Through JAX's coordination service: a collective of the CPU gives up after 30 seconds.
    """
    if jax.process_count() > 1:
        ocp.multihost.get_barrier_sync_fn()(key="meet", timeout_ms=1000 * MEETING_SECONDS)


class Interrupt:
    """Notes the first Ctrl-C or SIGTERM, so that the loop can stop between two steps.

    With many processes a signal to any of them stops all, after the same step: JAX's runtime takes
    SIGTERM as the notice of a preemption, tells the others, and agrees with them on a step.
    """

    def __init__(self):
        self._seen = False
        self._before = {}

    def __enter__(self):
        numbers = [signal.SIGINT]
        if jax.process_count() == 1:
            numbers.append(signal.SIGTERM)
        for number in numbers:
            self._before[number] = signal.signal(number, self._note)
        return self

    def _note(self, number, frame):
        if self._seen:  # a second Ctrl-C means now
            raise KeyboardInterrupt
        self._seen = True
        if jax.process_count() > 1:
            os.kill(os.getpid(), signal.SIGTERM)

    def stops(self, step: int) -> bool:
        """Whether to stop after `step`, the same on all processes. Ask once after every step."""
        if jax.process_count() == 1:
            return self._seen
        return multihost_utils.reached_preemption_sync_point(step)

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def failing_together() -> Iterator[None]:
    """Around a command: a process that fails ends at once, so that the others need not wait for it.

    It leaves collectives and saves in flight, and Python's own way out waits for those, as they
    wait for the other processes, for many minutes. Most exits with a message (`SystemExit`) are met
    by all processes, which get a moment to print it before process 0, their meeting point, is gone.
    """
    try:
        yield
    except BaseException as error:
        if not jax.distributed.is_initialized():
            raise
        code = 1
        if isinstance(error, SystemExit):
            code = error.code
            time.sleep(GRACE_SECONDS)
        else:
            traceback.print_exc()
        for reader in multiprocessing.active_children():
            reader.kill()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def gather_texts(text: str) -> list[str]:
    """The text of every process, on every process."""
    data = np.frombuffer(text.encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.array(data.size))
    padded = np.zeros(max(int(sizes.max()), 1), np.uint8)
    padded[: data.size] = data
    rows = multihost_utils.process_allgather(padded)
    return [bytes(row[:size]).decode() for row, size in zip(rows, sizes, strict=True)]


def _at(tree: Any, path: str) -> Any:
    """The value at a dotted path of a JSON object, or 'missing'."""
    for key in path.split("."):
        if not isinstance(tree, dict) or key not in tree:
            return "missing"
        tree = tree[key]
    return tree
