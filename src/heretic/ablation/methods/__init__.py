"""Ways to find the directions of every layer: one small file each, and a line in `METHODS`.

A method is a function of the residuals of harmful and of harmless prompts, of how many directions a layer is to have, and of
the device to compute on. It gives them [layers, count, width] in float64 on the CPU, of any length, the most important first;
what is common to all (projections, right angles, length 1) is done with them afterwards. The work of each is bounded by the
sizes alone: nothing runs until it converges.
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
    """A way to find directions, and whether it needs every prompt's residuals (`ResidualMeans.each`) or only their means."""

    find: Find
    needs_each: bool = True


METHODS = {
    "mean_difference": Method(mean_difference, needs_each=False),
    "geometric_median": Method(geometric_median),
    "self_organizing_map": Method(self_organizing_map),
}
