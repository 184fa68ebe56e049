"""PyTorch as it answers about an accelerator that is not here: enough to plan a run, no tensors."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

GIB = 2**30


def play(
    monkeypatch: pytest.MonkeyPatch,
    prefix: str,
    *uuids: str | None,
    free: float = 5,
    total: float = 8,
    hip: str | None = None,
    **module: Any,
) -> None:
    """Show PyTorch a device of this kind for each UUID (None: PyTorch does not tell it), with GiB of memory.

    `module` replaces functions of the kind's own module.
    """
    sizes = (int(free * GIB), int(total * GIB))

    def properties(index: int) -> SimpleNamespace:
        uuid = uuids[index]
        own = {} if uuid is None else {"uuid": uuid}
        return SimpleNamespace(name="from torch", total_memory=sizes[1], **own)

    usual = {
        "get_device_properties": properties,
        "empty_cache": lambda: None,
        "recommended_max_memory": lambda: sizes[1],
        "driver_allocated_memory": lambda: sizes[1] - sizes[0],
    }
    accelerator = {
        "current_accelerator": lambda check_available=False: SimpleNamespace(type=prefix),
        "is_available": lambda: True,
        "device_count": lambda: len(uuids),
        "get_memory_info": lambda index: sizes,
        "memory_reserved": lambda index: sizes[1] - sizes[0],
        "max_memory_reserved": lambda index: sizes[1],
        "empty_host_cache": lambda: None,
    }
    for name, value in accelerator.items():
        monkeypatch.setattr(torch.accelerator, name, value)
    monkeypatch.setattr(torch, "get_device_module", lambda device: SimpleNamespace(**(usual | module)))
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.backends.mps, "get_name", lambda: "Apple M3", raising=False)


def hide(monkeypatch: pytest.MonkeyPatch, built_for: str | None = None) -> None:
    """Show PyTorch no device, whatever it is built for."""

    def current(check_available: bool = False) -> SimpleNamespace | None:
        return None if check_available or built_for is None else SimpleNamespace(type=built_for)

    monkeypatch.setattr(torch.accelerator, "current_accelerator", current)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 0)
