"""Hypervolume of a growing set of points in two minimized objectives."""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterable


def hypervolume_history(points: Iterable[tuple[float, float]], reference: tuple[float, float]) -> list[float]:
    """Compute the hypervolume after every point, as a fraction (0 to 1) of the rectangle from the origin to the reference.

    Definition: Zitzler and Thiele 1998. The front stays sorted, so that a point costs one binary search plus the points
    that it dominates.
    """
    right, top = reference
    xs: list[float] = []  # rising, while `ys` falls
    ys: list[float] = []
    area, history = 0.0, []
    for x, y in points:
        if math.isfinite(x) and x < right and y < top:
            first = bisect.bisect_left(xs, x)
            ceiling = ys[first - 1] if first else top
            if y < ceiling and not (first < len(xs) and xs[first] == x and ys[first] <= y):
                last, left = first, x
                while last < len(xs) and ys[last] >= y:  # dominated by the new point
                    area += (xs[last] - left) * (ceiling - y)
                    left, ceiling = xs[last], ys[last]
                    last += 1
                area += ((xs[last] if last < len(xs) else right) - left) * (ceiling - y)
                xs[first:last], ys[first:last] = [x], [y]
        history.append(area / (right * top))
    return history
