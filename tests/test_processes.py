"""What many processes need, in a run of one; test_multiprocess.py has real ones."""

import signal

import pytest

from data2vec_jax import processes
from data2vec_jax.errors import UserError, differences


def test_one_process_agrees_with_itself():
    assert processes.first()
    processes.start()  # no COORDINATOR_ADDRESS
    processes.check_agreement({"seed": 1})
    processes.meet()
    done = []
    processes.on_first(lambda: done.append(1))
    assert done == [1]

    def fail():
        raise UserError("no disk")

    with pytest.raises(UserError, match="no disk"):
        processes.on_first(fail)


@pytest.mark.parametrize("missing", ["NUM_PROCESSES", "PROCESS_ID"])
def test_half_an_address(missing, monkeypatch):
    for name in ("NUM_PROCESSES", "PROCESS_ID"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("COORDINATOR_ADDRESS", "localhost:1")
    monkeypatch.delenv(missing)
    with pytest.raises(UserError, match=f"COORDINATOR_ADDRESS is set, but {missing} is ''"):
        processes.start()


def test_auto_where_there_is_nothing_to_find(monkeypatch):
    monkeypatch.setenv("COORDINATOR_ADDRESS", "auto")
    with pytest.raises(UserError, match="COORDINATOR_ADDRESS=auto: "):
        processes.start()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_noted_and_the_second_means_now(number):
    before = signal.getsignal(number)
    with processes.Interrupt() as interrupt:
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
    with pytest.raises(SystemExit), processes.failing_together():
        raise SystemExit(2)
