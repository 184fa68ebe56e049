"""Results of a study, their Pareto front of KL and expected refusals, and the automatic selection of a trial."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from heretic.scoring.scores import Scores
from heretic.storage import attributes

TIE_TOLERANCE = 0.5  # requests; closer trials are ranked by their KL


@dataclass(frozen=True)
class Result:
    """A fully measured trial."""

    number: int
    params: dict[str, Any]
    scores: Scores
    reevaluates: int | None = None  # number of the pruned trial that this one measured in full

    @property
    def point(self) -> tuple[float, float]:
        """The objectives (KL, expected refusals), both minimized."""
        return self.scores.divergence.mean, self.scores.expected


def results(study: optuna.Study, without: Collection[int] = ()) -> list[Result]:
    """Return the fully measured trials in order, except those `without`. Raises UserError for a damaged trial."""
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    return results_of(study, [t for t in complete if t.number not in without])


def results_of(study: optuna.Study, trials: Sequence[FrozenTrial]) -> list[Result]:
    """Return the fully measured ones of these trials. Raises UserError for a damaged trial."""
    measured = [(trial, attributes.scores(study, trial)) for trial in trials]
    return [
        Result(trial.number, dict(trial.params), scores, attributes.reevaluates(study, trial))
        for trial, scores in measured
        if scores is not None
    ]


def pareto_front(candidates: Sequence[Result]) -> list[Result]:
    """Return the non-dominated results, fewest refusals first; only those with a finite KL and within all limits."""
    front: list[Result] = []
    usable = [r for r in candidates if all(map(math.isfinite, r.point)) and r.scores.within_limits]
    for candidate in sorted(usable, key=lambda r: (r.point, r.number)):
        if not front or candidate.point[1] < front[-1].point[1]:
            front.append(candidate)
    return front[::-1]


def table_columns(selection: Sequence[Result]) -> dict[str, list[str]]:
    """Return the cells of a results table by heading, without columns that have no values."""
    divergences, scores = [r.scores.divergence for r in selection], [r.scores for r in selection]
    columns = {
        "trial": [str(r.number) for r in selection],
        "refusals": [f"{s.refusals}/{s.total}" for s in scores],
        "evasive": [str(s.evasive) for s in scores] if any(s.evasive for s in scores) else [],
        "expected": [f"{s.expected:.1f}" for s in scores],
    }
    if all(s.harmless_metrics for s in scores):
        harmless_metrics = [s.harmless_metrics for s in scores if s.harmless_metrics]
        columns["harmless refused"] = [f"{c.over_refusals}/{c.total}" for c in harmless_metrics]
        columns["degenerate"] = [f"{c.degenerate}/{c.total}" for c in harmless_metrics]
    for heading, name in (("KL mean", "mean"), ("median", "median"), ("p95", "p95"), ("max", "max")):
        columns[heading] = [f"{getattr(d, name):.4f}" for d in divergences]
    return {heading: cells for heading, cells in columns.items() if cells}


def select_trial(
    candidates: Sequence[Result], rule: str, max_kl: float, max_refusals: int
) -> tuple[Result, str] | None:
    """Select a result by the rule; returns it with the reason in words, or None if the Pareto front is empty."""
    front = pareto_front(candidates)
    if not front:
        return None
    if rule == "fewest_refusals_under_kl":
        within = [r for r in front if r.point[0] <= max_kl]
        if within:
            tied = [r for r in within if r.point[1] <= within[0].point[1] + TIE_TOLERANCE]
            return tied[-1], f"fewest refusals among the trials with a KL of at most {max_kl:g}"
        return front[-1], f"lowest KL; no trial has a KL of at most {max_kl:g}"
    within = [r for r in front if r.scores.unanswered <= max_refusals]
    if within:
        return within[-1], f"lowest KL among the trials with at most {max_refusals} refused or evaded requests"
    return front[0], f"fewest refusals; no trial has at most {max_refusals} refused or evaded requests"
