"""Methods that compute the directions of every layer: one file each, and an entry in `METHODS`.

A method maps (harmful residuals, harmless residuals, count, device) to directions [layers, count, width] in float64 on the CPU,
most important first; the caller projects and normalizes them. Iterations have a fixed number of steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from heretic.ablation.methods.geometric_median import geometric_median
from heretic.ablation.methods.mean_difference import mean_difference
from heretic.ablation.methods.self_organizing_map import self_organizing_map
from heretic.model.capture import ResidualMeans

Find = Callable[[ResidualMeans, ResidualMeans, int, "torch.device | str"], Tensor]


@dataclass(frozen=True)
class Method:
    """A method, and whether it needs every prompt's residuals (`ResidualMeans.per_prompt`) or only their means."""

    find: Find
    needs_each: bool = True


METHODS = {
    "mean_difference": Method(mean_difference, needs_each=False),
    "geometric_median": Method(geometric_median),
    "self_organizing_map": Method(self_organizing_map),
}
