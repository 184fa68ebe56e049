"""What a worker process knows of the process that started it."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from heretic.interrupt import StopSignal

PARENT_VARIABLE = (
    "_HERETIC_WORKER_OF"  # environment of a worker: the process that started it and holds the locks for it
)
POLL_SECONDS = 0.5


def parent_pid() -> int:
    """The process that started this one as a worker; 0 if it is none."""
    given = os.environ.get(PARENT_VARIABLE, "")
    return int(given) if given.isdigit() else 0


@contextmanager
def exit_with_parent(stop: StopSignal) -> Iterator[None]:
    """Within the context of a worker a stop is asked for once the process that started it is gone, and its locks with it."""
    if not parent_pid():
        yield
        return
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(POLL_SECONDS):
            if os.getppid() != parent_pid():
                stop.requested = True
                return

    threading.Thread(target=watch, daemon=True, name="lender").start()
    try:
        yield
    finally:
        ended.set()
