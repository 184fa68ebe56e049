"""(I - s v vT) W, as in Arditi et al. 2024 (arXiv 2406.11717)."""

from __future__ import annotations

from torch import Tensor

from heretic.ablation.operator import Operator


def plain(v: Tensor, strength: float | Tensor, facts: None, mix: Tensor) -> Operator:
    """Remove v from the output."""
    return Operator(strength * v, v)
