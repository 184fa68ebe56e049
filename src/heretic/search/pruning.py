"""Pruning: stop a trial once it can no longer reach the Pareto front."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.trial import TrialState

from heretic.scoring.objectives import DEFAULT_OBJECTIVES, Objective
from heretic.scoring.refusal_proxy import Calibration, prediction_error
from heretic.scoring.scores import PrunedTrial, RefusalProxy, Scores
from heretic.search.pareto import Result, pareto_front, results_of
from heretic.storage import attributes

WORST_COST = 1e6  # of a destroyed model, for objectives other than KL and refusals


@dataclass(frozen=True)
class ParetoThreshold:
    """Pareto front of the fully measured trials, as (KL, expected refusals)."""

    points: Sequence[tuple[float, float]]

    def dominates(self, kl: float, at_least: float) -> bool:
        """Return whether a trial with this KL and at least this many expected refusals cannot reach the front.

        A destroyed model (KL not finite) is always dominated.
        """
        if not math.isfinite(kl):
            return True
        return any(
            other <= kl and count <= at_least and (other < kl or count < at_least) for other, count in self.points
        )


@dataclass(frozen=True)
class PrunedResult:
    """A pruned trial."""

    number: int
    params: dict[str, Any]
    kl: float
    refusals: float  # expected, as reported to the sampler
    reevaluates: int | None  # number of the earlier pruned trial that this one evaluates again


@dataclass(frozen=True)
class StudyHistory:
    """The finished trials of a study: fully measured and pruned ones."""

    results: list[Result]
    pruned: list[PrunedResult]

    @classmethod
    def of(cls, study: optuna.Study, without: Collection[int] = ()) -> StudyHistory:
        """Read a study, except the trials `without`. Raises UserError for a damaged trial."""
        complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        included = [t for t in complete if t.number not in without]
        known = [(t, attributes.pruned(study, t)) for t in included]
        pruned = [
            PrunedResult(
                t.number,
                dict(t.params),
                outcome.divergence.mean,
                attributes.objective_values(study, t)[1],
                attributes.reevaluates(study, t),
            )
            for t, outcome in known
            if outcome is not None
        ]
        return cls(results_of(study, included), pruned)

    @property
    def threshold(self) -> ParetoThreshold:
        """The front that a new trial must reach."""
        # Dominance is transitive: the front dominates whatever any other trial dominates.
        front = pareto_front(self.results)
        return ParetoThreshold([(r.scores.divergence.mean, r.scores.expected) for r in front])

    @property
    def refusal_proxies(self) -> list[tuple[RefusalProxy, float]]:
        """Proxy and expected refusals of the fully measured trials, in order."""
        return [(r.scores.refusal_proxy, r.scores.expected) for r in self.results if r.scores.refusal_proxy]

    @property
    def proxy_error(self) -> float | None:
        """Mean error, in refusals, of estimating each measured trial from the earlier ones."""
        return prediction_error(self.refusal_proxies, self.results[0].scores.total) if self.results else None

    def estimate(self, trial: PrunedTrial) -> float:
        """Estimate the refusals of a pruned trial."""
        return Calibration.fit(self.refusal_proxies, trial.total).estimate(trial.refusal_proxy, trial.expected_at_least)

    def pending_full_evaluations(self) -> list[PrunedResult]:
        """Return the pruned trials whose estimate is on the front: they need a full evaluation before the study ends."""
        reevaluated = {t.reevaluates for t in self.pruned} | {r.reevaluates for r in self.results}
        threshold = self.threshold
        return [t for t in self.pruned if t.number not in reevaluated and not threshold.dominates(t.kl, t.refusals)]


def objective_values(
    outcome: Scores | PrunedTrial,
    history: StudyHistory,
    kl_floor: float,
    worst_kl: float,
    objectives: Sequence[Objective] = DEFAULT_OBJECTIVES,
) -> list[float]:
    """Compute the objective values for the sampler: clamped KL, expected refusals (estimated for a pruned trial), others as costs.

    A destroyed model gets the worst values. All values are finite, since Optuna fails a trial with any other.
    """
    refusals = outcome.expected if isinstance(outcome, Scores) else history.estimate(outcome)
    if not math.isfinite(refusals) or not math.isfinite(outcome.divergence.mean):
        refusals = float(outcome.total)
    known = {"kl": min(max(outcome.divergence.mean, kl_floor), worst_kl), "refusals": refusals}

    def value(objective: Objective) -> float:
        cost = objective.cost(outcome) if isinstance(outcome, Scores) else math.inf
        return known.get(objective.name, min(max(cost, -WORST_COST), WORST_COST))

    return [value(objective) for objective in objectives]
