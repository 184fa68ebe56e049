"""Strength kernel: the profile of an ablation's strengths over the layers."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class StrengthKernel:
    """Largest at one layer, decreasing linearly on both sides, 0 beyond `min_weight_distance` layers.

    Positions and distances are in layers; weights are strengths; 1 removes the direction completely.
    """

    max_weight: float
    max_weight_position: float
    min_weight: float
    min_weight_distance: float

    def strength(self, layer: int) -> float:
        """Return the strength at a layer; exactly 0 leaves it unedited."""
        distance = abs(layer - self.max_weight_position)
        if self.max_weight <= 0 or distance > self.min_weight_distance:
            return 0.0
        slope = (self.min_weight - self.max_weight) / self.min_weight_distance
        return max(0.0, self.max_weight + slope * distance)

    def as_dict(self) -> dict[str, float]:
        """Return plain data."""
        return asdict(self)
