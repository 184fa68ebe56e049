"""A cheap sign of refusing: how likely a trial's model finds what the original said where it declined.

One pass without decoding gives it. Where all tokens up to the marker are the most probable ones the request is declined,
exactly; for the others it is a sign that estimates the count, calibrated against the trials that were measured in full.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

# Tokens of the original's refusal that are tried: up to the marker, but at least and at most so many.
FEWEST_TOKENS, MOST_TOKENS = 4, 8
FIRST_TOKENS = FEWEST_TOKENS  # whose joint probability says how close an answer is to the refusal
TRIALS_TO_CALIBRATE = 4
RIDGE = 0.1  # keeps the fit sane while there are hardly more trials than coefficients


@dataclass(frozen=True)
class RefusalProxy:
    """Of one trial: on how many of the `declined` requests that the original declines the tokens tried are all the most
    probable ones, and the probability of such a token, averaged over requests."""

    matching: int
    probability: float
    refused: int

    def as_dict(self) -> dict[str, float]:
        """As plain data."""
        return asdict(self)


@dataclass(frozen=True)
class Calibration:
    """Estimates a trial's expected refusals from its surrogate by least squares over measured trials (intercept, matching,
    probability times requests); with too few of them, the count of matching requests itself."""

    weights: tuple[float, float, float] | None
    total: int

    @classmethod
    def fit(cls, measured: Sequence[tuple[RefusalProxy, float]], total: int) -> Calibration:
        """From pairs of a trial's surrogate and its expected refusals, of `total` requests."""
        moments = np.zeros((4, 4))
        for surrogate, count in measured:
            moments += _moments(surrogate, count)
        return cls.of_moments(moments, total)

    @classmethod
    def of_moments(cls, moments: np.ndarray, total: int) -> Calibration:
        """From the sum over measured trials of the outer products of (1, matching, probability times requests, refusals)."""
        count = moments[0, 0]
        if count < TRIALS_TO_CALIBRATE:
            return cls(None, total)
        means = moments[0, 1:] / count
        centered = moments[1:, 1:] - count * np.outer(means, means)
        slopes = np.linalg.solve(centered[:2, :2] + RIDGE * np.eye(2), centered[:2, 2])
        return cls((float(means[2] - means[:2] @ slopes), float(slopes[0]), float(slopes[1])), total)

    def estimate(self, surrogate: RefusalProxy, at_least: float = 0) -> float:
        """Refusals expected of a trial, between `at_least` and the number of requests."""
        if self.weights is None:
            expected = float(surrogate.matching)
        else:
            intercept, *slopes = self.weights
            expected = intercept + float(np.dot(slopes, _features(surrogate)))
        return min(max(expected, at_least), float(self.total))


def prediction_error(measured: Sequence[tuple[RefusalProxy, float]], total: int) -> float | None:
    """Mean distance between each trial's refusals and what the trials before it predicted; None while there is nothing to
    predict from."""
    misses, moments = [], np.zeros((4, 4))
    for i, (surrogate, count) in enumerate(measured):
        if i >= TRIALS_TO_CALIBRATE:
            misses.append(abs(Calibration.of_moments(moments, total).estimate(surrogate) - count))
        moments += _moments(surrogate, count)
    return sum(misses) / len(misses) if misses else None


def _moments(surrogate: RefusalProxy, count: float) -> np.ndarray:
    row = np.array([1.0, *_features(surrogate), float(count)])
    return np.outer(row, row)


def _features(surrogate: RefusalProxy) -> tuple[float, float]:
    return float(surrogate.matching), surrogate.probability * surrogate.refused
