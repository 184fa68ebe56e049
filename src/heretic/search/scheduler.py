"""Which trials are next, decided by one worker of a study at a time, so that there are neither too many nor too few."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import optuna
from optuna.trial import FrozenTrial, TrialState

from heretic.interrupt import StopSignal
from heretic.search.pruning import StudyHistory
from heretic.search.sampler import sampler
from heretic.search.summary import StudyReporter, StudySummary
from heretic.settings import Settings
from heretic.storage import attributes
from heretic.storage.attributes import REEVALUATES, START, TRIALS_PER_BATCH, WORKER
from heretic.storage.heartbeat import claim_waiting_trial, requeue_stale_trials, signature
from heretic.storage.retrying import RetryingRDBStorage
from heretic.storage.study_lock import LockLost, rdb_storage, study_lock

POLL_SECONDS = 1.0  # seconds, while other workers measure the last trials


class TrialSampler(Protocol):
    """What says how many trials fit together, and draws them."""

    def trials_per_batch(self, before: int | None) -> int:
        """How many trials to hand over at a time; `before` is what this came to in an earlier session."""

    def sample(self, trial: optuna.Trial) -> object:
        """Draw a trial's parameters; they are stored with it."""


def n_complete(study: optuna.Study) -> int:
    """Number of trials that are told."""
    return len(study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)))


@dataclass
class TrialScheduler:
    """The trials of a study that are still to be measured, by this worker or, if it is `shared`, by others beside it."""

    study: optuna.Study
    settings: Settings
    trials: TrialSampler
    reporter: StudyReporter
    stop: StopSignal
    shared: bool = False

    def enqueue_initial(self, starts: Sequence[dict[str, Any]]) -> None:
        """Have the trials to begin with asked for next, those that are not yet in the study; a failed one is tried again."""
        while True:
            try:
                with study_lock(self.study):
                    trials = self.study.get_trials(deepcopy=False)
                    known = {attributes.start(self.study, t) for t in trials if t.state != TrialState.FAIL}
                    for number, params in enumerate(starts):
                        if number not in known:
                            self.study.enqueue_trial(params, user_attrs={START: number})
                return
            except LockLost:  # what was queued stays, and is seen the next time
                continue

    def next(self) -> list[optuna.Trial]:
        """The next trials, signed and drawn; once all are finished, one that was told with an estimate good enough for the
        front; then none. Raises Interrupted."""
        batch_size = self._trials_per_batch()
        signed = signature()  # before the turn, which others wait for: the drivers are asked for it
        while True:
            self.stop.check()
            asked: list[optuna.Trial] = []
            try:
                with study_lock(self.study):
                    others = self._claim_trials(batch_size, asked, signed)
            except (
                LockLost,
                optuna.exceptions.UpdateFinishedTrialError,
            ):  # the connection was cut: others have decided too
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
        """Within a turn: ask for what there is to do; how many trials others have under way."""
        running = self._running() if self.shared else []
        reevaluated = {t.number: attributes.reevaluates(self.study, t) for t in running}
        left = self.settings.n_trials - n_complete(self.study) - sum(number is None for number in reevaluated.values())
        if left > 0:
            for _ in range(min(batch_size, left)):
                self.study.sampler = sampler(self.settings, self._sampler_number())
                self._sign(self.study.ask(), asked, signed)
                # At once: what is drawn at random comes from the study's sampler of the moment.
                self.trials.sample(asked[-1])
        elif None not in reevaluated.values():  # whatever is under way repeats another
            under_way = set(reevaluated.values())
            for pending in StudyHistory.of(self.study).pending_full_evaluations():
                if pending.number not in under_way:
                    self.study.enqueue_trial(pending.params, user_attrs={REEVALUATES: pending.number})
                    reevaluation = claim_waiting_trial(self.study, self.study.get_trials(deepcopy=False)[-1])
                    if reevaluation is not None:
                        self._sign(reevaluation, asked, signed)
                    break
        return len(running)

    def _running(self) -> list[FrozenTrial]:
        for dead in requeue_stale_trials(self.study, self.settings.workers):
            self.reporter.warning(f"The worker of trial {dead.number} is gone; its parameters are tried again.")
        return self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))

    def _sampler_number(self) -> int:
        """What the next trial's sampler is seeded by. Beside others it must be a number that never comes twice; alone, a trial that
        was cut off is drawn again, and one that failed by itself is not."""
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
        """How many trials at a time: stored, since what is drawn depends on it, and a resumed study shall draw the same."""
        before = attributes.trials_per_batch(self.study)
        now = self.trials.trials_per_batch(before)
        if now != before:
            self.study.set_user_attr(TRIALS_PER_BATCH, now)
        return now
