"""Difference of geometric medians, which are robust to outliers.

Weiszfeld 1937; smoothed as in Pillutla et al. 2019, arXiv 1912.13445, algorithm 2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from heretic.model.capture import ResidualMeans

STEPS = 64  # fixed number of iterations
NEAREST = 1e-6  # lower bound of a distance, as a share of the mean distance, so that weights stay finite


def geometric_median(harmful: ResidualMeans, harmless: ResidualMeans, count: int, device: torch.device | str) -> Tensor:
    """Compute the geometric median of harmful minus that of harmless prompts [layers, 1, width]."""
    return (median(harmful.require_per_prompt, device) - median(harmless.require_per_prompt, device)).unsqueeze(1)


def median(residuals: Tensor, device: torch.device | str) -> Tensor:
    """Compute the geometric median of residuals [prompts, layers, width] at every layer [layers, width], in float64."""
    return torch.stack([_of_points(points.to(device).double()).cpu() for points in residuals.unbind(dim=1)])


def _of_points(points: Tensor) -> Tensor:
    middle = points.mean(dim=0)
    for _ in range(STEPS):
        distances = (points - middle).norm(dim=1)
        weights = 1 / distances.clamp_min(NEAREST * float(distances.mean()) or 1.0)
        middle = weights @ points / weights.sum()
    return middle
