"""A tensor, or a function that creates it (dequantized or read from a file) only while it is used."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

LazyTensor = Tensor | Callable[[], Tensor]


def materialize(matrix: LazyTensor) -> Tensor:
    """Return the tensor, created if needed."""
    return matrix if isinstance(matrix, Tensor) else matrix()
