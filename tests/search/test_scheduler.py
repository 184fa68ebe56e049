"""Exactly n trials, whoever asks for them."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import optuna
import pytest
import sqlalchemy
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import TrialState

from heretic.interrupt import StopSignal
from heretic.progress import NULL_REPORTER
from heretic.search.scheduler import n_complete
from heretic.search.study import run_study
from heretic.storage.attributes import START
from heretic.storage.study_lock import LockLost, study_lock
from heretic.storage.url import storage_url
from tests.helpers.postgres import Server
from tests.helpers.study_workers import Stub, opened, settings


def url(kind: str, request: pytest.FixtureRequest) -> str:
    if kind == "sqlite":
        return storage_url("", Path())
    server: Server = request.getfixturevalue("postgres")
    return server.url


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_eight_workers_make_exactly_as_many_trials_as_wanted(kind: str, request: pytest.FixtureRequest) -> None:
    where, trials = url(kind, request), 21
    measured: list[int] = []
    failures: list[BaseException] = []

    class Starting(Stub):
        def initial_params(self) -> list[dict[str, float]]:
            return [{"x": 0.5}, {"x": 0.25}]

    def note(trial: optuna.Trial) -> None:
        measured.append(trial.number)
        time.sleep(0.02)

    def work() -> None:
        try:
            run_study(
                opened(where), settings(trials), Starting(note), reporter=NULL_REPORTER, stop=StopSignal(), shared=True
            )
        except BaseException as error:
            failures.append(error)

    study = opened(where)
    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not failures
    assert n_complete(study) == trials == len(study.trials), "a trial was asked for that nobody wanted"
    assert sorted(measured) == list(range(trials))
    assert sorted(t.user_attrs[START] for t in study.trials if START in t.user_attrs) == [0, 1]
    assert len({t.params["x"] for t in study.trials}) == trials, "two workers drew the same"


@pytest.mark.parametrize("error", [None, UpdateFinishedTrialError("another worker has told it")])
def test_a_turn_whose_connection_is_cut_says_what_happened_in_it(postgres: Server, error: Exception | None) -> None:
    study = opened(postgres.url)
    of_the_turn = "query like '%pg_advisory_xact_lock%' and pid <> pg_backend_pid()"
    cut = f"select pg_terminate_backend(pid) from pg_stat_activity where {of_the_turn}"
    with pytest.raises(type(error) if error else LockLost), study_lock(study):
        assert postgres.ask(cut)
        if error:
            raise error
    with study_lock(study):
        assert n_complete(study) >= 0, "the next turn has a connection that works"


def test_a_connection_cut_when_a_trial_is_signed_costs_nothing(
    postgres: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = opened(postgres.url)
    done, beats = n_complete(study), []
    beat = optuna.storages.RDBStorage.record_heartbeat

    def cut_once(self: optuna.storages.RDBStorage, trial_id: int) -> None:
        beats.append(trial_id)
        if len(beats) == 1:
            raise sqlalchemy.exc.OperationalError("insert", {}, Exception("server closed the connection unexpectedly"))
        beat(self, trial_id)

    monkeypatch.setattr(optuna.storages.RDBStorage, "record_heartbeat", cut_once)
    run_study(opened(postgres.url), settings(done + 1), Stub(), reporter=NULL_REPORTER, stop=StopSignal(), shared=True)
    assert n_complete(study) == done + 1 and beats.count(beats[0]) >= 2


def test_a_worker_waits_for_the_others_and_takes_over_from_one_that_dies(postgres: Server) -> None:
    study = opened(postgres.url)
    done = n_complete(study)
    begun = time.monotonic()
    gone = study.ask()
    gone.suggest_float("x", 0.1, 1.0)
    gone.set_user_attr("heretic:worker", {"host": "elsewhere", "machine": "", "pid": 1, "began": 1.0})
    database = study._storage
    database.record_heartbeat(gone._trial_id)  # type: ignore[attr-defined]  one sign of life, then none
    run_study(opened(postgres.url), settings(done + 1), Stub(), reporter=NULL_REPORTER, stop=StopSignal(), shared=True)
    assert time.monotonic() - begun > 2, "it was not given its time"
    again = study.trials[-1]
    assert study.trials[gone.number].state == TrialState.FAIL
    assert again.state == TrialState.COMPLETE and again.params == study.trials[gone.number].params
    assert again.user_attrs["heretic:retry_of"] == gone.number and n_complete(study) == done + 1
