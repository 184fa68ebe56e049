"""The profile of strengths."""

from __future__ import annotations

import pytest

from heretic.ablation.strength_kernel import StrengthKernel


def test_profile() -> None:
    kernel = StrengthKernel(max_weight=1.2, max_weight_position=10, min_weight=0.2, min_weight_distance=5)
    assert kernel.strength(10) == pytest.approx(1.2)
    assert kernel.strength(15) == kernel.strength(5) == pytest.approx(0.2)
    assert kernel.strength(12) == pytest.approx(0.8)
    assert kernel.strength(16) == 0.0 and kernel.strength(4) == 0.0


def test_a_largest_strength_of_zero_leaves_everything_alone() -> None:
    kernel = StrengthKernel(0.0, 3, 0.0, 100)
    assert [kernel.strength(layer) for layer in range(8)] == [0.0] * 8
