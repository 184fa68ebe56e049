"""Database storage that retries every call while the server is unreachable, for a bounded time."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import optuna
import sqlalchemy
from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.trial import TrialState

from heretic.errors import first_line
from heretic.interrupt import StopSignal
from heretic.progress import NULL_REPORTER, ProgressReporter
from heretic.settings import WorkerSettings

PAUSE = 1.0  # seconds between two attempts

# The storage calls of Optuna that can be repeated. If the answer of `_create_new_trial` or `set_trial_state_values` is lost, an
# unsigned running trial remains, which the next worker that asks for a trial marks as failed.
CALLS = (
    "create_new_study", "delete_study", "get_all_studies", "get_study_id_from_name", "get_study_name_from_id",
    "get_study_directions", "get_study_user_attrs", "get_study_system_attrs", "set_study_user_attr", "set_study_system_attr",
    "get_trial", "get_trial_id_from_study_id_trial_number", "set_trial_user_attr", "set_trial_system_attr",
    "set_trial_state_values", "_create_new_trial", "_get_trials", "_set_trial_param", "_get_stale_trial_ids",
)  # fmt: skip


@dataclass(frozen=True)
class RetryPolicy:
    """Maximum waiting time for a server in seconds, the reporter, and the signal that ends the waiting early."""

    seconds: float = 0.0
    reporter: ProgressReporter = NULL_REPORTER
    stop: StopSignal | None = None


def effective_grace_period(workers: WorkerSettings) -> int:
    """Return the seconds without a heartbeat after which a worker counts as dead."""
    return max(workers.grace_period, 2 * workers.heartbeat)


class RetryingRDBStorage(optuna.storages.RDBStorage):
    """Optuna's RDBStorage that survives server restarts and lost connections."""

    def __init__(self, url: str, policy: RetryPolicy, **arguments: Any) -> None:
        super().__init__(url, **arguments)
        self.policy = policy
        self.gave_up = False
        self.outages = 0
        self.reachable_since = time.monotonic()

    def configure_heartbeat(self, workers: WorkerSettings) -> None:
        """Set the heartbeat interval and grace period from the settings."""
        self.heartbeat_interval, self.grace_period = workers.heartbeat, effective_grace_period(workers)

    def set_trial_state_values(self, trial_id: int, state: TrialState, values: Sequence[float] | None = None) -> bool:
        """Set the state as in RDBStorage; if an attempt whose answer was lost has already stored it, succeed."""
        before = self.outages
        try:
            return self._retry(super().set_trial_state_values, trial_id, state, values)
        except UpdateFinishedTrialError:
            if self.outages == before:
                raise
            stored = self.get_trial(trial_id)
            if stored.state != state or stored.values != (None if values is None else list(values)):
                raise
            return True

    def _retry(self, call: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        """Call, and retry while the server is unreachable. Raises the last error after the timeout."""
        began: float | None = None
        while True:
            try:
                result = call(*arguments, **named)
            except (sqlalchemy.exc.SQLAlchemyError, StorageInternalError) as error:
                if not is_connection_error(error) or self.gave_up:
                    raise
                now = time.monotonic()
                if began is None:
                    began = now
                    self.outages += 1
                    self.policy.reporter.warning(
                        f"Lost the connection to the storage ({reason(error)}). Retrying for up to {self.policy.seconds:.0f} s."
                    )
                stopped = self.policy.stop is not None and self.policy.stop.requested
                if stopped or now - began >= self.policy.seconds:
                    self.gave_up = True  # calls during the shutdown must not wait again
                    raise
                time.sleep(PAUSE)
            else:
                if began is not None:
                    self.reachable_since = time.monotonic()
                    self.policy.reporter.info(f"Reconnected to the storage after {self.reachable_since - began:.0f} s.")
                return result


def is_connection_error(error: BaseException) -> bool:
    """Return whether the connection or server failed, rather than the query."""
    cause = error.__cause__ if isinstance(error, StorageInternalError) else error
    kinds = (
        sqlalchemy.exc.OperationalError,
        sqlalchemy.exc.InterfaceError,
        sqlalchemy.exc.DisconnectionError,
        sqlalchemy.exc.PendingRollbackError,  # Optuna repeats a read on a lost connection
    )
    return isinstance(cause, kinds) or bool(getattr(cause, "connection_invalidated", False))


def reason(error: BaseException) -> str:
    """Return the first line of the database's message."""
    cause = error.__cause__ or error
    return first_line(getattr(cause, "orig", None) or cause)


def _retried(name: str) -> Callable[..., Any]:
    original = getattr(optuna.storages.RDBStorage, name)

    @functools.wraps(original)
    def call(self: RetryingRDBStorage, *arguments: Any, **named: Any) -> Any:
        return self._retry(functools.partial(original, self), *arguments, **named)

    return call


for _name in CALLS:
    if _name not in vars(RetryingRDBStorage):
        setattr(RetryingRDBStorage, _name, _retried(_name))
