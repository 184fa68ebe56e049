"""The computer around the GPUs: memory as far as this process may use it, disks, and sizes in words."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil

from heretic.files import expand_user
from heretic.hardware.devices import CPU, Device
from heretic.hardware.gpus import Gpu


def devices(gpus: Sequence[Gpu]) -> list[Device]:
    """What weights can be put on: the given GPUs, then the CPU."""
    total, free = memory()
    return [*(Device(f"cuda:{gpu.index}", gpu.total, gpu.free) for gpu in gpus), Device(CPU, total, free)]


def memory(root: Path = Path("/")) -> tuple[int, int]:
    """Total and available RAM in bytes, as far as the control groups (containers, job schedulers) allow."""
    system = psutil.virtual_memory()
    total, available = system.total, system.available
    for limit, used in _group_limits(root):
        total, available = min(total, limit), min(available, max(0, limit - used))
    return total, available


def mappable(root: Path = Path("/")) -> int | None:
    """Bytes that one file of weights may have, to be mapped by safetensors; None where nothing limits it.

    PyTorch maps a file so that it might write to its own copy, and Linux refuses such a mapping if it could never be backed.
    """
    try:
        mode = (root / "proc/sys/vm/overcommit_memory").read_text().strip()
        fields = dict(line.split(":", 1) for line in (root / "proc/meminfo").read_text().splitlines())
        names = {"0": ("MemTotal", "SwapTotal"), "2": ("CommitLimit",)}.get(mode, ())
        return sum(int(fields[name].split()[0]) * 1024 for name in names) or None
    except (OSError, KeyError, ValueError):
        return None  # not Linux


def existing_parent(path: Path) -> Path:
    """The path itself or the nearest folder above it that exists."""
    path = expand_user(path).absolute()
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def free_disk(path: Path) -> int:
    """Free bytes on the disk where `path` is or would be."""
    return shutil.disk_usage(existing_parent(path)).free


def can_write(path: Path) -> bool:
    """Whether files can be made in this folder, or the folder itself made."""
    parent = existing_parent(path)
    return parent.is_dir() and os.access(parent, os.W_OK | os.X_OK)


def format_bytes(size: int) -> str:
    """'61.0 GiB', '512 MiB'."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"


def _group_limits(root: Path) -> Iterator[tuple[int, int]]:
    """Limit and use in bytes of every memory control group around this process; cached files do not count as used."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return  # not Linux
    for line in lines:
        _, controllers, own = line.split(":", 2)
        if not controllers:  # version 2
            base, names = root / "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            base = root / "sys/fs/cgroup/memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        group = Path(own.lstrip("/"))
        for folder in {base / group, *(base / above for above in group.parents), base}:
            try:
                limit = (folder / names[0]).read_text().strip()
                if limit == "max":
                    continue
                cached = dict(entry.split() for entry in (folder / "memory.stat").read_text().splitlines())
                yield int(limit), int((folder / names[1]).read_text()) - int(cached.get(names[2], 0))
            except (OSError, ValueError):
                continue  # the root group has no limit; inside a container the groups above are not to be seen
