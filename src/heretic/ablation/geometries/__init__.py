"""Geometries: how a direction is taken out of a writer's output. One file each, and an entry in `GEOMETRIES`.

In all of them v is [width], or [k, width] for k orthogonal directions; mix has its coefficients in the directions of the weight
statistics: [directions] or [k, directions].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from heretic.ablation.geometries.conditional import conditional
from heretic.ablation.geometries.norm_preserving import norm_preserving
from heretic.ablation.geometries.plain import plain
from heretic.ablation.geometries.row_normalized import row_normalized
from heretic.ablation.operator import Operator


@dataclass(frozen=True)
class Geometry:
    """A function of (v, strength, facts, mix), and which facts on the writer it needs: `WeightStats` or an `InputMap`."""

    operator: Callable[[Tensor, float | Tensor, Any, Tensor], Operator]
    needs: Literal["nothing", "weight_stats", "input_map"]

    @property
    def reads_inputs(self) -> bool:
        """Whether its operators read the writers' inputs."""
        return self.needs == "input_map"

    def __call__(self, v: Tensor, strength: float | Tensor, facts: Any, mix: Tensor) -> Operator:
        """Return the operator of a writer for directions `v` and a strength."""
        return self.operator(v, strength, facts, mix)


GEOMETRIES = {
    "plain": Geometry(plain, "nothing"),
    "row_normalized": Geometry(row_normalized, "weight_stats"),
    "norm_preserving": Geometry(norm_preserving, "weight_stats"),
    "conditional": Geometry(conditional, "input_map"),
}
