"""Studies as they may stand, for the tests of what is shown."""

from __future__ import annotations

import math

from heretic.scoring.scores import Divergence, Scores
from heretic.search.pareto import Result, select_trial
from heretic.search.pruning import StudyHistory
from heretic.search.summary import StudySummary


def result(number: int, kl: float, refusals: int) -> Result:
    return Result(number, {"direction_scope": "per_layer"}, Scores(Divergence(kl, kl, kl, kl), refusals, 50, {}))


POINTS = [(0.001, 40), (0.004, 31), (0.03, 12), (0.05, 20), (0.2, 4), (0.3, 9), (math.inf, 0)]
RESULTS = [result(i, kl, refusals) for i, (kl, refusals) in enumerate(POINTS)]


def study_summary(found: list[Result] = RESULTS) -> StudySummary:
    best = select_trial(found, "fewest_refusals_under_kl", 0.1, 0)
    return StudySummary(200, len(found), 1, 44, StudyHistory(found, []), best, 120.0, None)
