"""The edit of a module that reads the stream: y' = y - s W (S v) (v / S . x), as a weight W (I - s (S v) (v / S)T).

Its input is x = S z with z the normed stream and S the norm's weight, so v / S . x is the share of v in z, and S v is what v adds
to the input. It is the counterpart of the weight orthogonalization of Arditi et al. 2024 (arXiv 2406.11717), which takes the
direction out of what writes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from heretic.ablation.operator import Operator
from heretic.ablation.weight_stats import times, times_transposed
from heretic.model.lazy_tensor import LazyTensor, materialize
from heretic.model.transfer import to_device

# Entries of S below this share of the largest one pass almost nothing: what v has there is left alone.
SMALLEST_SCALE = 1e-3


def reading_operator(v: Tensor, strength: float | Tensor, scale: Tensor, matrices: Sequence[LazyTensor]) -> Operator:
    """Return the operator of a reader.

    Args:
        v: Unit vector [width], or k orthonormal ones [k, width].
        strength: 1 removes the direction.
        scale: S [width].
        matrices: The weight [outputs, width], as `ResidualWriter.weights` returns it.
    """
    passed = scale.abs() > SMALLEST_SCALE * scale.abs().max()
    inverse = torch.where(passed, 1 / torch.where(passed, scale, torch.ones_like(scale)), torch.zeros_like(scale))
    return Operator(strength * _WeightTimes.apply(v * scale * passed, matrices), None, a=v * inverse)


class _WeightTimes(torch.autograd.Function):
    """x [k, width] -> x WT [k, outputs], on the device of x. A part of W exists in float32 at a time, and nothing is saved."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, matrices: Sequence[LazyTensor]) -> Tensor:
        ctx.matrices = matrices
        (matrix,) = map(materialize, matrices)
        return times_transposed(to_device(x, matrix.device), matrix).to(x.device)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (matrix,) = map(materialize, ctx.matrices)
        return times(to_device(gradient, matrix.device), matrix).to(gradient.device), None
