"""Stopping in an orderly way: the first Ctrl-C (or SIGTERM) ends the work after the current batch, the second at once."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from heretic.errors import Interrupted


class Stop:
    """A flag that signals set and that every loop over batches asks."""

    def __init__(self) -> None:
        self.requested = False

    def check(self) -> None:
        """Raise Interrupted if a stop was asked for."""
        if self.requested:
            raise Interrupted

    @contextmanager
    def on_signals(self) -> Iterator[None]:
        """Let SIGINT, SIGTERM and SIGHUP set the flag; a second one raises KeyboardInterrupt wherever the program is."""

        def handle(_number: int, _frame: FrameType | None) -> None:
            if self.requested:
                raise KeyboardInterrupt
            self.requested = True

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
