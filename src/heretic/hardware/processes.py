"""Recognize a process again, though ids are reused and the clock may be set, and say how one ended."""

from __future__ import annotations

import signal

import psutil

KILLED = 9  # SIGKILL, which Windows lacks
PROBABLE_CAUSE = "probably for lack of memory" + (" (journalctl -k)" if psutil.LINUX else "")
ROUNDING = 1.0  # seconds by which two readings of one process's start may differ


def process_start(pid: int) -> float:
    """Return when a process started, in seconds that do not move with the clock. Raises psutil.Error."""
    if psutil.WINDOWS:  # it keeps the start as a date, and computes that of the boot from the clock
        return psutil.Process(pid).create_time()
    boot = psutil.boot_time()  # first: psutil 6 computes the start from the last one
    return psutil.Process(pid).create_time() - boot


def is_running(pid: int, began: float) -> bool:
    """Return whether the process of this id and start may run; not for one that has ended and was not waited for."""
    try:
        if abs(process_start(pid) - began) >= ROUNDING:
            return False
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        return True


def ending(status: int) -> str:
    """Return how a process ended, from its exit status: negative, or above 128 if a shell was between, for a signal."""
    number = -status if status < 0 else status - 128
    if number == KILLED:
        return f"was killed (SIGKILL), {PROBABLE_CAUSE}"
    name = next((each.name for each in signal.Signals if each == -status), "")
    return f"was ended by {name}" if name else f"ended with status {status}"
