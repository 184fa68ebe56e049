"""Signals: once, twice, while somebody types, and from elsewhere."""

from __future__ import annotations

import signal

import pytest

from heretic.errors import Interrupted
from heretic.interrupt import StopSignal


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
