"""Ask and tell: what is stored, what counts, what ends a study."""

from __future__ import annotations

import math
from pathlib import Path

import optuna
import pytest

from heretic.errors import Interrupted, StudyMismatch, UserError
from heretic.progress import SILENT
from heretic.scoring.divergence import Divergence
from heretic.scoring.ladder import Scores
from heretic.search.front import front, results
from heretic.search.storage import fail_abandoned, masked, open_study, storage_url, worker
from heretic.search.study import optimise
from heretic.stop import Stop


@pytest.fixture
def study() -> optuna.Study:
    return open_study(storage_url("", Path()), "s", {"a": 1})


def scores(kl: float, refusals: int) -> Scores:
    return Scores(Divergence(kl, kl, kl, kl), refusals, 10, {})


def go(study: optuna.Study, n: int, measure: object, seed: int = 0) -> None:
    optimise(study, n, measure, seed=seed, n_startup_trials=3, kl_floor=0.0, watcher=SILENT, stop=Stop())  # type: ignore[arg-type]


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
    optimise(
        study,
        3,
        lambda t: scores(0.001 * t.number, 5),
        seed=0,
        n_startup_trials=3,
        kl_floor=0.02,
        watcher=SILENT,
        stop=Stop(),
    )
    assert [t.values[0] for t in study.trials] == [0.02] * 3
    assert front(results(study))[0].point[0] == 0.0


def test_a_destroyed_model_is_recorded_and_never_on_the_front(study: optuna.Study) -> None:
    def sometimes(trial: optuna.Trial) -> Scores:
        x = trial.suggest_float("x", 0, 1)
        return scores(math.inf, 0) if trial.number % 2 else scores(x, 5)

    go(study, 12, sometimes)
    found = results(study)
    assert len(found) == 12 and sum(math.isinf(r.point[0]) for r in found) == 6
    assert all(math.isfinite(r.point[0]) for r in front(found))


def test_failed_trials_do_not_count_and_three_in_a_row_end_it(study: optuna.Study) -> None:
    calls = []

    def failing(trial: optuna.Trial) -> Scores:
        calls.append(trial.number)
        if len(calls) in (2, 3):
            raise UserError("no memory")
        if len(calls) > 5:
            raise UserError("still no memory")
        return measure(trial)

    with pytest.raises(UserError, match="still no memory"):
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


@pytest.mark.parametrize("error", [Interrupted, KeyboardInterrupt, ZeroDivisionError])
def test_whatever_ends_it_the_running_trial_is_marked(study: optuna.Study, error: type[BaseException]) -> None:
    def ends(trial: optuna.Trial) -> Scores:
        raise error

    with pytest.raises(error):
        go(study, 3, ends)
    assert [t.state.name for t in study.trials] == ["FAIL"]


def test_trials_of_living_processes_are_left_alone(study: optuna.Study) -> None:
    mine, gone, unsigned, elsewhere = (study.ask() for _ in range(4))
    mine.set_user_attr("worker", worker())
    gone.set_user_attr("worker", {**worker(), "began": 1.0})
    elsewhere.set_user_attr("worker", {**worker(), "host": "another", "pid": 1})
    assert fail_abandoned(study) == [gone.number, unsigned.number]


def test_another_study_under_the_name_is_refused_in_detail(study: optuna.Study) -> None:
    with pytest.raises(StudyMismatch, match="a: was 1, now 2; b: was null, now 3"):
        open_study(storage_url("", Path()), "s", {"a": 2, "b": 3})
    assert open_study(storage_url("", Path()), "s", {"a": 1}).study_name == "s"


def test_an_old_study_of_someone_else_is_not_taken_over() -> None:
    url = storage_url("", Path())
    optuna.create_study(study_name="s", storage=url, directions=["minimize", "minimize"]).ask()
    with pytest.raises(StudyMismatch):
        open_study(url, "s", {"a": 1})


def test_passwords_are_masked() -> None:
    assert masked("postgresql://me:secret@host/db") == "postgresql://me:***@host/db"
    assert masked("sqlite:///a.db") == "sqlite:///a.db"
