"""The worker's side of a worker process: its parent, and its exit when the parent ends."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from heretic.interrupt import StopSignal

PARENT_VARIABLE = (
    "_HERETIC_WORKER_OF"  # environment variable of a worker: process id of its parent, which holds the locks
)
POLL_SECONDS = 0.5


def parent_pid() -> int:
    """Return the id of the process that started this worker; 0 if this is no worker."""
    value = os.environ.get(PARENT_VARIABLE, "")
    return int(value) if value.isdigit() else 0


@contextmanager
def exit_with_parent(stop: StopSignal) -> Iterator[None]:
    """Request a stop in a worker once its parent has ended, since the parent's locks end with it."""
    if not parent_pid():
        yield
        return
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(POLL_SECONDS):
            if os.getppid() != parent_pid():
                stop.requested = True
                return

    threading.Thread(target=watch, daemon=True, name="parent-monitor").start()
    try:
        yield
    finally:
        ended.set()
