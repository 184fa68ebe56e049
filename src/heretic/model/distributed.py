"""The processes of torchrun: their ranks, and values broadcast from rank 0."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


def rank() -> int:
    """Return this process's rank under torchrun; 0 without torchrun."""
    return int(os.environ["RANK"]) if _started_by_torchrun() else 0


def size() -> int:
    """Return the number of processes that share a model."""
    return int(os.environ["WORLD_SIZE"]) if _started_by_torchrun() else 1


def _started_by_torchrun() -> bool:
    return all(name in os.environ for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR"))


def broadcast_from_rank0(ask: Callable[[], T]) -> T:
    """Return `ask()` of rank 0 in all processes; the others do not call it."""
    import torch.distributed as dist

    if size() == 1:
        return ask()
    values: list[Any] = [ask() if rank() == 0 else None]
    dist.broadcast_object_list(values, src=0)
    return values[0]
