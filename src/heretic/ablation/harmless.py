"""What harmless prompts need, taken out of directions before they are used."""

from __future__ import annotations

import torch
from torch import Tensor

from heretic.model.capture import ResidualMeans


def without_mean(vectors: Tensor, harmless: ResidualMeans) -> Tensor:
    """Directions [layers, count, width] without their part along the harmless mean of their layer."""
    common = torch.nn.functional.normalize(harmless.mean, dim=-1).unsqueeze(1)
    return vectors - (vectors * common).sum(-1, keepdim=True) * common


def without_atoms(
    vectors: Tensor, harmless: ResidualMeans, atoms: int, ridge: float, device: torch.device | str
) -> Tensor:
    """Directions [layers, count, width] without what a ridge regression on atoms says of them.

    After the ridge-regularised residualisation of Cristofano 2026 (arXiv 2601.08489): r - AT (A AT + ridge I)^-1 A r with atoms
    as the rows of A. The paper makes its atoms of prompts written for each capability; we have read its abstract and summaries
    only, and take as atoms the principal axes of the harmless residuals, each as long as its standard deviation in shares of the
    largest. These being orthogonal, an axis with a share s of the largest variance is taken out to s / (s + ridge).
    """
    return torch.stack(
        [
            _without(v, points.to(device).double(), atoms, ridge)
            for v, points in zip(vectors, harmless.whole.unbind(dim=1), strict=True)
        ]
    )


def _without(vectors: Tensor, points: Tensor, atoms: int, ridge: float) -> Tensor:
    _, spread, axes = torch.linalg.svd(points - points.mean(dim=0), full_matrices=False)
    shares = (spread[:atoms] / spread[0].clamp_min(1e-30)).square()
    known = axes[:atoms].cpu()
    return vectors - (vectors @ known.mT * (shares / (shares + ridge).clamp_min(1e-30)).cpu()) @ known
