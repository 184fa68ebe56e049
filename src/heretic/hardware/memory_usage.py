"""Measure the current memory usage of all devices."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace

import psutil

from heretic.hardware import devices
from heretic.hardware.gpus import Gpu, gpus_here, visible_gpus
from heretic.hardware.host import format_bytes, memory


@dataclass(frozen=True)
class MemoryUsage:
    """The memory usage of a device in bytes."""

    device: str
    used: int  # by all processes
    total: int
    own: int | None = None  # by the run; None if unknown
    peak: int = 0  # of `own` until now; 0 if unknown

    def __str__(self) -> str:
        peak = f", at most {format_bytes(self.peak)}" if self.peak else ""
        own = f", {format_bytes(self.own)} by this run{peak}" if self.own is not None else ""
        return f"{format_bytes(self.used)} of {format_bytes(self.total)} used{own}"


def memory_usage(pid: int | None = None) -> list[MemoryUsage]:
    """Return the usage of every visible GPU, with the driver's numbers, and of the RAM.

    Args:
        pid: the run's process; default: this one. Only it knows GPUs that NVML does not list, and its own memory on a GPU.
    """
    total, free = memory()
    try:
        own = psutil.Process(pid).memory_info().rss
    except psutil.Error:
        own = None
    here = gpus_here() if pid is None and "torch" in sys.modules else ()
    gpus = [_of_own(gpu) for gpu in here] or [_of(gpu) for gpu in visible_gpus().gpus if gpu.total]
    return [*gpus, MemoryUsage("RAM", total - free, total, own)]


def _of(gpu: Gpu) -> MemoryUsage:
    return MemoryUsage(f"GPU {gpu.index}", gpu.total - gpu.free, gpu.total)


def _of_own(gpu: Gpu) -> MemoryUsage:
    now, peak = devices.own_memory(gpu.index)
    return replace(_of(gpu), own=now or None, peak=peak)
