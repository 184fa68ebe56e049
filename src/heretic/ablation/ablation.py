"""The whole edit of one trial, and its operators."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from heretic.ablation.directions import Directions
from heretic.ablation.kernel import Kernel
from heretic.ablation.operator import GEOMETRIES, NEEDS_FACTS, Operator, WriterFacts, study_weight
from heretic.model.anatomy import Writer
from heretic.progress import SILENT, Watcher

Scope = Literal["global", "per_layer"]


@dataclass(frozen=True)
class Ablation:
    """A direction and a strength for every writer.

    `scope` "global": the direction at `direction_index` everywhere; "per_layer": each layer's own. `kernels`: one a component.
    """

    scope: Scope
    direction_index: float
    kernels: Mapping[str, Kernel]

    def strength(self, writer: Writer) -> float:
        """Strength at a writer; exactly 0 leaves it untouched."""
        kernel = self.kernels.get(writer.component)
        return kernel.strength(writer.layer) if kernel else 0.0

    def as_dict(self) -> dict[str, Any]:
        """As plain data, for manifests and tables."""
        kernels = {component: kernel.as_dict() for component, kernel in self.kernels.items()}
        return {"scope": self.scope, "direction_index": self.direction_index, "kernels": kernels}


@dataclass(frozen=True)
class Workbench:
    """Everything from which the operators of any ablation follow by vector arithmetic."""

    directions: Directions
    writers: tuple[Writer, ...]
    geometry: str
    facts: Mapping[str, WriterFacts]

    @classmethod
    def prepare(
        cls,
        directions: Directions,
        writers: tuple[Writer, ...],
        geometry: str,
        read: Callable[[Writer], Tensor] = Writer.weight,
        watcher: Watcher = SILENT,
    ) -> Workbench:
        """Study every writer's weight once, against all layers' directions; geometries that need no facts skip it.

        `read` gets at a weight [width, inputs] where the module does not hold it (offloaded layers).
        """
        facts: dict[str, WriterFacts] = {}
        if geometry in NEEDS_FACTS:
            with watcher.stage("Studying the weights", len(writers)) as stage:
                for writer in writers:
                    facts[writer.name] = study_weight(read(writer), directions.vectors).to("cpu")
                    stage.advance()
        return cls(directions, writers, geometry, facts)

    def operators(self, ablation: Ablation) -> dict[str, Operator]:
        """Operators by the writer's name; writers with strength 0 are not in it."""
        everywhere = self._direction(ablation.direction_index) if ablation.scope == "global" else None
        found = {}
        for writer in self.writers:
            strength = ablation.strength(writer)
            if strength == 0.0:
                continue
            vector, mix = everywhere or self._direction(float(writer.layer))
            found[writer.name] = GEOMETRIES[self.geometry](vector, strength, self.facts.get(writer.name), mix)
        return found

    def _direction(self, index: float) -> tuple[Tensor, Tensor]:
        mix = self.directions.mix(index)
        return torch.nn.functional.normalize(mix @ self.directions.vectors, dim=0), mix
