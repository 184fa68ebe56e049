"""Confidence interval of a proportion."""

from __future__ import annotations

import math
from statistics import NormalDist


def wilson(count: int, total: int) -> tuple[float, float]:
    """Compute Wilson's 95 % score interval [low, high] of the proportion `count` / `total`; [0, 1] if `total` is 0.

    E. B. Wilson, *Probable Inference, the Law of Succession, and Statistical Inference*, JASA 22 (1927), 209-212. Unlike p +- z s
    it stays within 0 and 1 and does not shrink to a point at 0 and at `total`. Raises ValueError for counts outside 0 to `total`.
    """
    if not 0 <= count <= total:
        raise ValueError(f"the count {count} is not between 0 and {total}")
    if total == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf(0.975)
    share, square = count / total, z * z / total
    middle = (share + square / 2) / (1 + square)
    half = z / (1 + square) * math.sqrt(share * (1 - share) / total + square / (4 * total))
    low, high = max(0.0, middle - half), min(1.0, middle + half)
    return (0.0 if count == 0 else low), (1.0 if count == total else high)
