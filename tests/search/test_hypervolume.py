"""The hypervolume of a growing front, against counting the cells of a grid."""

from __future__ import annotations

import math
import random

import pytest

from heretic.search.hypervolume import hypervolume_history


def counted(points: list[tuple[int, int]], size: int) -> float:
    """Share of the cells of a grid that a point beats."""
    cells = sum(any(px <= x and py <= y for px, py in points) for x in range(size) for y in range(size))
    return cells / size**2


@pytest.mark.parametrize("seed", range(5))
def test_it_is_the_counted_area_after_every_point(seed: int) -> None:
    chance = random.Random(seed)
    points = [(chance.randrange(14), chance.randrange(14)) for _ in range(30)]  # some beyond the reference of 12
    found = hypervolume_history(points, (12, 12))
    assert found == pytest.approx([counted(points[: i + 1], 12) for i in range(len(points))])


def test_what_is_infinite_or_beyond_the_reference_adds_nothing() -> None:
    assert hypervolume_history([(math.inf, 0), (0.5, 9), (0.5, 5), (0.5, 5)], (1.0, 10.0)) == pytest.approx(
        [0, 0.05, 0.25, 0.25]
    )
