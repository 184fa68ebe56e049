"""Geometry of residuals, against scikit-learn and against plain definitions."""

from __future__ import annotations

import math

import pytest
import torch
from sklearn.decomposition import PCA
from sklearn.metrics import silhouette_score

from heretic.ablation.directions import Directions
from heretic.ablation.residual_geometry import (
    MAX_BYTES,
    ResidualGeometry,
    Sample,
    cohens_d,
    mean_silhouette,
    measure_geometry,
)
from heretic.model.batching import Batch
from heretic.model.capture import ResidualMeans

LAYERS, WIDTH = 3, 12


def clusters(harmful: int = 20, harmless: int = 30) -> tuple[torch.Tensor, torch.Tensor]:
    """Two kinds of residuals that lie further apart from layer to layer."""
    torch.manual_seed(0)
    push = torch.arange(LAYERS)[:, None] * torch.ones(WIDTH)
    return torch.randn(harmful, LAYERS, WIDTH) + push, torch.randn(harmless, LAYERS, WIDTH)


def measured(a: torch.Tensor, b: torch.Tensor) -> ResidualGeometry:
    means = tuple(ResidualMeans(x.double().mean(dim=0), len(x)) for x in (a, b))
    difference = means[0].mean - means[1].mean
    directions = Directions(torch.nn.functional.normalize(difference, dim=-1).float())
    return measure_geometry(directions, means, (Sample(a), Sample(b)))  # type: ignore[arg-type]


def test_silhouette_and_components_are_those_of_scikit_learn() -> None:
    a, b = clusters()
    found = measured(a, b)
    labels = found.harmful.numpy()
    for layer in range(LAYERS):
        both = torch.cat([a[:, layer], b[:, layer]]).numpy()
        assert float(found.silhouette[layer]) == pytest.approx(silhouette_score(both, labels), abs=1e-5)
        pca = PCA(2).fit(both)
        assert found.explained[layer].tolist() == pytest.approx(pca.explained_variance_ratio_.tolist(), rel=1e-4)
        theirs = torch.as_tensor(pca.transform(both))
        assert (found.points[layer].abs() - theirs.abs()).abs().max() < 1e-3
        assert found.points[layer][labels == 1, 0].mean() > found.points[layer][labels == 0, 0].mean()
    assert found.silhouette[0] < found.silhouette[1] < found.silhouette[2]
    assert found.separation[0] < found.separation[1] < found.separation[2]


def test_norms_and_cosines_are_what_they_are_called() -> None:
    a, b = clusters()
    found = measured(a, b)
    assert found.norms[:, 0].tolist() == pytest.approx(a.mean(dim=0).norm(dim=-1).tolist(), rel=1e-5)
    assert found.norms[:, 2].tolist() == pytest.approx((a.mean(dim=0) - b.mean(dim=0)).norm(dim=-1).tolist(), rel=1e-5)
    assert torch.diagonal(found.cosines).tolist() == pytest.approx([1.0] * LAYERS, abs=1e-5)
    assert found.next_cosines[-1] is None and found.next_cosines[1] == pytest.approx(float(found.cosines[1, 2]))


def test_separation_is_cohens_d() -> None:
    a, b = torch.tensor([3.0, 5.0, 7.0]).double(), torch.tensor([0.0, 2.0]).double()
    pooled = math.sqrt((8 + 2) / 3)
    assert cohens_d(a, b) == pytest.approx(4 / pooled)
    assert math.isnan(cohens_d(a[:1], b[:1])) and math.isnan(cohens_d(torch.ones(3), torch.zeros(3)))


def test_one_prompt_of_each_kind_and_equal_prompts_are_no_error() -> None:
    a, b = clusters(1, 1)
    found = measured(a, b)
    assert found.silhouette.tolist() == [0.0] * LAYERS and found.points.isfinite().all()
    assert found.as_dict()["layers"][0]["separation"] is None
    assert mean_silhouette(torch.zeros(4, 4), torch.tensor([True, True, False, False])) == 0


def test_the_sample_is_bounded_and_takes_its_rows_from_any_batch() -> None:
    large = Sample.allocate(10_000, 80, 8192).residuals
    assert 2 * large.numel() * 4 <= MAX_BYTES and len(large) == 51
    assert len(Sample.allocate(10_000, 4, 32).residuals) == 200
    sample = Sample.allocate(3, 2, 2)
    batch = Batch([5, 2, 0], torch.zeros(3, 1), torch.ones(3, 1))
    sample.record(batch, torch.stack([torch.full((2, 2), float(row)) for row in batch.rows]))
    assert sample.residuals[:, 0, 0].tolist() == [0, 0, 2]
