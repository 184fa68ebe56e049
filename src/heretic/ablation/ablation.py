"""The whole edit of one trial, and its operators."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from heretic.ablation.directions import Directions, interpolation, orthonormal
from heretic.ablation.operator import (
    GEOMETRIES,
    NEEDS_WEIGHT_STATS,
    LazyTensor,
    Operator,
    WeightStats,
    stats_for_directions,
    weight_statistics,
)
from heretic.ablation.strength_kernel import StrengthKernel
from heretic.model.architecture import ResidualWriter
from heretic.progress import NULL_REPORTER, ProgressReporter

Coefficients = Sequence[float] | Tensor


@dataclass(frozen=True)
class Ablation:
    """A direction and a strength for every writer.

    `strengths`: by component, one number a layer; exactly 0 leaves the writers there untouched. `mixture`: coefficients over
    the layers' directions [layers] of the one direction that is removed everywhere; None: each layer's own is, mixed with its
    neighbor's where `shift` is not 0 (in layers, to later ones). `vector`: a direction [width] of its own instead, for all
    layers, or several one behind the other [count x width]. Tensors may be given to have gradients.
    """

    strengths: Mapping[str, Coefficients]
    mixture: Coefficients | None = None
    shift: float = 0.0
    vector: Coefficients | None = None

    @classmethod
    def from_kernels(cls, kernels: Mapping[str, StrengthKernel], layers: int, index: float | None = None) -> Ablation:
        """Strengths by kernels, one a component; the direction at a layer index for all, or each layer's own (None)."""
        strengths = {c: tuple(kernel.strength(layer) for layer in range(layers)) for c, kernel in kernels.items()}
        return cls(strengths, None if index is None else interpolation(index, layers))

    def strength(self, writer: ResidualWriter) -> float | Tensor:
        """Strength at a writer."""
        profile = self.strengths.get(writer.component)
        return 0.0 if profile is None else profile[writer.layer]

    def as_dict(self) -> dict[str, Any]:
        """As plain data, for manifests."""
        strengths = {component: [float(s) for s in profile] for component, profile in self.strengths.items()}
        mixture, vector = (None if part is None else [float(c) for c in part] for part in (self.mixture, self.vector))
        return {"strengths": strengths, "mixture": mixture, "shift": self.shift, "vector": vector}


@dataclass(frozen=True)
class OperatorFactory:
    """Everything from which the operators of any ablation follow by vector arithmetic.

    `scales` holds, by writer, the weight S [width] of an RMS norm that its output passes before it is added to the stream: what is
    then along v was along S v before (up to the length), so that is what is taken out, in every geometry. `read` gets at a writer's
    matrices [width, inputs], also where the module does not hold them.
    """

    directions: Directions
    writers: tuple[ResidualWriter, ...]
    geometry: str
    weight_stats: Mapping[str, WeightStats]
    scales: Mapping[str, Tensor]
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
        """Study every writer's weight once, against all layers' directions; geometries that need no facts skip it.

        `read` gets at a writer's matrices [width, inputs] where the module does not hold it (offloaded layers).
        """
        facts: dict[str, WeightStats] = {}
        scales = {w.name: s.cpu() for w in writers if norm_aware and (s := w.scale()) is not None}
        if geometry in NEEDS_WEIGHT_STATS:
            with reporter.stage("Studying the weights", len(writers)) as stage:
                for writer in writers:
                    scaled_directions = directions.all_directions.flatten(0, 1) * scales.get(writer.name, 1)
                    facts[writer.name] = weight_statistics(read(writer), scaled_directions).to("cpu")
                    stage.advance()
        return cls(directions, writers, geometry, facts, scales, read)

    def operators(self, ablation: Ablation, *, zeros_from: int | None = None) -> dict[str, Operator]:
        """Operators by the writer's name; writers with strength 0 are not in it. A strength holds for all directions of a layer.

        With `zeros_from` they are from that layer on, and nothing is below it: so that strengths can have gradients.
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
