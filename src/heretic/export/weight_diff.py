"""Compare the weights of two folders, tensor by tensor; of a LoRA adapter the products, since its factors are not unique."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from heretic.errors import UserError, first_line
from heretic.interrupt import StopSignal

# Sums in another order differ in the last bits of float32; what is stored in fewer bits may then be rounded to the next number.
OF_THE_TENSOR = 1e-5  # of the tensor's largest number
ROUNDINGS = 2  # of the stored format, of each number
LORA_A, LORA_B = ".lora_A.weight", ".lora_B.weight"


@dataclass(frozen=True)
class Difference:
    """Differences between the weights of two folders."""

    largest: float
    tensor: str  # that has the largest difference
    differing: int  # number of different elements
    elements: int  # number of all elements
    within: bool  # whether rounding explains all differences

    def __str__(self) -> str:
        """Return the text for the screen."""
        return f"{self.differing} of {self.elements} values differ, by at most {self.largest:.1e} (in {self.tensor})"


def weight_difference(ours: Path, theirs: Path, names: Iterable[str], stop: StopSignal) -> Difference | str:
    """Compare the safetensors files of these names in two folders; returns a text if they cannot be compared.

    Raises UserError for a file that cannot be read.
    """
    largest, tensor, differing, elements, within = 0.0, "", 0, 0, True
    for name in names:
        if not (theirs / name).is_file():
            return f"{name} is not in {theirs}"
        try:
            with safe_open(ours / name, framework="pt") as a, safe_open(theirs / name, framework="pt") as b:
                if set(a.keys()) != set(b.keys()):
                    return f"{name} holds other tensors"
                for key in a.keys():  # noqa: SIM118  (the handle is not a mapping)
                    stop.check()
                    if key.endswith(LORA_B) and key.replace(LORA_B, LORA_A) in a.keys():  # noqa: SIM118
                        continue
                    x, y = _read(a, key), _read(b, key)
                    if x.shape != y.shape or x.dtype != y.dtype:
                        return f"{key} is {_kind(x)} here and {_kind(y)} there"
                    elements += x.numel()
                    if torch.equal(x, y):
                        continue
                    far, count, near = _compared(x, y)
                    differing, within = differing + count, within and near
                    if not far <= largest:
                        largest, tensor = far, key
        except SafetensorError as error:
            raise UserError(
                f"{name} is damaged: {first_line(error)}",
                code="damaged-weights",
                where=f"{ours}, {theirs}",
                fix="export the model again, or restore the file from a copy",
            ) from None
    return Difference(largest, tensor, differing, elements, within)


def _read(file: Any, key: str) -> torch.Tensor:
    """Read a tensor; for the first factor of a LoRA pair the product of both."""
    tensor: torch.Tensor = file.get_tensor(key)
    if not key.endswith(LORA_A) or key.replace(LORA_A, LORA_B) not in file.keys():  # noqa: SIM118
        return tensor
    other = file.get_tensor(key.replace(LORA_A, LORA_B))
    return other @ tensor if other.shape[-1] == tensor.shape[0] else tensor


def _compared(x: torch.Tensor, y: torch.Tensor) -> tuple[float, int, bool]:
    """Largest difference, numbers that differ, and whether all are within what rounding explains."""
    a, b = x.double(), y.double()
    apart = (a - b).abs()
    rounding = ROUNDINGS * torch.finfo(x.dtype).eps if x.dtype.is_floating_point else 0.0
    allowed = OF_THE_TENSOR * b.abs().max() + rounding * b.abs()
    return float(apart.max()), int((apart != 0).sum()), bool((apart <= allowed).all())


def _kind(tensor: torch.Tensor) -> str:
    return f"{list(tensor.shape)} in {str(tensor.dtype).removeprefix('torch.')}"
