"""What a worker process knows of the process that started it."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from heretic.interrupt import Stop

LENDER = "_HERETIC_WORKER_OF"  # environment of a worker: the process that started it and holds the locks for it
LOOK_AGAIN = 0.5


def lender() -> int:
    """The process that started this one as a worker; 0 if it is none."""
    given = os.environ.get(LENDER, "")
    return int(given) if given.isdigit() else 0


@contextmanager
def ends_with_its_lender(stop: Stop) -> Iterator[None]:
    """Within the context of a worker a stop is asked for once the process that started it is gone, and its locks with it."""
    if not lender():
        yield
        return
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(LOOK_AGAIN):
            if os.getppid() != lender():
                stop.requested = True
                return

    threading.Thread(target=watch, daemon=True, name="lender").start()
    try:
        yield
    finally:
        ended.set()
