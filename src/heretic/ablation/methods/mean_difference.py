"""Difference of mean residuals (Arditi et al. 2024, arXiv 2406.11717, section 2.3)."""

from __future__ import annotations

import torch
from torch import Tensor

from heretic.model.capture import ResidualMeans


def mean_difference(harmful: ResidualMeans, harmless: ResidualMeans, count: int, device: torch.device | str) -> Tensor:
    """Compute the mean residual of harmful minus that of harmless prompts [layers, 1, width]."""
    return (harmful.mean - harmless.mean).unsqueeze(1)
