"""The estimate of a trial's refusals from one pass."""

from __future__ import annotations

import random

import pytest

from heretic.scoring.refusal_proxy import TRIALS_TO_CALIBRATE, Calibration, prediction_error
from heretic.scoring.scores import RefusalProxy


def pairs(count: int) -> list[tuple[RefusalProxy, int]]:
    """Trials whose refusals are a line through the two signs, with a little noise."""
    chance = random.Random(0)
    found = []
    for _ in range(count):
        matching, probability = chance.randrange(0, 36), chance.random()
        refusals = 3 + 0.8 * matching + 0.1 * probability * 40 + chance.uniform(-1, 1)
        found.append((RefusalProxy(matching, probability, 40), round(refusals)))
    return found


def test_without_trials_to_learn_from_it_is_the_count_of_matching_requests() -> None:
    calibration = Calibration.fit(pairs(TRIALS_TO_CALIBRATE - 1), 50)
    assert calibration.estimate(RefusalProxy(12, 0.4, 40)) == 12
    assert prediction_error(pairs(TRIALS_TO_CALIBRATE), 50) is None


def test_it_learns_the_line_and_its_error_is_that_of_the_noise() -> None:
    known = pairs(40)
    calibration = Calibration.fit(known, 50)
    assert calibration.estimate(RefusalProxy(20, 0.5, 40)) == pytest.approx(3 + 16 + 2, abs=0.7)
    error = prediction_error(known, 50)
    assert error is not None and error < 1.5
    shuffled = [(s, c) for (s, _), (_, c) in zip(known, reversed(known), strict=True)]
    misled = prediction_error(shuffled, 50)
    assert misled is not None and misled > 3


def test_estimates_stay_within_what_is_possible() -> None:
    calibration = Calibration.fit(pairs(20), 50)
    assert calibration.estimate(RefusalProxy(0, 0.0, 40), at_least=9) == 9
    assert calibration.estimate(RefusalProxy(400, 1.0, 40)) == 50
    same = [(RefusalProxy(5, 0.5, 40), 7)] * 6  # nothing to tell the trials apart
    assert Calibration.fit(same, 50).estimate(RefusalProxy(5, 0.5, 40)) == pytest.approx(7)
