"""Many processes, one run: join, agree, stop together, fail together.

All processes call the same functions in the same order. In a run of one process they do nothing.
"""

import contextlib
import hashlib
import json
import multiprocessing
import os
import queue
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from data2vec_jax.core import notices
from data2vec_jax.core.config import differences
from data2vec_jax.core.errors import STOPPED, UserError

SHUTDOWN_SECONDS = 15  # for all processes to end, after they have met
MEETING_SECONDS = 3600  # a process that died ends the run long before
GRACE_SECONDS = 2  # for all processes to print why they end
# What JAX says of a message whose other end is gone: a status, then the words of gloo, NCCL, or its
# coordination service. It is a JaxRuntimeError, or a ValueError.
_LOST = re.compile(
    r"[A-Z_]+: .*(Connection (reset|closed|refused)|Broken pipe|remote process exited|heartbeat)"
)
_POLL_SECONDS = 0.1  # between two looks for a notice
_WORKER = "what a notice may leave behind"


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
        join = jax.distributed.initialize
        outside_python(lambda: join(**options, shutdown_timeout_seconds=SHUTDOWN_SECONDS))
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
        meet = ocp.multihost.get_barrier_sync_fn()
        outside_python(lambda: meet(key="meet", timeout_ms=1000 * MEETING_SECONDS))


class Stopped(Exception):
    """A wait was left because of a notice."""


class Interrupt:
    """Notes Ctrl-C, SIGTERM and SIGHUP, so that the loop can stop where nothing is lost.

    The first notice is noted, and those after it are said to be ignored; a third Ctrl-C ends the
    process at once. SIGHUP stays ignored if it was (nohup).

    With many processes a notice to any of them stops all, after the same step: JAX's runtime takes
    SIGTERM as the notice of a preemption, tells the others, and agrees with them on a step.
    """

    def __init__(self):
        self._count = 0
        self._before = {}
        self._jobs: queue.SimpleQueue = queue.SimpleQueue()
        self._worker = threading.Thread(target=self._work, name=_WORKER, daemon=True)

    def __enter__(self):
        self._worker.start()
        for number in notices.NOTICES:
            theirs = number == signal.SIGTERM and jax.process_count() > 1
            if not theirs and not notices.is_ignored(number):
                self._before[number] = signal.signal(number, self._note)
        return self

    def _note(self, number, frame):
        # It raises nothing: what interrupts a callback of the garbage collector would be lost.
        self._count += 1
        name = signal.Signals(number).name
        if self._count == 1:
            notices.tell(f"{name}: stopping after this step, with a checkpoint")
            if jax.process_count() > 1:
                os.kill(os.getpid(), signal.SIGTERM)
        elif number == signal.SIGINT and self._count > 2:
            notices.tell("ended at once, perhaps before the checkpoint was complete")
            os._exit(STOPPED)
        else:
            notices.tell(f"{name} is ignored: the run is stopping, and its checkpoint is saved")

    def stops(self, step: int) -> bool:
        """Whether to stop after `step`, the same on all processes. Ask once after every step."""
        if jax.process_count() == 1:
            return self._count > 0
        return multihost_utils.reached_preemption_sync_point(step)

    def wait(self, function: Callable[[], Any]) -> Any:
        """`function()`, by a thread, for data or for the compiler: a notice ends the wait.

        With many processes it is not left: all of them must take the same steps.

        Raises:
          Stopped: there was a notice.
        """
        if jax.process_count() > 1:
            return function()
        # A SimpleQueue may wait for ever when a signal comes as its timeout ends (Python 3.11).
        answer: queue.Queue = queue.Queue(1)
        self._jobs.put((function, answer))
        while not self._count:
            with contextlib.suppress(queue.Empty):
                return answer.get(timeout=_POLL_SECONDS)()
        raise Stopped

    def _work(self):
        for function, answer in iter(self._jobs.get, None):
            answer.put(_outcome(function))

    def __exit__(self, *_):
        self._jobs.put(None)
        self._worker.join(_POLL_SECONDS)
        for number, handler in self._before.items():
            signal.signal(number, handler)


def outside_python(function: Callable[[], Any]) -> Any:
    """`function()`, by a thread, since no signal is answered in minutes of compiled code."""
    done: queue.SimpleQueue = queue.SimpleQueue()
    threading.Thread(target=lambda: done.put(_outcome(function)), daemon=True).start()
    return done.get()()


def _outcome(function: Callable[[], Any]) -> Callable[[], Any]:
    """Calls `function` here; what is returned gives its result, or raises its error, elsewhere."""
    try:
        result = function()
    except BaseException as error:
        problem = error  # Python forgets `error` at the end of this block

        def fail():
            raise problem

        return fail
    return lambda: result


@contextlib.contextmanager
def failing_together() -> Iterator[None]:
    """Around a command: a process that fails ends at once, so that the others need not wait for it.

    It leaves collectives and saves in flight, and Python's own way out waits for those, as they
    wait for the other processes, for many minutes. Most exits with a message (`SystemExit`) are met
    by all processes, which get a moment to print it before process 0, their meeting point, is gone.
    Where another process has died, the error that JAX raises is told in a line.

    A run that was stopped, and is saved, ends at once as well: on Python's way out a thread that
    compiled code has begun may still abort the process, and its code would not be `STOPPED`.
    """
    try:
        yield
    except BaseException as error:
        together = jax.distributed.is_initialized()
        # A compiler that was left behind would meet the end of the libraries that it uses.
        working = any(thread.name == _WORKER for thread in threading.enumerate())
        stopped = isinstance(error, SystemExit) and error.code == STOPPED
        if not (together or working or stopped):
            raise
        code = 1
        if isinstance(error, SystemExit):
            code = error.code
            time.sleep(GRACE_SECONDS if together else 0)
        elif together and _LOST.match(str(error)):
            reason = str(error).splitlines()[0]
            text = f"error: another process is gone ({reason}); the same command resumes"
            print(text, file=sys.stderr)
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
