"""What `heretic status` shows of a run that is under way."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import optuna
import pytest

from heretic.interrupt import StopSignal
from heretic.pipeline.run import run
from heretic.progress import NULL_REPORTER
from heretic.runs.status import load_study, read_status
from heretic.settings.sources import resolve
from heretic.storage.attributes import WORKER
from heretic.storage.heartbeat import signature
from heretic.storage.url import storage_url
from tests.helpers.errors import raises

HOLD = """
import sys
from pathlib import Path
from heretic.hardware.locks import acquire_locks
with acquire_locks([Path(sys.argv[1])], model="m"):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_stage_and_memory_of_a_run_under_way(config: Path) -> None:
    folder = run(resolve(config, assignments=["run_name=mine"]), reporter=NULL_REPORTER, stop=StopSignal()).folder
    (folder.path / "run.log").write_text("2026-11-25 20:49:41,801 INFO Baseline: 4.0 s\n")
    idle = read_status("mine", "runs", {})
    assert idle.state == "complete" and not idle.memory and not idle.latest
    command = [sys.executable, "-c", HOLD, str(folder.lock)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        seen = read_status("mine", "runs", {})
        process.communicate("")
    assert seen.state.startswith("running") and "by this run" in seen.memory["RAM"]
    assert seen.latest == "2026-11-25 20:49:41 Baseline: 4.0 s"
    assert seen.as_dict()["memory"] == seen.memory


def test_memory_of_other_machines_from_the_storage_alone(config: Path) -> None:
    folder = run(resolve(config, assignments=["run_name=mine"]), reporter=NULL_REPORTER, stop=StopSignal()).folder
    url = storage_url("", folder.path)
    study = load_study(url, "heretic")
    study.ask().set_user_attr(WORKER, signature() | {"host": "elsewhere"})
    seen = read_status("heretic", "runs", {}, storage=url)
    assert "on elsewhere" in seen.state and "used" in seen.memory["RAM of elsewhere"]
    assert socket.gethostname() not in seen.state


def test_a_trial_of_an_earlier_start_of_the_machine_does_not_run(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The power went while it was measured, or the container is another one now."""
    folder = run(resolve(config, assignments=["run_name=mine"]), reporter=NULL_REPORTER, stop=StopSignal()).folder
    study = load_study(storage_url("", folder.path), "heretic")
    study.ask().set_user_attr(WORKER, signature() | {"machine": "an earlier start"})
    assert read_status("mine", "runs", {}).state == "complete"
    again = run(resolve(config, assignments=["run_name=mine", "n_trials=5"]), reporter=NULL_REPORTER, stop=StopSignal())
    assert len(again.results) == 5 and not study.get_trials(states=(optuna.trial.TrialState.RUNNING,))


def test_a_storage_in_the_environment_is_not_that_of_a_run_with_its_own(config: Path) -> None:
    run(resolve(config, assignments=["run_name=mine"]), reporter=NULL_REPORTER, stop=StopSignal())
    elsewhere = {"HERETIC_STORAGE": "postgresql://me@127.0.0.1:9/studies"}
    assert read_status("mine", "runs", elsewhere).state == "complete"


def test_before_the_first_trial_it_says_what_is_being_done(config: Path) -> None:
    folder = run(resolve(config, assignments=["run_name=mine"]), reporter=NULL_REPORTER, stop=StopSignal()).folder
    (folder.path / "study.db").unlink()
    (folder.path / "run.log").write_text("2026-11-25 20:49:41,801 INFO Baseline: 4.0 s\n")
    with raises("no-study") as raised:
        read_status("mine", "runs", {})
    assert "2026-11-25 20:49:41 Baseline: 4.0 s" in str(raised.value.fix)
