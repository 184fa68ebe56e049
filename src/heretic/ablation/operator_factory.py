"""Operators of an ablation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor

from heretic.ablation.ablation import Ablation, interpolation
from heretic.ablation.directions import Directions, orthonormal
from heretic.ablation.geometries import GEOMETRIES
from heretic.ablation.geometries.conditional import InputMap
from heretic.ablation.operator import Operator, in_ram
from heretic.ablation.reading import reading_operator
from heretic.ablation.weight_stats import WeightStats, stats_for_directions, weight_statistics
from heretic.model.architecture import ResidualWriter
from heretic.model.lazy_tensor import LazyTensor
from heretic.model.transfer import to_devices
from heretic.progress import NULL_REPORTER, ProgressReporter

Facts = WeightStats | InputMap | Tensor


@dataclass(frozen=True)
class OperatorFactory:
    """Computes the operators of any ablation by vector arithmetic.

    If an RMS norm with the weight S follows a writer, its output along S v ends up along v in the stream. So S v is removed.
    A writer without the input map that its geometry needs has plain operators. Readers have those of `reading`.
    """

    directions: Directions
    writers: tuple[ResidualWriter, ...]
    geometry: str
    # What the geometry needs, by writer; by reader the weight S [width] of the norm before it.
    facts: Mapping[str, Facts]
    scales: Mapping[str, Tensor]  # S [width] by writer, of the norm after it
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
        input_maps: Mapping[str, InputMap] | None = None,
    ) -> OperatorFactory:
        """Compute every writer's weight statistics once, if the geometry needs them.

        `read` returns a writer's matrices [width, inputs], also of offloaded layers. `input_maps` are those of the writers that
        have one, for a geometry that needs them.
        """
        form = GEOMETRIES[geometry]
        facts: dict[str, Facts] = {**(input_maps or {})} if form.reads_inputs else {}
        readers = [writer for writer in writers if writer.reads_stream]
        others = [writer for writer in writers if not writer.reads_stream]
        facts |= {r.name: s.cpu() for r in readers if (s := r.scale()) is not None}
        scales = {w.name: s.cpu() for w in others if norm_aware and (s := w.scale()) is not None}
        if form.needs == "weight_stats":
            with reporter.stage("Weight statistics", len(others)) as stage:
                for writer in others:
                    scaled_directions = directions.all_directions.flatten(0, 1) * scales.get(writer.name, 1)
                    facts[writer.name] = weight_statistics(read(writer), scaled_directions).to("cpu")
                    stage.advance()
        return cls(directions, writers, geometry, facts, scales, read)

    @property
    def input_maps(self) -> dict[str, InputMap]:
        """The input maps by writer; none if the geometry needs none."""
        return {name: facts for name, facts in self.facts.items() if isinstance(facts, InputMap)}

    def operators(self, ablation: Ablation, *, zeros_from: int | None = None) -> dict[str, Operator]:
        """Compute the operators by writer name, without writers of strength 0.

        With `zeros_from`, include all writers from that layer on and none below, so that zero strengths get gradients. Then the
        operators of an explicit vector stay on the devices of their weights; else all operators are in RAM.
        """
        writers = [
            writer
            for writer in self.writers
            if (writer.layer >= zeros_from if zeros_from is not None else float(ablation.strength(writer)) != 0.0)
        ]
        if ablation.vector is not None:
            operators = self._of_vector(ablation, writers)
            if zeros_from is None:
                operators = in_ram(operators)
            return dict(zip((writer.name for writer in writers), operators, strict=True))
        found = {}
        for writer in writers:
            layers = self._mix(ablation, writer)
            scaled = self.directions.mixed_at(layers) * self.scales.get(writer.name, 1)
            vectors, turned = orthonormal(scaled)
            mix = torch.einsum("ij,l->ilj", turned, layers).flatten(1)
            facts = self.facts.get(writer.name)
            found[writer.name] = self._operator(writer, vectors, ablation.strength(writer), facts, mix)
        return found

    def _of_vector(self, ablation: Ablation, writers: Sequence[ResidualWriter]) -> list[Operator]:
        """Compute the operators of explicit directions, where the weights are if they are products with these."""
        raw = torch.as_tensor(ablation.vector).unflatten(0, (-1, self.directions.vectors.shape[-1]))
        vectors = [orthonormal(raw * self.scales.get(writer.name, 1))[0] for writer in writers]
        strengths = [torch.as_tensor(ablation.strength(writer), dtype=raw.dtype) for writer in writers]
        known = [self.facts.get(writer.name) for writer in writers]
        if GEOMETRIES[self.geometry].needs == "weight_stats":
            factors = [cast(Tensor, facts.norms if isinstance(facts, WeightStats) else facts) for facts in known]
            devices = [writer.device or torch.device("cpu") for writer in writers]
            moved = iter(to_devices([*vectors, *strengths, *factors], [*devices, *devices, *devices]))
            vectors, strengths, factors = ([next(moved) for _ in writers] for _ in range(3))
            known = [
                f if writer.reads_stream else stats_for_directions(v, self.read(writer), f)
                for writer, v, f in zip(writers, vectors, factors, strict=True)
            ]
        return [
            self._operator(writer, v, s, f, torch.eye(len(v), dtype=v.dtype, device=v.device))
            for writer, v, s, f in zip(writers, vectors, strengths, known, strict=True)
        ]

    def _operator(
        self, writer: ResidualWriter, vectors: Tensor, strength: float | Tensor, facts: Facts | None, mix: Tensor
    ) -> Operator:
        if isinstance(facts, Tensor):
            return reading_operator(vectors.squeeze(0), strength, facts, self.read(writer))
        geometry = GEOMETRIES[self.geometry if facts else "plain"]
        return geometry(vectors.squeeze(0), strength, facts, mix.squeeze(0))

    def _mix(self, ablation: Ablation, writer: ResidualWriter) -> Tensor:
        mixture = ablation.mixture
        if mixture is None:
            mixture = interpolation(writer.layer + ablation.shift, self.directions.num_layers)
        return torch.as_tensor(mixture, dtype=self.directions.vectors.dtype)
