"""Copies between RAM and GPUs that do not make the host wait: through pinned memory, many tensors in one copy.

A copy to or from pageable memory stops the host until the GPU has done all that was launched before. Until then no other GPU of a
spread model gets new work.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from heretic.hardware.devices import is_accelerator, pins_memory

STAGED_BYTES = 256 << 20  # of rows on their way to RAM; more makes the host wait within the pass

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


class Index:
    """An index in RAM, of which every device gets one copy."""

    def __init__(self, values: Sequence[Any]) -> None:
        self.values = values
        self._copies: dict[torch.device, Tensor] = {}

    def on(self, device: torch.device) -> Tensor:
        """Return the index on a device."""
        if device not in self._copies:
            self._copies[device] = to_device(self.values, device)
        return self._copies[device]


def rows_to_device(stored: Tensor, rows: Tensor, device: torch.device | str) -> Tensor:
    """Copy some rows (an index in RAM) of a tensor in RAM to a device, without waiting for a GPU."""
    if not _asynchronous(torch.device(device)):
        return stored[rows].to(device)
    selected = torch.index_select(stored, 0, rows, out=pinned((len(rows), *stored.shape[1:]), stored.dtype))
    return selected.to(device, non_blocking=True)


class HostCopies:
    """Copies to RAM that are launched during a pass and awaited together after it."""

    def __init__(self) -> None:
        self.bytes = 0  # launched since the last wait
        self._events: dict[torch.device, torch.Event] = {}  # by GPU: after its last copy

    @property
    def pending(self) -> bool:
        """Whether there is anything to wait for."""
        return bool(self._events)

    def copy(self, tensor: Tensor) -> Tensor:
        """Return the tensor's copy in RAM, valid after `wait`; on the CPU the tensor itself."""
        gpu = tensor.device
        if not _asynchronous(gpu):
            return tensor.to("cpu")
        copied = pinned(tensor.shape, tensor.dtype)
        copied.copy_(tensor.contiguous(), non_blocking=True)
        self._events.setdefault(gpu, torch.Event(gpu)).record(torch.accelerator.current_stream(gpu))
        self.bytes += copied.nbytes
        return copied

    def wait(self) -> None:
        """Wait for all copies, once for each GPU, and not for what was launched after them."""
        for event in self._events.values():
            event.synchronize()
        self._events.clear()
        self.bytes = 0

    def delay(self, gpu: torch.device) -> None:
        """Let what is launched on a GPU from now on wait for all copies; the host does not."""
        for event in self._events.values():
            torch.accelerator.current_stream(gpu).wait_event(event)


class RowsToStore:
    """Rows on their way from a device into larger tensors in RAM."""

    def __init__(self) -> None:
        self._copies = HostCopies()
        self._staged: list[tuple[Tensor, Tensor, Tensor]] = []

    def add(self, stored: Tensor, rows: Tensor, new: Tensor) -> None:
        """Launch the copy of new rows [rows, ...] to `stored[rows]`; an index below 0 (in RAM, of any shape) is left out."""
        self._staged.append((stored, rows, self._copies.copy(new)))
        if not self._copies.pending or self._copies.bytes > STAGED_BYTES:  # nothing to wait for, or enough to wait
            self.write()

    def write(self) -> None:
        """Wait for the copies, and store them."""
        self._copies.wait()
        for stored, rows, new in self._staged:
            real = rows >= 0
            if bool(real.all()):
                stored[rows] = new
            else:
                stored[rows[real]] = new[real]
        self._staged.clear()


def send_through_ram(tensor: Tensor, device: torch.device) -> Callable[[], Tensor]:
    """Send a tensor to another GPU through RAM; the result gives it there, and does not make the host wait.

    PyTorch's direct copy waits for all that was launched on both GPUs. Of this way each half waits for its own GPU, when it is
    launched: on its way back to the first GPU of a spread model, a tensor holds up no batch that is under way between the two.
    """
    if tensor.device == device or not _asynchronous(device):
        return lambda: tensor.to(device)
    copies = HostCopies()
    in_ram = copies.copy(tensor)

    def arrive() -> Tensor:
        copies.delay(device)
        return in_ram.to(device, non_blocking=True)

    return arrive


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
