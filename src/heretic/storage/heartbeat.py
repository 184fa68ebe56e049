"""Heartbeats of running trials, and retries of the trials of dead workers.

Optuna records heartbeats only in `optimize`. heretic uses ask and tell, so a thread records them.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from heretic.hardware.memory_usage import memory_usage
from heretic.settings import WorkerSettings
from heretic.storage import attributes
from heretic.storage.attributes import RETRIES, RETRY, START
from heretic.storage.rdb import STORAGE_ERRORS, is_alive, worker
from heretic.storage.retrying import RetryingRDBStorage
from heretic.storage.study_lock import rdb_storage


def signature() -> dict[str, Any]:
    """Return the identity of this worker and its machine's memory usage, stored with its trials."""
    return {**worker(), "memory": {use.device: str(use) for use in memory_usage()}}


@contextmanager
def heartbeat_thread(beat: Callable[[], None], seconds: float) -> Iterator[None]:
    """Call `beat` from a thread, at once and then periodically, within the context; storage errors are ignored."""
    ended = threading.Event()

    def run() -> None:
        while not ended.is_set():
            with suppress(*STORAGE_ERRORS):
                beat()
            ended.wait(seconds)

    thread = threading.Thread(target=run, daemon=True, name="heartbeat")
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


@contextmanager
def trial_heartbeats(study: optuna.Study, trials: Sequence[optuna.Trial]) -> Iterator[None]:
    """Record heartbeats of these trials within the context.

    A storage in a file needs none, since all workers are then processes of one machine.
    """
    storage = rdb_storage(study)
    if storage is None or not (interval := storage.get_heartbeat_interval()):
        yield
        return
    known = [trial._trial_id for trial in trials]

    def beat() -> None:
        for trial_id in known:
            storage.record_heartbeat(trial_id)

    with heartbeat_thread(beat, interval):
        yield


def requeue_stale_trials(study: optuna.Study, workers: WorkerSettings) -> list[FrozenTrial]:
    """Fail the running trials of dead workers and enqueue their parameters again. The caller holds the study lock.

    A worker on this machine is dead if its process is gone; one elsewhere, if its last heartbeat is older than the grace period
    by the server's clock. After an outage this waits for two heartbeats, so that every live worker could send one.

    Returns:
        The failed trials.
    """
    dead: list[FrozenTrial] = []
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        if not is_alive(attributes.signature(trial)):
            study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)
            dead.append(trial)
    storage = rdb_storage(study)
    if isinstance(storage, RetryingRDBStorage):
        reachable = time.monotonic() - storage.reachable_since > 2 * workers.heartbeat + 1
        if reachable:
            storage.heartbeat_stale_trial_callback = lambda _study, trial: dead.append(trial)
            optuna.storages.fail_stale_trials(study)
    for trial in dead:
        _enqueue_retry(study, trial, workers.retries)
    return dead


def _enqueue_retry(study: optuna.Study, trial: FrozenTrial, most: int) -> None:
    params = trial.params or attributes.fixed_params(study, trial)
    times = attributes.retries(study, trial) + 1
    # A full evaluation is not retried: the scheduler chooses those again.
    if params and times <= most and attributes.reevaluates(study, trial) is None:
        number = attributes.start(study, trial)
        initial = {} if number is None else {START: number}
        study.enqueue_trial(params, user_attrs={**initial, RETRY: trial.number, RETRIES: times})


def retry_of(study: optuna.Study, number: int) -> optuna.Trial | None:
    """Claim the waiting retry of a trial; None if there is none or another worker has claimed it."""
    for waiting in study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
        if attributes.retry(study, waiting) == number:
            return claim_waiting_trial(study, waiting)
    return None


def claim_waiting_trial(study: optuna.Study, waiting: FrozenTrial) -> optuna.Trial | None:
    """Claim a waiting trial; None if another worker was faster."""
    storage: Any = study._storage
    try:
        if storage.set_trial_state_values(waiting._trial_id, TrialState.RUNNING):
            return optuna.Trial(study, waiting._trial_id)
    except optuna.exceptions.UpdateFinishedTrialError:
        pass
    return None


@dataclass
class StalenessTimer:
    """Measures how long a value has not changed, by the local clock."""

    value: Any = None
    since: float = field(default_factory=time.monotonic)

    def seconds(self, value: Any) -> float:
        """Return the seconds since the value last changed."""
        if value != self.value:
            self.value, self.since = value, time.monotonic()
        return time.monotonic() - self.since
