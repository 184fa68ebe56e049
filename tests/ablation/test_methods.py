"""Every method on residuals whose answer is known."""

from __future__ import annotations

from typing import get_args

import pytest
import torch

from heretic.ablation.directions import normalized
from heretic.ablation.methods import METHODS
from heretic.ablation.methods.geometric_median import geometric_median, median
from heretic.ablation.methods.self_organizing_map import self_organizing_map, train_map
from heretic.model.capture import ResidualMeans
from heretic.settings.ablation import SINGLE_DIRECTION_METHODS, DirectionMethod, DirectionSettings

LAYERS, WIDTH = 3, 24


def residuals(seed: int, prompts: int = 40, *, lean: float = 0.0) -> ResidualMeans:
    torch.manual_seed(seed)
    each = torch.randn(prompts, LAYERS, WIDTH) + 5
    each[:, :, 0] += lean
    return ResidualMeans(each.double().mean(dim=0), prompts, each)


def test_the_table_and_the_settings_name_the_same() -> None:
    assert set(METHODS) == set(get_args(DirectionMethod))
    assert set(METHODS) > SINGLE_DIRECTION_METHODS


@pytest.mark.parametrize("name", METHODS)
def test_every_method_points_from_harmless_to_harmful_and_repeats_itself(name: str) -> None:
    count = 1 if name in SINGLE_DIRECTION_METHODS else 3
    bad, good = residuals(1, lean=6.0), residuals(2)
    found = METHODS[name].find(bad, good, count, "cpu")
    assert found.shape == (LAYERS, count, WIDTH) and found.dtype == torch.float64
    assert torch.equal(found, METHODS[name].find(bad, good, count, "cpu"))
    first = normalized(found).vectors[:, 0]
    assert (first > 0.75).all(), f"{name}: what the prompts differ in is its first direction"


@pytest.mark.parametrize("name", METHODS)
def test_few_prompts_are_enough_for_as_many_directions(name: str) -> None:
    count = 1 if name in SINGLE_DIRECTION_METHODS else 2
    found = METHODS[name].find(residuals(1, 3), residuals(2, 2), count, "cpu")
    assert normalized(found).count == count


def test_methods_that_need_every_prompt_say_so() -> None:
    bare = [ResidualMeans(r.mean, r.count) for r in (residuals(1), residuals(2))]
    for name, method in METHODS.items():
        assert DirectionSettings.model_validate({"method": name}).keeps_each == method.needs_each, "as the settings say"
        if method.needs_each:
            with pytest.raises(ValueError, match="not recorded"):
                method.find(*bare, 1, "cpu")
        else:
            method.find(*bare, 1, "cpu")


def test_a_median_is_not_pulled_away_by_a_few_prompts() -> None:
    calm, wild = residuals(1), residuals(1)
    wild.require_per_prompt[:4] += 1000
    moved = (median(wild.require_per_prompt, "cpu") - median(calm.require_per_prompt, "cpu")).norm(dim=1)
    assert (moved < 3).all() and (
        (wild.require_per_prompt - calm.require_per_prompt).mean(dim=0).norm(dim=1) > 400
    ).all()
    # The least sum of distances: no step away from it makes it smaller.
    middle, points = median(calm.require_per_prompt, "cpu")[0], calm.require_per_prompt[:, 0].double()
    least = (points - middle).norm(dim=1).sum()
    for step in torch.randn(20, WIDTH, dtype=torch.float64) * 0.01:
        assert (points - middle - step).norm(dim=1).sum() > least


def test_a_median_of_equal_prompts_is_that_prompt() -> None:
    each = torch.ones(5, LAYERS, WIDTH)
    assert torch.allclose(median(each, "cpu"), torch.ones(LAYERS, WIDTH).double())
    found = geometric_median(ResidualMeans(each.double()[0], 5, each), residuals(2), 1, "cpu")
    assert torch.isfinite(found).all()


def test_a_map_finds_the_groups_that_there_are() -> None:
    torch.manual_seed(0)
    centers = 20 * torch.eye(WIDTH)[:4]
    each = (centers.repeat_interleave(12, 0) + 0.1 * torch.randn(48, WIDTH)).unsqueeze(1)
    neurons, prompts = train_map(each[:, 0].double())
    assert int(prompts.sum()) == 48
    used = neurons[prompts > 0]
    assert (torch.cdist(centers.double(), used).min(dim=1).values < 4).all()
    harmless = ResidualMeans(torch.zeros(1, WIDTH, dtype=torch.float64), 2, torch.zeros(2, 1, WIDTH))
    made = normalized(self_organizing_map(ResidualMeans(each.double().mean(0), 48, each), harmless, 4, "cpu"))
    assert made.count == 4
