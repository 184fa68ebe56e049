"""Workers of one study as threads, each with a storage of its own, that measure nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import optuna

from heretic.errors import UserError
from heretic.interrupt import StopSignal
from heretic.scoring.scores import Divergence, Scores, TrialOutcome
from heretic.settings import SearchSettings, Settings, WorkerSettings
from heretic.storage.rdb import open_study
from heretic.storage.retrying import RetryPolicy
from tests.helpers.reporters import RecordingReporter

QUICK = WorkerSettings(heartbeat=1, grace_period=2, retry_timeout=30)


class Stub:
    """Draws one number and gives it back as the KL; `before` is called with every trial that is measured."""

    def __init__(self, before: Callable[[optuna.Trial], object] = lambda _: None) -> None:
        self.before = before

    def trials_per_batch(self, before: int | None) -> int:
        return 1

    def initial_params(self) -> list[dict[str, float]]:
        return []

    def sample(self, trial: optuna.Trial) -> float:
        return trial.suggest_float("x", 0.1, 1.0)

    def measure(
        self, trials: Sequence[optuna.Trial], beaten: Callable[[float, float], bool]
    ) -> list[TrialOutcome | UserError]:
        for trial in trials:
            self.before(trial)
        return [Scores(Divergence(self.sample(t), 0, 0, 0), int(10 * self.sample(t)), 10, {}) for t in trials]


def settings(n: int, **workers: int) -> Settings:
    search = SearchSettings(n_startup_trials=1000, kl_floor=0.0)
    return Settings(n_trials=n, early_stopping=False, search=search, workers=QUICK.model_copy(update=workers))


def opened(url: str, reporter: RecordingReporter | None = None) -> optuna.Study:
    """The study `s`, through a connection of its own."""
    return open_study(url, "s", {"a": 1}, QUICK, RetryPolicy(30, reporter or RecordingReporter(), StopSignal()))
