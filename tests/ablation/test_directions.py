"""Directions: differences of means, kept whole."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from heretic.ablation.ablation import interpolation
from heretic.ablation.cleanup import project_out_mean
from heretic.ablation.directions import Directions, normalized, orthonormal
from heretic.ablation.methods.mean_difference import mean_difference
from heretic.files import read_tensors, write_tensors
from heretic.model.capture import ResidualMeans
from heretic.progress import NULL_REPORTER
from heretic.runs.folder import RunFolder
from tests.helpers.errors import raises


def means(seed: int) -> ResidualMeans:
    torch.manual_seed(seed)
    return ResidualMeans(torch.randn(6, 16, dtype=torch.float64), 10)


def found(harmful: ResidualMeans, harmless: ResidualMeans, *, project: bool = False) -> Directions:
    vectors = mean_difference(harmful, harmless, 1, "cpu")
    return normalized(project_out_mean(vectors, harmless) if project else vectors)


def several(layers: int = 6, count: int = 3, width: int = 16) -> Directions:
    torch.manual_seed(5)
    return normalized(torch.randn(layers, count, width))


def test_unit_length_and_direction() -> None:
    harmful, harmless = means(1), means(2)
    vectors = found(harmful, harmless).vectors
    expected = torch.nn.functional.normalize(harmful.mean - harmless.mean, dim=-1)
    assert torch.allclose(vectors, expected.float())


def test_projection_makes_them_orthogonal_to_the_harmless_mean() -> None:
    harmful, harmless = means(1), means(2)
    vectors = found(harmful, harmless, project=True).vectors.double()
    assert (vectors * harmless.mean).sum(-1).abs().max() < 1e-6
    assert torch.allclose(vectors.norm(dim=-1), torch.ones(6, dtype=torch.float64), atol=1e-6)
    assert ((vectors * (harmful.mean - harmless.mean)).sum(-1) > 0).all()


def test_no_difference_is_an_error() -> None:
    with raises("no-direction") as error:
        found(means(1), means(1))
    assert error.value.where == "prompts.harmful_train, prompts.harmless_train"


def test_an_index_interpolates_two_layers() -> None:
    assert interpolation(2.25, 4) == (0, 0, 0.75, 0.25) and interpolation(3.0, 4) == (0, 0, 0, 1)
    assert interpolation(-1.0, 6) == (1, 0, 0, 0, 0, 0) and interpolation(7.0, 6) == (0, 0, 0, 0, 0, 1)


def test_saved_and_loaded_and_damage_is_seen(tmp_path: Path) -> None:
    directions = found(means(1), means(2))
    file = tmp_path / "directions.safetensors"
    folder = RunFolder(tmp_path, fingerprint="a")
    folder.save_directions(directions)
    kept = folder.load_directions(NULL_REPORTER)
    assert kept is not None and torch.equal(kept.vectors, directions.vectors)
    assert RunFolder(tmp_path, fingerprint="b").load_directions(NULL_REPORTER) is None, "made with other settings"
    whole = file.read_bytes()
    for place in (-1, -20, 5, 60):
        broken = bytearray(whole)
        broken[place] ^= 4
        file.write_bytes(broken)
        with raises("damaged-file"):
            read_tensors(file)
    file.write_bytes(whole[:50])
    with raises("damaged-file"):
        read_tensors(file)


def test_several_are_at_right_angles_and_the_first_stays() -> None:
    torch.manual_seed(5)
    given = torch.randn(6, 3, 16)
    made = normalized(given)
    assert made.count == 3 and torch.allclose(
        made.all_directions @ made.all_directions.mT, torch.eye(3).expand(6, 3, 3), atol=1e-6
    )
    assert torch.allclose(made.vectors, torch.nn.functional.normalize(given[:, 0], dim=-1), atol=1e-6)
    third = torch.linalg.qr(given[2].T.double()).Q.T[2]  # up to its sign, what Householder's way gives
    assert abs(float(third @ made.all_directions[2, 2].double())) == pytest.approx(1, abs=1e-6)


def test_those_of_a_later_round_come_behind_and_what_is_there_already_is_refused() -> None:
    first = several(count=2)
    both = normalized(torch.randn(6, 1, 16), first)
    assert torch.equal(both.all_directions[:, :2], first.all_directions) or torch.allclose(
        both.all_directions[:, :2], first.all_directions, atol=1e-6
    )
    assert both.count == 3 and (both.all_directions[:, 2:] @ first.all_directions.mT).abs().max() < 1e-6
    with raises("too-few-directions") as error:
        normalized(first.all_directions.sum(dim=1, keepdim=True), first)
    assert "Layer 0" in error.value.what and "2" in error.value.what


def test_orthonormal_rows_are_what_the_matrix_makes_and_a_row_too_many_becomes_nothing() -> None:
    torch.manual_seed(0)
    rows = torch.randn(3, 16, dtype=torch.float64) * torch.tensor([[1.0], [100.0], [0.01]])
    made, turn = orthonormal(rows)
    assert torch.allclose(turn @ rows, made) and torch.allclose(made @ made.T, torch.eye(3).double(), atol=1e-9)
    assert torch.autograd.gradcheck(lambda r: orthonormal(r)[0], (rows.requires_grad_(),))
    double, _ = orthonormal(torch.stack([rows[0], 2 * rows[0], rows[1]]).detach())
    assert double[1].norm() < 1e-6 and double[2].norm() == pytest.approx(1)


def test_several_are_stored_and_a_file_of_the_older_layout_is_read(tmp_path: Path) -> None:
    folder, directions = RunFolder(tmp_path, fingerprint="a"), several()
    folder.save_directions(directions)
    kept = folder.load_directions(NULL_REPORTER)
    assert kept is not None and torch.equal(kept.all_directions, directions.all_directions)
    write_tensors(tmp_path / "directions.safetensors", {"directions": directions.vectors}, {"fingerprint": "a"})
    older = folder.load_directions(NULL_REPORTER)
    assert older is not None and older.count == 1 and torch.equal(older.vectors, directions.vectors)
