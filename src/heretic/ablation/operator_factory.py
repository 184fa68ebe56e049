"""Operators of an ablation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from heretic.ablation.ablation import Ablation, interpolation
from heretic.ablation.directions import Directions, orthonormal
from heretic.ablation.operator import (
    GEOMETRIES,
    NEEDS_WEIGHT_STATS,
    LazyTensor,
    Operator,
    WeightStats,
    stats_for_directions,
    weight_statistics,
)
from heretic.model.architecture import ResidualWriter
from heretic.progress import NULL_REPORTER, ProgressReporter


@dataclass(frozen=True)
class OperatorFactory:
    """Computes the operators of any ablation by vector arithmetic.

    If an RMS norm with the weight S follows a writer, its output along S v ends up along v in the stream. So S v is removed.
    """

    directions: Directions
    writers: tuple[ResidualWriter, ...]
    geometry: str
    weight_stats: Mapping[str, WeightStats]
    scales: Mapping[str, Tensor]  # S [width] by writer
    # Reads a writer's matrices [width, inputs], also if the module does not hold them.
    read: Callable[[ResidualWriter], Sequence[LazyTensor]] = field(
        default=ResidualWriter.weights, repr=False, compare=False
    )

    @classmethod
    def prepare(
        cls,
        directions: Directions,
        writers: tuple[ResidualWriter, ...],
        geometry: str,
        read: Callable[[ResidualWriter], Sequence[LazyTensor]] = ResidualWriter.weights,
        reporter: ProgressReporter = NULL_REPORTER,
        *,
        norm_aware: bool = True,
    ) -> OperatorFactory:
        """Compute every writer's weight statistics once, if the geometry needs them.

        `read` returns a writer's matrices [width, inputs], also of offloaded layers.
        """
        facts: dict[str, WeightStats] = {}
        scales = {w.name: s.cpu() for w in writers if norm_aware and (s := w.scale()) is not None}
        if geometry in NEEDS_WEIGHT_STATS:
            with reporter.stage("Weight statistics", len(writers)) as stage:
                for writer in writers:
                    scaled_directions = directions.all_directions.flatten(0, 1) * scales.get(writer.name, 1)
                    facts[writer.name] = weight_statistics(read(writer), scaled_directions).to("cpu")
                    stage.advance()
        return cls(directions, writers, geometry, facts, scales, read)

    def operators(self, ablation: Ablation, *, zeros_from: int | None = None) -> dict[str, Operator]:
        """Compute the operators by writer name, without writers of strength 0.

        With `zeros_from`, include all writers from that layer on and none below, so that zero strengths get gradients.
        """
        operators = {}
        for writer in self.writers:
            strength = ablation.strength(writer)
            if writer.layer < zeros_from if zeros_from is not None else float(strength) == 0.0:
                continue
            facts = self.weight_stats.get(writer.name)
            scale = self.scales.get(writer.name, 1)
            if ablation.vector is not None:
                raw = torch.as_tensor(ablation.vector).unflatten(0, (-1, self.directions.vectors.shape[-1]))
                vectors, _ = orthonormal(raw * scale)
                mix = torch.eye(len(vectors), dtype=vectors.dtype)
                facts = facts and stats_for_directions(vectors, self.read(writer), facts.norms)
            else:
                layers = self._mix(ablation, writer)
                vectors, turned = orthonormal(self.directions.mixed_at(layers) * scale)
                mix = torch.einsum("ij,l->ilj", turned, layers).flatten(1)
            operators[writer.name] = GEOMETRIES[self.geometry](vectors.squeeze(0), strength, facts, mix.squeeze(0))
        return operators

    def _mix(self, ablation: Ablation, writer: ResidualWriter) -> Tensor:
        mixture = ablation.mixture
        if mixture is None:
            mixture = interpolation(writer.layer + ablation.shift, self.directions.num_layers)
        return torch.as_tensor(mixture, dtype=self.directions.vectors.dtype)
