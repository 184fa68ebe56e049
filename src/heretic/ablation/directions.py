"""The refusal directions of every layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from heretic.errors import UserError

# Added to the diagonal of a Gram matrix of unit vectors: what the ones before already hold comes out as 0, not as noise.
JITTER = 1e-12
# The share of a direction that must be left when the ones before are taken out of it; less is rounding.
MIN_RESIDUAL_FRACTION = 1e-4


@dataclass(frozen=True)
class Directions:
    """Unit vectors in float32: row l of `vectors` [layers, width] is the direction in the residual stream after block l.

    Where a layer has several, `further` [layers, count - 1, width] are the others, all of a layer's at right angles.
    """

    vectors: Tensor
    extra: Tensor | None = None

    @property
    def num_layers(self) -> int:
        """Number of layers."""
        return len(self.vectors)

    @property
    def count(self) -> int:
        """Number of directions of a layer."""
        return 1 if self.extra is None else 1 + self.extra.shape[1]

    @property
    def all_directions(self) -> Tensor:
        """All of them [layers, count, width]."""
        first = self.vectors.unsqueeze(1)
        return first if self.extra is None else torch.cat([first, self.extra], dim=1)

    def mixed_at(self, coefficients: Sequence[float] | Tensor) -> Tensor:
        """The layers' directions mixed, first with first, second with second [count, width]; neither of length 1 nor at right
        angles."""
        mix = torch.as_tensor(coefficients, dtype=self.vectors.dtype)
        return torch.tensordot(mix, self.all_directions, 1)

    def unit(self, coefficients: Sequence[float] | Tensor) -> Tensor:
        """Coefficients c [layers] scaled so that `c @ vectors` has norm 1."""
        mix = torch.as_tensor(coefficients, dtype=self.vectors.dtype)
        return mix / (mix @ self.vectors).norm()


def orthonormal(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [..., k, width] made orthonormal one after the other (Gram-Schmidt), and the matrix T [..., k, k] with
    which `T @ rows` is that.

    The first keeps its direction; one that lies in the span of those before becomes 0. By Cholesky's decomposition of the Gram
    matrix in float64, so it is differentiable, and it is k x k arithmetic however wide the rows are.
    """
    full = rows.double()
    lengths = full.norm(dim=-1).clamp_min(1e-30)
    unit = full / lengths.unsqueeze(-1)
    eye = torch.eye(rows.shape[-2], dtype=full.dtype, device=full.device)
    lower = torch.linalg.cholesky(unit @ unit.mT + JITTER * eye)
    turn = torch.linalg.solve_triangular(lower, eye.expand_as(lower), upper=False)
    return (turn @ unit).to(rows.dtype), (turn / lengths.unsqueeze(-2)).to(rows.dtype)


def interpolation(index: float, layers: int) -> tuple[float, ...]:
    """Coefficients [layers] of the direction at a layer index that may lie between two layers; outside, the nearest layer's."""
    index = min(max(index, 0.0), layers - 1.0)
    low = int(index)
    coefficients = [0.0] * layers
    coefficients[low] += 1 - (index - low)
    if index > low:
        coefficients[low + 1] += index - low
    return tuple(coefficients)


def normalized(vectors: Tensor, earlier: Directions | None = None) -> Directions:
    """Directions of any length [layers, count, width] made orthonormal within a layer, behind those of `earlier` rounds.

    Raises UserError if a layer has none, or fewer than asked for.
    """
    vectors = vectors.double()
    flat = (vectors.norm(dim=-1) <= 1e-9).any(dim=1).nonzero().flatten().tolist()
    if flat:
        raise UserError(
            f"The harmful and harmless prompts give the same residuals in layer {flat[0]}: there is no direction to find.",
            code="no-direction",
            where="prompts.harmful_train, prompts.harmless_train",
            fix="use prompt sets that differ in whether the model declines",
        )
    rows_before = vectors if earlier is None else torch.cat([earlier.all_directions.to(vectors), vectors], dim=1)
    rows, turned = orthonormal(rows_before / rows_before.norm(dim=-1, keepdim=True))
    # The diagonal of T is 1 / (what is left of a direction when those before are taken out).
    poor = (turned.diagonal(dim1=-2, dim2=-1) > 1 / MIN_RESIDUAL_FRACTION).nonzero()
    if len(poor):
        layer, number = poor[0].tolist()
        raise UserError(
            f"Layer {layer} has only {number} different directions.",
            code="too-few-directions",
            where="directions",
            fix="lower directions.count or directions.iterative_rounds, or give more prompts to harmful_train",
        )
    rows = torch.nn.functional.normalize(rows, dim=-1).float()
    return Directions(rows[:, 0].contiguous(), rows[:, 1:].contiguous() if rows.shape[1] > 1 else None)
