"""Convergence: a study ends once its Pareto front has stopped growing."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Annotated, Any

import optuna
from optuna.trial import FrozenTrial, TrialState
from pydantic import Field, Json, TypeAdapter

from heretic.scoring.objectives import DEFAULT_OBJECTIVES
from heretic.search.hypervolume import hypervolume_history
from heretic.search.pruning import StudyHistory
from heretic.settings import SearchSettings, Settings
from heretic.storage import attributes
from heretic.storage.attributes import CONVERGENCE, Count, Finite, Number

REFERENCE_KL = 0.5  # nats; with the original's refusals the reference point of the hypervolume


@dataclass(frozen=True)
class Convergence:
    """When and by which settings a study converged."""

    trial: Number  # the last finished trial at that time
    n_complete: Count  # finished trials at that time, including pruned ones
    gain: Finite  # fraction of the hypervolume gained in the last `patience` trials
    last_gain: Number  # the last trial that raised the hypervolume
    patience: Annotated[int, Field(strict=True, ge=1)]  # as in `search.patience`
    min_gain: Finite  # as in `search.min_gain`

    def __str__(self) -> str:
        return (
            f"converged after trial {self.trial}: the last {self.patience} trials raised the hypervolume by "
            f"{100 * self.gain:.2f} % (last gain: trial {self.last_gain})"
        )

    def as_dict(self) -> dict[str, Any]:
        """Return the data for --json."""
        return asdict(self)

    def save(self, study: optuna.Study) -> None:
        """Store the decision, so that all workers and later sessions keep to it."""
        study.set_user_attr(CONVERGENCE, json.dumps(asdict(self)))

    @classmethod
    def load(cls, study: optuna.Study) -> Convergence | None:
        """Load the study's decision; None if it has none. Raises UserError if it is damaged."""
        return attributes.read(study, CONVERGENCE, _adapter())


@functools.cache
def _adapter() -> TypeAdapter[Convergence]:
    return TypeAdapter(Json[Convergence])


def convergence(study: optuna.Study, settings: Settings, history: StudyHistory) -> Convergence | None:
    """Return how the study converged; None if it has not, and for objectives other than KL and refusals.

    A stored decision stays valid, whatever trials finish after it, until the user changes its settings or asks for more trials.
    """
    patience, min_gain = settings.search.patience, settings.search.min_gain
    if not patience or attributes.objectives(study) != DEFAULT_OBJECTIVES:
        return None
    requested = attributes.requested_trials(study) or 0
    stored = Convergence.load(study)
    if stored and (stored.patience, stored.min_gain) == (patience, min_gain) and stored.n_complete >= requested:
        return stored
    ended = {t.number: t.datetime_complete for t in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))}
    numbers, hypervolumes = growth(history, attributes.refusals_before(study), ended)
    gain = final_gain(hypervolumes, settings.search)
    if gain is None or len(numbers) < requested or _initial_trials_left(study):
        return None
    last_gain = numbers[hypervolumes.index(hypervolumes[-1])]
    return Convergence(numbers[-1], len(numbers), gain, last_gain, patience, min_gain)


def growth(
    history: StudyHistory, original_refusals: int | None, ended: Mapping[int, datetime | None] | None = None
) -> tuple[list[int], list[float]]:
    """Return the numbers of the finished trials, and the hypervolume of the Pareto front after each (0 to 1).

    They are in the order of their end if `ended` gives the times, since workers finish out of order, else of their numbers.

    Reference point: `REFERENCE_KL` and the original's refusals (all requests, if it refuses none or is not known). A pruned
    trial adds nothing, since the front dominates it; nor does one beyond the limits.
    """
    nowhere = (math.inf, math.inf)
    points = {t.number: nowhere for t in history.pruned}
    points |= {
        r.number: (r.scores.divergence.mean, r.scores.expected) if r.scores.within_limits else nowhere
        for r in history.results
    }
    top = original_refusals or (history.results[0].scores.total if history.results else 1)
    times = ended or {}
    numbers = sorted(points, key=lambda number: (times.get(number) or datetime.min, number))
    return numbers, hypervolume_history((points[n] for n in numbers), (REFERENCE_KL, float(top)))


def final_gain(hypervolumes: Sequence[float], search: SearchSettings) -> float | None:
    """Return the fraction of the hypervolume that the last `patience` trials gained, if the front has converged; else None.

    Trials before TPE starts say nothing about what it will find, so `patience` trials must follow them. A study whose trials
    are all beyond the reference point has found nothing yet and never converges.
    """
    patience = search.patience
    if len(hypervolumes) < max(search.n_startup_trials + patience, patience + 1) or not hypervolumes[-1]:
        return None
    gain = 1 - hypervolumes[-1 - patience] / hypervolumes[-1]
    return gain if gain <= search.min_gain else None


def _initial_trials_left(study: optuna.Study) -> bool:
    """Whether an initial trial has neither finished nor failed on its own."""
    settled: dict[int, bool] = {}
    for trial in study.get_trials(deepcopy=False):
        if (number := attributes.start(study, trial)) is not None:
            settled[number] = settled.get(number, False) or _is_settled(study, trial)
    return not all(settled.values())


def _is_settled(study: optuna.Study, trial: FrozenTrial) -> bool:
    return trial.state == TrialState.COMPLETE or attributes.failed_on_its_own(study, trial)
