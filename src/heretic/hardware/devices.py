"""Devices for weights."""

from __future__ import annotations

from dataclasses import dataclass

CPU = "cpu"


@dataclass(frozen=True)
class Device:
    """A device for weights: `cuda:N` or `cpu`; `total` and `free` memory in bytes."""

    name: str
    total: int
    free: int
    native_bfloat16: bool = False  # of a CPU: whether it multiplies matrices in bfloat16 with its own instructions

    @property
    def is_gpu(self) -> bool:
        """Whether the device is a GPU."""
        return self.name != CPU

    @property
    def key(self) -> int | str:
        """Accelerate's name for the device: N for `cuda:N`."""
        return int(self.name.partition(":")[2]) if self.is_gpu else self.name
