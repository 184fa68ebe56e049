"""How full the devices are at this moment, for whoever watches a run."""

from __future__ import annotations

from dataclasses import dataclass

import psutil

from heretic.hardware.gpus import visible_gpus
from heretic.hardware.host import format_bytes, memory


@dataclass(frozen=True)
class MemoryUsage:
    """Bytes in use on a device, by everybody; for RAM also how much of it the run takes."""

    device: str
    used: int
    total: int
    own: int | None = None

    def __str__(self) -> str:
        own = f", {format_bytes(self.own)} by this run" if self.own is not None else ""
        return f"{format_bytes(self.used)} of {format_bytes(self.total)} used{own}"


def memory_usage(pid: int | None = None) -> list[MemoryUsage]:
    """RAM, and every GPU that this process may use, as the driver numbers them. `pid`: the run's process, if it is another."""
    total, free = memory()
    try:
        own = psutil.Process(pid).memory_info().rss
    except psutil.Error:
        own = None
    gpus = [MemoryUsage(f"GPU {gpu.index}", gpu.total - gpu.free, gpu.total) for gpu in visible_gpus().gpus]
    return [*gpus, MemoryUsage("RAM", total - free, total, own)]
