"""KL divergence: against PyTorch's own, and with numbers that are none."""

from __future__ import annotations

import math

import pytest
import torch

from heretic.scoring.divergence import divergence_of, divergences, summarize
from heretic.scoring.scores import Divergence


def test_equals_pytorch() -> None:
    torch.manual_seed(0)
    p, q = (torch.log_softmax(torch.randn(7, 50) * 3, dim=-1) for _ in range(2))
    expected = torch.nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(-1)
    assert torch.allclose(divergences(p, q), expected, atol=1e-5)
    assert divergences(p, p).abs().max() == 0


def test_impossible_tokens_and_destroyed_models() -> None:
    p = torch.log(torch.tensor([[0.5, 0.5, 0.0]]))
    assert divergences(p, torch.log(torch.tensor([[0.25, 0.25, 0.5]]))).item() == pytest.approx(math.log(2))
    assert divergences(p, torch.log(torch.tensor([[1.0, 0.0, 0.0]]))).item() == math.inf
    assert divergences(p, torch.full((1, 3), math.nan)).item() == math.inf


def test_summary() -> None:
    found = summarize(torch.arange(101, dtype=torch.float64))
    assert (found.mean, found.median, found.p95, found.max) == (50, 50, 95, 100)
    destroyed = summarize(torch.tensor([0.1, math.inf, 0.2], dtype=torch.float64))
    assert destroyed == Divergence(math.inf, 0.2, math.inf, math.inf)
    assert destroyed.as_dict() == {"mean": "inf", "median": 0.2, "p95": "inf", "max": "inf"}


def test_log_probs_of_an_earlier_pass_give_the_mean_over_the_tokens_of_each_prompt() -> None:
    original, ablated = (torch.randn(5, 7, dtype=torch.float64).log_softmax(-1) for _ in range(2))
    each = divergences(original, ablated)
    found = divergence_of(original, ablated, [2, 3])
    assert found.per_prompt == pytest.approx([float(each[:2].mean()), float(each[2:].mean())])
    assert found.mean == pytest.approx(sum(found.per_prompt) / 2)
