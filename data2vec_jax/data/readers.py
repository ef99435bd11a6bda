"""Batches read ahead, by threads or by processes that are watched, and that leave nothing behind.

Batch n is a pure function of n. So each of K readers reads every K-th batch, and one that is dead,
stopped or stuck is begun again at the batch that is due, with no change to what is trained on.

A reader process sends its batches through a socket. They have no name in the file system, so that
there is nothing to clean up after a kill -9: the kernel frees what is in a socket.
"""

import contextlib
import ctypes
import dataclasses
import multiprocessing
import multiprocessing.util
import os
import pickle
import queue
import signal
import socket
import struct
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
from threadpoolctl import threadpool_limits

from data2vec_jax.cli.output import say
from data2vec_jax.core.errors import UserError

READER_TIMEOUT = 300.0  # seconds
THREADS = 2  # that read, where no processes do
PLACED = 2  # batches that wait on the devices
_START_SECONDS = 120.0  # at least, for a process to import what it needs
_POLL_SECONDS = 0.1
_END_SECONDS = 2.0  # for threads, to end what they are at
# Ctrl-C and the notices of schedulers go to whole groups of processes; only the trainer acts.
_NOTICES = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}

Batch = Mapping[str, np.ndarray]


def stream(
    read: Callable[[int], Batch],
    start: int,
    stop: int,
    *,
    workers: int,
    prefetch: int,
    place: Callable[[Any], Any],
    reader_timeout: float = READER_TIMEOUT,
) -> Iterator[Any]:
    """Batches start, ..., stop - 1, read ahead, and placed on the devices by a thread.

    read: gives a batch; processes get a copy, which may hold functions of functions. workers:
    processes that read; 0 reads in threads of this one. prefetch: batches that each process reads
    ahead, or the threads together. place: moves a batch from the host to the devices.
    reader_timeout: seconds to wait for the batch that is due before its reader is taken for stuck.

    A process that is dead or stuck is named on stderr and replaced, once. All end with the iterator
    (`close()`, or an exception while it waits), and with this process, even by a kill -9.

    Raises:
      UserError: when a replacement, or a thread, is stuck; and whatever `read` and `place` raise,
        of a process as a `RuntimeError` with the traceback, unless it is a `UserError`.
    """
    if workers < 0 or prefetch < 1:
        raise UserError(
            f"config.data: workers={workers}, prefetch={prefetch}; use 0 or more, and 1 or more"
        )
    if not reader_timeout > 0:
        raise UserError(f"config.data.reader_timeout: {reader_timeout} is not above 0")
    return _iterate(_Readers(read, start, stop, workers, prefetch, reader_timeout), place)


def _iterate(readers: "_Readers", place: Callable[[Any], Any]) -> Iterator[Any]:
    placed: queue.Queue = queue.Queue(PLACED)
    # Before multiprocessing waits for its processes at the end of this one.
    close = multiprocessing.util.Finalize(None, readers.close, exitpriority=10)
    thread = threading.Thread(target=readers.fill, args=(placed, place), daemon=True)
    try:
        with contextlib.nullcontext() if readers.processes else _ONE_THREAD:
            thread.start()
            for _ in readers.numbers:
                item = placed.get()
                if isinstance(item, _Failure):
                    raise item.error
                yield item
    finally:
        close()
        thread.join(_END_SECONDS)


@dataclasses.dataclass
class _Failure:
    """What a thread puts into its queue in place of a batch; None for a process that is gone."""

    error: BaseException | None


