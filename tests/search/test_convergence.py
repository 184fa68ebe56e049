"""Convergence: what ends a study before `n_trials`, and what lets it go on."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import optuna
import pytest

from heretic.errors import UserError
from heretic.interrupt import StopSignal
from heretic.progress import NULL_REPORTER
from heretic.scoring.scores import Divergence, PrunedTrial, RefusalProxy, Scores, TrialOutcome
from heretic.search.convergence import Convergence, convergence, final_gain, growth
from heretic.search.integrity import check_study
from heretic.search.pareto import Result
from heretic.search.pruning import StudyHistory
from heretic.search.scheduler import n_complete, trials_remain
from heretic.search.study import run_study
from heretic.search.summary import StudySummary
from heretic.settings import SearchSettings, Settings
from heretic.storage.attributes import CONVERGENCE, REFUSALS_BEFORE, REQUESTED_TRIALS
from heretic.storage.url import storage_url
from tests.helpers.errors import raises
from tests.helpers.study_workers import opened

FLAT = (0.1, 2)  # every trial the same


def scores(kl: float, refusals: int) -> Scores:
    return Scores(Divergence(kl, kl, kl, kl), refusals, 10, {})


class Scripted:
    """Measures trial n as the n-th of these (KL, refusals), then as the last; `before` is called with each trial."""

    def __init__(
        self,
        *points: tuple[float, int],
        initial: Sequence[dict[str, Any]] = (),
        before: Callable[[optuna.Trial], object] = lambda _: None,
    ) -> None:
        self.points, self.initial, self.before = points, initial, before

    def trials_per_batch(self, before: int | None) -> int:
        return 1

    def initial_params(self) -> Sequence[dict[str, Any]]:
        return self.initial

    def sample(self, trial: optuna.Trial) -> float:
        return trial.suggest_float("x", 0, 1)

    def measure(
        self, trials: Sequence[optuna.Trial], is_dominated: Callable[[float, float], bool]
    ) -> list[TrialOutcome | UserError]:
        outcomes: list[TrialOutcome | UserError] = []
        for trial in trials:
            self.sample(trial)
            try:
                self.before(trial)
            except UserError as error:
                outcomes.append(error)
                continue
            kl, refusals = self.points[min(trial.number, len(self.points) - 1)]
            full = scores(kl, refusals)
            pruned = PrunedTrial(full.divergence, refusals, 10, {}, RefusalProxy(refusals, 0.1, 10))
            outcomes.append(pruned if is_dominated(kl, refusals) else full)
        return outcomes


def settings(n_trials: int = 50, patience: int = 5, min_gain: float = 0.01, **others: Any) -> Settings:
    search = SearchSettings(n_startup_trials=0, patience=patience, min_gain=min_gain, kl_floor=0.0)
    return Settings(n_trials=n_trials, search=search, early_stopping=others.pop("early_stopping", False), **others)


def go(study: optuna.Study, wanted: Settings, trials: Scripted, **options: Any) -> int:
    """Run the study; returns its number of finished trials."""
    run_study(study, wanted, trials, reporter=NULL_REPORTER, stop=StopSignal(), **options)
    return n_complete(study)


@pytest.fixture
def study() -> optuna.Study:
    made = optuna.create_study(directions=["minimize", "minimize"])
    made.set_user_attr(REFUSALS_BEFORE, 10)
    return made


def test_gain_is_a_fraction_of_the_hypervolume_now() -> None:
    def gain(hypervolumes: list[float], patience: int, min_gain: float) -> float | None:
        return final_gain(hypervolumes, settings(patience=patience, min_gain=min_gain).search)

    assert gain([0.5, 0.8, 0.8], 2, 0.376) == pytest.approx(0.375) and gain([0.5, 0.8, 0.8], 2, 0.374) is None
    assert gain([0.5, 0.8, 0.8], 1, 0) == 0
    assert gain([0.5, 0.8], 2, 0.9) is None and gain([0.0, 0.0, 0.0], 1, 0.9) is None


def test_a_study_ends_once_the_last_trials_gained_nothing(study: optuna.Study) -> None:
    assert go(study, settings(), Scripted((0.4, 8), (0.2, 4), FLAT)) == 8, "five flat trials after trial 2"
    summary = StudySummary.of(study, settings())
    assert summary.end is not None and summary.end[0] == "converged" and summary.seconds_left is None
    assert summary.convergence == Convergence(trial=7, n_complete=8, gain=0.0, last_gain=2, patience=5, min_gain=0.01)


def test_gains_up_to_min_gain_count_as_none(study: optuna.Study) -> None:
    rising = [(0.2 - 0.001 * n, 2) for n in range(20)]  # 1.7 % of the hypervolume in five trials
    assert go(study, settings(min_gain=0.02), Scripted(*rising)) == 6
    assert go(study, settings(12, min_gain=0.01), Scripted(*rising)) == 12


def test_pruned_trials_count_as_no_gain(study: optuna.Study) -> None:
    assert go(study, settings(early_stopping=True), Scripted(FLAT, (0.3, 5))) == 6
    assert len(StudyHistory.of(study).pruned) == 5


def test_a_study_without_any_hypervolume_goes_on(study: optuna.Study) -> None:
    assert go(study, settings(12), Scripted((0.9, 2))) == 12, "a KL beyond the reference point"


def test_trials_beyond_a_limit_are_no_gain(study: optuna.Study) -> None:
    good, beyond = scores(0.1, 5), replace(scores(0.01, 0), excess={"over_refusals": 3.0})

    class Limited(Scripted):
        def measure(self, trials: Any, is_dominated: Any) -> Any:
            return [beyond if self.sample(t) and t.number else good for t in trials]

    assert go(study, settings(), Limited(FLAT)) == 6


@pytest.mark.parametrize(("patience", "n_trials"), [(0, 12), (30, 7)])
def test_n_trials_is_the_maximum_and_patience_0_runs_all(study: optuna.Study, patience: int, n_trials: int) -> None:
    assert go(study, settings(n_trials, patience), Scripted(FLAT)) == n_trials
    summary = StudySummary.of(study, settings(n_trials, patience))
    assert summary.end is not None and summary.end[0] == "n_trials" and summary.convergence is None


def test_trials_before_tpe_starts_are_not_in_the_window(study: optuna.Study) -> None:
    wanted = settings()
    wanted = wanted.model_copy(update={"search": wanted.search.model_copy(update={"n_startup_trials": 10})})
    assert go(study, wanted, Scripted(FLAT)) == 15


def test_all_initial_trials_are_measured_first(study: optuna.Study) -> None:
    initial = [{"x": n / 20} for n in range(15)]
    assert go(study, settings(), Scripted(FLAT, initial=initial)) == 15
    assert {t.params["x"] for t in study.trials} == {n / 20 for n in range(15)}


@pytest.mark.parametrize(("error", "total"), [(UserError("no memory"), 5), (KeyboardInterrupt(), 6)])
def test_an_initial_trial_that_failed_on_its_own_is_not_awaited_and_an_interrupted_one_is(
    study: optuna.Study, error: BaseException, total: int
) -> None:
    def fail_once(trial: optuna.Trial) -> None:
        if trial.number == 5:
            raise error

    trials = Scripted(FLAT, initial=[{"x": n / 20} for n in range(6)], before=fail_once)
    try:
        go(study, settings(patience=4), trials)
    except KeyboardInterrupt:
        assert trials_remain(study, settings(patience=4)), "one of the initial trials has no result"
        go(study, settings(patience=4), trials)
    assert n_complete(study) == total


def test_a_resumed_study_keeps_the_decision_until_its_settings_change(study: optuna.Study) -> None:
    assert go(study, settings(), Scripted(FLAT)) == 6
    better = Scripted((0.01, 0))
    assert not trials_remain(study, settings()) and go(study, settings(), better) == 6
    assert trials_remain(study, settings(patience=8)), "the user wants to see more"
    assert go(study, settings(patience=8), Scripted(FLAT)) == 9
    assert go(study, settings(11, patience=0), better) == 11


def test_a_decision_outlasts_trials_that_finish_after_it(study: optuna.Study) -> None:
    go(study, settings(), Scripted(FLAT))
    late = study.ask()  # another worker's, running while this one decided
    Scripted().sample(late)
    late.set_user_attr("heretic:scores", scores(0.01, 0).as_dict())
    study.tell(late, [0.01, 0])
    assert not trials_remain(study, settings())


def test_an_explicit_request_for_more_trials_overrides_it(study: optuna.Study) -> None:
    assert go(study, settings(), Scripted(FLAT)) == 6
    study.set_user_attr(REQUESTED_TRIALS, 9)
    with pytest.raises(KeyboardInterrupt):

        def stop_at_8(trial: optuna.Trial) -> None:
            if trial.number == 8:
                raise KeyboardInterrupt

        go(study, settings(9), Scripted(FLAT, before=stop_at_8))
    assert n_complete(study) == 8 and trials_remain(study, settings(50)), "the request is stored"
    assert go(study, settings(50), Scripted(FLAT)) == 9, "it converged again once they were run"


def test_workers_agree_whatever_is_still_running(tmp_path: Path) -> None:
    url = storage_url("", tmp_path)
    opened(url).set_user_attr(REFUSALS_BEFORE, 10)
    finished: list[int] = []
    numbers: list[int] = []

    def slowly(trial: optuna.Trial) -> None:
        numbers.append(trial.number)
        time.sleep(0.15 if trial.number % 3 == 0 else 0.02)

    def work() -> None:
        # The last trials are better: a worker that decides anew after them would go on.
        trials = Scripted(*[FLAT] * 6, *[(0.1 - 0.01 * n, 1) for n in range(9)], (0.01, 0), before=slowly)
        finished.append(go(opened(url), settings(40, early_stopping=False), trials, shared=True))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    study = opened(url)
    decision = Convergence.load(study)
    assert decision is not None and len(finished) == 2
    assert len(numbers) == n_complete(study) <= decision.n_complete + 1, "no trial began after the decision"
    assert not any(trials_remain(opened(url), settings(40)) for _ in range(2))


@pytest.mark.parametrize("stored", ["{}", "5", '{"trial": -1}'])
def test_a_damaged_decision_is_reported(study: optuna.Study, stored: str) -> None:
    study.set_user_attr(CONVERGENCE, stored)
    with raises("damaged-study"):
        check_study(study)


def test_growth_follows_the_ends_of_trials_not_their_numbers(study: optuna.Study) -> None:
    """A slow worker's trial that ends last and raises the front is the last gain."""
    history = StudyHistory(
        [Result(n, {}, scores(*point)) for n, point in enumerate([(0.4, 5), (0.05, 1), (0.4, 6)])], []
    )
    ended = {n: datetime(2026, 1, 1, second=s) for n, s in ((0, 0), (2, 1), (1, 2))}
    numbers, volumes = growth(history, 10, ended)
    assert numbers == [0, 2, 1] and volumes[0] == volumes[1] < volumes[2]


def test_growth_refers_to_the_refusals_of_the_original(study: optuna.Study) -> None:
    go(study, settings(1), Scripted((0.25, 2)))
    history = StudyHistory.of(study)
    assert growth(history, 10) == ([0], [pytest.approx(0.5 * 0.8)]) and growth(history, None) == growth(history, 10)
    assert growth(history, 4) == ([0], [pytest.approx(0.5 * 0.5)])
    assert growth(StudyHistory([], []), None) == ([], []) and convergence(study, settings(), history) is None
