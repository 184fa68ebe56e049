"""D (I - s v vT) D^-1 W, D the norms of W's rows."""

from __future__ import annotations

from torch import Tensor

from heretic.ablation.operator import Operator
from heretic.ablation.weight_stats import WeightStats


def row_normalized(v: Tensor, strength: float | Tensor, facts: WeightStats, mix: Tensor) -> Operator:
    """Remove v from the output of the weight with rows of norm 1."""
    return Operator(strength * facts.norms * v, v / facts.norms)
