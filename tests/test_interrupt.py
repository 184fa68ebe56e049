"""Signals: once, twice, while somebody types, and from elsewhere."""

from __future__ import annotations

import signal

import pytest

from heretic.errors import Interrupted
from heretic.interrupt import STOPPING, StopSignal


def test_once_sets_the_flag_and_twice_ends_at_once() -> None:
    stop = StopSignal()
    with pytest.raises(Interrupted), stop.on_signals():
        signal.raise_signal(signal.SIGINT)
        assert stop.requested and stop.from_keyboard
        signal.raise_signal(signal.SIGINT)
        pytest.fail("the second one did not end it")


def test_a_stop_can_be_taken_back_and_asked_for_again() -> None:
    stop = StopSignal()
    with stop.on_signals():
        signal.raise_signal(signal.SIGINT)
        stop.reset()
        stop.check()
        signal.raise_signal(signal.SIGTERM)
        assert stop.requested and not stop.from_keyboard
        with pytest.raises(Interrupted):
            stop.check()


def test_while_somebody_types_ctrl_c_is_no_request_to_stop_but_a_termination_is() -> None:
    stop = StopSignal()
    with stop.on_signals(), stop.raise_immediately():
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        stop.check()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        with pytest.raises(Interrupted):
            stop.check()


@pytest.mark.parametrize("name", STOPPING)
def test_every_signal_that_schedulers_send_before_the_end_is_orderly(name: str) -> None:
    if not hasattr(signal, name):
        pytest.skip("of another system")
    number, stop = getattr(signal, name), StopSignal()
    inherited = signal.signal(number, signal.SIG_DFL)  # nohup ignores SIGHUP, shells SIGINT in the background
    try:
        with stop.on_signals():
            signal.raise_signal(number)
            assert stop.requested and stop.from_keyboard == (name == "SIGINT")
        assert signal.getsignal(number) == signal.SIG_DFL
    finally:
        signal.signal(number, inherited)


def test_a_limit_on_cpu_time_signals_every_second_and_is_no_second_request() -> None:
    stop = StopSignal()
    with pytest.raises(Interrupted), stop.on_signals():
        for _ in range(3):
            signal.raise_signal(signal.SIGXCPU)
        assert stop.requested
        signal.raise_signal(signal.SIGTERM)
        pytest.fail("another signal did not end it")
