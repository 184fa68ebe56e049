"""Ask-and-tell loop of a study: sample trials with Optuna, measure them, store the outcomes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Protocol

import optuna
from optuna.trial import TrialState

from heretic.errors import UserError
from heretic.interrupt import StopSignal
from heretic.progress import Stage
from heretic.scoring.comparison import number_text, values_text
from heretic.scoring.evaluator import no_pruning
from heretic.scoring.objectives import DEFAULT_OBJECTIVES
from heretic.scoring.scores import Scores, TrialOutcome
from heretic.search.pruning import ParetoThreshold, StudyHistory, objective_values
from heretic.search.scheduler import TrialSampler, TrialScheduler, n_complete
from heretic.search.summary import StudyReporter, StudySummary
from heretic.settings import Settings
from heretic.storage import attributes
from heretic.storage.attributes import ERROR, KL_PER_PROMPT, PRUNED, SCORES, START, WORKER
from heretic.storage.checksum import with_checksum
from heretic.storage.heartbeat import retry_of, signature, trial_heartbeats

# A destroyed model has an infinite KL; TPE needs a finite number, and every KL this large is equally bad.
WORST_KL = 100.0
MAX_CONSECUTIVE_FAILURES = 3
MAX_STORED_PROMPTS = 2000  # per trial whose KL is stored


class TrialMeasurer(TrialSampler, Protocol):
    """Samples and measures trials."""

    def initial_params(self) -> Sequence[dict[str, Any]]:
        """Return the parameters of the initial trials, which are measured in full."""

    def measure(
        self, trials: Sequence[optuna.Trial], is_dominated: Callable[[float, float], bool]
    ) -> list[TrialOutcome | UserError]:
        """Measure the trials; one is pruned once `is_dominated(KL, lower bound of expected refusals)` is True."""


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
    """Run trials until the study has converged or has `settings.n_trials` finished ones.

    A pruned trial counts, with estimated objectives, but is never a result. An interrupted or failed trial is marked failed and
    does not count; three consecutive failures end the study.

    Args:
        after_batch: called whenever a batch is stored.
        shared: other workers run trials too. Their running trials count as finished, so that the study ends with at most
            `n_trials`; this worker stays until they are done, in case that one dies.

    Raises:
        Interrupted: after a stop request.
        UserError: the last error after three consecutive failures.
    """
    loop = _StudyLoop(study, settings, trials, reporter)
    scheduler = TrialScheduler(study, settings, trials, reporter, stop, shared)
    scheduler.enqueue_initial(trials.initial_params())
    with reporter.stage("Trials", settings.n_trials) as stage:
        stage.advance(loop.n_counted)
        reporter.study_updated(StudySummary.of(study, settings))
        while batch := scheduler.next():
            try:
                loop.run_batch(batch, stage)
            except BaseException:
                for trial in batch:
                    study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)
                raise
            reporter.study_updated(StudySummary.of(study, settings))
            after_batch()
        if end := StudySummary.of(study, settings).end:
            reporter.info(f"The study is complete: {end[1]}.")


class _StudyLoop:
    """Measures batches and stores their outcomes; counts consecutive failures and finished trials."""

    def __init__(self, study: optuna.Study, settings: Settings, trials: TrialMeasurer, reporter: StudyReporter) -> None:
        self.study, self.settings, self.trials, self.reporter = study, settings, trials, reporter
        self.consecutive_failures = 0
        self.n_counted = n_complete(study)
        self.objectives = attributes.objectives(study)

    def run_batch(self, batch: Sequence[optuna.Trial], stage: Stage) -> None:
        """Measure a batch and store every outcome."""
        history = StudyHistory.of(self.study)
        prunable = self.settings.early_stopping and self.objectives == DEFAULT_OBJECTIVES
        in_full = not prunable or any(START in trial.user_attrs for trial in batch)
        with trial_heartbeats(self.study, batch):
            outcomes = self.trials.measure(batch, no_pruning if in_full else history.threshold.dominates)
            for trial, outcome in zip(batch, outcomes, strict=True):
                if isinstance(outcome, UserError):
                    self._store_failure(trial, outcome)
                else:
                    self._finish_trial(trial, outcome, history, stage)

    def _store_failure(self, trial: optuna.Trial, error: UserError) -> None:
        with suppress(optuna.exceptions.UpdateFinishedTrialError):  # another worker has taken it over
            trial.set_user_attr(ERROR, error.what)
        self.study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)
        self.consecutive_failures += 1
        self.reporter.warning(f"Trial {trial.number} failed: {error.what}")
        if self.consecutive_failures == MAX_CONSECUTIVE_FAILURES:
            raise error

    def _finish_trial(self, trial: optuna.Trial, outcome: TrialOutcome, history: StudyHistory, stage: Stage) -> None:
        self.consecutive_failures = 0
        values = objective_values(outcome, history, self.settings.search.kl_floor, WORST_KL, self.objectives)
        stored = _store_outcome(self.study, self.trials, trial, outcome, values, history.threshold)
        if stored is None:
            self.reporter.warning(
                f"Another worker has taken over trial {trial.number}, because this worker sent no heartbeat for too long."
            )
            return
        done = n_complete(self.study)
        stage.advance(done - self.n_counted)  # includes trials of other workers
        self.n_counted = done
        self.reporter.info(f"Trial {stored.number} ({done} of {self.settings.n_trials}): {_summary_line(outcome)}")


def _store_outcome(
    study: optuna.Study,
    trials: TrialMeasurer,
    trial: optuna.Trial,
    outcome: TrialOutcome,
    values: list[float],
    threshold: ParetoThreshold,
) -> optuna.Trial | None:
    """Store an outcome; returns the trial that holds it, or None if it was discarded.

    A worker without a heartbeat for too long loses its trial, which is then enqueued again. Its outcome is stored in that retry
    if no worker has claimed it; otherwise it is discarded, since the same parameters would count twice.
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
    """Round to four significant digits, which is all that a figure shows."""
    return [float(f"{number:.4g}") for number in numbers]


def _summary_line(outcome: TrialOutcome) -> str:
    """Format the outcome for the log."""
    kl, seconds = outcome.divergence.mean, outcome.seconds.get("trial", 0.0)
    if isinstance(outcome, Scores):
        evasive = f", {outcome.evasive} evasive" if outcome.evasive else ""
        beyond = "".join(
            f", {name.replace('_', ' ')} beyond the limit by {number_text(n)}"
            for name, n in outcome.excess.items()
            if n > 0
        )
        more = "".join(
            f", {name.replace('_', ' ')} {text}"
            for name, text in values_text(outcome.values).items()
            if "." not in name
        )
        return f"{outcome.refusals} of {outcome.total} refused, KL {kl:.4f}{evasive}{more}{beyond} ({seconds:.1f} s)"
    return f"pruned (dominated), at least {outcome.at_least} of {outcome.total} refused, KL {kl:.4f} ({seconds:.1f} s)"
