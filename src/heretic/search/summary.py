"""How a study stands, read from its storage: what the live screen and `heretic status` show."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

import optuna
from optuna.trial import FrozenTrial, TrialState

from heretic.progress import ProgressReporter
from heretic.search.pareto import Result, select_trial
from heretic.search.pruning import StudyHistory
from heretic.settings import Settings
from heretic.storage.attributes import refusals_before

RECENT = 20  # trials that the speed is taken from


@dataclass(frozen=True)
class StudySummary:
    """A study at a moment: `done` trials are told, and so count; those of `progress.stopped` were left early. `before` is how
    often the original declines, `best` the trial that the settings prefer, with the reason."""

    n_trials: int
    n_complete: int
    n_failed: int
    original_refusals: int | None
    history: StudyHistory
    best: tuple[Result, str] | None
    trials_per_hour: float | None

    @classmethod
    def of(cls, study: optuna.Study, settings: Settings, without: Collection[int] = ()) -> StudySummary:
        """Read a study; of the trials `without` only the number counts. Raises UserError for another damaged one."""
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
        )

    @property
    def results(self) -> list[Result]:
        """The fully measured trials."""
        return self.history.results

    @property
    def n_pruned(self) -> int:
        """How many trials were left early."""
        return len(self.history.pruned)

    @property
    def seconds_left(self) -> float | None:
        """Estimated from the speed of the last trials; None where nothing is left or nothing is known."""
        left = self.n_trials - self.n_complete
        return 3600 * left / self.trials_per_hour if left > 0 and self.trials_per_hour else None


def _trials_per_hour(complete: list[FrozenTrial]) -> float | None:
    """The last trials over the time in which at least one of them ran.

    So trials side by side, in a pass or on several machines, count for the speed, and a pause between two sessions does not.
    """
    timed = [(t.datetime_start, t.datetime_complete) for t in complete]
    recent = sorted(((a, b) for a, b in timed if a and b), key=lambda pair: pair[1])[-RECENT:]
    seconds = _covered_seconds(recent)
    return 3600 * len(recent) / seconds if seconds > 0 else None


def _covered_seconds(spans: Iterable[tuple[datetime, datetime]]) -> float:
    """Seconds that at least one of the spans covers."""
    total, reached = 0.0, None
    for begin, end in sorted(spans):
        begin = begin if reached is None else max(begin, reached)
        if end > begin:
            total += (end - begin).total_seconds()
            reached = end
    return total


class StudyReporter(ProgressReporter, Protocol):
    """A watcher that is also told how a study stands."""

    def study_updated(self, summary: StudySummary) -> None:
        """How the study under way stands now."""
