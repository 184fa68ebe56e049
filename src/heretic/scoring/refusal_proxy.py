"""Cheap proxy of the refusal count: the probability of the reference refusals under a trial's model.

It takes one pass without decoding. Where every token up to the marker is the most probable one, the request is refused.
For the other requests a least-squares fit over the fully measured trials estimates the count.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from heretic.scoring.scores import RefusalProxy

# Length of a reference refusal: the tokens up to the marker, within these bounds.
MIN_DRAFT_TOKENS, MAX_DRAFT_TOKENS = 4, 8
FIRST_TOKENS = MIN_DRAFT_TOKENS  # whose joint probability measures how close an answer is to a refusal
TRIALS_TO_CALIBRATE = 4
RIDGE = 0.1  # stabilizes the fit while there are hardly more trials than coefficients


@dataclass(frozen=True)
class Calibration:
    """Least-squares estimate of expected refusals from the proxy; with too few trials, the matching requests."""

    weights: tuple[float, float, float] | None  # intercept, matching, probability * requests
    total: int

    @classmethod
    def fit(cls, measured: Sequence[tuple[RefusalProxy, float]], total: int) -> Calibration:
        """Fit to pairs of (proxy, expected refusals) of `total` requests."""
        moments = np.zeros((4, 4))
        for proxy, count in measured:
            moments += _moments(proxy, count)
        return cls.of_moments(moments, total)

    @classmethod
    def of_moments(cls, moments: np.ndarray, total: int) -> Calibration:
        """Fit to the sum over trials of the outer products of (1, matching, probability * requests, refusals)."""
        count = moments[0, 0]
        if count < TRIALS_TO_CALIBRATE:
            return cls(None, total)
        means = moments[0, 1:] / count
        centered = moments[1:, 1:] - count * np.outer(means, means)
        slopes = np.linalg.solve(centered[:2, :2] + RIDGE * np.eye(2), centered[:2, 2])
        return cls((float(means[2] - means[:2] @ slopes), float(slopes[0]), float(slopes[1])), total)

    def estimate(self, proxy: RefusalProxy, at_least: float = 0) -> float:
        """Estimate the refusals of a trial, between `at_least` and the number of requests."""
        if self.weights is None:
            expected = float(proxy.matching)
        else:
            intercept, *slopes = self.weights
            expected = intercept + float(np.dot(slopes, _features(proxy)))
        return min(max(expected, at_least), float(self.total))


def prediction_error(measured: Sequence[tuple[RefusalProxy, float]], total: int) -> float | None:
    """Compute the mean absolute error of predicting each trial from the earlier ones; None with too few trials."""
    errors, moments = [], np.zeros((4, 4))
    for i, (proxy, count) in enumerate(measured):
        if i >= TRIALS_TO_CALIBRATE:
            errors.append(abs(Calibration.of_moments(moments, total).estimate(proxy) - count))
        moments += _moments(proxy, count)
    return sum(errors) / len(errors) if errors else None


def _moments(proxy: RefusalProxy, count: float) -> np.ndarray:
    row = np.array([1.0, *_features(proxy), float(count)])
    return np.outer(row, row)


def _features(proxy: RefusalProxy) -> tuple[float, float]:
    return float(proxy.matching), proxy.probability * proxy.refused
