"""Directions: differences of means, kept whole."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from heretic.ablation.directions import between, mean_difference
from heretic.errors import UserError
from heretic.files import read_tensors
from heretic.model.capture import ResidualMeans
from heretic.progress import SILENT
from heretic.run_folder import RunFolder


def means(seed: int) -> ResidualMeans:
    torch.manual_seed(seed)
    return ResidualMeans(torch.randn(6, 16, dtype=torch.float64), 10)


def test_unit_length_and_direction() -> None:
    harmful, harmless = means(1), means(2)
    found = mean_difference(harmful, harmless, project_harmless=False).vectors
    expected = torch.nn.functional.normalize(harmful.mean - harmless.mean, dim=-1)
    assert torch.allclose(found, expected.float())


def test_projection_makes_them_orthogonal_to_the_harmless_mean() -> None:
    harmful, harmless = means(1), means(2)
    found = mean_difference(harmful, harmless, project_harmless=True).vectors.double()
    assert (found * harmless.mean).sum(-1).abs().max() < 1e-6
    assert torch.allclose(found.norm(dim=-1), torch.ones(6, dtype=torch.float64), atol=1e-6)
    assert ((found * (harmful.mean - harmless.mean)).sum(-1) > 0).all()


def test_no_difference_is_an_error() -> None:
    with pytest.raises(UserError, match="layer 0"):
        mean_difference(means(1), means(1), project_harmless=False)


def test_between_two_layers_the_mix_has_length_one() -> None:
    directions = mean_difference(means(1), means(2), project_harmless=False)
    for index in (0.0, 2.0, 2.25, 4.9, 5.0):
        mixed = directions.unit(between(index, 6)) @ directions.vectors
        assert mixed.norm() == pytest.approx(1.0, abs=1e-5)
    assert torch.allclose(directions.unit(between(3.0, 6)) @ directions.vectors, directions.vectors[3], atol=1e-6)
    assert between(-1.0, 6) == (1, 0, 0, 0, 0, 0) and between(7.0, 6) == (0, 0, 0, 0, 0, 1)
    middle = directions.unit(between(2.5, 6)) @ directions.vectors
    assert (middle @ directions.vectors[2]).item() == pytest.approx((middle @ directions.vectors[3]).item(), abs=1e-5)


def test_saved_and_loaded_and_damage_is_seen(tmp_path: Path) -> None:
    directions = mean_difference(means(1), means(2), project_harmless=False)
    file = tmp_path / "directions.safetensors"
    folder = RunFolder(tmp_path, stamp="a")
    folder.keep_directions(directions)
    kept = folder.directions(SILENT)
    assert kept is not None and torch.equal(kept.vectors, directions.vectors)
    assert RunFolder(tmp_path, stamp="b").directions(SILENT) is None, "made with other settings"
    whole = file.read_bytes()
    for place in (-1, -20, 5, 60):
        broken = bytearray(whole)
        broken[place] ^= 4
        file.write_bytes(broken)
        with pytest.raises(UserError, match="damaged"):
            read_tensors(file)
    file.write_bytes(whole[:50])
    with pytest.raises(UserError, match="damaged"):
        read_tensors(file)
