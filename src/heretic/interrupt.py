"""Graceful stop: the first Ctrl-C (or another signal) ends the work after the current batch, the second ends it at once."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from heretic.errors import Interrupted

# From keyboards, systems and terminals; from job schedulers before the end of a job's time; from Windows' consoles.
STOPPING = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGXCPU", "SIGBREAK")


class StopSignal:
    """A flag that signals set and that every loop over batches checks.

    `from_keyboard` is true after Ctrl-C: a user is present and can choose what to do next.
    """

    def __init__(self) -> None:
        self.requested = False
        self.from_keyboard = False
        self._immediate = False

    def check(self) -> None:
        """Raise Interrupted if a stop was requested."""
        if self.requested:
            raise Interrupted

    def reset(self) -> None:
        """Cancel a requested stop; the user chose to continue."""
        self.requested = self.from_keyboard = False

    @contextmanager
    def raise_immediately(self) -> Iterator[None]:
        """Within the context raise KeyboardInterrupt at once: for prompts and answers that may be interrupted.

        Ctrl-C then requests no stop; the other signals also request one.
        """
        self._immediate = True
        try:
            yield
        finally:
            self._immediate = False

    @contextmanager
    def on_signals(self) -> Iterator[None]:
        """Let the signals of STOPPING set the flag; a second one raises KeyboardInterrupt.

        Raises Interrupted in place of a KeyboardInterrupt that leaves the context.
        """

        def handle(number: int, _frame: FrameType | None) -> None:
            from_keyboard = number == signal.SIGINT
            if self._immediate and from_keyboard:
                raise KeyboardInterrupt
            repeated = self.requested and number != getattr(signal, "SIGXCPU", None)  # which comes every second
            immediate = repeated or self._immediate
            self.requested, self.from_keyboard = True, from_keyboard
            if immediate:
                raise KeyboardInterrupt

        signals = [getattr(signal, n) for n in STOPPING if hasattr(signal, n)]
        # Ignored signals stay ignored: nohup and background jobs rely on it.
        handled = [number for number in signals if signal.getsignal(number) is not signal.SIG_IGN]
        before = {number: signal.signal(number, handle) for number in handled}
        try:
            yield
        except KeyboardInterrupt:
            raise Interrupted from None
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
