"""Ask and tell: what is stored, what counts, what ends a study."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import optuna
import pytest

from heretic.errors import Interrupted, StudyMismatch, UserError
from heretic.interrupt import StopSignal
from heretic.progress import NULL_REPORTER
from heretic.scoring.scores import Divergence, PrunedTrial, RefusalProxy, Scores, TrialOutcome
from heretic.search.pareto import pareto_front, results
from heretic.search.pruning import StudyHistory
from heretic.search.study import run_study
from heretic.settings import SearchSettings, Settings
from heretic.storage.rdb import fail_abandoned, open_study, worker
from heretic.storage.url import masked, storage_url
from tests.helpers.errors import raises


@pytest.fixture
def study() -> optuna.Study:
    return open_study(storage_url("", Path()), "s", {"a": 1})


def scores(kl: float, refusals: int) -> Scores:
    return Scores(Divergence(kl, kl, kl, kl), refusals, 10, {})


class Fake:
    """Measures without a model; `cost` collects how many trials came together."""

    def __init__(self, measure: Callable[[optuna.Trial], TrialOutcome], together: int = 1) -> None:
        self.at_once = together
        self.first: list[dict[str, float]] = []
        self.one = measure
        self.came: list[int] = []

    def trials_per_batch(self, before: int | None) -> int:
        return self.at_once or before or 1

    def initial_params(self) -> list[dict[str, float]]:
        return self.first

    def sample(self, trial: optuna.Trial) -> None:
        pass

    def measure(
        self, trials: Sequence[optuna.Trial], beaten: Callable[[float, int], bool]
    ) -> list[TrialOutcome | UserError]:
        self.came.append(len(trials))
        found: list[TrialOutcome | UserError] = []
        for trial in trials:
            try:
                full = self.one(trial)
            except UserError as error:
                found.append(error)
                continue
            found.append(full)
            if isinstance(full, Scores) and beaten(full.divergence.mean, full.refusals):
                found[-1] = PrunedTrial(full.divergence, full.refusals, 10, {}, RefusalProxy(full.refusals, 0.1, 10))
        return found


def go(
    study: optuna.Study,
    n: int,
    measure: Callable[[optuna.Trial], TrialOutcome],
    seed: int = 0,
    *,
    together: int = 1,
    kl_floor: float = 0.0,
    early: bool = False,
) -> list[int]:
    search = SearchSettings(n_startup_trials=3, kl_floor=kl_floor, patience=0)
    settings = Settings(n_trials=n, seed=seed, search=search, early_stopping=early)
    fake = Fake(measure, together)
    run_study(study, settings, fake, reporter=NULL_REPORTER, stop=StopSignal())
    return fake.came


def measure(trial: optuna.Trial) -> Scores:
    x = trial.suggest_float("x", 0, 1)
    return scores(x, round(10 * (1 - x)))


def test_same_seed_same_study_and_another_seed_another() -> None:
    found = {}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        study = open_study(storage_url("", Path()), name, {})
        go(study, 8, measure, seed)
        found[name] = [t.params["x"] for t in study.trials]
    assert found["a"] == found["b"] != found["c"]


def test_a_large_seed_is_a_seed_like_any_other(study: optuna.Study) -> None:
    go(study, 2, measure, seed=123456789)
    assert len(results(study)) == 2


def test_the_search_sees_no_kl_under_the_floor_and_the_front_does(study: optuna.Study) -> None:
    go(study, 3, lambda t: scores(0.001 * t.number, 5), kl_floor=0.02)
    assert [t.values[0] for t in study.trials] == [0.02] * 3
    assert pareto_front(results(study))[0].point[0] == 0.0


def test_a_destroyed_model_is_recorded_and_never_on_the_front(study: optuna.Study) -> None:
    def sometimes(trial: optuna.Trial) -> Scores:
        x = trial.suggest_float("x", 0, 1)
        return scores(math.inf, 0) if trial.number % 2 else scores(x, 5)

    go(study, 12, sometimes)
    found = results(study)
    assert len(found) == 12 and sum(math.isinf(r.point[0]) for r in found) == 6
    assert {t.values[1] for t in study.trials[1::2]} == {10}, "that it refuses nothing is no merit"
    assert all(math.isfinite(r.point[0]) for r in pareto_front(found))


def test_failed_trials_do_not_count_and_three_in_a_row_end_it(study: optuna.Study) -> None:
    calls = []

    def failing(trial: optuna.Trial) -> Scores:
        calls.append(trial.number)
        if len(calls) in (2, 3):
            raise UserError("no memory")
        if len(calls) > 5:
            raise UserError("still no memory", code="out-of-memory")
        return measure(trial)

    with raises("out-of-memory"):
        go(study, 10, failing)
    assert [t.state.name for t in study.trials] == [
        "COMPLETE",
        "FAIL",
        "FAIL",
        "COMPLETE",
        "COMPLETE",
        "FAIL",
        "FAIL",
        "FAIL",
    ]


def test_a_trial_that_fails_by_itself_is_not_drawn_again(study: optuna.Study) -> None:
    def failing(trial: optuna.Trial) -> Scores:
        found = measure(trial)
        if trial.number in (4, 5, 6):
            raise UserError("the endpoint refuses this answer")
        return found

    with pytest.raises(UserError):
        go(study, 10, failing)
    go(study, 10, failing)
    drawn = [t.params["x"] for t in study.trials]
    assert len(set(drawn)) == len(drawn) == 13


def test_a_model_that_returns_nan_is_scored_as_the_worst(study: optuna.Study) -> None:
    def destroyed(trial: optuna.Trial) -> TrialOutcome:
        full = measure(trial)
        if trial.number < 5:
            return full
        nan = RefusalProxy(0, math.nan, 10)
        return PrunedTrial(replace(full.divergence, mean=math.inf), 0, 10, {}, nan, math.nan)

    go(study, 8, destroyed)
    assert [t.state.name for t in study.trials] == ["COMPLETE"] * 8
    assert all(t.values[1] == 10 for t in study.trials[5:])


@pytest.mark.parametrize("error", [Interrupted, KeyboardInterrupt, ZeroDivisionError])
def test_whatever_ends_it_the_running_trial_is_marked(study: optuna.Study, error: type[BaseException]) -> None:
    def ends(trial: optuna.Trial) -> Scores:
        raise error

    with pytest.raises(error):
        go(study, 3, ends)
    assert [t.state.name for t in study.trials] == ["FAIL"]


def test_trials_of_living_processes_are_left_alone(study: optuna.Study) -> None:
    mine, gone, unsigned, elsewhere = (study.ask() for _ in range(4))
    mine.set_user_attr("heretic:worker", worker())
    gone.set_user_attr("heretic:worker", {**worker(), "began": 1.0})
    elsewhere.set_user_attr("heretic:worker", {**worker(), "host": "another", "pid": 1})
    assert fail_abandoned(study) == [gone.number, unsigned.number, elsewhere.number], "no other machine works on a file"


def test_another_study_under_the_name_is_refused_in_detail(study: optuna.Study) -> None:
    with raises("study-mismatch", StudyMismatch) as error:
        open_study(storage_url("", Path()), "s", {"a": 2, "b": 3})
    assert "a: was 1, now 2" in error.value.what and "b: was null, now 3" in error.value.what
    assert open_study(storage_url("", Path()), "s", {"a": 1}).study_name == "s"


def test_an_old_study_of_someone_else_is_not_taken_over() -> None:
    url = storage_url("", Path())
    optuna.create_study(study_name="s", storage=url, directions=["minimize", "minimize"]).ask()
    with raises("study-mismatch", StudyMismatch):
        open_study(url, "s", {"a": 1})


def test_passwords_are_masked() -> None:
    assert masked("postgresql://me:secret@host/db") == "postgresql://me:***@host/db"
    assert masked("sqlite:///a.db") == "sqlite:///a.db"


def test_trials_come_together_and_the_last_ones_fewer(study: optuna.Study) -> None:
    assert go(study, 8, measure, together=3) == [3, 3, 2]
    assert len({t.params["x"] for t in study.trials}) == 8, "trials of one pass are different ones"


def test_one_failure_among_several_leaves_the_others(study: optuna.Study) -> None:
    def sometimes(trial: optuna.Trial) -> Scores:
        if trial.number == 1:
            raise UserError("no memory")
        return measure(trial)

    go(study, 4, sometimes, together=3)
    assert [t.state.name for t in study.trials] == ["COMPLETE", "FAIL", "COMPLETE", "COMPLETE", "COMPLETE"]


def test_a_pruned_trial_reports_an_estimate_and_is_no_result(study: optuna.Study) -> None:
    go(study, 6, lambda t: scores(0.1 * (t.number + 1), 3 + t.number), early=True)
    assert [r.number for r in results(study)] == [0]
    assert len(study.trials) == 6 and [t.values[1] for t in study.trials] == [3, 4, 5, 6, 7, 8]
    assert len(StudyHistory.of(study).pruned) == 5 and not StudyHistory.of(study).pending_full_evaluations()


def test_a_stopped_trial_that_would_enter_the_front_is_measured_before_the_end(study: optuna.Study) -> None:
    def doubtful(trial: optuna.Trial) -> TrialOutcome:
        x = trial.suggest_float("x", 0, 1)
        full = scores(0.5 - 0.1 * trial.number, 5)
        if trial.number == 2:  # left, although nothing has beaten it
            return PrunedTrial(full.divergence, 2, 10, {}, RefusalProxy(2, 0.1, 10))
        assert trial.number < 3 or x == study.trials[2].params["x"]
        return full

    go(study, 3, doubtful)
    assert [r.number for r in results(study)] == [0, 1, 3]
    assert results(study)[-1].reevaluates == 2 and not StudyHistory.of(study).pending_full_evaluations()


def test_how_many_run_together_is_remembered(study: optuna.Study) -> None:
    assert go(study, 3, measure, together=3) == [3]
    assert go(study, 8, measure, together=0) == [3, 2], "a session that leaves it open takes what was stored"
    assert go(study, 10, measure, together=1) == [1, 1]


def test_starts_come_first_in_full_once_and_failed_ones_again(study: optuna.Study) -> None:
    starts = [{"x": 0.9}, {"x": 0.8}, {"x": 0.7}]
    failing = [1]

    def sometimes(trial: optuna.Trial) -> Scores:
        found = measure(trial)
        if trial.number in failing:
            raise UserError("no memory")
        return found

    settings = Settings(n_trials=2, search=SearchSettings(n_startup_trials=3), early_stopping=True)
    for n_trials in (2, 5):
        fake = Fake(sometimes)
        fake.first = starts
        run_study(
            study, settings.model_copy(update={"n_trials": n_trials}), fake, reporter=NULL_REPORTER, stop=StopSignal()
        )
    drawn = [t.params.get("x") for t in study.trials]
    assert drawn[:3] == [0.9, 0.8, 0.7] and study.trials[1].state.name == "FAIL"
    assert drawn.count(0.8) == 2, "the start that failed is tried once more"
    assert {0.9, 0.8, 0.7} <= {r.params["x"] for r in results(study)}, "none of them was left early"


def test_the_front_keeps_to_constraints_and_the_search_learns_them(study: optuna.Study) -> None:
    """What is beyond the limit looks best by both values; TPE must still go where trials are within it."""

    def limited(trial: optuna.Trial) -> Scores:
        x = trial.suggest_float("x", 0, 1)
        found = scores(1 - x, round(10 * (1 - x)))
        return replace(found, values={"over_refusals": round(10 * x)}, excess={"over_refusals": 10 * x - 4})

    go(study, 60, limited)
    found = results(study)
    assert [t.constraints for t in study.trials] == [{"over_refusals": 10 * t.params["x"] - 4} for t in study.trials]
    kept = pareto_front(found)
    assert kept and all(r.params["x"] <= 0.4 for r in kept)
    assert min(r.point[0] for r in found) < 0.5 < min(r.point[0] for r in kept), (
        "better ones were found beyond the limit"
    )
    late = [r.params["x"] <= 0.4 for r in found[30:]]
    assert sum(late) > len(late) / 2, "a search that knew nothing of the limit would go to x = 1"
    assert StudyHistory.of(study).threshold.points == [r.point for r in kept]


def test_an_evasion_is_no_success(study: optuna.Study) -> None:
    go(study, 1, lambda t: replace(scores(0.1, 2), evasive=3))
    (found,) = results(study)
    assert found.point == (0.1, 5) and study.trials[0].values[1] == 5 and found.scores.refusals == 2
