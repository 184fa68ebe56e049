"""The refusal direction of every layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from heretic.errors import UserError
from heretic.model.capture import ResidualMeans


@dataclass(frozen=True)
class Directions:
    """Unit vectors [layers, width] in float32: row l is the direction in the residual stream after block l."""

    vectors: Tensor

    @property
    def num_layers(self) -> int:
        """Number of layers."""
        return len(self.vectors)

    def unit(self, coefficients: Sequence[float] | Tensor) -> Tensor:
        """Coefficients c [layers] scaled so that `c @ vectors` has norm 1."""
        mix = torch.as_tensor(coefficients, dtype=self.vectors.dtype)
        return mix / (mix @ self.vectors).norm()


def between(index: float, layers: int) -> tuple[float, ...]:
    """Coefficients [layers] of the direction at a layer index that may lie between two layers; outside, the nearest layer's."""
    index = min(max(index, 0.0), layers - 1.0)
    low = int(index)
    coefficients = [0.0] * layers
    coefficients[low] += 1 - (index - low)
    if index > low:
        coefficients[low + 1] += index - low
    return tuple(coefficients)


def mean_difference(harmful: ResidualMeans, harmless: ResidualMeans, *, project_harmless: bool) -> Directions:
    """Normalised difference of mean residuals, harmful minus harmless (Arditi et al. 2024, arXiv 2406.11717, section 2.3).

    With `project_harmless` its part along the harmless mean is removed first. Raises UserError if a layer has no difference.
    """
    difference = harmful.mean - harmless.mean
    if project_harmless:
        common = torch.nn.functional.normalize(harmless.mean, dim=-1)
        difference = difference - (difference * common).sum(-1, keepdim=True) * common
    norms = difference.norm(dim=-1, keepdim=True)
    flat = [layer for layer, norm in enumerate(norms.flatten().tolist()) if not norm > 1e-9]
    if flat:
        raise UserError(
            f"The harmful and harmless prompts give the same residuals in layer {flat[0]}: there is no direction to find.",
            where="prompts.harmful_train, prompts.harmless_train",
            fix="use prompt sets that differ in whether the model declines",
        )
    return Directions((difference / norms).float())
