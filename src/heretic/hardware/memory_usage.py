"""Measure the current memory usage of all devices."""

from __future__ import annotations

from dataclasses import dataclass

import psutil

from heretic.hardware.gpus import visible_gpus
from heretic.hardware.host import format_bytes, memory


@dataclass(frozen=True)
class MemoryUsage:
    """The memory usage of a device in bytes."""

    device: str
    used: int  # by all processes
    total: int
    own: int | None = None  # by the run; RAM only

    def __str__(self) -> str:
        own = f", {format_bytes(self.own)} by this run" if self.own is not None else ""
        return f"{format_bytes(self.used)} of {format_bytes(self.total)} used{own}"


def memory_usage(pid: int | None = None) -> list[MemoryUsage]:
    """Return the usage of every visible GPU, with the driver's numbers, and of the RAM.

    Args:
        pid: the run's process; default: this one.
    """
    total, free = memory()
    try:
        own = psutil.Process(pid).memory_info().rss
    except psutil.Error:
        own = None
    gpus = [MemoryUsage(f"GPU {gpu.index}", gpu.total - gpu.free, gpu.total) for gpu in visible_gpus().gpus]
    return [*gpus, MemoryUsage("RAM", total - free, total, own)]
