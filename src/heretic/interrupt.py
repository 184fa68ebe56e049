"""Stopping in an orderly way: the first Ctrl-C (or SIGTERM) ends the work after the current batch, the second at once."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from heretic.errors import Interrupted


class StopSignal:
    """A flag that signals set and that every loop over batches asks.

    `at_keyboard` says that it was Ctrl-C, so somebody is there who can be asked what to do next.
    """

    def __init__(self) -> None:
        self.requested = False
        self.from_keyboard = False
        self._idle = False

    def check(self) -> None:
        """Raise Interrupted if a stop was asked for."""
        if self.requested:
            raise Interrupted

    def reset(self) -> None:
        """Go on as if no stop had been asked for: the user was asked and wants more."""
        self.requested = self.from_keyboard = False

    @contextmanager
    def idle(self) -> Iterator[None]:
        """While a person types or an answer may be cut short: Ctrl-C is a KeyboardInterrupt at once and no request to stop;
        the other signals are both."""
        self._idle = True
        try:
            yield
        finally:
            self._idle = False

    @contextmanager
    def on_signals(self) -> Iterator[None]:
        """Let SIGINT, SIGTERM and SIGHUP set the flag; a second one raises KeyboardInterrupt wherever the program is."""

        def handle(number: int, _frame: FrameType | None) -> None:
            at_keyboard = number == signal.SIGINT
            if self._idle and at_keyboard:
                raise KeyboardInterrupt
            again = self.requested or self._idle
            self.requested, self.from_keyboard = True, at_keyboard
            if again:
                raise KeyboardInterrupt

        names = [getattr(signal, n) for n in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, n)]
        # What was ignored stays ignored: nohup and background jobs mean that.
        heeded = [number for number in names if signal.getsignal(number) is not signal.SIG_IGN]
        before = {number: signal.signal(number, handle) for number in heeded}
        try:
            yield
        except KeyboardInterrupt:
            raise Interrupted from None
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
