"""The ablation of one trial: a direction and a strength for every writer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias, Union

from heretic.ablation.strength_kernel import StrengthKernel

if TYPE_CHECKING:  # the trials of a study are read without torch
    from torch import Tensor

    from heretic.model.architecture import ResidualWriter

Coefficients: TypeAlias = Union[Sequence[float], "Tensor"]


@dataclass(frozen=True)
class Ablation:
    """A direction and a strength for every writer; tensors may require gradients."""

    strengths: Mapping[str, Coefficients]  # by component, one per layer; exactly 0 leaves the writers unedited
    mixture: Coefficients | None = None  # [layers] of the one direction removed everywhere; None: each layer's own
    shift: float = 0.0  # without a mixture: mixes each layer's direction with a neighbor's, in layers
    vector: Coefficients | None = None  # [count * width]: explicit directions for all layers instead

    @classmethod
    def from_kernels(cls, kernels: Mapping[str, StrengthKernel], layers: int, index: float | None = None) -> Ablation:
        """Build an ablation from one kernel per component, with the direction at `index` or (None) each layer's own."""
        strengths = {c: tuple(kernel.strength(layer) for layer in range(layers)) for c, kernel in kernels.items()}
        return cls(strengths, None if index is None else interpolation(index, layers))

    @classmethod
    def uniform(cls, components: Sequence[str], strength: float, layers: int, index: float | None = None) -> Ablation:
        """Build an ablation with one strength for all writers, with the direction at `index` or (None) each layer's own."""
        return cls(dict.fromkeys(components, (strength,) * layers), cls.from_kernels({}, layers, index).mixture)

    def strength(self, writer: ResidualWriter) -> float | Tensor:
        """Return the strength at a writer."""
        profile = self.strengths.get(writer.component)
        return 0.0 if profile is None else profile[writer.layer]

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for manifests."""
        strengths = {component: [float(s) for s in profile] for component, profile in self.strengths.items()}
        mixture, vector = (None if part is None else [float(c) for c in part] for part in (self.mixture, self.vector))
        return {"strengths": strengths, "mixture": mixture, "shift": self.shift, "vector": vector}


def interpolation(index: float, layers: int) -> tuple[float, ...]:
    """Return coefficients [layers] that interpolate the direction at a fractional layer index, clamped to the layers."""
    index = min(max(index, 0.0), layers - 1.0)
    low = int(index)
    coefficients = [0.0] * layers
    coefficients[low] += 1 - (index - low)
    if index > low:
        coefficients[low + 1] += index - low
    return tuple(coefficients)
