"""The control groups of this process (Linux), by which containers and job schedulers limit it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path


def control_groups(controller: str, root: Path) -> Iterator[tuple[Path, int]]:
    """Yield the folders of the groups that may limit this process, and the version of their files; none outside Linux.

    A container sees its own group as the root, or the groups above too; folders need not exist.

    Args:
        controller: of version 1, such as "memory" or "cpu"; version 2 has one folder for all.
        root: the root of the file system.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, own = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        base, group = root / "sys/fs/cgroup" / (controller if controllers else ""), Path(own.lstrip("/"))
        for folder in {base / group, *(base / above for above in group.parents)}:
            yield folder, 1 if controllers else 2
