"""`row_normalized`, then every row of W scaled back to its old norm."""

from __future__ import annotations

import torch
from torch import Tensor

from heretic.ablation.operator import Operator
from heretic.ablation.weight_stats import TINY, WeightStats


def norm_preserving(v: Tensor, strength: float | Tensor, facts: WeightStats, mix: Tensor) -> Operator:
    """Compute N_i^2 = 1 - 2 s v_i . g_i + s^2 v_i A v_i, with the k directions' i-th components v_i and g_i, A = a aT [k, k]."""
    rows, made_of = torch.atleast_2d(v), torch.atleast_2d(mix)
    along = (rows * (made_of @ facts.g)).sum(dim=0)
    across = (rows * ((made_of @ facts.gram @ made_of.mT) @ rows)).sum(dim=0)
    squared = 1 - 2 * strength * along + strength**2 * across
    return Operator(strength * facts.norms * v, v / facts.norms, squared.clamp_min(TINY).rsqrt())
