"""The geometries against their definitions in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from heretic.ablation.geometries import GEOMETRIES
from heretic.ablation.operator import Operator, StackedOperators
from heretic.ablation.weight_stats import weight_statistics
from tests.helpers.facts import facts_for


def by_definition(geometry: str, weight: torch.Tensor, v: torch.Tensor, strength: float, facts: Any) -> torch.Tensor:
    """The edit as the papers write it: on the matrix, with no shortcut."""
    weight, v = weight.double(), v.double()
    identity = torch.eye(len(v), dtype=torch.float64)
    if geometry == "conditional":
        return weight - strength * torch.outer(v, v) @ facts.outputs.double().mT @ facts.inputs.double()
    if geometry == "plain":
        return (identity - strength * torch.outer(v, v)) @ weight
    norms = weight.norm(dim=1, keepdim=True)
    edited = (identity - strength * torch.outer(v, v)) @ (weight / norms)
    if geometry == "norm_preserving":
        edited = edited / edited.norm(dim=1, keepdim=True)
    return edited * norms


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("strength", [0.2, 1.0, 1.3])
def test_equals_its_definition_for_mixed_directions(
    geometry: str, strength: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("heretic.ablation.weight_stats.ELEMENTS_PER_CHUNK", 7 * 40)
    torch.manual_seed(3)
    weight = torch.randn(24, 40) * torch.rand(24, 1) * 3
    directions = torch.nn.functional.normalize(torch.randn(5, 24), dim=-1)
    mix = torch.tensor([0.0, 0.3, 0.9, 0.0, 0.0])
    mix = mix / (mix @ directions).norm()
    v = mix @ directions
    facts = facts_for(geometry, weight, directions)
    operator = GEOMETRIES[geometry](v, strength, facts, mix)
    baked = operator.on_weight(weight)
    assert torch.allclose(baked.double(), by_definition(geometry, weight, v, strength, facts), atol=1e-5)
    x = torch.randn(3, 40)
    assert torch.allclose(operator(x @ weight.T, x), x @ baked.T, atol=1e-4)


def test_rows_of_zeros_do_no_harm() -> None:
    weight = torch.randn(8, 6)
    weight[3] = 0
    v = torch.nn.functional.normalize(torch.randn(1, 8), dim=-1)
    operator = GEOMETRIES["norm_preserving"](v[0], 1.0, weight_statistics(weight, v), torch.ones(1))
    baked = operator.on_weight(weight)
    assert torch.isfinite(baked).all() and baked[3].abs().max() < 1e-6


def test_half_precision_goes_in_and_out() -> None:
    v = torch.nn.functional.normalize(torch.randn(8), dim=0)
    out = Operator(v, v)(torch.randn(2, 3, 8).bfloat16())
    assert out.dtype == torch.bfloat16
    assert (out.float() @ v).abs().max() < 0.05


def test_stacked_operators_give_each_row_its_own_trial() -> None:
    torch.manual_seed(4)
    some = [
        Operator(torch.randn(8), torch.randn(8), torch.rand(8)),
        Operator(torch.randn(8), torch.randn(8)),
        Operator(torch.randn(2, 8), None, a=torch.randn(2, 6)),
    ]
    stacked = StackedOperators.of([some[0], None, *some[1:]])
    rows = torch.tensor([2, 0, 1, 3])
    y, x = torch.randn(4, 5, 8), torch.randn(4, 5, 6)
    expected = torch.stack([some[1](y[0]), some[0](y[1]), y[2], some[2](y[3], x[3])])
    assert torch.allclose(stacked(y, rows, x), expected, atol=1e-6)
    assert torch.allclose(stacked(y.view(20, 8), rows, x.view(20, 6)).view(4, 5, 8), expected, atol=1e-6), (
        "tokens of all rows in one list"
    )
