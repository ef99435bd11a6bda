"""What many processes need, in a run of one; test_multiprocess.py has real ones."""

import signal
import threading
import time

import pytest

from data2vec_jax.core import distributed
from data2vec_jax.core.config import differences
from data2vec_jax.core.errors import UserError


def test_one_process_agrees_with_itself():
    assert distributed.is_main_process()
    distributed.start()  # no COORDINATOR_ADDRESS
    distributed.check_agreement({"seed": 1})
    distributed.barrier()
    done = []
    distributed.on_first(lambda: done.append(1))
    assert done == [1]

    def fail():
        raise UserError("no disk")

    with pytest.raises(UserError, match="no disk"):
        distributed.on_first(fail)


@pytest.mark.parametrize("missing", ["NUM_PROCESSES", "PROCESS_ID"])
def test_half_an_address(missing, monkeypatch):
    for name in ("NUM_PROCESSES", "PROCESS_ID"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("COORDINATOR_ADDRESS", "localhost:1")
    monkeypatch.delenv(missing)
    with pytest.raises(UserError, match=f"COORDINATOR_ADDRESS is set, but {missing} is ''"):
        distributed.start()


def test_auto_where_there_is_nothing_to_find(monkeypatch):
    monkeypatch.setenv("COORDINATOR_ADDRESS", "auto")
    with pytest.raises(UserError, match="COORDINATOR_ADDRESS=auto: "):
        distributed.start()


NOTICES = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


@pytest.mark.parametrize("number", NOTICES)
def test_a_notice_is_noted_and_the_next_one_ignored(number, capfd):
    before = signal.getsignal(number)
    with distributed.Interrupt() as interrupt:
        assert not interrupt.stops(1)
        assert interrupt.wait(lambda: 5) == 5
        signal.raise_signal(number)
        signal.raise_signal(number)
        assert interrupt.stops(2)
        with pytest.raises(distributed.Stopped):
            interrupt.wait(lambda: 5)
    assert signal.getsignal(number) == before
    first, second = capfd.readouterr().err.splitlines()
    assert first == f"{number.name}: stopping after this step, with a checkpoint"
    assert second.startswith(f"{number.name} is ignored")


@pytest.mark.parametrize("seconds", [0.0, 0.3])
def test_a_wait_is_left_at_a_notice(seconds):
    def slow(number, frame):  # a handler that takes longer than a look for a notice
        time.sleep(seconds)
        signal.raise_signal(signal.SIGTERM)

    lock = threading.Lock()
    alarm = signal.signal(signal.SIGALRM, slow)
    lock.acquire()
    release = threading.Timer(5, lock.release)  # so that a wait that is not left ends, too
    release.start()
    with distributed.Interrupt() as interrupt:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        with pytest.raises(distributed.Stopped):
            interrupt.wait(lock.acquire)
    signal.signal(signal.SIGALRM, alarm)
    release.cancel()
    lock.release()  # the thread that was left ends


@pytest.mark.parametrize("outside", [False, True])
def test_what_a_thread_raises(outside):
    def fail():
        raise UserError("no")

    with distributed.Interrupt() as interrupt, pytest.raises(UserError, match=r"^no$"):
        (distributed.outside_python if outside else interrupt.wait)(fail)
    assert distributed.outside_python(lambda: 5) == 5


def test_nohup_stays():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with distributed.Interrupt():
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_differences():
    assert differences({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}, "d": 4}) == ["a.c", "d"]
    assert differences([1, 2], [1, 2]) == []


def test_a_failure_in_a_run_of_one_is_an_ordinary_one():
    with pytest.raises(SystemExit), distributed.failing_together():
        raise SystemExit(2)
