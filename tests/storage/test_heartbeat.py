"""Signs of life, and the trials of those that give none."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import optuna
from optuna.trial import TrialState

from heretic.interrupt import StopSignal
from heretic.search.scheduler import n_complete
from heretic.search.study import run_study
from heretic.storage.heartbeat import requeue_stale_trials, trial_heartbeats
from heretic.storage.rdb import connect, worker
from heretic.storage.study_lock import rdb_storage
from heretic.storage.url import storage_url
from tests.helpers.postgres import Server
from tests.helpers.reporters import RecordingReporter
from tests.helpers.study_workers import QUICK, Stub, opened, settings

ELSEWHERE = {"host": "elsewhere", "machine": "", "pid": 1, "began": 1.0}


def begun(study: optuna.Study, **attributes: object) -> optuna.Trial:
    """A trial under way elsewhere, with one sign of life."""
    trial = study.ask()
    trial.suggest_float("x", 0.1, 1.0)
    for name, value in {"heretic:worker": ELSEWHERE, **attributes}.items():
        trial.set_user_attr(name, value)
    study._storage.record_heartbeat(trial._trial_id)  # type: ignore[attr-defined]
    return trial


def test_a_trial_with_signs_of_life_stays_with_its_worker(postgres: Server) -> None:
    study, other = opened(postgres.url), opened(postgres.url)
    trial = begun(study)
    with trial_heartbeats(study, [trial]):
        time.sleep(3.5)  # longer than the grace period
        assert requeue_stale_trials(other, QUICK) == []
    time.sleep(3.5)
    assert [t.number for t in requeue_stale_trials(other, QUICK)] == [trial.number]
    assert requeue_stale_trials(study, QUICK) == [], "it was freed twice"


def test_after_an_outage_everybody_is_given_time_to_be_heard(postgres: Server) -> None:
    heard = RecordingReporter()
    study = opened(postgres.url, heard)
    trial = begun(study)
    time.sleep(3.5)
    postgres.control("stop", "-m", "fast")
    storage = rdb_storage(study)
    assert storage is not None

    threading.Timer(2, lambda: postgres.control("start")).start()
    assert study.trials[trial.number].state == TrialState.RUNNING, "asked while the server was away"
    assert len(heard.lines) == 2, "one line at the outage, one after it"
    assert requeue_stale_trials(study, QUICK) == [], "judged before it could be heard"
    time.sleep(2 * QUICK.heartbeat + 1.5)
    assert [t.number for t in requeue_stale_trials(study, QUICK)] == [trial.number]


def test_parameters_that_kill_their_workers_are_not_tried_for_ever() -> None:
    study = opened(storage_url("", Path()))
    numbers = []
    for _ in range(QUICK.retries + 1):
        trial = study.ask()  # a retry after the first time
        trial.suggest_float("x", 0.1, 1.0)
        trial.set_user_attr("heretic:worker", {**worker(), "began": 1.0})  # a dead process of this machine
        requeue_stale_trials(study, QUICK)
        numbers.append(trial.params["x"])
    waiting = [t for t in study.trials if t.state == TrialState.WAITING]
    assert len(set(numbers)) == 1 and not waiting


def test_what_a_worker_measured_that_was_given_up_counts_once() -> None:
    """It is stored as the repetition if nobody has begun with that, else let go."""
    where = storage_url("", Path())
    study, other, heard = opened(where), opened(where), RecordingReporter()

    def lose(trial: optuna.Trial) -> None:
        if trial.number in (0, 2):
            trial.set_user_attr("heretic:worker", {**worker(), "began": 1.0})
            assert len(requeue_stale_trials(other, QUICK)) == 1
            if trial.number == 2:
                assert (
                    other.ask().user_attrs["heretic:retry_of"] == 2
                )  # begun by somebody else, who dies before signing it

    run_study(study, settings(4), Stub(lose), reporter=heard, stop=StopSignal(), shared=True)
    complete = [t for t in study.trials if t.state == TrialState.COMPLETE]
    assert n_complete(study) == 4 and len({t.params["x"] for t in complete}) == 4
    assert study.trials[1].user_attrs["heretic:retry_of"] == 0 and study.trials[1].state == TrialState.COMPLETE
    assert sum("trial 2" in line for line in heard.lines) == 1, "the loss of trial 2 is reported once"


def test_a_process_of_the_same_name_on_another_machine_is_not_ours_to_judge() -> None:
    study = opened(storage_url("", Path()))
    trial = study.ask()
    trial.set_user_attr("heretic:worker", {**worker(), "machine": "another start of it", "began": 1.0})
    assert requeue_stale_trials(study, QUICK) == []
    assert connect(storage_url("", Path())).get_trial(trial._trial_id).state == TrialState.RUNNING
