"""Geometry of the residuals of harmful and harmless prompts, by layer, before any ablation.

Everything but the means uses a sample of the prompts in bounded memory: distances, principal components and silhouettes
follow from the Gram matrix of a layer's residuals.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from heretic.ablation.directions import Directions
from heretic.model.batching import Batch
from heretic.model.capture import ResidualMeans

MAX_PROMPTS = 200  # sampled prompts of each kind
MAX_BYTES = 2**28  # for the samples of both kinds


@dataclass
class Sample:
    """Residuals of the first prompts of a set, float32 [prompts, layers, width], recorded during capture."""

    residuals: Tensor

    @classmethod
    def allocate(cls, prompts: int, layers: int, width: int) -> Sample:
        """Allocate a sample for as many of the prompts as fit into the budget, at least two."""
        most = max(2, min(MAX_PROMPTS, MAX_BYTES // (2 * 4 * layers * width)))
        return cls(torch.zeros(min(prompts, most), layers, width))

    def record(self, batch: Batch, residuals: Tensor) -> None:
        """Record the sampled prompts of a batch, residuals [rows, layers, width]."""
        for row, residual in zip(batch.rows, residuals, strict=True):
            if row < len(self.residuals):
                self.residuals[row] = residual


@dataclass(frozen=True)
class ResidualGeometry:
    """Geometry by layer, in the residual stream after the block."""

    cosines: Tensor  # [layers, layers], between the layers' directions
    norms: Tensor  # [layers, 3], of the harmful mean, the harmless mean and their difference
    silhouette: Tensor  # [layers], mean silhouette of harmful and harmless prompts, -1 to 1 (Rousseeuw 1987)
    separation: Tensor  # [layers], distance of the means along the direction in pooled standard deviations (Cohen's d)
    points: Tensor  # [layers, prompts, 2], first two principal components of the sample
    explained: Tensor  # [layers, 2], their shares of the variance
    harmful: Tensor  # [prompts], 1 harmful, 0 harmless

    @property
    def num_layers(self) -> int:
        """Number of layers."""
        return len(self.silhouette)

    @property
    def next_cosines(self) -> list[float | None]:
        """Cosines between each layer's direction and the next layer's; None for the last layer."""
        return [*torch.diagonal(self.cosines, 1).tolist(), None]

    def as_dict(self) -> dict[str, Any]:
        """Return the data that --json prints; None in place of NaN."""
        columns = zip(
            self.next_cosines, self.norms.tolist(), self.silhouette.tolist(), self.separation.tolist(), strict=True
        )
        layers = [
            {
                "layer": layer,
                "cosine_with_next": cosine,
                "norm_harmful": norms[0],
                "norm_harmless": norms[1],
                "norm_difference": norms[2],
                "silhouette": silhouette,
                "separation": separation if math.isfinite(separation) else None,
            }
            for layer, (cosine, norms, silhouette, separation) in enumerate(columns)
        ]
        return {"layers": layers, "cosines": self.cosines.tolist()}

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by name, as they are stored."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


@dataclass
class GeometryRecorder:
    """Records the means and samples of harmful and harmless prompts during capture."""

    means: tuple[ResidualMeans, ResidualMeans] | None = None
    samples: tuple[Sample, Sample] | None = None

    def record(self, means: tuple[ResidualMeans, ResidualMeans], samples: tuple[Sample, Sample]) -> None:
        """Store means and samples, without the residuals of every prompt."""
        self.means = (replace(means[0], per_prompt=None), replace(means[1], per_prompt=None))
        self.samples = samples

    def geometry(self, directions: Directions) -> ResidualGeometry:
        """Measure the geometry with the directions computed from these residuals."""
        assert self.means is not None and self.samples is not None
        return measure_geometry(directions, self.means, self.samples)


def measure_geometry(
    directions: Directions, means: tuple[ResidualMeans, ResidualMeans], samples: tuple[Sample, Sample]
) -> ResidualGeometry:
    """Measure the geometry from directions, means and samples of (harmful, harmless) prompts."""
    harmful, harmless = (m.mean for m in means)
    norms = torch.stack([t.norm(dim=-1) for t in (harmful, harmless, harmful - harmless)], dim=-1)
    kinds = torch.cat([torch.full((len(s.residuals),), kind) for s, kind in zip(samples, (1, 0), strict=True)])
    silhouette, separation, explained, points = [], [], [], []
    before: Tensor | None = None
    for layer, direction in enumerate(directions.vectors):
        both = torch.cat([s.residuals[:, layer] for s in samples]).nan_to_num()
        along = (both @ direction).double()
        both = both - both.mean(dim=0)
        products = (both @ both.T).double()
        silhouette.append(mean_silhouette(distances(products), kinds == 1))
        separation.append(cohens_d(along[kinds == 1], along[kinds == 0]))
        before, shares = principal_components(products, kinds == 1, before)
        points.append(before)
        explained.append(shares)
    return ResidualGeometry(
        cosines=directions.vectors @ directions.vectors.T,
        norms=norms.float(),
        silhouette=torch.tensor(silhouette),
        separation=torch.tensor(separation),
        points=torch.stack(points).float(),
        explained=torch.stack(explained).float(),
        harmful=kinds.to(torch.uint8),
    )


def distances(products: Tensor) -> Tensor:
    """Compute distances [n, n] from a Gram matrix [n, n]."""
    squares = torch.diagonal(products)
    return (squares[:, None] + squares[None, :] - 2 * products).clamp_min(0).sqrt()


def mean_silhouette(apart: Tensor, first: Tensor) -> float:
    """Compute the mean silhouette of two clusters from distances [n, n] and membership in the first cluster [n].

    A vector that is alone in its cluster counts as 0 (Rousseeuw 1987, section 2).
    """
    scores = []
    for own in (first, ~first):
        count = int(own.sum())
        if count < 2:
            scores.append(torch.zeros(count, dtype=apart.dtype))
            continue
        inside = apart[own][:, own].sum(dim=1) / (count - 1)
        outside = apart[own][:, ~own].mean(dim=1)
        larger = torch.maximum(inside, outside)
        scores.append(torch.where(larger > 0, (outside - inside) / larger, torch.zeros_like(larger)))
    return float(torch.cat(scores).mean())


def cohens_d(a: Tensor, b: Tensor) -> float:
    """Compute the difference of means in pooled standard deviations; NaN without any deviation."""
    degrees = len(a) + len(b) - 2
    if degrees < 1:
        return float("nan")
    pooled = ((((a - a.mean()) ** 2).sum() + ((b - b.mean()) ** 2).sum()) / degrees).sqrt()
    return float((a.mean() - b.mean()) / pooled) if pooled > 0 else float("nan")


def principal_components(products: Tensor, harmful: Tensor, before: Tensor | None) -> tuple[Tensor, Tensor]:
    """Compute coordinates [n, 2] on the first two principal components from a Gram matrix [n, n], and their variance shares [2].

    Signs are chosen so that layers are comparable: harmful prompts to the right, the second axis as in the layer `before`.
    """
    values, vectors = torch.linalg.eigh(products)
    values, vectors = values.flip(0)[:2].clamp_min(0), vectors.flip(1)[:, :2]
    if len(values) < 2:
        values, vectors = torch.nn.functional.pad(values, (0, 1)), torch.nn.functional.pad(vectors, (0, 1))
    points = vectors * values.sqrt()
    if harmful.any() and not harmful.all() and points[harmful, 0].mean() < points[~harmful, 0].mean():
        points[:, 0] *= -1
    if before is not None and (points[:, 1] * before[:, 1]).sum() < 0:
        points[:, 1] *= -1
    total = torch.diagonal(products).sum()
    return points, values / total if total > 0 else torch.zeros(2, dtype=values.dtype)