class _Readers:
    """Readers of the batches `numbers`, the k-th of every `count`-th one."""

    def __init__(self, read, start, stop, workers, prefetch, timeout):
        self.numbers = range(start, stop)
        self.count = workers or THREADS
        self._read, self._timeout = read, timeout
        self.processes = workers > 0
        self._ahead = prefetch if workers else -(-prefetch // THREADS)
        self._readers: dict[int, _Reader] = {}
        self._replaced: set[int] = set()
        self._closed = threading.Event()

    def fill(self, placed: queue.Queue, place: Callable[[Any], Any]) -> None:
        """Reads and places all batches: the body of a thread.

        It starts the processes itself, because Linux ends them with the thread that did.
        """
        signal.pthread_sigmask(signal.SIG_BLOCK, _NOTICES)  # the processes inherit this
        try:
            for k in range(min(self.count, len(self.numbers))):
                self._begin(k, self.numbers.start + k)
            for n in self.numbers:
                _put(placed, place(self._due(n)), self._closed)
        except _Closed:
            pass
        except BaseException as error:  # also what is no Exception: nobody else would hear of it
            with contextlib.suppress(_Closed):
                _put(placed, _Failure(error), self._closed)

    def close(self) -> None:
        """Ends all readers at once. Threads end after the batch that they are reading."""
        self._closed.set()
        for reader in self._readers.values():
            reader.kill()

    def _begin(self, k: int, n: int) -> None:
        """Starts reader k at batch n."""
        numbers = range(n, self.numbers.stop, self.count)
        kind = _Process if self.processes else _Reader
        self._readers[k] = kind(self._read, numbers, self._ahead, self._closed)
        if self._closed.is_set():  # `close` may have come before this one was in the list
            self._readers[k].kill()
            raise _Closed

    def _due(self, n: int) -> Batch:
        """Batch n, from its reader or from the replacement of its reader."""
        k = (n - self.numbers.start) % self.count
        while True:
            reader = self._readers[k]
            item = self._await(reader)
            if not isinstance(item, _Failure):
                return item
            if item.error:
                raise item.error
            trouble = f"reader {k} of {self.count} {reader.trouble(self._timeout)}"
            reader.kill()
            if k in self._replaced or not self.processes:
                again = " again" if k in self._replaced else ""
                raise UserError(f"{trouble}{again}, at batch {n}")
            self._replaced.add(k)
            say(f"{trouble}; another one goes on from batch {n}")
            self._begin(k, n)

    def _await(self, reader: "_Reader") -> Any:
        """The reader's next item; a failure without an error after the time that it may take."""
        waited = 0.0
        while not self._closed.is_set():
            with contextlib.suppress(queue.Empty):
                return reader.ready.get(timeout=_POLL_SECONDS)
            # Not by the clock, which also goes on while all of us are suspended (Ctrl-Z).
            waited += _POLL_SECONDS
            least = 0.0 if reader.begun.is_set() else _START_SECONDS
            if waited >= max(self._timeout, least):
                return _Failure(None)
        raise _Closed


class _Reader:
    """A thread that keeps the batches of `numbers` ready, `ahead` of them."""

    def __init__(
        self, read: Callable[[int], Batch], numbers: range, ahead: int, closed: threading.Event
    ):
        self.ready: queue.Queue = queue.Queue(ahead)
        self.begun = threading.Event()
        self._closed = closed
        source = self._batches(read, numbers)
        threading.Thread(target=self._fill, args=(source,), daemon=True).start()

    def trouble(self, seconds: float) -> str:
        """Why there is no batch after so long."""
        return f"(a thread) has given no batch for {seconds:g} s"

    def kill(self) -> None:
        """Nothing, for threads cannot be ended."""

    def _batches(self, read: Callable[[int], Batch], numbers: range) -> Iterator[Any]:
        self.begun.set()
        return map(read, numbers)

    def _fill(self, source: Iterator[Any]) -> None:
        try:
            for item in source:
                _put(self.ready, item, self._closed)
        except _Closed:
            pass
        except Exception as error:
            with contextlib.suppress(_Closed):
                _put(self.ready, _Failure(error), self._closed)


class _Process(_Reader):
    """A process that reads, and the thread that takes what it sends."""

    def __init__(self, *args: Any):
        self._socket, theirs = socket.socketpair()
        # A fork would copy locks that threads of JAX hold.
        context = multiprocessing.get_context("spawn")
        self._process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()
        super().__init__(*args)

    def trouble(self, seconds: float) -> str:
        self._process.join(0)
        process, code = f"(process {self._process.pid})", self._process.exitcode
        if code is None:
            stopped = " and is stopped" if _is_stopped(self._process.pid) else ""
            return f"{process} has given no batch for {seconds:g} s{stopped}"
        if code < 0:
            return f"{process} was killed by signal {-code}"
        return f"{process} ended with code {code}"

    def kill(self) -> None:
        self._process.kill()  # also one that is stopped
        self._process.join(_END_SECONDS)

    def _batches(self, read: Callable[[int], Batch], numbers: range) -> Iterator[Any]:
        try:
            with self._socket:
                _send(self._socket, (read, numbers), cloudpickle.dumps)
                _receive(self._socket)
                self.begun.set()
                for _ in numbers:
                    yield _receive(self._socket)
        except (OSError, EOFError):
            self._process.join(_END_SECONDS)  # its exit code follows the end of its socket
            yield _Failure(None)


def _serve(connection: socket.socket) -> None:
    """The reader process: sends the batches that it is asked for until all are sent."""
    end_with_parent()
    with contextlib.suppress(OSError, EOFError):  # the trainer is gone
        read, numbers = _receive(connection)
        _send(connection, None)  # what it imports is here
        threadpool_limits(limits=1, user_api="blas")  # see `_OneThread`
        for n in numbers:
            try:
                item = read(n)
            except UserError as error:
                item = _Failure(UserError(str(error)))
            except Exception as error:
                text = "".join(traceback.format_exception(error))
                item = _Failure(RuntimeError(f"in a reader process, at batch {n}:\n{text}"))
            _send(connection, item)


class _OneThread:
    """While anything is inside, numpy's products have one thread each, in the whole process.

    There is a reader a core. With threads of the products besides, which wait for each other by
    running, two readers of filterbanks were slower than one. To be entered by the main thread:
    OpenBLAS does not obey the others once that one has set a number.
    """

    def __init__(self):
        self._lock, self._inside = threading.Lock(), 0

    def __enter__(self):
        with self._lock:
            if not self._inside:
                self._limits = threadpool_limits(limits=1, user_api="blas")
            self._inside += 1

    def __exit__(self, *error):
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self._limits.restore_original_limits()


_ONE_THREAD = _OneThread()


def end_with_parent() -> None:
    """Lets this process end when its parent does, however that happens."""
    with contextlib.suppress(AttributeError, OSError):  # Linux: also while we are stopped or stuck
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG

    def wait():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _is_stopped(pid: int) -> bool:
    """Whether a process is stopped, as far as the system tells (Linux)."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    return False


# Messages: the number and the sizes of their parts, a pickle, and the arrays' memory as it is.


def _send(
    connection: socket.socket, value: Any, dumps: Callable[..., bytes] = pickle.dumps
) -> None:
    buffers: list[pickle.PickleBuffer] = []
    data = dumps(value, protocol=5, buffer_callback=buffers.append)
    parts = [memoryview(data), *(buffer.raw() for buffer in buffers)]
    sizes = [part.nbytes for part in parts]
    connection.sendall(struct.pack(f"<{1 + len(parts)}Q", len(parts), *sizes))
    for part in parts:
        connection.sendall(part)


def _receive(connection: socket.socket) -> Any:
    (count,) = struct.unpack("<Q", _exactly(connection, 8))
    sizes = struct.unpack(f"<{count}Q", _exactly(connection, 8 * count))
    data, *buffers = (_exactly(connection, size) for size in sizes)
    return pickle.loads(data, buffers=buffers)


def _exactly(connection: socket.socket, size: int) -> memoryview:
    memory = memoryview(np.empty(size, np.uint8))
    got = 0
    while got < size:
        more = connection.recv_into(memory[got:])
        if not more:
            raise EOFError
        got += more
    return memory


class _Closed(Exception):
    """The iterator has ended, so nobody takes any more."""


def _put(place: queue.Queue, item: Any, closed: threading.Event) -> None:
    while not closed.is_set():
        with contextlib.suppress(queue.Full):
            return place.put(item, timeout=_POLL_SECONDS)
    raise _Closed
