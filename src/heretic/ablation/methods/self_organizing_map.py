"""Directions from a 4 x 4 self-organizing map of the harmful prompts (Piras et al. 2025, arXiv 2511.08379).

A neuron minus the harmless mean is a direction. The paper selects neurons by Bayesian optimization; here those with the most
prompts are used. Batch training (Kohonen 2013, Neural Networks 37, section 4.2) starts in the plane of the first two principal
components, so it is deterministic.
"""

from __future__ import annotations

import torch
from torch import Tensor

from heretic.model.capture import ResidualMeans

SIDE = 4  # neurons per side of the hexagonal grid
TRAINING_ROUNDS = 30
NEIGHBORHOOD_WIDTH = (
    2.0,
    0.4,
)  # in the first and the last round, in distances between neighbors


def self_organizing_map(
    harmful: ResidualMeans, harmless: ResidualMeans, count: int, device: torch.device | str
) -> Tensor:
    """Return the neurons with the most prompts, minus the harmless mean [layers, count, width]."""
    directions = []
    for layer, points in enumerate(harmful.require_per_prompt.unbind(dim=1)):
        neurons, prompts = train_map(points.to(device).double())
        most = torch.argsort(prompts, descending=True, stable=True)[:count]
        directions.append(neurons[most].cpu() - harmless.mean[layer])
    return torch.stack(directions)


def train_map(points: Tensor) -> tuple[Tensor, Tensor]:
    """Train a map on points [prompts, width]; returns the neurons [16, width] and the number of points of each [16]."""
    places = _grid().to(points)
    apart = torch.cdist(places, places).square()
    middle = points.mean(dim=0)
    neurons = middle + (places - places.mean(dim=0)) @ _plane(points - middle)
    for turn in range(TRAINING_ROUNDS):
        reach = NEIGHBORHOOD_WIDTH[0] * (NEIGHBORHOOD_WIDTH[1] / NEIGHBORHOOD_WIDTH[0]) ** (
            turn / (TRAINING_ROUNDS - 1)
        )
        own = torch.cdist(points, neurons).argmin(dim=1)
        weights = torch.exp(-apart[own] / (2 * reach**2))  # [prompts, neurons]
        sums = weights.sum(dim=0).unsqueeze(1)
        neurons = torch.where(sums > 1e-12, weights.mT @ points / sums.clamp_min(1e-12), neurons)
    own = torch.cdist(points, neurons).argmin(dim=1)
    return neurons, torch.bincount(own, minlength=len(neurons))


def _grid() -> Tensor:
    """Return the grid positions of the neurons [16, 2], neighbors at distance 1."""
    return torch.tensor([(x + 0.5 * (y % 2), y * 0.75**0.5) for y in range(SIDE) for x in range(SIDE)])


def _plane(centered: Tensor) -> Tensor:
    """Return the two largest principal axes [2, width], one standard deviation long, largest component positive."""
    _, spread, axes = torch.linalg.svd(centered, full_matrices=False)
    axes = axes[:2] * (spread[:2, None] / len(centered) ** 0.5)
    axes = torch.cat([axes, axes.new_zeros(2 - len(axes), axes.shape[1])])
    largest = axes.gather(1, axes.abs().argmax(dim=1, keepdim=True))
    return axes * torch.where(largest < 0, -1.0, 1.0)
