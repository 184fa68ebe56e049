"""Studies as they may stand, for the tests of what is shown."""

from __future__ import annotations

import math

from heretic.scoring.divergence import Divergence
from heretic.scoring.evaluator import Scores
from heretic.search.pareto import Result, choose
from heretic.search.pruning import Progress
from heretic.search.summary import Standing


def result(number: int, kl: float, refusals: int) -> Result:
    return Result(number, {"direction_scope": "per_layer"}, Scores(Divergence(kl, kl, kl, kl), refusals, 50, {}))


POINTS = [(0.001, 40), (0.004, 31), (0.03, 12), (0.05, 20), (0.2, 4), (0.3, 9), (math.inf, 0)]
RESULTS = [result(i, kl, refusals) for i, (kl, refusals) in enumerate(POINTS)]


def standing(found: list[Result] = RESULTS) -> Standing:
    best = choose(found, "fewest_refusals_under_kl", 0.1, 0)
    return Standing(200, len(found), 1, 44, Progress(found, []), best, 120.0)
