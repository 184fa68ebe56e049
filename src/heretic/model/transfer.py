"""Copies between RAM and GPUs that do not make the host wait: through pinned memory, many tensors in one copy.

A copy to or from pageable memory stops the host until the GPU has done all that was launched before. Until then no other GPU of a
spread model gets new work.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from heretic.hardware.devices import is_accelerator, pins_memory

Values = Tensor | Sequence[Any]


def to_device(values: Values, device: torch.device | str) -> Tensor:
    """Copy numbers (nested) or a tensor to a device; to a GPU without waiting for it.

    A copy from a GPU to RAM waits: nobody could tell when its values are there.
    """
    tensor = values if isinstance(values, Tensor) else torch.tensor(values)
    target = torch.device(device)
    if not _asynchronous(target) or tensor.device.type != "cpu":
        return tensor.to(target, non_blocking=_asynchronous(target))
    return pinned(tensor.shape, tensor.dtype).copy_(tensor).to(target, non_blocking=True)


def _asynchronous(device: torch.device) -> bool:
    return is_accelerator(device) and pins_memory()


def pinned(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Allocate RAM that a GPU copies from and to by itself. PyTorch reuses it once the copies are done."""
    return torch.empty(tuple(shape), dtype=dtype, pin_memory=True)


def rows_to_device(stored: Tensor, rows: Tensor, device: torch.device | str) -> Tensor:
    """Copy some rows (an index in RAM) of a tensor in RAM to a device, without waiting for a GPU."""
    if not _asynchronous(torch.device(device)):
        return stored[rows].to(device)
    selected = torch.index_select(stored, 0, rows, out=pinned((len(rows), *stored.shape[1:]), stored.dtype))
    return selected.to(device, non_blocking=True)


class HostCopies:
    """Copies to RAM that are launched during a pass and awaited together after it."""

    def __init__(self) -> None:
        self.gpus: set[torch.device] = set()
        self.bytes = 0  # launched since the last wait

    def copy(self, tensor: Tensor) -> Tensor:
        """Return the tensor's copy in RAM, valid after `wait`; on the CPU the tensor itself."""
        if not _asynchronous(tensor.device):
            return tensor.to("cpu")
        copied = pinned(tensor.shape, tensor.dtype)
        copied.copy_(tensor.contiguous(), non_blocking=True)
        self.gpus.add(tensor.device)
        self.bytes += copied.nbytes
        return copied

    def wait(self) -> None:
        """Wait for all copies, once for each GPU."""
        for gpu in self.gpus:
            torch.accelerator.synchronize(gpu)
        self.gpus.clear()
        self.bytes = 0


def to_devices(tensors: Sequence[Tensor], devices: Sequence[torch.device]) -> list[Tensor]:
    """Copy tensors [...] of one dtype from RAM to their devices; those for GPUs travel together. Differentiable.

    One copy brings everything to the first GPU, one more each other GPU's part to it; the gradients come back the same way.
    """
    moved = [t if is_accelerator(d) else t.to(d) for t, d in zip(tensors, devices, strict=True)]
    of_gpu = {
        gpu: [i for i, d in enumerate(devices) if d == gpu] for gpu in dict.fromkeys(devices) if is_accelerator(gpu)
    }
    if not of_gpu:
        return moved
    packed = torch.cat([tensors[i].flatten() for indices in of_gpu.values() for i in indices])
    sizes = [sum(tensors[i].numel() for i in indices) for indices in of_gpu.values()]
    parts = _Uploaded.apply(packed, next(iter(of_gpu))).split(sizes)
    for (gpu, indices), part in zip(of_gpu.items(), parts, strict=True):
        pieces = part.to(gpu, non_blocking=True).split([tensors[i].numel() for i in indices])
        for i, piece in zip(indices, pieces, strict=True):
            moved[i] = piece.view(tensors[i].shape)
    return moved


def to_host(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copy tensors [...] of one dtype to RAM; those of GPUs travel together, with one wait for all."""
    on_gpus = [t for t in tensors if is_accelerator(t.device)]
    if not on_gpus:
        return [t.to("cpu") for t in tensors]
    last = on_gpus[-1].device
    packed = torch.cat([t.flatten().to(last, non_blocking=True) for t in on_gpus])
    copies = HostCopies()
    pieces = iter(copies.copy(packed).split([t.numel() for t in on_gpus]))
    copies.wait()
    return [next(pieces).view(t.shape) if is_accelerator(t.device) else t.to("cpu") for t in tensors]


class _Uploaded(torch.autograd.Function):
    """A copy to a GPU; the gradient is copied back."""

    @staticmethod
    def forward(_ctx: Any, packed: Tensor, gpu: torch.device) -> Tensor:
        return to_device(packed, gpu)

    @staticmethod
    def backward(_ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return to_host([gradient])[0], None
