"""The refusal directions of every layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from heretic.errors import UserError

# Added to the diagonal of a Gram matrix of unit vectors: a dependent vector becomes 0 instead of noise.
JITTER = 1e-12
# The share of a direction that must remain after the previous ones are projected out; less is rounding.
MIN_RESIDUAL_FRACTION = 1e-4


@dataclass(frozen=True)
class Directions:
    """Unit vectors in float32: row l of `vectors` [layers, width] is the direction in the residual stream after block l.

    `extra` [layers, count - 1, width] has the other directions; all of a layer are orthogonal.
    """

    vectors: Tensor
    extra: Tensor | None = None

    @property
    def num_layers(self) -> int:
        """Number of layers."""
        return len(self.vectors)

    @property
    def count(self) -> int:
        """Number of directions per layer."""
        return 1 if self.extra is None else 1 + self.extra.shape[1]

    @property
    def all_directions(self) -> Tensor:
        """All directions [layers, count, width]."""
        first = self.vectors.unsqueeze(1)
        return first if self.extra is None else torch.cat([first, self.extra], dim=1)

    def mixed_at(self, coefficients: Sequence[float] | Tensor) -> Tensor:
        """Mix the layers' directions by rank [count, width]; the result is neither normalized nor orthogonal."""
        mix = torch.as_tensor(coefficients, dtype=self.vectors.dtype)
        return torch.tensordot(mix, self.all_directions, 1)


def orthonormal(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Orthonormalize rows [..., k, width] in order (Gram-Schmidt); returns them and T [..., k, k] with result = `T @ rows`.

    A row in the span of the previous ones becomes 0. Uses the Cholesky decomposition of the Gram matrix in float64:
    differentiable, and k x k arithmetic for any width.
    """
    full = rows.double()
    lengths = full.norm(dim=-1).clamp_min(1e-30)
    unit = full / lengths.unsqueeze(-1)
    eye = torch.eye(rows.shape[-2], dtype=full.dtype, device=full.device)
    lower = torch.linalg.cholesky(unit @ unit.mT + JITTER * eye)
    turn = torch.linalg.solve_triangular(lower, eye.expand_as(lower), upper=False)
    return (turn @ unit).to(rows.dtype), (turn / lengths.unsqueeze(-2)).to(rows.dtype)


def normalized(vectors: Tensor, earlier: Directions | None = None) -> Directions:
    """Orthonormalize directions [layers, count, width] within each layer, after those of `earlier` rounds.

    Raises:
        UserError: if a direction is 0, or depends on the others of its layer.
    """
    vectors = vectors.double()
    flat = (vectors.norm(dim=-1) <= 1e-9).any(dim=1).nonzero().flatten().tolist()
    if flat:
        raise UserError(
            f"The harmful and harmless prompts give the same residuals in layer {flat[0]}: there is no direction to find.",
            code="no-direction",
            where="prompts.harmful_train, prompts.harmless_train",
            fix="use prompt sets that differ in whether the model refuses",
        )
    rows_before = vectors if earlier is None else torch.cat([earlier.all_directions.to(vectors), vectors], dim=1)
    rows, turned = orthonormal(rows_before / rows_before.norm(dim=-1, keepdim=True))
    # The diagonal of T is 1 / (remainder of a direction after the previous ones are projected out).
    poor = (turned.diagonal(dim1=-2, dim2=-1) > 1 / MIN_RESIDUAL_FRACTION).nonzero()
    if len(poor):
        layer, number = poor[0].tolist()
        raise UserError(
            f"Layer {layer} has only {number} independent directions.",
            code="too-few-directions",
            where="directions",
            fix="lower directions.count or directions.iterative_rounds, or add prompts to prompts.harmful_train",
        )
    rows = torch.nn.functional.normalize(rows, dim=-1).float()
    return Directions(rows[:, 0].contiguous(), rows[:, 1:].contiguous() if rows.shape[1] > 1 else None)
