"""What the CPU computes natively."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Iterator
from pathlib import Path

from heretic.hardware.control_groups import control_groups

# Instructions that multiply bfloat16 and add in float32, as PyTorch and as Linux name them.
NATIVE_BFLOAT16 = frozenset({"avx512_bf16", "amx_bf16", "bf16", "sve_bf16", "svebf16"})


@functools.cache
def native_bfloat16() -> bool:
    """Return whether PyTorch multiplies bfloat16 matrices with this CPU's own instructions.

    Elsewhere it converts every operand, which is slower than float32. PyTorch's own check for bfloat16 support says nothing
    about speed: it is also true for a CPU with AVX-512 alone.
    """
    import torch

    return torch.backends.mkldnn.is_available() and not NATIVE_BFLOAT16.isdisjoint(_features())


def _features() -> set[str]:
    """Return the names of the CPU's features, from PyTorch or, if it is too old for that, from Linux."""
    import torch

    if hasattr(torch.cpu, "get_capabilities"):
        return {name for name, value in torch.cpu.get_capabilities().items() if value is True}
    return cpuinfo_features()


def cpuinfo_features(file: Path = Path("/proc/cpuinfo")) -> set[str]:
    """Return the features that Linux lists for the first core (`flags` on x86, `Features` on ARM); empty elsewhere."""
    try:
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return set()
    return set(
        next((text.split() for name, _, text in (line.partition(":") for line in lines)
              if name.strip() in ("flags", "Features")), [])
    )  # fmt: skip


def usable_cores(root: Path = Path("/")) -> int:
    """Return the cores that this process may use, by its affinity and the CPU quotas of its control groups (Linux)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, cpu_quota(root) or cores))


def cpu_quota(root: Path = Path("/")) -> int | None:
    """Return the CPU quota of this process's control groups in cores, rounded up; None without one."""
    return min((math.ceil(quota) for quota in _quotas(root)), default=None)


def _quotas(root: Path) -> Iterator[float]:
    """Yield the CPU quotas of this process's control groups in cores."""
    for folder, version in control_groups("cpu", root):
        try:
            if version == 1:
                quota, period = ((folder / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
            else:
                quota, period = (folder / "cpu.max").read_text().split()
            if quota not in ("max", "-1"):
                yield int(quota) / int(period)
        except (OSError, ValueError, ZeroDivisionError):
            continue
