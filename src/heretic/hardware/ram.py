"""RAM of the machine, within the limits of this process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psutil

from heretic.hardware.control_groups import control_groups

# Of a memory control group, by version: files with limit and usage, and the entries of memory.stat for cached files.
GROUP_FILES = {
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file", "total_active_file"),
    2: ("memory.max", "memory.current", "inactive_file", "active_file"),
}


def memory(root: Path = Path("/")) -> tuple[int, int]:
    """Return total and available RAM in bytes, within the limits of control groups (containers, job schedulers)."""
    system = psutil.virtual_memory()
    total, available = system.total, system.available
    for limit, used in _group_limits(root):
        total, available = min(total, limit), min(available, max(0, limit - used))
    return total, available


def _group_limits(root: Path) -> Iterator[tuple[int, int]]:
    """Yield limit and usage in bytes of this process's memory control groups; cached files do not count as used."""
    for folder, version in control_groups("memory", root):
        limited, used, *cached = GROUP_FILES[version]
        try:
            limit = (folder / limited).read_text().strip()
            if limit == "max":
                continue
            usage = dict(entry.split() for entry in (folder / "memory.stat").read_text().splitlines())
            files = sum(int(usage.get(name, 0)) for name in cached)
            yield int(limit), max(0, int((folder / used).read_text()) - files)
        except (OSError, ValueError):
            continue  # the root group has no limit; a container cannot see its parent groups
