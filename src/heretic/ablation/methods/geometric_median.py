"""The difference of geometric medians: the point with the least sum of distances to all residuals, which a few prompts with
huge residuals cannot pull away as they pull a mean (Weiszfeld 1937; smoothed as in Pillutla et al. 2019, arXiv 1912.13445,
algorithm 2)."""

from __future__ import annotations

import torch
from torch import Tensor

from heretic.model.capture import ResidualMeans

STEPS = 64  # of the iteration, however far it has come
NEAREST = (
    1e-6  # of the mean distance: a prompt that is nearer counts as being so far away, so that no weight is infinite
)


def geometric_median(harmful: ResidualMeans, harmless: ResidualMeans, count: int, device: torch.device | str) -> Tensor:
    """Geometric median of the harmful prompts minus that of the harmless ones, one direction a layer [layers, 1, width]."""
    return (median(harmful.require_per_prompt, device) - median(harmless.require_per_prompt, device)).unsqueeze(1)


def median(residuals: Tensor, device: torch.device | str) -> Tensor:
    """Geometric median of residuals [prompts, layers, width] at every layer [layers, width] in float64, a layer at a time."""
    return torch.stack([_of_points(points.to(device).double()).cpu() for points in residuals.unbind(dim=1)])


def _of_points(points: Tensor) -> Tensor:
    middle = points.mean(dim=0)
    for _ in range(STEPS):
        distances = (points - middle).norm(dim=1)
        weights = 1 / distances.clamp_min(NEAREST * float(distances.mean()) or 1.0)
        middle = weights @ points / weights.sum()
    return middle
