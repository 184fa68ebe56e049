"""Recognize a process again: process ids are reused, and the clock may be set while a process runs."""

from __future__ import annotations

import psutil

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
