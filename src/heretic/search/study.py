"""The study: ask Optuna for trials, have them measured, tell."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Protocol

import optuna
from optuna.trial import TrialState

from heretic.errors import UserError
from heretic.interrupt import StopSignal
from heretic.scoring.evaluator import Scores, TrialOutcome, no_pruning
from heretic.search.pruning import ParetoThreshold, StudyHistory, objective_values
from heretic.search.scheduler import TrialSampler, TrialScheduler, n_complete
from heretic.search.summary import StudyReporter, StudySummary
from heretic.settings import Settings
from heretic.storage.attributes import ERROR, KL_PER_PROMPT, PRUNED, SCORES, START, WORKER
from heretic.storage.checksum import with_checksum
from heretic.storage.heartbeat import retry_of, signature, trial_heartbeats

# An ablation that destroys the model has an infinite KL; TPE needs a number, and any this large is as bad as another.
WORST_KL = 100.0
MAX_CONSECUTIVE_FAILURES = 3
MAX_STORED_PROMPTS = 2000  # of which it is stored


class TrialMeasurer(TrialSampler, Protocol):
    """What draws and measures trials."""

    def initial_params(self) -> Sequence[dict[str, Any]]:
        """Parameters of the trials to begin with, which are measured in full."""

    def measure(
        self, trials: Sequence[optuna.Trial], is_dominated: Callable[[float, float], bool]
    ) -> list[TrialOutcome | UserError]:
        """What came out of each; `beaten(KL, unanswered requests to expect at least)` says that one need not be measured any
        further."""


def run_study(
    study: optuna.Study,
    settings: Settings,
    trials: TrialMeasurer,
    *,
    reporter: StudyReporter,
    stop: StopSignal,
    after_batch: Callable[[], None] = lambda: None,
    shared: bool = False,
) -> None:
    """Go on until the study holds `settings.n_trials` finished trials.

    Trials are asked for as many at a time as `trials` runs together, and all stored before the next are asked for. One that
    a finished trial has beaten is left early and told with an estimate; it counts, but is never a result. A trial that is
    interrupted or fails is marked failed and does not count; three that fail one after the other end the study. `after_batch`
    is called when trials have been told. Raises Interrupted, or the last error.

    `shared`: other workers do the same. What they have under way counts as if it were finished, so that there are exactly
    `n_trials` in the end; and this one stays until the others are done too, in case that one dies.
    """
    failures = 0
    queue = TrialScheduler(study, settings, trials, reporter, stop, shared)
    queue.enqueue_initial(trials.initial_params())
    with reporter.stage("Trials", settings.n_trials) as stage:
        seen = n_complete(study)
        stage.advance(seen)
        reporter.study_updated(StudySummary.of(study, settings))
        while asked := queue.next():
            try:
                progress = StudyHistory.of(study)
                in_full = not settings.early_stopping or any(START in trial.user_attrs for trial in asked)
                with trial_heartbeats(study, asked):
                    measured = trials.measure(asked, no_pruning if in_full else progress.threshold.dominates)
                    for trial, found in zip(asked, measured, strict=True):
                        if isinstance(found, UserError):
                            with suppress(optuna.exceptions.UpdateFinishedTrialError):  # it went to another worker
                                trial.set_user_attr(ERROR, found.what)
                            study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)
                            failures += 1
                            reporter.warning(f"Trial {trial.number} failed: {found.what}")
                            if failures == MAX_CONSECUTIVE_FAILURES:
                                raise found
                            continue
                        failures = 0
                        values = objective_values(found, progress, settings.search.kl_floor, WORST_KL)
                        kept = _store_outcome(study, trials, trial, found, values, progress.threshold)
                        if kept is None:
                            reporter.warning(
                                f"Trial {trial.number} went to another worker: this one was silent for too long."
                            )
                            continue
                        done = n_complete(study)
                        stage.advance(done - seen)  # with those of other workers
                        seen = done
                        reporter.info(f"Trial {kept.number} ({done} of {settings.n_trials}): {_summary_line(found)}")
            except BaseException:
                for trial in asked:
                    study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)
                raise
            reporter.study_updated(StudySummary.of(study, settings))
            after_batch()


def _store_outcome(
    study: optuna.Study,
    trials: TrialMeasurer,
    trial: optuna.Trial,
    outcome: TrialOutcome,
    values: list[float],
    threshold: ParetoThreshold,
) -> optuna.Trial | None:
    """Store what was measured; the trial that holds it, or None where it cannot count any more.

    A worker that was not heard of for too long has lost its trial. What it measured is stored as the repetition of that trial
    if nobody has begun with it; else it is let go, since the same parameters would count twice.
    """

    def store(where: optuna.Trial) -> None:
        kind = SCORES if isinstance(outcome, Scores) else PRUNED
        where.set_user_attr(kind, with_checksum(outcome.as_dict(), where.params))
        for name, excess in outcome.excess.items() if isinstance(outcome, Scores) else ():
            where.set_constraint(name, excess)
        if isinstance(outcome, Scores) and not threshold.dominates(outcome.divergence.mean, outcome.expected):
            where.set_user_attr(KL_PER_PROMPT, rounded(outcome.divergence.per_prompt[:MAX_STORED_PROMPTS]))
        study.tell(where, values)

    try:
        store(trial)
        return trial
    except (optuna.exceptions.UpdateFinishedTrialError, ValueError):
        if study.get_trials(deepcopy=False)[trial.number].state != TrialState.FAIL:
            raise
    retry = retry_of(study, trial.number)
    if retry is not None:
        retry.set_user_attr(WORKER, signature())
        trials.sample(retry)
        store(retry)
    return retry


def rounded(numbers: Sequence[float]) -> list[float]:
    """Four digits of each, which is all that a drawing shows."""
    return [float(f"{number:.4g}") for number in numbers]


def _summary_line(outcome: TrialOutcome) -> str:
    """What came out, for the log."""
    kl, seconds = outcome.divergence.mean, outcome.seconds.get("trial", 0.0)
    if isinstance(outcome, Scores):
        evasive = f", {outcome.evasive} evasive" if outcome.evasive else ""
        beyond = "".join(
            f", {name.replace('_', '-')} {n:g} over the limit" for name, n in outcome.excess.items() if n > 0
        )
        return f"{outcome.refusals} of {outcome.total} refused, KL {kl:.4f}{evasive}{beyond} ({seconds:.1f} s)"
    return f"beaten, with at least {outcome.at_least} of {outcome.total} refused at KL {kl:.4f} ({seconds:.1f} s)"
