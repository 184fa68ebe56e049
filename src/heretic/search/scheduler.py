"""Scheduler of trials: one worker at a time decides which trials come next, so that their number is exact."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import optuna
from optuna.trial import FrozenTrial, TrialState

from heretic.interrupt import StopSignal
from heretic.search.convergence import Convergence, convergence
from heretic.search.pruning import StudyHistory
from heretic.search.sampler import sampler
from heretic.search.summary import StudyReporter, StudySummary
from heretic.settings import Settings
from heretic.storage import attributes
from heretic.storage.attributes import REEVALUATES, START, TRIALS_PER_BATCH, WORKER
from heretic.storage.heartbeat import claim_waiting_trial, requeue_stale_trials, signature
from heretic.storage.retrying import RetryingRDBStorage
from heretic.storage.study_lock import LockLost, rdb_storage, study_lock

POLL_SECONDS = 1.0  # while other workers measure the last trials


class TrialSampler(Protocol):
    """Sets the batch size and samples trials."""

    def trials_per_batch(self, before: int | None) -> int:
        """Return the number of trials per batch; `before` is the value of an earlier session."""

    def sample(self, trial: optuna.Trial) -> object:
        """Sample the parameters of a trial; Optuna stores them."""


def n_complete(study: optuna.Study) -> int:
    """Return the number of finished trials."""
    return len(study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)))


def trials_remain(study: optuna.Study, settings: Settings) -> bool:
    """Return whether the study needs new trials: it has neither `n_trials` finished ones nor converged."""
    return n_complete(study) < settings.n_trials and not convergence(study, settings, StudyHistory.of(study))


@dataclass
class TrialScheduler:
    """Hands out the remaining trials of a study to this worker; `shared`: other workers take trials too."""

    study: optuna.Study
    settings: Settings
    trials: TrialSampler
    reporter: StudyReporter
    stop: StopSignal
    shared: bool = False

    def enqueue_initial(self, starts: Sequence[dict[str, Any]]) -> None:
        """Enqueue the initial trials that the study does not have yet; failed ones are enqueued again."""
        while True:
            try:
                with study_lock(self.study):
                    trials = self.study.get_trials(deepcopy=False)
                    known = {attributes.start(self.study, t) for t in trials if t.state != TrialState.FAIL}
                    for number, params in enumerate(starts):
                        if number not in known:
                            self.study.enqueue_trial(params, user_attrs={START: number})
                return
            except LockLost:  # enqueued trials stay, and the next attempt finds them
                continue

    def next(self) -> list[optuna.Trial]:
        """Return the next signed and sampled trials, then full evaluations of promising pruned ones, then none.

        Raises:
            Interrupted: after a stop request.
        """
        batch_size = self._trials_per_batch()
        signed = signature()  # before taking the lock: it queries the GPU drivers, which is slow
        while True:
            self.stop.check()
            asked: list[optuna.Trial] = []
            try:
                with study_lock(self.study):
                    others = self._claim_trials(batch_size, asked, signed)
            except (LockLost, optuna.exceptions.UpdateFinishedTrialError):
                # The connection was cut, so another worker may have decided too.
                self._fail_trials(asked)
                continue
            except BaseException:
                self._fail_trials(asked)
                raise
            if asked or not others:
                return asked
            self.reporter.study_updated(StudySummary.of(self.study, self.settings))
            time.sleep(POLL_SECONDS)

    def _claim_trials(self, batch_size: int, asked: list[optuna.Trial], signed: dict[str, Any]) -> int:
        """Claim the next trials while holding the lock; returns the number of trials running on other workers."""
        running = self._running() if self.shared else []
        reevaluated = {t.number: attributes.reevaluates(self.study, t) for t in running}
        remaining = (
            self.settings.n_trials - n_complete(self.study) - sum(number is None for number in reevaluated.values())
        )
        # 1. Sample new trials until `n_trials` are finished or running, or the study has converged.
        if remaining > 0 and not self._has_converged():
            for _ in range(min(batch_size, remaining)):
                self.study.sampler = sampler(self.settings, self._sampler_number())
                self._sign(self.study.ask(), asked, signed)
                # Sample at once: random parameters come from the sampler that the study has now.
                self.trials.sample(asked[-1])
        # 2. Then evaluate promising pruned trials in full, one at a time, once only reevaluations are running.
        elif None not in reevaluated.values():
            under_way = set(reevaluated.values())
            for pending in StudyHistory.of(self.study).pending_full_evaluations():
                if pending.number not in under_way:
                    self.study.enqueue_trial(pending.params, user_attrs={REEVALUATES: pending.number})
                    reevaluation = claim_waiting_trial(self.study, self.study.get_trials(deepcopy=False)[-1])
                    if reevaluation is not None:
                        self._sign(reevaluation, asked, signed)
                    break
        return len(running)

    def _has_converged(self) -> bool:
        """Whether the study has converged; stores a new decision, since running trials could change it later."""
        found = convergence(self.study, self.settings, StudyHistory.of(self.study))
        if found and found != Convergence.load(self.study):
            found.save(self.study)
        return found is not None

    def _running(self) -> list[FrozenTrial]:
        for dead in requeue_stale_trials(self.study, self.settings.workers):
            self.reporter.warning(f"The worker of trial {dead.number} is gone. Another worker retries the trial.")
        return self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))

    def _sampler_number(self) -> int:
        """Return the number that seeds the next trial's sampler.

        With other workers it must be unique. Alone, an interrupted trial is sampled again; one that failed is not.
        """
        trials = self.study.get_trials(deepcopy=False)
        if self.shared:
            return len(trials)
        counted = (TrialState.COMPLETE, TrialState.RUNNING)
        return sum(t.state in counted or attributes.failed_on_its_own(self.study, t) for t in trials)

    def _sign(self, trial: optuna.Trial, asked: list[optuna.Trial], signed: dict[str, Any]) -> None:
        asked.append(trial)
        trial.set_user_attr(WORKER, signed)
        storage = rdb_storage(self.study)
        if isinstance(storage, RetryingRDBStorage) and storage.get_heartbeat_interval():
            storage._retry(storage.record_heartbeat, trial._trial_id)

    def _fail_trials(self, asked: Sequence[optuna.Trial]) -> None:
        for trial in asked:
            self.study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)

    def _trials_per_batch(self) -> int:
        """Return the batch size, stored in the study so that a resumed study samples the same trials."""
        before = attributes.trials_per_batch(self.study)
        now = self.trials.trials_per_batch(before)
        if now != before:
            self.study.set_user_attr(TRIALS_PER_BATCH, now)
        return now
