"""A weight, or a function that makes it: one that is dequantized or read from a file exists only while it is used."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

LazyTensor = Tensor | Callable[[], Tensor]


def materialize(matrix: LazyTensor) -> Tensor:
    """The weight itself."""
    return matrix if isinstance(matrix, Tensor) else matrix()
