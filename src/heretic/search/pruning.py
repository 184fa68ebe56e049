"""How far a trial is measured: exactly as far as it can still reach the front."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.trial import TrialState

from heretic.scoring.evaluator import PrunedTrial, Scores
from heretic.scoring.refusal_proxy import Calibration, RefusalProxy, prediction_error
from heretic.search.pareto import Result, pareto_front, results_of
from heretic.storage import attributes


@dataclass(frozen=True)
class ParetoThreshold:
    """The front of what is fully measured so far, as (KL, expected refusals); a trial that one of them beats in both is not on
    it."""

    points: Sequence[tuple[float, float]]

    def dominates(self, kl: float, at_least: float) -> bool:
        """Whether a trial of this KL, with at least so many refusals, cannot be on the front whatever else it does.

        A model that was destroyed (its KL is no finite number) never is.
        """
        if not math.isfinite(kl):
            return True
        return any(
            other <= kl and count <= at_least and (other < kl or count < at_least) for other, count in self.points
        )


@dataclass(frozen=True)
class PrunedResult:
    """A trial that was left early."""

    number: int
    params: dict[str, Any]
    kl: float
    refusals: float  # expected, as the sampler was told
    reevaluates: int | None  # the earlier trial that it measures again


@dataclass(frozen=True)
class StudyHistory:
    """A study's finished trials, seen from what was measured of each."""

    results: list[Result]
    pruned: list[PrunedResult]

    @classmethod
    def of(cls, study: optuna.Study, without: Collection[int] = ()) -> StudyHistory:
        """Read a study, but for the trials whose numbers are left out. Raises UserError for a damaged one."""
        complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        included = [t for t in complete if t.number not in without]
        known = [(t, attributes.pruned(study, t)) for t in included]
        pruned = [
            PrunedResult(
                t.number,
                dict(t.params),
                beaten.divergence.mean,
                attributes.objective_values(study, t)[1],
                attributes.reevaluates(study, t),
            )
            for t, beaten in known
            if beaten is not None
        ]
        return cls(results_of(study, included), pruned)

    @property
    def threshold(self) -> ParetoThreshold:
        """What a new trial has to beat."""
        return ParetoThreshold(
            [r.point for r in pareto_front(self.results)]
        )  # whatever one of the others beats, one of these beats too

    @property
    def surrogates(self) -> list[tuple[RefusalProxy, float]]:
        """Surrogate and expected refusals of the measured trials, in their order."""
        return [(r.scores.surrogate, r.scores.expected) for r in self.results if r.scores.surrogate]

    @property
    def surrogate_error(self) -> float | None:
        """How far the estimates were off, in refusals, had the measured trials been estimated."""
        return prediction_error(self.surrogates, self.results[0].scores.total) if self.results else None

    def estimate(self, trial: PrunedTrial) -> float:
        """Refusals expected of a trial that was stopped."""
        return Calibration.fit(self.surrogates, trial.total).estimate(trial.surrogate, trial.expected_at_least)

    def pending_full_evaluations(self) -> list[PrunedResult]:
        """Stopped trials whose estimate would put them on the front: they have to be measured in full before the study ends."""
        repeated = {t.reevaluates for t in self.pruned} | {r.reevaluates for r in self.results}
        bar = self.threshold
        return [t for t in self.pruned if t.number not in repeated and not bar.dominates(t.kl, t.refusals)]


def objective_values(
    outcome: Scores | PrunedTrial, history: StudyHistory, kl_floor: float, worst_kl: float
) -> list[float]:
    """What the sampler is told of a trial: a KL within its bounds, and the requests declined or evaded, estimated where
    it was stopped. A destroyed model declines nothing, which is no merit: it is told as the worst. All values are finite, since
    Optuna takes a trial with another one for failed."""
    refusals = outcome.expected if isinstance(outcome, Scores) else history.estimate(outcome)
    if not math.isfinite(refusals) or not math.isfinite(outcome.divergence.mean):
        refusals = float(outcome.total)
    return [min(max(outcome.divergence.mean, kl_floor), worst_kl), refusals]
