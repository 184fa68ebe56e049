"""Summary of a study, shown on the live screen and by `heretic status`."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Protocol

import optuna
from optuna.trial import FrozenTrial, TrialState

from heretic.progress import ProgressReporter
from heretic.search.convergence import Convergence, convergence
from heretic.search.pareto import Result, Selection, select_trial
from heretic.search.pruning import StudyHistory
from heretic.settings import Settings
from heretic.storage.attributes import refusals_before, values_before

RECENT = 20  # trials from which the speed is estimated


@dataclass(frozen=True)
class StudySummary:
    """State of a study at one moment."""

    n_trials: int  # at most
    n_complete: int  # finished, including pruned trials
    n_failed: int
    original_refusals: int | None
    history: StudyHistory
    best: Selection | None  # the trial that the settings select
    trials_per_hour: float | None
    convergence: Convergence | None  # None if it has not converged
    original_values: Mapping[str, float] = field(default_factory=dict)  # of other scorers, by name

    @classmethod
    def of(cls, study: optuna.Study, settings: Settings, without: Collection[int] = ()) -> StudySummary:
        """Read a study; trials `without` are only counted. Raises UserError for any other damaged trial."""
        trials = study.get_trials(deepcopy=False)
        complete = [t for t in trials if t.state == TrialState.COMPLETE]
        history = StudyHistory.of(study, without)
        return cls(
            n_trials=settings.n_trials,
            n_complete=len(complete),
            n_failed=sum(t.state == TrialState.FAIL for t in trials),
            original_refusals=refusals_before(study),
            history=history,
            best=select_trial(history.results, settings.select, settings.max_kl, settings.max_refusals),
            trials_per_hour=_trials_per_hour(complete),
            convergence=convergence(study, settings, history),
            original_values=values_before(study),
        )

    @property
    def results(self) -> list[Result]:
        """The fully measured trials."""
        return self.history.results

    @property
    def n_pruned(self) -> int:
        """Number of pruned trials."""
        return len(self.history.pruned)

    @property
    def end(self) -> tuple[str, str] | None:
        """Why the study has ended, as a key and in words; None while trials remain."""
        if self.n_complete >= self.n_trials:
            return "n_trials", f"all {self.n_trials} trials run"
        return ("converged", str(self.convergence)) if self.convergence else None

    @property
    def seconds_left(self) -> float | None:
        """Remaining time at the recent speed, at most: the study may converge. None if it has ended or the speed is unknown."""
        if self.end or not self.trials_per_hour:
            return None
        return 3600 * (self.n_trials - self.n_complete) / self.trials_per_hour


def _trials_per_hour(complete: list[FrozenTrial]) -> float | None:
    """Divide the recent trials by the time in which at least one of them ran.

    So parallel trials raise the speed, and a pause between two sessions does not lower it.
    """
    timed = [(t.datetime_start, t.datetime_complete) for t in complete]
    recent = sorted(((a, b) for a, b in timed if a and b), key=lambda pair: pair[1])[-RECENT:]
    seconds = _covered_seconds(recent)
    return 3600 * len(recent) / seconds if seconds > 0 else None


def _covered_seconds(spans: Iterable[tuple[datetime, datetime]]) -> float:
    """Return the seconds that at least one of the spans covers."""
    total, reached = 0.0, None
    for begin, end in sorted(spans):
        begin = begin if reached is None else max(begin, reached)
        if end > begin:
            total += (end - begin).total_seconds()
            reached = end
    return total


class StudyReporter(ProgressReporter, Protocol):
    """A progress reporter that also receives study summaries."""

    def study_updated(self, summary: StudySummary) -> None:
        """Receive the current summary of the running study."""
