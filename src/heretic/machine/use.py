"""How full the devices are at this moment, for the screen."""

from __future__ import annotations

from dataclasses import dataclass

import psutil

from heretic.machine.gpus import visible_gpus
from heretic.machine.host import memory


@dataclass(frozen=True)
class Use:
    """Bytes in use on a device, by everybody; for RAM also how much of it this process takes."""

    device: str
    used: int
    total: int
    own: int | None = None


def memory_in_use() -> list[Use]:
    """RAM, and every GPU that this process may use, as the driver numbers them."""
    total, free = memory()
    own = psutil.Process().memory_info().rss
    gpus = [Use(f"GPU {gpu.index}", gpu.total - gpu.free, gpu.total) for gpu in visible_gpus().gpus]
    return [*gpus, Use("RAM", total - free, total, own)]
