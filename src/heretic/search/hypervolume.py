"""How much of the plane of two values, both to be small, a growing set of points beats."""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterable


def hypervolume_history(points: Iterable[tuple[float, float]], reference: tuple[float, float]) -> list[float]:
    """After every point the hypervolume of all so far: the share, from 0 to 1, of the rectangle between the origin and the
    reference that at least one of them beats in both values (Zitzler and Thiele 1998).

    The front is kept sorted, so that a point costs a search and what it pushes off the front.
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
                while last < len(xs) and ys[last] >= y:  # these are beaten by the new point
                    area += (xs[last] - left) * (ceiling - y)
                    left, ceiling = xs[last], ys[last]
                    last += 1
                area += ((xs[last] if last < len(xs) else right) - left) * (ceiling - y)
                xs[first:last], ys[first:last] = [x], [y]
        history.append(area / (right * top))
    return history
