"""Results of a study, the Pareto front of its objectives, and the automatic selection of a trial."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import optuna
from optuna.trial import FrozenTrial, TrialState

from heretic.scoring.comparison import values_text
from heretic.scoring.objectives import DEFAULT_OBJECTIVES, Objective
from heretic.scoring.scores import Scores
from heretic.storage import attributes

TIE_TOLERANCE = 0.5  # requests; closer trials are ranked by their KL


LABELS = {"kl": "KL divergence", "refusals": "expected refusals"}  # of axes


@dataclass(frozen=True)
class Result:
    """A fully measured trial."""

    number: int
    params: dict[str, Any]
    scores: Scores
    reevaluates: int | None = None  # number of the pruned trial that this one measured in full
    objectives: tuple[Objective, ...] = DEFAULT_OBJECTIVES

    @property
    def point(self) -> tuple[float, ...]:
        """The objectives, all minimized: (KL, expected refusals) unless the settings choose others."""
        return tuple(objective.cost(self.scores) for objective in self.objectives)

    @property
    def drawn(self) -> tuple[float, float]:
        """The values of the first two objectives, for figures; infinite if not measured."""
        x, y = (self.scores.value(objective.name) for objective in self.objectives[:2])
        return math.inf if x is None else x, math.inf if y is None else y

    @property
    def axes(self) -> tuple[str, str]:
        """The labels of the first two objectives."""
        x, y = (LABELS.get(objective.name, objective.name.replace("_", " ")) for objective in self.objectives[:2])
        return x, y


class Selection(NamedTuple):
    """The selected result."""

    result: Result
    reason: str
    meets_limit: bool = True  # whether it meets the limit of the rule, `max_kl` or `max_refusals`


def results(study: optuna.Study) -> list[Result]:
    """Return the fully measured trials in order. Raises UserError for a damaged trial."""
    return results_of(study, study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)))


def results_of(study: optuna.Study, trials: Sequence[FrozenTrial]) -> list[Result]:
    """Return the fully measured ones of these trials. Raises UserError for a damaged trial."""
    measured = [(trial, attributes.scores(study, trial)) for trial in trials]
    objectives = attributes.objectives(study)
    return [
        Result(trial.number, dict(trial.params), scores, attributes.reevaluates(study, trial), objectives)
        for trial, scores in measured
        if scores is not None
    ]


def pareto_front(candidates: Sequence[Result]) -> list[Result]:
    """Return the non-dominated results, the worst in the first objective first (for KL: fewest refusals first).

    Only results with finite objectives and within all limits count.
    """
    front: list[Result] = []
    usable = [r for r in candidates if all(map(math.isfinite, r.point)) and r.scores.within_limits]
    for candidate in sorted(usable, key=lambda r: (r.point, r.number)):
        # With two objectives the last member has the best second value of all members.
        rivals = front[-1:] if len(candidate.point) == 2 else front
        if not any(all(a <= b for a, b in zip(r.point, candidate.point, strict=True)) for r in rivals):
            front.append(candidate)
    return front[::-1]


def value_heading(name: str) -> str:
    """Return the heading of a scorer's column."""
    return name.replace("_", " ")


def table_columns(selection: Sequence[Result]) -> dict[str, list[str]]:
    """Return the cells of a results table by heading, without columns that have no values."""
    divergences, scores = [r.scores.divergence for r in selection], [r.scores for r in selection]
    columns = {
        "trial": [str(r.number) for r in selection],
        "refusals": [f"{s.refusals}/{s.total}" for s in scores],
        "evasive": [str(s.evasive) for s in scores] if any(s.evasive for s in scores) else [],
        "expected": [f"{s.expected:.1f}" for s in scores],
    }
    values = [values_text(s.values) for s in scores]
    for name in dict.fromkeys(name for texts in values for name in texts):
        if "." not in name or any(name == objective.name for r in selection for objective in r.objectives):
            columns[value_heading(name)] = [texts.get(name, "") for texts in values]
    for heading, name in (("KL mean", "mean"), ("median", "median"), ("p95", "p95"), ("max", "max")):
        columns[heading] = [f"{getattr(d, name):.4f}" for d in divergences]
    return {heading: cells for heading, cells in columns.items() if cells}


def select_trial(candidates: Sequence[Result], rule: str, max_kl: float, max_refusals: int) -> Selection | None:
    """Select a result by the rule; None if the Pareto front is empty.

    KL and refusals rank the trials if they are objectives; else the first objective stands for the change of the model, and
    the second for the refusals. The limits are of KL and refusals in any case.
    """
    front = pareto_front(candidates)
    if not front:
        return None
    objectives = front[0].objectives
    by, of = _roles(objectives)
    change, refusals = objectives[by], objectives[of]
    by_change = sorted(front, key=lambda r: (r.point[by], r.point[of], r.point))
    if rule == "fewest_refusals_under_kl":
        within = [r for r in by_change if r.scores.divergence.mean <= max_kl]
        if within:
            tolerance = TIE_TOLERANCE if refusals.name == "refusals" else 0
            few = min(r.point[of] for r in within) + tolerance
            tied = next(r for r in within if r.point[of] <= few)
            return Selection(tied, f"{_best(refusals)} among the trials with a KL of at most {max_kl:g}")
        closest = min(front, key=lambda r: (r.scores.divergence.mean, r.point[of]))
        return Selection(closest, f"lowest KL; no trial has a KL of at most {max_kl:g}", False)
    within = [r for r in by_change if r.scores.unanswered <= max_refusals]
    if within:
        reason = f"{_best(change)} among the trials with at most {max_refusals} refused or evaded requests"
        return Selection(within[0], reason)
    fewest = min(by_change, key=lambda r: r.point[of])
    reason = f"{_best(refusals)}; no trial has at most {max_refusals} refused or evaded requests"
    return Selection(fewest, reason, False)


def _roles(objectives: Sequence[Objective]) -> tuple[int, int]:
    """Return which objectives rank the change of the model and the refusals."""
    names = [objective.name.partition(".")[0] for objective in objectives]
    change = names.index("kl") if "kl" in names else None
    refusals = names.index("refusals") if "refusals" in names else None
    others = [i for i in range(len(names)) if i not in (change, refusals)]
    if change is None:
        change = others.pop(0)
    if refusals is None:
        refusals = others.pop(0)
    return change, refusals


def _best(objective: Objective) -> str:
    """Name the best value of an objective."""
    usual = {"kl": "lowest KL", "refusals": "fewest refusals"}
    extreme = "lowest" if objective.better == "lower" else "highest"
    return usual.get(objective.name, f"{extreme} {objective.name.replace('_', ' ')}")
