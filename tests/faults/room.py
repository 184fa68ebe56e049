"""A device whose memory another process takes: allocations fail in the dispatcher of PyTorch, whatever asks for them."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Room(TorchDispatchMode):
    """Within the context every new tensor of more than `room` bytes fails like on a full GPU, from operation `begin` to `end`."""

    def __init__(self, room: int, begin: int = 0, end: int = 1 << 62) -> None:
        super().__init__()
        self.room, self.begin, self.end = room, begin, end
        self.operations = self.failed = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations += 1
        found = function(*args, **(kwargs or {}))
        if self.begin <= self.operations < self.end:
            given = {place(t) for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
            for tensor in tree_leaves(found):
                if isinstance(tensor, torch.Tensor) and place(tensor) not in given and tensor.nbytes > self.room:
                    self.failed += 1
                    raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {tensor.nbytes} bytes.")
        return found


def place(tensor: torch.Tensor) -> int:
    """The memory that a tensor lies in; views share it."""
    return 0 if tensor.is_meta else tensor.untyped_storage().data_ptr()


def moments(operations: int, times: int, seed: int) -> list[int]:
    """So many random operations, one in each part of the whole."""
    chance = random.Random(seed)
    return [int(operations * (i + chance.random()) / times) for i in range(times)]
