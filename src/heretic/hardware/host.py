"""Devices and disks of the machine, within the limits of this process."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import psutil

from heretic.files import expand_user
from heretic.hardware.cpu import native_bfloat16
from heretic.hardware.devices import CPU, Device
from heretic.hardware.gpus import Gpu
from heretic.hardware.ram import memory


def devices(gpus: Sequence[Gpu]) -> list[Device]:
    """Return the devices for weights: the given GPUs, then the CPU."""
    total, free = memory()
    if not gpus:  # CUDA reserves more addresses than there is memory
        free = min(free, _addresses())
    return [*(gpu.device for gpu in gpus), Device(CPU, total, free, native_bfloat16=native_bfloat16())]


def _addresses() -> int:
    """Return how many bytes more this process may map by the limit on its address space (`ulimit -v`)."""
    try:
        import resource
    except ImportError:  # Windows
        return sys.maxsize
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    return sys.maxsize if limit == resource.RLIM_INFINITY else max(0, limit - psutil.Process().memory_info().vms)


def mappable(root: Path = Path("/")) -> int | None:
    """Return the maximum size in bytes of a file that safetensors can map; None without a limit.

    PyTorch creates a private writable mapping, which Linux refuses if RAM and swap can never back it.
    """
    try:
        mode = (root / "proc/sys/vm/overcommit_memory").read_text().strip()
        fields = dict(line.split(":", 1) for line in (root / "proc/meminfo").read_text().splitlines())
        names = {"0": ("MemTotal", "SwapTotal"), "2": ("CommitLimit",)}.get(mode, ())
        return sum(int(fields[name].split()[0]) * 1024 for name in names) or None
    except (OSError, KeyError, ValueError):
        return None  # not Linux


def existing_parent(path: Path) -> Path:
    """Return the path itself or its nearest existing parent."""
    path = expand_user(path).absolute()
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def free_disk(path: Path) -> int:
    """Return the free bytes on the disk of `path`, which need not exist."""
    return shutil.disk_usage(existing_parent(path)).free


def can_write(path: Path) -> bool:
    """Return whether a folder is writable or, if it does not exist, can be created."""
    parent = existing_parent(path)
    return parent.is_dir() and os.access(parent, os.W_OK | os.X_OK)


def is_mount_point(path: Path) -> bool:
    """Return whether a file system or a bind mount begins at a path, links followed."""
    resolved = os.path.realpath(path)  # `resolve` raises RuntimeError for a loop of links
    return os.path.ismount(resolved) or resolved in {p.mountpoint for p in psutil.disk_partitions(all=True)}


def format_bytes(size: int) -> str:
    """Format a size like '61.0 GiB' or '512 MiB'."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"
