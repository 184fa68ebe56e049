"""What geometries need of random writers: weight statistics, and input maps of random keys."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from heretic.ablation.directions import Directions
from heretic.ablation.geometries import GEOMETRIES
from heretic.ablation.geometries.conditional import InputMap, input_map
from heretic.ablation.operator_factory import OperatorFactory
from heretic.ablation.weight_stats import WeightStats, weight_statistics
from heretic.model.input_capture import input_width
from heretic.model.writer import ResidualWriter


def random_input_map(weight: torch.Tensor) -> InputMap:
    """The map of a weight [width, inputs] for random keys, most of them harmful."""
    made = torch.Generator().manual_seed(7)
    return input_map(weight.float(), *(torch.randn(n, weight.shape[1], generator=made) for n in (40, 5)))


def random_input_maps(writers: Sequence[ResidualWriter]) -> dict[str, InputMap]:
    """The maps of all writers with a plain input."""
    return {w.name: random_input_map(w.weight()) for w in writers if not w.mixture and input_width(w)}


def facts_for(geometry: str, weight: torch.Tensor, directions: torch.Tensor) -> Any:
    """What a geometry needs of a weight and directions [k, width]."""
    needs = GEOMETRIES[geometry].needs
    if needs == "input_map":
        return random_input_map(weight)
    return weight_statistics(weight, directions) if needs == "weight_stats" else None


def in_float64(facts: Any) -> Any:
    """The same facts in float64."""
    if isinstance(facts, WeightStats):
        return replace(facts, norms=facts.norms.double(), g=facts.g.double(), gram=facts.gram.double())
    return facts.double() if facts else None


def factory_for(directions: Directions, writers: tuple[ResidualWriter, ...], geometry: str) -> OperatorFactory:
    """The operators of a geometry, with random input maps if it needs any."""
    return OperatorFactory.prepare(directions, writers, geometry, input_maps=random_input_maps(writers))
