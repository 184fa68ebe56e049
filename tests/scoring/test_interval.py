"""Wilson's interval, against published values and its own definition."""

from __future__ import annotations

import math

import pytest

from heretic.scoring.interval import wilson


@pytest.mark.parametrize(
    ("count", "total", "low", "high"),
    # R. G. Newcombe, Statistics in Medicine 17 (1998), table I, method 3.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_published_values(count: int, total: int, low: float, high: float) -> None:
    assert wilson(count, total) == pytest.approx((low, high), abs=5e-5)


def test_its_ends_are_where_the_score_test_rejects() -> None:
    for count, total in ((1, 50), (7, 50), (25, 50), (49, 50)):
        for end in wilson(count, total):
            z = (count / total - end) / math.sqrt(end * (1 - end) / total)
            assert abs(z) == pytest.approx(1.959964, abs=1e-5)


def test_ends_and_mirror() -> None:
    assert wilson(0, 30)[0] == 0.0 and wilson(30, 30)[1] == 1.0 and wilson(0, 0) == (0.0, 1.0)
    low, high = wilson(3, 40)
    assert wilson(37, 40) == pytest.approx((1 - high, 1 - low))
    with pytest.raises(ValueError):
        wilson(5, 4)
