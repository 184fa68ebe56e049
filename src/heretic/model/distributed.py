"""The processes that torchrun starts: which one this is, and values that all take from the first."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


def rank() -> int:
    """This process's number among those that torchrun started; 0 leads."""
    return int(os.environ["RANK"]) if _started_by_torchrun() else 0


def size() -> int:
    """How many processes share a model."""
    return int(os.environ["WORLD_SIZE"]) if _started_by_torchrun() else 1


def _started_by_torchrun() -> bool:
    return all(name in os.environ for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR"))


def broadcast_from_rank0(ask: Callable[[], T]) -> T:
    """What the leader finds, for all: the others do not ask. Without tensor parallelism it is simply asked."""
    import torch.distributed as dist

    if size() == 1:
        return ask()
    said: list[Any] = [ask() if rank() == 0 else None]
    dist.broadcast_object_list(said, src=0)
    return said[0]
