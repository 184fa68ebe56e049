"""Statistics of a writer's weight that geometries need: computed once per study, by products with the weight."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from heretic.model.lazy_tensor import LazyTensor, materialize
from heretic.model.transfer import to_device

# Rows of a weight with a smaller norm count as zero, so that D^-1 stays finite.
TINY = 1e-12
ELEMENTS_PER_CHUNK = 2**24  # of a weight, in float32: 64 MiB


@dataclass(frozen=True)
class WeightStats:
    """Statistics of one writer's weight W [width, inputs] for k directions V [k, width].

    The experts of a MoE writer count as one W, side by side: the operator edits their sum. With Wn = W / D and a = V Wn, `g` and
    `gram` suffice for any mix of the directions.
    """

    norms: Tensor  # D, the norms of W's rows [width]
    g: Tensor  # (Wn a^T)^T [k, width]
    gram: Tensor  # a a^T [k, k]

    def to(self, device: torch.device | str) -> WeightStats:
        """Move the statistics to a device."""
        return replace(self, norms=self.norms.to(device), g=self.g.to(device), gram=self.gram.to(device))


@torch.no_grad()
def weight_statistics(weight: Tensor | Sequence[LazyTensor], directions: Tensor) -> WeightStats:
    """Compute the statistics of a weight [width, inputs], or of several side by side, for directions [k, width].

    Only `ELEMENTS_PER_CHUNK` elements exist in float32 at a time.
    """
    matrices = [weight] if isinstance(weight, Tensor) else weight
    squares = [_squared_norms(materialize(m)) for m in matrices]
    norms = _sum(s.to(squares[0].device) for s in squares).sqrt().clamp_min(TINY)
    g = torch.zeros(len(directions), len(norms), device=norms.device)
    gram = torch.zeros(len(directions), len(directions), device=norms.device)
    for matrix in map(materialize, matrices):
        d = norms.to(matrix.device)
        unit = directions.to(matrix.device) / d
        a = _sum(unit[:, rows] @ matrix[rows].float() for rows in _rows(matrix))
        for rows in _rows(matrix):
            g[:, rows] += (a @ matrix[rows].float().T / d[rows]).to(g.device)
        gram += (a @ a.T).to(gram.device)
    return WeightStats(norms, g, gram)


def _squared_norms(matrix: Tensor) -> Tensor:
    return torch.cat([matrix[rows].float().square().sum(dim=1) for rows in _rows(matrix)])


def _rows(matrix: Tensor) -> list[slice]:
    count = max(1, ELEMENTS_PER_CHUNK // matrix.shape[1])
    return [slice(start, start + count) for start in range(0, len(matrix), count)]


def _sum(tensors: Iterator[Tensor]) -> Tensor:
    return functools.reduce(torch.add, tensors)


class _WeightProduct(torch.autograd.Function):
    """x -> W W^T x for vectors x [width] or [k, width]. It is symmetric and thus its own derivative, so nothing is saved."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, matrices: Sequence[LazyTensor]) -> Tensor:
        ctx.matrices = matrices
        return _sum(_weight_product(x, materialize(m)) for m in matrices)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _sum(_weight_product(gradient, materialize(m)) for m in ctx.matrices), None


def _weight_product(x: Tensor, matrix: Tensor) -> Tensor:
    return times_transposed(times(to_device(x, matrix.device), matrix), matrix).to(x.device)


def times(x: Tensor, matrix: Tensor) -> Tensor:
    """Compute x W [..., inputs] for x [..., width] on the device of W [width, inputs], converted a part at a time."""
    return _sum(x[..., rows] @ matrix[rows].to(x.dtype) for rows in _rows(matrix))


def times_transposed(x: Tensor, matrix: Tensor) -> Tensor:
    """Compute x WT [..., width] for x [..., inputs], as `times`."""
    return torch.cat([x @ matrix[rows].to(x.dtype).mT for rows in _rows(matrix)], dim=-1)


def stats_for_directions(v: Tensor, weight: Tensor | Sequence[LazyTensor], norms: Tensor) -> WeightStats:
    """Compute statistics as `weight_statistics`, from known row norms, for directions [width] or [k, width] with gradients."""
    g = _WeightProduct.apply(v / norms, [weight] if isinstance(weight, Tensor) else weight) / norms
    v, g = torch.atleast_2d(v), torch.atleast_2d(g)
    return WeightStats(norms, g, v @ g.mT)
