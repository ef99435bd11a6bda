"""What many processes need, in a run of one; test_multiprocess.py has real ones."""

import signal

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


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_noted_and_the_second_means_now(number):
    before = signal.getsignal(number)
    with distributed.Interrupt() as interrupt:
        assert not interrupt.stops(1)
        signal.raise_signal(number)
        assert interrupt.stops(2)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
    assert signal.getsignal(number) == before


def test_differences():
    assert differences({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}, "d": 4}) == ["a.c", "d"]
    assert differences([1, 2], [1, 2]) == []


def test_a_failure_in_a_run_of_one_is_an_ordinary_one():
    with pytest.raises(SystemExit), distributed.failing_together():
        raise SystemExit(2)
